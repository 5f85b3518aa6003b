"""What is said of a run's conversations, and found wrong with them, before ranks start."""

import json

import pytest
from support.configs import config_of

from scale_llm.config.errors import UserError
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.data.tokenizer import train_tokenizer
from scale_llm.launch.preparation import prepare_data

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False, compiler=True)
ROW, PLACES = 64, 31


@pytest.fixture
def prepared(tmp_path, capsys):
    """prepared(*words) -> what is printed of four conversations of 31 places and a run of rows of 64."""
    train_tokenizer(["a"], vocab_size=257, eod_token="<|endoftext|>", path=tmp_path / "tokenizer.json")
    plain = len("<|user|>\nQ\n<|assistant|>\nA\n")  # and the end of the turn; the last token is no place
    row = {"prompt": "Q" * (PLACES - plain + 1), "response": "A"}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 4)

    def run(*words: str) -> str:
        fine = [f"run_dir={tmp_path / 'run'}", "stage=sft", f"data.path={tmp_path / 'a.jsonl'}",
                f"tokenizer.path={tmp_path / 'tokenizer.json'}", f"data.cache_dir={tmp_path / 'cache'}",
                "train.train_iters=5", f"model.seq_length={ROW}", "data.split='50,50,0'"]  # fmt: skip
        prepare_data(resolve(config_of(*fine, *words), MACHINE))
        return capsys.readouterr().out

    return run


def test_how_full_rows_are(prepared):
    """Two conversations to a row; with vectors of prompt tuning before each, one."""
    assert f"packed: {2 * PLACES / ROW:.1%} of the places" in prepared()
    words = ["peft=prompt_tuning", "peft.num_virtual_tokens=20"]
    assert f"packed: {(PLACES + 20) / ROW:.1%} of the places" in prepared(*words)


@pytest.mark.parametrize("stage", ["stage=sft", "stage=dpo"])
def test_splits_that_are_left_empty(prepared, stage, tmp_path):
    """By their names; of preferences, too, and validation only where there is one."""
    if stage == "stage=dpo":
        row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
        (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(UserError) as caught:
        prepared(stage, "data.split='0,100,0'")
    assert len(caught.value.problems) == 1
    assert "data.split=0,100,0: leaves none of 4 " in caught.value.problems[0]
    with pytest.raises(UserError, match=r"for validation; .*train.eval_iters=0"):
        prepared(stage, "data.split='100,0,0'")
    prepared(stage, "data.split='100,0,0'", "train.eval_iters=0")
