"""Samples of one model, the same weights: ours with continuous batching, and transformers' generate.

The model has the demo's shape and random weights, so that its next token is nearly any of the vocabulary: with STOPS of
them as stop tokens, lengths of samples are geometric. Every builder returns a step that continues all prompts and
answers with the number of new tokens, stop tokens included and padding not. directory: None for random weights of
`size`, of `common.SIZES`, on `device`.
"""

import random
from contextlib import nullcontext
from pathlib import Path

from benchmarks.common import SIZES, alone, llama_config, precision_named, quick_weights, shape, threads

LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY = 6, 320, 8, 4, 896, 8192
BATCH, SHORTEST, LONGEST = 32, 16, 128
"""Samples at once; tokens of the shortest and longest prompt."""
STOPS = range(128)
"""One token in 64 ends a sample."""

WORKLOADS = {"stop": {"prompts": 128, "new_tokens": 160, "stops": True},
             "length": {"prompts": BATCH, "new_tokens": 64, "stops": False}}  # fmt: skip
"""stop: samples end where they like; length: one batch whose samples all have the same number of new tokens."""
GPU_WORKLOADS = {"64": {"prompts": 64, "new_tokens": 128, "stops": False, "batch": 64},
                 "tiny": {"prompts": 4, "new_tokens": 8, "stops": False, "batch": 4}}  # fmt: skip
"""For `benchmark.py gpu`, one batch each."""
_WORKLOADS = {**WORKLOADS, **GPU_WORKLOADS}


def prepare(directory: Path) -> None:
    """Writes the model as save_pretrained does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1234)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=FFN, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def prompts(count: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random tokens of mixed lengths."""
    chosen = random.Random(7)
    lengths = [chosen.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [[chosen.randrange(len(STOPS), vocabulary) for _ in range(length)] for length in lengths]


def ours(
    directory: str | None, precision: str, workload: str, compiled: bool, size: str = "small", device: str = "cpu"
):  # fmt: skip
    """The engine's generator."""
    alone()
    from scale_llm.config.run import RunConfig
    from scale_llm.parallel import device as devices

    started = devices.start(device, threads=threads(), compile_ops=compiled, any_size=True)
    from scale_llm.checkpoint.huggingface.loading import load_huggingface
    from scale_llm.checkpoint.huggingface.source import read_json
    from scale_llm.engine import state
    from scale_llm.engine.engine import Engine
    from scale_llm.engine.generation.generator import Generator
    from scale_llm.engine.generation.samples import SamplingParams
    from scale_llm.models.huggingface import read_model
    from scale_llm.parallel.mesh import MeshSizes, build_mesh

    work = _WORKLOADS[workload]
    if directory is None:
        model = shape(size)
    else:
        model = read_model(read_json(Path(directory) / "config.json"), directory)
    cfg = RunConfig(run_dir="unused", model=model, precision=precision_named(precision))
    vocabulary = VOCABULARY if directory is not None else model.vocab_size
    devices.seed_everything(1234, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)
    with quick_weights() if directory is None else nullcontext():
        mesh = build_mesh(MeshSizes(), started.backend)
        engine = Engine(cfg, mesh, started, vocab_size=vocabulary, trainable=False)
    if directory is not None:
        load_huggingface(Path(directory), state.sharded_model_state(engine, state.Weights.all), cfg.model)
    batch = work.get("batch", BATCH)
    generator = Generator(engine, max_batch_size=batch, max_seq_length=LONGEST + work["new_tokens"])
    params = SamplingParams(
        max_new_tokens=work["new_tokens"], stop=frozenset(STOPS if work["stops"] else ())
    )  # fmt: skip
    texts = prompts(work["prompts"], vocabulary)

    def step() -> int:
        found = generator.generate(texts, params, list(range(len(texts))))
        return sum(len(completion.tokens) for completion in found)

    return step


def transformers_generate(
    directory: str | None, precision: str, workload: str, size: str = "small", device: str = "cpu"
):  # fmt: skip
    """LlamaForCausalLM.generate, sdpa, on batches of prompts padded on the left."""
    import torch
    from transformers import LlamaForCausalLM

    threads()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    work = _WORKLOADS[workload]
    if directory is not None:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    else:
        config = llama_config(LONGEST + work["new_tokens"], size)
        config.use_cache, config.bos_token_id, config.eos_token_id = True, None, None
        with torch.device(device):
            model = LlamaForCausalLM(config).to(dtype).eval()
    stops = list(STOPS) if work["stops"] else None
    ends = torch.tensor(list(STOPS) if work["stops"] else [-1], device=device)
    texts = prompts(work["prompts"], VOCABULARY if directory is not None else SIZES[size].vocabulary)
    batch = work.get("batch", BATCH)

    def step() -> int:
        torch.manual_seed(0)
        count = 0
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            longest = max(map(len, part))
            tokens = torch.tensor([[0] * (longest - len(text)) + text for text in part], device=device)
            mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in part], device=device)
            out = model.generate(
                tokens, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=work["new_tokens"],
                eos_token_id=stops, pad_token_id=0,
            )[:, longest:]  # fmt: skip
            ended = torch.isin(out, ends).cumsum(1)
            count += int((ended - torch.isin(out, ends).int() == 0).sum())
        return count

    return step
