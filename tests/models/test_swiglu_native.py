"""SwiGLU in C++ against the formula in FP64."""

import pytest
import torch
import torch.nn.functional as F
from support.native import compiled_kernels, same_by_any_threads

from scale_llm.models.ops import swiglu
from scale_llm.models.ops.swiglu import SOURCE
from scale_llm.parallel.native import library


@pytest.fixture(autouse=True)
def compiled():
    with compiled_kernels():
        assert library(SOURCE) is not None
        yield


def with_gradient(op, x, grad):
    x = x.detach().requires_grad_()
    out = op(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def exact(x, grad):
    def op(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return with_gradient(op, x.double(), grad.double())


@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 1, 2), (5, 1, 46), (40, 3, 1408 * 2), (0, 1, 8)])
def test_results_are_rounded_once(shape):
    """To BF16's 8 bits: half a unit in the last place, and as much again of FP32's for what is between."""
    drawn = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=drawn)).bfloat16()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=drawn).bfloat16()
    for got, wanted in zip(with_gradient(swiglu, x, grad), exact(x, grad), strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
        # sums of two terms, as the slope's, may cancel
        assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() * (1 + 1e-4) + 1e-6).all()


def test_rows_that_lie_apart():
    """Of the input and of the gradient: the same bits."""
    drawn = torch.Generator().manual_seed(0)
    wide, grads = (torch.randn(30, 2, n, generator=drawn).bfloat16() for n in (200, 90))
    x, grad = wide[..., 20:180], grads[..., 5:85]
    together = with_gradient(swiglu, x.contiguous(), grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(with_gradient(swiglu, x, grad), together, strict=True))
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert turned.stride(-1) != 1
    assert torch.equal(swiglu(turned), swiglu(x))


def test_gates_far_from_zero():
    """Large ones pass what they gate, or nothing; what is no number stays none, alone."""
    gate = torch.tensor([200.0, -200.0, 3e38, -3e38, torch.nan, torch.inf, 0.0, -80.0])
    x = torch.cat([gate, torch.ones(8)]).bfloat16()[None]
    out, grad = with_gradient(swiglu, x, torch.ones(1, 8, dtype=torch.bfloat16))
    assert out[0, 0] == 200 and abs(out[0, 1]) < 1e-30 and out[0, 2] == x[0, 2] and out[0, 3] == 0
    assert -1e-32 < out[0, 7] < 0
    assert out[0].isnan().tolist() == [place == 4 for place in range(8)] and out[0, 5] == torch.inf
    assert grad[0, 0] == 1 and grad[0, [1, 3]].tolist() == [0, 0] and grad[0, 4].isnan() and grad[0, 6] == 0.5


def test_threads_change_nothing():
    x = torch.randn(77, 1, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same_by_any_threads(lambda: list(with_gradient(swiglu, x, torch.ones(77, 1, 48).bfloat16())))
