"""Words of small runs of PPO and GRPO."""

SHORT = ["train.train_iters=4", "train.eval_interval=null", "train.eval_iters=1"]


def words(beginner, digits, *more: str) -> list[str]:
    """Eight prompts, four answers to each, of a model that knows a little."""
    return [
        "model=from_checkpoint", f"checkpoint.load={beginner}", f"data.path={digits}", "data.split='90,10,0'",
        "optim.lr=1e-3", "optim.lr_warmup_iters=0", "train.global_batch_size=8", "stage.num_generations_per_prompt=4",
        "stage.max_new_tokens=8", "reward.function=exact_match", "train.micro_batch_size=4", *more,
    ]  # fmt: skip
