"""What every benchmark produces: a list of rows, printed as a table and written as JSON."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One comparison. ratio: how many times better ours is than the peer; for a share of a limit, ours / limit."""

    measure: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str


def faster(measure: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A rate: more is better."""
    return Row(measure=measure, ours=ours, peer=peer, peer_name=peer_name, ratio=ours / peer, unit=unit)


def shorter(measure: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A duration or a size: less is better."""
    return Row(measure=measure, ours=ours, peer=peer, peer_name=peer_name, ratio=peer / ours, unit=unit)


def print_table(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    table.add_column("measure")
    for name in ("ours", "peer"):
        table.add_column(name, justify="right")
    table.add_column("peer is")
    table.add_column("ratio", justify="right")
    table.add_column("unit")
    for row in rows:
        table.add_row(row.measure, _short(row.ours), _short(row.peer), row.peer_name, f"{row.ratio:.2f}", row.unit)
    Console().print(table)


def write_rows(rows: list[Row], path: Path) -> None:
    write_json([asdict(row) for row in rows], path)


def write_json(content: Any, path: Path) -> None:
    """Under a temporary name first: whoever is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
