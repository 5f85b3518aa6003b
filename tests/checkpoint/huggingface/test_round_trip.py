"""import -> run -> export gives back every bit, whatever the layout of the run between."""

import json
import shutil

import pytest
import torch
from support import families
from support.parity import EP2, PP2, SP, TP2, VPP2

from scale_llm.checkpoint.describing import describe
from scale_llm.checkpoint.huggingface import export_huggingface
from scale_llm.checkpoint.resharding import Layout, reshard
from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.torch_dist import Chunk, TorchDistReader, find_checkpoint, write_chunks
from scale_llm.checkpoint.verifying import compare_tensors

LAYOUTS = {"tp2": (2, TP2), "pp2": (2, PP2), "vpp2": (2, VPP2), "tp2_pp2": (4, {**SP, **PP2})}
MOE_LAYOUTS = {"ep2": (2, EP2), "tp2_sp_ep2_dp2": (4, {**SP, **EP2})}
EVERY = [*families.FAMILIES, *families.HEADS]


def silent(_total):
    return lambda _done: None


def assert_same(ours, theirs):
    """Same names, same dtypes, same bits."""
    a, b = SafetensorsFolder(ours), SafetensorsFolder(theirs)
    assert set(a.entries) == set(b.entries)
    for name in a.entries:
        assert a.entries[name].dtype is b.entries[name].dtype
        assert torch.equal(a.read(name), b.read(name)), name


@pytest.mark.parametrize("name", EVERY)
def test_import_and_export(models, tmp_path, name):
    exported = export_huggingface(models.imported(name), tmp_path / "out", silent)
    assert_same(exported, models.original(name))
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (exported, models.original(name)))
    for key in (
        "architectures",
        "model_type",
        "rope_parameters",
        "tie_word_embeddings",
        "sliding_window",
        "eos_token_id",
    ):
        assert ours.get(key) == theirs.get(key), key
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (exported / file).read_bytes() == (models.original(name) / file).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama3", "qwen2", "gpt2", "llama_reward"])
def test_through_a_run(models, ranks, tmp_path, name, layout):
    through(models, ranks, tmp_path, name, *LAYOUTS[layout])


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
@pytest.mark.parametrize("name", families.MOE)
def test_experts_through_a_run(models, ranks, tmp_path, name, layout):
    through(models, ranks, tmp_path, name, *MOE_LAYOUTS[layout])


def through(models, ranks, tmp_path, name, world_size, layout):
    """No config.json lies beside the run's checkpoint: the export makes one from the model."""
    run = tmp_path / "run"
    arguments = {"directory": str(models.imported(name)), "output": str(run), "layout": layout}
    ranks.fresh(world_size, "support.conversion:resave", **arguments)
    exported = export_huggingface(run, tmp_path / "out", silent)
    assert_same(exported, models.original(name))
    loads_the_same(exported, models.original(name), name)


def loads_the_same(exported, original, name):
    """transformers gives the same answer from both directories, so the config says the same too."""
    import transformers

    tokens = families.tokens(1, 64)
    _, model_class, _ = {**families.FAMILIES, **families.HEADS}[name]
    answers = []
    for directory in (exported, original):
        loaded, report = getattr(transformers, model_class).from_pretrained(
            directory, output_loading_info=True, attn_implementation="eager"
        )
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        with torch.no_grad():
            answers.append(loaded.eval()(tokens, output_hidden_states=True).hidden_states[-1])
    assert torch.equal(*answers)


def test_a_critic_beside_the_model_is_left_out(models, tmp_path):
    """As PPO saves one: with the names of the model after `critic.`, and an optimizer of its own."""
    path = find_checkpoint(models.imported("llama3"))
    reader = TorchDistReader(path)

    def chunk(key, name):
        entry = reader.tensors[key]
        shape = tuple(entry.size)
        return Chunk(name, shape, (0,) * len(shape), shape, entry.properties.dtype, lambda: reader.read(key))

    beside = ("", "critic.", "critic.optimizer.state.exp_avg.", "optimizer.state.exp_avg.")
    chunks = [chunk(key, f"{prefix}{key}") for prefix in beside for key in reader.tensors]
    saved = tmp_path / "run" / "iter_0000003"
    shutil.copytree(path, saved, ignore=shutil.ignore_patterns("*.distcp", ".metadata", "checksums.json"))
    write_chunks(saved, chunks, {}, lambda done: None)

    assert_same(export_huggingface(saved, tmp_path / "out", silent), models.original("llama3"))
    ours, plain = describe(saved), describe(path)
    assert ours.parameters == plain.parameters and ours.lines == plain.lines
    assert ours.beside_bytes == {"critic": 2 * plain.bytes, "optimizer state": plain.bytes}
    assert all(found.largest == 0 for found in compare_tensors(saved, path, silent))
    reshard(saved, tmp_path / "shards", Layout(), silent)
    (file,) = (tmp_path / "shards").glob("iter_0000003/mp_rank_00/*.pt")
    names = torch.load(file, weights_only=False)["model"]
    assert names and not [name for name in names if "critic" in name or "optimizer" in name]


def test_shards_index_and_dtype(models, tmp_path):
    """Small shards with an index that transformers reads; another dtype rounds once."""
    import transformers

    exported = export_huggingface(
        models.imported("llama3"), tmp_path / "out", silent, dtype=torch.bfloat16, shard_bytes=60_000
    )
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    original = SafetensorsFolder(models.original("llama3"))
    loaded = transformers.LlamaForCausalLM.from_pretrained(exported, dtype="auto")
    assert loaded.dtype is torch.bfloat16
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, original.read(key).bfloat16()), key


def test_written_as_another_class(models, tmp_path):
    """Mistral without a window is a Llama, and is written as one on request."""
    exported = export_huggingface(
        models.imported("llama2"), tmp_path / "out", silent, architecture="MistralForCausalLM"
    )
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert_same(exported, models.original("llama2"))
