#!/usr/bin/env python3
"""Hugging Face models <-> torch_dist checkpoints, verified; and what lies in either.

  python tools/convert_checkpoint.py import   HF_DIR CHECKPOINTS
  python tools/convert_checkpoint.py export   CHECKPOINTS HF_DIR
  python tools/convert_checkpoint.py merge    ADAPTERS CHECKPOINTS
  python tools/convert_checkpoint.py verify   A B
  python tools/convert_checkpoint.py inspect  PATH
  python tools/convert_checkpoint.py reshard  CHECKPOINTS OUT --tensor-model-parallel-size 2

Tensors are converted one at a time; a directory appears when it is whole. Under torchrun the work is divided over the
ranks: torchrun --nproc-per-node 4 tools/convert_checkpoint.py import HF_DIR CHECKPOINTS
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scale_llm.config.errors import UserError, numbered  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand a job, each with an example."""
    made = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str, example: str):
        added = commands.add_parser(
            name, help=what, description=what, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run)
        return added

    tool = "python tools/convert_checkpoint.py"
    importing = command(
        "import", run_import,
        "a Hugging Face directory -> a torch_dist checkpoint, tokenizer and model YAML; or peft's adapters",
        f"{tool} import ~/models/Llama-3.2-1B checkpoints/llama\n"
        "  scale-llm model=from_checkpoint checkpoint.load=checkpoints/llama data.path=text.jsonl",
    )  # fmt: skip
    importing.add_argument("source", type=Path, metavar="HF_DIR")
    importing.add_argument("output", type=Path, metavar="OUT")
    importing.add_argument(
        "--base", type=Path, metavar="DIR", help="of adapters: what they belong to (default: what they name themselves)"
    )

    exporting = command(
        "export", run_export, "a checkpoint of a run or an import -> safetensors, config.json, tokenizer",
        f"{tool} export runs/demo/pretrain/checkpoints exported --dtype bfloat16",
    )  # fmt: skip
    exporting.add_argument("source", type=Path, metavar="CHECKPOINTS", help="or one iteration of them, iter_0000100")
    exporting.add_argument("output", type=Path, metavar="OUT")
    exporting.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as saved)")
    exporting.add_argument("--architecture", metavar="CLASS", help="Hugging Face class (default: the first that fits)")
    exporting.add_argument(
        "--merge", action="store_true", help="adapters: into their base, as a whole model (default: in peft's format)"
    )
    exporting.add_argument("--max-shard-size", type=shard_bytes, default="5GB", metavar="SIZE", help="default: 5GB")

    merging = command(
        "merge", run_merge, "a checkpoint of adapters -> a checkpoint of the whole model",
        f"{tool} merge runs/sft/checkpoints merged",
    )  # fmt: skip
    merging.add_argument("source", type=Path, metavar="CHECKPOINTS")
    merging.add_argument("output", type=Path, metavar="OUT")

    verifying = command(
        "verify", run_verify, "are two models the same function? compares tensors, or logits on real text",
        f"{tool} verify ~/models/Llama-3.2-1B checkpoints/llama",
    )  # fmt: skip
    verifying.add_argument("first", type=Path, metavar="A")
    verifying.add_argument("second", type=Path, metavar="B")
    verifying.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (default: 1e-4)")
    verifying.add_argument("--logits", action="store_true", help="compare logits where tensors could be, too")
    verifying.add_argument("--text", type=Path, metavar="FILE", help="real text (default: a source file of Python's)")
    verifying.add_argument("--tokens", type=int, default=256, help="tokens of it (default: 256)")

    inspecting = command(
        "inspect", run_inspect, "names, shapes, number formats, parameters, iteration, who wrote it",
        f"{tool} inspect checkpoints/llama",
    )  # fmt: skip
    inspecting.add_argument("path", type=Path, metavar="PATH")

    resharding = command(
        "reshard", run_reshard, "a checkpoint -> Megatron's older format of fixed shards (mp_rank_00/...)",
        f"{tool} reshard checkpoints/llama shards --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    )  # fmt: skip
    resharding.add_argument("source", type=Path, metavar="CHECKPOINTS")
    resharding.add_argument("output", type=Path, metavar="OUT")
    for axis in ("tensor", "pipeline", "expert"):
        resharding.add_argument(f"--{axis}-model-parallel-size", type=int, default=1, metavar="N", help="default: 1")
    return made


def shard_bytes(text: str) -> int:
    """5GB, 500MB -> bytes."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: give a number and KB, MB or GB, such as 5GB") from None


def run_import(arguments: argparse.Namespace) -> int:
    from scale_llm.checkpoint.huggingface import import_adapters, import_huggingface, is_peft

    with bars(f"importing {arguments.source}") as bar:
        if is_peft(arguments.source):
            import_adapters(arguments.source, arguments.output, bar, base=arguments.base)
        else:
            import_huggingface(arguments.source, arguments.output, bar)
    say(f"{arguments.output}: a checkpoint of iteration 0; train from it with\n"
        f"  scale-llm model=from_checkpoint checkpoint.load={arguments.output} ...")  # fmt: skip
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    import torch

    from scale_llm.checkpoint.huggingface import export_adapters, export_huggingface, is_adapters

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with bars(f"exporting {arguments.source}") as bar:
        if is_adapters(arguments.source) and not arguments.merge:
            export_adapters(arguments.source, arguments.output, bar, dtype=dtype)
            say(f"{arguments.output}: load it with peft's PeftModel.from_pretrained")
            return 0
        export_huggingface(
            arguments.source, arguments.output, bar, dtype=dtype, architecture=arguments.architecture,
            shard_bytes=arguments.max_shard_size,
        )  # fmt: skip
    say(f"{arguments.output}: load it with transformers' from_pretrained")
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    from scale_llm.checkpoint.huggingface import merge_checkpoint

    with bars(f"merging {arguments.source}") as bar:
        merge_checkpoint(arguments.source, arguments.output, bar)
    say(f"{arguments.output}: a checkpoint of the whole model, iteration 0")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from scale_llm.checkpoint.verifying import compare_tensors, same_kind

    if same_kind(arguments.first, arguments.second) and not arguments.logits:
        with bars("comparing tensors", unit="count") as bar:
            found = list(compare_tensors(arguments.first, arguments.second, bar))
    else:
        import inspect

        from scale_llm.checkpoint.computing import compare_outputs, longest, tokens_of

        text = arguments.text.read_text(encoding="utf-8") if arguments.text else inspect.getsource(inspect)
        paths = [arguments.first, arguments.second]
        count = min(arguments.tokens, *(longest(path) or arguments.tokens for path in paths))
        found = list(compare_outputs(*paths, tokens_of(paths, text, count)))
    return print_differences(found, arguments.tolerance)


def print_differences(found, tolerance: float) -> int:
    """A table of the largest differences, worst first, and the verdict; the exit status."""
    from rich import print as show
    from rich.table import Table

    worst = sorted(found, key=lambda d: (d.largest is not None, -(d.largest or 0.0)))
    different = [d for d in worst if d.largest is None or not d.largest <= tolerance]
    table = Table(title=f"largest difference of {len(found)} compared, worst first")
    table.add_column("name")
    table.add_column("largest difference", justify="right")
    for entry in worst[: max(20, len(different))]:
        table.add_row(entry.name, entry.why if entry.largest is None else f"{entry.largest:.3g}")
    show(table)
    if different:
        show(f"not the same function: {len(different)} of {len(found)} differ by more than {tolerance:g}")
        return 1
    show(f"the same function: nothing differs by more than {tolerance:g}")
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    from rich import print as show
    from rich.table import Table

    from scale_llm.checkpoint.describing import describe

    found = describe(arguments.path)
    table = Table(title=str(found.path))
    for name in ("name", "dtype"):
        table.add_column(name, overflow="fold")
    for name in ("tensors", "shape of each"):
        table.add_column(name, justify="right")
    for line in found.lines:
        table.add_row(line.name, line.dtype, str(line.count), " x ".join(map(str, line.shape)) or "1")
    show(table)
    beside = "".join(f", {what} {size / 2**30:.2f} GiB" for what, size in found.beside_bytes.items())
    iteration = "" if found.iteration is None else f", iteration {found.iteration}"
    show(f"{found.kind}: {found.parameters:,} parameters, {found.bytes / 2**30:.2f} GiB{beside}{iteration}")
    show(f"written by: {found.written_by}")
    return 0


def run_reshard(arguments: argparse.Namespace) -> int:
    from scale_llm.checkpoint.resharding import Layout, reshard

    layout = Layout(
        tp=arguments.tensor_model_parallel_size,
        pp=arguments.pipeline_model_parallel_size,
        ep=arguments.expert_model_parallel_size,
    )
    with bars("writing shards", unit="count") as bar:
        reshard(arguments.source, arguments.output, layout, bar)
    say(f"{arguments.output}: {sum(1 for _ in layout.ranks())} shards")
    return 0


@contextlib.contextmanager
def bars(label: str, unit: str = "bytes") -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A progress bar whose total is known later; on the first rank of a job alone."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    hidden = os.environ.get("RANK", "0") != "0"
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, disable=hidden) as shown:

        def started(total: int) -> Callable[[int], None]:
            task = shown.add_task(label, total=total)
            return lambda done: shown.advance(task, done)

        yield started


def say(text: str) -> None:
    """Once a job."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


@contextlib.contextmanager
def job() -> Iterator[None]:
    """The ranks of torchrun work together; otherwise there is one process and no job."""
    if "RANK" not in os.environ:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    arguments = parser().parse_args()
    try:
        with job():
            status = arguments.run(arguments)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        status = 1
    except OSError as error:
        print(f"error: {error}; nothing was left at the output", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped; nothing was left at the output", file=sys.stderr)
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
