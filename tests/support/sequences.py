"""Sequences of random tokens and lengths, and what ranks do with them packed, padded or dealt out by tokens.

Legend: s tokens of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scale_llm.config.peft import PeftMethod
from scale_llm.config.stage import Batching, SftConfig
from scale_llm.data.prefixed import PrefixedSequences
from scale_llm.data.sequence_loader import TokenSequences
from scale_llm.data.sequence_stream import SingleStream
from scale_llm.data.units import Units, single_units
from scale_llm.engine import counted
from scale_llm.stages.sequences import loader_of, stream_of
from support.training import VOCAB_SIZE, config, make_engine
from support.whole_model import whole_model

COUNT = 12

SGD = {"optim.optimizer": "sgd", "optim.lr": 1.0, "optim.lr_decay_style": "constant", "optim.sgd_momentum": 0.0,
       "optim.clip_grad": 0.0, "optim.weight_decay": 0.0}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A sequence, every third token or so of which counts."""

    tokens: np.ndarray
    trained: np.ndarray
    weight: float = 1.0


class Pieces:
    """Twelve of 5 to 40 tokens, the same in every process; two weigh more than others."""

    def __init__(self):
        self.pieces = []
        for number in range(COUNT):
            random = np.random.default_rng(number)
            length = int(random.integers(5, 41))
            trained = random.random(length) < 0.4
            trained[-1] = True
            tokens = (random.random(length) ** 3 * VOCAB_SIZE).astype(np.int64)
            self.pieces.append(Piece(tokens, trained, weight=2.5 if number in (3, 7) else 1.0))
        self.lengths = np.array([len(piece.tokens) for piece in self.pieces])

    def __getitem__(self, index: int) -> Piece:
        return self.pieces[index]


def step(
    overrides: dict[str, Any], batching: str, micro_batch_size: int = 1, budget: int = 64, unit: int = counted.UNIT
) -> dict[str, Any]:
    """Loss of one step of SGD with learning rate 1 on all twelve, gradient norm and (on rank 0) gradient: what the
    step has subtracted from each tensor. unit: of the places that logits are made for; `logits` says for how many,
    `last_mlp` how many the MLP before them had. With prompt tuning each sequence is after the virtual tokens."""
    counted.UNIT = unit  # this process ends with the step
    cfg = config({**SGD, **overrides, "train.micro_batch_size": micro_batch_size})
    cfg.stage = SftConfig(batching=Batching(batching), max_tokens_per_micro_batch=budget)
    engine, loss = make_engine(cfg)
    pieces: TokenSequences = Pieces()
    if cfg.peft.method is PeftMethod.prompt_tuning:
        engine.begin_adapters(prompt=[3, 1, 4])
        pieces = PrefixedSequences(pieces, VOCAB_SIZE + np.arange(cfg.peft.num_virtual_tokens))
    if batching == "packed":
        units = Units(pieces.lengths, single_units(COUNT), np.arange(COUNT))
        stream = stream_of(cfg.stage, units, cfg.model.seq_length, seed=1, end=1)
        size = stream.samples_in(1)
        at_once = cfg.train.micro_batch_size * engine.mesh.sizes.dp
        size = -(-size // at_once) * at_once
    else:
        stream, size = SingleStream(COUNT, seed=1, end=1), COUNT
    batches = loader_of(cfg, engine.mesh, pieces, stream).global_batch(0, size)
    before = whole_model(engine)
    logits: list[int] = []
    last_mlp: list[int] = []
    engine.modules[-1].decoder.layers[-1].mlp.register_forward_hook(
        lambda _, given, __: last_mlp.append(given[0].size(0) * given[0].size(1))
    )

    def counting(output, batch):
        logits.append(output.size(0) * output.size(1))
        return loss(output, batch)

    result = engine.train_step(batches, counting, samples=size)
    after = whole_model(engine)
    return {
        "loss": result.metrics["lm loss"],
        "grad_norm": result.grad_norm,
        "gradient": {name: value - after[name] for name, value in before.items()} if before else None,
        "logits": sum(logits),
        "last_mlp": sum(last_mlp),
        "shapes": [tuple(batch["tokens"].shape) for batch in batches],
    }
