"""Each op against the plain formula: values and gradients in FP32 and FP64, closeness in BF16; on a GPU, too.

The plain formulas run in FP64 under autograd; the ops write their gradients by hand.
"""

import pytest
import torch

from scale_llm.models.ops import (
    attention,
    rms_norm,
    rotary,
    rotary_tables,
    split_rotary,
    swiglu,
)
from scale_llm.models.ops.attention import BLOCK_ROWS
from scale_llm.parallel.fused import use_compiler

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}
TOLERANCE_GPU = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Its FP32 kernels take faster exponentials."""


KINDS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16_compiled": (torch.bfloat16, True),
}
ON_GPU = {
    "gpu_float32": (torch.float32, False),
    "gpu_bfloat16": (torch.bfloat16, False),
    "gpu_bfloat16_compiled": (torch.bfloat16, True),
}
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(params=[*KINDS, *(pytest.param(name, marks=GPU_MARKS) for name in ON_GPU)])
def dtype(request):
    """FP64 and FP32 show the formulas; they are the same compiled. Tensors are made on the device of the kind."""
    kind, compiled = {**KINDS, **ON_GPU}[request.param]
    use_compiler(compiled)
    torch.set_default_device("cuda" if request.param in ON_GPU else None)
    yield kind
    torch.set_default_device(None)
    use_compiler(False)


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def compare(op, plain, inputs, dtype, seed=0):
    """Asserts that op and plain agree on the value and on the gradient of every input."""
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in ours]
    got, wanted = op(*ours), plain(*exact)
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    torch.manual_seed(seed)
    weights = [torch.randn_like(x).to(dtype) for x in wanted]
    torch.autograd.backward(got, weights)
    torch.autograd.backward(wanted, [w.double() for w in weights])
    tolerance = (TOLERANCE_GPU if got[0].is_cuda else TOLERANCE)[dtype]
    pairs = [*zip(got, wanted, strict=True), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for i, (a, b) in enumerate(pairs):
        assert a.dtype == dtype and a.shape == b.shape
        assert relative_error(a, b) < tolerance, f"tensor {i} of {len(pairs)}"


def random(*shape):
    generator = torch.Generator("cpu").manual_seed(len(shape) + sum(shape))
    values = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)
    return values.to(torch.get_default_device())


def test_rms_norm(dtype):
    """Several parts of rows, the last one short."""
    eps = 1e-5

    def plain(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    compare(lambda x, w: rms_norm(x, w, eps), plain, [random(301, 3, 512), 1 + 0.1 * random(512)], dtype)
    compare(lambda x, w: rms_norm(x, w, eps), plain, [random(4, 16).t().reshape(4, 16), random(16)], dtype)


def test_swiglu(dtype):
    def plain(x):
        gate, up = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    compare(swiglu, plain, [3 * random(17, 3, 74)], dtype)


def plain_rotary(x, angles):
    """x [s, ..., d]; the usual x * cos + rotate_half(x) * sin."""
    angles = angles.double().view(angles.size(0), *[1] * (x.dim() - 2), -1)
    rot = angles.size(-1)
    turned, rest = x[..., :rot], x[..., rot:]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin(), rest], dim=-1)


def angles(s, rot):
    half = torch.outer(torch.arange(s).double(), 100.0 ** (-torch.arange(0, rot, 2).double() / rot))
    return torch.cat([half, half], dim=-1).view(s, 1, 1, rot)


@pytest.mark.parametrize("rot", [16, 8])
def test_rotary(dtype, rot):
    table = angles(37, rot)
    tables = rotary_tables(table, dtype)
    compare(lambda x: rotary(x, tables), lambda x: plain_rotary(x, table), [random(37, 2, 3, 16)], dtype)


@pytest.mark.parametrize("turned", [True, False])
def test_split_rotary(dtype, turned):
    s, b, g, r, d = 29, 2, 3, 2, 16
    table = angles(s, d)

    def plain(mixed):
        heads = mixed.view(s, b, g, r + 2, d)
        query, key, value = heads[..., :r, :], heads[..., r, :], heads[..., r + 1, :]
        return (plain_rotary(query, table), plain_rotary(key, table), value) if turned else (query, key, value)

    tables = rotary_tables(table, dtype) if turned else None
    op = lambda mixed: split_rotary(mixed, tables, groups=g, head_size=d)  # noqa: E731
    compare(op, plain, [random(s, b, g * (r + 2) * d)], dtype)


def plain_attention(hidden):
    """hidden [b or 1, 1, sq, sk]; a row with every key hidden gives 0."""

    def attend(query, key, value):
        sq, b, g, r, d = query.shape
        scores = torch.einsum("sbgrd,tbgd->bgrst", query, key) * d**-0.5
        scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
        return torch.einsum("bgrst,tbgd->sbgrd", scores.softmax(-1).nan_to_num(), value).reshape(sq, b, -1)

    return attend


def qkv(sq, sk, b=2, g=2, r=3, d=16):
    return [random(sq, b, g, r, d), random(sk, b, g, d), random(sk, b, g, d) + 1]


@pytest.mark.parametrize(
    ("sq", "sk", "offset"),
    [(BLOCK_ROWS + 44,) * 2 + (None,), (40, 333, None), (BLOCK_ROWS + 9, 512, 100), (1, 77, None), (9, 5, None)],
    ids=["square", "last queries", "middle queries", "one query", "queries before the keys"],
)
def test_causal_attention(dtype, sq, sk, offset):
    first = sk - sq if offset is None else offset
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(first + 1)[None, None]
    compare(lambda *x: attention(*x, offset=offset), plain_attention(hidden), qkv(sq, sk), dtype)


def test_masked_attention(dtype):
    """Documents packed in one row, another mask for each row, and a query that sees nothing."""
    s = BLOCK_ROWS + 20
    hidden = torch.ones(2, 1, s, s, dtype=torch.bool).triu(1)
    hidden[0, :, 100:, :100] = True
    hidden[1, :, 7] = True
    compare(lambda *x: attention(*x, hidden=hidden), plain_attention(hidden), qkv(s, s), dtype)
    compare(lambda *x: attention(*x, hidden=hidden[:1]), plain_attention(hidden[:1]), qkv(s, s), dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_within_a_window(dtype, masked):
    """The last 50 keys up to a query's own, with a mask of documents beside or without."""
    s = BLOCK_ROWS + 20
    outside = torch.ones(s, s, dtype=torch.bool).tril(-50)
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None].repeat(2, 1, 1, 1)
    if masked:
        hidden[1, :, 100:, :100] = True
    given = {"hidden": hidden} if masked else {}
    compare(lambda *x: attention(*x, window=50, **given), plain_attention(hidden | outside), qkv(s, s), dtype)


def test_attention_without_a_mask():
    hidden = torch.zeros(1, 1, 30, 50, dtype=torch.bool)
    compare(lambda *x: attention(*x, causal=False), plain_attention(hidden), qkv(30, 50), torch.float64)


def test_attention_takes_heads_without_groups_and_split_layout():
    """[s, b, n, d] queries equal [s, b, g, r, d] ones, and so does the memory layout of split_rotary."""
    query, key, value = qkv(40, 40)
    wanted = attention(query, key, value)
    assert torch.equal(attention(query.flatten(2, 3), key, value), wanted)
    mixed = torch.cat([query, key.unsqueeze(3), value.unsqueeze(3)], dim=3).flatten(2)
    assert torch.allclose(attention(*split_rotary(mixed, None, groups=2, head_size=16)), wanted, rtol=1e-13)


def test_attention_dropout_drops_and_keeps_the_mean():
    """Over many draws the mean is the result without dropout, and a gradient flows."""
    query, key, value = (x.float().requires_grad_() for x in qkv(8, 8))
    torch.manual_seed(0)
    draws = torch.stack([attention(query, key, value, dropout_p=0.3) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    assert relative_error(draws.mean(0), attention(query, key, value).double()) < 0.05
    draws.sum().backward()
    assert torch.isfinite(query.grad).all()
