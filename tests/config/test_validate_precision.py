"""FP8 and Transformer Engine: where they cannot be, the configuration says so, with the key, its value and a remedy."""

import subprocess

import pytest
from support.configs import config_of

from scale_llm.config import machine
from scale_llm.config.machine import Machine
from scale_llm.config.model import Backend
from scale_llm.config.precision import Fp8Recipe
from scale_llm.config.resolve import resolve
from scale_llm.config.validate import problems_of
from scale_llm.config.validate_precision import card_problem

AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")


def problems(*words: str, capability=BLACKWELL, gpus: int = 1, transformer_engine: bool | None = True) -> list[str]:
    """Problems of a run that would be valid in BF16."""
    here = Machine(cores=2, gpus=gpus, fast_bf16_cpu=False, capability=capability if gpus else None,
                   transformer_engine=transformer_engine)  # fmt: skip
    return problems_of(resolve(config_of("train.train_iters=10", *words), here), here)


def test_masks_of_documents_take_torchs_layers():
    here = Machine(cores=2, gpus=1, fast_bf16_cpu=False)
    assert resolve(config_of("data.reset_attention_mask=true"), here).model.backend is Backend.torch
    assert resolve(config_of(), here).model.backend is Backend.auto


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_valid_on_a_card_that_has_it_and_takes_transformer_engine(recipe):
    assert problems(f"precision={recipe}") == []
    here = Machine(cores=2, gpus=1, fast_bf16_cpu=False)
    assert resolve(config_of(f"precision={recipe}"), here).model.backend is Backend.transformer_engine
    assert problems(f"precision={recipe}", capability=None, transformer_engine=None) == [], "of a node of a job"


CASES = {
    "precision.fp8=hybrid: needs an NVIDIA GPU": ["precision=fp8_delayed", "cluster.device=cpu"],
    "precision.fp8=hybrid: the layers of model.backend=torch": ["precision=fp8_tensorwise", "model.backend=torch"],
    "precision.fp8=e4m3: the layers of model.backend=local": ["precision=fp8_blockwise", "model.backend=local"],
    "data.reset_attention_mask=true": ["model.backend=transformer_engine", "data.reset_attention_mask=true"],
    "precision.fp8=hybrid: is for products of BF16": ["precision=fp16", "precision.fp8=hybrid"],
    "precision.fp8=hybrid: peft.method=lora": ["precision=fp8_tensorwise", "peft=lora", "stage=sft", "data.path=x",
                                               "checkpoint.load=y"],
    "precision.fp8=hybrid, model.num_experts=4": ["precision=fp8_tensorwise", "model=tiny_moe"],
    "precision.first_last_layers_bf16=true": ["precision=fp8_delayed", "precision.first_last_layers_bf16=true"],
    "precision.num_layers_at_end_in_bf16=3": ["precision=fp8_tensorwise", "precision.first_last_layers_bf16=true",
                                              "precision.num_layers_at_end_in_bf16=3", "parallel=pp2",
                                              "cluster.nproc_per_node=2"],
    "precision.fp8_recipe=delayed: is for one model, stage=ppo": ["precision=fp8_delayed", "stage=ppo"],
    "precision.fp8_recipe=delayed: is for one model, stage=dpo": ["precision=fp8_delayed", "stage=dpo"],
    "precision.fp8_recipe=delayed: scales are learnt": ["precision=fp8_delayed", "stage=evaluate"],
    "precision.fp8=hybrid: is for training and evaluation": ["precision=fp8_tensorwise", "stage=generate"],
    "precision.fp8_recipe=tensorwise: is for FP8": ["precision.fp8_recipe=tensorwise"],
    "precision.fp8_margin=1": ["precision=fp8_tensorwise", "precision.fp8_margin=1"],
    "precision.num_layers_at_start_in_bf16=2": ["precision=mxfp8", "precision.num_layers_at_start_in_bf16=2"],
    "model.hidden_size=200": ["precision=fp8_tensorwise", "model.hidden_size=200", "model.kv_channels=64"],
    "model.ffn_hidden_size=656": ["precision=mxfp8", "model.ffn_hidden_size=656"],
    "model.kv_channels=60": ["precision=fp8_tensorwise", "model.kv_channels=60", "model.num_attention_heads=2"],
    "model.seq_length=500": ["precision=fp8_blockwise", "model.seq_length=500"],
    "model.backend=transformer_engine: needs an NVIDIA GPU": ["model.backend=transformer_engine", "cluster.device=cpu"],
}  # fmt: skip


@pytest.mark.parametrize("problem", CASES)
def test_what_cannot_be(problem):
    assert any(found.startswith(problem) for found in problems(*CASES[problem])), problems(*CASES[problem])


def test_a_rank_of_sequence_and_context_parallelism_has_a_part_of_the_tokens():
    """512 tokens over 2 x 2 x 2 chunks are 64 a rank, of which FP8 wants a multiple of 16; of 96 they are 24."""
    words = ["precision=fp8_tensorwise", "parallel=tp2_sp", "parallel.context_parallel_size=2",
             "cluster.nproc_per_node=4"]  # fmt: skip
    assert problems(*words, gpus=4) == []
    assert [found[:20] for found in problems(*words, "model.seq_length=96", gpus=4)] == ["model.seq_length=96:"]


def test_overlap_of_tensor_parallelism_takes_transformer_engine_and_one_shape():
    words = ["parallel=tp2_sp", "parallel.tp_comm_overlap=true", "cluster.nproc_per_node=2"]
    assert problems(*words, gpus=2) == []
    wrong = {
        "is of Transformer Engine's layers": [*words, "model.backend=torch"],
        "needs parallel.sequence_parallel=true": [*words, "parallel.sequence_parallel=false"],
        "micro-batches of one shape": [*words, "stage=sft"],
        "in one node": [*words, "cluster.nproc_per_node=1", "cluster.nnodes=2"],
    }
    for text, given in wrong.items():
        found = [problem for problem in problems(*given, gpus=2) if problem.startswith("parallel.tp_comm_overlap=true")]
        assert any(text in problem for problem in found), (text, found)


def test_cuda_graphs_take_what_is_the_same_in_every_step():
    words = ["train.cuda_graph_impl=local", "model.backend=torch", "precision=bf16"]
    assert problems(*words) == problems(*words, "parallel.use_distributed_optimizer=true") == []
    wrong = {
        "stage=sft": ["stage=sft", "data.path=/"],
        "parallel.tensor_model_parallel_size=2": ["parallel=tp2_sp", "cluster.nproc_per_node=2"],
        "parallel.pipeline_model_parallel_size=2": ["parallel=pp2", "cluster.nproc_per_node=2"],
        "parallel.context_parallel_size=2": ["parallel=cp2", "cluster.nproc_per_node=2"],
        "parallel.overlap_param_gather=true": [
            f"parallel.{key}=true"
            for key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
        ],
        "model.hidden_dropout=0.1": ["model.hidden_dropout=0.1"],
        "model.num_experts=4": ["model=tiny_moe"],
        "model.backend=auto": ["model.backend=auto"],
        "train.recompute_granularity=full": ["train.recompute_granularity=full"],
        "peft.method=lora": ["peft=lora"],
        "data.loader=dali": ["data.loader=dali"],
        "data.reset_attention_mask=true": ["data.reset_attention_mask=true"],
    }
    for start, given in wrong.items():
        found = [problem for problem in problems(*words, *given, gpus=2) if f"=local, {start}:" in problem]
        assert len(found) == 1 and "; set " in found[0], (start, problems(*words, *given, gpus=2))


def test_transformer_engine_that_is_not_installed_is_named():
    wanted = problems("model.backend=transformer_engine", transformer_engine=False)
    assert len(wanted) == 1 and "not installed" in wanted[0] and "model.backend=torch" in wanted[0]
    fp8 = problems("precision=mxfp8", transformer_engine=False)
    assert len(fp8) == 1 and fp8[0].startswith("precision.fp8=e4m3:") and "precision=bf16" in fp8[0]
    assert problems("model.backend=auto", transformer_engine=False) == [], "auto takes what there is"


def test_cards_and_recipes():
    """Transformer Engine 2.11: FP8 from 8.9 on, block scaling from 9.0 on, MXFP8 from 10.0 on and not yet on 12.0."""
    fits = {card: [recipe.value for recipe in Fp8Recipe if card_problem(recipe, card) is None]
            for card in (AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER)}  # fmt: skip
    assert fits == {
        AMPERE: [],
        ADA: ["delayed", "tensorwise"],
        HOPPER: ["delayed", "tensorwise", "blockwise"],
        BLACKWELL: ["delayed", "tensorwise", "blockwise", "mxfp8"],
        CONSUMER: ["delayed", "tensorwise", "blockwise"],
    }
    (found,) = problems("precision=mxfp8", capability=HOPPER)
    assert found.startswith("precision.fp8_recipe=mxfp8: needs a GPU of compute capability 10.0") and "has 9.0" in found
    (found,) = problems("precision=fp8_delayed", capability=AMPERE)
    assert found.endswith("set precision=bf16")


def test_capability_and_memory_are_what_nvidia_smi_says(monkeypatch):
    def answers(text: str, status: int = 0):
        machine._cards.cache_clear()
        monkeypatch.setattr(machine.shutil, "which", lambda program: "/usr/bin/nvidia-smi")
        result = subprocess.CompletedProcess([], status, stdout=text, stderr="")
        monkeypatch.setattr(machine.subprocess, "run", lambda *args, **kwargs: result)
        return machine._capability(), machine._gpu_memory()

    try:
        assert answers("8.9, 46068\n9.0, 81559\n") == ((9, 0), 81559 * 2**20), "the best: a rank looks again at its own"
        assert answers("12.0, [N/A]\n") == ((12, 0), None)
        assert answers("[N/A], [N/A]\n") == (None, None)
        assert answers("Failed to initialize NVML", status=255) == (None, None)
    finally:
        machine._cards.cache_clear()
