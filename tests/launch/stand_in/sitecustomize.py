"""Put first on PYTHONPATH: ranks then run this stage in place of training, and do what HOW says. For launcher tests."""

import os
import signal
import sys
import time
import types
from pathlib import Path


def run(cfg, **_) -> None:
    import torch
    import torch.distributed as dist

    rank, how = int(os.environ["RANK"]), os.environ.get("HOW", "")
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"rank {rank} of {total.item():.0f}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if how in ("wait", "interrupt_lost"):
        wait_for_signal(cfg)
    if rank == 0:
        fail(how)
    if how == "hang_once" and not Path(cfg.run_dir, "hung").exists():
        dist.barrier()
        if rank == 1:
            Path(cfg.run_dir, "hung").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1.0)
        os._exit(76)  # HUNG: what a watchdog does
    if rank == 1 and how == "kill_once" and not Path(cfg.run_dir, "killed").exists():
        Path(cfg.run_dir, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "kill_server_once" and not Path(cfg.run_dir, "killed").exists():
        Path(cfg.run_dir, "killed").touch()
        os.kill(os.getppid(), signal.SIGKILL)
    dist.barrier()
    if rank == 0:
        Path(cfg.checkpoint.save, "iter_0000020").mkdir(exist_ok=True)
        Path(cfg.checkpoint.save, "latest_checkpointed_iteration.txt").write_text("20")
    dist.destroy_process_group()


def fail(how: str) -> None:
    if how == "error":
        raise RuntimeError("boom")
    if how == "user_error":
        from scale_llm.config.errors import UserError

        raise UserError(["a=1: too few; give a=2", "b=1: too many; give b=0"])
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        sys.exit(7)


def wait_for_signal(cfg) -> None:
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, frame: received.append(got))
    Path(cfg.run_dir, f"ready_{os.environ['RANK']}").touch()
    while not received:
        time.sleep(0.05)
    time.sleep(1.0)  # as if saving
    print(f"saved after {received}", flush=True)


class InterruptLost:
    """An import of the launcher in which Ctrl-C is raised where nothing comes of it."""

    def find_spec(self, name, path=None, target=None):
        if name == "scale_llm.launch.forked_ranks":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                print("interrupt lost", file=sys.stderr)


if os.environ.get("HOW") == "interrupt_lost" and "scale_llm.launch.cli" in sys.orig_argv:
    sys.meta_path.insert(0, InterruptLost())  # type: ignore[arg-type]

stages = types.ModuleType("scale_llm.stages")
stages.run = run  # type: ignore[attr-defined]
sys.modules["scale_llm.stages"] = stages
