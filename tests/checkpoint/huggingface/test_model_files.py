"""What lies beside the weights of an exported model, after one stage and after several."""

import json
import shutil

import pytest
from support import families

from scale_llm.checkpoint.huggingface import export_huggingface
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint
from scale_llm.checkpoint.writing import write_tokenizer
from scale_llm.config.checkpoint_files import TOKENIZER_DIR
from scale_llm.config.io import save_config
from scale_llm.config.stage import PretrainConfig, RewardConfig, SftConfig

IDS = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def silent(_total):
    return lambda _done: None


@pytest.fixture
def saved(models, tmp_path):
    """The checkpoint of a second stage; the first began from a Hugging Face directory, which is gone."""

    def save(name, stage):
        source, first = tmp_path / "source", tmp_path / "first"
        second = tmp_path / "run" / "iter_0000003"
        shutil.copytree(find_checkpoint(models.imported(name)), second)
        source.mkdir()
        first.mkdir()
        families.tokenizer().save(str(source / "tokenizer.json"))
        (source / "config.json").write_text(json.dumps({"model_type": "llama", **IDS}))
        (source / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<s>", "eos_token": "<|endoftext|>"}))
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 7}))
        write_tokenizer(source / "tokenizer.json", first, None)
        shutil.rmtree(source)
        write_tokenizer(first / TOKENIZER_DIR / "tokenizer.json", second, TEMPLATE)
        cfg = checkpoint_config(second)
        cfg.stage, cfg.tokenizer.path, cfg.tokenizer.eod_token = stage, None, "<|endoftext|>"
        save_config(cfg, second)
        return second

    return save


def exported(checkpoint, tmp_path):
    directory = export_huggingface(checkpoint, tmp_path / "out", silent)
    return [json.loads((directory / name).read_text()) for name in ("config.json", "generation_config.json")]


@pytest.mark.parametrize("stage", [PretrainConfig(), SftConfig()])
def test_special_tokens_survive_and_turns_end(saved, tmp_path, stage):
    """A base model's text ends where it did; one that has learnt conversations stops after its turn."""
    config, generation = exported(saved("llama3", stage), tmp_path)
    assert {key: config[key] for key in IDS} == IDS
    assert generation == {"eos_token_id": [0, 2] if stage.name == "sft" else 0, "top_k": 7}


def test_a_reward_model_has_padding_that_is_no_end(saved, tmp_path):
    """An answer that ends with padding would be judged before its end."""
    config, generation = exported(saved("llama_reward", RewardConfig()), tmp_path)
    assert config["eos_token_id"] == 0 and config["pad_token_id"] == 1
    assert generation["eos_token_id"] == 0


def test_the_tokenizer_in_use_is_kept_whatever_its_name(tmp_path):
    """What lies beside it is another's."""
    (tmp_path / "code32k.json").write_text("mine")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    write_tokenizer(tmp_path / "code32k.json", tmp_path / "checkpoint", None)
    (kept,) = (tmp_path / "checkpoint" / TOKENIZER_DIR).iterdir()
    assert kept.name == "tokenizer.json" and kept.read_text() == "mine"
