"""What ranks do in the tests of generation: load a Hugging Face model and continue prompts."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.config.model import Backend
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.noise import token_keys
from scale_llm.engine.generation.samples import Completion, SamplingParams
from scale_llm.engine.generation.sampling import Sampler
from scale_llm.losses.log_probabilities import vocab_parallel_log_probs
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from support import conversion, families
from support.batches import GLOBAL_BATCH, SEQ_LENGTH, samples
from support.device import begin
from support.training import config, join, make_engine, micro_batches

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


def log_probs(directory: str, layout: dict[str, Any], params: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
    """Of each completion's tokens: what generation says, and a forward pass of training over the whole text (empty
    where this rank is not on the last stage)."""
    engine = loaded(directory, layout)
    wanted = SamplingParams(**{"max_new_tokens": 20, **params})
    every = prompts(8)
    found = Generator(engine, max_batch_size=3, max_seq_length=LONGEST).generate(every, wanted, list(range(8)))
    group, temperature = engine.mesh.groups.tp, params["temperature"] or 1.0
    pairs = []
    for prompt, completion in zip(every, found, strict=True):
        text = prompt + completion.tokens
        row = torch.tensor([text + [0] * (LONGEST - len(text))])
        batch = {"tokens": row, "position_ids": torch.arange(LONGEST)[None]}
        labels = row.roll(-1, 1).T  # [s, b], as the logits are
        (theirs,) = engine.forward(
            [batch],
            lambda logits, _, labels=labels: vocab_parallel_log_probs(
                logits, labels, group, engine.vocab_size, temperature
            ),
        ) or [torch.zeros(LONGEST, 0)]
        places = slice(len(prompt) - 1, len(text) - 1)
        pairs.append((completion.log_probs, theirs[places].flatten().tolist()))
    return pairs


def adapted(layout: dict[str, Any], peft: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Greedy text of a model with adapters that have learnt something, and the same by whole forward passes."""
    overrides = {**layout, **peft, "model.init_method_std": 0.3}
    engine, loss = make_engine(config(overrides))
    engine.begin_adapters(prompt=[3, 1, 4])
    for step in range(4):
        engine.train_step(micro_batches(samples(step), engine.mesh, 1), loss, samples=GLOBAL_BATCH)
    texts = [[7, 8, 9], [1], [100, 90, 80, 70, 60, 50, 40]]
    params = SamplingParams(temperature=0.0, max_new_tokens=12)
    found = Generator(engine, max_batch_size=2, max_seq_length=32).generate(texts, params, [0, 0, 0])
    return [(completion.tokens, slow(engine, text, 12)) for text, completion in zip(texts, found, strict=True)]


def slow(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens after a prompt, one whole forward pass a token; one stage."""
    text = list(prompt)
    for _ in range(count):
        row = torch.tensor([text + [0] * (SEQ_LENGTH - len(text))])
        batch = {"tokens": row, "position_ids": torch.arange(SEQ_LENGTH)[None]}
        last = len(text) - 1
        (logits,) = engine.forward([batch], lambda logits, _, last=last: logits[last, 0])
        parts = [torch.empty_like(logits) for _ in range(engine.mesh.sizes.tp)]
        dist.all_gather(parts, logits, group=engine.mesh.groups.tp)
        text.append(int(torch.cat(parts)[: engine.vocab_size].argmax()))
    return text[len(prompt) :]


def uneven(directory: str, layout: dict[str, Any], counts: list[int]) -> list[Completion]:
    """Data-parallel rank i continues the first counts[i] prompts; then a forward pass of all ranks still works."""
    engine = loaded(directory, layout)
    generator = Generator(engine, max_batch_size=2, max_seq_length=LONGEST)
    count = counts[engine.mesh.dp_rank]
    found = generator.generate(
        prompts(8)[:count], SamplingParams(max_new_tokens=20, temperature=0.9), [1000 + i for i in range(count)]
    )
    dist.barrier(engine.mesh.world_group)
    return found


def training_between(overrides: dict[str, Any]) -> dict[str, Any]:
    """Losses of three steps with generation before each, and text before and after: weights are followed."""
    engine, loss = make_engine(config(overrides))
    generator = Generator(engine, max_batch_size=2, max_seq_length=SEQ_LENGTH)
    params, losses, texts = SamplingParams(temperature=0.0, max_new_tokens=8), [], []
    for step in range(3):
        share = range(engine.mesh.dp_rank + 1) if step else range(3)
        found = generator.generate([[5, 6, 7 + i] for i in share], params, [0 for _ in share])
        texts.append((found[0].tokens, slow(engine, [5, 6, 7], 8)))
        generator.release()
        batches = micro_batches(samples(step), engine.mesh, 1)
        losses.append(engine.train_step(batches, loss, samples=GLOBAL_BATCH).metrics["lm loss"])
    return {"losses": losses, "texts": texts}


def problems(directory: str) -> list[str]:
    """What is said of prompts and parameters that cannot be."""
    engine = loaded(directory, {})
    generator = Generator(engine, max_batch_size=2, max_seq_length=16)
    said = []
    for texts, params, seeds in [
        ([[1] * 13, []], {"max_new_tokens": 4}, [0]),
        ([[1]], {"max_new_tokens": 0, "temperature": -1.0, "top_k": -1, "top_p": 0.0, "stop_strings": ("",)}, [0]),
        ([[1]], {"max_new_tokens": 4, "stop_strings": ("x",)}, [0]),
    ]:
        try:
            generator.generate(texts, SamplingParams(**params), seeds)
        except UserError as error:
            said += error.problems
    try:
        Generator(engine, max_batch_size=2, max_seq_length=129)
    except UserError as error:
        said += error.problems
    return said


def drawn(logits: list[float], count: int, params: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Draws from `count` rows of the same logits, each rank with its part of them."""
    begin()
    group = dist.group.WORLD
    mine = torch.tensor(logits).chunk(group.size())[group.rank()].expand(count, -1)
    sampler = Sampler(SamplingParams(max_new_tokens=1, **params), group, 21)
    tokens, log_probs = sampler(mine, token_keys(list(range(count)), [1] * count))
    return tokens.tolist(), log_probs.tolist()


def seen(directory: str, layout: dict[str, Any]) -> dict[str, Any]:
    """What on_token sees of greedy completions, and what comes where it ends sample 1 after three tokens."""
    engine = loaded(directory, layout)
    generator, params = (
        Generator(engine, max_batch_size=2, max_seq_length=LONGEST),
        SamplingParams(temperature=0.0, max_new_tokens=8),
    )
    told: dict[int, list[int]] = {number: [] for number in range(3)}
    whole = generator.generate(prompts(3), params, [0, 0, 0], lambda number, token: told[number].append(token))
    counts = dict.fromkeys(range(3), 0)

    def halt(number: int, _: int) -> bool:
        counts[number] += 1
        return number == 1 and counts[number] == 3

    return {"told": told, "whole": whole, "halted": generator.generate(prompts(3), params, [0, 0, 0], halt)}
