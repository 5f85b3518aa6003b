#!/usr/bin/env python3
"""Curates raw text: python tools/curate_data.py curate=web input=crawl/ output=curated [key=value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale_llm.config.curate_compose import compose_curation  # noqa: E402
from scale_llm.config.errors import UserError, numbered  # noqa: E402


def main() -> int:
    try:
        cfg = compose_curation(sys.argv[1:])
        from scale_llm.curate.run import curate

        curate(cfg)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
