"""What the rank of a GPU does in tests/gpu. No Hydra here but where a precision is asked for by name.

Legend: s sequence, t tokens of a row.
"""

import importlib.util
import linecache
import warnings
from pathlib import Path
from typing import Any

import torch

from scale_llm.config.compose import compose
from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig
from support.batches import GLOBAL_BATCH, SEQ_LENGTH, VOCAB_SIZE, samples
from support.training import config, make_engine, micro_batches

NOT_HERE = "not here: "
"""How an answer begins that says why something cannot be tried."""


def losses(overrides: dict[str, Any], precision: str, steps: int) -> list[float] | str:
    """Of every step. precision: an option of the group; what the card has no kernels for is said."""
    reason = _no_kernels(precision)
    if reason:
        return NOT_HERE + reason
    cfg: RunConfig = config(overrides)
    cfg.precision = compose(["stage=pretrain", f"precision={precision}"]).precision
    engine, loss = make_engine(cfg)
    found = []
    for step in range(steps):
        batches = micro_batches(samples(step), engine.mesh, cfg.train.micro_batch_size)
        result = engine.train_step(batches, loss, samples=GLOBAL_BATCH)
        found.append(result.metrics["lm loss"])
    return found


def _no_kernels(precision: str) -> str:
    """Why Transformer Engine cannot multiply so here; "" where it can."""
    if "fp8" not in precision:
        return ""
    try:
        compose(["stage=pretrain", f"precision={precision}"])
    except UserError as error:
        return str(error)
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    from transformer_engine.pytorch import fp8

    check = {"mxfp8": fp8.check_mxfp8_support, "fp8_blockwise": fp8.check_fp8_block_scaling_support}
    supported, reason = check.get(precision, fp8.check_fp8_support)()
    return "" if supported else reason


def waits(overrides: dict[str, Any]) -> list[str]:
    """Source lines, "file: line", at which a steady step waits for the GPU, as torch's sync debug mode sees them."""
    cfg = config(overrides)
    engine, loss = make_engine(cfg)
    found = []
    for step in range(5):
        batches = micro_batches(samples(step), engine.mesh, cfg.train.micro_batch_size)
        steady = step > 2
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if steady else "default")
            engine.train_step(batches, loss, samples=GLOBAL_BATCH)
            torch.cuda.set_sync_debug_mode("default")
        found += [
            f"{Path(one.filename).name}: {linecache.getline(one.filename, one.lineno).strip()}"
            for one in seen
            if steady and "synchronizing CUDA operation" in str(one.message)
        ]
    return found


def packed(overrides: dict[str, Any]) -> list[float]:
    """Largest difference of each sequence's logits in a row of several, the last places padding, to those of the
    sequence alone, relative to the largest logit."""
    engine, _ = make_engine(config(overrides))
    lengths = [17, 1, 30, 9]
    text = samples(0)["tokens"][0]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in [*lengths, SEQ_LENGTH - int(ends[-1])]])
    row = {"tokens": text[None], "position_ids": positions[None], "boundaries": ends.to(torch.int32)}
    (whole,) = engine.forward([row], lambda logits, _: logits[:, 0, :VOCAB_SIZE].float().cpu())
    found = []
    for first, length in zip(ends.tolist(), lengths, strict=False):
        alone = torch.zeros(1, SEQ_LENGTH, dtype=torch.int64)
        alone[0, :length] = text[first : first + length]
        batch = {"tokens": alone, "position_ids": torch.arange(SEQ_LENGTH)[None]}
        (wanted,) = engine.forward([batch], lambda logits, _: logits[:, 0, :VOCAB_SIZE].float().cpu())
        difference = (whole[first : first + length] - wanted[:length]).abs().max()
        found.append((difference / wanted.abs().max()).item())
    return found


def generators() -> bool:
    """Whether state of this rank's generators brings back what they draw. That of a CPU rank's must do no harm."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from scale_llm.parallel.rng import rng_state, set_rng_state

    make_engine(config({}))

    def drawn() -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(4, device="cuda")
        return torch.cat([inside, torch.rand(4, device="cuda")]).cpu()

    state = rng_state()
    first = drawn()
    set_rng_state(state)
    again = drawn()
    other = {name: torch.get_rng_state() for name in state["tracker"]}
    set_rng_state({**state, "cuda": None, "tracker": other})
    drawn()
    return torch.equal(first, again)
