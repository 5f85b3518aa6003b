"""Whether a fine-tuning run has what it needs."""

from scale_llm.config.model import Backend, Head
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import Batching, SftConfig


def sft_problems(cfg: RunConfig, stage: SftConfig) -> list[str]:
    """Problems of stage=sft beyond those of every training run."""
    return [*_start(cfg), *_loss(cfg, stage), *_batching(cfg, stage), *_packing(cfg, stage)]


def _start(cfg: RunConfig) -> list[str]:
    found = []
    if cfg.checkpoint.load is None:
        found.append(
            "checkpoint.load=null: nothing to fine-tune; give checkpoint.load=<a run_dir>/checkpoints, or a Hugging "
            "Face directory"
        )
    if cfg.model.head is not Head.language_model:
        found.append(f"model.head={cfg.model.head.value}: fine-tuning predicts tokens; set model.head=language_model")
    return found


def _loss(cfg: RunConfig, stage: SftConfig) -> list[str]:
    found = []
    if not 0.0 <= stage.label_smoothing < 1.0:
        found.append(
            f"stage.label_smoothing={stage.label_smoothing}: is a share; give a number of at least 0 and below 1"
        )
    if stage.neftune_noise_alpha < 0:
        found.append(f"stage.neftune_noise_alpha={stage.neftune_noise_alpha}: must be 0 or larger; 5 is usual")
    for key in ("num_samples", "max_new_tokens"):
        if getattr(stage, key) < 0:
            found.append(f"stage.{key}={getattr(stage, key)}: must be 0 or larger; give a number 0 or larger")
    return found


def _batching(cfg: RunConfig, stage: SftConfig) -> list[str]:
    budget = stage.max_tokens_per_micro_batch
    if budget is None:
        return []
    if stage.batching is not Batching.token_budget:
        return [
            f"stage.max_tokens_per_micro_batch={budget}: is for stage.batching=token_budget, this is "
            f"{stage.batching.value}; remove it or set stage.batching=token_budget"
        ]
    if budget < cfg.model.seq_length:
        return [
            f"stage.max_tokens_per_micro_batch={budget}: holds no conversation of model.seq_length="
            f"{cfg.model.seq_length}; give at least as much"
        ]
    return []


def _packing(cfg: RunConfig, stage: SftConfig) -> list[str]:
    if stage.batching is Batching.padded:
        return []
    what = f"stage.batching={stage.batching.value}"
    if cfg.model.backend is Backend.local:
        return [
            f"{what}: model.backend=local cannot keep packed conversations apart; set model.backend=torch or "
            "stage.batching=padded"
        ]
    if cfg.model.backend is Backend.transformer_engine and cfg.parallel.context_parallel_size > 1:
        return [
            f"{what}: with parallel.context_parallel_size={cfg.parallel.context_parallel_size} it needs "
            "model.backend=torch, which cuts rows where Transformer Engine cuts conversations; set it, or "
            "stage.batching=padded"
        ]
    return []
