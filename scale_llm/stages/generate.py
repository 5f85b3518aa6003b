"""Answers of a model to the prompts in a file: run_dir/generations.jsonl has a row for each answer.

A row is that of data.path with `generated` (text), `generated_tokens`, `finished` (false where the length ended it),
`log_prob` (of the answer at the sampling temperature, in nats) and, of several answers to a prompt, `sample` from 0.
An answer depends on the prompt, the seed and its number alone: not on the batch or the layout.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.io import write_text
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.stage import GenerateConfig
from scale_llm.data.chat.prompts import Prompt, load_prompts
from scale_llm.data.of_stage import places_taken
from scale_llm.data.progress import count_progress
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import Completion, SamplingParams
from scale_llm.stages.context import RunContext
from scale_llm.stages.run_state import load_weights
from scale_llm.stages.sequences import most

FILE = "generations.jsonl"
AT_ONCE = 8
"""Batches of answers between two steps of the progress bar."""


def generate(run: RunContext) -> None:
    """Prints a summary and writes run_dir/generations.jsonl."""
    cfg, stage = run.cfg, run.cfg.stage
    assert isinstance(stage, GenerateConfig)
    found = latest_checkpoint(cfg.checkpoint.load or "")
    assert found is not None, "validated"
    prompts = load_prompts(run.prepared)
    engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
    load_weights(run, engine, found[1])
    began = time.perf_counter()
    virtual = list(range(run.vocab_size, run.vocab_size + places_taken(cfg)))  # prompt tuning's
    mine = answers(run, engine, [virtual + prompt.tokens for prompt in prompts])
    seconds = time.perf_counter() - began
    every: list[dict[int, Completion]] = [{}] * run.mesh.sizes.world
    dist.all_gather_object(every, mine, group=run.mesh.host_group)
    if dist.get_rank() == dist.get_world_size() - 1:
        tokenizer = Tokenizer.load(run.prepared.tokenizer_path, cfg.tokenizer.eod_token)
        together = {number: completion for part in every for number, completion in part.items()}
        rows = [row_of(number, together[number], prompts, stage, tokenizer) for number in sorted(together)]
        path = Path(cfg.run_dir) / FILE
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        tokens, ended = sum(row["generated_tokens"] for row in rows), sum(row["finished"] for row in rows)
        print(
            f" generated | answers: {len(rows)} | finished: {ended} | mean tokens: {tokens / len(rows):.1f} | "
            f"tokens per second: {tokens / seconds:,.0f} | file: {path} |",
            flush=True,
        )


def answers(run: RunContext, engine: Engine, prompts: list[list[int]]) -> dict[int, Completion]:
    """Those that this replica makes, by their numbers: answer k to prompt i is i * num_generations_per_prompt + k."""
    cfg, stage, sizes = run.cfg, run.cfg.stage, run.mesh.sizes
    assert isinstance(stage, GenerateConfig)
    each, tokenizer = stage.num_generations_per_prompt, None
    if stage.stop_strings:
        tokenizer = Tokenizer.load(run.prepared.tokenizer_path, cfg.tokenizer.eod_token)
    params = params_of(stage, run.prepared.stop)
    generator = Generator(
        engine, max_batch_size=stage.batch_size, max_seq_length=max(map(len, prompts)) + stage.max_new_tokens,
        decode=tokenizer.decode if tokenizer is not None else None,
    )  # fmt: skip
    mine = list(range(run.mesh.dp_rank, len(prompts) * each, sizes.dp))
    size = AT_ONCE * stage.batch_size
    found: dict[int, Completion] = {}
    turns = most(-(-len(mine) // size), run.mesh)
    with count_progress("generate", len(mine), cfg.logging.progress and dist.get_rank() == 0) as on_answers:
        for turn in range(turns):
            numbers = mine[turn * size : (turn + 1) * size]
            made = generator.generate(
                [prompts[number // each] for number in numbers], params,
                [seed_of(cfg.train.seed, number // each, number % each) for number in numbers],
            )  # fmt: skip
            found |= dict(zip(numbers, made, strict=True))
            on_answers(len(numbers))
    return found


def text_of(completion: Completion, tokenizer: Tokenizer) -> str:
    """An answer; a special token that ended it is no part of the text."""
    tokens = completion.tokens
    ends = completion.finished and tokens[-1] in tokenizer.special_ids
    return tokenizer.decode(tokens[:-1] if ends else tokens)


def params_of(
    stage: GenerateConfig | PolicyStageConfig, stop: Iterable[int], max_new_tokens: int | None = None
) -> SamplingParams:
    """What the stage asks for. stop: tokens that end an answer; max_new_tokens: where it must be shorter."""
    return SamplingParams(
        temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p,
        max_new_tokens=stage.max_new_tokens if max_new_tokens is None else max_new_tokens,
        stop=frozenset(stop), stop_strings=tuple(stage.stop_strings),
    )  # fmt: skip


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """Of one answer, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed},{prompt},{sample}".encode()).digest()[:8], "big") >> 1


def row_of(
    number: int, completion: Completion, prompts: list[Prompt], stage: GenerateConfig, tokenizer: Tokenizer
) -> dict:
    """What the file has of an answer."""
    prompt, sample = divmod(number, stage.num_generations_per_prompt)
    found = {
        **prompts[prompt].row,
        "generated": text_of(completion, tokenizer),
        "generated_tokens": len(completion.tokens),
        "finished": completion.finished,
        "log_prob": sum(completion.log_probs),
    }
    return {**found, "sample": sample} if stage.num_generations_per_prompt > 1 else found
