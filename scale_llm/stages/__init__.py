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
    if context.cfg.stage.name == "evaluate":
        from scale_llm.stages.evaluate import evaluate

        return evaluate(context)
    if context.cfg.stage.name == "generate":
        from scale_llm.stages.generate import generate

        return generate(context)
    if context.cfg.stage.name == "score":
        from scale_llm.stages.score import score

        return score(context)
    from scale_llm.stages.loop import train

    train(context, trained_stage(context))


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
