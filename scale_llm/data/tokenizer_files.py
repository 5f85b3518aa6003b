"""A tokenizer's directory as transformers' AutoTokenizer loads it: tokenizer.json and what says how it is used."""

import json
from collections.abc import Iterable
from pathlib import Path

from scale_llm.config.errors import UserError
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.chat.template_files import template_source
from scale_llm.data.tokenizer import train_tokenizer


def train_directory(texts: Iterable[str], config: TokenizerConfig, directory: Path) -> None:
    """Trains a byte-level BPE and writes it into a directory: tokenizer.json, tokenizer_config.json,
    special_tokens_map.json, and chat_template.jinja where the configuration names one."""
    template = chat_template(config)
    train_tokenizer(
        texts, vocab_size=config.vocab_size, eod_token=config.eod_token, special_tokens=config.special_tokens,
        path=directory / "tokenizer.json",
    )  # fmt: skip
    special: dict[str, object] = {"eos_token": config.eod_token}
    if config.special_tokens:
        special |= {"additional_special_tokens": list(config.special_tokens)}
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' way to say that there is none
    }
    for name, value in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template(config: TokenizerConfig) -> str | None:
    """The text of `tokenizer.chat_template`; a UserError where it is no template."""
    if config.chat_template is None:
        return None
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    text = template_source(Path(), config).text
    messages: list = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]]
    try:
        render_jinja_template(conversations=messages, chat_template=text, eos_token=config.eod_token, bos_token="")
    except jinja2.TemplateError as error:
        problem = f"cannot write a question and an answer ({error}); correct it"
        raise UserError(f"tokenizer.chat_template={config.chat_template}: {problem}") from error
    return text
