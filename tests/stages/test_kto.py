"""Whole runs of KTO on single answers that are desirable or not."""

import json

import pytest
from support.runs import BUDGET, PADDED, RANKS2, SP, SPLITS, TP2, assert_close, last_validation, rows, words_from

from scale_llm.config.errors import UserError

WORDS = ["stage=dpo", "stage.loss=kto", "model=from_checkpoint", "model.seq_length=96", "data.split='80,20,0'",
         "optim.lr=1e-3", "train.global_batch_size=8", "train.micro_batch_size=2", "train.train_iters=8",
         "train.eval_interval=4", "optim.lr_warmup_iters=0", "stage.undesirable_weight=1.5"]  # fmt: skip
words = words_from(WORDS)


@pytest.fixture(scope="session")
def single(runs, base, judged, tmp_path_factory):
    """One process, each answer alone in a micro-batch."""
    run = tmp_path_factory.mktemp("kto") / "single"
    assert runs(run, *words(base, judged, PADDED, "train.micro_batch_size=1")) == []
    return run


def test_tells_desirable_from_undesirable(single):
    """Ethayarajh et al. 2024, section 4.1: at the start every answer loses half its weight, and z0 is 0."""
    found = [row for row in rows(single) if "dpo loss" in row]
    assert abs(found[0]["rewards/chosen"]) < 1e-5 and abs(found[0]["kl"]) < 1e-5
    assert 0.5 <= found[0]["dpo loss"] <= 0.75
    assert found[-1]["rewards/chosen"] > 0.1 > -0.1 > found[-1]["rewards/rejected"]
    last = last_validation(single)
    assert last["rewards/margins validation"] > 0.3 and last["rewards/accuracies validation"] == 1.0


WAYS = {
    "padded_by_two_dp2": [*SPLITS["padded_by_two"], RANKS2],
    "budget_tp2_sp": [BUDGET, TP2, SP],
    "budget_pp2": SPLITS["budget_pp2"],
    "budget_cp2": SPLITS["budget_cp2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_layouts_and_splits_agree(runs, tmp_path, base, judged, single, way):
    """z0 is of the global batch, so that losses and gradients depend on no split into micro-batches or ranks."""
    assert runs(tmp_path / "run", *words(base, judged, *WAYS[way])) == []
    assert_close(tmp_path / "run", single)


def test_cached_live_and_base_references_agree(runs, tmp_path, base, judged):
    """Cached and live bit for bit; the model under the adapters has other rows, so other roundings."""
    lora = ["peft=lora", "peft.rank=4"]
    for kind in ("cached", "copy", "base"):
        assert runs(tmp_path / kind, *words(base, judged, *lora, f"stage.reference={kind}")) == []
    assert rows(tmp_path / "cached") == rows(tmp_path / "copy")
    assert_close(tmp_path / "base", tmp_path / "cached")
    assert not (tmp_path / "base" / "reference").exists()


def test_resume_is_bit_for_bit(runs, tmp_path, base, judged):
    runs.resumed_and_whole(tmp_path, *words(base, judged), stop=4, iteration=8)


def test_one_class_alone_is_refused(runs, tmp_path, base, judged):
    lines = [line for line in judged.read_text().splitlines() if json.loads(line)["label"]]
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"all 18 answers are desirable.*data\.fields\.label"):
        runs(tmp_path / "run", *words(base, tmp_path / "good.jsonl"))


def test_rows_of_weight_0_have_no_say(runs, tmp_path, base, judged):
    """Not even in z0: what is said of them may be anything."""
    lines = [json.loads(line) for line in judged.read_text().splitlines()]
    found = []
    for name, answer in (("one", "Nothing"), ("other", "Unheard")):
        file = tmp_path / f"{name}.jsonl"
        spare = [{"prompt": f"{a}?", "completion": answer, "label": a % 2 == 0, "weight": 0} for a in range(len(lines))]
        mixed = [row for pair in zip(lines, spare, strict=True) for row in pair]
        file.write_text("".join(json.dumps(row) + "\n" for row in mixed))
        more = (PADDED, "train.train_iters=2", "train.eval_interval=2")
        assert runs(tmp_path / name, *words(base, file, *more)) == []
        found.append(rows(tmp_path / name))
    assert found[0] == found[1]
