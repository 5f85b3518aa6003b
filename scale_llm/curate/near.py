"""Near copies by MinHash (Broder 1997): datatrove signs, joins and clusters; here pairs are verified first.

Buckets of equal hashes propose pairs; a pair stands if the share of equal hashes among all, which estimates the Jaccard
similarity of the documents' shingles, is large enough. So buckets can be many and small enough to find copies with one
word in twenty changed (a similarity of about 0.75 with shingles of 3 words), and still do not join documents that share
no more than a template. Of a cluster the first document stays.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)

from scale_llm.config.curate import NearConfig
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.simplify import shingles, words_of
from scale_llm.curate.step import Judge, Verdict
from scale_llm.curate.words import WORDS, TokenCounter

_PAIR = np.dtype([("file_a", "<u4"), ("doc_a", "<u4"), ("file_b", "<u4"), ("doc_b", "<u4")])
_MEMBER = np.dtype([("doc", "<u4"), ("cluster", "<u4")])
SHOWN = 200
"""Clusters that the report may show."""


def minhash(cfg: NearConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=cfg.n_grams, num_buckets=cfg.buckets, hashes_per_bucket=cfg.hashes_per_bucket, seed=cfg.seed
    )


class Sign(MinhashDedupSignature):
    """datatrove's signatures in buckets; each whole, uint64 [buckets * hashes_per_bucket], in whole/00000.sig."""

    def __init__(self, folder: Path, cfg: NearConfig):
        super().__init__(str(folder / "buckets"), minhash(cfg), language=WORDS)
        self.whole = folder / "whole"

    def run(self, data, rank: int = 0, world_size: int = 1):
        self.whole.mkdir(parents=True, exist_ok=True)
        temporary = self.whole / f".{rank:05d}.sig.tmp"
        self._position, self._written = 0, 0
        with open(temporary, "wb") as self._out:
            super().run(self._counted(data), rank, world_size)
            self._fill(self._position)
        os.replace(temporary, self.whole / f"{rank:05d}.sig")

    def get_shingles(self, text: str) -> np.ndarray:
        return np.array(shingles(words_of(text), self.config.n_grams), dtype=np.uint64).reshape(-1, 1)

    def _counted(self, data):
        for document in data:
            yield document
            self._position += 1

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        signature = np.split(minima(shingles, *self.parameters), self.config.num_buckets)
        self._fill(self._position)
        self._out.write(np.array(signature, dtype=np.uint64).tobytes())
        self._written += 1
        return [part.tolist() for part in signature]

    def _fill(self, end: int) -> None:
        """Documents too short for a shingle have a row of zeros, so that a row's place is the document's."""
        self._out.write(b"\0" * (8 * self.num_hashes * (end - self._written)))
        self._written = end


_PRIME = np.uint64((1 << 61) - 1)


def minima(shingles: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest (shingle * a + b) mod 2**64 mod (2**61 - 1) of all shingles, for each a and b: datatrove's hashes,
    without the division, which took most of the time.

    Args: uint64 [n, 1]; a, b: uint64 [1, h]. Returns: uint64 [h].
    """
    values = shingles * a
    values += b
    high = values >> np.uint64(61)
    values &= _PRIME
    values += high  # at most seven above the prime
    np.subtract(values, _PRIME, out=values, where=values >= _PRIME)
    return values.min(axis=0)


class Pairs(PipelineStep):
    """Buckets, dealt out to tasks: datatrove's pairs with equal hashes; those that are alike enough go to verified/."""

    type, name = "NEAR", "pairs"

    def __init__(self, folder: Path, cfg: NearConfig):
        super().__init__()
        self.folder, self.cfg = folder, cfg
        self.width = cfg.buckets * cfg.hashes_per_bucket
        self.inner = MinhashDedupBuckets(str(folder / "buckets"), str(folder / "pairs"), config=minhash(cfg))

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        (self.folder / "verified").mkdir(exist_ok=True)
        for bucket in range(rank, self.cfg.buckets, world_size):
            self.inner.run(None, bucket, self.cfg.buckets)
            self._verify(f"{bucket:05d}_00.dups")

    def _verify(self, bucket: str) -> None:
        pairs = np.fromfile(self.folder / "pairs" / bucket, dtype=_PAIR)
        kept = pairs[self._alike(pairs)] if len(pairs) else pairs
        temporary = self.folder / "verified" / f".{bucket}.tmp"
        kept.tofile(temporary)
        os.replace(temporary, self.folder / "verified" / bucket)

    def _alike(self, pairs: np.ndarray) -> np.ndarray:
        """bool [n]: whether each pair has enough hashes in common."""
        rows: dict[int, np.ndarray] = {}
        alike = np.zeros(len(pairs), dtype=bool)
        for place, (file_a, doc_a, file_b, doc_b) in enumerate(pairs.tolist()):
            same = self._row(rows, file_a, doc_a) == self._row(rows, file_b, doc_b)
            alike[place] = same.mean() >= self.cfg.min_similarity
        return alike

    def _row(self, files: dict[int, np.ndarray], file: int, document: int) -> np.ndarray:
        if file not in files:
            path = self.folder / "whole" / f"{file:05d}.sig"
            files[file] = np.memmap(path, dtype=np.uint64, mode="r").reshape(-1, self.width)
        return files[file][document]


class Cluster(PipelineStep):
    """datatrove's union of the pairs; then of each cluster every document but the first is listed for removal."""

    type, name = "NEAR", "cluster"

    def __init__(self, folder: Path, cfg: NearConfig):
        super().__init__()
        self.folder = folder
        self.inner = MinhashDedupCluster(
            str(folder / "verified"), str(folder / "clusters"), minhash(cfg), save_cluster_id=True
        )

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        self.inner.run(None, rank, world_size)
        found = self.folder / "clusters"
        found.mkdir(exist_ok=True)  # where there are no pairs
        first: dict[int, tuple[int, int]] = {}
        sizes: dict[int, int] = {}
        members = {int(path.stem): np.fromfile(path, dtype=_MEMBER) for path in sorted(found.glob("*.clusters"))}
        for file, rows in members.items():
            for document, cluster in rows.tolist():
                first[cluster] = min(first.get(cluster, (file, document)), (file, document))
                sizes[cluster] = sizes.get(cluster, 0) + 1
        for file, rows in members.items():
            firsts = [first[cluster] == (file, document) for document, cluster in rows.tolist()]
            np.save(found / f"{file:05d}.first.npy", np.array(firsts, dtype=bool))
        largest = sorted(sizes, key=lambda cluster: (-sizes[cluster], cluster))[:SHOWN]
        histogram: dict[str, int] = {}
        for size in sizes.values():
            histogram[str(size)] = histogram.get(str(size), 0) + 1
        summary: dict[str, Any] = {"sizes": histogram, "largest": {str(cluster): sizes[cluster] for cluster in largest}}
        (found / "summary.json").write_text(json.dumps(summary))


class Drop(Judge):
    """Removes all of a cluster but its first; members of clusters that the report may show are in the ledger."""

    def __init__(self, folder: Path, ledger: Ledger, counter: TokenCounter):
        super().__init__("near", ledger, counter)
        self.folder = folder / "clusters"

    def prepare(self, rank: int) -> None:
        self.member: dict[int, tuple[int, bool]] = {}
        path = self.folder / f"{rank:06d}.clusters"
        if path.exists():
            rows = np.fromfile(path, dtype=_MEMBER).tolist()
            firsts = np.load(self.folder / f"{rank:05d}.first.npy").tolist()
            self.member = {document: (cluster, first) for (document, cluster), first in zip(rows, firsts, strict=True)}
        self.shown = json.loads((self.folder / "summary.json").read_text())["largest"]

    def judge(self, document: Document, position: int) -> Verdict:
        cluster, first = self.member.get(position, (-1, True))
        if str(cluster) in self.shown:
            place = f"{document.metadata['file']}:{document.metadata['line']}"
            self.ledger.table(f"cluster {cluster}")[f"{place} {document.text[:100]}"] += 1
        return True if first else (False, "near copy")
