"""For tests of what is compiled from C++."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from scale_llm.config.machine import detect
from scale_llm.parallel.fused import use_compiler
from scale_llm.parallel.native import multiplies_bf16


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """Skips where the processor or the lack of a compiler rules them out, and nowhere else: sources that do not
    compile must not pass for that."""
    if not multiplies_bf16():
        pytest.skip("this processor does not multiply BF16")
    if not detect().compiler:
        pytest.skip("there is no C++ compiler")
    use_compiler(True)
    try:
        yield
    finally:
        use_compiler(False)
