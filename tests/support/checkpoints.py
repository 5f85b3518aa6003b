"""Changing checkpoints in ways that their checksums do not show."""

from pathlib import Path

from scale_llm.checkpoint import checksums


def sign_again(checkpoint: Path) -> None:
    """Gives a changed checkpoint checksums that fit, as a forger would."""
    (checkpoint / checksums.FILE).unlink(missing_ok=True)
    checksums.collect(checkpoint, {path.name: checksums.entry(path) for path in checkpoint.glob("*.distcp")})
