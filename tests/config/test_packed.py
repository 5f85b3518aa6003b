"""Layers under packed rows: which `auto` is, and which are refused before ranks start."""

import pytest
from support.configs import config_of

from scale_llm.config.machine import Machine
from scale_llm.config.model import Backend
from scale_llm.config.packed import packing_problems
from scale_llm.config.resolve import resolve
from scale_llm.config.roles import role_config

MACHINE = Machine(cores=2, gpus=4, fast_bf16_cpu=False, compiler=True)
CP2, PADDED = "parallel.context_parallel_size=2", "stage.batching=padded"

PACKED = {
    "stage=sft": "stage.batching=packed",
    "stage=dpo stage.batching=padded": "stage.loss=dpo",
    "stage=dpo stage.loss=kto stage.batching=padded": "stage.loss=kto",
    "stage=score": "stage=score",
    "stage=ppo": "stage=ppo",
    "stage=grpo": "stage=grpo",
}
"""Runs, and what has them pack."""
NOT_PACKED = ("stage=pretrain", "stage=sft stage.batching=padded", "stage=dpo stage.loss=simpo stage.batching=padded")


def settled(*words):
    return resolve(config_of(*words, "cluster.nproc_per_node=4"), MACHINE)


@pytest.mark.parametrize("run", PACKED)
def test_runs_that_pack(run):
    """Padding is a way out only where nothing else packs."""
    assert settled(*run.split()).model.backend is Backend.auto
    cut = settled(*run.split(), CP2)
    assert cut.model.backend is Backend.torch and packing_problems(cut) == []
    (local,) = packing_problems(settled(*run.split(), "model.backend=local"))
    (fused,) = packing_problems(settled(*run.split(), "model.backend=transformer_engine", CP2))
    assert packing_problems(settled(*run.split(), "model.backend=transformer_engine")) == []
    assert local.startswith(f"{PACKED[run]}: model.backend=local") and fused.startswith(f"{PACKED[run]}: packs")
    assert CP2 in fused and (PADDED in local) == (PADDED in fused) == (run == "stage=sft")


@pytest.mark.parametrize("run", NOT_PACKED)
def test_runs_that_do_not(run):
    assert settled(*run.split(), CP2).model.backend is Backend.auto
    for backend in ("local", "transformer_engine"):
        assert packing_problems(settled(*run.split(), CP2, f"model.backend={backend}")) == []


def test_roles_with_sizes_of_their_own():
    """The rollout packs nothing; it has the actor's layers, whose weights it gets."""
    own = ["stage=ppo", "layout.critic.context_parallel_size=2"]
    cfg = settled(*own)
    backends = {role: role_config(cfg, role).model.backend for role in ("actor", "rollout", "reference", "critic")}
    assert backends.pop("critic") is Backend.torch and set(backends.values()) == {Backend.auto}
    (problem,) = packing_problems(settled(*own, "model.backend=transformer_engine"))
    assert "layout.critic.context_parallel_size=2" in problem
    cfg = settled("stage=grpo", "layout.actor.context_parallel_size=2")
    assert [role_config(cfg, role).model.backend for role in ("actor", "rollout")] == [Backend.torch] * 2
    cut = ["stage=grpo", "layout.rollout.context_parallel_size=2", "model.backend=transformer_engine"]
    assert packing_problems(settled(*cut)) == []
