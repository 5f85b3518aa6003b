#!/usr/bin/env python3
"""Speed of scale_llm beside its peers, measured in one run.

  python tools/benchmark.py train --out train.json

Prints a table and writes a JSON list of rows: measure, ours, peer, peer_name, ratio (above 1: ours is better), unit.
Contestants take turns, so that a change in the machine's load meets all of them; every number is a median of at least
five rounds. A new benchmark is one module in tools/benchmarks with HELP, EXAMPLES, add_arguments and run.
"""

import argparse
import importlib
import sys
from pathlib import Path

_TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(_TOOLS), str(_TOOLS.parent)]

from benchmarks.rows import print_table, write_rows  # noqa: E402

SUBCOMMANDS = ("train", "sft", "dpo", "rollout", "ppo", "convert", "checkpoint", "data", "collectives", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in SUBCOMMANDS}
    for name, module in modules.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="where the rows go")
    arguments = parser.parse_args()
    rows = modules[arguments.command].run(arguments)
    if rows is None:  # it has written and shown them itself
        return
    print_table(rows, f"scale_llm benchmark: {arguments.command}")
    write_rows(rows, arguments.out)


if __name__ == "__main__":
    main()
