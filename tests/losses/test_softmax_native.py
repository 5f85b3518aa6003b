"""Cross entropy of logits in BF16 in C++ against FP64."""

import pytest
import torch
import torch.nn.functional as F
from support.native import compiled_kernels, same_by_any_threads

from scale_llm.losses.cross_entropy import vocab_parallel_cross_entropy
from scale_llm.losses.vocabulary import SOURCE, kernels_for, log_sum_exp
from scale_llm.parallel.native import library


@pytest.fixture(autouse=True)
def compiled():
    with compiled_kernels():
        assert library(SOURCE) is not None
        yield


def logits_of(n, v, seed=0):
    return (3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))).bfloat16()


@pytest.mark.parametrize(("n", "v", "valid"), [(7, 8192, 8192), (3, 250, 250), (5, 256, 250), (1, 2, 1), (0, 64, 64)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"label_smoothing": 0.1}])
def test_loss_and_gradient(n, v, valid, options):
    """Losses as close as FP32; gradients rounded to BF16 once. Padding of the vocabulary takes no part."""
    labels = torch.arange(n) * 7 % valid
    x, exact = (logits_of(n, v).to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float64))
    weight = torch.linspace(0.5, 2, n)
    losses = vocab_parallel_cross_entropy(x, labels, None, valid, **options)
    (grad,) = torch.autograd.grad(losses, x, weight)
    temperature, smoothing = options.get("temperature", 1.0), options.get("label_smoothing", 0.0)
    wanted = F.cross_entropy(exact[:, :valid] / temperature, labels, reduction="none", label_smoothing=smoothing)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, weight.double())
    assert losses.dtype == torch.float32 and torch.allclose(losses.double(), wanted, rtol=1e-6, atol=2e-6)
    # 1e-6: of differences of probability and smoothing that are nearly 0
    assert ((grad.double() - wanted_grad).abs() <= 2**-8 * wanted_grad.abs() + 1e-6 * smoothing).all()
    assert not grad[:, valid:].any()


def test_columns_of_wider_rows():
    x = logits_of(6, 300)
    part, out = x[:, 40:140], torch.empty(6)
    assert kernels_for(part) is not None and kernels_for(x.t()) is None and kernels_for(x.float()) is None
    log_sum_exp(part, 1.0, out)
    assert torch.allclose(out.double(), part.double().logsumexp(1), rtol=1e-6)
    turned = torch.empty(300)
    log_sum_exp(x.t(), 1.0, turned)  # by torch
    assert torch.allclose(turned.double(), x.t().double().logsumexp(1), rtol=1e-6)


def test_hidden_and_broken_logits():
    """-inf is a token that cannot be; no number gives none, to its row alone."""
    x = torch.zeros(7, 40).bfloat16()
    x[0, 3:] = -torch.inf
    x[1] = -torch.inf
    x[2, 7] = torch.nan
    x[4] = torch.nan
    x[5, :2] = torch.tensor([torch.nan, -torch.inf])
    x[6, 3] = torch.inf
    out = torch.empty(7)
    log_sum_exp(x, 1.0, out)
    assert torch.allclose(out[[0, 3]], torch.tensor([3.0, 40.0]).log())
    assert out[1] == -torch.inf and out[[2, 4, 5]].isnan().all() and out[6] == torch.inf
    large = torch.full((2, 40), 3e38).bfloat16()
    losses = vocab_parallel_cross_entropy(large, torch.tensor([0, 1]), None, 40)
    assert losses.isfinite().all()


def test_threads_change_nothing():
    def compute():
        x = logits_of(11, 500).requires_grad_()
        losses = vocab_parallel_cross_entropy(x, torch.arange(11), None, 500)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), x)]

    assert same_by_any_threads(compute)
