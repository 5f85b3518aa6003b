"""A run goes on from its newest whole checkpoint; somebody else's damaged one is refused; old ones are removed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import sign_again
from support.runs import RANKS2, latest, rows

from scale_llm.checkpoint import checksums

WORDS = ["train.train_iters=6", "checkpoint.save_interval=2", "train.eval_interval=null", "model.num_layers=2"]
SECOND, FOURTH, SIXTH = (f"iter_{iteration:07d}" for iteration in (2, 4, 6))


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> Path:
    """6 steps, saved every 2."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert runs(directory, *WORDS) == []
    return directory


@pytest.fixture
def stopped(undisturbed, tmp_path) -> Path:
    """The same as it was after iteration 4; metrics.jsonl goes further, as of a run that died later."""
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    shutil.rmtree(directory / "checkpoints" / SIXTH)
    (directory / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    return directory


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def tracker(text: str) -> Callable[[Path], None]:
    return lambda checkpoints: (checkpoints / "latest_checkpointed_iteration.txt").write_text(text) and None


def before_checksums(name: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """As older versions wrote it."""

    def do(checkpoints: Path) -> None:
        for path in checkpoints.glob("iter_*"):
            (path / checksums.FILE).unlink()
        damage(checkpoints / FOURTH / name)

    return do


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda c: flip(c / FOURTH / "__0_0.distcp"), "__0_0.distcp: has crc32"),
    "truncated": (lambda c: truncate(c / FOURTH / "__0_0.distcp"), "__0_0.distcp: has "),
    "missing": (lambda c: (c / FOURTH / "__0_0.distcp").unlink(), "__0_0.distcp: is missing, expected"),
    "no_index": (lambda c: (c / FOURTH / ".metadata").unlink(), ".metadata: is missing"),
    "common": (lambda c: flip(c / FOURTH / "common.pt"), "common.pt: has crc32"),
    "checksums": (lambda c: truncate(c / FOURTH / checksums.FILE), "checksums.json: cannot be read"),
    "older_truncated": (before_checksums("__0_0.distcp", truncate), "__0_0.distcp: truncated"),
    "older_index": (before_checksums(".metadata", truncate), ".metadata: cannot be read"),
    "older_common": (before_checksums("common.pt", truncate), "common.pt: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_next_older_is_taken(runs, undisturbed, stopped, kind):
    """The rerun ends as the undisturbed run did, and keeps what is damaged under another name."""
    damage, said = DAMAGES[kind]
    checkpoints = stopped / "checkpoints"
    damage(checkpoints)
    damaged = {path.name for path in (checkpoints / FOURTH).iterdir()}
    output = runs.command(stopped, *WORDS) if kind == "flipped" else None
    if output is None:
        assert runs(stopped, *WORDS) == []
    else:
        assert said in output and f"{FOURTH} is kept as {FOURTH}.damaged" in output
        assert f"going on from {checkpoints / SECOND}" in output and "resumed at iteration 2" in output
    assert {path.name for path in (checkpoints / f"{FOURTH}.damaged").iterdir()} == damaged
    assert latest(stopped) == 6
    runs.assert_same_bits(stopped, undisturbed, 6)


@pytest.mark.parametrize("text", ["", "5", "four"])
def test_a_tracker_that_names_nothing(runs, undisturbed, stopped, text):
    """Iteration 4 is whole and is taken; nothing is set aside."""
    tracker(text)(stopped / "checkpoints")
    assert runs(stopped, *WORDS) == []
    assert not list((stopped / "checkpoints").glob("*.damaged*"))
    runs.assert_same_bits(stopped, undisturbed, 6)


def test_ranks_agree_though_one_alone_sees_the_damage(runs, tmp_path):
    """Each of two ranks reads its share; the damaged directory of an earlier time is not overwritten."""
    checkpoints = tmp_path / "checkpoints"
    assert runs(tmp_path, *WORDS, RANKS2, "train.exit_interval=4") == []
    table = checksums.read(checkpoints / FOURTH)
    assert table is not None and {"__0_0.distcp", "__1_0.distcp", "common.pt", ".metadata", "config.yaml"} <= set(table)
    (checkpoints / f"{FOURTH}.damaged").mkdir()
    flip(checkpoints / FOURTH / "__1_0.distcp")
    assert runs(tmp_path, *WORDS, RANKS2) == []
    assert (checkpoints / f"{FOURTH}.damaged.2" / "common.pt").is_file()
    assert not any((checkpoints / f"{FOURTH}.damaged").iterdir())
    assert [row["iteration"] for row in rows(tmp_path) if "lm loss" in row] == [1, 2, 3, 4, 5, 6]


def test_none_is_whole(runs, stopped):
    """The reasons of all are told, and nothing is touched."""
    checkpoints = stopped / "checkpoints"
    for name in (SECOND, FOURTH):
        flip(checkpoints / name / "__0_0.distcp")
    before = sorted(path.name for path in checkpoints.iterdir())
    problems = runs(stopped, *WORDS)
    assert len(problems) == 3 and FOURTH in problems[0] and SECOND in problems[1], problems
    assert "holds no whole checkpoint" in problems[2] and "another run_dir" in problems[2]
    assert sorted(path.name for path in checkpoints.iterdir()) == before and latest(stopped) == 4


def test_somebody_elses_is_refused_and_not_touched(runs, stopped, tmp_path):
    """With verify=false only lengths are looked at: one bit in a weight goes unseen."""
    load = stopped / "checkpoints"
    flip(load / FOURTH / "__0_0.distcp")
    words = [*WORDS, f"checkpoint.load={load}"]
    (problem,) = runs(tmp_path / "new", *words)
    assert (
        "__0_0.distcp: has crc32" in problem and "expected" in problem and f"an older one: {load / SECOND}" in problem
    )
    assert (load / FOURTH).is_dir() and latest(stopped) == 4
    assert runs(tmp_path / "older", *WORDS, f"checkpoint.load={load / SECOND}") == []
    assert runs(tmp_path / "unseen", *words, "checkpoint.verify=false") == []
    truncate(load / FOURTH / "__0_0.distcp")
    (problem,) = runs(tmp_path / "short", *words, "checkpoint.verify=false")
    assert "bytes, expected" in problem


@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_newer_than_the_code(runs, stopped, tmp_path, own):
    """Both numbers are told, whoever wrote it, and the directory stays as it is."""
    newest = stopped / "checkpoints" / FOURTH
    plain = torch.load(newest / "common.pt", weights_only=True)
    torch.save({**plain, "checkpoint_version": 4.0, "written_by": "scale_llm 9.0"}, newest / "common.pt")
    sign_again(newest)
    before = {path.name: path.stat().st_mtime_ns for path in newest.iterdir()}
    if own:
        (problem,) = runs(stopped, *WORDS)
    else:
        (problem,) = runs(tmp_path / "new", *WORDS, f"checkpoint.load={newest.parent}", "checkpoint.finetune=true")
    assert "checkpoint_version 4.0 (written by scale_llm 9.0)" in problem and "reads up to 3.0" in problem
    assert {path.name: path.stat().st_mtime_ns for path in newest.iterdir()} == before and latest(stopped) == 4


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_old_ones_are_removed(runs, undisturbed, tmp_path, asynchronous):
    """The last two stay, and what 4 divides; what is damaged is not counted, nor removed."""
    checkpoints = tmp_path / "checkpoints"
    kept = checkpoints / "iter_0000003.damaged"
    kept.mkdir(parents=True)
    (checkpoints / ".iter_0000001.removed").mkdir()  # a kill came while it was removed
    words = ["train.train_iters=10", *WORDS[1:], "checkpoint.keep_last=2", "checkpoint.keep_every=4"]
    assert runs(tmp_path, *words, f"checkpoint.async_save={asynchronous}") == []
    names = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert names == [kept.name, FOURTH, "iter_0000008", "iter_0000010"]
    assert latest(tmp_path) == 10


def test_what_the_run_reads_stays(runs, undisturbed, tmp_path):
    """A directory that a run both starts from and saves into."""
    save = tmp_path / "shared"
    shutil.copytree(undisturbed / "checkpoints" / SECOND, save / SECOND)
    words = [f"checkpoint.load={save / SECOND}", "checkpoint.finetune=true", "checkpoint.keep_last=1"]
    assert runs(tmp_path / "run", *WORDS, *words, f"checkpoint.save={tmp_path / 'own'}") == []
    assert (save / SECOND).is_dir()
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    assert runs(tmp_path / "on", *WORDS, *words, f"checkpoint.save={save}") == []
    assert sorted(path.name for path in save.glob("iter_*")) == [SECOND, SIXTH]
