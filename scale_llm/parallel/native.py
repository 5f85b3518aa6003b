"""Functions of ours in C++, compiled at their first use as torch.compile's kernels are, by the same compiler, and kept
where those are kept."""

import ctypes
import functools
import logging
from pathlib import Path

from scale_llm.parallel.fused import compiling

log = logging.getLogger(__name__)


def library(source: Path) -> ctypes.CDLL | None:
    """What `source` exports with C's names; it may call what libtorch_cpu exports. None: kernels are not compiled in
    this process (`fused.use_compiler`), or this one could not be, which is logged once."""
    return _compiled(source) if compiling() else None


@functools.cache
def _compiled(source: Path) -> ctypes.CDLL | None:
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(source.read_text(), device_type="cpu")
    except (OSError, RuntimeError) as error:
        log.warning("%s could not be compiled; torch's own functions do its work, more slowly: %s", source.name, error)
        return None
