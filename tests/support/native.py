"""For tests of what is compiled from C++."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

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


def same_by_any_threads(compute: Callable[[], list[torch.Tensor]]) -> bool:
    """Whether all of its bits are the same by one thread and by four."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))
