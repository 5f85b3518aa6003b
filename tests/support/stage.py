"""What ranks do in the tests of whole runs."""

import resource
import signal

import torch

from scale_llm import stages
from scale_llm.config.errors import UserError
from scale_llm.config.io import load_config


def run(run_dir: str, limit_bytes: int | None = None) -> list[str]:
    """The stage of a prepared run directory; returns the problems it ended with."""
    if limit_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        stages.run(load_config(run_dir))
    except UserError as error:
        return list(error.problems)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return []


def differences(paths: list[str]) -> dict[str, float]:
    """Every tensor of two checkpoints compared, read with torch's own reader."""
    first, second = (checkpoint_tensors(path) for path in paths)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return {name: _difference(first[name], second[name]) for name in first}


def checkpoint_tensors(path: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item(), 1e-300)


def run_gathering(run_dir: str) -> list[str]:
    """The same with the distributed optimizer's state gathered before it is saved, as megatron-core does."""
    from scale_llm.engine import state

    state.sharded_ranges = lambda *arguments: None
    return run(run_dir)


def run_without_memory(run_dir: str) -> tuple[list[str], str]:
    """The same, but in the second step the loss asks for more memory than there is; also what the log says."""
    import io

    from scale_llm.losses.language_model import language_model_loss
    from scale_llm.stages import pretrain

    calls = 0

    def lacking(logits, batch, **keys):
        nonlocal calls
        calls += 1
        if calls == 2:
            torch.empty(1 << 50, dtype=torch.uint8)
        return language_model_loss(logits, batch, **keys)

    pretrain.language_model_loss, log = lacking, io.StringIO()
    try:
        stages.run(load_config(run_dir), log=log)
    except UserError as error:
        return [type(error).__name__, *error.problems], log.getvalue()
    return [], log.getvalue()
