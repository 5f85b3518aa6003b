"""Adapters against peft: the same losses from the same start, converted bit for bit both ways, merged into the base."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from support import families
from support.parity import EP2, PP2, SP, TP2
from support.tool import TOOL

from scale_llm.checkpoint.huggingface import export_adapters, export_huggingface, import_adapters
from scale_llm.checkpoint.huggingface.merging import HuggingFaceReader, MergedReader, merge_checkpoint
from scale_llm.checkpoint.resharding import Layout, reshard
from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.torch_dist import checkpoint_config, find_checkpoint
from scale_llm.checkpoint.verifying import compare_tensors
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config
from scale_llm.config.model import Backend
from scale_llm.config.precision import Fp8Format

peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama_all": ("llama3", {"target_modules": ALL}, TP2),
    "llama_all_sp": ("llama3", {"target_modules": ALL, "r": 3}, SP),
    "llama_attention": ("llama3", {"target_modules": ["q_proj", "v_proj"]}, PP2),
    "qwen2_rslora": ("qwen2", {"target_modules": ALL, "use_rslora": True}, {}),
    "qwen2_dora": ("qwen2", {"target_modules": ALL, "use_dora": True}, TP2),
    "mistral_dora_pp": ("mistral", {"target_modules": ["k_proj", "up_proj"], "use_dora": True}, PP2),
}
RATE, STEPS = 0.3, 8


def silent(_total):
    return lambda _done: None


def tuned(base, name, options):
    """transformers' model under peft, with matrices B that are not zero."""
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **options}, task_type="CAUSAL_LM")
    model = peft.get_peft_model(families.build(name), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
    return model


def trained_by_peft(model, batches):
    """Every step's loss of plain SGD on what peft trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for tokens in batches:
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("case", CASES)
def test_trains_as_peft_does_and_goes_back(models, ranks, tmp_path, case):
    """peft's directory -> ours -> steps on a layout, from those adapters on -> peft's directory and a merged model."""
    name, options, layout = CASES[case]
    base = models.original(name)
    model = tuned(base, name, options)
    model.save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "ours", silent)

    export_adapters(tmp_path / "ours", tmp_path / "back", silent)
    before, after = (SafetensorsFolder(tmp_path / d, single="adapter_model.safetensors") for d in ("peft", "back"))
    assert before.entries.keys() == after.entries.keys()
    assert all(torch.equal(before.read(key), after.read(key)) for key in before.entries)

    batches = torch.stack([families.tokens(2, 33, start=i) for i in range(STEPS)])
    wanted = trained_by_peft(model, batches)
    assert wanted[0] - wanted[-1] > 0.02, "training must show"
    arguments = {"directory": str(tmp_path / "ours"), "data": models.saved("adapted", batches), "lr": RATE}
    found = ranks.fresh(
        2 if layout else 1, "support.conversion:train", layout=layout, output=str(tmp_path / "trained"), **arguments
    )
    for losses in found:
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-4, (losses, wanted)

    text = families.tokens(2, 32, start=20)
    with torch.no_grad():
        logits = model(text).logits
        export_adapters(tmp_path / "trained", tmp_path / "trained_peft", silent)
        written = json.loads((tmp_path / "trained_peft" / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(base), "not the adapters that they went on from"
        again = peft.PeftModel.from_pretrained(families.build(name), tmp_path / "trained_peft").eval()
        assert (again(text).logits - logits).abs().max() < 1e-4
        export_huggingface(tmp_path / "trained", tmp_path / "merged", silent)
        whole = type(families.build(name)).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert (whole(text).logits - logits).abs().max() < 1e-4
        assert (families.build(name)(text).logits - logits).abs().max() > 1e-2, "adapters must matter"


def test_merged_checkpoint_computes_the_same(models, ranks, tmp_path):
    """Unmerged on two ranks, merged to a checkpoint and loaded without adapters: logits within 1e-5; an export of it
    equals the merged export."""
    tuned(models.original("llama3"), "llama3", {"target_modules": ALL}).save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    merge_checkpoint(tmp_path / "ours", tmp_path / "merged", silent)
    assert checkpoint_config(find_checkpoint(tmp_path / "merged")).peft.method.value == "none"
    shutil.copytree(models.imported("llama3") / "huggingface", tmp_path / "merged" / "huggingface")
    data = models.saved("adapted_text", families.tokens(2, 49))
    answers = [
        ranks(size, "support.conversion:output", directory=str(tmp_path / where), data=data, layout=layout)[-1]
        for where, size, layout in (("ours", 2, TP2), ("merged", 2, PP2))
    ]
    assert (answers[0] - answers[1]).abs().max() < 1e-5
    export_huggingface(tmp_path / "merged", tmp_path / "first", silent)
    export_huggingface(tmp_path / "ours", tmp_path / "second", silent)
    first, second = SafetensorsFolder(tmp_path / "first"), SafetensorsFolder(tmp_path / "second")
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.entries | second.entries)


def test_adapters_are_verified_and_cut_as_the_model_they_make(models, ranks, tmp_path):
    """With what a run in FP8 on another layout has written into their configuration."""
    tuned(models.original("llama3"), "llama3", {"target_modules": ALL}).save_pretrained(tmp_path / "peft")
    path = import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    cfg = checkpoint_config(path)
    cfg.model.backend, cfg.precision.bf16, cfg.precision.fp8 = Backend.transformer_engine, True, Fp8Format.hybrid
    cfg.parallel.tensor_model_parallel_size, cfg.parallel.tp_comm_overlap = 2, True
    save_config(cfg, path)
    merge_checkpoint(tmp_path / "ours", tmp_path / "merged", silent)
    assert all(found.largest == 0 for found in compare_tensors(tmp_path / "ours", tmp_path / "merged", silent))
    export_huggingface(tmp_path / "ours", tmp_path / "exported", silent)
    for name in ("ours", "merged"):
        words = ["verify", str(tmp_path / "exported"), str(tmp_path / name)]
        ((status, said),) = ranks.fresh(1, "support.tool:run", program=TOOL, words=words)
        assert status == 0 and "the same function" in said, said
    ((status, said),) = ranks.fresh(
        1, "support.tool:run", program=TOOL, words=["verify", str(models.original("llama3")), str(tmp_path / "ours")]
    )
    assert status == 1 and "not the same function" in said, said
    shards = []
    for name in ("ours", "merged"):
        reshard(tmp_path / name, tmp_path / f"{name}_shards", Layout(), silent)
        (file,) = (tmp_path / f"{name}_shards").glob("iter_0000000/mp_rank_00/*.pt")
        shards.append(torch.load(file, weights_only=False)["model"])
    assert shards[0].keys() == shards[1].keys() and all(shards[0][key].equal(shards[1][key]) for key in shards[0])


def test_adapters_that_go_on_from_adapters_hold_them(models, ranks, tmp_path):
    """The second run's are over the whole model and not over the first's: loaded, and merged, they are the same."""
    tuned(models.original("llama3"), "llama3", {"target_modules": ALL}).save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "first", silent)
    batches = models.saved("adapted", torch.stack([families.tokens(2, 33, start=i) for i in range(STEPS)]))
    words = {"data": batches, "layout": {}, "lr": RATE}
    for before, after in (("first", "second"), ("second", "third")):
        where = {"directory": str(tmp_path / before), "output": str(tmp_path / after)}
        ranks.fresh(1, "support.conversion:train", **words, **where)
    merge_checkpoint(tmp_path / "third", tmp_path / "merged", silent)
    shutil.copytree(models.imported("llama3") / "huggingface", tmp_path / "merged" / "huggingface")
    data = models.saved("adapted_text", families.tokens(2, 49))
    third, merged, first = (
        ranks(1, "support.conversion:output", directory=str(tmp_path / where), data=data, layout={})[0]
        for where in ("third", "merged", "first")
    )
    assert (third - merged).abs().max() < 1e-5
    assert (third - first).abs().max() > 1e-2, "training must show"


def test_the_base_is_one_checkpoint_of_a_run_that_may_go_on(models, tmp_path):
    tuned(models.original("llama3"), "llama3", {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "peft")
    base = models.imported("llama3")
    path = import_adapters(tmp_path / "peft", tmp_path / "ours", silent, base=base)
    assert checkpoint_config(path).checkpoint.load == str(find_checkpoint(base).resolve()) != str(base)


def test_merging_in_bf16_rounds_once(models, tmp_path):
    base = families.save("llama3", tmp_path / "base")
    families.build("llama3").to(torch.bfloat16).save_pretrained(base)
    tuned(base, "llama3", {"target_modules": ALL}).save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    path = find_checkpoint(tmp_path / "ours")
    reader, plain = MergedReader(path, checkpoint_config(path)), HuggingFaceReader(base)
    key = "decoder.layers.mlp.linear_fc2.weight"
    found, before = reader.read(key, (1,)), plain.read(key, (1,))
    parts = SafetensorsFolder(tmp_path / "peft", single="adapter_model.safetensors")
    a, b = (parts.read(f"base_model.model.model.layers.1.mlp.down_proj.lora_{x}.weight") for x in "AB")
    assert found.dtype is torch.bfloat16 and not found.equal(before)
    assert found.equal((before.float() + 2.0 * b @ a).bfloat16())


@pytest.mark.parametrize("layout", [{}, EP2])
def test_experts_have_adapters_of_their_own(models, ranks, tmp_path, layout):
    """Merged equals unmerged for a mixture of experts; peft's names are of experts that are modules."""
    start = models.original("qwen3_moe")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"],
              "base_model_name_or_path": str(start), "bias": "none"}  # fmt: skip
    torch.manual_seed(3)
    tensors = {}
    for layer in range(4):
        for expert in range(4):
            for module, (rows, columns) in {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}.items():
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{module}_proj"
                tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, columns)
                tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 2)
    from safetensors.torch import save_file

    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    merge_checkpoint(tmp_path / "ours", tmp_path / "merged", silent)
    shutil.copytree(models.imported("qwen3_moe") / "huggingface", tmp_path / "merged" / "huggingface")
    data = models.saved("adapted_text", families.tokens(2, 49))
    world_size = 2 if layout else 1
    answers = [
        ranks(world_size, "support.conversion:output", directory=str(tmp_path / where), data=data, layout=layout)[0]
        for where in ("ours", "merged")
    ]
    assert (answers[0] - answers[1]).abs().max() < 1e-4
    assert (answers[0] - _plain_logits("qwen3_moe")).abs().max() > 1e-3, "adapters must matter"


def _plain_logits(name):
    with torch.no_grad():
        return families.build(name)(families.tokens(2, 49)[:, :-1]).logits


def bad(tmp_path, models, **change):
    """A directory of peft with a fault; what importing it says."""
    tuned(models.original("llama3"), "llama3", {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    assert not (tmp_path / "ours").exists(), "nothing is left"
    return error.value.problems


def test_unsupported_kinds_are_refused_together(models, tmp_path):
    problems = bad(tmp_path, models, bias="all", modules_to_save=["lm_head"], rank_pattern={"q_proj": 8})
    assert [key for key in ("bias", "modules_to_save", "rank_pattern") if any(key in p for p in problems)] == [
        "bias", "modules_to_save", "rank_pattern",
    ]  # fmt: skip


def test_another_rank_than_the_tensors_have(models, tmp_path):
    problems = bad(tmp_path, models, r=5)
    assert len(problems) == 8 and "(4, 64)" in problems[0] and "r=5" in problems[0]


def test_no_base(models, tmp_path):
    (problem,) = bad(tmp_path, models, base_model_name_or_path="/nowhere")
    assert "/nowhere" in problem and "--base" in problem


def test_a_missing_layer(models, tmp_path):
    from safetensors.torch import load_file, save_file

    tuned(models.original("llama3"), "llama3", {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    tensors["base_model.model.model.layers.2.self_attn.x_proj.lora_A.weight"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    assert any("layers.2.self_attn.q_proj.lora_A.weight is missing" in p for p in error.value.problems)
    assert any("x_proj" in p for p in error.value.problems)


def test_prompt_tuning_goes_to_peft_and_back(models, ranks, tmp_path):
    """peft puts its vectors before the embeddings, we put virtual tokens into the places: the same logits."""
    base = models.original("llama3")
    torch.manual_seed(2)
    model = peft.get_peft_model(
        families.build("llama3"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", tmp_path / "ours", silent)
    export_adapters(tmp_path / "ours", tmp_path / "back", silent)
    before, after = (SafetensorsFolder(tmp_path / d, single="adapter_model.safetensors") for d in ("peft", "back"))
    assert torch.equal(before.read("prompt_embeddings"), after.read("prompt_embeddings"))
    again = peft.PeftModel.from_pretrained(families.build("llama3"), tmp_path / "back").eval()
    tokens = families.tokens(2, 30)
    with torch.no_grad():
        wanted = again(tokens[:, :-1]).logits[:, 5:]
    virtual = torch.arange(300, 305).expand(2, -1)
    data = models.saved("prompted", torch.cat([virtual, tokens], dim=1))
    found = ranks(2, "support.conversion:output", directory=str(tmp_path / "ours"), data=data, layout=TP2)[0]
    assert (found[:, 5:] - wanted).abs().max() < 1e-4
    with pytest.raises(UserError, match="prompt tuning"):
        merge_checkpoint(tmp_path / "ours", tmp_path / "merged", silent)
