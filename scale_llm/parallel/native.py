"""Functions of ours in C++, compiled at their first use as torch.compile's kernels are, by the same compiler, and kept
where those are kept."""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from scale_llm.config.machine import cpu_flags
from scale_llm.parallel.fused import compiling

log = logging.getLogger(__name__)

_HEADER = Path(__file__).with_name("bf16.h")
_INCLUDE = '#include "scale_llm/parallel/bf16.h"\n'
"""Of a source; the file takes its place, so that a change of it is one of what is compiled."""


def library(source: Path, *operands: torch.Tensor) -> ctypes.CDLL | None:
    """What `source`, which includes bf16.h, exports with C's names. None: an operand is not of BF16 on a CPU, kernels
    are not compiled in this process (`fused.use_compiler`), the processor does not multiply BF16, or the source could
    not be compiled or does not work with this torch, which is logged once."""
    fit = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in operands)
    return _compiled(source) if fit and compiling() and multiplies_bf16() else None


def call(function: Any, *arguments: torch.Tensor | int | float) -> None:
    """Calls what a library exports: tensors as the addresses of their numbers, integers of 64 bits, FP32; last the
    number of threads."""
    function(*map(_as_in_c, (*arguments, torch.get_num_threads())))


def _as_in_c(value: torch.Tensor | int | float) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


@functools.cache
def multiplies_bf16() -> bool:
    """By AVX-512 BF16, which processors with AMX have too."""
    return "avx512_bf16" in cpu_flags()


@functools.cache
def _compiled(source: Path) -> ctypes.CDLL | None:
    from torch._inductor.codecache import CppCodeCache

    text = source.read_text().replace(_INCLUDE, _HEADER.read_text())
    try:
        found = CppCodeCache.load(text, device_type="cpu")
        if found.works():
            return found
        reason = "oneDNN's brgemm does not take BF16 here"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    log.warning("%s cannot be used; torch's own functions do its work, more slowly: %s", source.name, reason)
    return None
