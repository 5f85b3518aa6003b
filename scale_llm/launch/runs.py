"""One run, from words to ranks: compose, check, write the run directory, prepare data, start or join ranks."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from scale_llm.config.cluster import Launcher
from scale_llm.config.errors import UserError
from scale_llm.config.machine import Machine, detect, node_of_job
from scale_llm.config.memory import memory_warnings
from scale_llm.config.resolve import resolve
from scale_llm.config.run import RunConfig
from scale_llm.config.validate import problems_of
from scale_llm.config.validate_positions import position_problems
from scale_llm.launch import from_checkpoint
from scale_llm.launch.environment import Joined, cores_of_task, joined
from scale_llm.launch.lock import held
from scale_llm.launch.policy_checks import role_problems
from scale_llm.launch.run_directory import greeting, prepare_run_dir, tracker_problems


@dataclass(kw_only=True, slots=True)
class Planned:
    """A composed, resolved configuration and where it will run."""

    cfg: RunConfig
    machine: Machine
    join: Joined | None
    identity: str
    """Digest of what the user asked for, the same on every node whatever its machine."""
    given: set[str]
    """Keys and groups of the command line."""

    @property
    def is_job(self) -> bool:
        """Whether Slurm is to start the ranks: asked for, and not yet done."""
        return self.join is None and self.cfg.cluster.launcher is Launcher.slurm


def compose_run(
    words: list[str], point: str | None = None, fill: Callable[[RunConfig, set[str]], None] | None = None
) -> Planned:
    """Compose and resolve; `point` is the subdirectory of one point of a sweep.

    fill: completes the configuration, told the keys that the user has given, before it is resolved. A job is resolved
    for a node of which nothing is known, and what depends on the node is settled there (`slurm/task.py`).
    """
    from scale_llm.config.compose import compose_with_unset
    from scale_llm.config.overrides import given_keys

    (cfg, unset), join = compose_with_unset(words), joined()
    if cfg.model.name == from_checkpoint.NAME:
        from_checkpoint.take_model(cfg, unset)
    given = given_keys(words)
    if fill is not None:
        fill(cfg, given)
    is_job = join is None and cfg.cluster.launcher is Launcher.slurm
    machine = node_of_job(cfg.cluster.gpus_per_node or 0) if is_job else detect()
    machine = replace(machine, cores_of_rank=cores_of_task(join, machine.cores, os.environ))
    if join is not None:
        cfg.cluster.nnodes, cfg.cluster.nproc_per_node = join.nnodes, join.local_world_size
    if point is not None:
        base = Path(resolve(cfg, machine).run_dir)
        cfg.run_dir = str(base / point)
        cfg.data.cache_dir = cfg.data.cache_dir or str(base / "data")  # text is indexed once for all points
        if cfg.checkpoint.save is not None:  # else one point would go on from another's checkpoints
            cfg.checkpoint.save = str(Path(cfg.checkpoint.save) / point)
    identity = hashlib.sha256(json.dumps(asdict(cfg), default=str).encode()).hexdigest()
    return Planned(cfg=resolve(cfg, machine), machine=machine, join=join, identity=identity, given=given)


def problems(plan: Planned) -> list[str]:
    """Everything wrong with a run that can be known before its data are read."""
    found = problems_of(plan.cfg, plan.machine) + tracker_problems(plan.cfg)
    found += from_checkpoint.huggingface_problems(plan.cfg) + role_problems(plan.cfg)
    found += position_problems(plan.cfg, plan.given)
    if plan.join is None and not plan.is_job and plan.cfg.cluster.nnodes > 1:
        found.append(
            f"cluster.nnodes={plan.cfg.cluster.nnodes}: ranks are started on this machine alone; "
            "start the command on every node with srun or torchrun, take cluster=slurm, or set cluster.nnodes=1"
        )
    if plan.cfg.data.path is not None or plan.cfg.data.temperature != 1:
        from scale_llm.data.sources import path_problems

        found.extend(path_problems(plan.cfg.data.path, temperature=plan.cfg.data.temperature))
    if plan.cfg.data.fim_rate > 0:
        from scale_llm.data.tokenizer_json import fim_problems

        try:
            found.extend(fim_problems(plan.cfg.data, plan.cfg.tokenizer.path, plan.cfg.tokenizer.special_tokens))
        except UserError as error:  # no such file
            found.extend(error.problems)
    return found


def validate(plan: Planned) -> None:
    """Raise UserError with every problem; print what may become one."""
    if found := problems(plan):
        raise UserError(found)
    if plan.join is None or plan.join.local_rank == 0:
        for warning in memory_warnings(plan.cfg, plan.machine):
            print(f"warning: {warning}", file=sys.stderr, flush=True)


def check(plan: Planned) -> int:
    """Print the plan; nothing is written and nothing started."""
    from scale_llm.launch.mixture_table import print_mixture
    from scale_llm.launch.plan_table import print_plan

    validate(plan)
    print_plan(plan.cfg)
    print_mixture(plan.cfg)
    return 0


def show(plan: Planned) -> int:
    """Print the configuration."""
    from scale_llm.config.io import to_yaml

    print(to_yaml(plan.cfg), end="")
    return 0


def data_problems(plan: Planned) -> list[str]:
    """Those that making the data meets: this machine may be unfit for the ranks."""
    of_ranks = ("cluster.", "parallel.", "layout.", "precision.", "model.backend", "model.compile_ops",
                "train.cuda_graph_impl")  # fmt: skip
    return [problem for problem in problems(plan) if not problem.startswith(of_ranks)]


def prepare(plan: Planned) -> int:
    """Make the run's data and nothing else: a start of the run finds them."""
    if found := data_problems(plan):
        raise UserError(found)
    from scale_llm.launch.preparation import prepare_data

    prepare_data(plan.cfg)
    print(f"data.cache_dir={plan.cfg.data.cache_dir}: the data of this run are there")
    return 0


def dry_run(plan: Planned) -> int:
    """Print the job script; nothing is written and nothing submitted."""
    from scale_llm.launch.slurm.submit import submit_points

    validate(plan)
    return submit_points([("", plan.cfg)], dry_run=True)


def execute(plan: Planned) -> int:
    """Run it to its end; returns the exit status."""
    validate(plan)
    if plan.join is not None:
        from scale_llm.launch.join import join_ranks

        join_ranks(plan.cfg, plan.join, plan.identity)
    if plan.is_job:
        from scale_llm.launch.slurm.submit import submit

        return submit(plan.cfg)
    from scale_llm.launch.local import launch

    with held(plan.cfg.run_dir):
        open_run(plan.cfg)
        return launch(plan.cfg)


ACTIONS: dict[str, Callable[[Planned], int]] = {
    "config": show, "check": check, "prepare": prepare, "dry_run": dry_run, "run": execute,
}  # fmt: skip
"""What the command line may ask for."""


def open_run(cfg: RunConfig) -> None:
    """What one process does before ranks start: the run directory, then the data."""
    print(greeting(cfg), flush=True)
    kept = prepare_run_dir(cfg)
    if kept is not None:
        print(f"the configuration has changed; the former one is {kept}", flush=True)
    from scale_llm.launch.preparation import prepare_data

    prepare_data(cfg)
