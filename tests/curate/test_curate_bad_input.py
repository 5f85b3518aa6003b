"""Whatever cannot be read is counted with its file and line, and what can be read around it is read."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from curate.conftest import command, documents, environment, removed
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

GIB = 1 << 30

# A process counts what the one that started it held, so a small one starts the tool and says how much the tool took
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(status)
"""


def _rows(name: str, count: int) -> bytes:
    return b"".join(json.dumps({"text": f"{name} has a document number {i}"}).encode() + b"\n" for i in range(count))


def _write_jsonl(folder: Path) -> None:
    (folder / "good.jsonl").write_bytes(b"\xef\xbb\xbf" + _rows("good", 2) + b"\n")
    (folder / "latin.jsonl").write_bytes(_rows("latin", 1) + '{"text": "caf\xe9"}\n'.encode("latin-1") + _rows("l", 1))
    rows = [
        '{"body": "x"}',
        '{"text": 3}',
        "[1]",
        "{",
        '{"text": " "}',
        r'{"text": "\ud800"}',
        '{"text": "a last row"}',
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "array.json").write_text('[{"text": "first of an array"}, 7]')
    with open(folder / "large.jsonl", "wb") as stream:  # a hole: it takes no place on the disk
        stream.write(_rows("before", 1) + b'{"text": "')
        stream.seek(GIB, io.SEEK_CUR)
        stream.write(b'"}\n' + _rows("after", 1))


def _write_compressed(folder: Path) -> None:
    for name, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd}.items():
        whole = compress(_rows(name, 1000))
        (folder / f"whole.jsonl.{name}").write_bytes(whole)
        (folder / f"cut.jsonl.{name}").write_bytes(whole[: len(whole) * 2 // 3])


def _zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _write_tables(folder: Path) -> None:
    table = pyarrow.table({"text": ["a row of a table", None, "another row of it"], "day": [1, 2, 3]})
    pyarrow.parquet.write_table(table, folder / "good.parquet")
    pyarrow.parquet.write_table(table.drop_columns(["text"]), folder / "nofield.parquet")
    (folder / "broken.parquet").write_bytes((folder / "good.parquet").read_bytes()[:-30])


PAGE = "<html><head><title>T</title></head><body><article><p>{}</p></article></body></html>"
SENTENCES = "The library opens at nine and closes at six, and on Sundays it stays closed all day long. Bring a card. "


def _write_warc(folder: Path) -> None:
    def record(writer: WARCWriter, number: int, body: bytes, kind: str, status: str = "200 OK") -> None:
        headers = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.0")
        url = f"https://library.example.org/{number}"
        writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(body), http_headers=headers))

    for name in ("pages.warc.gz", "cut.warc.gz", "cut.warc"):
        with open(folder / name, "wb") as stream:
            writer = WARCWriter(stream, gzip=name.endswith(".gz"))
            record(
                writer, 1, PAGE.format(f"{name} café {SENTENCES * 3}").encode("latin-1"), "text/html; charset=latin-1"
            )
            record(writer, 2, b"\x89PNG", "image/png")
            record(writer, 3, b"gone", "text/html", "404 Not Found")
            record(writer, 4, b"<html><body></body></html>", "text/html")
            record(writer, 5, PAGE.format(f"{name} last {SENTENCES * 3}").encode(), "text/html")
        if name.startswith("cut"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) - 100])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The output, and the MiB that the largest process of the tool held."""
    top = tmp_path_factory.mktemp("bad")
    (top / "in").mkdir()
    for write in (_write_jsonl, _write_compressed, _write_tables, _write_warc):
        write(top / "in")
    (top / "in" / "book.txt").write_bytes(b"A first line.\n\xff\xfe\nA third line.\n\n")
    (top / "in" / "notes.md").write_text("not of a known kind")
    words = ["curate=duplicates", f"input={top / 'in'}", f"output={top / 'out'}", "tasks=2",
             "curate.near.enabled=false", "curate.sentences.enabled=false"]  # fmt: skip
    whole = [sys.executable, "-c", MEASURED, *command(*words)]
    done = subprocess.run(whole, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return top / "out", int(done.stdout)


@pytest.fixture(scope="module")
def output(measured: tuple[Path, int]) -> Path:
    return measured[0]


def _bad(output: Path) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for row in json.loads((output / "report.json").read_text())["bad_rows"]:
        found.setdefault(Path(row["file"]).name, []).append((row["line"], row["reason"]))
    return found


def _texts(output: Path, name: str) -> list[str]:
    return [row["text"] for row in documents(output) if Path(row["source"]["file"]).name == name]


def test_rows_that_are_none_are_listed_with_file_and_line(output: Path) -> None:
    bad = _bad(output)
    assert bad["latin.jsonl"] == [(2, "not UTF-8")] and len(_texts(output, "latin.jsonl")) == 2
    assert bad["rows.jsonl"] == [
        (1, "no text"), (2, "no text"), (3, "not an object"), (4, "not JSON"), (5, "empty"), (6, "not JSON")
    ]  # fmt: skip
    assert _texts(output, "rows.jsonl") == ["a last row"]
    assert bad["array.json"] == [(2, "not an object")] and _texts(output, "array.json") == ["first of an array"]
    assert bad["book.txt"] == [(2, "not UTF-8")] and _texts(output, "book.txt") == ["A first line.\nA third line.\n\n"]
    assert "good.jsonl" not in bad and len(_texts(output, "good.jsonl")) == 2
    report = (output / "report.md").read_text()
    assert "rows.jsonl:1: field 'text' is missing (fields: body); set curate.text" in report
    assert "empty.jsonl: no document" in report and "notes.md" not in report


def test_a_document_of_a_gibibyte_is_refused_and_the_rows_around_it_stay(
    output: Path, measured: tuple[Path, int]
) -> None:
    assert _bad(output)["large.jsonl"] == [(2, "too large")]
    assert _texts(output, "large.jsonl") == ["before has a document number 0", "after has a document number 0"]
    assert 50 < measured[1] < 700, f"{measured[1]} MiB: the row was held"


@pytest.mark.parametrize("name", ["gz", "bz2", "xz", "zst"])
def test_damaged_files_give_what_is_before_the_damage(output: Path, name: str) -> None:
    assert len(_texts(output, f"whole.jsonl.{name}")) + _copies(output, f"whole.jsonl.{name}") == 1000
    read = len(_texts(output, f"cut.jsonl.{name}")) + _copies(output, f"cut.jsonl.{name}")
    ((line, reason),) = _bad(output)[f"cut.jsonl.{name}"]
    assert reason == "damaged file" and line == read + 1


def _copies(output: Path, name: str) -> int:
    return sum(row["step"] == "exact" and Path(row["file"]).name == name for row in removed(output))


def test_tables(output: Path) -> None:
    bad = _bad(output)
    assert bad["good.parquet"] == [(2, "no text")] and len(_texts(output, "good.parquet")) == 2
    assert bad["nofield.parquet"] == [(1, "no text")] and bad["broken.parquet"] == [(1, "damaged file")]
    report = json.loads((output / "report.json").read_text())
    assert next(row for row in report["bad_rows"] if row["file"].endswith("nofield.parquet"))["rows"] == 3


def test_pages_of_a_crawl(output: Path) -> None:
    """Text of pages in their encoding; what is no page is counted by kind; a cut file is told."""
    bad, report = _bad(output), json.loads((output / "report.json").read_text())
    first, last = _texts(output, "pages.warc.gz")
    assert first.startswith("pages.warc.gz café The library") and last.startswith("pages.warc.gz last")
    assert bad["cut.warc.gz"] == [(5, "damaged file")] and bad["cut.warc"] == [(5, "damaged file")]
    assert len(_texts(output, "cut.warc.gz")) == len(_texts(output, "cut.warc")) == 1
    assert report["tables"]["other records"] == {"type image/png": 3, "status 404": 3}
    assert report["steps"]["extract"]["removed"] == {"no text found": 3}
    row = next(row for row in documents(output) if row["text"] == first)
    assert row["url"] == "https://library.example.org/1" and row["source"]["line"] == 1


def test_bad_rows_stop_where_they_shall(tool, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(_rows("x", 3) + b"{\n" + b'{"body": 1}\n')
    words = ("curate=duplicates", f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out'}", "on_bad_row=fail")
    done = tool(*words, check=False)
    assert done.returncode == 1 and "in.jsonl:4: not JSON" in done.stderr and "in.jsonl:5: field 'text'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "documents").exists()
