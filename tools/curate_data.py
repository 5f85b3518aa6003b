#!/usr/bin/env python3
"""Curates raw text: filters, deduplicates, masks personal data, and accounts for every document that it removes.

  python tools/curate_data.py curate=web input='crawl/*.warc.gz' output=curated
  python tools/curate_data.py curate=web input=[a.jsonl.gz,b/] output=curated tasks=8 curate.text=content
  python tools/curate_data.py curate=web input=crawl/ output=curated 'curate.language.languages=[en,de]' \\
      'curate.decontaminate.against=[gsm8k_test.jsonl]'
  python tools/curate_data.py curate=duplicates input=books/ output=unique
  python tools/curate_data.py cluster=slurm cluster.partition=cpu cluster.time=4:00:00 input=... output=/shared/curated

The same command again goes on where a run was stopped. Reads WARC, JSONL, JSON, Parquet and text, compressed or not;
writes output/documents/*.jsonl.gz, output/removed/ and output/report.md, .html, .png and .json.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale_llm.config.curate import CurationConfig  # noqa: E402
from scale_llm.config.curate_compose import TREE, compose_curation  # noqa: E402
from scale_llm.config.errors import UserError, numbered  # noqa: E402
from scale_llm.config.store import options  # noqa: E402


def keys_text() -> str:
    """Groups with their options, and every key with its default; cluster.* are those of scale-llm."""
    groups = [f"  {group:<8} {' '.join(options(group))}" for group in TREE.groups]
    defaults = dict(_defaults(CurationConfig(input="???", output="???"), ""))
    keys = [f"  {key}={defaults[key]}" for key in TREE.keys if not key.startswith("cluster.")]
    meaning = "Their meaning is written under each field in scale_llm/config/curate.py."
    return "\n".join(["groups and their options:", *groups, "", "keys and their defaults:", *keys, "", meaning])


def _defaults(value: Any, prefix: str):
    for field in dataclasses.fields(value):
        inner, key = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from _defaults(inner, f"{key}.")
        else:
            inner = getattr(inner, "value", inner)
            yield (
                key,
                {None: "null", True: "true", False: "false"}.get(inner, inner)
                if not isinstance(inner, list)
                else inner,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=keys_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="print what would be done; start nothing")
    parser.add_argument("words", nargs="*", metavar="key=value", help="input=PATH output=DIR and other keys")
    arguments = parser.parse_intermixed_args()
    try:
        return run(arguments.words, check=arguments.check)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def run(words: list[str], *, check: bool) -> int:
    cfg = compose_curation(words)
    try:
        from scale_llm.curate import executors
        from scale_llm.curate.run import curate, plan
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; pip install '.[curate]'") from error
    if check:
        print("\n".join(plan(cfg)))
        return 0
    executors.end_with_this_process()
    curate(cfg, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
