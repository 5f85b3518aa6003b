"""Ledgers of all shards and phases as one account."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from scale_llm.config.curate import ReportConfig
from scale_llm.curate.ledger import StepCount


@dataclass(slots=True)
class Totals:
    steps: dict[str, StepCount] = field(default_factory=dict)
    """In their order; the first is `read`."""
    tables: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What steps found that is no document's: clusters of near copies, the quality score's limit, evaluation texts."""

    @classmethod
    def gather(cls, folders: list[Path], shards: int, cfg: ReportConfig) -> "Totals":
        """Reads ledgers phase after phase, shard after shard, and checks that every document is accounted for."""
        totals = cls()
        for folder in folders:
            for shard in range(shards):
                totals._add(orjson.loads((folder / "ledger" / f"{shard:05d}.json").read_bytes()), cfg.examples)
        totals.check()
        return totals

    def _add(self, ledger: dict[str, Any], examples: int) -> None:
        for name, values in ledger["steps"].items():
            self.steps.setdefault(name, StepCount()).add(StepCount.from_json(values), examples)
        for name, table in ledger["tables"].items():
            self.tables.setdefault(name, Counter()).update(table)
        self.bad += ledger["bad"]

    def add_found(self, work: Path) -> None:
        """Reads what single tasks left."""
        clusters, quality, evaluations = (
            work / name for name in ("near/clusters/summary.json", "quality.json", "evaluations/index.json")
        )
        if clusters.is_file():
            self.found["clusters"] = orjson.loads(clusters.read_bytes())
        if quality.is_file():
            self.found["quality"] = orjson.loads(quality.read_bytes())
        if evaluations.is_file():
            counts = orjson.loads(evaluations.read_bytes())["counts"]
            self.found["evaluations"] = {f"evaluation texts, {name}": count for name, count in counts.items()}

    @property
    def documents_in(self) -> int:
        return self.steps["read"].documents_in

    @property
    def documents_out(self) -> int:
        return sum(self.tables.get("length out", Counter()).values())

    def check(self) -> None:
        """Every document that was read is kept, or was removed by one step."""
        removed = sum(sum(count.removed.values()) for name, count in self.steps.items() if name != "read")
        if self.documents_in != self.documents_out + removed:
            raise RuntimeError(
                f"{self.documents_in} documents read, {self.documents_out} kept and {removed} removed do not add up"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "documents_in": self.documents_in,
            "documents_out": self.documents_out,
            "steps": {name: count.to_json() for name, count in self.steps.items()},
            "tables": {name: dict(table) for name, table in self.tables.items()},
            "bad_rows": self.bad,
            "found": self.found,
        }
