"""Everything that wants a GPU, measured on one card in under eight minutes: training in BF16 and FP8, memory, rollout,
saving in the background, conversion.

Each section is a process of its own with a budget of seconds: one that fails, or runs out of memory or time, loses
nothing but what it has not yet measured. Two files are written anew after every section: rows as every benchmark has,
with the section and the aim, and FILE.sections.json beside them, the machine and what became of each section.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, print_table, write_json
from scale_llm.config.machine import detect

HELP = "what wants a GPU, in under eight minutes: training, FP8, memory, rollout, saving, conversion"
EXAMPLES = """examples:
  python tools/benchmark.py gpu --out results.json
  python tools/benchmark.py gpu --out results.json --sections train_1b,rollout
"""
_TOOLS = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 470.0
"""Of all sections; one that begins late gets what is left."""
LEAST_SECONDS = 5.0
"""A section with less than this is not begun."""
_MARGIN_SECONDS = 3.0
"""Before the end of its budget a section is asked to end by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """builder: "module:function", called with (scale, device, deadline, directory); it yields lists of rows, each time
    all that are known."""

    builder: str
    budget_seconds: float


SECTIONS = {
    "train_1b": Section(builder="benchmarks.gpu_sections:train_1b", budget_seconds=130),
    "train_8b": Section(builder="benchmarks.gpu_sections:train_8b", budget_seconds=100),
    "fp8": Section(builder="benchmarks.gpu_sections:fp8", budget_seconds=75),
    "rollout": Section(builder="benchmarks.gpu_sections:rollout", budget_seconds=50),
    "checkpoint": Section(builder="benchmarks.gpu_sections:checkpoint", budget_seconds=75),
    "convert": Section(builder="benchmarks.gpu_sections:convert", budget_seconds=40),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sections", type=_names, default=list(SECTIONS), help=f"of {','.join(SECTIONS)}; all")
    parser.add_argument("--seconds", type=float, help=f"of all chosen sections together (default: {TOTAL_SECONDS:.0f})")
    parser.add_argument("--directory", type=Path, help="where checkpoints go, 40 GB (default: temporary)")
    # For the tests: the same sections on a CPU, of models that take seconds
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)


def _names(words: str) -> list[str]:
    unknown = [word for word in words.split(",") if word not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; give some of {','.join(SECTIONS)}")
    return words.split(",")


def run(arguments: argparse.Namespace) -> None:
    """Writes the rows itself, after every section."""
    if arguments.device == "cuda" and not detect().gpus:
        raise SystemExit(
            "benchmark.py gpu: no NVIDIA GPU that torch can use is visible here (nvidia-smi -L lists them); run it on "
            "a machine with one and a CUDA build of torch, or unset CUDA_VISIBLE_DEVICES. On a CPU: benchmark.py train"
        )
    began = time.monotonic()
    if arguments.directory is not None:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    machine = _header(arguments)
    sections = {name: {"status": "not measured", "reason": "not reached"} for name in arguments.sections}

    def write() -> None:
        write_json({"header": machine, "sections": sections}, arguments.out.with_suffix(".sections.json"))
        write_json(rows, arguments.out)

    write()
    total = arguments.seconds or TOTAL_SECONDS
    planned = sum(SECTIONS[name].budget_seconds for name in arguments.sections)
    for name in arguments.sections:
        left = total - (time.monotonic() - began)
        # Its share of what is left, so that what others have not used is not lost
        seconds = min(left, SECTIONS[name].budget_seconds * max(left / planned, 1.0))
        planned -= SECTIONS[name].budget_seconds
        if seconds < LEAST_SECONDS:
            sections[name] = {"status": "not measured", "reason": "the time of all sections is used up"}
        else:
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            outcome, found = _run_section(SECTIONS[name].builder, arguments, seconds)
            sections[name] = outcome
            rows += [{"section": name, **row} for row in found]
            reason = f", {outcome['reason']}" if outcome["reason"] else ""
            print(f"{name}: {outcome['status']} in {outcome['seconds']:.0f} s{reason}", flush=True)
        write()
    fields = Row.__dataclass_fields__
    shown = [Row(**{key: value for key, value in row.items() if key in fields}) for row in rows]
    print_table(shown, f"scale_llm benchmark: gpu ({machine.get('card') or 'no card'})")


def _run_section(builder: str, arguments: argparse.Namespace, seconds: float) -> tuple[dict[str, Any], list[dict]]:
    """What became of it, and the rows that it has last told. It and all that it has started are gone afterwards."""
    began = time.monotonic()
    rows: list[dict] = []
    skipped = timed_out = False
    reason = ""
    with (
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryDirectory(prefix="gpu_", dir=arguments.directory, ignore_cleanup_errors=True) as directory,
    ):
        deadline = time.time() + seconds - min(_MARGIN_SECONDS, seconds / 2)
        told = {"scale": arguments.scale, "device": arguments.device, "deadline": deadline, "directory": directory}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_section", builder, json.dumps(told)],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(), start_new_session=True,
        )  # fmt: skip
        try:
            for line in _lines_until(process, began + seconds):
                message = json.loads(line)
                rows = message.get("rows", rows)
                reason = message.get("reason", reason)
                skipped = message.get("skipped", skipped)
            timed_out = process.poll() is None and time.monotonic() >= began + seconds
            if not timed_out:
                process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        if timed_out:
            status, reason = "out of time", f"ended after {seconds:.0f} s, with the rows that it had by then"
        elif process.returncode:
            errors.seek(0)
            status, reason = "failed", _last_line(errors.read()) or f"exit code {process.returncode}"
        else:
            status = "skipped" if skipped else "measured in part" if reason else "measured"
    return {"status": status, "reason": reason, "seconds": round(time.monotonic() - began, 1)}, rows


def _lines_until(process: subprocess.Popen, end: float):
    """Lines of its output until it ends, or the clock says so."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (left := end - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            return
        if line is None:
            return
        yield line


def _end(process: subprocess.Popen) -> None:
    """It and its children, which are of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")])
    return {"OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1)), "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            **os.environ, "PYTHONPATH": path}  # fmt: skip


def _last_line(text: str) -> str:
    """The error of a traceback: the last line that says anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


_PROBE = """
import importlib.metadata, json, torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
on = torch.cuda.is_available()
names = ("torch", "megatron-core", "transformer-engine", "transformers")
card = torch.cuda.get_device_name(0) if on else None
memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if on else None
print(json.dumps({"card": card, "memory_gib": memory, "cuda": torch.version.cuda, **{n: version(n) for n in names}}))
"""


def _header(arguments: argparse.Namespace) -> dict[str, Any]:
    """The date, the card and versions; in processes of their own, for this one is to hold no memory of the card."""
    found = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, env=_environment())
    header = {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "scale": arguments.scale, "device": arguments.device}
    header |= json.loads(found.stdout) if found.returncode == 0 else {"card": None, "problem": _last_line(found.stderr)}
    header["driver"] = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return header


def _output_of(command: Sequence[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else None


def as_messages(rows: list[tuple[Row, str]], reason: str = "", *, skipped: bool = False) -> str:
    """A line from a section: rows with their aims, what was left out and why."""
    return json.dumps({"rows": [{**asdict(row), "aim": aim} for row, aim in rows], "reason": reason,
                       "skipped": skipped})  # fmt: skip
