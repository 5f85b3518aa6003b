"""What to train on."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class ChatFormat(Enum):
    auto = "auto"
    messages = "messages"
    prompt_response = "prompt_response"
    alpaca = "alpaca"
    sharegpt = "sharegpt"


class BadRow(Enum):
    fail = "fail"
    drop = "drop"


class TooLong(Enum):
    truncate = "truncate"
    drop = "drop"
    fail = "fail"


class LoaderKind(Enum):
    torch = "torch"
    dali = "dali"
    auto = "auto"


@dataclass(kw_only=True, slots=True)
class FieldsConfig:
    """Names of the fields of JSONL and Parquet rows."""

    text: str = "text"
    """A document."""
    messages: str = "messages"
    """A conversation: a list of objects with a role and a content."""
    role: str = "role"
    content: str = "content"
    prompt: str = "prompt"
    """What the user says: a string, or a list of messages."""
    response: str = "response"
    """What the assistant answers."""
    system: str = "system"
    """A system prompt for rows that have one outside their messages."""
    tools: str = "tools"
    """Descriptions of functions for the chat template."""
    weight: str = "weight"
    """What the loss of the row is multiplied by, be it a conversation, a comparison or a single answer; 1 where the
    field is absent."""
    instruction: str = "instruction"
    """Alpaca: instruction, input (may be absent or empty) and output."""
    input: str = "input"
    output: str = "output"
    conversations: str = "conversations"
    """ShareGPT: a list of objects with a sender and a value."""
    sender: str = "from"
    value: str = "value"
    chosen: str = "chosen"
    """The better answer to the prompt: a string, a message, or a list of messages, which may begin with the prompt."""
    rejected: str = "rejected"
    """The worse one."""
    answers: str = "answers"
    """A list of two or more answers, best first unless ranks or scores say otherwise. `responses` is read too."""
    ranks: str = "ranks"
    """A number for each answer, the lowest for the best."""
    scores: str = "scores"
    """A number for each answer, the highest for the best."""
    margin: str = "margin"
    """By how much the reward of the best answer should exceed the others'; 0 where the field is absent."""
    ground_truth: str = "ground_truth"
    """What a reward function compares an answer with (stage=ppo, grpo); where a row has none, its `label`."""
    data_source: str = "data_source"
    """Where a row is from, for reward functions that tell sources apart."""
    extra_info: str = "extra_info"
    """An object that reward functions are given."""
    completion: str = "completion"
    """The answer of an unpaired row (KTO)."""
    label: str = "label"
    """Whether that answer is desirable: true or false (KTO); or what a reward function compares an answer with."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    path: Any = None
    """A file, glob, directory or indexed prefix; or a list of them, with weights before each by choice
    (`[0.7, a.jsonl, 0.3, b.parquet]`); or sources by name, each a path or {path, weight} or {path, epochs}
    (`{web: a.jsonl, wiki: {path: b/, epochs: 2}}`). Text, JSONL, Parquet, or Megatron .bin/.idx. Weights are shares of
    the samples, normalised. None: the standard library of the running Python."""
    temperature: float = 1.0
    """T of shares proportional to tokens^(1/T), in place of weights: above 1 small sources are taken more often than
    they hold. 1: each source as much as it holds."""
    embedded_megabytes: float | None = None
    """How much of the running Python's standard library, when `path` is None; None: all of it."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    split: str = "949,50,1"
    """Shares of the documents, or conversations, for training, validation and test."""
    cache_dir: str | None = None
    """Where tokenizers, indexed tokens and sample indices are kept; None: <run_dir>/data."""
    reset_position_ids: bool = False
    """Positions start at 0 again after every end of document."""
    reset_attention_mask: bool = False
    """No attention across an end of document."""
    eod_mask_loss: bool = False
    """No loss where the input is the end-of-document token, as what follows is another document."""
    index_workers: int | None = None
    """Processes that turn text into tokens; None: one for each core. The tokens do not depend on it."""
    max_document_megabytes: float = 16.0
    """Larger documents are bad rows."""
    fim_rate: float = 0.0
    """Share of the training documents whose middle is to be filled in: cut in three and put in another order, see
    data/fim.py."""
    fim_spm_rate: float = 0.5
    """Share of these that are in the order suffix, prefix, middle; the others are prefix, suffix, middle."""
    fim_prefix_token: str = "<fim_prefix>"
    """Marks the three parts; the tokenizer must have it."""
    fim_middle_token: str = "<fim_middle>"
    fim_suffix_token: str = "<fim_suffix>"
    loader: LoaderKind = LoaderKind.auto
    """Who makes training batches of documents: torch; NVIDIA DALI, which copies the next ones to the GPU while this one
    is used; auto: DALI where it is installed and there is a GPU. The batches are the same."""
    num_workers: int = 0
    """Threads that make micro-batches ahead; 0: each is made when it is asked for."""
    format: ChatFormat = ChatFormat.auto
    """How rows hold a conversation; auto: by the fields that the first row has."""
    on_bad_row: BadRow = BadRow.fail
    """A row that is no document or conversation (no text, too large, unknown role, no assistant turn, not JSON): stop
    with all of them listed, or leave them out, counted and listed in the report."""
    on_too_long: TooLong = TooLong.truncate
    """A conversation of more tokens than model.seq_length: cut off its end, leave it out, or stop. Counted. Prompts
    (stage=generate) are never cut: drop is what they have where nothing is said."""
