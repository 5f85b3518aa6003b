"""conf/ and the words of the command line -> a typed RunConfig, through Hydra, once a run."""

from collections.abc import Iterator
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scale_llm.config import overrides as words
from scale_llm.config.data import TooLong
from scale_llm.config.errors import UsageError
from scale_llm.config.io import run_schema
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import GenerateConfig
from scale_llm.config.store import conf_dir, register


def compose(arguments: list[str]) -> RunConfig:
    """The configuration these words ask for. Open values (None, auto) are still open; run_dir may be ""."""
    return compose_with_unset(arguments)[0]


def compose_with_unset(arguments: list[str]) -> tuple[RunConfig, set[str]]:
    """The configuration, and the keys that neither a word nor a file has set: those that have their defaults."""
    parsed = words.parse(arguments)
    swept = [str(override.input_line) for override in parsed if override.is_sweep_override()]
    if swept:
        raise UsageError(f"{' '.join(swept)}: several values need a sweep; add -m, or quote the value")
    tree = compose_tree(parsed, words.run_tree())
    cfg, unset = _typed(tree, parsed), set(_unset(OmegaConf.to_container(tree), ""))
    if isinstance(cfg.stage, GenerateConfig | PolicyStageConfig) and "data.on_too_long" in unset:
        cfg.data.on_too_long = TooLong.drop
    return cfg, unset


def expand_sweep(arguments: list[str]) -> list[list[str]]:
    """Hydra's basic sweeper: one list of words for each point of the product."""
    (batch,) = BasicSweeper.split_arguments(words.parse(arguments), max_batch_size=None)
    return [list(point) for point in batch]


def compose_tree(parsed: list[Override], tree: words.Tree) -> DictConfig:
    """What Hydra makes of conf/ and these words: values that a file or a word sets, no defaults."""
    register()
    GlobalHydra.instance().clear()
    arguments = [words.word_of(override, tree) for override in parsed]
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            return hydra_compose(config_name=tree.root, overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_value_problems(parsed, tree) or [first_cause(error)]) from error


def _typed(tree: DictConfig, parsed: list[Override]) -> RunConfig:
    if OmegaConf.is_missing(tree, "stage"):
        raise UsageError("stage: has no default; give stage=VALUE")
    stage: Any = OmegaConf.get_type(tree.stage)
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(run_schema(stage), tree))
    except (OmegaConfBaseException, TypeError) as error:
        raise UsageError(first_cause(error)) from error
    assert isinstance(cfg, RunConfig)
    if any(override.key_or_group in ("precision.bf16", "precision.fp16") for override in parsed):
        cfg.precision.auto = False  # precision.bf16=false asks for FP32, also where auto would choose otherwise
    return cfg


def _unset(tree: Any, prefix: str) -> Iterator[str]:
    """Dotted keys without a value. Of a plain tree: OmegaConf would follow ${...} to keys that have none yet."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _unset(value, f"{prefix}{name}.")
        elif value == MISSING:
            yield f"{prefix}{name}"


def _value_problems(parsed: list[Override], tree: words.Tree) -> list[str]:
    """Each key=value tried alone against its schema, so that all wrong types are named and not only the first."""
    keys = tree.keys
    problems = []
    for override in parsed:
        key = override.key_or_group
        if key not in keys or override.is_delete():
            continue
        try:
            _try_value(key, override.value(), tree)
        except OmegaConfBaseException as error:
            problems.append(f"{override.input_line}: {_expected(keys[key], error)}")
    return problems


def _try_value(key: str, value: Any, tree: words.Tree) -> None:
    group, _, leaf = key.partition(".")
    for schema in tree.schemas.get(group, ()):
        names = OmegaConf.structured(schema)
        if leaf.split(".")[0] in names:
            enum = words.enum_of(tree.keys[key])
            by_value = {str(member.value): member.name for member in enum} if enum else {}
            OmegaConf.update(names, leaf, by_value.get(str(value), value))


def _expected(kind: Any, error: Exception) -> str:
    enum = words.enum_of(kind)
    if enum is not None:
        return "one of " + ", ".join(str(member.value) for member in enum)
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return f"{str(error).strip().splitlines()[0]}; give {name}"


def first_cause(error: BaseException) -> str:
    """Hydra wraps the sentence that helps in others that do not."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]
