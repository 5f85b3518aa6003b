"""LoRA, DoRA, QLoRA and prompt tuning on the engine: exact at the start, equal on every layout, the base untouched."""

import pytest
from support.parity import CP2, DISTRIBUTED, EP2, GPT2, MOE, PP2, SP, TP2, UNTIED, VPP2, assert_equal_runs, relative

TRAIN = "support.adapters:train"

LORA = {"peft.method": "lora", "peft.rank": 4, "peft.alpha": 8.0, "optim.lr": 1e-2}
DORA = {**LORA, "peft.method": "dora"}
PROMPT = {"peft.method": "prompt_tuning", "peft.num_virtual_tokens": 5, "optim.lr": 1e-2}
QLORA = {**LORA, "peft.quantize_base": "nf4"}

METHODS = {"lora": LORA, "dora": DORA, "prompt": PROMPT, "qlora": QLORA}

LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, SP),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, VPP2),
    "cp2": (2, CP2),
    "dp2_distributed": (2, DISTRIBUTED),
    "recompute_full": (1, {"train.recompute_granularity": "full"}),
    "tp2_sp_pp2": (4, {**SP, **PP2}),
}


CASES = [("lora", layout) for layout in LAYOUTS]
CASES += [("dora", layout) for layout in ("tp2", "tp2_sp", "dp2_distributed")]
CASES += [("prompt", layout) for layout in ("tp2_sp", "pp2_vpp2", "cp2")]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_layout_equals_single_process(ranks, method, layout):
    world_size, overrides = LAYOUTS[layout]
    single = ranks(1, TRAIN, overrides=METHODS[method])[0]
    assert single["loss"][-1] < single["loss"][0] - 0.05, "it must learn, or equal runs would say nothing"
    assert_equal_runs(ranks(world_size, TRAIN, overrides={**METHODS[method], **overrides}), single)


MODELS = {
    "gpt2_tp2_sp": (2, GPT2, SP),
    "untied_tp2": (2, UNTIED, TP2),
    "moe_ep2": (2, MOE, EP2),
    "moe_tp2_sp": (2, MOE, SP),
    "moe_tp2_sp_ep2_etp2": (4, MOE, {**SP, **EP2, "parallel.expert_tensor_parallel_size": 2}),
    "only_q_and_down_tp2": (2, {"peft.target_modules": ["q_proj", "down_proj"]}, TP2),
    "only_v_and_up_tp2_sp": (2, {"peft.target_modules": ["v_proj", "up_proj"]}, SP),
}


@pytest.mark.parametrize(
    ("method", "case"), [*(("lora", case) for case in MODELS), ("dora", "untied_tp2"), ("dora", "moe_tp2_sp_ep2_etp2")]
)
def test_other_models_and_targets(ranks, method, case):
    world_size, model, layout = MODELS[case]
    single = ranks(1, TRAIN, overrides={**METHODS[method], **model})[0]
    assert_equal_runs(ranks(world_size, TRAIN, overrides={**METHODS[method], **model, **layout}), single)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_begins_as_the_base_exactly(ranks, method):
    base = ranks(1, TRAIN, overrides={"optim.lr": 1e-2})[0]
    found = ranks(1, TRAIN, overrides=METHODS[method])[0]
    if method == "lora":
        assert found["loss"][0] == base["loss"][0]
    else:  # a length divided by itself, then multiplied, is rounded
        assert relative(found["loss"][0], base["loss"][0]) < 1e-6
    assert found["loss"][1] != base["loss"][1]


FROZEN = {
    **{method: (1, overrides) for method, overrides in METHODS.items()},
    "lora_bf16_distributed": (2, {**LORA, **DISTRIBUTED, "precision.bf16": True}),
    "qlora_bf16_distributed": (2, {**QLORA, **DISTRIBUTED, "precision.bf16": True}),
}


@pytest.mark.parametrize("case", FROZEN)
def test_the_base_does_not_move(ranks, case):
    world_size, overrides = FROZEN[case]
    found = ranks(world_size, TRAIN, overrides=overrides)
    assert found[0]["moved"], "adapters learn"
    assert all("adapter." in name or "virtual_tokens." in name for name in found[0]["moved"])
    for each in found:
        assert each["quantised_moved"] == 0
        assert bool(each["quantised"]) == case.startswith("qlora")


def test_quantised_base_in_four_bits(ranks):
    """Rounded to 16 levels of each 64 weights: near the base, not equal to it; TP2 rounds other blocks."""
    whole = ranks(1, TRAIN, overrides=LORA)[0]
    found = ranks(1, TRAIN, overrides=QLORA)[0]
    assert 0 < relative(found["loss"][0], whole["loss"][0]) < 0.02
    assert found["loss"][-1] < found["loss"][0] - 0.05
    assert found["weight_bytes"] < 0.3 * whole["weight_bytes"], "target modules at 4 bits and a little"
    two = ranks(2, TRAIN, overrides={**QLORA, **TP2})[0]
    assert relative(two["loss"][-1], found["loss"][-1]) < 0.02
    sequence_parallel = ranks(2, TRAIN, overrides={**QLORA, **SP})[0]
    assert relative(sequence_parallel["loss"][-1], two["loss"][-1]) < 1e-5


def test_dropout_is_of_the_adapter_alone(ranks):
    """In training other masks give another loss from the second step on; the first has B = 0, so no mask shows."""
    found = ranks(1, TRAIN, overrides={**LORA, "peft.dropout": 0.5})[0]
    plain = ranks(1, TRAIN, overrides=LORA)[0]
    assert found["loss"][0] == plain["loss"][0]
    assert found["loss"][5] != plain["loss"][5]
