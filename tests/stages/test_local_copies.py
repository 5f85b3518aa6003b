"""Copies on the nodes' own disks: resumed from bit for bit, brought back from another node, passed over when they are
not what they should be. A node is one rank here, and its disk one directory.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import TP2, latest, rows

from scale_llm.checkpoint.only_data import load_data

WORDS = ["train.train_iters=8", "train.eval_interval=null", "model.num_layers=2"]
DISTRIBUTED = "parallel.use_distributed_optimizer=true"
SAVED = "checkpoint.save_interval=3"


def copies(directory: Path, replicas: int = 1) -> list[str]:
    """Every 2 iterations; a checkpoint at 3 and 6."""
    return [f"checkpoint.local_dir={directory}", "checkpoint.local_interval=2",
            f"checkpoint.local_replicas={replicas}", SAVED]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory) -> Path:
    """8 steps on two nodes, no copies."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert runs(directory, *WORDS, DISTRIBUTED, SAVED, nodes=2) == []
    return directory


@pytest.fixture(scope="module")
def lost(runs, tmp_path_factory) -> Path:
    """A run that died after iteration 5: a checkpoint of 3, local copies of 2 and 4."""
    directory = tmp_path_factory.mktemp("lost")
    words = [*WORDS, DISTRIBUTED, *copies(directory / "disks")]
    assert runs(directory / "run", *words, "train.exit_interval=5", nodes=2) == []
    shutil.rmtree(directory / "run" / "checkpoints" / "iter_0000005")  # saved at the stop
    (directory / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    return directory


@pytest.fixture
def run(lost, tmp_path) -> Path:
    """The same, to go on with. In the same place, as copies know their run by it and by what lies there."""
    if (lost / "kept").exists():
        for name in ("run", "disks"):
            shutil.rmtree(lost / name)
            shutil.copytree(lost / "kept" / name, lost / name)
    else:
        for name in ("run", "disks"):
            shutil.copytree(lost / name, lost / "kept" / name)
    return lost


def shelf(root: Path, rank: int) -> Path:
    """What a node keeps."""
    (found,) = (root / "disks").glob(f"*/rank_{rank:05d}")
    return found


def go_on(runs, root: Path, capture: Path, *words: str) -> str:
    """Resumes on two ranks; what they printed."""
    arguments = [*WORDS, DISTRIBUTED, *copies(root / "disks"), *words]
    (problems, _) = runs.on_ranks(
        "support.local_copies:run_and_tell", root / "run", *arguments, nodes=2, log=str(capture)
    )
    assert problems == []
    return capture.read_text()


def test_every_node_keeps_its_own_and_anothers(run):
    """The two newest; nothing unfinished."""
    for rank in (0, 1):
        for iteration in (2, 4):
            names = sorted(path.name for path in (shelf(run, rank) / f"iter_{iteration:07d}").iterdir())
            assert names == ["rank_00000.json", "rank_00000.pt", "rank_00001.json", "rank_00001.pt"]
        assert len(list(shelf(run, rank).iterdir())) == 2
    mine, theirs = (shelf(run, rank) / "iter_0000004" / "rank_00001.pt" for rank in (1, 0))
    assert mine.read_bytes() == theirs.read_bytes()
    found = load_data(mine)
    states = [value.numel() for name, value in found["tensors"].items() if name.endswith("exp_avg")]
    weights = sum(value.numel() for name, value in found["tensors"].items() if "/model0." in name)
    assert weights * 0.4 < sum(states) < weights * 0.6, "half of the optimizer's state is this rank's"


def test_resume_is_bit_for_bit(runs, run, undisturbed, tmp_path):
    """From the copies of 4, which are newer than the checkpoint of 3."""
    said = go_on(runs, run, tmp_path / "log")
    assert "going on from the local copies of iteration 4" in said
    runs.assert_same_bits(run / "run", undisturbed, 8)
    assert [list(shelf(run, rank).iterdir()) for rank in (0, 1)] == [[], []], "it has come to its end"


def test_a_checkpoint_that_was_missed_is_made_up_for(runs, run, tmp_path):
    """The run died when the checkpoint of 3 was not there: the copies of 4 are not a checkpoint, and become one at the
    next step, and also where the run ends at once. What the kill has left goes."""
    saved = run / "run" / "checkpoints"
    shutil.rmtree(saved / "iter_0000003")
    (saved / "latest_checkpointed_iteration.txt").unlink()
    for name in (".iter_0000003.partial", ".iter_0000002.removed"):
        (saved / name).mkdir()
    rewrite(run, after=-1)
    said = go_on(runs, run, tmp_path / "log", "train.train_iters=4", "checkpoint.save_interval=100")
    assert "going on from the local copies of iteration 4" in said
    assert latest(run / "run") == 4
    assert not list(saved.glob(".iter_*"))
    for name in ("run", "disks"):
        shutil.rmtree(run / name)
        shutil.copytree(run / "kept" / name, run / name)
    shutil.rmtree(saved / "iter_0000003")
    (saved / "latest_checkpointed_iteration.txt").unlink()
    rewrite(run, after=-1)
    go_on(runs, run, tmp_path / "log")
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000005", "iter_0000006", "iter_0000008"]


def test_a_node_that_comes_back_empty(runs, run, undisturbed, tmp_path):
    """Its part is with the other node, and goes back to it."""
    shutil.rmtree(shelf(run, 1))
    said = go_on(runs, run, tmp_path / "log", "train.exit_interval=5")
    assert "going on from the local copies of iteration 4" in said
    assert (shelf(run, 1) / "iter_0000004" / "rank_00001.pt").is_file()
    go_on(runs, run, tmp_path / "log")
    runs.assert_same_bits(run / "run", undisturbed, 8)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte(runs, run, undisturbed, tmp_path):
    """In a rank's own copy: that of the other node is taken. In both: an older copy would be older than the
    checkpoint, so that is."""
    own, other = (shelf(run, rank) / "iter_0000004" / "rank_00000.pt" for rank in (0, 1))
    flip(own)
    said = go_on(runs, run, tmp_path / "log", "train.exit_interval=5")
    assert f"{own}: has crc32" in said and "going on from the local copies of iteration 4" in said
    assert own.read_bytes() == other.read_bytes(), "the whole one was brought back"
    go_on(runs, run, tmp_path / "log")
    runs.assert_same_bits(run / "run", undisturbed, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped": (flip, "has crc32"),
    "truncated": (truncate, "bytes, expected"),
    "gone": (Path.unlink, "is missing"),
    "a kill came before it was named": (lambda path: path.with_suffix(".json").unlink(), None),
    "says nothing": (lambda path: path.with_suffix(".json").write_text("{"), "cannot be read"),
    "says something else": (lambda path: path.with_suffix(".json").write_text("{}"), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_copy_of_a_part_is_whole(runs, run, undisturbed, tmp_path, kind):
    """Of rank 0, here or there: the checkpoint is taken."""
    damage, said = DAMAGES[kind]
    for rank in (0, 1):
        damage(shelf(run, rank) / "iter_0000004" / "rank_00000.pt")
    text = go_on(runs, run, tmp_path / "log")
    assert said is None or text.count(said) == 2, text
    assert "going on from the local copies" not in text
    runs.assert_same_bits(run / "run", undisturbed, 8)


def test_all_are_gone(runs, run, undisturbed, tmp_path):
    """The checkpoint of 3 is there."""
    shutil.rmtree(run / "disks")
    assert "local copies" not in go_on(runs, run, tmp_path / "log")
    runs.assert_same_bits(run / "run", undisturbed, 8)


def rewrite(root: Path, **changes) -> None:
    for path in (root / "disks").rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_copies_of_another_run_or_layout_or_time(runs, run, undisturbed, tmp_path):
    """Passed over, each with its reason; a run that began anew in the same place is another one."""
    said = {}
    for name, change in {"run": {"run": "x"}, "layout": {"layout": {"world_size": 4}}, "time": {"after": 7}}.items():
        rewrite(run, **change)
        said[name] = go_on(runs, run, tmp_path / name, "train.exit_interval=4")
        shutil.rmtree(run / "run")
        shutil.copytree(run / "kept" / "run", run / "run")
        shutil.rmtree(run / "disks")
        shutil.copytree(run / "kept" / "disks", run / "disks")
    assert "is of another run that was here before" in said["run"]
    assert "is of another layout (layout, model, " in said["layout"]
    assert "is from after checkpoint 7, the tracker names 3: left behind on purpose" in said["time"]
    assert not any("going on from the local copies" in text for text in said.values())
    shutil.rmtree(run / "run" / "checkpoints")
    (run / "run" / "metrics.jsonl").unlink()
    assert "another run that was here before" in go_on(runs, run, tmp_path / "anew")
    runs.assert_same_bits(run / "run", undisturbed, 8)


class Bomb:
    def __init__(self, marker: Path):
        self._marker = str(marker)

    def __reduce__(self):
        import os

        return os.mkdir, (self._marker,)


def test_a_copy_that_would_run_code(runs, run, undisturbed, tmp_path):
    """Though its checksum fits, it is not loaded, and the checkpoint is taken."""
    from scale_llm.checkpoint import checksums

    for path in (run / "disks").rglob("iter_0000004/rank_00000.pt"):
        torch.save({"tensors": {}, "plain": Bomb(tmp_path / "went_off")}, path)
        said = json.loads(path.with_suffix(".json").read_text())
        entry = checksums.entry(path)
        path.with_suffix(".json").write_text(json.dumps({**said, "bytes": entry["bytes"], "digest": entry["digest"]}))
    said = go_on(runs, run, tmp_path / "log")
    assert "could run code" in said and "going on from the local copies" not in said
    assert not (tmp_path / "went_off").exists()
    runs.assert_same_bits(run / "run", undisturbed, 8)


def test_a_run_that_goes_back_leaves_its_copies(runs, run, tmp_path):
    """Steps 5 and 6 have no numbers: the run goes back to the checkpoint of 3, not to the copies of 4, and copies of
    what came after are made anew."""
    words = ["health.drill_nan_gradients=[5,6]", "health.max_nan_steps=2"]
    words += ["train.train_iters=9", "train.exit_interval=8"]  # copies go at the end
    said = go_on(runs, run, tmp_path / "log", *words)
    assert "going on from the local copies of iteration 4" in said, "at the start"
    assert "going back to iteration 3" in said and said.count("going on from the local copies") == 1
    assert sorted(path.name for path in shelf(run, 0).iterdir()) == ["iter_0000008"]


def test_a_full_disk_ends_no_run(runs, run, undisturbed, tmp_path):
    """It is told, and the checkpoints are as ever."""
    shutil.rmtree(run / "disks")
    words = [*WORDS, DISTRIBUTED, *copies(run / "disks")]
    first, second = runs.on_ranks(
        "support.local_copies:run_and_tell", run / "run", *words, nodes=2, log=str(tmp_path / "log"), fails=1
    )
    assert first == second == []
    text = (tmp_path / "log").read_text()
    assert "local copy of iteration 6, rank 1: OSError: no room; the run goes on without it" in text
    assert latest(run / "run") == 8
    runs.assert_same_bits(run / "run", undisturbed, 8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[TP2, "precision=bf16"], ["precision=fp16", "precision.initial_loss_scale=1024"]])
def test_other_layouts_and_precisions(runs, tmp_path, layout):
    """One node, so no replicas; the generators of dropout go on as well."""
    words = [*WORDS, *layout, "model.hidden_dropout=0.1", *copies(tmp_path / "disks", replicas=0)]
    assert runs(tmp_path / "whole", *words) == []
    shutil.rmtree(tmp_path / "disks")
    assert runs(tmp_path / "run", *words, "train.exit_interval=5") == []
    for path in (tmp_path / "run" / "checkpoints").glob("iter_*"):
        shutil.rmtree(path)
    (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    rewrite(tmp_path, after=-1)
    assert runs(tmp_path / "run", *words) == []
    assert [row["iteration"] for row in rows(tmp_path / "run") if "lm loss" in row][4:] == [5, 6, 7, 8]
    runs.assert_same_bits(tmp_path / "run", tmp_path / "whole", 8)
