"""Weights moved from one layout to another are the same, bit for bit, and compute the same.

Every case trains the source a step, moves, and does both again; the target begins with weights of another seed.
"""

import pytest
import torch
from support.batches import VOCAB_SIZE
from support.parity import CP2, DISTRIBUTED, EP2, GPT2, MOE, OVERLAP, PP2, SP, TP2, UNTIED, VPP2, relative

ALL, LOW, HIGH = [0, 1, 2, 3], [0, 1], [2, 3]
BF16 = {"precision.bf16": True}
TP4 = {"model.num_query_groups": 4, "parallel.tensor_model_parallel_size": 4}
PP4 = {"parallel.pipeline_model_parallel_size": 4}
ETP1 = {**TP2, **SP, "parallel.expert_tensor_parallel_size": 1}
CASES = {
    "tp2_dp2_to_dp4": {"source": (ALL, TP2), "target": (ALL, {})},
    "tp2_to_pp2_on_other_ranks": {"source": (LOW, SP), "target": (HIGH, PP2)},
    "pp2_vpp2_to_tp2_dp2": {"model": UNTIED, "source": (ALL, {**VPP2, **DISTRIBUTED}), "target": (ALL, TP2)},
    "dp4_to_tp2_pp2": {"source": (ALL, OVERLAP), "target": (ALL, {**TP2, **PP2})},
    "pp4_to_one_rank_within": {"model": GPT2, "source": (ALL, PP4), "target": ([2], {})},
    "overlapping_ranks": {"model": GPT2, "source": ([0, 1, 2], DISTRIBUTED), "target": ([1, 3], VPP2)},
    "cp2_to_tp2": {"source": (LOW, CP2), "target": (ALL, TP2)},
    "moe_ep2_to_dp2": {"model": MOE, "source": (LOW, EP2), "target": (HIGH, {})},
    "moe_tp2_ep2_etp1_to_ep2_pp2": {"model": MOE, "source": (ALL, {**ETP1, **EP2}), "target": (ALL, {**EP2, **PP2})},
    "moe_dp2_to_tp2_ep2": {"model": MOE, "source": (HIGH, OVERLAP), "target": (ALL, {**SP, **EP2})},
    "more_padding": {"model": {"model.num_query_groups": 4}, "source": (LOW, TP2), "target": (ALL, TP4)},
    "less_padding": {"model": {"model.num_query_groups": 4}, "source": (ALL, TP4), "target": (HIGH, {})},
    "bf16": {"model": BF16, "source": (LOW, {**TP2, **DISTRIBUTED}), "target": (ALL, PP2)},
    "fp32_to_bf16": {"source": (LOW, TP2), "target": (HIGH, BF16)},
}
TWO = {
    "tp2_to_dp2": {"source": (LOW, TP2), "target": (LOW, {})},
    "rank_0_to_rank_1": {"source": ([0], {}), "target": ([1], {})},
}


def _results(ranks, world_size: int, cases: dict, **options) -> dict:
    cases = {name: {"model": {}, **options, **case} for name, case in cases.items()}
    return ranks(world_size, "support.movement:moved", timeout_seconds=300, cases=cases)[0]


def _assert_moved(found: dict, tolerance: float) -> None:
    for moved in found["rounds"]:
        assert moved["unlike"] == []
        ours, theirs = moved["loss"]
        assert relative(theirs, ours) < tolerance
    first, second = found["rounds"]
    assert first["loss"] != second["loss"], "the source has been trained between"


@pytest.mark.parametrize("case", CASES)
def test_moved_model_is_the_source(ranks, case):
    # BF16 rounds every layer's output to 8 bits, in another order on each layout
    _assert_moved(_results(ranks, 4, CASES)[case], 1e-2 if "bf16" in case else 1e-5)


@pytest.mark.parametrize("case", TWO)
def test_moved_model_is_the_source_on_two_ranks(ranks, case):
    _assert_moved(_results(ranks, 2, TWO)[case], 1e-5)


def test_small_buckets(ranks):
    """Buckets smaller than one tensor: memory is bounded, and the same arrives."""
    whole = _results(ranks, 2, TWO)
    for name, found in _results(ranks, 2, TWO, bucket_bytes=20_000).items():
        _assert_moved(found, 1e-5)
        assert found["buckets"] > 10 > whole[name]["buckets"]
        assert found["most"] <= 20_000 + 16
        assert all(torch.equal(found["model"][key], value) for key, value in whole[name]["model"].items())


def test_nothing_travels_that_is_there_already(ranks):
    """TP2 to DP2 on the same ranks: each needs the other's half of what is cut, and of what is not, nothing."""
    found = _results(ranks, 2, TWO)
    halves, all_of_it = found["tp2_to_dp2"]["rounds"][0], found["rank_0_to_rank_1"]["rounds"][0]
    weights = sum(value.nbytes for value in found["rank_0_to_rank_1"]["model"].values())
    assert all_of_it["sent"] == all_of_it["total"] == weights
    assert halves["total"] == 2 * weights
    norms = sum(value.nbytes for name, value in found["tp2_to_dp2"]["model"].items() if "norm" in name)
    assert halves["sent"] == weights - norms


@pytest.mark.parametrize("layout", ["replicated", "distributed"])
def test_target_may_have_an_optimizer(ranks, layout):
    """Its FP32 main weights follow: a step of each model leaves both within what two steps of Adam, 0.001 each, and
    BF16's rounding can be apart. Of another seed, weights would be several tenths away."""
    target = {**BF16, **(PP2 if layout == "replicated" else OVERLAP)}
    difference = ranks(4, "support.movement:into_a_trained_one", source={**BF16, **TP2}, target=target)[0]
    assert difference < 0.02


def test_checksum_finds_one_bit(ranks):
    for said in ranks(4, "support.movement:flipped"):
        assert said["right"] is None
        assert said["bit"] == (
            "weights that were moved: decoder.layers.mlp.linear_fc2.weight: ranks [2, 3] hold different copies"
        )
        assert said["order"] == (
            "weights that were moved: decoder.layers.self_attention.linear_qkv.weight: the target's bits are not the "
            "source's"
        )


def test_refuses_what_is_not_the_same_model(ranks):
    lora = {"peft.method": "lora"}
    pairs = {
        "layers": ({}, {"model.num_layers": 2}, VOCAB_SIZE),
        "tied": ({}, UNTIED, VOCAB_SIZE),
        "vocabulary": ({}, {}, 200),
        "adapters": (lora, {}, VOCAB_SIZE),
    }
    first, second = ranks(2, "support.movement:refused", pairs=pairs)
    assert first == second, "every rank says the same"
    assert "decoder.layers.mlp.linear_fc2.weight: shape (4, 64, 176) at the source and (2, 64, 176)" in first["layers"]
    assert "output_layer.weight: the source has no such tensor; both must be the same model" in first["tied"]
    assert first["vocabulary"] == "moving weights: vocabularies of [200, 250] tokens; both must be the same model"
    assert first["adapters"].startswith("peft.method=lora: weights with adapters") and "merge" in first["adapters"]
