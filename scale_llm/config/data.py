"""What to train on."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class FieldsConfig:
    text: str = "text"
    """Field of JSONL and Parquet rows that holds a document."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: Any = None
    """A file, glob, directory or indexed prefix; or a list of them, with weights before each by choice
    (`[0.7, a.jsonl, 0.3, b.parquet]`). Text, JSONL, Parquet, or Megatron .bin/.idx. None: the standard
    library of the running Python."""
    embedded_megabytes: float | None = None
    """How much of the running Python's standard library, when `path` is None; None: all of it."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    split: str = "949,50,1"
    """Shares of the documents for training, validation and test."""
    cache_dir: str | None = None
    """Where tokenizers, indexed tokens and sample indices are kept; None: <run_dir>/data."""
    reset_position_ids: bool = False
    """Positions start at 0 again after every end of document."""
    reset_attention_mask: bool = False
    """No attention across an end of document."""
    eod_mask_loss: bool = False
    """No loss where the input is the end-of-document token, as what follows is another document."""
    num_workers: int = 0
    """Threads that make micro-batches ahead; 0: each is made when it is asked for."""
