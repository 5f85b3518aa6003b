"""Where the answers of samples end."""

from pathlib import Path

import tokenizers

from scale_llm.data.tokenizer import Tokenizer, train_tokenizer
from scale_llm.stages.samples import stop_tokens


def test_answers_stop_at_special_tokens_alone(tmp_path: Path):
    """A reference that was cut off ends in an ordinary token, at which no answer is to stop."""
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["the cat sat on the mat " * 50], vocab_size=280, eod_token="<|endoftext|>", path=path)
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    backend.save(str(path))
    tokenizer = Tokenizer.load(str(path), "<|endoftext|>")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    text = tokenizer.encode("the cat")
    assert stop_tokens(tokenizer, [text, [*text, end], []]) == {tokenizer.eod, end}
    assert stop_tokens(tokenizer, []) == {tokenizer.eod}
