"""Import and export of a checkpoint against a plain copy of its files on the same disk, and the memory they take."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import Row, faster, shorter

HELP = "gigabytes per second of checkpoint conversion, against a plain copy, until they are on the disk; peak memory"
EXAMPLES = """examples:
  python tools/benchmark.py convert --out convert.json
  python tools/benchmark.py convert --out convert.json --gib 1 --rounds 5
"""
_TOOLS = Path(__file__).resolve().parents[1]
_MEMORY_LIMIT_GIB = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the alternation (default: 5; medians of them)")
    parser.add_argument("--directory", type=Path, help="where the files go, four times the size (default: temporary)")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Copy, import and export take turns; each is a process of its own, so that its peak memory is its own."""
    (rows,) = deque(measured(model_of(arguments.gib), arguments.rounds, arguments.directory), maxlen=1)
    return rows


def measured(model: Any, rounds: int, directory: Path | None) -> Iterator[list[Row]]:
    """Rows of what is known after every round. model: a resolved ModelConfig, of a Llama."""
    with tempfile.TemporaryDirectory(prefix="convert_", dir=directory) as folder:
        root = Path(folder)
        largest, size = _make_model(root / "model", model)
        seconds: dict[str, list[float]] = {"copy": [], "import": [], "export": []}
        memory: dict[str, float] = {}
        base = _measured(["-c", "import scale_llm.checkpoint.huggingface"])[1]
        for i in range(rounds):
            for name, words in _contestants(root).items():
                shutil.rmtree(root / words[-1], ignore_errors=True)
                taken, peak = _measured([*words[:-1], str(root / words[-1])])
                seconds[name].append(taken)
                memory[name] = max(memory.get(name, 0.0), peak)
                if name != "import":  # which the export reads; what is not needed must not fill the page cache
                    shutil.rmtree(root / words[-1])
            shown = ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items())
            print(f"round {i + 1}/{rounds}: {shown}", file=sys.stderr, flush=True)
            yield _rows(seconds, memory, base, largest, size)


def _rows(
    seconds: dict[str, list[float]], memory: dict[str, float], base: float, largest: int, size: int
) -> list[Row]:  # fmt: skip
    """seconds: of every round; memory: peak GiB; base: of Python and torch alone; largest, size: bytes of the largest
    tensor and of all."""
    rates = {name: size / 1e9 / median(values) for name, values in seconds.items()}
    rows = [
        faster(f"{name} of {size / 2**30:.1f} GiB", rates[name], rates["copy"], "plain copy", "GB/s")
        for name in ("import", "export")
    ]
    for name in ("import", "export"):
        beyond, measure = memory[name] - largest / 2**30, f"{name}: peak memory beyond the largest tensor"
        rows.append(shorter(measure, beyond, _MEMORY_LIMIT_GIB, "limit", "GiB"))
    rows.append(shorter("of which torch and the program themselves", base, _MEMORY_LIMIT_GIB, "limit", "GiB"))
    return rows


def _contestants(root: Path) -> dict[str, list[str]]:
    """Words for Python; the last is the output below the root."""
    tool = str(_TOOLS / "convert_checkpoint.py")
    copy = (  # on the disk when it ends, as a conversion is
        "import os, pathlib, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2]); "
        "[os.fsync(os.open(path, os.O_RDONLY)) for path in pathlib.Path(sys.argv[2]).iterdir()]"
    )
    return {
        "copy": ["-c", copy, str(root / "model"), "copied"],
        "import": [tool, "import", str(root / "model"), "imported"],
        "export": [tool, "export", str(root / "imported"), "exported"],
    }


def _measured(words: list[str]) -> tuple[float, float]:
    """(seconds until it ended, peak resident GiB) of one Python process, its files on the disk included."""
    start = time.perf_counter()
    script = (
        "import resource, subprocess, sys; status = subprocess.run([sys.executable, *sys.argv[1:]], "
        "stdout=subprocess.DEVNULL).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return taken, int(done.stdout) / 2**20


def model_of(gib: float):
    """A Llama with the layers of Llama 2 7B that has about this size in BF16."""
    from scale_llm.config.model import ModelConfig

    model = ModelConfig(
        hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128,
        vocab_size=32000, max_position_embeddings=8192, untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    layer = 2 * (4096 * (4096 * 2 + 1024 * 2 + 14336 * 3))
    model.num_layers = max(1, round((gib * 2**30 - 4 * 32000 * 4096) / layer))
    return model


def _make_model(directory: Path, model: Any) -> tuple[int, int]:
    """Random bits, BF16, in shards of 2 GB; returns the bytes of its largest tensor and of all."""
    import torch

    from scale_llm.checkpoint.safetensors_files import Planned, shards_of, write_file, write_index
    from scale_llm.models.huggingface import export_family, write_config

    family = export_family(model)
    pool = torch.randn(2**26).bfloat16()

    def part(shape):
        copies = -(-shape.numel() // pool.numel())
        return (pool if copies == 1 else pool.repeat(copies))[: shape.numel()]

    tensors = []
    for tensor in family.tensors_of(model):
        for index in tensor.indices(model):
            for name, p in zip(tensor.names(index), tensor.parts, strict=True):
                shape = torch.Size(p.sizes(model))
                tensors.append(Planned(name, torch.bfloat16, tuple(shape), lambda s=shape: part(s).view(s)))
    directory.mkdir()
    files = shards_of(tensors, 2 * 10**9)
    for name, group in files.items():
        for _ in write_file(directory / name, group):
            pass
    write_index(directory, files)
    (directory / "config.json").write_text(json.dumps(write_config(model, family, "bfloat16")))
    sizes = [t.bytes for t in tensors]
    return max(sizes), sum(sizes)
