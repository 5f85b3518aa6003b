"""Conversations written out as one text, as in Anthropic's HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""

import re

from scale_llm.data.chat.turns import Message, RowError, unicode

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_START = re.compile(r"\s*Human:")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_OPEN = re.compile(r"\n\nAssistant:\s*\Z")
"""The end of a transcript in which the assistant is to speak next."""


def is_transcript(text: str) -> bool:
    """Is it a conversation, and does the assistant speak in it?"""
    return bool(_START.match(text)) and "\n\nAssistant:" in text


def is_open_transcript(text: str) -> bool:
    """Is it a conversation that the assistant is to continue?"""
    return is_transcript(text) and bool(_OPEN.search(text))


def transcript(text: str, field: str) -> list[Message]:
    """The turns of a transcript, white space around them left out; an open one ends with the turn before."""
    _, *parts = _TURN.split(_OPEN.sub("", text))
    if len(parts) < 2:
        raise RowError(f"field {field!r}: a transcript without turns; remove the row", "empty conversation")
    speakers, texts = parts[::2], parts[1::2]
    return [
        {"role": SPEAKERS[speaker], "content": unicode(said.strip(), field)}
        for speaker, said in zip(speakers, texts, strict=True)
    ]
