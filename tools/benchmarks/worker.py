"""A process that builds one contestant and then runs its steps when told to.

python -m benchmarks.worker MODULE:FUNCTION JSON_ARGUMENTS

The function builds the contestant and returns a step without arguments, which may return facts, a dict of numbers, or
how much it has done, a whole number. After the warm-up the process writes {"facts": of each of these steps}; for each
line with a number it runs that many steps and writes {"seconds": for all of them, "cpu_seconds": of processors, in this
process and in children that have ended, "done": the sum of what they have done, "peak_gib": the most memory so far}.
Anything that a library prints goes to the error stream. On a GPU a step more comes before each round, out of the
measure, and memory that tensors do not need is given back after it: others wait there for their turn.
"""

import importlib
import json
import os
import sys
import time

from benchmarks.common import peak_gib, uses_gpu

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
    give_back()
    for line in sys.stdin:
        if uses_gpu():
            step()
            synchronize()
        start, cpu_start = time.perf_counter(), sum(os.times()[:4])
        done = 0
        for _ in range(int(line)):
            result = step()
            done += result if isinstance(result, int) else 0
        synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "done": done, "peak_gib": peak_gib()}
        give_back()
        print(json.dumps(answer), file=answers)


def synchronize() -> None:
    """Waits until the GPU has finished what it was given."""
    if uses_gpu():
        sys.modules["torch"].cuda.synchronize()


def give_back() -> None:
    """Frees what torch's allocator keeps on the GPU for later."""
    if uses_gpu():
        synchronize()
        sys.modules["torch"].cuda.empty_cache()


if __name__ == "__main__":
    main()
