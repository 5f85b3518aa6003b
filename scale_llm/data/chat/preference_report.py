"""The count of what became of rows of comparisons."""

from dataclasses import asdict, dataclass
from typing import Any

from scale_llm.data.chat.reading import Report, lost_lines


@dataclass(kw_only=True, slots=True)
class PreferenceReport(Report):
    """What became of the rows; `kept` are comparisons, `truncated` those with an answer cut off."""

    answers: int = 0
    left_out: int = 0
    """Answers that tie with, or are the same as, a better one of a comparison that was kept."""
    best: int = 0
    """Answers that are the best of theirs, or desirable."""
    best_mean: float = 0.0
    """Tokens that count, of such an answer; a difference to the others is a bias that a model will learn."""
    others_mean: float = 0.0
    unpaired: bool = False

    def finished(self) -> dict[str, Any]:
        self.rows = self.kept + sum(self.dropped.values())
        self.mean = round(self.tokens / max(self.answers, 1), 1)
        return asdict(self)


def preference_lines(report: dict[str, Any]) -> list[str]:
    """A report for the terminal."""
    best, others = ("desirable", "undesirable") if report["unpaired"] else ("chosen", "rejected")
    what = "unpaired answers" if report["unpaired"] else "comparisons"
    lines = [
        f"{report['kept']:,} {what} of {report['rows']:,} rows: {report['answers']:,} sequences, {report['tokens']:,} "
        f"tokens, {report['trained_tokens']:,} of them in answers; longest {report['longest']:,}, "
        f"mean {report['mean']:,}",
        f"{best}: {report['best']:,}, mean {report['best_mean']:,} tokens; {others}: "
        f"{report['answers'] - report['best']:,}, mean {report['others_mean']:,}",
    ]
    if report["left_out"]:
        lines.append(f"answers left out, as good as or the same as a better one: {report['left_out']:,}")
    return lines + lost_lines(report)
