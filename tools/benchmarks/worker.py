"""A process that builds one contestant and then runs its steps when told to.

python -m benchmarks.worker MODULE:FUNCTION JSON_ARGUMENTS

The function builds the contestant and returns a step without arguments. After the warm-up the process writes
{"ready": true}; for each line with a number it runs that many steps and writes {"seconds": for all of them, "done": the
sum of what they returned, where they return how much they have done}. Anything that a library prints goes to the error
stream.
"""

import importlib
import json
import os
import sys
import time

WARM_UP_STEPS = 3


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not mix with the answers
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, function = name.split(":")
    step = getattr(importlib.import_module(module), function)(**arguments)
    for _ in range(WARM_UP_STEPS):
        step()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        start = time.perf_counter()
        done = 0
        for _ in range(int(line)):
            result = step()
            done += result if isinstance(result, int) else 0
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "done": done}), file=answers)


if __name__ == "__main__":
    main()
