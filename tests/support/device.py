"""What the ranks of a test compute on: the CPU, or one GPU where their server was started for it (support/ranks.py)."""

import os

from scale_llm.parallel.device import Device, start

KIND = os.environ.get("SCALE_LLM_TEST_DEVICE", "cpu")


def begin(*, compile_ops: bool = False) -> Device:
    """Joins the job."""
    return start(KIND, threads=1, compile_ops=compile_ops)
