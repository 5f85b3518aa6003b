#!/usr/bin/env python3
"""Does things to a training run that should not happen to it, and sees whether it ends as if they had not.

  python tools/chaos.py --faults 25 --seed 1 --out chaos.json

Trains a small model on two ranks of this machine twice: in peace, and with faults at random moments: SIGKILL of a
rank, of the launcher and during a save, SIGSTOP of a rank, a flipped byte and a truncated file in the newest
checkpoint, an emptied tracker, a full disk (for root, who may mount a small one), NaN in a gradient. The final weights
must be equal to the last bit; where a gradient was NaN, to those of a run that leaves out the same samples.

Damage to a file is followed by the SIGKILL of a rank, so that the file is read. The iterations since that checkpoint
are lost by the kill; those counted as lost by the damage are the ones between it and the checkpoint that is taken.

Prints a table, writes a report, and ends with status 1 where a fault was not noticed, not recovered from, cost more
than one save interval, or left a trace in the weights. Takes some ten seconds a fault.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

_TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(_TOOLS), str(_TOOLS.parent)]

from chaos_run import faults, report  # noqa: E402
from chaos_run.ordeal import ordeal  # noqa: E402
from chaos_run.subject import Subject  # noqa: E402

WORDS = [
    "model=tiny", "model.num_layers=4", "model.hidden_size=128", "model.seq_length=128", "tokenizer.vocab_size=512",
    "data.embedded_megabytes=0.5", "data.split='90,10,0'", "train.micro_batch_size=4", "train.global_batch_size=16",
    "train.eval_interval=null", "train.eval_iters=0", "optim.lr=1e-3", "precision=fp32", "cluster=local_cpu",
    "cluster.nproc_per_node=2", "cluster.omp_num_threads=1", "model.compile_ops=false", "checkpoint.keep_last=3",
    "parallel.use_distributed_optimizer=true", "logging=plain", "cluster.max_restarts=1000",
]  # fmt: skip
"""Of the run; words after -- are added."""

ITERATIONS_A_FAULT = 12


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=25, help="how many (25)")
    parser.add_argument("--seed", type=int, default=1, help="which, when and to whom (1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the report goes")
    parser.add_argument("--kinds", default=",".join(faults.KINDS), help="which kinds, separated by commas (all)")
    parser.add_argument("--save-interval", type=int, default=8, metavar="N", help="iterations between saves (8)")
    parser.add_argument("--dir", type=Path, help="where the two runs lie, and stay (a temporary directory)")
    parser.add_argument("words", nargs="*", metavar="key=value", help="further words of scale-llm for both runs")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := sorted(set(kinds) - set(faults.KINDS)):
        parser.error(f"--kinds {','.join(unknown)}: not known; some of {','.join(faults.KINDS)}")
    if arguments.faults < 1:
        parser.error(f"--faults {arguments.faults}: give at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the runs end with this, as by Ctrl-C
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    top = arguments.dir or Path(tempfile.mkdtemp(prefix="scale_llm_chaos_"))
    try:
        return run(arguments, kinds, top)
    finally:
        if arguments.dir is None:
            shutil.rmtree(top, ignore_errors=True)


def run(arguments: argparse.Namespace, kinds: list[str], top: Path) -> int:
    """Both runs, the comparison, the report; the exit status."""
    disturbed = Subject([], top / "disturbed")
    shutil.rmtree(top / "disturbed", ignore_errors=True)
    shutil.rmtree(top / "undisturbed", ignore_errors=True)
    peaceful, remarks = Subject([], top / "undisturbed"), []
    mounted = "fill_disk" in kinds and faults.small_disk(disturbed.checkpoints)
    if "fill_disk" in kinds and not mounted:
        kinds = [kind for kind in kinds if kind != "fill_disk"]
        remarks.append("fill_disk is left out: mounting a small file system needs root")
    try:
        chance = random.Random(arguments.seed)
        iterations = arguments.save_interval + arguments.faults * ITERATIONS_A_FAULT
        planned = faults.drawn(arguments.faults, kinds, arguments.save_interval + 1, iterations, chance)
        nans = sorted({fault.iteration + 1 for fault in planned if fault.kind == "nan_gradient"})
        words = [
            *WORDS, f"train.train_iters={iterations}", f"checkpoint.save_interval={arguments.save_interval}",
            f"data.cache_dir={top / 'data'}", *arguments.words,
        ]  # fmt: skip
        peaceful.words = [*words, f"train.iterations_to_skip=[{','.join(map(str, nans))}]"]
        disturbed.words = [*words, f"health.drill_nan_gradients=[{','.join(map(str, nans))}]"]
        results = ordeal(peaceful, disturbed, planned, chance)
        equal, difference = report.compared(peaceful.checkpoints, disturbed.checkpoints, iterations)
    finally:
        peaceful.end()
        disturbed.end()
        if mounted:
            faults.unmount(disturbed.checkpoints)
    found = report.summary(results, equal, difference, arguments.save_interval, arguments.seed, remarks)
    report.print_report(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_name(f".{arguments.out.name}.partial")
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, arguments.out)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
