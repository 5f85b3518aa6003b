"""Whether number formats fit each other, the model, the layers and the GPU. What TE asks for: Transformer Engine 2.11's
pytorch/quantization.py (cards) and pytorch/utils.py (sizes)."""

from scale_llm.config.cluster import Device
from scale_llm.config.machine import Machine
from scale_llm.config.model import Backend, ModelConfig
from scale_llm.config.peft import LOW_RANK
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.precision import Fp8Recipe, PrecisionConfig, fp8_unit
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import REFERENCE_FREE, DpoConfig, UntrainedStageConfig

CAPABILITY = {
    Fp8Recipe.delayed: (8, 9),
    Fp8Recipe.tensorwise: (8, 9),
    Fp8Recipe.blockwise: (9, 0),
    Fp8Recipe.mxfp8: (10, 0),
}
"""Compute capability that a recipe begins with: Ada, Hopper, Blackwell."""


def precision_problems(cfg: RunConfig) -> list[str]:
    """Formats that exclude each other, and FP8 where it cannot be."""
    precision = cfg.precision
    found = []
    if precision.bf16 and precision.fp16:
        found.append("precision.bf16=true, precision.fp16=true: one format at a time; set precision=bf16 or "
                     "precision=fp16")  # fmt: skip
    if precision.min_loss_scale > precision.initial_loss_scale:
        found.append(
            f"precision.min_loss_scale={precision.min_loss_scale}: above "
            f"precision.initial_loss_scale={precision.initial_loss_scale}; lower the one or raise the other"
        )
    if cfg.data.reset_attention_mask and cfg.model.backend is Backend.transformer_engine:
        found.append(
            "data.reset_attention_mask=true: Transformer Engine's causal attention passes over the mask, and "
            "documents would see each other; set model.backend=torch, or reset_attention_mask=false"
        )
    if precision.fp8 is not None:
        return [*found, *_fp8(cfg), *_delayed(cfg), *_layers_in_bf16(cfg)]
    asked = cfg.model.backend is Backend.transformer_engine and not cfg.parallel.tp_comm_overlap
    if asked and cfg.cluster.device is Device.cpu:
        found.append("model.backend=transformer_engine: needs an NVIDIA GPU, and this run computes on a CPU; set "
                     "model.backend=auto")  # fmt: skip
    return found


def _key(precision: PrecisionConfig) -> str:
    assert precision.fp8 is not None
    return f"precision.fp8={precision.fp8.value}"


def _fp8(cfg: RunConfig) -> list[str]:
    precision, backend, key = cfg.precision, cfg.model.backend, _key(cfg.precision)
    found = []
    if not (precision.bf16 or precision.auto or cfg.cluster.device is Device.cpu):
        found.append(f"{key}: is for products of BF16 weights; set precision.bf16=true")
    if cfg.cluster.device is Device.cpu:
        found.append(f"{key}: needs an NVIDIA GPU, and this run computes on a CPU; set precision=bf16, or "
                     "cluster.device=cuda on a machine with one")  # fmt: skip
    if cfg.peft.method in LOW_RANK:
        found.append(f"{key}: peft.method={cfg.peft.method.value} is made of torch's layers, which have no FP8; set "
                     "precision=bf16 or peft=none")  # fmt: skip
    elif backend not in (Backend.auto, Backend.transformer_engine):
        cp = cfg.parallel.context_parallel_size
        why = f"; parallel.context_parallel_size={cp} with packed rows asks for them" if cp > 1 else ""
        why += "; data.reset_attention_mask=true asks for them" if cfg.data.reset_attention_mask else ""
        found.append(f"{key}: the layers of model.backend={backend.value} have no FP8{why}; set precision=bf16 or "
                     "model.backend=transformer_engine")  # fmt: skip
    if cfg.model.num_experts is not None:
        found.append(f"{key}, model.num_experts={cfg.model.num_experts}: experts get any number of tokens, and FP8 "
                     f"products want multiples of {fp8_unit(precision)}; set precision=bf16")  # fmt: skip
    return found


def _delayed(cfg: RunConfig) -> list[str]:
    if cfg.precision.fp8_recipe is not Fp8Recipe.delayed:
        return []
    key, other = "precision.fp8_recipe=delayed", "precision=fp8_tensorwise"
    stage = cfg.stage
    if isinstance(stage, UntrainedStageConfig):
        return [f"{key}: scales are learnt in training, stage={stage.name} has none; set {other} or precision=bf16"]
    # Transformer Engine updates the scales of all models of a process together, over the ranks of each
    several = isinstance(stage, PolicyStageConfig) or (
        isinstance(stage, DpoConfig) and stage.loss not in REFERENCE_FREE
    )
    return [f"{key}: is for one model, stage={stage.name} has several; set {other}"] if several else []


def _layers_in_bf16(cfg: RunConfig) -> list[str]:
    precision, layers = cfg.precision, cfg.model.num_layers
    if not precision.first_last_layers_bf16:
        return []
    found = []
    if precision.fp8_recipe is Fp8Recipe.delayed:
        found.append("precision.first_last_layers_bf16=true: megatron-core has it with all recipes but delayed; set "
                     "precision=fp8_tensorwise or another, or first_last_layers_bf16=false")  # fmt: skip
    most = layers // max(cfg.parallel.pipeline_model_parallel_size, 1)
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        value = getattr(precision, name)
        if not 0 <= value <= most:
            found.append(
                f"precision.{name}={value}: a pipeline stage has {most} layers; give a number from 0 to {most}"
            )
    return found


def fp8_size_problems(cfg: RunConfig) -> list[str]:
    """Matrices of linear layers that Transformer Engine would not multiply in FP8. Divides by sizes of the layout."""
    precision, layout = cfg.precision, cfg.parallel
    if precision.fp8 is None:
        return []
    unit, tp = fp8_unit(precision), layout.tensor_model_parallel_size
    found = [
        f"{key}: {width} numbers a rank ({what}) are not divisible by {unit}, as {_recipe(precision)} needs; give "
        "another size, or precision=bf16"
        for key, what, width in _widths(cfg.model, tp)
        if width % unit
    ]
    shares = layout.context_parallel_size * (tp if layout.sequence_parallel else 1)
    if cfg.model.seq_length % (shares * unit):
        wanted = -(-cfg.model.seq_length // (shares * unit)) * shares * unit
        found.append(
            f"model.seq_length={cfg.model.seq_length}: the tokens of a rank are not divisible by {unit}, as "
            f"{_recipe(precision)} needs; set model.seq_length={wanted}"
        )
    return found


def _recipe(precision: PrecisionConfig) -> str:
    return f"precision.fp8_recipe={precision.fp8_recipe.value}"


def _widths(model: ModelConfig, tp: int) -> list[tuple[str, str, int]]:
    """(key and value, which matrix, its side on one rank) of every linear layer."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    queries = model.num_attention_heads // tp * head
    keys = max(groups // tp, 1) * head
    ffn = (model.ffn_hidden_size or 0) // tp
    return [
        (f"model.hidden_size={model.hidden_size}", "width of the model", model.hidden_size),
        (f"model.kv_channels={head}", "attention's output", queries),
        (f"model.num_query_groups={groups}", "queries, keys and values", queries + 2 * keys),
        (f"model.ffn_hidden_size={model.ffn_hidden_size}", "width of the MLP", ffn),
    ]


def gpu_problems(cfg: RunConfig, machine: Machine) -> list[str]:
    """FP8 on a card without it, and layers whose package is not there, as far as this machine knows."""
    found = []
    on_gpu, wanted = cfg.cluster.device is Device.cuda, cfg.model.backend is Backend.transformer_engine
    if on_gpu and wanted and machine.transformer_engine is False:
        fp8 = cfg.precision.fp8 is not None
        key = _key(cfg.precision) if fp8 else "model.backend=transformer_engine"
        found.append(
            f"{key}: needs Transformer Engine, which is not installed; pip install --no-build-isolation "
            f"'transformer_engine[pytorch]>=2.9,<2.12', or set {'precision=bf16' if fp8 else 'model.backend=torch'}"
        )
    if cfg.precision.fp8 is None or machine.capability is None:
        return found
    problem = card_problem(cfg.precision.fp8_recipe, machine.capability)
    return found if problem is None else [*found, f"{_recipe(cfg.precision)}: {problem}"]


def card_problem(recipe: Fp8Recipe, capability: tuple[int, int]) -> str | None:
    """What is wrong with a card of this compute capability; None: nothing."""
    has, wanted = ".".join(map(str, capability)), CAPABILITY[recipe]
    if recipe is Fp8Recipe.mxfp8 and capability >= (12, 0):
        return f"Transformer Engine has no MXFP8 for compute capability {has} yet; set precision=fp8_tensorwise"
    if capability >= wanted:
        return None
    fitting = [option for option, least in CAPABILITY.items() if capability >= least and option is not Fp8Recipe.mxfp8]
    options = [f"precision=fp8_{option.value}" for option in fitting] or ["precision=bf16"]
    return (
        f"needs a GPU of compute capability {'.'.join(map(str, wanted))} or higher, this one has {has}; set "
        f"{' or '.join(options)}"
    )
