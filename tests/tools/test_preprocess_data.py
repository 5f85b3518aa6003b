"""tools/preprocess_data.py: made once, appended to, merged; bad input has its file and line; outputs are not mixed."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from scale_llm.config.errors import UserError
from scale_llm.data import index_output
from scale_llm.data.index_work import IndexSettings
from scale_llm.data.indexing import index_units
from scale_llm.data.megatron import IndexedDataset, IndexedDatasetBuilder
from scale_llm.data.tokenizer import Tokenizer, train_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
TEXTS = ["one fine day", "déjà vu 🦊", "a\n\nb", "four"]


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, vocab_size=280, eod_token="</s>", path=path)
    path.with_name("tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    return Tokenizer.load(str(path), "</s>")


@pytest.fixture
def call(tool, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Runs the tool in a directory of its own: (exit status, what it prints)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        model = () if "--merge" in words else ("--tokenizer-model", tokenizer.path, "--workers", "1")
        status = tool([*words, *model])
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def write(name: str, texts: list[str]) -> str:
    Path(name).write_text("".join(json.dumps({"text": text, "a/b": text[:3]}) + "\n" for text in texts))
    return name


def texts_of(prefix: str, tokenizer: Tokenizer, *, eod: bool = True) -> list[str]:
    documents = [ids.tolist() for ids in IndexedDataset(prefix)]
    assert all((ids[-1] == tokenizer.eod) == eod for ids in documents)
    return [tokenizer.decode(ids[:-1] if eod else ids) for ids in documents]


def stamps() -> dict[str, int]:
    return {name: os.stat(name).st_mtime_ns for name in os.listdir() if not name.startswith(".")}


def test_once_then_nothing_then_more(call, tokenizer: Tokenizer):
    words = ("--input", write("a.jsonl", TEXTS), "--output-prefix", "x", "--append-eod", "--json-keys", "text", "a/b")
    status, output = call(*words)
    assert status == 0 and "4 documents" in output
    assert texts_of("x_text_document", tokenizer) == TEXTS
    assert texts_of("x_a_b_document", tokenizer) == [text[:3] for text in TEXTS]
    before = stamps()
    assert "nothing to do" in call(*words)[1] and stamps() == before
    more = ("--input", "a.jsonl", write("b.jsonl", ["five"]), *words[2:])
    status, output = call(*more)
    assert status != 0 and "made of other files; add --append" in output and stamps().items() >= before.items()
    assert call(*more, "--append")[0] == 0 and "nothing to do" in call(*more, "--append")[1]
    assert texts_of("x_text_document", tokenizer) == [*TEXTS, "five"]
    call("--input", "a.jsonl", "b.jsonl", *words[2:4], "--append-eod")
    fresh = ("--input", "a.jsonl", "b.jsonl", "--output-prefix", "y", "--append-eod")
    call(*fresh)
    for extension in (".bin", ".idx"):
        assert Path(f"x_text_document{extension}").read_bytes() == Path(f"y_text_document{extension}").read_bytes()
    Path("a.jsonl").write_text('{"text": "other"}\n')
    assert "a.jsonl: has changed since" in call(*fresh)[1]


def test_merge(call, tokenizer: Tokenizer):
    """In the order given, or of the names in a directory; documents of several sequences keep their marks."""
    os.mkdir("parts")
    for name, text in (("a", "one"), ("b", "two")):
        assert (
            call("--input", write(f"{name}.jsonl", [text]), "--output-prefix", f"parts/{name}", "--append-eod")[0] == 0
        )
    builder = IndexedDatasetBuilder(
        "parts/c_text_document.bin", dtype=IndexedDataset("parts/a_text_document").index.dtype
    )
    builder.add_document([5, 6, 7], [1, 2])
    builder.finalize("parts/c_text_document.idx")
    assert call("--merge", "--input", "parts", "--output-prefix", "all")[0] == 0
    merged = IndexedDataset("all")
    assert merged.document_indices.tolist() == [0, 1, 2, 4] and merged.sequence_lengths.tolist()[-2:] == [1, 2]
    assert merged[3].tolist() == [6, 7] and tokenizer.decode(merged[1][:-1]) == "two"
    assert "nothing to do" in call("--merge", "--input", "parts", "--output-prefix", "all")[1]
    status, output = call("--merge", "--input", "parts/b_text_document", "--output-prefix", "all")
    assert status != 0 and "holds something else" in output
    builder = IndexedDatasetBuilder("wide.bin")
    builder.add_document([5], [1])
    builder.finalize("wide.idx")
    status, output = call("--merge", "--input", "parts", "wide", "nowhere", "--output-prefix", "z")
    assert status != 0 and "--input=" in output and "nowhere" in output
    assert "more than one type, int32" in call("--merge", "--input", "parts", "wide", "--output-prefix", "z")[1]
    assert not Path("z.idx").exists()


def test_append_to_files_of_megatron(call, tokenizer: Tokenizer):
    """Only on request, and only where they could be of this tokenizer."""
    for name, dtype in (("x", numpy.uint16), ("wide", numpy.int32)):
        builder = IndexedDatasetBuilder(f"{name}_text_document.bin", dtype=dtype)
        builder.add_document([5, tokenizer.eod], [2])
        builder.finalize(f"{name}_text_document.idx")
    words = ("--input", write("a.jsonl", ["more"]), "--append-eod", "--output-prefix")
    assert "was not made by this tool; add --append" in call(*words, "x")[1]
    assert call(*words, "x", "--append")[0] == 0
    assert texts_of("x_text_document", tokenizer) == [tokenizer.decode([5]), "more"]
    assert "its tokens are int32, of yours uint16" in call(*words, "wide", "--append")[1]


def test_killed_after_the_pair_was_written(call, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Documents are not appended twice: what is left then is to write down what the pair holds."""
    words = ("--output-prefix", "x", "--append-eod")
    call("--input", write("a.jsonl", ["one"]), *words)
    write_json = index_output.write_json

    def killed(path: Path, value) -> None:
        if path.name == "x_text_document.json":
            raise KeyboardInterrupt
        write_json(path, value)

    more = ("--input", write("b.jsonl", ["two"]), *words, "--append")
    with monkeypatch.context() as patched:
        patched.setattr(index_output, "write_json", killed)
        assert call(*more)[0] == 130
    status, output = call("--input", write("c.jsonl", ["three"]), *words, "--append")
    assert status != 0 and "x_text_document.parts is the unfinished work of other files" in output
    assert call(*more)[0] == 0 and not os.path.exists("x_text_document.parts")
    assert texts_of("x_text_document", tokenizer) == ["one", "two"]


@pytest.mark.parametrize("before", ["x_text_document.json", "rmtree"])
def test_killed_at_the_end_of_the_first_call(call, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, before: str):
    """Before what the pair holds is written down, or before what is no longer needed is removed."""
    words = ("--input", write("a.jsonl", ["one"]), "--output-prefix", "x", "--append-eod")
    write_json = index_output.write_json

    def killed(path: Path, value=None) -> None:
        if value is None or path.name == before:
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patched:
        patched.setattr(
            *((index_output.shutil, "rmtree") if before == "rmtree" else (index_output, "write_json")), killed
        )
        assert call(*words)[0] == 130
    assert call(*words)[0] == 0 and not os.path.exists("x_text_document.parts")
    assert texts_of("x_text_document", tokenizer) == ["one"]
    assert call("--input", write("b.jsonl", ["two"]), *words[2:], "--append")[0] == 0
    assert texts_of("x_text_document", tokenizer) == ["one", "two"]
    os.remove("x_text_document.bin")
    assert "was not made by this tool" in call(*words)[1], "half a pair is none"


def test_input_that_grows_meanwhile_is_refused(call, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    name, sequences = write("a.jsonl", ["one"]), index_output._sequences

    def grow(prefix: str) -> int:
        with open(name, "a") as stream:
            stream.write('{"text": "late"}\n')
        return sequences(prefix)

    words = ("--input", name, "--output-prefix", "x", "--append-eod")
    with monkeypatch.context() as patched:
        patched.setattr(index_output, "_sequences", grow)
        status, output = call(*words)
    assert status == 1 and "a.jsonl: has changed while it was read; run again" in output
    assert call(*words)[0] == 0 and texts_of("x_text_document", tokenizer) == ["one", "late"]


def test_merging_what_other_tokenizers_made_is_refused(call, tool, tokenizer: Tokenizer, capsys):
    call("--input", write("a.jsonl", ["one"]), "--output-prefix", "a", "--append-eod")
    train_tokenizer(["other text"], vocab_size=270, eod_token="</s>", path=Path("other.json"))
    words = ["--input", write("b.jsonl", ["two"]), "--output-prefix", "b", "--append-eod", "--eod-token", "</s>"]
    assert tool([*words, "--tokenizer-model", "other.json", "--workers", "1"]) == 0, capsys.readouterr()
    status, output = call("--merge", "--input", "a_text_document", "b_text_document", "--output-prefix", "all")
    assert status == 1 and "b_text_document was made with another tokenizer than" in output
    assert not os.path.exists("all.idx")


def test_a_line_too_long_at_the_start_of_json_is_not_held(call, tokenizer: Tokenizer):
    """To see whether a .json file is one array its first bytes will do."""
    Path("a.json").write_text(json.dumps({"text": "x" * 30_000_000}) + "\n" + json.dumps({"text": "one"}) + "\n")
    words = ("--input", "a.json", "--output-prefix", "x", "--append-eod", "--max-document-megabytes", "1")
    tracemalloc.start()
    status, output = call(*words, "--on-bad-row", "drop")
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 0 and "dropped, too large: 1" in output and largest < 12_000_000, output
    assert texts_of("x_text_document", tokenizer) == ["one"]


def test_without_an_end_of_document(call, tool, tokenizer: Tokenizer):
    words = ("--input", write("a.jsonl", TEXTS), "--output-prefix")
    assert call(*words, "x")[0] == 0
    assert texts_of("x_text_document", tokenizer, eod=False) == TEXTS
    status, output = call(*words, "x", "--append-eod")
    assert status != 0 and "made with another eod_token" in output
    status, output = call(*words, "y", "--append-eod", "--eod-token", "<end>")
    assert status != 0 and "--eod-token=<end>: not in the vocabulary" in output and "</s>" in output


def test_gpt2_files(call, tool, tokenizer: Tokenizer):
    """Megatron's other way to name a byte-level BPE."""
    tokenizer.backend.model.save(".")
    status = tool(["--input", write("a.jsonl", TEXTS), "--output-prefix", "x", "--tokenizer-type", "GPT2BPETokenizer",
                   "--vocab-file", "vocab.json", "--merge-file", "merges.txt", "--workers", "1"])  # fmt: skip
    assert status == 0
    assert texts_of("x_text_document", tokenizer, eod=False) == TEXTS


def test_keys_of_one_name(call):
    words = ("--input", write("a.jsonl", TEXTS), "--output-prefix", "x", "--json-keys")
    status, output = call(*words, "a/b", "text", "a_b")
    assert status != 0 and "--json-keys=a/b a_b: both would be written to x_a_b_document" in output
    assert not [name for name in os.listdir() if name.startswith("x_")]
    status, output = call(*words, "text", "text")
    assert status == 0 and output.count("x_text_document:") == 1


def row(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


GOOD = b"".join(row(f"document {i}, and some words to fill it") for i in range(50))
BAD = {
    "no_field.jsonl": (row("x") + b'{"txt": 1}\n', ":2: field 'text' is missing (fields: txt); set --json-keys"),
    "number.jsonl": (row("x") + row(5), ":2: field 'text' is no string"),
    "latin.jsonl": (row("x") + b'{"text": "caf\xe9"}\n', ":2: not UTF-8"),
    "latin.txt": (b"fine\ncaf\xe9\n", ":2: not UTF-8"),
    "half.jsonl": (row("x") + b'{"text": "\\ud83d"}\n', ":2: field 'text' holds half of a surrogate pair"),
    "broken.jsonl": (row("x") + b'{"text": "\n', ":2: not JSON"),
    "list.jsonl": (b"[1]\n", ":1: list, not an object"),
    "large.jsonl": (row("x") + row("y" * 150_000), ":2: 150,000 bytes, 100,000 are read at most; raise --max-document"),
    "larger.jsonl": (row("x") + row("y" * 900_000), ":2: 900,013 bytes"),
}
DAMAGED = {
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-20], "damaged file, cannot be read from here on"),
    "cut.jsonl.bz2": (bz2.compress(GOOD)[:-20], "damaged file"),
    "cut.jsonl.xz": (lzma.compress(GOOD)[:-20], "damaged file"),
    "cut.jsonl.zst": (pyarrow.compress(GOOD, codec="zstd", asbytes=True)[:-20], "damaged file"),
    "cut.parquet": (b"PAR1 and no more", ":1: not a Parquet file"),
}


def test_bad_rows_stop_with_their_lines_or_are_counted(call, tokenizer: Tokenizer):
    """All of them at once; with drop each is counted under its kind, and the rest is indexed."""
    for name, (content, _) in BAD.items():
        Path(name).write_bytes(content)
    Path("empty.jsonl").write_bytes(b"")
    Path("blank.jsonl").write_bytes(row(" ") * 2)
    words = ("--input", *BAD, "empty.jsonl", "blank.jsonl", "--output-prefix", "x", "--append-eod",
             "--max-document-megabytes", "0.1")  # fmt: skip
    status, output = call(*words)
    assert status != 0 and not list(Path().glob("x_text*"))
    for name, (_, message) in BAD.items():
        assert f"{os.path.abspath(name)}{message}" in output
    status, output = call(*words, "--on-bad-row", "drop")
    assert status == 0, output
    assert texts_of("x_text_document", tokenizer) == ["x", "x", "x", "fine\n", "x", "x", "x", "x"]
    assert "dropped, not UTF-8: 2, first" in output and "dropped, too large: 2, first" in output
    assert "documents without text: 2" in output and "files without a document: 3, first" in output


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_stop_whatever_is_done_with_rows(call, name: str):
    content, message = DAMAGED[name]
    Path(name).write_bytes(content)
    status, output = call("--input", name, "--output-prefix", "x", "--on-bad-row", "drop")
    assert status != 0 and f"{name}:" in output and message in output and not list(Path().glob("x_text*"))


def test_lines_of_a_file_in_parts_count_from_its_start(tokenizer: Tokenizer, tmp_path: Path):
    """Rows of a Parquet file in parts too."""
    settings = IndexSettings(
        tokenizer=tokenizer.path, eod_token="</s>", dtype="uint16", text_field="text", max_document_bytes=1000,
        drop_bad_rows=False,
    )  # fmt: skip
    rows = [{"text": "some words"}] * 99 + [{"text": "x" * 1001}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=9)
    for name in ("a.jsonl", "b.parquet"):
        with pytest.raises(UserError, match=f"{name}:100: 1,001 bytes"):
            index_units([str(tmp_path / name)], settings, tmp_path / "parts", workers=1, unit_bytes=100)
