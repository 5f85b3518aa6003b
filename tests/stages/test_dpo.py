"""Whole runs of direct preference optimisation, from a base model that a run has pretrained."""

import math
import shutil

import numpy as np
import pytest
from support.runs import BUDGET, PADDED, PP2, RANKS2, SPLITS, TP2, VPP2, assert_close, last_validation, rows, words_from

from scale_llm.config.errors import UserError

WORDS = ["stage=dpo", "model=from_checkpoint", "model.seq_length=96", "data.split='80,20,0'", "optim.lr=1e-3",
         "train.global_batch_size=4", "train.micro_batch_size=1", "train.train_iters=8", "train.eval_interval=4",
         "optim.lr_warmup_iters=0"]  # fmt: skip
words = words_from(WORDS)


@pytest.fixture(scope="session")
def single(runs, base, pairs, tmp_path_factory):
    """One process, each pair alone in a micro-batch."""
    run = tmp_path_factory.mktemp("dpo") / "single"
    assert runs(run, *words(base, pairs, PADDED)) == []
    return run


def test_begins_at_ln_2_and_learns(single):
    """Policy and reference are one model before the first update (Rafailov et al. 2023, eq. 7 with h = 0)."""
    found = [row for row in rows(single) if "dpo loss" in row]
    assert abs(found[0]["dpo loss"] - math.log(2)) < 1e-6
    assert abs(found[0]["rewards/margins"]) < 1e-5
    assert found[-1]["dpo loss"] < 0.6 and found[-1]["rewards/accuracies"] > 0.7
    assert last_validation(single)["rewards/accuracies validation"] > 0.5


WAYS = {**SPLITS, "budget_pp2_vpp2_live": [BUDGET, PP2, VPP2, "stage.reference=copy"]}


@pytest.mark.parametrize("way", WAYS)
def test_layouts_and_splits_agree(runs, tmp_path, base, pairs, single, way):
    """Lengths are unequal and the answers of a pair lie in rows of several: the same losses, rewards and gradients."""
    assert runs(tmp_path / "run", *words(base, pairs, *WAYS[way])) == []
    assert_close(tmp_path / "run", single, 2e-5)


def test_packed_rows_on_ranks_agree(runs, tmp_path, base, pairs):
    """A packed sample is a row of pairs, so it is compared with its own kind."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert runs(one, *words(base, pairs)) == []
    assert (
        runs(two, *words(base, pairs, "train.micro_batch_size=2", RANKS2, "parallel.use_distributed_optimizer=true"))
        == []
    )
    assert_close(two, one, 2e-5)


def test_cached_reference_equals_the_live_one_bit_for_bit(runs, tmp_path, base, pairs):
    cached, live = tmp_path / "cached", tmp_path / "live"
    assert runs(cached, *words(base, pairs)) == []
    assert runs(live, *words(base, pairs, "stage.reference=copy")) == []
    assert rows(cached) == rows(live)
    assert len(list((cached / "reference").iterdir())) == 1 and not (live / "reference").exists()


def test_another_model_or_data_set_has_another_cache(runs, tmp_path, base, pairs):
    """The name of the file is a fingerprint of both; the same run finds its own again."""
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs.read_text().splitlines(keepends=True)[:20]))
    again = tmp_path / "base"
    shutil.copytree(base, again)
    names = []
    for number, said in enumerate(
        [words(base, pairs), words(base, pairs), words(base, fewer), words(again, pairs),
         words(base, pairs, "precision=bf16")]
    ):  # fmt: skip
        run = tmp_path / f"run{number}"
        assert runs(run, *said, "train.train_iters=1", "train.eval_iters=0") == []
        (file,) = (run / "reference").iterdir()
        names.append(file.name)
    assert names[0] == names[1] and len(set(names)) == 4


def test_a_number_that_is_none_in_the_cache_is_refused(runs, tmp_path, base, pairs):
    run = tmp_path / "run"
    assert runs(run, *words(base, pairs, "train.train_iters=1")) == []
    (cache,) = (run / "reference").iterdir()
    values = np.load(cache)
    values[3] = np.nan
    np.save(cache, values)
    (problem,) = runs(run, *words(base, pairs, "train.train_iters=2"))
    assert str(cache) in problem and "no number" in problem and "delete it" in problem


@pytest.mark.parametrize("variant", [["stage.reference=cached"], ["peft=lora", "peft.rank=4", "stage.reference=copy"]])
def test_resume_is_bit_for_bit(runs, tmp_path, base, pairs, variant):
    runs.resumed_and_whole(tmp_path, *words(base, pairs, *variant), stop=4, iteration=8)


@pytest.mark.parametrize(
    "loss", ["ipo", "simpo", "orpo", "hinge", "cdpo", "robust_dpo"],
)  # fmt: skip
def test_every_loss_trains(runs, tmp_path, base, pairs, loss):
    """Margins grow; losses without a reference make none."""
    smoothing = ["stage.label_smoothing=0.1"] if loss in ("cdpo", "robust_dpo") else []
    assert runs(tmp_path / "run", *words(base, pairs, f"stage.loss={loss}", "train.eval_iters=0", *smoothing)) == []
    found = [row["rewards/margins"] for row in rows(tmp_path / "run")]
    assert found[-1] > found[0]
    assert (tmp_path / "run" / "reference").exists() == (loss not in ("simpo", "orpo"))


def test_one_batch_again_and_again(runs, tmp_path, base, pairs):
    """All pairs of a batch are told apart for certain, and ever more clearly."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs.read_text().splitlines(keepends=True)[:4]))
    said = words(base, few, "data.split='100,0,0'", "train.eval_iters=0", PADDED, "train.train_iters=12",
                 "optim.lr_decay_style=constant", "optim.lr=5e-4")  # fmt: skip
    assert runs(tmp_path / "run", *said) == []
    found = rows(tmp_path / "run")
    assert all(row["rewards/accuracies"] == 1.0 for row in found[1:])
    margins = [row["rewards/margins"] for row in found]
    assert 0 < margins[1] < margins[3] < margins[5] and margins[-1] > 1.5, margins


def test_the_model_under_adapters_is_the_reference(runs, tmp_path, base, pairs):
    """As good as the cached values but for the rounding of other rows, and without a second model or a file."""
    lora = ["peft=lora", "peft.rank=4", TP2, PADDED]
    assert runs(tmp_path / "own", *words(base, pairs, *lora, "stage.reference=base")) == []
    assert runs(tmp_path / "cached", *words(base, pairs, *lora)) == []
    assert_close(tmp_path / "own", tmp_path / "cached", 3e-5)
    assert not (tmp_path / "own" / "reference").exists()


def test_another_checkpoint_is_the_reference(runs, tmp_path, base, pairs, single):
    """Of a run that has moved away, margins do not begin at 0; of another model or tokenizer it is refused."""
    moved = f"stage.reference_load={single / 'checkpoints'}"
    assert runs(tmp_path / "run", *words(base, pairs, moved, PADDED)) == []
    first = rows(tmp_path / "run")[0]
    assert abs(first["rewards/margins"]) > 0.1
    other = tmp_path / "other"
    assert runs(other, "train.train_iters=1", "model.num_layers=2", "train.eval_iters=0") == []
    with pytest.raises(UserError, match=r"stage.reference_load=.*another model: model.num_layers"):
        runs(tmp_path / "no", *words(base, pairs, f"stage.reference_load={other / 'checkpoints'}"))
    shutil.copytree(base, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("iter_*/tokenizer/tokenizer.json"):
        file.write_text(file.read_text().replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(UserError, match=r"stage.reference_load=.*another tokenizer"):
        runs(tmp_path / "no", *words(base, pairs, f"stage.reference_load={tmp_path / 'copy'}"))


def test_experts_on_two_ranks(runs, tmp_path, pairs):
    """Experts dealt out over data-parallel ranks meet in every layer, so that ranks must not compute references at
    their own pace: 24 pairs over two ranks, of unequal numbers in a step's rows."""
    model = ["model.num_experts=4", "model.moe_router_topk=2", "model.moe_aux_loss_coeff=0.01"]
    assert runs(tmp_path / "base", *model, "train.train_iters=2", "train.eval_iters=0") == []
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(pairs.read_text().splitlines(keepends=True)[:19]))
    said = words(tmp_path / "base" / "checkpoints", fewer, "train.train_iters=3", "train.micro_batch_size=2",
                 "data.split='100,0,0'", "train.eval_iters=0")  # fmt: skip
    assert runs(tmp_path / "one", *said) == []
    for kind in ("cached", "copy"):
        two = tmp_path / kind
        assert runs(two, *said, RANKS2, "parallel.expert_model_parallel_size=2", f"stage.reference={kind}") == []
        assert_close(two, tmp_path / "one", 5e-5)
