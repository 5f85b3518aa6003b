"""Whether layers can be replayed as CUDA graphs: what a graph has recorded happens again, and nothing else."""

from scale_llm.config.cluster import Device
from scale_llm.config.data import LoaderKind
from scale_llm.config.model import Backend
from scale_llm.config.peft import PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import PretrainConfig
from scale_llm.config.train import CudaGraphImpl, RecomputeGranularity

KEY = "train.cuda_graph_impl=local"
NONE = "train.cuda_graph_impl=none"


def graph_problems(cfg: RunConfig) -> list[str]:
    """Keys that it cannot be used with."""
    if cfg.train.cuda_graph_impl is CudaGraphImpl.none:
        return []
    if cfg.cluster.device is Device.cpu:
        return [f"{KEY}: CUDA graphs need an NVIDIA GPU; set {NONE}"]
    if not isinstance(cfg.stage, PretrainConfig):
        return [f"{KEY}, stage={cfg.stage.name}: graphs want micro-batches of one shape and weights that stay where "
                f"they are, as stage=pretrain has them; set {NONE}"]  # fmt: skip
    found = [*_layout(cfg), *_model(cfg)]
    if cfg.train.recompute_granularity is not RecomputeGranularity.none:
        granularity = cfg.train.recompute_granularity.value
        found.append((f"train.recompute_granularity={granularity}", "a graph keeps its activations", "none"))
    if cfg.precision.fp8 is not None:
        found.append((f"precision.fp8={cfg.precision.fp8.value}", "its scales change between steps", "null"))
    if cfg.peft.method is not PeftMethod.none:
        found.append((f"peft.method={cfg.peft.method.value}", "graphs are of layers that are trained whole", "none"))
    if cfg.data.loader is LoaderKind.dali:
        found.append(("data.loader=dali", "its threads would call CUDA while a graph is captured", "torch"))
    if cfg.data.reset_attention_mask:
        found.append(("data.reset_attention_mask=true", "every sample has a mask of its own", "false"))
    return [f"{KEY}, {key}: {why}; set {key.split('=')[0]}={value}, or {NONE}" for key, why, value in found]


def _layout(cfg: RunConfig) -> list[tuple[str, str, str]]:
    layout = cfg.parallel
    reasons = {
        "tensor_model_parallel_size": "a graph holds no collective",
        "pipeline_model_parallel_size": "a graph has one micro-batch at a time",
        "context_parallel_size": "a graph holds no collective",
    }
    sizes = {key: getattr(layout, key) for key in reasons}
    found = [(f"parallel.{key}={size}", reasons[key], "1") for key, size in sizes.items() if size > 1]
    if layout.overlap_param_gather:
        found.append(("parallel.overlap_param_gather=true", "hooks that gather weights are not replayed", "false"))
    return found


def _model(cfg: RunConfig) -> list[tuple[str, str, str]]:
    """(key=value, why not, a value that can be)"""
    model = cfg.model
    dropout = {key: getattr(model, key) for key in ("hidden_dropout", "attention_dropout")}
    found = [
        (f"model.{key}={value}", "a graph would drop the same again", "0") for key, value in dropout.items() if value
    ]
    if model.num_experts:
        found.append((f"model.num_experts={model.num_experts}", "tokens of an expert differ in number", "null"))
    if model.backend is not Backend.torch:
        why = "other attention than torch's sets the state of random numbers in every pass"
        found.append((f"model.backend={model.backend.value}", why, "torch"))
    return found
