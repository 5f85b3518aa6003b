"""Data on its way to the ranks. curation: documents per second of one core, against a script of datatrove's blocks that
takes the same steps. indexing: MB of text per second of one core, against a loop over `tokenizers` and datatrove's
Megatron tokenizer, which write the same files. loading: tokens per second made ready for a step, against GPTDataset of
megatron-core under a torch DataLoader."""

import argparse
import functools
import importlib.util
import tempfile
from pathlib import Path

from benchmarks import data_index
from benchmarks.alternate import Contestant, alternate
from benchmarks.data_contestants import write_documents
from benchmarks.data_loading import loading
from benchmarks.rows import Row, faster

HELP = "curation, indexing and loading, against datatrove, a loop over tokenizers, and GPTDataset in a DataLoader"
EXAMPLES = """examples:
  python tools/benchmark.py data --out data.json
  python tools/benchmark.py data --out data.json --source c4_web.jsonl --documents 5000 --rounds 7
"""
SOURCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "c4_web.jsonl"
PARTS = ("curation", "indexing", "loading")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--source", type=Path, default=SOURCE, help="web documents as JSONL, field text")
    parser.add_argument("--documents", type=int, default=2000, help="documents of a round (default: 2000)")
    parser.add_argument("--megabytes", type=float, default=6, help="of Python's library that are indexed (default: 6)")
    parser.add_argument(
        "--million-tokens", type=int, default=100, help="tokens of the made corpus of loading (default: 100)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the alternation (default: 5; medians of them)")


def run(arguments: argparse.Namespace) -> list[Row]:
    parts = {"curation": _curation, "indexing": _indexing, "loading": loading}
    return [row for part in arguments.parts for row in parts[part](arguments)]


def _curation(arguments: argparse.Namespace) -> list[Row]:
    """A round curates all documents, from the file to the report."""
    _require_datatrove()
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "documents.jsonl"
        write_documents(arguments.source, source, arguments.documents)
        contestants = [
            Contestant(
                name=name,
                build=f"benchmarks.data_contestants:{function}",
                arguments={"source": str(source), "work": f"{directory}/{function}", "documents": arguments.documents},
            )
            for name, function in (("ours", "ours"), ("datatrove", "datatrove_script"))
        ]
        alternate(contestants, rounds=max(5, arguments.rounds), threads=1)
    what, name = f"curation of {arguments.documents:,} documents", "datatrove's blocks in a script"
    ours, peer = contestants
    return [
        faster(f"{what}, a core", ours.median_cpu_rate, peer.median_cpu_rate, name, "documents/CPU s"),
        faster(f"{what}, one process", ours.median_rate, peer.median_rate, name, "documents/s"),
    ]


def _indexing(arguments: argparse.Namespace) -> list[Row]:
    """A round indexes all documents: those of Python's library, then those of --source, where it is there."""
    _require_datatrove()
    texts = {"Python's library": functools.partial(data_index.embedded_texts, arguments.megabytes)}
    if arguments.source.is_file():
        texts["web text"] = functools.partial(data_index.web_texts, arguments.source)
    return [row for name, read in texts.items() for row in _indexing_of(name, read(), arguments.rounds)]


def _indexing_of(name: str, texts: list[str], rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        size = data_index.write_texts(texts, Path(directory))
        contestants = [
            Contestant(
                name=who,
                build=f"benchmarks.data_index:{function}",
                arguments={"work": directory, "size": size},
                environment={"TOKENIZERS_PARALLELISM": "false"},
            )
            for who, function in data_index.CONTESTANTS.items()
        ]
        alternate(contestants, rounds=max(5, rounds), threads=1)
        data_index.check_same(Path(directory))
    ours, *peers = contestants
    what = f"indexing of {size / 1e6:.1f} MB of {name}, a core"
    return [
        faster(what, ours.median_cpu_rate / 1e6, peer.median_cpu_rate / 1e6, peer.name, "MB/CPU s") for peer in peers
    ]


def _require_datatrove() -> None:
    if importlib.util.find_spec("datatrove") is None:
        raise SystemExit("datatrove is not installed: pip install -c constraints.txt '.[curate]'")
