"""The run directory: what is in it before ranks start, and where a rerun goes on."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from scale_llm import __version__
from scale_llm.config.checkpoint_files import latest_checkpoint, resumable
from scale_llm.config.errors import UserError
from scale_llm.config.io import save_config, write_text
from scale_llm.config.pins import pin
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import UntrainedStageConfig

PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers", "hydra-core")


def tracker_problems(cfg: RunConfig) -> list[str]:
    """A latest_checkpointed_iteration.txt of the run itself that cannot be read. One that is empty or names nothing is
    put right by the ranks, which take the newest whole checkpoint."""
    try:
        latest_checkpoint(cfg.checkpoint.save or "")
    except ValueError:
        return []
    except OSError as error:
        return [f"checkpoint.save={cfg.checkpoint.save}: {error}; make it readable, or remove it"]
    return []


def greeting(cfg: RunConfig) -> str:
    """The first line of a run."""
    if isinstance(cfg.stage, UntrainedStageConfig):
        return f"starting {cfg.run_dir}"
    candidates, wrong = resumable(cfg.checkpoint.save or "")
    if wrong is not None:
        return f"resuming {cfg.run_dir} at its newest whole checkpoint ({wrong})"
    return f"resuming {cfg.run_dir} at iteration {candidates[0][0]}" if candidates else f"starting {cfg.run_dir}"


def prepare_run_dir(cfg: RunConfig) -> Path | None:
    """Make the directory, its config.yaml and commit; returns the path of a former, different config.

    In place, cfg names the checkpoints that this run begins from (`config.pins`).
    """
    pin(cfg)
    run_dir = Path(cfg.run_dir)
    try:
        for name in ("logs", "tensorboard", "checkpoints"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        kept = save_config(cfg, run_dir)
        write_text(run_dir / "commit", commit_text())
    except OSError as error:
        raise UserError(f"run_dir={cfg.run_dir}: cannot be written ({error}); give another directory") from error
    return kept


def commit_text() -> str:
    """JSON: the git revision of the code, whether it was changed, and versions of what it stands on."""
    here = Path(__file__).resolve().parent
    facts = {
        "revision": _git(here, "rev-parse", "HEAD"),
        "changed": bool(_git(here, "status", "--porcelain", "--untracked-files=no")),
        "scale_llm": __version__,
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }
    return json.dumps(facts, indent=2) + "\n"


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
