"""The tool as its user meets it, and what a run makes of what it wrote."""

import json
import subprocess
import sys

import pytest
import torch
from support import families
from support.parity import SP
from support.ranks import environment
from support.tool import TOOL

from scale_llm.checkpoint.resharding import Layout, cut, local_name, reshard
from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.torch_dist import TorchDistReader


def silent(_total):
    return lambda _done: None


def test_help_shows_an_example_of_each(tool):
    for command in ("import", "export", "reshard", "verify", "inspect"):
        assert f"convert_checkpoint.py {command}" in tool(command, "--help", status=0)


def test_verify(models, tmp_path, tool):
    """Logits of two kinds, tensors of one kind; a changed weight is found and named, with status 1."""
    logits = tool("verify", models.original("gpt2"), models.imported("gpt2"), status=0)
    assert "layer 1" in logits and "logits" in logits and "the same function" in logits
    exported = tmp_path / "exported"
    tool("export", models.imported("gpt2"), exported, status=0)
    assert "the same function" in tool("verify", models.original("gpt2"), exported, status=0)
    from safetensors.torch import load_file, save_file

    tensors = load_file(exported / "model.safetensors")
    tensors["transformer.h.2.mlp.c_fc.weight"][5, 6] += 0.5
    save_file(tensors, exported / "model.safetensors")
    found = tool("verify", models.original("gpt2"), exported, status=1)
    assert "transformer.h.2.mlp.c_fc" in found and "0.5" in found and "not the same" in found
    changed = tool("verify", exported, models.imported("gpt2"), status=1)
    assert "logits" in changed and "not the same" in changed


def test_inspect(models, tool):
    ours = tool("inspect", models.imported("mixtral"), status=0)
    for word in ("mlp.router.weight", "float32", "parameters", "iteration 0", "written by: scale_llm", "import of"):
        assert word in ours.replace("\n", "").replace("│", " ") or word in ours, ours
    theirs = tool("inspect", models.original("mixtral"), status=0)
    assert "MixtralForCausalLM" in theirs


def test_ranks_of_torchrun_share_the_work(models, ranks, tmp_path):
    """Two ranks write one checkpoint, and one model of several shards: the same tensors as one process."""
    shared, exported = str(tmp_path / "shared"), str(tmp_path / "exported")
    for words in (["import", str(models.original("qwen3")), shared],
                  ["export", shared, exported, "--max-shard-size", "60KB"]):  # fmt: skip
        ends = ranks.fresh(2, "support.tool:run", program=TOOL, words=words, joined=True)
        assert [status for status, _ in ends] == [0, 0], ends
    files = [path for path in (tmp_path / "shared" / "iter_0000000").glob("*.distcp") if path.stat().st_size > 1000]
    assert len(files) == 2, "each rank wrote a part"
    one, two = (TorchDistReader(path / "iter_0000000") for path in (models.imported("qwen3"), tmp_path / "shared"))
    assert set(one.tensors) == set(two.tensors)
    assert set(one.metadata.state_dict_metadata) == set(two.metadata.state_dict_metadata)
    a, b = SafetensorsFolder(models.original("qwen3")), SafetensorsFolder(tmp_path / "exported")
    assert set(a.entries) == set(b.entries)
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.entries)


@pytest.mark.parametrize("name", ["llama3", "gpt2", "mixtral"])
def test_fixed_shards_put_together_are_the_checkpoint(models, tmp_path, name):
    """Every rank's file holds its names; gathered over the layout they are the tensors that were cut."""
    layout = Layout(tp=2, pp=2, ep=2 if name == "mixtral" else 1)
    reshard(models.imported(name), tmp_path / "shards", layout, silent)
    reader = TorchDistReader(models.imported(name) / "iter_0000000")
    from scale_llm.checkpoint.torch_dist import checkpoint_config

    model = checkpoint_config(reader.path).model
    seen = set()
    for rank in layout.ranks():
        tp, pp, ep = rank
        file = tmp_path / "shards" / "iter_0000000" / layout.directory(rank) / "model_optim_rng.pt"
        shard = torch.load(file, weights_only=False)
        assert shard["checkpoint_version"] == 3.0 and shard["args"].tensor_model_parallel_size == 2
        for key in reader.tensors:
            places = [()]
            if key.startswith("decoder.layers."):
                places = [(0,), (1,)] if ".experts.experts." not in key else [(0, 0), (0, 1), (1, 0), (1, 1)]
            for place in places:
                found = shard["model"].get(local_name(key, place))
                if found is None:
                    continue
                whole = reader.read(key, tuple(i + o for i, o in zip(place, (2 * pp, 2 * ep), strict=False)))
                assert torch.equal(found, cut(key, whole, model, 2, tp)), (key, place)
                seen.add(key)
    assert seen == set(reader.tensors)
    proj = [torch.load(tmp_path / "shards" / "iter_0000000" / layout.directory((tp, 0, 0)) / "model_optim_rng.pt",
                       weights_only=False)["model"]["decoder.layers.1.self_attention.linear_proj.weight"]
            for tp in range(2)]  # fmt: skip
    whole = reader.read("decoder.layers.self_attention.linear_proj.weight", (1,))
    assert torch.equal(torch.cat(proj, dim=1), whole)


def test_a_run_from_an_import_exports_what_it_learnt(models, ranks, runs, tmp_path, tool):
    """scale-llm model=from_checkpoint trains on; the export loads in transformers and writes the same greedy tokens."""
    run = tmp_path / "run"
    words = ["model=from_checkpoint", f"checkpoint.load={models.imported('llama3')}", "model.seq_length=64",
             "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "train.train_iters=5",
             "optim.lr=1e-2", "optim.lr_warmup_iters=0", "cluster=local_cpu", "cluster.omp_num_threads=1",
             "precision=fp32", "model.compile_ops=false", "data.embedded_megabytes=0.5", "data.split='90,10,0'",
             "train.micro_batch_size=2", "train.global_batch_size=4", "train.eval_interval=null",
             f"run_dir={run}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "scale_llm.launch.cli", *words], capture_output=True, text=True,
                          env=environment(), timeout=180)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = [row["lm loss"] for row in rows if "lm loss" in row]
    assert losses[-1] < losses[0]
    exported = tmp_path / "exported"
    tool("export", run / "checkpoints", exported, status=0)
    assert (exported / "chat_template.jinja").is_file() and (exported / "tokenizer.json").is_file()
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(exported).eval()
    prompt = families.tokens(1, 20)
    theirs = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    ours = [answer for answer in ranks(2, "support.conversion:greedy", directory=str(run / "checkpoints"),
            prompt=prompt[0].tolist(), count=12, layout=SP,
            shape=str(models.original("llama3"))) if answer is not None]  # fmt: skip
    assert ours[0] == theirs.tolist()
