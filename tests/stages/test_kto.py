"""Whole runs of KTO on single answers that are desirable or not."""

import json

import pytest
from support.runs import latest, rows

from scale_llm.config.errors import UserError

TP2 = "parallel.tensor_model_parallel_size=2"
RANKS2 = "cluster.nproc_per_node=2"
WORDS = ["stage=dpo", "stage.loss=kto", "model=from_checkpoint", "model.seq_length=96", "data.split='80,20,0'",
         "optim.lr=1e-3", "train.global_batch_size=8", "train.train_iters=8", "train.eval_interval=4",
         "optim.lr_warmup_iters=0", "stage.undesirable_weight=1.5"]  # fmt: skip


def words(base, judged, *more):
    return [*WORDS, f"data.path={judged}", f"checkpoint.load={base}", *more]


@pytest.fixture(scope="session")
def single(runs, base, judged, tmp_path_factory):
    """One process, each answer alone in a micro-batch."""
    run = tmp_path_factory.mktemp("kto") / "single"
    assert runs(run, *words(base, judged, "stage.batching=padded", "train.micro_batch_size=1")) == []
    return run


def test_tells_desirable_from_undesirable(single):
    """Ethayarajh et al. 2024, section 4.1: at the start every answer loses half its weight, and z0 is 0."""
    found = [row for row in rows(single) if "dpo loss" in row]
    assert abs(found[0]["rewards/chosen"]) < 1e-5 and abs(found[0]["kl"]) < 1e-5
    assert 0.5 <= found[0]["dpo loss"] <= 0.75
    assert found[-1]["rewards/chosen"] > 0.1 > -0.1 > found[-1]["rewards/rejected"]
    (last,) = [row for row in rows(single) if row["iteration"] == 8 and "dpo loss validation" in row]
    assert last["rewards/margins validation"] > 0.3 and last["rewards/accuracies validation"] == 1.0


WAYS = {
    "padded_by_two_dp2": ["stage.batching=padded", "train.micro_batch_size=2", RANKS2],
    "budget_tp2_sp": ["stage.batching=token_budget", TP2, "parallel.sequence_parallel=true"],
    "budget_pp2": ["stage.batching=token_budget", "parallel.pipeline_model_parallel_size=2"],
    "budget_cp2": ["stage.batching=token_budget", "parallel.context_parallel_size=2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_layouts_and_splits_agree(runs, tmp_path, base, judged, single, way):
    """z0 is of the global batch, so that losses and gradients depend on no split into micro-batches or ranks."""
    assert runs(tmp_path / "run", *words(base, judged, *WAYS[way])) == []
    found, wanted = rows(tmp_path / "run"), rows(single)
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, like in zip(found, wanted, strict=True):
        for key, value in like.items():
            assert abs(row[key] - value) <= 3e-5 * max(1.0, abs(value)), (row["iteration"], key, row[key], value)


def test_cached_live_and_base_references_agree(runs, tmp_path, base, judged):
    """Cached and live bit for bit; the model under the adapters has other rows, so other roundings."""
    lora = ["peft=lora", "peft.rank=4"]
    for kind in ("cached", "copy", "base"):
        assert runs(tmp_path / kind, *words(base, judged, *lora, f"stage.reference={kind}")) == []
    cached, live, own = (rows(tmp_path / kind) for kind in ("cached", "copy", "base"))
    assert cached == live
    for row, like in zip(own, cached, strict=True):
        for key, value in like.items():
            assert abs(row[key] - value) <= 3e-5 * max(1.0, abs(value)), (row["iteration"], key)
    assert not (tmp_path / "base" / "reference").exists()


def test_resume_is_bit_for_bit(runs, tmp_path, base, judged):
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    assert runs(resumed, *words(base, judged, "train.exit_interval=4")) == []
    assert latest(resumed) == 4
    assert runs(resumed, *words(base, judged)) == []
    assert runs(whole, *words(base, judged)) == []
    assert rows(resumed) == rows(whole)
    assert not {name: d for name, d in runs.differences(resumed, whole, iteration=8).items() if d}


def test_one_class_alone_is_refused(runs, tmp_path, base, judged):
    lines = [line for line in judged.read_text().splitlines() if json.loads(line)["label"]]
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"all 18 answers are desirable.*data\.fields\.label"):
        runs(tmp_path / "run", *words(base, tmp_path / "good.jsonl"))
