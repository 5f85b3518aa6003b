"""The same indexing three times: by scale_llm, by a loop over `tokenizers` and megatron-core's builder, and
by datatrove's Megatron tokenizer. One process, one core.

All load a tokenizer, read a JSONL file and write the same .bin and .idx: `check_same` compares them. Ours begins every
time with no word known.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

VOCABULARY = 32_000
EOD = "<|endoftext|>"
CONTESTANTS = {"ours": "ours", "tokenizers' encode_batch": "loop", "datatrove": "datatrove_step"}


def write_texts(texts: list[str], work: Path) -> int:
    """documents.jsonl and a tokenizer for it; the bytes of the text."""
    from scale_llm.data.tokenizer import train_tokenizer

    work.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, vocab_size=VOCABULARY, eod_token=EOD, path=work / "tokenizer.json")
    with open(work / "documents.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return sum(len(text.encode()) for text in texts)


def embedded_texts(megabytes: float) -> list[str]:
    """The standard library, without files that spell out the end of documents, which datatrove would take for one."""
    from scale_llm.data import corpus

    texts = corpus.read_embedded(corpus.embedded_files(megabytes))
    return [text for text in texts if EOD not in text]


def web_texts(source: Path) -> list[str]:
    with source.open(encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def ours(work: str, size: int):
    """A step indexes all documents and returns the bytes of their text."""
    from scale_llm.data.index_work import IndexSettings
    from scale_llm.data.indexing import index_files

    settings = IndexSettings(
        tokenizer=f"{work}/tokenizer.json", eod_token=EOD, dtype="uint16", text_field="text",
        max_document_bytes=1 << 30, drop_bad_rows=False,
    )  # fmt: skip

    def step() -> int:
        parts = Path(work) / "parts"
        index_files([f"{work}/documents.jsonl"], settings, f"{work}/ours", parts, workers=1)
        shutil.rmtree(parts)
        return size

    return step


def loop(work: str, size: int):
    """What one would write: json, encode_batch_fast, add_document."""
    import tokenizers

    from scale_llm.data.megatron import DType, IndexedDatasetBuilder

    def step() -> int:
        tokenizer = tokenizers.Tokenizer.from_file(f"{work}/tokenizer.json")
        eod = tokenizer.token_to_id(EOD)
        builder = IndexedDatasetBuilder(f"{work}/loop.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size()))
        with open(f"{work}/documents.jsonl", encoding="utf-8") as stream:
            texts = [json.loads(line)["text"] for line in stream]
        for start in range(0, len(texts), 1000):
            for encoding in tokenizer.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False):
                ids = encoding.ids
                ids.append(eod)
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{work}/loop.idx")
        return size

    return step


def datatrove_step(work: str, size: int):
    """datatrove's reader and Megatron tokenizer."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from loguru import logger

    logger.remove()

    def step() -> int:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            reader = JsonlReader(work, glob_pattern="documents.jsonl")
            writer = MegatronDocumentTokenizer(
                work, tokenizer_name_or_path=f"{work}/tokenizer.json", eos_token=EOD, save_filename="datatrove"
            )
            writer.run(reader.run())
        return size

    return step


def check_same(work: Path) -> None:
    """The files of all contestants are the same bytes."""
    for extension in ("bin", "idx"):
        ours, loop = (work / f"ours.{extension}").read_bytes(), (work / f"loop.{extension}").read_bytes()
        (theirs,) = work.glob(f"datatrove*.{extension}")
        if not ours == loop == theirs.read_bytes():
            raise SystemExit(f"the .{extension} files differ: {work}")
