"""Every kind of bad input: an error that names it, all at once; status 1; nothing at the output."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import environment
from support.tool import TOOL


@pytest.fixture
def model(models, tmp_path):
    """A Llama in three shards, to be damaged."""
    directory = tmp_path / "model"
    shutil.copytree(models.sharded("llama3"), directory)
    assert len(list(directory.glob("*.safetensors"))) == 3
    return directory


def edit_config(model, **change):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))


def edit_tensors(model, change):
    """change: (shard's tensors) -> None, on the shard that holds layer 0's queries."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    path = model / index["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(model, number: int) -> Path:
    return sorted(model.glob("*.safetensors"))[number]


def unknown_architecture(model):
    edit_config(model, architectures=["BloomForCausalLM"])
    return ["BloomForCausalLM is not supported", "LlamaForCausalLM", "GPT2LMHeadModel"]


def missing_shards(model):
    shard(model, 1).unlink()
    shard(model, 0).unlink()
    return ["00001-of-00003.safetensors: this shard is missing", "00002-of-00003.safetensors: this shard is missing"]


def truncated_shard(model):
    os.truncate(shard(model, 1), shard(model, 1).stat().st_size - 100)
    return ["00002-of-00003.safetensors: truncated"]


def truncated_header(model):
    os.truncate(shard(model, 1), 50)
    return ["00002-of-00003.safetensors: truncated in its header"]


def wrong_tensors(model):
    def change(tensors):
        tensors["model.layers.9.unheard.of"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

    edit_tensors(model, change)
    return ["model.layers.9.unheard.of is not a tensor", "model.layers.0.self_attn.q_proj.bias is not a tensor"]


def missing_tensor(model):
    edit_tensors(model, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight"))
    return ["model.layers.0.self_attn.q_proj.weight"]


def other_sizes(model):
    edit_config(model, intermediate_size=128, num_hidden_layers=5)
    return [
        "model.layers.0.mlp.gate_proj.weight has shape (112, 64) where config.json says (128, 64)",
        "model.layers.3.mlp.down_proj.weight has shape (64, 112) where config.json says (64, 128)",
        "model.layers.4.mlp.down_proj.weight is missing",
    ]


def unsupported_options(model):
    edit_config(model, attention_bias=True, hidden_act="relu", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    return ["attention_bias=True is not supported", "hidden_act=relu is not supported", "rope_type=yarn"]


def malformed_values(model):
    edit_config(model, hidden_size="64", num_attention_heads=0, rope_parameters={"rope_type": "llama3"})
    return ["hidden_size='64' must be a positive number", "num_attention_heads=0 must be", "lacks the numbers factor"]


def two_number_formats(model):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"].half()
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 64, dtype=torch.int8)

    edit_tensors(model, change)
    return ["k_proj.weight is int8; quantised", "is float32 where the others like it are float16"]


def damaged_header(model):
    path = shard(model, 1)
    data = path.read_bytes()
    path.write_bytes(data[:8] + data[8:].replace(b'"data_offsets"', b'"data_offsetz"', 1))
    return ["00002-of-00003.safetensors: is no safetensors file (KeyError"]


def large_tokenizer(model):
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<one too many>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    return ["tokenizer.json: has 301 tokens, the embedding 300 rows"]


def no_config(model):
    (model / "config.json").unlink()
    return ["config.json: is missing"]


@pytest.mark.parametrize(
    "damage",
    [unknown_architecture, missing_shards, truncated_shard, truncated_header, wrong_tensors, missing_tensor,
     other_sizes, unsupported_options, malformed_values, two_number_formats, damaged_header, large_tokenizer,
     no_config],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_import_refuses(model, tmp_path, damage, tool):
    expected = damage(model)
    output = tool("import", model, tmp_path / "out", status=1)
    for words in expected:
        assert words in output, output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_output_that_is_not_empty(models, tmp_path, tool):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for words in (["import", models.original("llama3")], ["export", models.imported("llama3")],
                  ["reshard", models.imported("llama3")]):  # fmt: skip
        assert "exists and is not empty" in tool(*words, tmp_path / "out", status=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_export_refuses(models, tmp_path, tool):
    """A damaged checkpoint, a directory that is none, a class that does not fit, a class that is not known."""
    damaged = tmp_path / "damaged"
    shutil.copytree(models.imported("qwen3"), damaged)
    data = next((damaged / "iter_0000000").glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)
    assert "truncated" in tool("export", damaged, tmp_path / "out", status=1)
    assert "no checkpoint there" in tool("export", tmp_path, tmp_path / "out", status=1)
    fits = tool("export", models.imported("qwen3"), tmp_path / "out", "--architecture", "LlamaForCausalLM", status=1)
    assert "cannot be written as llama" in fits and "qk_layernorm" in fits
    unknown = tool("export", models.imported("qwen3"), tmp_path / "out", "--architecture", "NoSuchModel", status=1)
    assert "NoSuchModel: not known" in unknown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_import_leaves_nothing_that_looks_complete(models, tmp_path, how, tool):
    """Stopped while it writes; a second attempt then succeeds."""
    words = ["import", str(models.original("llama3")), str(tmp_path / "out")]
    slow = (
        f"import signal, sys, time, runpy; sys.argv[1:] = {words!r}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it\n"
        "from scale_llm.checkpoint.huggingface.source import HuggingFaceModel as M\n"
        "plain = M.megatron\n"
        "def megatron(*a):\n    time.sleep(0.2)\n    return plain(*a)\n"
        "M.megatron = megatron\n"
        f"runpy.run_path({TOOL!r}, run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=environment())  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.distcp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if how is signal.SIGKILL else 130), said
    assert not (tmp_path / "out").exists()
    tool(*words, status=0)
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
