"""Errors that are for the person who started the run."""

from collections.abc import Sequence


class UserError(ValueError):
    """One or more problems, each a sentence with the key, its value and a remedy."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
