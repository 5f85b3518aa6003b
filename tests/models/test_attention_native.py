"""Attention in C++ against the plain formula in FP64, and what holds to the bit: rows of sequences, threads."""

import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.native import compiled_kernels, same_by_any_threads

from scale_llm.models.ops import attention, attention_native, attention_of_sequences, takes_heads
from scale_llm.models.packing import packed_sequences
from scale_llm.models.torch_layers import TorchAttention
from scale_llm.parallel import native
from scale_llm.parallel.fused import use_compiler

LIMIT = 4e-3
"""Relative error of a whole tensor: probabilities and results are rounded to BF16 once each, 2e-3 together."""


@pytest.fixture(autouse=True)
def compiled():
    with compiled_kernels():
        assert takes_heads(torch.bfloat16, torch.device("cpu"), 64)
        yield


def tensors(sq, sk, *, b=2, g=2, r=3, d=64, seed=0):
    """Query, key, value and the gradient of what they give."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = (sq, b, g, r, d), (sk, b, g, d), (sk, b, g, d), (sq, b, g * r * d)
    query, key, value, grad = (torch.randn(*shape, generator=drawn).bfloat16() for shape in shapes)
    return [query, key, value], grad


def with_gradients(op, inputs, grad):
    """[value, gradient of every input]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def plain(offset, scale):
    def attend(query, key, value):
        hidden = torch.arange(key.size(0)) > torch.arange(query.size(0))[:, None] + offset
        scores = torch.einsum("sbgrd,tbgd->bgrst", query, key) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        return torch.einsum("bgrst,tbgd->sbgrd", weights, value).flatten(2)

    return attend


def exact(inputs, grad, offset=0, scale=None):
    scale = inputs[0].size(-1) ** -0.5 if scale is None else scale
    return with_gradients(plain(offset, scale), [x.double() for x in inputs], grad.double())


def check(got, wanted):
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert (a.double() - b).norm() <= LIMIT * b.norm(), f"tensor {i} of {len(got)}"


@pytest.mark.parametrize("d", [2, 24, 64, 80, 128])
def test_head_sizes(d):
    """Of any even size, at lengths that end within a block."""
    inputs, grad = tensors(150, 150, d=d)
    check(with_gradients(attention, inputs, grad), exact(inputs, grad))


@pytest.mark.parametrize(
    ("sq", "sk", "offset"),
    [(512, 512, 0), (129, 129, 0), (1, 300, 299), (33, 400, 367), (200, 500, 100), (300, 100, -200), (20, 10, -30)],
)
def test_lengths(sq, sk, offset):
    """Whole blocks, a query more, last queries, queries in the middle, before the keys, and before all of them."""
    inputs, grad = tensors(sq, sk)
    check(with_gradients(lambda *x: attention(*x, offset=offset), inputs, grad), exact(inputs, grad, offset))


def test_every_query_sees_every_key_where_it_is_not_causal():
    inputs, grad = tensors(70, 150)
    check(with_gradients(lambda *x: attention(*x, causal=False), inputs, grad), exact(inputs, grad, 150))


def test_large_scores():
    """Exponents are taken from a row's maximum, also where a later block raises it by hundreds."""
    (query, key, value), grad = tensors(300, 300)
    key *= torch.linspace(1, 40, 300)[:, None, None, None].bfloat16()
    inputs = [query * 4, key, value]
    got, wanted = with_gradients(attention, inputs, grad), exact(inputs, grad)
    assert all(x.isfinite().all() for x in got)
    check(got[:1], wanted[:1])  # gradients of so sharp a choice are differences of what BF16 has rounded


def test_what_is_broken_stays_so():
    """A query that is no number gives none, to itself alone; a key, to the queries that see it."""
    (query, key, value), _ = tensors(40, 40, b=1, g=1, r=1)
    query[5] = torch.nan
    assert attention(query, key, value).isnan().all(-1).flatten().nonzero().flatten().tolist() == [5]
    query[5], key[7] = 0, torch.nan
    assert attention(query, key, value).isnan().all(-1).flatten().nonzero().flatten().tolist() == list(range(7, 40))


def test_strided_inputs_and_heads_without_groups():
    """As they lie in the product of queries, keys and values: the same to the bit."""
    (query, key, value), grad = tensors(90, 90)
    wanted = with_gradients(attention, [query, key, value], grad)
    mixed = torch.cat([query, key.unsqueeze(3), value.unsqueeze(3)], dim=3)
    views = [mixed[:, :, :, :3], mixed[:, :, :, 3], mixed[:, :, :, 4]]
    assert not views[0].is_contiguous()
    for a, b in zip(with_gradients(attention, views, grad), wanted, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(attention(query.flatten(2, 3), key, value), wanted[0])


def test_threads_change_nothing():
    inputs, grad = tensors(200, 200)
    assert same_by_any_threads(lambda: with_gradients(attention, inputs, grad))


@pytest.mark.parametrize("lengths", [(5, 130, 1, 256), (300,), ()])
def test_a_row_of_sequences_is_each_by_itself(lengths):
    """To the bit, values and gradients; places behind the last give 0, and take none."""
    total, padding = sum(lengths), 17
    inputs, grad = tensors(total + padding, total + padding, b=1)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    scale = 64**-0.5
    got = with_gradients(lambda *x: attention_of_sequences(*x, starts, scale=scale), inputs, grad)
    for x in got:
        assert not x[total:].any()
    for first, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        alone = with_gradients(attention, [x[first:end] for x in inputs], grad[first:end])
        for a, b in zip(got, alone, strict=True):
            assert torch.equal(a[first:end], b)


@pytest.mark.parametrize("text", ["this is no C++", 'extern "C" int works() { return 0; }'])
def test_where_it_cannot_be_used_torch_does_the_work(monkeypatch, caplog, tmp_path: Path, text):
    """Not compiled, or of no use with this torch: it is said once, and results are close."""
    inputs, grad = tensors(60, 60)
    wanted = exact(inputs, grad)
    broken = tmp_path / "broken.cpp"
    broken.write_text(text)
    monkeypatch.setattr(attention_native, "SOURCE", broken)
    with caplog.at_level(logging.WARNING, logger=native.__name__):
        got = [with_gradients(attention, inputs, grad) for _ in range(2)][0]
    assert sum("broken.cpp" in message for message in caplog.messages) == 1
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() <= 1e-2 * b.norm()


def test_which_heads_it_takes():
    cpu = torch.device("cpu")
    assert takes_heads(torch.bfloat16, cpu, 64)
    assert not takes_heads(torch.float32, cpu, 64)
    assert not takes_heads(torch.bfloat16, torch.device("cuda"), 64)
    assert not takes_heads(torch.bfloat16, cpu, 63)
    use_compiler(False)
    assert not takes_heads(torch.bfloat16, cpu, 64)


def test_the_backward_pass_needs_no_more_than_the_forward_pass_had():
    """It runs where nothing is compiled any more, by another number of threads, and after the starts' owner is gone."""
    inputs, grad = tensors(60, 60, b=1)
    starts = torch.tensor([0, 25, 60], dtype=torch.int32)
    wanted = with_gradients(lambda *x: attention_of_sequences(*x, starts, scale=0.125), inputs, grad)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention_of_sequences(*leaves, starts.clone(), scale=0.125)
    use_compiler(False)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = torch.autograd.grad(out, leaves, grad)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, wanted[1:], strict=True):
        assert torch.equal(a, b)


def test_inputs_without_strides():
    """Keys that are one for all batches, and heads whose numbers do not lie side by side."""
    (query, key, value), grad = tensors(50, 50)
    shared = [query, key[:, :1].expand(-1, 2, -1, -1), value.transpose(2, 3).contiguous().transpose(2, 3)]
    got = with_gradients(attention, shared, grad)
    for a, b in zip(got, with_gradients(attention, [x.contiguous() for x in shared], grad), strict=True):
        assert torch.equal(a, b)


def test_a_layer_takes_the_whole_row():
    """Of a packed row of sequences of several lengths each is what it is alone, without a call for each length; where
    there is a window or dropout, sequences are attended to by length as before."""
    lengths, group = (20, 33, 20, 7), SimpleNamespace(size=lambda: 1)
    config = SimpleNamespace(attention_dropout=0.0, window_size=None, kv_channels=64)
    layer = TorchAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group))
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs, _ = tensors(90, 90, b=1)
    positions = torch.cat([torch.arange(n) for n in (*lengths, 10)])[None]
    packed = packed_sequences(ends, positions, group, torch.device("cpu"), fused=False)
    assert layer.takes_rows(inputs[0])
    out = layer(*inputs, None, packed_seq_params=packed)
    for first, end in pairwise(ends.tolist()):
        assert torch.equal(out[first:end], attention(*(x[first:end] for x in inputs)))
    assert not out[80:].any()
    layer.dropout = 0.1
    assert not layer.takes_rows(inputs[0])
    assert layer.eval().takes_rows(inputs[0])
    config.window_size = (15, 0)
    assert not TorchAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group)).takes_rows(inputs[0])
