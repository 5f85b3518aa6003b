"""Readers: every document once, in order; bad rows named by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from scale_llm.config.errors import UserError
from scale_llm.data import corpus


def read(file: Path | str, field: str = "text") -> list[str]:
    problems = corpus.Problems()
    documents = list(corpus.read_file(str(file), field, problems))
    problems.raise_any()
    return documents


def test_embedded_corpus_is_stable_text_of_the_size_asked_for():
    files = corpus.embedded_files(0.3)
    assert files == corpus.embedded_files(0.3)
    assert corpus.embedded_files(0.6)[: len(files)] == files  # a larger cap only adds
    size = sum(len(text.encode()) for text in corpus.read_embedded(files))
    assert 0 < size <= 300_000
    everything = corpus.embedded_files()
    assert sum(Path(file).stat().st_size for file in everything) > 5e6
    assert not any("site-packages" in file or "__pycache__" in file for file in everything)


def test_text_documents_are_the_file(shakespeare: str):
    documents = read(shakespeare)
    assert "".join(documents) == Path(shakespeare).read_text()
    assert len(documents) > 100
    assert all(document.endswith("\n\n") for document in documents[:-1])  # cut at blank lines only


def test_same_documents_from_jsonl_gzip_and_parquet(web: str, tmp_path: Path):
    rows = [json.loads(line) for line in Path(web).read_text().splitlines()]
    texts = [row["text"] for row in rows]
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress(Path(web).read_bytes()))
    table = pyarrow.table({"content": texts, "other": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet", row_group_size=64)
    assert read(web) == texts
    assert read(tmp_path / "web.jsonl.gz") == texts
    assert read(tmp_path / "web.parquet", "content") == texts


def test_progress_counts_the_bytes_on_disk(web: str, tmp_path: Path):
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress(Path(web).read_bytes()))
    for file in (Path(web), tmp_path / "web.jsonl.gz"):
        counts: list[int] = []
        list(corpus.read_file(str(file), "text", corpus.Problems(), counts.append))
        assert sum(counts) == file.stat().st_size


def test_bad_rows_are_named_by_line(tmp_path: Path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(
        b'{"text": "fine"}\nnot json\n[1]\n\n{"txt": 1}\n{"text": 7}\n{"text": "\xff"}\n{"text": "\\ud83d"}\n'
    )
    with pytest.raises(UserError) as caught:
        read(file)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{file}:{n}" for n in (2, 3, 5, 6, 7, 8)]
    assert "data.fields.text" in caught.value.problems[2]


def test_json_that_is_nested_too_deeply_is_a_bad_row(tmp_path: Path):
    deep, file, array = "[" * 100_000, tmp_path / "a.jsonl", tmp_path / "b.json"
    file.write_text(f'{{"text": "fine"}}\n{{"text": {deep}\n')
    array.write_text(deep)
    with pytest.raises(UserError, match="a.jsonl:2: not JSON"):
        read(file)
    with pytest.raises(UserError, match="b.json:1: not a JSON array"):
        read(array)


def test_bad_rows_are_capped(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text("no\n" * 1000)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "bad.jsonl")
    assert len(caught.value.problems) == corpus.MAX_PROBLEMS + 1


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "no.parquet", "no.jsonl.gz"])
def test_damaged_files(tmp_path: Path, name: str):
    content = gzip.compress(b'{"text": "abc"}\n' * 1000)
    (tmp_path / name).write_bytes(content[:-20] if name.startswith("cut") else b"no such format")
    with pytest.raises(UserError, match="copy it again"):
        read(tmp_path / name)


def test_parquet_problems(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet:2: field 'text' is no string"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="fields: text"):
        read(tmp_path / "a.parquet", "content")
