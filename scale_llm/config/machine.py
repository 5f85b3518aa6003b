"""What this machine offers, found without torch."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    cores: int
    gpus: int
    """NVIDIA GPUs that torch can use."""
    fast_bf16_cpu: bool | None
    """The processor multiplies BF16 in hardware (AMX, AVX-512 BF16); None: not known before a job has its node."""
    compiler: bool | None = False
    """torch.compile can build kernels for the CPU: a C++ compiler and Python's headers are there. None: as above."""
    gpu_memory_bytes: int | None = None
    """Of the largest GPU; None where it is not known."""
    memory_bytes: int | None = None
    """That processes of this machine, or of this container, may use together; None where it is not known."""
    capability: tuple[int, int] | None = None
    """The highest compute capability of its GPUs, such as (9, 0); None: not known."""
    transformer_engine: bool | None = None
    """Whether NVIDIA's Transformer Engine for torch is installed; None: not known."""
    cores_of_rank: int | None = None
    """Of `cores` those that are this process's alone, where it is a rank; None: ranks of the machine share them."""


def detect() -> Machine:
    """This machine. Costs milliseconds, and a call of nvidia-smi where there are GPUs."""
    fast_bf16 = not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})
    gpus = _gpus()
    return Machine(
        cores=_cores(),
        gpus=gpus,
        fast_bf16_cpu=fast_bf16,
        compiler=_compiler(),
        gpu_memory_bytes=_gpu_memory() if gpus else None,
        memory_bytes=_memory(),
        capability=_capability() if gpus else None,
        transformer_engine=_installed("transformer_engine"),
    )


def node_of_job(gpus: int) -> Machine:
    """A node that Slurm will give: of what is not asked for, nothing is known."""
    return Machine(cores=1, gpus=gpus, fast_bf16_cpu=None, compiler=None)


def _cores() -> int:
    """Cores this process may run on (a container or Slurm step may see fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Features of the processor by Linux's names; none where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _compiler() -> bool:
    """Whether torch's choice of a compiler, CXX or g++ (clang++ on a Mac), is there, and Python.h for it."""
    program = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(program) is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()


def _gpus() -> int:
    """GPUs by their device files, cut by CUDA_VISIBLE_DEVICES; none where torch is a CPU build."""
    if _torch_is_cpu_build():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return found or _gpus_by_driver()


def _torch_is_cpu_build() -> bool:
    try:
        return "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def _installed(module: str) -> bool:
    """Whether there is such a top-level module; it is not imported."""
    return importlib.util.find_spec(module) is not None


def _capability() -> tuple[int, int] | None:
    """Of the best GPU: which of them a rank will have is not known here, and it looks again at its own."""
    found = [re.fullmatch(r"(\d+)\.(\d+)", capability) for capability, _ in _cards()]
    return max(((int(match[1]), int(match[2])) for match in found if match), default=None)


def _gpu_memory() -> int | None:
    """Of the largest: with several kinds it is not known here which ones CUDA_VISIBLE_DEVICES names."""
    sizes = [int(mebibytes) for _, mebibytes in _cards() if mebibytes.isdigit()]  # [N/A] where CPU and GPU share theirs
    return max(sizes) * 2**20 if sizes else None


@functools.cache
def _cards() -> list[list[str]]:
    """Compute capability and memory in MiB of each GPU, as nvidia-smi prints them."""
    lines = _nvidia_smi("--query-gpu=compute_cap,memory.total", "--format=csv,noheader,nounits")
    return [parts for line in lines if len(parts := [part.strip() for part in line.split(",")]) == 2]


def _gpus_by_driver() -> int:
    """Counts with nvidia-smi: where device files have other names (WSL)."""
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that it prints; none where it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines() if result.returncode == 0 else []


def _memory() -> int | None:
    """Of the machine, or less where a control group (a container, a job) has a limit."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found, default=None)
