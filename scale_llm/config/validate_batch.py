"""Whether batches divide over ranks and micro-batches."""

from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, GenerateConfig, ScoreConfig, SequenceStageConfig
from scale_llm.config.train import TrainConfig
from scale_llm.config.validate_layout import world_size


def batch_problems(cfg: RunConfig) -> list[str]:
    """Batch sizes that do not divide, and a ramp-up that is not one."""
    if isinstance(cfg.stage, ScoreConfig | GenerateConfig):
        return []  # they have batches of their own
    ramp = _rampup_form(cfg.train)
    return ramp + _divides(cfg, with_rampup=not ramp)


def _rampup_form(train: TrainConfig) -> list[str]:
    ramp = train.rampup_batch_size
    if ramp is None:
        return []
    key = f"train.rampup_batch_size={ramp}"
    if len(ramp) != 3:
        return [f"{key}: {len(ramp)} numbers; give [start, increment, samples], such as [8,8,1000]"]
    start, increment, samples = ramp
    if start <= 0 or increment <= 0 or samples < 0:
        return [f"{key}: start and increment must be larger than 0 and samples 0 or larger; give such numbers"]
    if start > train.global_batch_size:
        return [f"{key}: starts above train.global_batch_size={train.global_batch_size}; give a smaller start"]
    if (train.global_batch_size - start) % increment:
        return [
            f"{key}: steps of {increment} from {start} do not meet train.global_batch_size={train.global_batch_size}; "
            f"give an increment that divides {train.global_batch_size - start}"
        ]
    return []


def _divides(cfg: RunConfig, with_rampup: bool) -> list[str]:
    layout, train = cfg.parallel, cfg.train
    model = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.context_parallel_size
    by_tokens = isinstance(cfg.stage, SequenceStageConfig) and cfg.stage.batching is Batching.token_budget
    if by_tokens or isinstance(cfg.stage, PolicyStageConfig):
        return []  # a global batch is dealt out by tokens
    if world_size(cfg) % model:
        return []  # the layout itself does not fit: there is no data-parallel size to speak of
    dp = world_size(cfg) // model
    at_once = train.micro_batch_size * dp
    unit = at_once
    reason = f"train.micro_batch_size={train.micro_batch_size} x data parallel {dp} = {at_once}"
    if (layout.virtual_pipeline_model_parallel_size or 1) > 1:
        unit *= layout.pipeline_model_parallel_size
        reason += f", times pipeline {layout.pipeline_model_parallel_size} for the interleaved schedule = {unit}"
    sizes = {"train.global_batch_size": train.global_batch_size}
    if with_rampup and train.rampup_batch_size:
        sizes["train.rampup_batch_size[0]"], sizes["train.rampup_batch_size[1]"], _ = train.rampup_batch_size
    return [
        f"{key}={size}: not divisible by {reason}; set {key}={-(-size // unit) * unit} or another micro_batch_size"
        for key, size in sizes.items()
        if size % unit
    ]
