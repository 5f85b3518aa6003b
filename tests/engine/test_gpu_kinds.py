"""What only a GPU's packages ask for, with stand-ins for them: fused optimizers, generators of another device, one norm
without Apex."""

import types

import pytest
import torch

from scale_llm.engine import optimizer as optimizers
from scale_llm.engine.update import _divide
from scale_llm.parallel import rng
from scale_llm.parallel.device import _norm_of_all


class FusedAdam(torch.optim.Optimizer):
    """Divides no gradients, as Transformer Engine's and Apex's."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.95)})


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 4))


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
