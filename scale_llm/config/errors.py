"""Errors that are for the person who started the run."""

from collections.abc import Sequence


class UserError(ValueError):
    """One or more problems, each a sentence with the key, its value and a remedy."""

    exit_status = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return type(self), (self.problems,)


class TryAgain(UserError):
    """What may be mended while the run waits, such as a full disk: another start is worth it."""


class UsageError(UserError):
    """The command line itself is wrong: an unknown key, group or option, a value of the wrong type."""

    exit_status = 2


def numbered(problems: Sequence[str]) -> str:
    """The text a terminal shows: one line a problem, numbered where there are several."""
    if len(problems) == 1:
        return f"error: {problems[0]}"
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join([f"{len(problems)} errors:", *lines])
