"""All epochs of one indexed file, each a GPTDataset of megatron-core, and their index files."""

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

from scale_llm.config.errors import UserError
from scale_llm.data.files import fingerprint, locked, stamp
from scale_llm.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split
from scale_llm.data.splits import SPLITS, epoch_samples, split_ranges

MEGATRON_SPLITS = dict(zip(SPLITS, (Split.train, Split.valid, Split.test), strict=True))
SMALL = 1 << 18
"""Indices of fewer entries stay in memory: a small source in a long blend has thousands of epochs, and no
file of theirs would be read twice."""


class SourceStream:
    """All epochs of one split of one indexed file, one after the other, without end."""

    def __init__(self, prefix: str, split: str, config: GPTDatasetConfig):
        self.config = config
        self.prefix = prefix
        self.tokens = IndexedDataset(prefix, mmap=True)
        begin, end = split_ranges(config.split, len(self.tokens))[split]
        self.documents = numpy.arange(begin, end, dtype=numpy.int32)
        num_tokens = int(self.tokens.sequence_lengths[begin:end].sum(dtype=numpy.int64))
        self.samples_per_epoch = epoch_samples(num_tokens, config.sequence_length)
        # Another .bin may come under the same name; an index made of the old one must not be taken for it.
        content = fingerprint([stamp(prefix + ".bin")[1:], stamp(prefix + ".idx")[1:]])
        self.cache = os.path.join(config.path_to_cache, content)
        # BlendedDataset reads these two.
        self.index_split = MEGATRON_SPLITS[split]
        self.unique_identifiers = {"prefix": prefix, "content": content, "documents": [begin, end]}
        index = self.tokens.index
        # Not by IndexedDataset.get, whose share of the time of a row of many documents was two thirds
        self._flat = numpy.asarray(numpy.memmap(prefix + ".bin", dtype=index.dtype, mode="r"))  # plain: slices faster
        self._begins = index.sequence_pointers[begin:end] // numpy.dtype(index.dtype).itemsize
        self._lengths = self.tokens.sequence_lengths[begin:end]
        self._first = begin
        self._epochs: OrderedDict[int, GPTDataset] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def read(self, index: int, out: numpy.ndarray) -> None:
        """The tokens of a sample and the one after them into `out` [s + 1], which is of any integer type."""
        epoch, within = divmod(index, self.samples_per_epoch)
        source = self.epoch(epoch)
        place = int(source.shuffle_index[within])
        (first, offset), (last, end) = source.sample_index[place : place + 2].tolist()
        if first == last:
            begin = int(self._begins[source.document_index[first] - self._first]) + offset
            out[:] = self._flat[begin : begin + len(out)]
            return
        documents = source.document_index[first : last + 1] - self._first
        begins, filled = self._begins[documents].tolist(), 0
        ends = (self._begins[documents] + self._lengths[documents]).tolist()
        begins[0] += offset
        ends[-1] = begins[-1] + end + 1
        for begin, stop in zip(begins, ends, strict=True):
            out[filled : filled + stop - begin] = self._flat[begin:stop]
            filled += stop - begin

    def epoch(self, number: int) -> GPTDataset:
        """The samples of one epoch, shuffled. Two are kept, as prefetching may straddle two."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._build(number)
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[number]

    def _build(self, number: int) -> GPTDataset:
        seed = epoch_seed(self.config.random_seed, number)

        def make(**changes: Any) -> GPTDataset:
            config = dataclasses.replace(self.config, random_seed=seed, **changes)
            return GPTDataset(self.tokens, self.prefix, self.documents, None, self.index_split, config)

        entries = self.samples_per_epoch + len(self.documents)
        return build_mapped(make, ("document_index", "sample_index", "shuffle_index"), entries, self.cache)


def epoch_seed(seed: int, epoch: int) -> int:
    """The run's seed for the first epoch; far from the seeds of neighbouring runs for later ones."""
    return (seed + epoch * 1_000_003) % 2**32


def build_mapped(make: Callable[..., Any], arrays: tuple[str, ...], entries: int, cache: str) -> Any:
    """A dataset of megatron-core whose index arrays are mapped from files in `cache`, made first if absent.

    Args:
        make: builds the dataset; takes changes of its configuration.
        arrays: the attributes that hold its index; `path_to_<attribute>` is each one's file.
        entries: size of the index; a small one is built in memory instead.
    """
    with _quiet():
        if entries < SMALL:
            return make(path_to_cache="")  # megatron-core's way to say: in memory
        dataset = make(path_to_cache=cache, defer_npy_index_mmap=True)
        files = {name: Path(getattr(dataset, f"path_to_{name}")) for name in arrays}
        if not _present(files):
            first = next(iter(files.values()))
            with locked(first.with_suffix(".lock")):
                if not _present(files):
                    _save(make(path_to_cache=""), files)
    for name, file in files.items():  # now, not at the first sample, which loader threads would race for
        setattr(dataset, name, _mapped(file))
    return dataset


def _mapped(file: Path) -> numpy.ndarray:
    """Here and not by megatron-core, which would run what is pickled in a file of that name."""
    try:
        return numpy.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{file}: is no array of numbers ({error}); delete it, and the next start makes it again"
        ) from error


def _present(files: dict[str, Path]) -> bool:
    return all(file.is_file() for file in files.values())


def _save(dataset: Any, files: dict[str, Path]) -> None:
    for name, file in files.items():
        temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}.npy")
        numpy.save(temporary, getattr(dataset, name))
        os.replace(temporary, file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides megatron-core's warnings that an index is kept in memory and that a blend has a single source."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
