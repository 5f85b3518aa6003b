"""Which runs send several sequences through a model in one row, and which layers can do that."""

from scale_llm.config.model import Backend
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.roles import layout_of, parallel_of, roles_of
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import REFERENCE_FREE, Batching, DpoConfig, ScoreConfig, SequenceStageConfig

ROLLOUT = "rollout"
"""The role that reads no packed rows: it generates."""


def packed_by(cfg: RunConfig) -> str | None:
    """What has the run pack rows, as `key=value`; None where it never does."""
    stage = cfg.stage
    if isinstance(stage, DpoConfig) and stage.loss not in REFERENCE_FREE:
        return f"stage.loss={stage.loss.value}"  # the reference's passes, whatever the batching
    if isinstance(stage, SequenceStageConfig) and stage.batching is not Batching.padded:
        return f"stage.batching={stage.batching.value}"
    return f"stage={stage.name}" if isinstance(stage, ScoreConfig | PolicyStageConfig) else None


def packing_problems(cfg: RunConfig) -> list[str]:
    """Layers that cannot take packed rows, at all or cut over context-parallel ranks."""
    what, backend = packed_by(cfg), cfg.model.backend
    if what is None:
        return []
    remedy = "set model.backend=torch" + (", or stage.batching=padded" if what.startswith("stage.batching") else "")
    if backend is Backend.local:
        return [f"{what}: model.backend=local cannot keep sequences that are packed into a row apart; {remedy}"]
    if backend is not Backend.transformer_engine:
        return []
    return [
        f"{what}: packs rows, which with {cut} are cut where Transformer Engine cuts sequences; {remedy}"
        for cut in _cut_by(cfg)
    ]


def _cut_by(cfg: RunConfig) -> list[str]:
    """The keys that cut rows over ranks, with their values."""
    if not isinstance(cfg.stage, PolicyStageConfig):
        size = cfg.parallel.context_parallel_size
        return [f"parallel.context_parallel_size={size}"] if size > 1 else []
    found = []
    try:
        roles = [role for role in roles_of(cfg) if role != ROLLOUT]
    except ValueError:  # of ranks: validation says what is wrong with them
        return []
    for role in roles:
        size = parallel_of(cfg, role).context_parallel_size
        own = layout_of(cfg, role).context_parallel_size is not None
        if size > 1:
            found.append(f"{f'layout.{role}' if own else 'parallel'}.context_parallel_size={size}")
    return list(dict.fromkeys(found))
