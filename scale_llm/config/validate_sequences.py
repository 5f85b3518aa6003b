"""Whether a run that trains on whole sequences has what it needs: fine-tuning, preference optimisation."""

from scale_llm.config.model import Head
from scale_llm.config.peft import LOW_RANK, PeftMethod
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import (
    Batching,
    DpoConfig,
    ReferenceModel,
    RewardConfig,
    SequenceStageConfig,
    SftConfig,
    answers_in_a_row,
)


def sequence_problems(cfg: RunConfig, stage: SequenceStageConfig) -> list[str]:
    """Problems of such a run beyond those of every training run."""
    found = [*_start(cfg), *_batching(cfg, stage)]
    if isinstance(stage, SftConfig):
        found += _sft(stage)
    if isinstance(stage, RewardConfig):
        found += _reward(cfg, stage)
    if isinstance(stage, DpoConfig):
        found += _dpo(cfg, stage)
    return found


def _start(cfg: RunConfig) -> list[str]:
    found = []
    if cfg.checkpoint.load is None:
        found.append(
            "checkpoint.load=null: nothing to fine-tune; give checkpoint.load=<a run_dir>/checkpoints, or a Hugging "
            "Face directory"
        )
    if cfg.model.head is not Head.language_model and not isinstance(cfg.stage, RewardConfig):
        found.append(f"model.head={cfg.model.head.value}: fine-tuning predicts tokens; set model.head=language_model")
    return found


def _sft(stage: SftConfig) -> list[str]:
    found = []
    if not 0.0 <= stage.label_smoothing < 1.0:
        found.append(
            f"stage.label_smoothing={stage.label_smoothing}: is a share; give a number of at least 0 and below 1"
        )
    if stage.neftune_noise_alpha < 0:
        found.append(f"stage.neftune_noise_alpha={stage.neftune_noise_alpha}: must be 0 or larger; 5 is usual")
    if stage.num_samples < 0:
        found.append(f"stage.num_samples={stage.num_samples}: must be 0 or larger; give a number 0 or larger")
    if stage.num_samples > 0 and stage.max_new_tokens < 1:
        found.append(
            f"stage.max_new_tokens={stage.max_new_tokens}: samples are answers of at least one token; give a number "
            "above 0, or set stage.num_samples=0"
        )
    return found


def _batching(cfg: RunConfig, stage: SequenceStageConfig) -> list[str]:
    budget = stage.max_tokens_per_micro_batch
    if budget is None or stage.batching is not Batching.token_budget:
        return []
    answers = answers_in_a_row(stage)
    needed = cfg.model.seq_length * answers
    if budget < needed:
        what = "pair of answers" if answers > 1 else "conversation"
        return [
            f"stage.max_tokens_per_micro_batch={budget}: holds no {what} of model.seq_length="
            f"{cfg.model.seq_length}; give at least {needed}"
        ]
    return []


def _dpo(cfg: RunConfig, stage: DpoConfig) -> list[str]:
    found = []
    if stage.beta <= 0:
        found.append(f"stage.beta={stage.beta}: must be larger than 0, or the policy is held to nothing; 0.1 is usual")
    if not 0.0 <= stage.label_smoothing < 0.5:
        found.append(
            f"stage.label_smoothing={stage.label_smoothing}: is the share of wrong labels; give a number of at least 0 "
            "and below 0.5"
        )
    if stage.sft_coeff < 0:
        found.append(f"stage.sft_coeff={stage.sft_coeff}: must be 0 or larger; give a number 0 or larger")
    for key in ("desirable_weight", "undesirable_weight"):
        if getattr(stage, key) <= 0:
            found.append(f"stage.{key}={getattr(stage, key)}: must be larger than 0; 1 is usual")
    if cfg.peft.method is PeftMethod.prompt_tuning:
        found.append("peft.method=prompt_tuning: is for stage=sft; set peft=lora or peft=none")
    return found + _reference(cfg, stage)


def _reference(cfg: RunConfig, stage: DpoConfig) -> list[str]:
    if stage.reference is not ReferenceModel.base:
        return []
    if cfg.peft.method not in LOW_RANK:
        return [
            f"stage.reference=base: is the model under adapters, and peft.method={cfg.peft.method.value} has none; set "
            "peft=lora, or stage.reference=cached"
        ]
    if stage.reference_load is not None:
        return [
            f"stage.reference_load={stage.reference_load}: stage.reference=base is the policy's own; remove one of them"
        ]
    return []


def _reward(cfg: RunConfig, stage: RewardConfig) -> list[str]:
    found = []
    if stage.center_rewards_coefficient < 0:
        found.append(
            f"stage.center_rewards_coefficient={stage.center_rewards_coefficient}: must be 0 or larger; 0.01 is usual"
        )
    if cfg.peft.method is not PeftMethod.none:
        found.append(f"peft.method={cfg.peft.method.value}: a reward model trains all weights; set peft=none")
    return found
