"""A reference GPT in plain PyTorch, written from the papers, to check the engine and the stages against.

Llama style: RMSNorm, rotary positions in halves (Su et al., 2021, with the first and second half of each head
paired, as Megatron pairs them), grouped queries, SwiGLU. GPT-2 style: LayerNorm, learned positions, biases, GELU.
Mixture of experts:
softmax over the chosen k of the router's logits. Loops where the engine has kernels, float32 throughout.

Legend: b samples, s sequence, n heads, g key/value groups, d head size, h hidden, v vocabulary without padding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    layers: int = 4
    heads: int = 4
    groups: int = 2
    vocab_size: int = 250
    style: str = "llama"  # or gpt2
    experts: int | None = None
    experts_per_token: int = 2
    aux_loss_coeff: float = 0.0


def from_engine(whole: Weights, shape: Shape) -> Weights:
    """The engine's checkpoint names -> ours, one tensor per layer and projection, vocabulary without padding rows.

    Stacked layers are [layers, ...]. Query, key and value rows lie group by group: (n/g queries, a key, a
    value) of d rows.
    """
    ours: Weights = {"embedding": whole["embedding.word_embeddings.weight"][: shape.vocab_size]}
    for name in ("weight", "bias"):
        if f"decoder.final_layernorm.{name}" in whole:
            ours[f"final_norm.{name}"] = whole[f"decoder.final_layernorm.{name}"]
    if "embedding.position_embeddings.weight" in whole:
        ours["positions"] = whole["embedding.position_embeddings.weight"]
    for key, stacked in whole.items():
        if key.startswith("decoder.layers."):
            for layer in range(shape.layers):
                ours.update(_layer(key.removeprefix("decoder.layers."), stacked[layer], layer, shape))
    return {name: tensor.clone().requires_grad_() for name, tensor in ours.items()}


def _layer(key: str, tensor: torch.Tensor, layer: int, shape: Shape) -> Weights:
    key = key.replace("self_attention.linear_qkv.layer_norm_", "norm1.").replace("mlp.linear_fc1.layer_norm_", "norm2.")
    key = key.replace("pre_mlp_layernorm.", "norm2.")  # before experts the norm keeps its own name
    module, kind = key.rsplit(".", 1)
    if module == "self_attention.linear_qkv":
        per_group = shape.heads // shape.groups
        parts = tensor.unflatten(0, (shape.groups, per_group + 2, -1))
        q, k, v = parts[:, :per_group], parts[:, per_group], parts[:, per_group + 1]
        return {
            f"{layer}.q.{kind}": q.flatten(0, 2),
            f"{layer}.k.{kind}": k.flatten(0, 1),
            f"{layer}.v.{kind}": v.flatten(0, 1),
        }  # fmt: skip
    names = {
        "norm1": "norm1", "norm2": "norm2", "self_attention.linear_proj": "proj",
        "mlp.linear_fc1": "fc1", "mlp.linear_fc2": "fc2", "mlp.router": "router",
        "mlp.experts.experts.linear_fc1": "fc1", "mlp.experts.experts.linear_fc2": "fc2",
    }  # fmt: skip
    return {f"{layer}.{names[module]}.{kind}": tensor}


def logits(w: Weights, tokens: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """tokens [b, s] -> logits [b, s, v], and each router's load-balancing loss."""
    x, balance = hidden_states(w, tokens, shape)
    return x @ w["embedding"].T, balance


def hidden_states(w: Weights, tokens: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """tokens [b, s] -> [b, s, h] after the last norm, and each router's load-balancing loss."""
    x = F.embedding(tokens, w["embedding"])
    if shape.style == "gpt2":
        x = x + w["positions"][: tokens.size(1)]
    balance = []
    for layer in range(shape.layers):
        x = x + _attention(w, layer, _norm(w, f"{layer}.norm1", x, shape), shape)
        y = _norm(w, f"{layer}.norm2", x, shape)
        if shape.experts:
            y, loss = _mixture(w, layer, y, shape)
            balance.append(loss)
        else:
            y = _mlp(w[f"{layer}.fc1.weight"], w[f"{layer}.fc2.weight"], y, shape,
                     w.get(f"{layer}.fc1.bias"), w.get(f"{layer}.fc2.bias"))  # fmt: skip
        x = x + y
    return _norm(w, "final_norm", x, shape), balance


def _norm(w: Weights, name: str, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    if shape.style == "gpt2":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if shape.style == "gpt2" else y


def _attention(w: Weights, layer: int, x: torch.Tensor, shape: Shape) -> torch.Tensor:
    b, s, _ = x.shape
    head = x.size(2) // shape.heads
    q, k, v = (F.linear(x, w[f"{layer}.{p}.weight"], w.get(f"{layer}.{p}.bias")).view(b, s, -1, head) for p in "qkv")
    if shape.style == "llama":
        q, k = _rotate(q), _rotate(k)
    k, v = (t.repeat_interleave(shape.heads // shape.groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(q.size(-1))
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    out = torch.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, s, -1)
    return F.linear(out, w[f"{layer}.proj.weight"], w.get(f"{layer}.proj.bias"))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """x [b, s, n, d]: the pair (i, i + d/2) at position p turned by the angle p * 10000^(-2i/d)."""
    half = x.size(-1) // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(x.size(1)).float(), frequency)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _mlp(fc1, fc2, x, shape: Shape, bias1=None, bias2=None) -> torch.Tensor:
    y = F.linear(x, fc1, bias1)
    if shape.style == "gpt2":
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    else:
        gate, up = y.chunk(2, dim=-1)
        y = gate * torch.sigmoid(gate) * up
    return F.linear(y, fc2, bias2)


def _mixture(w: Weights, layer: int, x: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token through its k experts; the balance loss of one micro-batch: E * sum_e (share of tokens)
    (mean probability).

    Shares are of the k choices a token makes: they sum to k, and the loss is divided by k (Switch
    Transformer's loss, as
    Megatron extends it to k > 1).
    """
    scores = x @ w[f"{layer}.router.weight"].T
    top, chosen = scores.topk(shape.experts_per_token, dim=-1)
    gates = top.softmax(-1)
    out = torch.zeros_like(x)
    for expert in range(shape.experts):
        gate = (gates * (chosen == expert)).sum(-1, keepdim=True)
        out = out + gate * _mlp(w[f"{layer}.fc1.weight"][expert], w[f"{layer}.fc2.weight"][expert], x, shape)
    share = F.one_hot(chosen, shape.experts).sum(-2).float().flatten(0, 1).mean(0)
    probability = scores.softmax(-1).flatten(0, 1).mean(0)
    return out, shape.experts * (share * probability).sum() / shape.experts_per_token


def train(w: Weights, shape: Shape, batches, learning_rates: list[float]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of AdamW (0.9, 0.95, eps 1e-8, decay 0.01 for matrices) with clipping at norm 1.

    batches: global batches {tokens, labels} [b, s]; the gradient is of the mean over all tokens.
    """
    decayed = [t for t in w.values() if t.dim() > 1]
    others = [t for t in w.values() if t.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for batch, learning_rate in zip(batches, learning_rates, strict=True):
        optimizer.zero_grad()
        loss, balance = _mean_loss(w, batch, shape)
        (loss + shape.aux_loss_coeff * balance).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(w.values()), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def _mean_loss(w: Weights, batch, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy, and the sum over routers of their balance loss, the mean over samples (one a micro-batch)."""
    losses, balances = [], []
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        out, balance = logits(w, tokens[None], shape)
        losses.append(-out[0].log_softmax(-1)[torch.arange(labels.numel()), labels].mean())
        balances.append(sum(balance, torch.zeros(())))
    return torch.stack(losses).mean(), torch.stack(balances).mean()
