"""What a save writes is the state of that moment, whole and on the disk, whoever changes or is killed meanwhile."""

import faulthandler
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scale_llm.checkpoint.forked import Forked
from scale_llm.checkpoint.snapshot import Release, SharedMemory, compact, held, left_out
from scale_llm.config.checkpoint_files import latest_checkpoint


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_written_is_what_was_saved(ranks, tmp_path, world_size):
    """Every tensor is overwritten the moment save returns: in flat buffers, in shared memory, in a mapped file, turned,
    under two names. Five saves: plans are made twice, then serve again, and the structure changes before the fourth.
    """
    for wrong in ranks.fresh(world_size, "support.snapshots:overwritten", directory=str(tmp_path), saves=5):
        assert wrong == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_are_those_of_megatron_core(ranks, tmp_path, world_size):
    """Names, index with every offset and length, tensors: its own writer gives the same."""
    for wrong in ranks.fresh(world_size, "support.snapshots:as_megatron_writes", directory=str(tmp_path)):
        assert wrong == []


def test_a_writer_that_is_killed(ranks, tmp_path):
    """On one of two ranks: both are told, the checkpoint before is the latest, and the next save works."""
    first, second = ranks.fresh(2, "support.snapshots:writer_killed", directory=str(tmp_path))
    assert first == second
    (problem,) = first
    assert "saving iteration 2 failed (its process ended with exit code -9)" in problem
    assert "iteration 1 is still whole" in problem
    assert latest_checkpoint(tmp_path) == (3, tmp_path / "iter_0000003")


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_is_on_the_disk_before_it_has_a_name(ranks, tmp_path, world_size):
    """Files, then their directory, then its name, then the tracker, then its name."""
    log = ranks.fresh(world_size, "support.snapshots:order_on_disk", directory=str(tmp_path))[0]
    checkpoint, tracker = "checkpoints/iter_0000001", "checkpoints/latest_checkpointed_iteration.txt"
    unfinished, named = "checkpoints/.iter_0000001.partial", log.index(f"rename {checkpoint}")
    files = [path for path in (tmp_path / checkpoint).rglob("*") if path.is_file()]
    assert len(files) == 6 + world_size
    renamed = {".metadata": ".metadata.tmp"}
    for path in files:
        name = path.relative_to(tmp_path / checkpoint).as_posix()
        assert log.index(f"fsync {unfinished}/{renamed.get(name, name)}") < named, name
    assert max(i for i, line in enumerate(log[:named]) if line == f"fsync {unfinished}") > max(
        i for i, line in enumerate(log[:named]) if line.startswith(f"fsync {unfinished}/")
    )
    after = log[named + 1 :]
    assert after[0] == "fsync checkpoints" and after[1].startswith("fsync checkpoints/latest")
    assert after[2:4] == [f"rename {tracker}", "fsync checkpoints"]


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(60.0)
    return {
        "whole": base, "middle": base[7:21].view(2, 7), "strided": base.view(6, 10)[:, 2:5], "none": base[3:3],
        "turned": base.view(6, 10).t(), "byte": base.to(torch.uint8)[5:9], "bf16": base.bfloat16()[1:2],
        "scalar": base[4],
    }  # fmt: skip


@pytest.mark.parametrize("kind", views())
def test_a_view_is_saved_as_its_copy_would_be(kind):
    """Bit for bit, without a copy where its elements lie together."""
    tensor = views()[kind]
    ours, copied = io.BytesIO(), io.BytesIO()
    torch.save(compact(tensor), ours)
    torch.save(tensor if kind in ("whole", "turned") else tensor.clone(), copied)
    assert ours.getvalue() == copied.getvalue()
    if tensor.is_contiguous() and tensor.numel():
        assert compact(tensor).data_ptr() == tensor.data_ptr()


def test_memory_that_others_can_change_is_known(tmp_path):
    """Shared between processes or with a file; private memory and private mappings are not. Copies are made of the
    former alone."""
    numbers = np.memmap(tmp_path / "file", dtype=np.float32, mode="w+", shape=(5000,))
    private = np.memmap(tmp_path / "file", dtype=np.float32, mode="c", shape=(5000,))
    shared = torch.zeros(5000).share_memory_()
    kinds = [(torch.zeros(5000), False), (shared, True), (shared[4000:], True), (torch.from_numpy(numbers), True),
             (torch.from_numpy(numbers)[10:20], True), (torch.from_numpy(private), False)]  # fmt: skip
    memory = SharedMemory()
    assert [memory.holds(tensor) for tensor, _ in kinds] == [is_shared for _, is_shared in kinds]
    for (tensor, is_shared), kept in zip(kinds, held(tensor for tensor, _ in kinds), strict=True):
        assert (kept.data_ptr() != tensor.data_ptr()) == is_shared


def test_what_is_given_back_is_of_this_process_alone():
    """In a forked process: whole pages of a tensor, none of its neighbours or of those that lie in another; the parent
    keeps all."""
    buffer = torch.ones(50_000)
    first, second = buffer[100:20_100], buffer[20_100:40_100]
    parts = [buffer[21_000:24_000], buffer[25_000:28_000], buffer[29_000:32_000]]  # two lie within the first one alone

    def child() -> tuple[float, float, float]:
        release = Release([parts[2], second, first, *parts[:2]])
        for tensor in (first, *parts, second):
            release(tensor)
        return buffer[:100].sum().item(), first.sum().item(), buffer[20_100:].sum().item()

    process = Forked(child)
    neighbour, released, kept = process.outcome()
    assert neighbour == 100 and kept == 29_900
    assert released < 2 * os.sysconf("SC_PAGESIZE") / 4, "its whole pages were kept"
    assert buffer.sum() == 50_000


def test_what_is_left_out_is_in_no_child(tmp_path):
    """Whole pages of it, while the block lasts; what lies beside it is there, and the parent's stays as it is."""
    buffer = torch.ones(50_000)

    def look(count: int) -> float:
        faulthandler.disable()  # pytest's would tell of what is meant to happen
        return buffer[:count].sum().item()

    with left_out([buffer[100:]]):
        beside, inside = Forked(lambda: look(100)), Forked(lambda: look(50_000))
        assert beside.outcome() == 100
        assert inside.problem() == "its process ended with exit code -11"
    assert Forked(lambda: look(50_000)).outcome() == 50_000 == look(50_000)


def test_a_process_says_how_it_ended():
    """A value, an error, or neither."""

    def die():
        os._exit(7)

    assert Forked(lambda: {"a": 1}).outcome() == {"a": 1}
    assert Forked(lambda: 1 / 0).problem() == "ZeroDivisionError: division by zero"
    assert Forked(die).problem() == "its process ended with exit code 7"
    slow = Forked(lambda: time.sleep(60))
    assert slow.is_alive()
    slow.stop()
    assert not slow.is_alive() and slow.problem() == "its process ended with exit code -9"


def test_a_process_ends_with_its_parent(tmp_path: Path):
    """Or it would write into a directory that the next run has begun anew."""

    def child():
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        Forked(child)
        os._exit(0 if _appears(tmp_path / "pid") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
    deadline, pid = time.monotonic() + 10, int((tmp_path / "pid").read_text())
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def _runs(pid: int) -> bool:
    """Not as a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
