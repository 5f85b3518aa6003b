"""Text to tokens."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    path: str | None = None
    """A tokenizer.json, or a directory that holds one; None: train one on the data."""
    vocab_size: int = 8192
    """Size of a tokenizer trained here, special tokens included."""
    eod_token: str = "<|endoftext|>"
    """End-of-document token."""
    special_tokens: list[str] = field(default_factory=list)
    """Further special tokens of a tokenizer trained here, such as those of a chat template."""
    chat_template: str | None = None
    """A Jinja file that turns a conversation into text; None: the tokenizer's own, else the built-in one. A tokenizer
    trained here keeps it."""
