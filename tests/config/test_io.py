"""config.yaml is read back as it was written."""

import pytest
from support.configs import config_of

from scale_llm.config.errors import UserError
from scale_llm.config.io import load_config, save_config
from scale_llm.config.machine import Machine
from scale_llm.config.resolve import resolve
from scale_llm.config.store import options

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=True)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_round_trip(tmp_path, experiment):
    words = [
        f"experiment={experiment}", "optim.lr_decay_style=WSD", "optim.adam_eps=1e-17",
        "optim.lr=0.1234567890123456789",
        "data.path=[0.3,a.txt,0.7,b]", "train.rampup_batch_size=[2,2,8]", "tokenizer.eod_token='<a: #b>'",
    ]  # fmt: skip
    cfg = resolve(config_of(*words), MACHINE)
    save_config(cfg, tmp_path)
    again = load_config(tmp_path)
    assert again == cfg
    assert type(again.stage) is type(cfg.stage)


def test_former_configs_are_kept(tmp_path):
    first, second = (resolve(config_of(f"optim.lr={lr}"), MACHINE) for lr in (0.1, 0.2))
    assert save_config(first, tmp_path) is None
    assert save_config(first, tmp_path) is None, "the same again"
    assert save_config(second, tmp_path) == tmp_path / "config.1.yaml"
    assert save_config(first, tmp_path) == tmp_path / "config.2.yaml"
    assert load_config(tmp_path / "config.1.yaml") == first and load_config(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.1.yaml", "config.2.yaml", "config.yaml"]


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "model: {foo: 1}\n", "stage: {name: nothing}\n"])
def test_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="config.yaml"):
        load_config(tmp_path)
