"""A process that builds one contestant and then runs its steps when told to.

python -m benchmarks.worker MODULE:FUNCTION JSON_ARGUMENTS

The function builds the contestant and returns a step without arguments, which may return facts, a dict of numbers, or
how much it has done, a whole number. After the warm-up the process writes {"facts": of each of these steps}; for each
line with a number it runs that many steps and writes {"seconds": for all of them, "cpu_seconds": of processors, in this
process and in children that have ended, "done": the sum of what they have done, "peak_gib": the most memory so far}.
Anything that a library prints goes to the error stream.
"""

import importlib
import json
import os
import sys
import time

from benchmarks.common import peak_gib

WARM_UP_STEPS = 3


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries must not mix with the answers
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, function = name.split(":")
    step = getattr(importlib.import_module(module), function)(**arguments)
    results = [step() for _ in range(WARM_UP_STEPS)]
    print(json.dumps({"facts": [facts for facts in results if isinstance(facts, dict)]}), file=answers)
    del results
    for line in sys.stdin:
        start, cpu_start = time.perf_counter(), sum(os.times()[:4])
        done = 0
        for _ in range(int(line)):
            result = step()
            done += result if isinstance(result, int) else 0
        seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "done": done, "peak_gib": peak_gib()}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
