"""Layer 4: one loop, and the stages it drives. Here engine, checkpoint, data and losses meet."""

from collections.abc import Callable
from typing import IO, NoReturn

from scale_llm.config.run import RunConfig


def run(cfg: RunConfig, *, log: IO[str] | None = None, hung: Callable[[Exception], NoReturn] | None = None) -> None:
    """Runs the configured stage on this rank; the environment names the rank as torchrun does.

    log, hung: where the stacks of a run that makes no progress go, and what ends this rank then; None: nothing does.
    """
    from scale_llm.parallel.device import stop
    from scale_llm.stages.context import start_rank
    from scale_llm.stages.health.watchdog import watchdog_of

    context = start_rank(cfg, watchdog=watchdog_of(cfg, log, hung))
    from scale_llm.stages.out_of_memory import memory_explained  # brings megatron-core, which is adapted by now

    try:
        with memory_explained(cfg, context.device, log):
            run_stage(context)
    finally:
        stop()


def run_stage(context) -> None:
    """The stage of a rank that has joined its job."""
    stage = untrained_stage(context.cfg.stage.name)
    if stage is None:
        from scale_llm.stages.loop import train

        return train(context, trained_stage(context))
    import torch.distributed as dist

    stage(context)
    # The last rank writes the results: to Slurm the others must not have ended before it, or it is killed half-way
    dist.barrier(group=context.mesh.host_group)


def untrained_stage(name: str):
    """What runs a stage without training; None: the loop does."""
    if name == "evaluate":
        from scale_llm.stages.evaluate import evaluate

        return evaluate
    if name == "generate":
        from scale_llm.stages.generate import generate

        return generate
    if name == "score":
        from scale_llm.stages.score import score

        return score
    return None


def trained_stage(run):
    """The stage that the loop drives, by its name."""
    name = run.cfg.stage.name
    if name == "sft":
        from scale_llm.stages.sft import sft

        return sft(run)
    if name == "reward":
        from scale_llm.stages.reward import reward

        return reward(run)
    if name == "dpo":
        from scale_llm.stages.dpo import dpo

        return dpo(run)
    if name in ("ppo", "grpo"):
        from scale_llm.stages.policy.stage import PolicyStage

        return PolicyStage(run)
    from scale_llm.stages.pretrain import Pretrain

    return Pretrain(run)
