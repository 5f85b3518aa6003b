"""Whether the layout fits the ranks and the model."""

from scale_llm.config.run import RunConfig
from scale_llm.config.validate_overlap import overlap_problems
from scale_llm.config.validate_precision import fp8_size_problems


def world_size(cfg: RunConfig) -> int:
    """Ranks of the whole job."""
    return cfg.cluster.nnodes * (cfg.cluster.nproc_per_node or 1)


def layout_problems(cfg: RunConfig) -> list[str]:
    """Sizes that do not divide each other."""
    found = [*_world(cfg), *_experts(cfg), *_heads(cfg), *_layers(cfg), *_sequence(cfg), *overlap_problems(cfg)]
    return found or fp8_size_problems(cfg)


def _world(cfg: RunConfig) -> list[str]:
    layout = cfg.parallel
    tp, pp, cp = (
        layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    )  # fmt: skip
    world, model = world_size(cfg), tp * pp * cp
    if world % model == 0:
        return []
    fits = -(-world // model) * model
    per_node = -(-fits // cfg.cluster.nnodes)
    return [
        f"cluster.nproc_per_node={cfg.cluster.nproc_per_node} (x cluster.nnodes={cfg.cluster.nnodes} = {world} ranks): "
        f"not divisible by tensor {tp} x pipeline {pp} x context {cp} = {model} ranks; "
        f"set cluster.nproc_per_node={per_node} or a smaller layout"
    ]


def _experts(cfg: RunConfig) -> list[str]:
    layout, experts = cfg.parallel, cfg.model.num_experts
    ep = layout.expert_model_parallel_size
    if experts is None:
        if ep > 1:
            return [
                f"parallel.expert_model_parallel_size={ep}: the model has no experts; "
                "set parallel.expert_model_parallel_size=1 or choose a model with model.num_experts"
            ]
        return []
    found = []
    if experts % ep:
        found.append(
            f"model.num_experts={experts}: not divisible by parallel.expert_model_parallel_size={ep}; "
            f"set an expert_model_parallel_size that divides {experts}"
        )
    etp = layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size
    needed = etp * ep * layout.pipeline_model_parallel_size
    if world_size(cfg) % needed:
        found.append(
            f"parallel.expert_model_parallel_size={ep}: {world_size(cfg)} ranks are not divisible by expert {ep} x "
            f"expert tensor {etp} x pipeline {layout.pipeline_model_parallel_size} = {needed}; "
            f"set cluster.nproc_per_node to a multiple, or parallel.expert_tensor_parallel_size=1"
        )
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        found.append(
            f"parallel.sequence_parallel=false: experts with tensor_model_parallel_size="
            f"{layout.tensor_model_parallel_size} need it (megatron-core refuses to train without); "
            "set parallel.sequence_parallel=true"
        )
    return found


def _heads(cfg: RunConfig) -> list[str]:
    model, tp = cfg.model, cfg.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    found = []
    if heads % tp:
        found.append(
            f"model.num_attention_heads={heads}: not divisible by parallel.tensor_model_parallel_size={tp}; "
            f"set a tensor_model_parallel_size that divides {heads}"
        )
    if groups % tp:
        found.append(
            f"model.num_query_groups={groups}: not divisible by parallel.tensor_model_parallel_size={tp}; "
            f"set a tensor_model_parallel_size that divides {groups}: keys and values are not copied between ranks"
        )
    widths = {"model.ffn_hidden_size": model.ffn_hidden_size or tp}
    if model.num_experts is not None:
        expert_tp = cfg.parallel.expert_tensor_parallel_size or tp
        widths = {"model.moe_ffn_hidden_size": model.moe_ffn_hidden_size or expert_tp}
        tp = expert_tp
    for key, width in widths.items():
        if width % tp:
            found.append(f"{key}={width}: not divisible by {tp} tensor-parallel ranks; give a multiple of {tp}")
    return found


def _layers(cfg: RunConfig) -> list[str]:
    layers, pp = cfg.model.num_layers, cfg.parallel.pipeline_model_parallel_size
    vpp = cfg.parallel.virtual_pipeline_model_parallel_size
    if vpp is not None and vpp > 1 and pp == 1:
        return [
            f"parallel.virtual_pipeline_model_parallel_size={vpp}: needs a pipeline; "
            "set parallel.pipeline_model_parallel_size=2 or more, or leave it null"
        ]
    chunks = pp * (vpp or 1)
    if layers % chunks:
        return [
            f"model.num_layers={layers}: not divisible by pipeline {pp} x virtual pipeline {vpp or 1} = {chunks} "
            f"chunks; set model.num_layers={-(-layers // chunks) * chunks} or another pipeline"
        ]
    return []


def _sequence(cfg: RunConfig) -> list[str]:
    length, layout, found = cfg.model.seq_length, cfg.parallel, []
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    if layout.sequence_parallel and tp == 1:
        found.append(
            "parallel.sequence_parallel=true: needs tensor parallelism; "
            "set parallel.tensor_model_parallel_size=2 or more, or sequence_parallel=false"
        )
    if cp > 1 and length % (2 * cp):
        found.append(
            f"model.seq_length={length}: not divisible by 2 x parallel.context_parallel_size={cp} = {2 * cp} chunks; "
            f"set model.seq_length={-(-length // (2 * cp)) * 2 * cp}"
        )
    elif layout.sequence_parallel and (length // cp) % tp:
        found.append(
            f"model.seq_length={length}: {length // cp} tokens a context-parallel rank are not divisible by "
            f"parallel.tensor_model_parallel_size={tp}, as parallel.sequence_parallel needs; "
            f"set model.seq_length={-(-length // (tp * cp)) * tp * cp}"
        )
    return found
