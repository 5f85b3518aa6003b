"""The ranks of a chat: this process is rank 0 and has the terminal; the others are started for it, and follow it.

Another rank: python -m scale_llm.launch.chat DIRECTORY, where config.yaml is.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.io import load_config, save_config
from scale_llm.config.resolve import ranks_needed
from scale_llm.config.run import RunConfig
from scale_llm.config.stage import GenerateConfig
from scale_llm.launch.environment import Joined
from scale_llm.launch.local import set_environment
from scale_llm.launch.processes import free_port
from scale_llm.launch.rank import die_with_parent

if TYPE_CHECKING:
    from scale_llm.stages.chat import ChatModel

LONGEST = 4096
"""Tokens of a conversation where model.seq_length is not given: the cache for all that a model was trained for may be
larger than its weights."""

SECONDS_TO_SAY = 2
"""That rank 0 has for what is wrong on all ranks, before another rank's end is taken for the cause."""


def chat_config(checkpoint: str, words: list[str]) -> RunConfig:
    """The configuration of a chat with a checkpoint: that of stage=generate, but for data. words: key=value.

    Raises:
        UserError: every problem that can be known before the model is loaded.
    """
    from scale_llm.launch.runs import compose_run, problems

    fixed = ["stage=generate", "model=from_checkpoint", f"checkpoint.load='{_checkpoints(checkpoint)}'"]
    plan = compose_run([*fixed, *words], fill=_fill)
    found = [problem for problem in problems(plan) if not problem.startswith("data.path=null")]  # it is asked instead
    if plan.cfg.tokenizer.path is None:
        found.append("tokenizer.path=null: the checkpoint has no tokenizer beside it; give tokenizer.path=DIR")
    if found:
        raise UserError(found)
    return plan.cfg


def _checkpoints(path: str) -> Path:
    """The directory itself, or that of the checkpoints in a run directory."""
    given = Path(path).expanduser()
    with contextlib.suppress(ValueError):
        if latest_checkpoint(given) is None and (given / "checkpoints").is_dir():
            return given / "checkpoints"
    return given


def _fill(cfg: RunConfig, given: set[str]) -> None:
    """What a chat has otherwise than a run, where the words do not say it."""
    assert isinstance(cfg.stage, GenerateConfig)
    if "model.seq_length" not in given:
        cfg.model.seq_length = min(cfg.model.seq_length, LONGEST)
    # An answer never gets more than the conversation leaves
    cfg.stage.max_new_tokens = min(cfg.stage.max_new_tokens, cfg.model.seq_length - 1)
    if "cluster.nproc_per_node" not in given:
        cfg.cluster.nproc_per_node = ranks_needed(cfg.parallel)
    if "model.compile_ops" not in given:
        cfg.model.compile_ops = False  # the first answer would wait for the compiler, and one row gains little


@contextlib.contextmanager
def chat_model(cfg: RunConfig) -> Iterator["ChatModel"]:
    """Starts the other ranks, loads the model on all, and ends them."""
    world = cfg.cluster.nproc_per_node or 1
    set_environment(cfg)
    port = free_port()
    os.environ.update(_rank(0, world, port).variables())
    quiet()
    with tempfile.TemporaryDirectory(prefix="scale_llm_chat_") as directory:
        save_config(cfg, Path(directory))
        peers = [_start(rank, world, port, Path(directory)) for rank in range(1, world)]
        try:
            model = _loaded(cfg)
            yield model
            for peer in peers:
                peer.may_end = True
            model.close()
        finally:
            for peer in peers:
                peer.end()


@dataclass(frozen=True, slots=True)
class _NoData:
    """What a rank must know of the data where there are none."""

    tokenizer_path: str
    vocab_size: int


def _loaded(cfg: RunConfig) -> "ChatModel":
    """The model on this rank."""
    from scale_llm.data.tokenizer import Tokenizer
    from scale_llm.stages.context import start_rank

    tokenizer = Tokenizer.load(cfg.tokenizer.path or "", cfg.tokenizer.eod_token)
    run = start_rank(cfg, _NoData(tokenizer.path, tokenizer.vocab_size))
    from scale_llm.stages.chat import ChatModel  # imports megatron-core, which has been adapted to a CPU by now

    return ChatModel(run)


def quiet() -> None:
    """No advice to the libraries' own developers."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _rank(rank: int, world: int, port: int) -> Joined:
    return Joined(
        rank=rank, world_size=world, local_rank=rank, local_world_size=world, master_addr="127.0.0.1",
        master_port=port, starter="chat",
    )  # fmt: skip


class _Peer:
    """Another rank, its output in a file, and a thread that waits for it: collectives would for a long time."""

    def __init__(self, rank: int, process: subprocess.Popen, log: Path):
        self._rank, self._process, self._log = rank, process, log
        self.may_end = False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = self._process.wait()
        time.sleep(SECONDS_TO_SAY)
        if self.may_end:
            return
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print("\n".join(["", f"rank {self._rank} ended with status {status}:", *lines]), file=sys.stderr, flush=True)
        os._exit(1)

    def end(self) -> None:
        """At once, unless it has been told to end by itself."""
        if self.may_end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
        self.may_end = True
        self._process.kill()


def _start(rank: int, world: int, port: int, directory: Path) -> _Peer:
    log = directory / f"rank_{rank}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "scale_llm.launch.chat", str(directory)],
            env={**os.environ, **_rank(rank, world, port).variables()},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return _Peer(rank, process, log)


def main() -> None:
    """One of the other ranks."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: rank 0 says what it means
    quiet()
    _loaded(load_config(Path(sys.argv[1]))).follow()


if __name__ == "__main__":
    main()
