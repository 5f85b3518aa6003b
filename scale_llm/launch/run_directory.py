"""The run directory: what is in it before ranks start, and where a rerun goes on."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from scale_llm import __version__
from scale_llm.config.io import save_config, write_text
from scale_llm.config.run import RunConfig

LATEST = "latest_checkpointed_iteration.txt"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "tokenizers", "hydra-core")


def latest_iteration(checkpoints: Path) -> int | None:
    """Iteration of the last whole checkpoint; None where there is none."""
    try:
        return int((checkpoints / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def greeting(cfg: RunConfig) -> str:
    """The first line of a run."""
    iteration = latest_iteration(Path(cfg.checkpoint.save or ""))
    if iteration is not None:
        return f"resuming {cfg.run_dir} at iteration {iteration}"
    return f"starting {cfg.run_dir}"


def prepare_run_dir(cfg: RunConfig) -> Path | None:
    """Make the directory, its config.yaml and commit; returns the path of a former, different config."""
    run_dir = Path(cfg.run_dir)
    for name in ("logs", "tensorboard", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    kept = save_config(cfg, run_dir)
    write_text(run_dir / "commit", commit_text())
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
