"""What only a GPU's packages ask for, with stand-ins for them: optimizers that count steps by group, generators of
another device, extra states that were not saved, one norm without Apex."""

import types

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from scale_llm.checkpoint import checkpointer
from scale_llm.engine import optimizer as optimizers
from scale_llm.engine.update import _divide
from scale_llm.parallel import rng
from scale_llm.parallel.device import _norm_of_all


class FusedAdam(torch.optim.Optimizer):
    """Counts steps as Transformer Engine's and Apex's do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.95)})


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 4))


def test_steps_of_either_kind_of_adam():
    """After a resume the averages are as old as they were, or the first updates would be too large."""
    fused, plain = FusedAdam([parameter()]), torch.optim.AdamW([parameter()])
    for one in (fused, plain):
        optimizers._allocate_state(one)
        optimizers.set_steps(one, 7)
    assert [group["step"] for group in fused.param_groups] == [7]
    assert "step" not in next(iter(fused.state.values()))
    assert next(iter(plain.state.values()))["step"] == 7 and "step" not in plain.param_groups[0]


def test_state_of_a_fused_sgd_is_momentum():
    other = torch.optim.SGD([parameter()], momentum=0.9)
    stand_in = types.SimpleNamespace(param_groups=other.param_groups, state=other.state, defaults=other.defaults)
    optimizers._allocate_state(stand_in)
    assert set(next(iter(other.state.values()))) == {"momentum_buffer"}


@pytest.mark.parametrize("divisor", [8.0, 0.25])
def test_gradients_are_divided_where_the_optimizer_does_not(divisor):
    """Also by less than 1, where tokens weigh less."""
    weight = parameter()
    weight.grad = torch.full_like(weight, 2.0)
    part = types.SimpleNamespace(optimizer=FusedAdam([weight]), get_parameters=lambda: [weight])
    _divide(part, divisor)
    assert (weight.grad == 2.0 / divisor).all()


def test_one_norm():
    tensors = [torch.full((3,), 2.0), torch.full((4,), 1.0)]
    norm, _ = _norm_of_all(1, None, [tensors])
    assert norm.shape == (1,) and norm.item() == 4.0


def test_state_of_another_kind_of_generator_is_left():
    """A GPU's, on a CPU rank: host generators go back, the tracker stays."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("here", 5)
    state = rng.rng_state()
    assert state["cuda"] is None
    wanted = torch.rand(3)
    rng.set_rng_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8), "tracker": {"there": torch.zeros(16)}})
    assert torch.equal(torch.rand(3), wanted)
    assert list(tracker.get_states()) == ["here"]
    tracker.reset()


def test_extra_states_that_were_not_saved_are_not_asked_for(monkeypatch, tmp_path):
    """Transformer Engine's norm has one, torch's has none; tensors are never left out."""

    def extra(name: str) -> ShardedObject:
        return ShardedObject(f"decoder.{name}._extra_state", None, (1,), (0,))

    state = {"model": {"a": extra("linear"), "b": extra("final_layernorm"), "c": 3}}
    saved = {extra("linear").unique_key: None}
    monkeypatch.setattr(checkpointer, "load_sharded_metadata", lambda path: saved)
    found = checkpointer._without_absent_extras(tmp_path, state)
    assert found == {"model": {"a": state["model"]["a"], "c": 3}}
    saved[extra("final_layernorm").unique_key] = None
    assert checkpointer._without_absent_extras(tmp_path, state) is state
