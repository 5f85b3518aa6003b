"""What can go wrong, done to a run. Each function does one fault and returns; the run has to recover by itself, but for
a launcher that was killed, which is started again, and a full disk, on which room is made."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos_run.subject import Subject

DISK_BYTES = 256 << 20
"""Of the small file system where checkpoints lie; damaged ones stay there under another name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """iteration: after which it happens."""

    kind: str
    iteration: int


@dataclass(frozen=True, slots=True)
class Kind:
    """do: the fault; it returns the iteration of a checkpoint that it has damaged. told: whether an event of the
    timeline is of it."""

    what: str
    do: Callable[[Subject, random.Random], int | None] | None
    told: Callable[[dict], bool]


def _a_rank(subject: Subject, chance: random.Random) -> int:
    ranks = subject.wait_for("ranks", subject.ranks)
    return ranks[chance.choice(sorted(ranks))]


def kill_rank(subject: Subject, chance: random.Random) -> None:
    os.kill(_a_rank(subject, chance), signal.SIGKILL)


def stop_rank(subject: Subject, chance: random.Random) -> None:
    """It does not die and does not answer: the others wait for it."""
    os.kill(_a_rank(subject, chance), signal.SIGSTOP)


def kill_launcher(subject: Subject, chance: random.Random) -> None:
    os.kill(subject.launcher, signal.SIGKILL)
    subject.wait_for("the launcher's end", lambda: subject.status is not None, ended_is_well=True)
    subject.start()


def kill_in_save(subject: Subject, chance: random.Random) -> None:
    """While the next checkpoint is being written."""
    subject.wait_for("a save", lambda: any(subject.checkpoints.glob(".iter_*.partial")))
    os.kill(_a_rank(subject, chance), signal.SIGKILL)


def flip_byte(subject: Subject, chance: random.Random) -> int:
    """Of the newest checkpoint; then a rank dies, so that it is read."""
    iteration, path = _a_file(subject, chance)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    kill_rank(subject, chance)
    return iteration


def truncate(subject: Subject, chance: random.Random) -> int:
    """A file of the newest checkpoint; then a rank dies."""
    iteration, path = _a_file(subject, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))
    kill_rank(subject, chance)
    return iteration


def _a_file(subject: Subject, chance: random.Random) -> tuple[int, Path]:
    """Of the newest checkpoint, but for config.yaml, which people may change; and its iteration. Right after it is
    there, so that the next one does not come first."""
    subject.wait_for("two checkpoints", lambda: len(list(subject.checkpoints.glob("iter_???????"))) > 1)
    before = subject.newest()
    newest = subject.wait_for("a checkpoint", lambda: (path := subject.newest()) != before and path)
    files = sorted(path for path in newest.iterdir() if path.is_file() and path.stat().st_size)
    return int(newest.name[5:]), chance.choice([path for path in files if path.name != "config.yaml"])


def empty_latest(subject: Subject, chance: random.Random) -> None:
    """The tracker of the newest checkpoint; then a rank dies."""
    (subject.checkpoints / "latest_checkpointed_iteration.txt").write_text("")
    kill_rank(subject, chance)


def fill_disk(subject: Subject, chance: random.Random) -> None:
    """Until the next save has failed; then room is made."""
    known = len(subject.events("end"))
    filler = subject.checkpoints / "filler"
    with open(filler, "wb") as file:
        while True:
            try:
                file.write(bytes(1 << 16))
                file.flush()
            except OSError:
                break
    subject.wait_for("a save that fails", lambda: len(subject.events("end")) > known)
    filler.unlink()


def _ended(text: str) -> Callable[[dict], bool]:
    return lambda event: event["event"] == "end" and text in event.get("reason", "")


KILLED = _ended("was killed by SIGKILL")

KINDS = {
    "kill_rank": Kind("SIGKILL of a rank", kill_rank, KILLED),
    "kill_launcher": Kind("SIGKILL of the launcher", kill_launcher, _ended("killed with its launcher")),
    "stop_rank": Kind("SIGSTOP of a rank", stop_rank, _ended("no progress")),
    "kill_in_save": Kind("SIGKILL during a save", kill_in_save, KILLED),
    "flip_byte": Kind("a flipped byte", flip_byte, KILLED),
    "truncate": Kind("a truncated file", truncate, KILLED),
    "empty_latest": Kind("an emptied tracker", empty_latest, KILLED),
    "fill_disk": Kind("a full disk", fill_disk, _ended("saving iteration")),
    "nan_gradient": Kind("NaN in a gradient", None, lambda event: event["event"] == "nan"),
}

SAID = {"flip_byte": ".damaged", "truncate": ".damaged", "empty_latest": "the newest whole checkpoint"}
"""What the run's output must say too, of damage that only a start finds."""


def small_disk(path: Path) -> bool:
    """Mounts a small file system, for which one has to be root; whether that was possible."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def unmount(path: Path) -> None:
    subprocess.run(["umount", str(path)], capture_output=True)


def drawn(faults: int, kinds: list[str], first: int, iterations: int, chance: random.Random) -> list[Fault]:
    """As many faults, of every kind as often as of another to one, spread over the run at random. first: iteration from
    which there is a checkpoint."""
    names = [kinds[number % len(kinds)] for number in range(faults)]
    chance.shuffle(names)
    span = (iterations - first - 5) / faults
    return [Fault(name, first + int(span * (number + chance.random()))) for number, name in enumerate(names)]
