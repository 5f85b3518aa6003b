"""The same curation twice: by scale_llm, and by a script of datatrove's own blocks. One process, one core.

Both read a JSONL file, tell the language, apply the rules on repetition and quality of Gopher, C4 and FineWeb, remove
exact and near copies and repeated sentences, mask e-mail and IP addresses, and write gzipped JSONL. The script is given
our words in place of spaCy's, which are slower, and the same thresholds. Ours also counts every step, writes down what
it removes, verifies near copies, and draws the report; it tells the language by the middle of a document.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

NEAR = {"n_grams": 3, "buckets": 32, "hashes": 5}


def write_documents(source: Path, path: Path, count: int, seed: int = 3) -> None:
    """Documents of the lengths of `source`, of its sentences in another order: none a copy of another."""
    draw = random.Random(seed)
    texts = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
    sentences = [re.split(r"(?<=[.!?])\s+", text) for text in texts]
    pool = [sentence for parts in sentences for sentence in parts]
    with open(path, "w", encoding="utf-8") as stream:
        for parts in itertools.islice(itertools.cycle(sentences), count):
            row = {"text": "\n".join(" ".join(draw.sample(pool, 4)) for _ in range(max(1, len(parts) // 4)))}
            stream.write(json.dumps(row) + "\n")


def ours(source: str, work: str, documents: int):
    """A step curates all documents and returns their number."""
    from scale_llm.config.curate_compose import compose_curation
    from scale_llm.curate.run import curate

    words = [
        f"input={source}", f"output={work}", "tasks=1", "curate.url.enabled=false", "curate.toxicity.enabled=false",
        "curate.quality.enabled=false", "curate.pii.phone=false", "curate.pii.card=false", "curate.pii.national_ids=[]",
        f"curate.near.n_grams={NEAR['n_grams']}", f"curate.near.buckets={NEAR['buckets']}",
        f"curate.near.hashes_per_bucket={NEAR['hashes']}",
    ]  # fmt: skip

    def step() -> int:
        shutil.rmtree(work, ignore_errors=True)
        curate(compose_curation(words), lambda _: None)
        return documents

    return step


def datatrove_script(source: str, work: str, documents: int):
    """The stages of datatrove's examples, one after another."""
    from loguru import logger

    def step() -> int:
        shutil.rmtree(work, ignore_errors=True)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            logger.remove()
            for executor in _stages(Path(source), Path(work)):
                executor.run()
        return documents

    return step


def _stages(source: Path, work: Path):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
        SentDedupConfig,
        SentenceDedupFilter,
        SentenceDedupSignature,
        SentenceFindDedups,
    )  # fmt: skip
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LambdaFilter,
    )  # fmt: skip
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    from scale_llm.curate.words import WORDS

    def path(name: str) -> str:
        return str(work / name)

    numbers = itertools.count()

    def stage(*steps, tasks: int = 1) -> LocalPipelineExecutor:
        logs = path(f"logs/{next(numbers)}")
        return LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=logs)

    exact = ExactDedupConfig(content_getter=_content)
    minhash = MinhashConfig(n_grams=NEAR["n_grams"], num_buckets=NEAR["buckets"], hashes_per_bucket=NEAR["hashes"])
    spans = SentDedupConfig(min_num_sentences=0)
    yield stage(
        JsonlReader(str(source.parent), glob_pattern=source.name), LambdaFilter(_english),
        GopherRepetitionFilter(language=WORDS), GopherQualityFilter(language=WORDS),
        C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=3, min_words_per_line=5, language=WORDS),
        FineWebQualityFilter(language=WORDS), JsonlWriter(path("filtered")),
    )  # fmt: skip
    yield stage(JsonlReader(path("filtered")), ExactDedupSignature(path("exact/sig"), exact))
    yield stage(ExactFindDedups(path("exact/sig"), path("exact/found"), exact))

    def unique():
        return JsonlReader(path("filtered")), ExactDedupFilter(path("exact/found"), exact)

    yield stage(*unique(), MinhashDedupSignature(path("near/sig"), minhash, language=WORDS))
    yield stage(MinhashDedupBuckets(path("near/sig"), path("near/pairs"), config=minhash), tasks=NEAR["buckets"])
    yield stage(MinhashDedupCluster(path("near/pairs"), path("near/found"), minhash))
    yield stage(
        *unique(), MinhashDedupFilter(path("near/found")), SentenceDedupSignature(path("spans/sig"), 1, spans, WORDS)
    )
    yield stage(SentenceFindDedups(path("spans/sig"), path("spans/found"), config=spans))
    yield stage(
        *unique(), MinhashDedupFilter(path("near/found")), SentenceDedupFilter(path("spans/found"), spans, None, WORDS),
        PIIFormatter(), JsonlWriter(path("out")),
    )  # fmt: skip


def _content(document) -> str:
    return " ".join(document.text.lower().split())


def _english(document) -> bool:
    from scale_llm.curate.filters import identifier

    return identifier().classify(document.text)[0] == "en"
