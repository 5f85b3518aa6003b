"""Runs Python that a model has written, each piece in a process of its own that cannot do much (see `confine`).

What is kept out: the network, other processes, endless loops, memory and files beyond the limits; where Landlock is in
force, writing or removing any file outside a directory that is gone afterwards. The environment is empty, and only the
standard library can be imported. What is NOT kept out: reading every file that the user may read, as long as the code
can tell nobody but the score; use of CPU time up to the limits; and faults of the kernel itself. It is no virtual
machine: whoever expects attacks runs the whole job as a user, or in a container, that holds nothing of value.
"""

import functools
import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("sandbox_child.py")
MAX_RESULT_BYTES = 2**20
"""Of what a child says on its pipe; more is nothing that ours would say."""


class SandboxError(RuntimeError):
    """The sandbox itself does not work here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    timeout_seconds: float = 10.0
    """Wall-clock time of one process, its start included."""
    memory_megabytes: int = 512
    """Address space; a Python that does nothing takes about 20 MiB."""


@functools.cache
def isolation() -> frozenset[str]:
    """The layers of `confine` that are in force for processes started here, by trying.

    Raises:
        SandboxError: too few to run anything.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"python_tests needs Linux to confine answers; this is {platform.system()}")
    with _started(b"", Limits(), with_tests=False) as child:
        child.read()
        found = child.layers()
    if not found:
        raise SandboxError(f"a Python process did not start within {Limits().timeout_seconds:g} seconds")
    return found


def run_program(code: str, stdin: str, limits: Limits) -> str | None:
    """What the code prints as a program that reads `stdin`; None where it fails, is stopped, or prints no UTF-8.

    Raises:
        SandboxError: the code was not run, as the process could not be confined.
    """
    with _started(code.encode("utf-8", "replace"), limits, with_tests=False, stdin=stdin) as child:
        child.read()
        child.layers()
        return child.output() if child.status() == 0 else None


def run_tests(code: str, tests: list[str], limits: Limits) -> list[bool]:
    """Which of the tests raise nothing when they are run one after another where the code has been run.

    A test counts as passed only if the child names a token that it is handed after the code has run, so that leaving
    early, with whatever status, or printing things passes nothing. Code and tests share one interpreter, though: code
    that looks for this (frames, open pipes, an `__eq__` that is always true, a patched built-in) can pass every test.
    A program with inputs and outputs, which are compared out here, gives it less to hold on to.

    Raises:
        SandboxError: the code was not run, as the process could not be confined.
    """
    token = secrets.token_hex(16)
    with _started(code.encode("utf-8", "replace"), limits, with_tests=True) as child:
        child.read(until=b"\nready\n")
        child.layers()
        child.hand_over(json.dumps({"token": token, "tests": tests}).encode())
        child.read()
        said = set(child.said.splitlines())
    return [f"{token} {number}".encode() in said for number in range(len(tests))]


class _Child:
    """A process that runs, and its pipes."""

    def __init__(self, process: subprocess.Popen, results: int, tests: int, stdout: IO[bytes], deadline: float):
        self.said = b""
        self._process, self._results, self._tests, self._stdout = process, results, tests, stdout
        self._deadline = deadline

    def read(self, until: bytes | None = None) -> None:
        """Takes what the child says up to a text, or until it has no more to say, or its time is over."""
        while until is None or until not in self.said:
            if not self._wait(self._results, selectors.EVENT_READ) or len(self.said) > MAX_RESULT_BYTES:
                return
            more = os.read(self._results, 65536)
            if not more:
                return
            self.said += more

    def hand_over(self, text: bytes) -> None:
        """Writes to the child as it reads, and no longer than it lives."""
        try:
            while text and self._wait(self._tests, selectors.EVENT_WRITE):
                text = text[os.write(self._tests, text) :]
        except BrokenPipeError:
            return
        finally:
            os.close(self._tests)
            self._tests = -1

    def layers(self) -> frozenset[str]:
        """What the child says to be in force; nothing where its time was over before it could say so."""
        first, said, _ = self.said.partition(b"\n")
        if not said and time.monotonic() >= self._deadline:
            return frozenset()
        try:
            report = json.loads(first)
        except ValueError:
            report = {
                "refused": f"its process ended before it was confined ({first[:80]!r}); raise reward.memory_megabytes?"
            }
        if "layers" not in report:
            raise SandboxError(f"python_tests cannot confine answers here: {report['refused']}")
        return frozenset(report["layers"])

    def status(self) -> int | None:
        """The exit status; None where the time is over first."""
        try:
            return self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str | None:
        self._stdout.seek(0)
        try:
            return self._stdout.read().decode()
        except UnicodeDecodeError:
            return None

    def end(self) -> None:
        """Before `wait`: as long as the child is not reaped, no other process can have its number."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        for pipe in (self._results, self._tests):
            if pipe >= 0:
                os.close(pipe)

    def _wait(self, pipe: int, event: int) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            return bool(selector.select(max(0.0, self._deadline - time.monotonic())))


@contextmanager
def _started(code: bytes, limits: Limits, *, with_tests: bool, stdin: str = "") -> Iterator[_Child]:
    """A child that confines itself and runs the code; on leaving it is dead and its directory gone."""
    with (
        tempfile.TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as directory,
        _file(code) as code_file,
        _file(stdin.encode("utf-8", "replace")) as stdin_file,
        tempfile.TemporaryFile() as stdout,
    ):
        results_read, results_write = os.pipe()
        tests_read, tests_write = os.pipe()
        os.set_blocking(tests_write, False)
        options = {
            "code": code_file.fileno(),
            "results": results_write,
            "tests": tests_read if with_tests else None,
            "cpu_seconds": ceil(limits.timeout_seconds) + 1,
            "memory_bytes": limits.memory_megabytes * 2**20,
        }
        deadline = time.monotonic() + limits.timeout_seconds
        try:
            process = subprocess.Popen(
                # -I and -S: no site-packages, no directory of the caller's; -B: no compiled files are written
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD), json.dumps(options)],
                stdin=stdin_file,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env=_environment(directory),
                pass_fds=(code_file.fileno(), results_write, tests_read),
                start_new_session=True,
            )
        except BaseException:
            os.close(results_read)
            os.close(tests_write)
            raise
        finally:
            os.close(results_write)
            os.close(tests_read)
        child = _Child(process, results_read, tests_write, stdout, deadline)
        try:
            yield child
        finally:
            child.end()


def _environment(directory: str) -> dict[str, str]:
    """Nothing of ours but where Python's own libraries may lie."""
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"HOME": directory, "TMPDIR": directory, **libraries}


@contextmanager
def _file(content: bytes) -> Iterator[IO[bytes]]:
    """A file without a name, at its start."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file
