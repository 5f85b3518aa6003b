"""Weights moved from one layout to another are the same, bit for bit, and compute the same."""

import pytest
from support.parity import DISTRIBUTED, OVERLAP, PP2, SP, TP2, UNTIED, VPP2, relative

ALL, LOW, HIGH = [0, 1, 2, 3], [0, 1], [2, 3]
BF16 = {"precision.bf16": True}
CASES = {
    "tp2_dp2_to_dp4": {"model": {}, "source": (ALL, TP2), "target": (ALL, {})},
    "tp2_to_pp2_on_other_ranks": {"model": {}, "source": (LOW, SP), "target": (HIGH, PP2)},
    "pp2_vpp2_to_tp2_dp2": {"model": UNTIED, "source": (ALL, {**VPP2, **DISTRIBUTED}), "target": (ALL, TP2)},
    "dp4_to_tp2_pp2": {"model": {}, "source": (ALL, OVERLAP), "target": (ALL, {**TP2, **PP2})},
}


@pytest.fixture(scope="module")
def moved(ranks):
    return ranks(4, "support.movement:moved", cases=CASES)[0]


@pytest.mark.parametrize("case", CASES)
def test_moved_model_is_the_source(moved, case):
    for found in moved[case]["rounds"]:
        assert found["unlike"] == []
        ours, theirs = found["loss"]
        assert relative(theirs, ours) < 1e-5
