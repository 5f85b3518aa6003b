"""Layer 4: one loop, and the stages it drives. Here engine, checkpoint, data and losses meet."""

from scale_llm.config.run import RunConfig


def run(cfg: RunConfig) -> None:
    """Runs the configured stage on this rank; the environment names the rank as torchrun does."""
    from scale_llm.parallel.device import stop
    from scale_llm.stages.context import start_rank

    context = start_rank(cfg)
    try:
        if cfg.stage.name == "evaluate":
            from scale_llm.stages.evaluate import evaluate

            return evaluate(context)
        if cfg.stage.name == "generate":
            from scale_llm.stages.generate import generate

            return generate(context)
        if cfg.stage.name == "score":
            from scale_llm.stages.score import score

            return score(context)
        from scale_llm.stages.loop import train

        train(context, trained_stage(context))
    finally:
        stop()


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
