"""The same bytes as megatron-core's own, from any number of processes, and from a run that was killed and went on."""

import gzip
import json
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from scale_llm.data.index_processes import WorkerKilled
from scale_llm.data.index_units import Span, units_of
from scale_llm.data.index_work import IndexSettings, temporary_ending
from scale_llm.data.indexing import index_files
from scale_llm.data.megatron import DType, IndexedDataset, IndexedDatasetBuilder
from scale_llm.data.prepare import PreparedData
from scale_llm.data.tokenizer import Tokenizer

UNIT_BYTES = 4000
TEXTS = [f"Document {i}: naïve 漢字 🦊, it's {'very ' * (i % 40)}long.\n\n  End\t{i * 37}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(embedded: PreparedData) -> Tokenizer:
    return Tokenizer.load(embedded.tokenizer_path, "<|endoftext|>")


@pytest.fixture(scope="module")
def settings(tokenizer: Tokenizer) -> IndexSettings:
    return IndexSettings(
        tokenizer=tokenizer.path, eod_token="<|endoftext|>", dtype="uint16", text_field="text",
        max_document_bytes=1 << 20, drop_bad_rows=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The texts in order: plain, gzipped and as Parquet of small groups."""
    top = tmp_path_factory.mktemp("files")
    rows = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (top / "a.jsonl").write_text("".join(rows[:120]))
    (top / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[120:150]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[150:]}), top / "c.parquet", row_group_size=10)
    return [str(top / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]


@pytest.fixture(scope="module")
def by_megatron(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """(.bin, .idx) as megatron-core's builder writes them, a document at a time."""
    prefix = str(tmp_path_factory.mktemp("megatron") / "x")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(prefix + ".idx")
    return pair(prefix)


def pair(prefix: str | Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_are_megatrons(files, settings, by_megatron, tmp_path: Path, workers: int):
    seen: list[int] = []
    counts = index_files(
        files, settings, str(tmp_path / "x"), tmp_path / "parts", workers=workers, unit_bytes=UNIT_BYTES,
        on_bytes=seen.append,
    )  # fmt: skip
    assert pair(tmp_path / "x") == by_megatron
    assert (counts.num_documents, counts.num_bytes) == (len(TEXTS), sum(len(text.encode()) for text in TEXTS))
    dataset = IndexedDataset(str(tmp_path / "x"), mmap=True)
    assert len(dataset) == len(TEXTS) and dataset.index.dtype is np.uint16
    assert counts.num_tokens == sum(map(len, dataset))


def test_a_killed_run_goes_on(files, settings, by_megatron, tmp_path: Path):
    """A process is killed after some units: they are not done again, the rest is, and the files are the same."""
    seen: list[int] = []

    def kill(count: int) -> None:
        seen.append(count)
        if len(seen) == 6:
            for child in psutil.Process().children():
                if any("index_worker" in word for word in child.cmdline()):
                    child.kill()

    call = {"prefix": str(tmp_path / "x"), "parts": tmp_path / "parts", "workers": 2, "unit_bytes": UNIT_BYTES}
    with pytest.raises(WorkerKilled, match="goes on from here"):
        index_files(files, settings, **call, on_bytes=kill)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.json")}
    assert 0 < len(done) < len(units_of(files, UNIT_BYTES)) and not (tmp_path / "x.idx").exists()
    (tmp_path / "parts" / f"000099.bin{temporary_ending('1')}").write_text("half")
    index_files(files, settings, **call)
    assert pair(tmp_path / "x") == by_megatron
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list((tmp_path / "parts").glob("*.tmp-*"))


def test_an_interruption_of_this_process_alone_ends_the_others(files, settings, by_megatron, tmp_path: Path):
    """As by `kill -INT`, where Ctrl-C goes to all: what they have not begun they do not begin."""
    unit_bytes = 300
    units, seen = len(units_of(files, unit_bytes)), []

    def interrupt(count: int) -> None:
        seen.append(count)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    call = {"prefix": str(tmp_path / "x"), "parts": tmp_path / "parts", "workers": 2, "unit_bytes": unit_bytes}
    with pytest.raises(KeyboardInterrupt):
        index_files(files, settings, **call, on_bytes=interrupt)
    assert len(list((tmp_path / "parts").glob("*.json"))) < units
    assert not [child for child in psutil.Process().children() if "scale_llm.data.index_worker" in child.cmdline()]
    index_files(files, settings, **call)
    assert pair(tmp_path / "x") == by_megatron


def test_a_unit_that_lost_bytes_is_done_again(files, settings, by_megatron, tmp_path: Path):
    call = {"prefix": str(tmp_path / "x"), "parts": tmp_path / "parts", "workers": 1, "unit_bytes": UNIT_BYTES}
    index_files(files, settings, **call)
    first = tmp_path / "parts" / "000000.bin"
    first.write_bytes(first.read_bytes()[:-2])
    index_files(files, settings, **call)
    assert pair(tmp_path / "x") == by_megatron


def test_units_are_all_of_the_files_and_cut_at_ends_of_lines(files, tmp_path: Path):
    text = tmp_path / "t.txt"
    text.write_text("a line\n" * 300 + "\n" + "more\n\n" * 2000)
    units = units_of([*files, str(text)], UNIT_BYTES)
    for file in (files[0], str(text)):
        spans = [span for unit in units for span in unit if span.file == file]
        content = Path(file).read_bytes()
        assert len(spans) > 2 and [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
        assert (spans[0].start, spans[-1].end) == (0, len(content))
        assert all(content[span.end - 1 : span.end] == b"\n" for span in spans)
    assert all(content[span.end - 2 : span.end] == b"\n\n" for span in spans), "text is cut at blank lines"
    assert [span for unit in units for span in unit if span.file == files[1]] == [Span(files[1])]
    assert len(units_of([*files, str(text)])) == 1
