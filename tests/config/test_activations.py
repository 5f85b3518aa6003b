"""Memory of a run before it starts: activations by hand, and what is said where a machine has less."""

import pytest
from support.configs import config_of

from scale_llm.config.activations import activation_bytes
from scale_llm.config.machine import Machine
from scale_llm.config.memory import memory_warnings
from scale_llm.config.plan import make_plan
from scale_llm.config.resolve import resolve
from scale_llm.config.validate import problems_of

GIB = 2**30
GPU = Machine(cores=8, gpus=8, fast_bf16_cpu=False, compiler=True, gpu_memory_bytes=80 * GIB)
CPU = Machine(cores=8, gpus=0, fast_bf16_cpu=False, compiler=True, memory_bytes=4 * GIB)

SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4",
         "model.num_query_groups=2", "model.seq_length=32", "model.vocab_size=512", "tokenizer.vocab_size=512",
         "train.micro_batch_size=2", "train.global_batch_size=16", "precision=bf16"]  # fmt: skip


def activations(pp_rank: int, *words: str) -> int:
    cfg = resolve(config_of("train.train_iters=10", *SMALL, *words), CPU)
    plan = make_plan(cfg)
    return activation_bytes(cfg, number_bytes=2, pp_rank=pp_rank, micro_batches=plan.batches.micro_batches)


def test_by_hand():
    """n = 2 * 32 tokens, h = 64, f = 128, a = 4 heads and g = 2 groups of d = 16, BF16.

    A layer keeps, in numbers a token: 4 h of two norms (in and out) = 256; q, k, v and the result, 2 * 64 + 2 * 32 =
    192; [gate, up] and their product, 3 f = 384: 832 numbers of 2 bytes, and 4 logarithms of 4 bytes: 1680 bytes.
    Four layers: 6720. The head: the last norm's in and out, 128, logits and gradient, 1024: 1152 numbers, 2304 bytes.
    Full recomputation keeps 4 inputs, 512 bytes; the head is more than one layer again and its widest gradients,
    1680 + 768. Tensor parallel 2 halves the last two of the three and the logits; sequence parallel also the first.
    """
    n = 64
    assert activations(0) == n * (6720 + 2304)
    assert activations(0, "train.recompute_granularity=selective") == n * (6720 - 64 + 2304)
    assert activations(0, "train.recompute_granularity=full") == n * (512 + 1680 + 768)
    assert activations(0, "parallel=tp2") == n * (4 * (512 + 192 + 384 + 8) + 2 * (128 + 512))
    assert activations(0, "parallel=tp2_sp") == n * (4 * 840 + 1152)


def test_in_a_pipeline():
    """Of 2 stages the first has 2 micro-batches in flight, the last one and the head. With 2 chunks a rank it is
    2 + 1 / 2 (1 + (p - 1) / (p v) = 1.25 times a model without a pipeline)."""
    n = 64
    assert activations(0, "parallel=pp2") == n * (2 * 3360 + 768)
    assert activations(1, "parallel=pp2") == n * (3360 + 2304)
    assert activations(0, "parallel=pp2_vpp2") == n * (6720 * 5 // 4 + 768)


def test_what_no_gpu_holds_is_refused():
    """8B: 2 + 4 + 12 bytes a parameter are 134.6 GiB on one rank, 56 on one of 8 with the distributed optimizer."""
    words = ["model=llama3_8b", "precision=bf16", "train.train_iters=10", "cluster.device=cuda"]
    (problem,) = problems_of(resolve(config_of(*words, "cluster.nproc_per_node=8"), GPU), GPU)
    assert problem.startswith("parallel.tensor_model_parallel_size=1, pipeline_model_parallel_size=1: ")
    assert "134.6 GiB, a GPU here has 80.0 GiB" in problem
    assert "; set parallel.use_distributed_optimizer=true, or " in problem
    fits = resolve(config_of(*words, "cluster.nproc_per_node=8", "parallel=distopt"), GPU)
    assert problems_of(fits, GPU) == []
    (warning,) = memory_warnings(fits, GPU)
    assert "activations about " in warning and "train.recompute_granularity=full" in warning
    fits.model.seq_length = 1024
    assert memory_warnings(fits, GPU) == []


def test_graphs_hold_the_gradients_of_weights_once_more():
    """8B in BF16: 15 GiB more. What would make it less is to have none, as recomputed layers cannot be graphs."""
    words = ["model=llama3_8b", "precision=bf16", "train.train_iters=10", "cluster.device=cuda", "model.backend=torch",
             "cluster.nproc_per_node=8", "parallel=distopt", "parallel.overlap_param_gather=false"]  # fmt: skip
    plain, graphs = (make_plan(resolve(config_of(*words, *more), GPU)).memory
                     for more in ([], ["train.cuda_graph_impl=local"]))  # fmt: skip
    assert graphs.gradients - plain.gradients == plain.weights
    (warning,) = memory_warnings(resolve(config_of(*words, "train.cuda_graph_impl=local"), GPU), GPU)
    assert "train.cuda_graph_impl=none" in warning and "recompute_granularity" not in warning


@pytest.mark.parametrize(("words", "warned"), [([], False), (["model=llama3_8b", "parallel=tp2"], True)])
def test_a_machine_of_cpus_is_compared_with_all_its_ranks(words, warned):
    cfg = resolve(config_of("train.train_iters=10", *words), CPU)
    assert bool(memory_warnings(cfg, CPU)) is warned
