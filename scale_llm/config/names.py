"""Run names are a grammar: <stage>-<model>-<nodes>n<ranks>g-<parallel>."""

from scale_llm.config.parallel import ParallelConfig
from scale_llm.config.run import RunConfig


def layout_name(parallel: ParallelConfig) -> str:
    """The axes larger than one, as in tp2pp2vpp2sp; `dp` where there are none."""
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size or 1,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
    }
    name = "".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
    return name + ("sp" if parallel.sequence_parallel else "") or "dp"


def run_name(cfg: RunConfig) -> str:
    """Name of a resolved run: pretrain-tiny-1n2g-tp2."""
    ranks = f"{cfg.cluster.nnodes}n{cfg.cluster.nproc_per_node}g"
    return f"{cfg.stage.name}-{cfg.model.name}-{ranks}-{layout_name(cfg.parallel)}"
