"""A program on a terminal of its own, driven as a person would."""

import fcntl
import os
import pty
import select
import subprocess
import termios
import time

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """What is typed is echoed, as terminals do; `until` returns all that has been shown since its last call."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._side, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "dumb"},
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self._shown = b""

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """Everything up to `text` and with it, line ends as the program wrote them."""
        deadline, wanted = time.monotonic() + seconds, text.replace("\n", "\r\n").encode()
        while wanted not in self._shown:
            left = deadline - time.monotonic()
            ready = select.select([self._side], [], [], max(left, 0))[0]
            assert ready, f"{text!r} has not come: {self._shown.decode(errors='replace')}"
            try:
                self._shown += os.read(self._side, 65536)
            except OSError as error:  # the program has ended
                raise AssertionError(f"{text!r} has not come: {self._shown.decode(errors='replace')}") from error
        found, _, self._shown = self._shown.partition(wanted)
        return (found + wanted).decode(errors="replace").replace("\r\n", "\n")

    def end(self, seconds: float = 30) -> int:
        """The exit status of a program that is about to end."""
        status = self.process.wait(timeout=seconds)
        os.close(self._side)
        return status
