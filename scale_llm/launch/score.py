"""scale-llm score CHECKPOINT FILE RUN_DIR [key=value ...]: stage=score in fewer words."""

import re

from scale_llm.config.errors import UsageError


def score_words(arguments: list[str]) -> list[str]:
    """The words of the run that is meant; flags and keys stay as they are."""
    places = [word for word in arguments if "=" not in word and not word.startswith("-")]
    if len(places) < 3:  # a path may have a = in it, as those of a sweep's points do
        places = [word for word in arguments if not word.startswith("-") and not _sets_a_key(word)]
    others = [word for word in arguments if word not in places]
    if len(places) != 3:
        raise UsageError(
            f"score {' '.join(places)}: give a reward model's checkpoints, a file of conversations and a directory for "
            "scores.jsonl: scale-llm score runs/reward/checkpoints answers.jsonl runs/scores"
        )
    load, path, run_dir = map(_quoted, places)
    named = [f"checkpoint.load={load}", f"data.path={path}", f"run_dir={run_dir}"]
    return ["stage=score", "model=from_checkpoint", *named, *others]


def _sets_a_key(word: str) -> bool:
    from scale_llm.config.overrides import is_known, run_tree

    key, equals, _ = word.lstrip("+~").partition("=")
    return bool(equals) and is_known(key, run_tree())


def _quoted(path: str) -> str:
    """As one value of Hydra's grammar, to which a backslash is one unless a quote follows."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), path) + "'"
