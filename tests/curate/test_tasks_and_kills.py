"""The output depends on the input alone: not on how many tasks run at once, nor on when a run was killed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from curate.conftest import command, environment

from scale_llm.config.curate_compose import compose_curation
from scale_llm.curate.run import curate


def _content(output: Path) -> dict[str, bytes]:
    """Files of a curation but for the report, which has seconds in it."""
    folders = ("documents", "removed")
    return {
        str(path.relative_to(output)): path.read_bytes()
        for folder in folders
        for path in sorted((output / folder).rglob("*"))
        if path.is_file()
    }


@pytest.mark.filterwarnings("ignore:The 'registered_domain' property:DeprecationWarning")
def test_one_two_and_four_tasks_give_the_same_files(curated: Path, web: list[str], tool, tmp_path: Path) -> None:
    """Byte for byte; and a finished curation is left as it is."""
    expected = _content(curated)
    assert sum(name.startswith("documents/") for name in expected) == 4
    curate(compose_curation([*web, f"output={tmp_path / '1'}", "tasks=1"]), lambda _: None)
    tool(*web, f"output={tmp_path / '4'}", "tasks=4")
    assert _content(tmp_path / "1") == expected and _content(tmp_path / "4") == expected
    assert "done before" in tool(*web, f"output={curated}", "tasks=3").stdout
    assert sorted(path.name for path in (curated / "work").iterdir()) == ["logs"]


def test_a_killed_run_goes_on(curated: Path, web: list[str], tool, tmp_path: Path) -> None:
    """A task is killed in the first phase; the run, with all its processes at once, in two later ones. Finished tasks
    are not done again, and the result is that of a run without interruption."""
    output = tmp_path / "out"
    words = [*web, f"output={output}", "tasks=2"]
    _kill_a_task(words, output / "work" / "00-rules" / "documents")
    for mark in ("03-copies/ledger/*", "06-near/ledger/*"):
        _run_until(words, output / "work", mark)
        assert not (output / "documents").exists() and not (output / "report.md").exists()
    done = tool(*words)
    assert "going on in" in done.stdout and "00-rules: 4 tasks, 4 done before" in done.stdout
    assert _content(output) == _content(curated)


def _kill_a_task(words: list[str], folder: Path) -> None:
    """As the kernel does for want of memory: the run ends and says so, where a pool might wait forever."""
    process = subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not folder.exists() and process.poll() is None:
        time.sleep(0.002)
    psutil.Process(process.pid).children()[-1].kill()
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and "a task was killed" in error and "Traceback" not in error


def _run_until(words: list[str], base: Path, mark: str) -> None:
    """Starts a curation and kills it as soon as a file of this name is there."""
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(base.glob(mark)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1].decode()[-2000:]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert _gone(process.pid), "processes outlive the run that was killed"


def _gone(session: int) -> bool:
    """Whether the session's processes end in a second or two: nobody has told them but the kernel."""
    for _ in range(100):
        if not any(_in_session(process, session) for process in psutil.process_iter()):
            return True
        time.sleep(0.05)
    return False


def _in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
