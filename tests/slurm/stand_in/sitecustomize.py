"""Put on PYTHONPATH: ranks take SECONDS_A_STEP longer for each step of a job's first start, so that signals meet them
at work, and fail after FAIL_AFTER steps, on the node FAIL_ON or on any. Nothing that they compute changes."""

import itertools
import os
import sys
import time

if "scale_llm.launch.rank" in sys.orig_argv and ("SECONDS_A_STEP" in os.environ or "FAIL_AFTER" in os.environ):
    from scale_llm.stages.progress import StopRequest

    agreed, steps = StopRequest.agreed, itertools.count(1)

    def slow_or_failing(self):
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
        here = os.environ.get("FAIL_ON") in (None, os.environ.get("SLURMD_NODENAME"))
        if here and str(next(steps)) == os.environ.get("FAIL_AFTER"):
            raise RuntimeError("boom")
        return agreed(self)

    StopRequest.agreed = slow_or_failing
