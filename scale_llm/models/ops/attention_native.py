"""Causal attention in BF16 on CPUs that multiply BF16 (AVX-512 BF16 or AMX), by attention.cpp: scores and
probabilities of a block stay in cache, in the forward and in the backward pass.

Shapes as in `attention`: queries [b, g, sq, r, d], keys and values [b, g, sk, d], of any strides but d's. A row of
several sequences has b = 1, and `starts`: int32 [n + 1], where each begins, and the end of the last.
"""

import ctypes
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from scale_llm.parallel.native import library

SOURCE = Path(__file__).with_name("attention.cpp")


def takes_heads(dtype: torch.dtype, device: torch.device, d: int) -> bool:
    """Whether heads of this size and type are computed here."""
    return dtype == torch.bfloat16 and device.type == "cpu" and d % 2 == 0 and library(SOURCE) is not None


class _Tensor(ctypes.Structure):
    """`Tensor` of attention.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("group", ctypes.c_int64), ("place", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]  # fmt: skip


class _Shape(ctypes.Structure):
    """`Shape` of attention.cpp."""

    _fields_ = [
        ("sequences", ctypes.c_int64), ("groups", ctypes.c_int64), ("heads", ctypes.c_int64),
        ("queries", ctypes.c_int64), ("keys", ctypes.c_int64), ("d", ctypes.c_int64), ("end", ctypes.c_int64),
        ("threads", ctypes.c_int64), ("scale", ctypes.c_float), ("starts", ctypes.c_void_p),
    ]  # fmt: skip


def _view(x: torch.Tensor) -> _Tensor:
    """[b, g, s, r, d], or [b, g, s, d]."""
    return _Tensor(x.data_ptr(), *x.stride()[:-1], *([0] if x.dim() == 4 else []))


def _views(*tensors: torch.Tensor):
    return [ctypes.byref(_view(x)) for x in tensors]


def _place_first(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor of that shape whose memory is [place, batch, group, ...]."""
    b, g, s = like.shape[:3]
    return like.new_empty(s, b, g, *like.shape[3:]).permute(1, 2, 0, *range(3, like.dim()))


class Attention(torch.autograd.Function):
    """(q, k, v, scale, end, starts) -> [sq, b, g * r * d]. Query i sees keys 0 to end + i; with `starts` the keys of
    its sequence up to its own. Places of the row after the last sequence give 0."""

    @staticmethod
    def forward(ctx, q, k, v, scale, end, starts):
        b, g, sq, r, d = q.shape
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and k.shape == v.shape and k.size(-1) == d
        ctx.library = library(SOURCE)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, log_sum = _place_first(q), q.new_empty(b, g, sq, r, dtype=torch.float32)
        sequences, address = b, None
        if starts is not None:
            assert b == 1 and starts.dtype == torch.int32 and starts.is_contiguous() and int(starts[-1]) <= sq
            sequences, address = starts.numel() - 1, starts.data_ptr()
            out[:, :, int(starts[-1]) :] = 0
        ctx.shape = _Shape(sequences, g, r, sq, k.size(2), d, end, torch.get_num_threads(), scale, address)
        logs = ctypes.c_void_p(log_sum.data_ptr())
        ctx.library.attention_forward(ctypes.byref(ctx.shape), *_views(q, k, v, out), logs)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.starts = starts  # itself, since `shape` has its address
        return out.permute(2, 0, 1, 3, 4).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        q, k, v, out, log_sum = ctx.saved_tensors
        b, g, sq, r, d = q.shape
        grad = grad_output.contiguous().view(sq, b, g, r, d).permute(1, 2, 0, 3, 4)
        grads = [_place_first(x) for x in (q, k, v)]
        logs = ctypes.c_void_p(log_sum.data_ptr())
        ctx.library.attention_backward(
            ctypes.byref(ctx.shape), *_views(q, k, v, out, grad), logs, *_views(*grads)
        )  # fmt: skip
        if ctx.starts is not None:
            for x in grads:
                x[:, :, int(ctx.starts[-1]) :] = 0
        return *grads, None, None, None
