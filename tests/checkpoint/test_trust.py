"""Nothing in a checkpoint is executed, and what its files should be is known: bombs, checksums, what may stay."""

import argparse
import io
import os
import pickle
import random
import shutil
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import sign_again

from scale_llm.checkpoint import checksums
from scale_llm.checkpoint.describing import describe
from scale_llm.checkpoint.only_data import load_data, read_index
from scale_llm.checkpoint.retention import Retention, remove_behind, retire
from scale_llm.checkpoint.summed_file import PIECE_BYTES, SMALL_BYTES, SummedFile
from scale_llm.checkpoint.torch_dist import TorchDistReader
from scale_llm.config.checkpoint_files import resumable
from scale_llm.config.errors import UserError
from scale_llm.parallel.rng import rng_state

WORDS = ["train.train_iters=2", "model.num_layers=2", "train.eval_interval=null"]
LAST = "iter_0000002"


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self._marker,)


@pytest.fixture(scope="module")
def saved(runs, tmp_path_factory) -> Path:
    """Checkpoints of a run of two steps."""
    directory = tmp_path_factory.mktemp("saved")
    assert runs(directory, *WORDS) == []
    return directory / "checkpoints"


def in_common(checkpoint: Path, bomb: Bomb) -> bytes:
    plain = torch.load(checkpoint / "common.pt", weights_only=True)
    torch.save({**plain, "args": bomb}, checkpoint / "common.pt")
    return (checkpoint / "common.pt").read_bytes()


def in_common_of_old_torch(checkpoint: Path, bomb: Bomb) -> bytes:
    """The format before zip archives."""
    torch.save({"args": bomb}, checkpoint / "common.pt", _use_new_zipfile_serialization=False)
    return (checkpoint / "common.pt").read_bytes()


def in_index(checkpoint: Path, bomb: Bomb) -> bytes:
    index = read_index(checkpoint)
    index.planner_data = bomb
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    return (checkpoint / ".metadata").read_bytes()


def in_object(checkpoint: Path, bomb: Bomb) -> bytes:
    """The generators' states of rank 0 lie among the tensors: others are put behind them, and the index says so."""
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    index = read_index(checkpoint)
    key = next(key for key in index.storage_data if key.fqn.startswith("rng_state/"))
    place = index.storage_data[key]
    with open(checkpoint / place.relative_path, "ab") as file:
        index.storage_data[key] = replace(place, offset=file.tell(), length=len(buffer.getvalue()))
        file.write(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    return buffer.getvalue()


PLANTS = {
    "common": (in_common, "common.pt"),
    "common_of_old_torch": (in_common_of_old_torch, "common.pt"),
    "index": (in_index, ".metadata"),
    "object": (in_object, "rng_state/"),
}


@pytest.mark.parametrize("place", PLANTS)
@pytest.mark.parametrize("sums", ["with_checksums", "without"])
def test_a_bomb_does_not_go_off(runs, saved, tmp_path, place, sums):
    """Not in a run that loads it nor in one that resumes from it, whether its checksums fit or it has none."""
    plant, named = PLANTS[place]
    checkpoint, marker = tmp_path / "foreign" / LAST, tmp_path / "went_off"
    shutil.copytree(saved, checkpoint.parent)
    data = plant(checkpoint, Bomb(marker))
    (checkpoint / checksums.FILE).unlink()
    if sums == "with_checksums":
        sign_again(checkpoint)
    problems = runs(tmp_path / "new", *WORDS[1:], "train.train_iters=4", f"checkpoint.load={checkpoint.parent}")
    shutil.copytree(saved.parent, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "checkpoints")
    shutil.copytree(checkpoint.parent, tmp_path / "own" / "checkpoints")
    problems += runs(tmp_path / "own", *WORDS[1:], "train.train_iters=4")
    assert not marker.exists()
    told = [problem for problem in problems if "posix.mkdir" in problem]
    assert len(told) >= 2 and all(named in problem and "could run code" in problem for problem in told), problems
    if place != "object":  # tools do not read these
        with pytest.raises(UserError, match="posix.mkdir"):
            describe(checkpoint)
    assert not marker.exists()
    load = pickle.loads if place == "index" else lambda data: torch.load(io.BytesIO(data), weights_only=False)
    load(data)
    assert marker.exists(), "it was no bomb"


ATTRIBUTES = [("torch", "serialization.os.system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
              ("torch.distributed.checkpoint.metadata", "os.system")]  # fmt: skip


@pytest.mark.parametrize("module, name", ATTRIBUTES)
def test_the_index_names_nothing_but_its_own(tmp_path, module, name):
    """Nor something behind an allowed module: a name with dots is followed by pickle."""
    code = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(UserError, match=f"names {module}.{name}"):
        read_index(tmp_path)


def test_what_megatron_keeps_beside_tensors_is_read(tmp_path):
    """Its arguments with enumerations, and states of generators, by either name of numpy's modules."""
    from megatron.core.transformer.enums import AttnBackend

    state = {"args": argparse.Namespace(attention_backend=AttnBackend.auto, dtype=torch.bfloat16, path=Path("/x")),
             "rng_state": [{"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}],
             "ours": rng_state(), "iteration": 7}  # fmt: skip
    torch.save(state, tmp_path / "common.pt")
    found = load_data(tmp_path / "common.pt")
    assert found["args"] == state["args"] and found["iteration"] == 7
    assert (found["rng_state"][0]["np_rng_state"][1] == state["rng_state"][0]["np_rng_state"][1]).all()
    renamed(tmp_path / "common.pt", b"numpy._core.", b"numpy.core.")
    assert (load_data(tmp_path / "common.pt")["rng_state"][0]["np_rng_state"][1] != 0).any()


def renamed(archive: Path, old: bytes, new: bytes) -> None:
    """A module's name in a pickle of torch.save, as another numpy wrote it."""
    with zipfile.ZipFile(archive) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in parts.items():
            assert old in data or not name.endswith("data.pkl")
            file.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"PK\3\4", b"\x80\x02N."])
def test_what_is_no_file_of_data_is_told(tmp_path, data):
    (tmp_path / "common.pt").write_bytes(data)
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match="common.pt: cannot be read"):
        load_data(tmp_path / "common.pt")
    with pytest.raises(UserError, match=".metadata: cannot be read"):
        read_index(tmp_path)


def test_checksums_say_what_is_wrong(tmp_path):
    """Length, checksum, and file; a file larger than what is read at once."""
    data = np.random.default_rng(0).bytes(checksums.PIECE_BYTES + 17)
    for name in ("a.bin", "sub/b.bin", "c.bin", "config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    checksums.collect(tmp_path, {"a.bin": checksums.entry(tmp_path / "a.bin")})
    table = checksums.read(tmp_path)
    assert table is not None and sorted(table) == ["a.bin", "c.bin", "config.yaml", "sub/b.bin"]
    assert table["a.bin"] == {"algorithm": "crc32", "digest": f"{zlib.crc32(data):08x}", "bytes": len(data)}
    assert checksums.problems(tmp_path, table, hashing=True) == []
    (tmp_path / "config.yaml").write_text("people change it")
    (tmp_path / "a.bin").write_bytes(data[:-1])
    (tmp_path / "sub/b.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (tmp_path / "c.bin").unlink()
    problems = checksums.problems(tmp_path, table, hashing=True)
    found = f"{zlib.crc32(data[:-1] + bytes([data[-1] ^ 1])):08x}"
    assert problems == [
        f"{tmp_path}/a.bin: has {len(data) - 1} bytes, expected {len(data)}",
        f"{tmp_path}/c.bin: is missing, expected {len(data)} bytes",
        f"{tmp_path}/sub/b.bin: has crc32 {found}, expected {zlib.crc32(data):08x}",
    ]
    assert len(checksums.problems(tmp_path, table, hashing=False)) == 2


@pytest.mark.parametrize("sizes", [[], [1], [100, 0, SMALL_BYTES, 3], [PIECE_BYTES + 17, 5, 2 * PIECE_BYTES], [40] * 5])
def test_a_file_is_summed_while_it_is_written(tmp_path, sizes):
    """Small writes are collected, large ones cut: bytes, place and checksum are those of the file."""
    random = np.random.default_rng(0)
    parts = [random.bytes(size) for size in sizes]
    with SummedFile(tmp_path / "__0_0.distcp") as file:
        for part in parts:
            before = file.tell()
            file.write(memoryview(part))
            file.flush()
            assert file.tell() == before + len(part)
    assert (tmp_path / "__0_0.distcp").read_bytes() == b"".join(parts)
    assert file.entry == checksums.entry(tmp_path / "__0_0.distcp")
    checksums.collect(tmp_path, {"__0_0.distcp": file.entry})
    assert checksums.read(tmp_path) == {"__0_0.distcp": file.entry}


def test_tensors_without_a_checksum_are_not_published(tmp_path):
    """They belong to no rank that told of them."""
    (tmp_path / "__1_0.distcp").write_bytes(b"x")
    with pytest.raises(OSError, match="no checksum of __1_0.distcp"):
        checksums.collect(tmp_path, {"__0_0.distcp": {}})


def test_shares_are_equal_and_whole():
    """Every file is one rank's; none has more than the mean and the largest file."""
    table = {f"{n}": {"bytes": 1000 - n * 7, "digest": "", "algorithm": "crc32"} for n in range(50)}
    shares = [checksums.share(table, rank, 8) for rank in range(8)]
    assert sorted(name for share in shares for name in share) == sorted(table)
    loads = [sum(value["bytes"] for value in share.values()) for share in shares]
    assert max(loads) <= sum(loads) / 8 + 1000


def directories(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).mkdir()
    return path


def test_which_old_ones_go(tmp_path):
    """Damaged ones and those after the newest, of a part that was given up, do not count."""
    directories(tmp_path, *(f"iter_{n:07d}" for n in (0, 10, 20, 30, 40, 90)), "iter_0000035.damaged", "iter_x")

    def gone(**options):
        return [int(path.name[5:]) for path in Retention(**options).surplus(tmp_path, 40)]

    assert gone() == []
    assert gone(keep_last=2) == [20, 10, 0]
    assert gone(keep_last=1, keep_every=20) == [30, 10]
    assert gone(keep_last=2, read=frozenset({(tmp_path / "iter_0000010").resolve()})) == [20, 0]
    assert [path.name for path in retire([tmp_path / "iter_0000010"])] == [".iter_0000010.removed"]
    remove_behind(tmp_path).join()
    assert not list(tmp_path.glob("*0000010*"))


def test_which_one_a_run_may_go_on_from(tmp_path):
    """The tracker's and older ones; where it says nothing, all that are there."""
    directories(
        tmp_path, "iter_0000010", "iter_0000020", "iter_0000030", "iter_0000040.damaged", ".iter_0000050.partial"
    )
    tracker = tmp_path / "latest_checkpointed_iteration.txt"

    def found(text: str | bytes) -> list[int]:
        tracker.write_bytes(text if isinstance(text, bytes) else text.encode())
        candidates, wrong = resumable(tmp_path)
        assert (wrong is None) == (text == "20\n")
        return [iteration for iteration, _ in candidates]

    assert found("20\n") == [20, 10]
    for text in ("", "40", "x", "²", b"\xff\xfe", b"\0\0"):
        assert found(text) == [30, 20, 10]
    tracker.unlink()
    assert resumable(tmp_path)[1] is not None
    assert resumable(directories(tmp_path, "empty") / "empty") == ([], None)


def test_readers_still_read(saved):
    """Lists of what may be named are not too short for our own."""
    assert describe(saved).iteration == 2
    assert TorchDistReader(saved / LAST).tensors
