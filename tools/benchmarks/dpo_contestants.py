"""Steps of direct preference optimisation on the same pairs: ours with the reference cached or beside the policy;
transformers' Llama in a plain loop that computes what TRL's DPOTrainer does, likewise.

Every builder returns a step: forward and backward over PAIRS pairs in micro-batches, clipping, AdamW; it returns its
loss and gradient norm. All begin from the same weights. Steps go round over SETS sets of pairs, the first of which
comes twice at the start, so that the second loss says what the first update did.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import VOCABULARY, adamw, alone, llama_config, padded, set_optimizer, threads, update

PAIRS, SETS, MICRO_BATCH, BUDGET, LONGEST = 16, 3, 4, 2048, 512
"""Pairs of a step, steps before pairs come again, pairs of a padded micro-batch, tokens of one of ours at most, tokens
of a sequence at most."""
PROMPT, ANSWER = (4.26, 0.28), (4.48, 0.41)
"""Mean and deviation of the logarithms of lengths in tokens: GSM8K's questions and answers, as `sft` tokenises them."""
BETA, LEARNING_RATE, SEED = 0.1, 1e-5, 1


def prepare(directory: Path) -> dict:
    """Writes the weights, the pairs as our data preparation does, and facts, also to directory/facts.json."""
    import torch
    from transformers import LlamaForCausalLM

    from scale_llm.config.stage import Batching, DpoConfig
    from scale_llm.data.chat.preferences import load_preferences
    from scale_llm.data.units import Units
    from scale_llm.stages.sequences import stream_of

    torch.manual_seed(1234)
    # In BF16, so that every contestant begins from the same numbers whatever it computes in
    LlamaForCausalLM(llama_config(LONGEST)).bfloat16().save_pretrained(directory / "model")
    _write_pairs(directory)
    preferences = load_preferences(directory)
    units = Units(preferences.sequences.lengths, preferences.groups, _train_units(len(preferences)), ends=True)
    stream = stream_of(DpoConfig(batching=Batching.token_budget), units, BUDGET, seed=SEED)
    sets = [[stream.sample(PAIRS * i + pair) for pair in range(PAIRS)] for i in range(SETS)]
    facts = {"sets": sets, "tokens": int(preferences.sequences.lengths.sum())}
    (directory / "facts.json").write_text(json.dumps(facts))
    return facts


def _train_units(count: int):
    from scale_llm.data.chat.examples import split_indices

    return split_indices(count, "1,0,0", "train")


def _write_pairs(directory: Path) -> None:
    """Random tokens of seeded log-normal lengths, a prompt shared by two answers of unequal ones; as if prepared."""
    import numpy

    from scale_llm.data.chat.comparison import Comparison
    from scale_llm.data.chat.preference_report import PreferenceReport
    from scale_llm.data.chat.preference_writing import write_comparisons
    from scale_llm.data.chat.preferences import PreparedPreferences
    from scale_llm.data.chat.template import Encoded

    random = numpy.random.default_rng(SEED)

    def text(kind: tuple[float, float]) -> list[int]:
        length = int(numpy.clip(random.lognormal(*kind), 8, LONGEST // 2))
        return random.integers(VOCABULARY, size=length).tolist()

    def pairs():
        for line in range(1, PAIRS * SETS + 1):
            prompt, answers = text(PROMPT), [text(ANSWER), text(ANSWER)]
            marked = [Encoded(prompt + each, [False] * len(prompt) + [True] * len(each)) for each in answers]
            yield Comparison(prompt=[], answers=[], file="made", line=line), marked

    report = PreferenceReport(files=["made"])
    write_comparisons(directory, pairs(), report)
    prepared = PreparedPreferences(
        path=str(directory / "prepared.json"), tokenizer_path="", vocab_size=VOCABULARY, eod=0, kind="pairs",
        num_comparisons=report.kept, num_sequences=report.answers, num_tokens=report.tokens,
        num_trained=report.trained_tokens, report=report.finished(), chat_template="",
    )  # fmt: skip
    (directory / "prepared.json").write_text(json.dumps(asdict(prepared)))


def _turns():
    """The sets in their order, the first twice."""
    return itertools.chain([0], itertools.cycle(range(SETS)))


def ours(directory: str, precision: str, reference: str, compiled: bool):
    """The stage as a run has it. reference: stage.reference."""
    alone()
    count = threads()
    from scale_llm.data.chat.preferences import PreparedPreferences
    from scale_llm.data.chat.prepared import load_prepared
    from scale_llm.launch.runs import compose_run
    from scale_llm.parallel import device as devices

    cfg = compose_run(
        [
            "stage=dpo", "model=from_checkpoint", f"checkpoint.load={directory}/model", f"precision={precision}",
            f"run_dir={directory}/{reference}", "cluster=local_cpu", "cluster.nproc_per_node=1", "data.split='1,0,0'",
            f"stage.beta={BETA}", f"stage.reference={reference}", "stage.batching=token_budget",
            f"stage.max_tokens_per_micro_batch={BUDGET}", f"model.seq_length={LONGEST}",
            f"model.compile_ops={str(compiled).lower()}", f"train.global_batch_size={PAIRS}", f"train.seed={SEED}",
            "train.train_iters=1000", "train.eval_iters=0", "optim.lr_decay_style=constant",
        ]
    ).cfg  # fmt: skip
    set_optimizer(cfg, LEARNING_RATE)
    device = devices.start("cpu", threads=count, compile_ops=compiled, any_size=True)
    from scale_llm.parallel.mesh import MeshSizes, build_mesh
    from scale_llm.stages.context import RunContext
    from scale_llm.stages.dpo import dpo
    from scale_llm.stages.run_state import load_weights

    mesh = build_mesh(MeshSizes(), device.backend)
    devices.seed_everything(SEED, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)
    run = RunContext(cfg, device, mesh, load_prepared(PreparedPreferences, directory))
    stage = dpo(run)
    load_weights(run, stage.engine, Path(directory) / "model")
    turns = _turns()

    def step() -> dict[str, float]:
        result = stage.step(next(turns) * PAIRS, PAIRS)
        return {"loss": result.metrics["dpo loss"], "grad_norm": float(result.grad_norm)}

    return step


def transformers_pairs(directory: str, precision: str, live: bool):
    """LlamaForCausalLM, FP32 weights under autocast, chosen and rejected answers in one forward pass, padded to the
    longest of a micro-batch. live: a second model gives the reference; else the policy has given it before training.
    """
    import torch
    from transformers import LlamaForCausalLM

    from scale_llm.data.chat.preferences import load_preferences

    threads()
    path = Path(directory)

    def load():
        return LlamaForCausalLM.from_pretrained(path / "model", dtype=torch.float32, attn_implementation="sdpa")

    def log_probs(model, batch):
        """Of each answer, summed over its tokens, [2n]: the chosen ones first."""
        tokens, mask, labels = batch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return answer_log_probs(logits.float(), labels)  # FP32 as accelerate, which TRL runs under, makes outputs

    policy = load()
    sequences = load_preferences(path).sequences
    sets = []
    for pairs in json.loads((path / "facts.json").read_text())["sets"]:
        parts = [pairs[i : i + MICRO_BATCH] for i in range(0, PAIRS, MICRO_BATCH)]
        sets.append([padded([sequences[pair[place]] for place in (0, 1) for pair in part]) for part in parts])
    reference = load().eval() if live else policy.eval()

    @torch.no_grad()
    def judged(batch):
        return log_probs(reference, batch)

    kept = None if live else [[judged(batch) for batch in batches] for batches in sets]
    policy.train()
    weights = list(policy.parameters())
    optimizer, turns = adamw(weights, LEARNING_RATE), _turns()

    def step() -> dict[str, float]:
        turn, total = next(turns), 0.0
        for place, batch in enumerate(sets[turn]):
            ratios = log_probs(policy, batch) - (judged(batch) if kept is None else kept[turn][place])
            chosen, rejected = ratios.chunk(2)
            loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum() / PAIRS
            loss.backward()
            total += loss.item()
        return {"loss": total, "grad_norm": update(optimizer, weights)}

    return step


def answer_log_probs(logits, labels):
    """Summed over the tokens that count, [b], as TRL's selective_log_softmax: row by row, to hold less at a time.

    logits: FP32 [b, s, v]. labels: [b, s], -100 where nothing counts.
    """
    import torch

    logits, labels = logits[:, :-1], labels[:, 1:]
    picked = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    log_sums = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    return ((picked - log_sums) * (labels != -100)).sum(1)
