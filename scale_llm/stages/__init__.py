"""Layer 4: one loop, and the stages it drives. Here engine, checkpoint, data and losses meet."""

from scale_llm.config.run import RunConfig


def run(cfg: RunConfig) -> None:
    """Runs the configured stage on this rank; the environment names the rank as torchrun does."""
    from scale_llm.parallel.device import stop
    from scale_llm.stages.context import start_rank

    context = start_rank(cfg)
    try:
        if cfg.stage.name == "pretrain":
            from scale_llm.stages.loop import train
            from scale_llm.stages.pretrain import Pretrain

            train(context, Pretrain(context))
        elif cfg.stage.name == "sft":
            from scale_llm.stages.loop import train
            from scale_llm.stages.sft import Sft

            train(context, Sft(context))
        elif cfg.stage.name == "dpo":
            from scale_llm.stages.dpo import dpo
            from scale_llm.stages.loop import train

            train(context, dpo(context))
        elif cfg.stage.name == "reward":
            from scale_llm.stages.loop import train
            from scale_llm.stages.reward import reward

            train(context, reward(context))
        else:
            from scale_llm.stages.evaluate import evaluate

            evaluate(context)
    finally:
        stop()
