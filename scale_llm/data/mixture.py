"""How sources are mixed, and what a run takes of each. Pure arithmetic; no torch.

Temperature: a source of n tokens has a share proportional to n^(1/T), as in multilingual models, where it gives small
languages more than they hold (Devlin 2018, multilingual BERT, exponent 0.7; Conneau et al. 2020, XLM-R, 0.3; T as in
Arivazhagan et al. 2019 and Xue et al. 2021, mT5).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scale_llm.data.sources import Source

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022 (Chinchilla): the training that makes the best model of a given amount of computing."""
MAX_EPOCHS = 4
"""Muennighoff et al. 2023: up to so many passes repeated tokens are nearly as good as new ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One source in a run."""

    name: str
    given: str
    """What the user has said of its share."""
    tokens: int
    """Of its training split."""
    estimated: bool
    """Whether that is a guess from bytes."""
    share: float
    """Of the samples of the run."""
    epochs: float | None
    """Passes over its training split that the run takes; None where it holds nothing, or the run's length is open."""


def shares(sources: Sequence[Source], tokens: Sequence[int], temperature: float) -> list[float] | None:
    """Share of the samples of each source, summing to 1; None: nothing is said, so each as much as it holds.

    tokens: that each source holds; explicit weights do not depend on them.
    """
    if any(source.weight is not None for source in sources):
        raw = [source.weight or 0.0 for source in sources]
    elif any(source.epochs is not None for source in sources):
        raw = [count * (1.0 if source.epochs is None else source.epochs) for source, count in _each(sources, tokens)]
    elif temperature != 1:
        most = max(tokens)  # relative to the largest: no overflow, and the order of sources does not matter
        raw = [math.exp(math.log(count / most) / temperature) if count else 0.0 for count in tokens]
    else:
        return None
    total = math.fsum(raw)
    return [each / total for each in raw] if total else None


def _each(sources: Sequence[Source], tokens: Sequence[int]) -> list[tuple[Source, int]]:
    return list(zip(sources, tokens, strict=True))


def parts_of_run(
    sources: Sequence[Source],
    tokens: Sequence[int],
    estimated: Sequence[bool],
    temperature: float,
    run_tokens: int | None,
) -> list[Part]:
    """The mixture of a run that trains on `run_tokens` tokens."""
    held = max(sum(tokens), 1)
    fractions = shares(sources, tokens, temperature) or [count / held for count in tokens]
    return [
        Part(
            name=source.name,
            given=_given(source, sources, temperature),
            tokens=count,
            estimated=guessed,
            share=fraction,
            epochs=fraction * run_tokens / count if count and run_tokens is not None else None,
        )
        for source, count, guessed, fraction in zip(sources, tokens, estimated, fractions, strict=True)
    ]


def _given(source: Source, sources: Sequence[Source], temperature: float) -> str:
    if source.weight is not None:
        return f"{source.weight:g}"
    if any(each.epochs is not None for each in sources):
        epochs = 1 if source.epochs is None else source.epochs
        return f"{epochs:g} epoch{'s' if epochs != 1 else ''}"
    return "" if temperature == 1 else f"T={temperature:g}"


def repeats(parts: Sequence[Part]) -> list[str]:
    """A warning for every source that a run takes more often than is worth it."""
    return [
        f"warning: {part.name} is taken {'about ' if part.estimated else ''}{part.epochs:.1f} times; beyond "
        f"{MAX_EPOCHS} passes repeated tokens are worth less and less (Muennighoff et al. 2023): give more text, a "
        "smaller share, or a shorter run"
        for part in parts
        if part.epochs is not None and part.epochs > MAX_EPOCHS + 0.05
    ]


def amounts(parameters: int, parts: Sequence[Part], run_tokens: int | None) -> list[tuple[str, str]]:
    """Names and texts: tokens wanted for the size of the model, at hand, and trained on."""
    wanted = TOKENS_PER_PARAMETER * parameters
    held = sum(part.tokens for part in parts)
    about = "about " if any(part.estimated for part in parts) else ""
    rows = [
        ("tokens wanted", f"{short(wanted)}, {TOKENS_PER_PARAMETER} a parameter (Hoffmann et al. 2022)"),
        ("tokens at hand", f"{about}{short(held)}, {ratio(held, wanted)} of that, for training"),
    ]
    if run_tokens is not None:
        epochs = f", {ratio(run_tokens, held)} epochs of all" if held else ""
        text = f"{short(run_tokens)}, {ratio(run_tokens, wanted)} of what is wanted{epochs}"
        rows.append(("tokens trained on", text))
    return rows


def ratio(a: float, b: float) -> str:
    """To three digits, without an exponent."""
    value = a / b if b else 0.0
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 or value == 0 else "under 0.001"


def short(count: float) -> str:
    """A number of tokens for people: 12.3B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
