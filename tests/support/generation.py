"""What ranks do in the tests of generation: load a Hugging Face model and continue prompts."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.model import Backend
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation import Completion, Generator, SamplingParams
from scale_llm.losses.log_probabilities import vocab_parallel_log_probs
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from support import conversion, families
from support.training import join

LONGEST = 64


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 23 tokens of real text."""
    text = families.tokenizer().encode(families.text()).ids
    return [text[50 * i : 50 * i + 1 + 7 * i % 23] for i in range(count)]


def loaded(directory: str, layout: dict[str, Any]) -> Engine:
    cfg = conversion._config(directory, layout, LONGEST, 1)
    device, mesh = join(cfg)
    engine = Engine(cfg, mesh, device, vocab_size=cfg.model.vocab_size, trainable=False)
    load_weights(RunContext(cfg, device, mesh, None), engine, Path(directory))
    return engine


def generate(
    directory: str, layout: dict[str, Any], params: dict[str, Any], *, count: int = 8, batch: int = 8,
    order: list[int] | None = None,
) -> list[Completion]:  # fmt: skip
    """Completions of `prompts(count)`, with seeds of their own."""
    engine = loaded(directory, layout)
    generator = Generator(engine, max_batch_size=batch, max_seq_length=LONGEST, decode=families.tokenizer().decode)
    wanted = SamplingParams(**{"max_new_tokens": 20, **params, "stop": frozenset(params.get("stop", ()))})
    chosen = order or list(range(count))
    every = prompts(count)
    return generator.generate([every[i] for i in chosen], wanted, [1000 + i for i in chosen])


def with_backend(directory: str, backend: str) -> list[Completion]:
    """Greedy, with layers of another backend."""
    return generate(directory, {"model.backend": Backend(backend)}, {"temperature": 0.0}, batch=3)
