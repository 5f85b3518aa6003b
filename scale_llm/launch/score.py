"""scale-llm score CHECKPOINT FILE RUN_DIR [key=value ...]: stage=score in fewer words."""

from scale_llm.config.errors import UsageError


def score_words(arguments: list[str]) -> list[str]:
    """The words of the run that is meant; flags and keys stay as they are."""
    places = [word for word in arguments if "=" not in word and not word.startswith("-")]
    others = [word for word in arguments if word not in places]
    if len(places) != 3:
        raise UsageError(
            f"score {' '.join(places)}: give a reward model's checkpoints, a file of conversations and a directory for "
            "scores.jsonl: scale-llm score runs/reward/checkpoints answers.jsonl runs/scores"
        )
    load, path, run_dir = places
    named = [f"checkpoint.load={load}", f"data.path={path}", f"run_dir={run_dir}"]
    return ["stage=score", "model=from_checkpoint", *named, *others]
