"""What is wrong with a curation's values, all at once. Pure: files are looked at by scale_llm.curate."""

import math
from collections.abc import Iterator
from typing import Any

from scale_llm.config.cluster import ClusterConfig, Device, Launcher
from scale_llm.config.curate import CurateConfig, CurationConfig
from scale_llm.config.validate_cluster import seconds_of

SHARES = (
    "language.min_score", "repetition.duplicate_line_fraction", "repetition.duplicate_paragraph_fraction",
    "repetition.duplicate_line_character_fraction", "repetition.duplicate_paragraph_character_fraction",
    "gopher.max_symbol_word_ratio", "gopher.max_bullet_lines_ratio", "gopher.max_ellipsis_lines_ratio",
    "gopher.min_alphabetic_words_ratio", "fineweb.min_punctuated_lines_ratio", "fineweb.max_short_lines_ratio",
    "fineweb.max_duplicate_characters_ratio", "toxicity.max_share", "near.min_similarity",
)  # fmt: skip
POSITIVE = (
    "max_document_megabytes", "shard_megabytes", "extract.timeout_seconds", "language.characters", "gopher.max_words",
    "quality.train_megabytes", "quality.tolerance", "quality.max_perplexity", "near.n_grams", "near.buckets",
    "near.hashes_per_bucket", "sentences.span", "decontaminate.n_grams", "decontaminate.shortest",
)  # fmt: skip
NOT_NEGATIVE = (
    "gopher.min_words", "gopher.min_average_word_length", "gopher.max_average_word_length", "gopher.min_stop_words",
    "c4.min_sentences", "c4.min_words_per_line", "c4.max_word_length", "fineweb.short_line_characters",
    "fineweb.max_new_lines_per_word", "toxicity.min_words", "sentences.min_words", "report.examples", "near.seed",
)  # fmt: skip

READ_ON_SLURM = {
    "launcher", "partition", "account", "qos", "time", "mem", "cpus_per_task", "constraint", "exclude", "nodelist",
    "requeue", "sbatch_args",
}  # fmt: skip
"""Keys of the cluster group that curation's jobs obey."""


def curation_problems(cfg: CurationConfig) -> list[str]:
    """Sentences of the form `key=value: what is wrong; what to do`."""
    found = [*_numbers(cfg.curate), *_orders(cfg.curate), *_choices(cfg.curate), *_cluster(cfg.cluster)]
    if cfg.tasks is not None and cfg.tasks < 1:
        found.append(f"tasks={cfg.tasks}: must be at least 1; give a larger number")
    if not cfg.output:
        found.append("output='': names no directory; give output=PATH")
    return found


def _value(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def _numbers(cfg: CurateConfig) -> Iterator[str]:
    tables = {
        "a share: give a number from 0 to 1": (SHARES, lambda value: 0 <= value <= 1),
        "must be larger than 0; give a larger number": (POSITIVE, lambda value: value > 0),
        "must be 0 or larger; give a larger number": (NOT_NEGATIVE, lambda value: value >= 0),
    }
    for what, (keys, holds) in tables.items():
        for key in keys:
            value = _value(cfg, key)
            if value is not None and not (math.isfinite(value) and holds(value)):
                yield f"curate.{key}={value}: {what}"
    for table in ("top_n_grams", "duplicate_n_grams"):
        shares = _value(cfg, f"repetition.{table}")
        if not all(0 <= share <= 1 for share in shares):
            yield f"curate.repetition.{table}={shares}: shares; give numbers from 0 to 1"


def _orders(cfg: CurateConfig) -> Iterator[str]:
    pairs = (
        ("gopher.min_words", "gopher.max_words"),
        ("gopher.min_average_word_length", "gopher.max_average_word_length"),
        ("decontaminate.shortest", "decontaminate.n_grams"),
    )
    for low, high in pairs:
        if _value(cfg, low) > _value(cfg, high):
            yield f"curate.{low}={_value(cfg, low)}: above curate.{high}={_value(cfg, high)}; lower it"
    if cfg.max_document_megabytes >= 2048:
        yield f"curate.max_document_megabytes={cfg.max_document_megabytes}: a row is held whole; give less than 2048"


def _choices(cfg: CurateConfig) -> Iterator[str]:
    if cfg.language.enabled and not cfg.language.languages:
        yield "curate.language.languages=[]: keeps nothing; name languages, or set curate.language.enabled=false"
    if cfg.gopher.enabled and cfg.gopher.min_stop_words > len(set(cfg.gopher.stop_words)):
        yield (
            f"curate.gopher.min_stop_words={cfg.gopher.min_stop_words}: there are only "
            f"{len(set(cfg.gopher.stop_words))} in curate.gopher.stop_words; lower it"
        )
    if not cfg.url.enabled and (cfg.url.blocked_domains or cfg.url.blocked_words):
        yield "curate.url.enabled=false: nothing is blocked then; enable it, or leave the blocked ones out"
    if cfg.decontaminate.against is not None and not cfg.decontaminate.enabled:
        yield "curate.decontaminate.enabled=false: curate.decontaminate.against is not read then; enable it"


def _cluster(cluster: ClusterConfig) -> Iterator[str]:
    default = ClusterConfig()
    read = READ_ON_SLURM if cluster.launcher is Launcher.slurm else {"launcher"}
    for name in ClusterConfig.__slots__:
        value = getattr(cluster, name)
        if name == "device" and value is not Device.cuda:
            continue  # cluster=local_cpu is what curation does anyway
        if name not in read and value != getattr(default, name):
            shown = getattr(value, "value", value)
            other = "" if cluster.launcher is Launcher.slurm else " without cluster=slurm"
            yield f"cluster.{name}={shown}: curation does not read it{other}; leave it out"
    if cluster.launcher is not Launcher.slurm:
        return
    if cluster.time is not None and seconds_of(cluster.time) is None:
        yield f"cluster.time={cluster.time}: not a time of Slurm; give minutes, hours:minutes:seconds or days-hours"
    for argument in cluster.sbatch_args:
        if not argument.startswith("--") or "\n" in argument:
            yield f"cluster.sbatch_args=[{argument}]: not an option; begin it with --, such as --exclusive"
