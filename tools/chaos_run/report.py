"""Whether two runs have ended alike, and the report of all faults."""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos_run.faults import KINDS
from chaos_run.ordeal import Result

SECONDS_BEYOND_STEPS, STEPS = 10.0, 3
"""A hang is to be found within so many steps and seconds."""


def compared(first: Path, second: Path, iteration: int) -> tuple[bool, str]:
    """Whether every tensor of two checkpoints has the same bits; and the first that has not."""
    import torch

    paths = [path / f"iter_{iteration:07d}" for path in (first, second)]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        return False, f"{missing[0]} is not there"
    one, other = map(_tensors, paths)
    if one.keys() != other.keys():
        return False, f"tensors {sorted(one.keys() ^ other.keys())[:3]} are in one alone"
    for name, tensor in one.items():
        if tensor.dtype != other[name].dtype or not torch.equal(tensor, other[name]):
            return False, name
    return True, ""


def _tensors(path: Path) -> dict:
    """All tensors of a checkpoint, whole, by torch's own reader."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def summary(
    results: list[Result], equal: bool, difference: str, save_interval: int, seed: int, remarks: list[str]
) -> dict[str, Any]:
    """What the report holds.

    passed: all faults were found and mended, none cost more than one interval between saves, and the runs ended alike.
    How long a hang took to find depends on what else the machine does: hangs_found_late counts those beyond the aim.
    """
    lost = [result.iterations_lost for result in results if result.iterations_lost is not None]
    hangs = [result for result in results if result.kind == "stop_rank" and result.detected]
    late = [
        result
        for result in hangs
        if (result.seconds_to_detect or 0) > STEPS * (result.seconds_a_step or 0) + SECONDS_BEYOND_STEPS
    ]
    recovered = [result.seconds_to_recover for result in results if result.seconds_to_recover is not None]
    most = max(lost, default=0)
    done = sum(result.recovered for result in results)
    detected = sum(result.detected for result in results)
    return {
        "passed": done == detected == len(results) and equal and most <= save_interval,
        "faults": len(results),
        "detected": detected,
        "recovered": done,
        "final_weights_equal": equal,
        "first_difference": difference or None,
        "most_iterations_lost": most,
        "save_interval": save_interval,
        "median_seconds_to_recover": round(statistics.median(recovered), 2) if recovered else None,
        "most_seconds_to_detect_a_hang": max((hang.seconds_to_detect or 0 for hang in hangs), default=None),
        "hangs_found_late": len(late),
        "seed": seed,
        "remarks": remarks,
        "list": [asdict(result) for result in results],
    }


def print_report(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="faults")
    columns = ("fault", "times", "found", "mended", "lost steps", "found in s", "mended in s")
    for column in columns:
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind in KINDS:
        mine = [one for one in found["list"] if one["kind"] == kind]
        if mine:
            table.add_row(
                KINDS[kind].what, str(len(mine)), str(sum(one["detected"] for one in mine)),
                str(sum(one["recovered"] for one in mine)), _range(mine, "iterations_lost", "{:.0f}"),
                _range(mine, "seconds_to_detect", "{:.1f}"), _range(mine, "seconds_to_recover", "{:.1f}"),
            )  # fmt: skip
    console = Console(highlight=False)
    console.print(table)
    for remark in found["remarks"]:
        console.print(remark)
    said = "equal to the last bit" if found["final_weights_equal"] else f"NOT equal: {found['first_difference']}"
    console.print(
        f"{found['recovered']} of {found['faults']} recovered; at most {found['most_iterations_lost']} iterations lost "
        f"(saved every {found['save_interval']}); final weights: {said}"
    )
    if found["hangs_found_late"]:
        console.print(
            f"{found['hangs_found_late']} hangs were found later than {STEPS} step times and "
            f"{SECONDS_BEYOND_STEPS:.0f} s after they began"
        )


def _range(results: list[dict[str, Any]], key: str, form: str) -> str:
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
