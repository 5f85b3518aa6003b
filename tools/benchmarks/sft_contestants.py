"""Fine-tuning steps on the same conversations: ours packed, padded or dealt out by tokens; transformers padded.

Every builder returns a step: forward and backward over the conversations of STEP_ROWS packed rows in micro-batches,
clipping, AdamW. Steps go round over SETS sets of conversations, so that lengths vary as in training.
"""

import itertools
import json
from pathlib import Path

from benchmarks.common import VOCABULARY, adamw, alone, llama_config, padded, set_optimizer, shape, threads, update

ROW, ROWS, STEP_ROWS, MICRO_BATCH, SETS = 1024, 2, 6, 8, 4
"""Tokens of a packed row, packed rows of a micro-batch and of a step, conversations of a padded micro-batch (the
default of transformers' Trainer), steps before their conversations come again."""


def prepare(data: Path, directory: Path) -> dict:
    """Trains a tokenizer on the file, tokenises it, chooses the conversations: facts, also in directory/facts.json."""
    from scale_llm.config.data import DataConfig
    from scale_llm.config.stage import Batching, SftConfig, TrainOn
    from scale_llm.config.tokenizer import TokenizerConfig
    from scale_llm.data.chat.examples import load_examples, prepare_examples
    from scale_llm.data.sequence_stream import PackedStream, filled
    from scale_llm.data.tokenizer import train_tokenizer

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tokenizer = TokenizerConfig(path=str(directory))
    train_tokenizer(
        texts, vocab_size=VOCABULARY, eod_token=tokenizer.eod_token, path=directory / "tokenizer.json"
    )  # fmt: skip
    config = DataConfig(path=str(data))
    config.fields.prompt, config.fields.response = "question", "answer"
    prepared = prepare_examples(
        config, tokenizer, train_on=TrainOn.assistant, seq_length=ROW, cache_dir=directory / "cache"
    )
    lengths = load_examples(prepared).lengths - 1
    stream = PackedStream(lengths, ROW, seed=1)
    sets = [[stream.sample(STEP_ROWS * i + row) for row in range(STEP_ROWS)] for i in range(SETS)]
    chosen = [number for rows in sets for row in rows for number in row]
    options = {"row_tokens": ROW, "micro_batch_size": MICRO_BATCH, "seed": 0}
    facts = {
        "prepared": prepared.path,
        "sets": sets,
        "conversations": len(chosen),
        "tokens": int(lengths[chosen].sum()),
        "filled": {
            kind: filled(SftConfig(batching=Batching(kind)), lengths, **options) for kind in ("packed", "padded")
        },
    }
    (directory / "facts.json").write_text(json.dumps(facts))
    return facts


def _sets(directory: str) -> list[list[list]]:
    """The examples of every step, as the rows that packing the whole file gives."""
    from scale_llm.data.chat.examples import load_examples

    facts = json.loads((Path(directory) / "facts.json").read_text())
    examples = load_examples(facts["prepared"])
    return [[[examples[number] for number in row] for row in rows] for rows in facts["sets"]]


class _Listed:
    """The examples of a step as the loader takes them, and its stream: sample i is a row, or one of them."""

    def __init__(self, rows: list[list], packed: bool):
        import numpy

        self._examples = [example for row in rows for example in row]
        self.lengths = numpy.array([len(example.tokens) for example in self._examples])
        ends = numpy.cumsum([len(row) for row in rows]).tolist()
        whole = [list(range(end - len(row), end)) for end, row in zip(ends, rows, strict=True)]
        self._samples = whole if packed else [[number] for number in range(len(self._examples))]
        self.count = len(self._samples)

    def __getitem__(self, index: int):
        return self._examples[index]

    def sample(self, index: int) -> list[int]:
        return self._samples[index] if index < self.count else []


def ours(directory: str, precision: str, batching: str, compiled: bool):
    """The engine and the loader as a run has them."""
    alone()
    from scale_llm.config.run import RunConfig
    from scale_llm.config.stage import Batching, SftConfig
    from scale_llm.parallel import device as devices

    device = devices.start("cpu", threads=threads(), compile_ops=compiled, any_size=True)
    from functools import partial

    from scale_llm.engine.engine import Engine
    from scale_llm.losses.language_model import language_model_loss
    from scale_llm.parallel.mesh import MeshSizes, build_mesh
    from scale_llm.stages.sequences import loader_of

    cfg = RunConfig(run_dir="unused", model=shape())
    cfg.model.seq_length = ROW
    cfg.stage = SftConfig(batching=Batching(batching), max_tokens_per_micro_batch=ROWS * ROW)
    set_optimizer(cfg)
    cfg.precision.bf16 = precision == "bf16"
    cfg.train.micro_batch_size = ROWS if batching == "packed" else MICRO_BATCH
    cfg.train.global_batch_size, cfg.train.train_iters = STEP_ROWS, 1000
    mesh = build_mesh(MeshSizes(), device.backend)
    devices.seed_everything(1234, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)
    engine = Engine(cfg, mesh, device, vocab_size=VOCABULARY)
    loss = partial(language_model_loss, tp_group=mesh.groups.tp, vocab_size=VOCABULARY)
    loaders, unit = [], cfg.train.micro_batch_size
    for rows in _sets(directory):
        listed = _Listed(rows, batching == "packed")
        loaders.append((loader_of(cfg, mesh, listed, listed), -(-listed.count // unit) * unit))
    turns = itertools.cycle(loaders)

    def step():
        loader, samples = next(turns)
        engine.train_step(loader.global_batch(0, samples), loss, samples=STEP_ROWS)

    return step


def transformers_padded(directory: str, precision: str):
    """LlamaForCausalLM as the Trainer runs it: padded to the longest of each micro-batch, gradients accumulated, FP32
    weights, BF16 by autocast, sdpa, torch's fused AdamW, clipping."""
    import torch
    from transformers import LlamaForCausalLM

    threads()
    torch.manual_seed(1234)
    model = LlamaForCausalLM(llama_config(ROW))
    weights = list(model.parameters())
    optimizer = adamw(weights)
    steps = [[example for row in rows for example in row] for rows in _sets(directory)]
    sets = [[padded(some[i : i + MICRO_BATCH]) for i in range(0, len(some), MICRO_BATCH)] for some in steps]
    turns = itertools.cycle(sets)

    def step():
        batches = next(turns)
        count = sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in batches)
        for tokens, mask, labels in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=count).loss.backward()
        update(optimizer, weights)

    return step
