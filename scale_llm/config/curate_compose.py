"""conf/curate_data.yaml and the words of tools/curate_data.py -> a typed, validated CurationConfig."""

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scale_llm.config.cluster import ClusterConfig
from scale_llm.config.compose import compose_tree, first_cause
from scale_llm.config.curate import CurateConfig, CurationConfig
from scale_llm.config.data import BadRow
from scale_llm.config.errors import UsageError
from scale_llm.config.overrides import Tree, parse
from scale_llm.config.validate_curate import curation_problems

TREE = Tree(
    root="curate_data",
    groups=("curate", "cluster"),
    schemas={"curate": (CurateConfig,), "cluster": (ClusterConfig,)},
    top={"input": Any, "output": str, "tasks": int | None, "on_bad_row": BadRow},
    hint="python tools/curate_data.py --help lists the keys",
)


def compose_curation(arguments: list[str]) -> CurationConfig:
    """The curation that these words ask for; a UserError names everything that is wrong with it."""
    parsed = parse(arguments, TREE)
    missing = [key for key in ("input", "output") if key not in {override.key_or_group for override in parsed}]
    swept = [str(override.input_line) for override in parsed if override.is_sweep_override()]
    if missing or swept:
        raise UsageError(
            [f"{key}: has no default; give {key}=PATH" for key in missing]
            + [f"{word}: a list is written [a,b], in quotes for the shell" for word in swept]
        )
    tree = compose_tree(parsed, TREE)
    try:
        schema = OmegaConf.structured(CurationConfig(input=None, output=""))
        cfg = OmegaConf.to_object(OmegaConf.merge(schema, tree))
    except (OmegaConfBaseException, TypeError) as error:
        raise UsageError(first_cause(error)) from error
    assert isinstance(cfg, CurationConfig)
    if problems := curation_problems(cfg):
        raise UsageError(problems)
    return cfg
