"""Cross-field validation: every problem of a resolved configuration at once, before anything is started.

Each function returns sentences of the form `key=value: what is wrong; what to do`. Pure but for `_run_dir` and
`_checkpoint`, which look at the file system.
"""

from collections.abc import Callable

from scale_llm.config.cluster import Device, Launcher
from scale_llm.config.errors import UserError
from scale_llm.config.machine import Machine
from scale_llm.config.memory import memory_problems
from scale_llm.config.packed import packing_problems
from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.config.unused import unused_problems
from scale_llm.config.validate_batch import batch_problems
from scale_llm.config.validate_cluster import cluster_problems
from scale_llm.config.validate_files import file_problems
from scale_llm.config.validate_graphs import graph_problems
from scale_llm.config.validate_layout import layout_problems
from scale_llm.config.validate_model import model_problems
from scale_llm.config.validate_peft import peft_problems
from scale_llm.config.validate_policy import role_layout_problems
from scale_llm.config.validate_precision import gpu_problems
from scale_llm.config.validate_values import sign_problems, value_problems

Rule = Callable[[RunConfig], list[str]]

ARITHMETIC: tuple[Rule, ...] = (layout_problems, model_problems, batch_problems)
"""Rules that divide, and so may assume sizes larger than 0."""

DIVIDED = ("model.", "parallel.", "train.", "cluster.")
"""Groups whose sizes those rules divide by."""


def problems_of(cfg: RunConfig, machine: Machine | None = None) -> list[str]:
    """Every problem of a resolved configuration; on this machine, if one is given."""
    signs = sign_problems(cfg)
    found = signs + value_problems(cfg) + peft_problems(cfg) + graph_problems(cfg) + unused_problems(cfg)
    found += packing_problems(cfg)
    if not any(sign.startswith(DIVIDED) for sign in signs):
        found += [problem for rule in _arithmetic(cfg) for problem in rule(cfg)]
    found += cluster_problems(cfg.cluster) + file_problems(cfg)
    if machine is not None:
        found += machine_problems(cfg, machine)
        found += [] if found else memory_problems(cfg, machine)  # of sizes that fit each other
    return found


def _arithmetic(cfg: RunConfig) -> tuple[Rule, ...]:
    """Where every role has a layout of its own, there is none of the run."""
    if isinstance(cfg.stage, PolicyStageConfig):
        return (role_layout_problems, model_problems, batch_problems)
    return ARITHMETIC


def validate(cfg: RunConfig, machine: Machine | None = None) -> None:
    """Raise UserError with every problem."""
    if found := problems_of(cfg, machine):
        raise UserError(found)


def machine_problems(cfg: RunConfig, machine: Machine) -> list[str]:
    """GPUs and compilers that are asked for and not there."""
    found = []
    if cfg.model.compile_ops and machine.compiler is False:
        found.append(
            "model.compile_ops=true: torch.compile needs a C++ compiler (g++) and Python's headers (python3-dev), "
            "which are not found; install them or set model.compile_ops=false"
        )
    return found + _gpu_problems(cfg, machine) + gpu_problems(cfg, machine)


def _gpu_problems(cfg: RunConfig, machine: Machine) -> list[str]:
    if cfg.cluster.device is not Device.cuda:
        return []
    if machine.gpus == 0 and cfg.cluster.launcher is Launcher.slurm:
        return ["cluster.device=cuda: the job asks for no GPUs; set cluster.gpus_per_node, or cluster.device=cpu"]
    if machine.gpus == 0:
        return ["cluster.device=cuda: no NVIDIA GPU that torch can use is visible here; set cluster.device=cpu"]
    if (cfg.cluster.nproc_per_node or 1) > machine.gpus:
        return [
            f"cluster.nproc_per_node={cfg.cluster.nproc_per_node}: this machine has {machine.gpus} GPUs; "
            f"set cluster.nproc_per_node={machine.gpus} or less"
        ]
    return []
