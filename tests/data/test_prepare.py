"""Preparation: done once, found again, done anew when the input changes, and safe under concurrency."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from scale_llm.config.data import BadRow, DataConfig, FieldsConfig
from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.cache_entries import tokens_entry
from scale_llm.data.files import build_once
from scale_llm.data.index_work import left_out_lines
from scale_llm.data.prepare import PreparedData, load_prepared, prepare
from scale_llm.data.rows import too_large
from scale_llm.data.sources import Source

REPOSITORY = Path(__file__).parents[2]


def snapshot(top: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in top.rglob("*") if path.suffix != ".lock"}


def test_embedded_corpus(embedded: PreparedData):
    assert embedded.weights is None and len(embedded.prefixes) == 1
    assert embedded.prefixes[0].endswith("stdlib_text_document")
    assert embedded.vocab_size == 512 and embedded.num_bytes is not None
    assert 1.5 < embedded.num_bytes / embedded.num_tokens < 5
    assert load_prepared(embedded.path) == load_prepared(Path(embedded.path).parent) == embedded


def test_second_call_touches_nothing(embedded: PreparedData, embedded_config, tokenizer_config, cache: Path):
    before = snapshot(cache)
    assert prepare(embedded_config, tokenizer_config, cache) == embedded
    assert snapshot(cache) == before


def test_every_kind_with_weights_then_other_weights(
    web: str, shakespeare: str, embedded: PreparedData, tokenizer_config, tmp_path: Path
):
    """Text, Parquet with another field name and an indexed prefix, blended; then only the weights change."""
    rows = [json.loads(line)["text"] for line in Path(web).read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"content": rows}), tmp_path / "web.parquet")
    path = [3, shakespeare, 1, str(tmp_path / "web.parquet"), 4, embedded.prefixes[0]]
    config = DataConfig(path=path, fields=FieldsConfig(text="content"))
    tokenizer = TokenizerConfig(path=embedded.tokenizer_path)
    prepared = prepare(config, tokenizer, tmp_path / "cache")
    assert prepared.weights == [3 / 8, 1 / 8, 4 / 8]
    assert prepared.prefixes[2] == embedded.prefixes[0]
    assert prepared.num_bytes is None and prepared.vocab_size == 512
    assert prepared.num_tokens > embedded.num_tokens
    before = snapshot(tmp_path / "cache" / "tokens")
    config.path[0] = 9
    again = prepare(config, tokenizer, tmp_path / "cache")
    assert again.weights == [9 / 14, 1 / 14, 4 / 14] and again.prefixes == prepared.prefixes
    assert snapshot(tmp_path / "cache" / "tokens") == before


def test_changed_input_makes_a_new_entry(tmp_path: Path, tokenizer_config):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one two three"}\n' * 100)
    first = prepare(DataConfig(path=str(file)), tokenizer_config, tmp_path / "cache")
    file.write_text('{"text": "one two three"}\n' * 101)
    second = prepare(DataConfig(path=str(file)), tokenizer_config, tmp_path / "cache")
    assert (first.num_documents, second.num_documents) == (100, 101)
    assert first.prefixes != second.prefixes
    assert Path(first.prefixes[0] + ".bin").is_file()  # a run that uses the old entry keeps it


def test_bad_rows_leave_nothing_that_could_be_taken_for_good(tmp_path: Path, embedded: PreparedData):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "typo"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: field 'text' is missing \(fields: txt\)"):
        prepare(DataConfig(path=str(file)), TokenizerConfig(path=embedded.tokenizer_path), tmp_path / "cache")
    with pytest.raises(UserError, match="a.jsonl:2"):  # found while the tokenizer is trained
        prepare(DataConfig(path=str(file)), TokenizerConfig(), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_bad_rows_are_left_out_on_request(tmp_path: Path):
    """From the tokenizer's sample and from the tokens; counted, and what was counted is another entry of the cache."""
    file = tmp_path / "a.jsonl"
    rows = [{"text": "fine"}, {"txt": "typo"}, {"text": " "}, {"text": "good"}, {"text": "x" * 2000}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(file), on_bad_row=BadRow.drop, max_document_megabytes=0.001)
    prepared = prepare(config, TokenizerConfig(vocab_size=300), tmp_path / "cache")
    assert prepared.num_documents == 2 and prepared.left_out["dropped"] == {"no text": 1, "too large": 1}
    assert left_out_lines(prepared.left_out) == [
        f"dropped, no text: 1, first {file}:2: field 'text' is missing (fields: txt); set data.fields.text",
        f"dropped, too large: 1, first {file}:5: {too_large(2013, 2000)}",
        "documents without text: 1",
    ]
    assert not list((tmp_path / "cache" / "tokens").glob("*.parts"))
    config.max_document_megabytes = 0.01
    assert prepare(config, TokenizerConfig(vocab_size=300), tmp_path / "cache").num_documents == 3


def test_names_and_sizes_that_files_cannot_have(tmp_path: Path):
    """A key of JSON may hold a slash; a limit may be beyond what can be counted."""
    data = DataConfig(path=["x"], max_document_megabytes=1e308)
    data.fields.text = "a/b"
    (tmp_path / "x.jsonl").touch()
    directory, name = tokens_entry(Source(kind="raw", files=(str(tmp_path / "x.jsonl"),)), data, "", 0, tmp_path)
    assert name == "x_a_b_document" and directory.parent == tmp_path / "tokens"


def test_problems_together(embedded: PreparedData, tmp_path: Path):
    config = DataConfig(path=[embedded.prefixes[0], "/nowhere.txt"], split="a,b")
    with pytest.raises(UserError) as caught:
        prepare(config, TokenizerConfig(), tmp_path)
    assert len(caught.value.problems) == 2  # the split and the path; sources are looked into once all parse
    with pytest.raises(UserError, match="tokenizer.path=null: .* indexed already"):
        prepare(DataConfig(path=embedded.prefixes[0]), TokenizerConfig(), tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no text"):
        prepare(DataConfig(path=str(tmp_path / "empty.txt")), TokenizerConfig(), tmp_path)


def test_prefix_made_with_a_larger_tokenizer(embedded: PreparedData, shakespeare: str, tmp_path: Path):
    small = prepare(DataConfig(path=shakespeare), TokenizerConfig(vocab_size=300), tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 300 tokens"):
        prepare(DataConfig(path=embedded.prefixes[0]), TokenizerConfig(path=small.tokenizer_path), tmp_path)


def test_two_processes_at_once(shakespeare: str, tmp_path: Path):
    """Both get the same entry; the work was done once (one tokenizer, one index, nothing left over)."""
    code = (
        "import sys; from scale_llm.config.data import DataConfig; from scale_llm.config.tokenizer import *;"
        "from scale_llm.data.prepare import prepare;"
        "print(prepare(DataConfig(path=sys.argv[1]), TokenizerConfig(vocab_size=300), sys.argv[2]).path)"
    )
    command = [sys.executable, "-c", code, shakespeare, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), outputs
    assert outputs[0][0] == outputs[1][0] != ""
    for kind in ("tokenizers", "tokens", "prepared"):
        assert len([path for path in (tmp_path / kind).iterdir() if path.is_dir()]) == 1


def test_remains_of_a_killed_build_are_cleared(tmp_path: Path):
    entry = tmp_path / "entry"
    killed = (
        "import os, pathlib; from scale_llm.data.files import build_once;"
        f"build_once(pathlib.Path({str(entry)!r}),"
        "lambda half: (half.joinpath('half').write_text('x'), os.kill(os.getpid(), 9)))"
    )
    process = subprocess.run([sys.executable, "-c", killed], cwd=REPOSITORY)
    assert process.returncode == -9 and not entry.exists() and list(tmp_path.glob("entry.tmp-*"))
    build_once(entry, lambda directory: (directory / "whole").write_text("x") and None)
    assert sorted(os.listdir(tmp_path)) == ["entry", "entry.lock"] and os.listdir(entry) == ["whole"]
