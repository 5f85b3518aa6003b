"""What a rank's error file says of its failure, and which of several ranks failed first. No torch."""

import re
import signal
from dataclasses import dataclass
from typing import Any

from scale_llm.config.errors import TryAgain, UserError
from scale_llm.config.exit_status import HUNG

LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|remote worker", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """As torch's elastic agent knows it. exitcode: negative where a signal killed it."""

    exitcode: int
    message: Any
    timestamp: int


def first_failure(failures: dict[int, Any]) -> tuple[int, Any]:
    """The cause, not its effects: peers lose their connection, and the rest are ended with SIGTERM."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, bool, int]:
        failure = item[1]
        ended = failure.exitcode == -signal.SIGTERM
        return ended, bool(LOST_PEER.search(str(failure.message))), failure.exitcode == HUNG, failure.timestamp

    return min(failures.items(), key=order)


def text_of(message: Any) -> str:
    """The message of a rank's error file."""
    return str(message.get("message", "")) if isinstance(message, dict) else str(message)


def user_problems(message: Any) -> list[str]:
    """The problems of a UserError in a rank's error file; none where it failed otherwise."""
    text = text_of(message)
    for kind in (UserError, TryAgain):
        if text.startswith(f"{kind.__name__}: "):
            return text[len(kind.__name__) + 2 :].splitlines()
    return []


def is_for_a_person(message: Any) -> bool:
    """Whether another start would meet the same, as somebody has to mend it first."""
    return text_of(message).startswith(f"{UserError.__name__}: ")


def is_hang(message: Any) -> bool:
    """Whether the rank has ended itself because the run made no progress."""
    return text_of(message).startswith("Hang: ")


def how_it_ended(exitcode: int) -> str:
    """The words for a rank's exit status."""
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return "has made no progress" if exitcode == HUNG else f"failed with status {exitcode}"
