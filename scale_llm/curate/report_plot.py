"""The report's picture: what each step left, lengths, languages, sizes of clusters."""

import os
from collections import Counter
from pathlib import Path

from scale_llm.curate.report_view import lengths
from scale_llm.curate.totals import Totals


def draw(totals: Totals, out: Path) -> None:
    """Four panels; written under a temporary name first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    _steps(axes[0][0], totals)
    _lengths(axes[0][1], totals)
    _languages(axes[1][0], totals)
    _clusters(axes[1][1], totals)
    temporary = out.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    os.replace(temporary, out)


def _steps(panel, totals: Totals) -> None:
    names = list(totals.steps)
    panel.barh(names, [totals.steps[name].documents_in for name in names], color="C7", alpha=0.4, label="in")
    panel.barh(names, [totals.steps[name].documents_out for name in names], color="C0", height=0.5, label="out")
    panel.invert_yaxis()
    panel.set_title("documents in and out of every step")
    panel.legend(fontsize="small")


def _lengths(panel, totals: Totals) -> None:
    rows = lengths(totals)
    places = range(len(rows))
    panel.bar([place - 0.2 for place in places], [row[1] for row in rows], width=0.4, color="C7", label="in")
    panel.bar([place + 0.2 for place in places], [row[2] for row in rows], width=0.4, color="C0", label="out")
    panel.set_xticks(list(places), [f"{row[0]:,}" for row in rows], rotation=45)
    panel.set_title("documents by tokens (from)")
    panel.legend(fontsize="small")


def _languages(panel, totals: Totals) -> None:
    before, after = (totals.tables.get(f"language {way}", Counter()) for way in ("in", "out"))
    names = [name for name, _ in before.most_common(12)] if before else ["not told"]
    panel.bar(names, [before.get(name, 0) for name in names], color="C7", alpha=0.6, label="in")
    panel.bar(names, [after.get(name, 0) for name in names], color="C0", width=0.5, label="out")
    panel.set_yscale("symlog", linthresh=1)
    panel.set_title("documents by language")
    panel.legend(fontsize="small")


def _clusters(panel, totals: Totals) -> None:
    sizes = totals.found.get("clusters", {}).get("sizes", {})
    rows = sorted((int(size), count) for size, count in sizes.items())
    panel.bar([str(size) for size, _ in rows], [count for _, count in rows], color="C1")
    panel.set_title("clusters of near copies by size")
    if not rows:
        panel.text(0.5, 0.5, "none", ha="center", transform=panel.transAxes)
