"""One curation: checked, planned, run or submitted; a rerun goes on where it was stopped."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from scale_llm.config.cluster import Launcher
from scale_llm.config.curate import CurationConfig
from scale_llm.config.errors import UserError
from scale_llm.curate import executors, inputs, sources
from scale_llm.curate.ledger import Begin
from scale_llm.curate.phases import phases_of
from scale_llm.curate.report import REPORT
from scale_llm.data.files import write_json

STATE = "curation.json"
"""Configuration, input files and shards of the output directory that it lies in."""

Say = Callable[[str], None]


def curate(cfg: CurationConfig, say: Say = print) -> Path | list[str]:
    """Runs what is left of a curation and returns the report's path; with cluster=slurm submits it and returns job ids.

    Raises UserError: with every problem of the configuration and its files, or where the output directory holds
    something else.
    """
    found = inputs.find(cfg)
    output = Path(cfg.output).expanduser().resolve()
    with _locked(output):
        _claim(cfg, found, output, say)
        if (output / REPORT).is_file():
            say(f"done before: {_outcome(output)}")
            return output / REPORT
        phases = phases_of(cfg, found, output)
        logs = output / "work" / "logs"
        if cfg.cluster.launcher is Launcher.slurm:
            jobs = executors.submit(phases, logs, cfg.tasks, cfg.cluster)
            say(f"submitted jobs {', '.join(jobs)}; the last writes {output / REPORT}")
            return jobs
        executors.run_here(phases, logs, cfg.tasks, lambda *of: say(_progress(*of)))
        say(_outcome(output))
    return output / REPORT


def plan(cfg: CurationConfig) -> list[str]:
    """What a curation would do, in lines; writes nothing. Raises UserError as `curate` does, but for the output."""
    found = inputs.find(cfg)
    inputs.cut(found, cfg)
    size = sum(os.path.getsize(file) for file in found.files)
    phases = phases_of(cfg, found, Path(cfg.output).expanduser().resolve())
    return [
        f"{len(found.files)} files, {size / 1e6:,.1f} MB, {len(found.shards)} shards",
        *(f"{phase.name}: {', '.join(_names(phase))}, {phase.tasks} tasks" for phase in phases),
    ]


def _outcome(output: Path) -> str:
    found = json.loads((output / REPORT).with_suffix(".json").read_text())
    return (
        f"{found['documents_out']:,} of {found['documents_in']:,} documents kept; what went, and why: {output / REPORT}"
    )


def _names(phase: executors.Phase) -> list[str]:
    """Steps as the report calls them."""
    return [str(step.name) for step in phase.steps if not isinstance(step, Begin)]


def _progress(phase: str, left: int, tasks: int) -> str:
    before = f", {tasks - left} done before" if left < tasks else ""
    return f"{phase}: {tasks} task{'s' * (tasks != 1)}{before}"


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Two runs in one directory would write the same files; the lock goes with the process that holds it."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"output={output}: another curation is at work in it; wait for it, or give another output"
            raise UserError(problem) from None
        except OSError:
            pass  # a file system without locks
        yield


def _claim(cfg: CurationConfig, found: inputs.Inputs, output: Path, say: Say) -> None:
    """Writes down whose directory this is, or refuses one that is another's; fills in the shards."""
    settings = _plain({**asdict(cfg), "tasks": None, "cluster": None, "output": None})
    mine = {"settings": settings, "input": json.loads(json.dumps(found.stamps()))}
    state = output / STATE
    if not state.is_file():
        others = sorted(path.name for path in output.iterdir() if path.name != ".lock")
        if others:
            raise UserError(
                f"output={output}: holds {', '.join(others[:3])} of no curation; give an empty or new directory"
            )
        inputs.cut(found, cfg)
        write_json(state, {**mine, "shards": sources.to_json(found.shards)})
        return
    former = json.loads(state.read_text())
    differences = [*_differences(former["settings"], settings, ""), *_changed(former["input"], mine["input"])]
    if differences:
        raise UserError(
            f"output={output}: holds the curation of another configuration or input ({'; '.join(differences[:5])}); "
            "give another output, or remove the directory"
        )
    found.shards = sources.from_json(former["shards"])
    say(f"going on in {output}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value


def _differences(former: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(former, dict) and isinstance(now, dict):
        for name in {**former, **now}:
            yield from _differences(former.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif former != now:
        yield f"{key}: {former} there, {now} here"


def _changed(former: dict[str, list[Any]], now: dict[str, list[Any]]) -> Iterator[str]:
    for name in now:
        before, after = ({path: rest for path, *rest in table[name]} for table in (former, now))
        yield from (f"{path}: new" for path in after.keys() - before.keys())
        yield from (f"{path}: gone" for path in before.keys() - after.keys())
        yield from (f"{path}: changed" for path in after.keys() & before.keys() if after[path] != before[path])
