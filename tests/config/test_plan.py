"""Parameters, operations, batches and bytes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scale_llm.config.compose import compose
from scale_llm.config.machine import Machine
from scale_llm.config.parameters import count_parameters, flops_per_token, parameters_of_stage
from scale_llm.config.plan import make_plan
from scale_llm.config.resolve import resolve

MACHINE = Machine(cores=2, gpus=0, fast_bf16_cpu=False)


def config(*words: str):
    return resolve(compose(["train.train_iters=10", *words]), MACHINE)


@pytest.mark.parametrize(
    ("words", "total", "active"),
    [
        (["model=llama3_8b"], 8_030_261_248, None),
        (["model=mixtral_8x7b"], 46_702_792_704, 12_879_925_248),
        (["model=gpt2_small", "model.vocab_size=50257", "model.make_vocab_size_divisible_by=1"], 124_439_808, None),
    ],
)
def test_totals_are_the_published_ones(words, total, active):
    counts = count_parameters(config(*words).model)
    assert counts.total == total
    assert counts.active == (active or total)


AGAINST_MODEL = """
from scale_llm.config.parameters import count_parameters, parameters_of_stage
from scale_llm.parallel.device import seed_everything, start
from scale_llm.parallel.mesh import MeshSizes, build_mesh
from tests.config.test_plan import SHAPES, config

device = start("cpu", threads=1)
mesh = build_mesh(MeshSizes(), device.backend)
seed_everything(1, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)

from scale_llm.models.gpt import build_gpt
from scale_llm.models.transformer_config import transformer_config

for words in SHAPES:
    cfg = config(*words)
    model = transformer_config(cfg.model, cfg.parallel, cfg.precision, cfg.train, on_cuda=False)
    chunks = build_gpt(cfg.model, model, mesh, vocab_size=cfg.model.vocab_size, seed=1, on_cuda=False)
    real = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    assert real == count_parameters(cfg.model).total, (words, real, count_parameters(cfg.model))
    assert real == parameters_of_stage(cfg.model, cfg.parallel, 0).total, words
"""

SHAPES = [
    ["model=tiny"],
    ["model=tiny_moe"],
    ["model=gpt2_small", "model.num_layers=2"],
    ["model.qk_layernorm=true", "model.add_qkv_bias=true", "model.untie_embeddings_and_output_weights=true"],
    ["model.qk_layernorm=true", "model.normalization=LayerNorm", "model.kv_channels=32"],
]


def test_counts_are_those_of_the_built_model():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", AGAINST_MODEL], env={**os.environ, **one_rank}, cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_hold_the_whole(tied):
    """Sharded parameters over all ranks, with replicas of norms taken out, are the total.

    TP ranks replicate the norms; a tied table is on the first and on the last stage.
    """
    cfg = config("model=demo", "parallel=tp2_pp2", f"model.untie_embeddings_and_output_weights={not tied}")
    stages = [parameters_of_stage(cfg.model, cfg.parallel, stage).total for stage in range(2)]
    counts = count_parameters(cfg.model, tensor_parallel=2)
    assert 2 * sum(stages) == counts.total + counts.norms + (counts.embedding if tied else 0)


def test_experts_are_shared_out():
    cfg = config("model=tiny_moe", "parallel=ep2")
    rank = parameters_of_stage(cfg.model, cfg.parallel, 0)
    counts = count_parameters(cfg.model)
    assert rank.dense + 2 * rank.experts == counts.total


def test_operations_by_hand():
    """One layer, h=8, 2 heads of 4, f=16 gated, vocabulary 16, s=4, every product written out: 2 m n k each."""
    cfg = config(
        "model.num_layers=1", "model.hidden_size=8", "model.num_attention_heads=2", "model.ffn_hidden_size=16",
        "model.vocab_size=16", "model.make_vocab_size_divisible_by=16", "tokenizer.vocab_size=16", "model.seq_length=4",
    )  # fmt: skip
    s, h, f, v = 4, 8, 16, 16
    projections = 2 * s * h * 3 * h + 2 * s * h * h
    scores_and_values = 2 * (2 * s * s * h) / 2  # half of them under the causal mask
    forward = projections + scores_and_values + 2 * s * h * 2 * f + 2 * s * f * h + 2 * s * h * v
    assert flops_per_token(cfg.model) * s == pytest.approx(3 * forward)


def test_batches():
    cfg = config("parallel=tp2", "cluster.nproc_per_node=4", "train.micro_batch_size=2", "train.global_batch_size=16")
    plan = make_plan(cfg)
    assert (plan.layout.world, plan.layout.tp, plan.layout.dp) == (4, 2, 2)
    assert plan.batches is not None
    assert (plan.batches.micro_batches, plan.batches.iterations, plan.batches.total_samples) == (4, 10, 160)
    assert plan.batches.tokens_per_step == 16 * 512


def test_iterations_of_samples_with_rampup():
    """4 and 4, then 6 and 6, then 8 each: 8 samples of ramp-up in 2 steps of 2, 20 + 80 samples."""
    cfg = config("train.train_iters=null", "train.train_samples=100", "train.rampup_batch_size=[4,2,16]")
    plan = make_plan(cfg)
    assert plan.batches is not None
    sizes, consumed = [], 0
    while True:
        size = min(4 + 2 * int(consumed / 8), 8)
        if consumed + size > 100:
            break
        consumed += size
        sizes.append(size)
    assert sizes[:5] == [4, 4, 6, 6, 8]
    assert plan.batches.iterations == len(sizes)
    assert plan.batches.first_micro_batches == 4


def test_memory():
    """FP32 Adam: 4 + 4 + 8 bytes a parameter; BF16: 2 + 4 + 12; the distributed optimizer cuts the last over ranks."""
    fp32 = make_plan(config("precision=fp32"))
    total = fp32.parameters.total
    assert fp32.memory.total == 16 * total and fp32.checkpoint_bytes == 12 * total
    assert make_plan(config("precision=bf16")).memory.total == 18 * total
    cut = make_plan(config("precision=bf16", "parallel=distopt", "cluster.nproc_per_node=2")).memory
    assert cut.optimizer == 6 * total
    assert make_plan(config("optim=sgd", "precision=fp32")).memory.optimizer == 4 * total
