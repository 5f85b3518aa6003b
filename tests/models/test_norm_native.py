"""RMSNorm in C++ against the formula in FP64."""

import pytest
import torch
from support.native import compiled_kernels, same_by_any_threads

from scale_llm.models.ops import rms_norm
from scale_llm.models.ops.norm import SOURCE
from scale_llm.parallel.native import library


@pytest.fixture(autouse=True)
def compiled():
    with compiled_kernels():
        assert library(SOURCE) is not None
        yield


def inputs(*shape):
    drawn = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(*shape, generator=drawn).bfloat16() for _ in range(2))
    weight = (1 + 0.2 * torch.randn(shape[-1], generator=drawn)).bfloat16()
    return x, weight, grad


def with_gradients(op, x, weight, grad):
    leaves = [each.detach().requires_grad_() for each in (x, weight)]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("shape", [(3, 2, 512), (1, 1, 2), (150, 46), (1, 130, 1408), (0, 1, 8)])
def test_results_are_rounded_once(shape):
    x, weight, grad = inputs(*shape)
    got = with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5), x, weight, grad)
    wanted = with_gradients(exact, x.double(), weight.double(), grad.double())
    for name, a, b in zip(("y", "x", "weight"), got, wanted, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        slack = 1e-5 * (b.abs().max() if b.numel() else 0)  # differences, and sums of terms of both signs
        assert ((a.double() - b).abs() <= 2**-8 * b.abs() + slack).all(), name


def test_layouts_change_nothing():
    x, weight, grad = inputs(20, 3, 64)
    grad = grad[0, 0].expand(20, 3, 64)
    wanted = with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5), x, weight, grad.contiguous())
    turned = x.transpose(0, 1).contiguous().transpose(0, 1), weight.repeat_interleave(2)[::2], grad
    assert not any(each.is_contiguous() for each in turned)
    found = with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5), *turned)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_is_broken_stays_so():
    x, weight, grad = inputs(4, 40)
    x[2, 7] = torch.nan
    y, grad_x, grad_weight = with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5), x, weight, grad)
    assert y.isnan().all(-1).tolist() == [False, False, True, False] and not y[:2].isnan().any()
    assert grad_x[2].isnan().all() and grad_weight.isnan().all()


def test_threads_change_nothing():
    assert same_by_any_threads(lambda: with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5), *inputs(700, 96)))
