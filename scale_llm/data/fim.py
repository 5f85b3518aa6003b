"""Fill in the middle: documents cut in three and put in another order (Bavarian et al. 2022, arXiv 2207.14255).

    PSM   <prefix> start <suffix> end <middle> what lies between
    SPM   <prefix> <suffix> end <middle> start, what lies between     their variant 2

As in StarCoder's and Megatron-LM's GPTFIMDataset (this megatron-core has none), on what lies between two ends of
document in a sample of s + 1 tokens, each with a probability of its own; what no longer fits at the end of the sample
is left out.

Cuts are between characters, as the paper finds that a model trained on cuts between tokens fails where a user's cursor
is inside a word; the three parts are tokenised again. Between tokens are cut: all documents where the tokenizer is not
one whose tokens simply join (it adds spaces or strips them), and a piece that begins or ends within a character or
holds special tokens, which no text stands for.

Random numbers depend on the seed and the index of the sample alone: not on ranks, batches, threads or where a run
resumed. They are of numpy's RandomState, which is the same in every version.
"""

import numpy
import tokenizers

from scale_llm.config.data import DataConfig

HALF = "\ufffd"
"""What decoders write for a part of a character."""


class FillInTheMiddle:
    """Changes rows of tokens in place."""

    def __init__(self, data: DataConfig, tokenizer_json: str, *, eod: int, seed: int):
        self._rate, self._spm_rate = data.fim_rate, data.fim_spm_rate
        self._eod, self._seed = eod, seed
        self._tokenizer = tokenizers.Tokenizer.from_file(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens spelt out in a text are text
        names = (data.fim_prefix_token, data.fim_middle_token, data.fim_suffix_token)
        found = [self._tokenizer.token_to_id(name) for name in names]
        assert all(token is not None for token in found), "checked before ranks start: tokenizer_json.fim_problems"
        self._prefix, self._middle, self._suffix = found
        special = [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        self._special = numpy.array(special, dtype=numpy.int64)
        self.by_characters = tokens_join(self._tokenizer)

    def __call__(self, row: numpy.ndarray, index: int) -> None:
        """row: int64 [s + 1], the tokens of sample `index`."""
        draw = numpy.random.RandomState([self._seed % 2**32, index % 2**32, index >> 32])
        parts: list[numpy.ndarray] = []
        begin = 0
        for end in [*numpy.flatnonzero(row == self._eod).tolist(), len(row)]:
            parts += [self._document(row[begin:end], draw), row[end : end + 1]]
            begin = end + 1
        whole = numpy.concatenate(parts)
        if len(whole) >= len(row):  # else, rarely, its parts have fewer tokens than it: nothing would fill the rest
            row[:] = whole[: len(row)]

    def _document(self, tokens: numpy.ndarray, draw: numpy.random.RandomState) -> numpy.ndarray:
        """A document, or a piece of one, perhaps put in another order."""
        chosen, spm = draw.random_sample(2) < (self._rate, self._spm_rate)
        if not len(tokens) or not chosen:
            return tokens
        start, middle, end = self._cut(tokens, draw)
        if spm:
            return numpy.concatenate([[self._prefix, self._suffix], end, [self._middle], start, middle])
        return numpy.concatenate([[self._prefix], start, [self._suffix], end, [self._middle], middle])

    def _cut(self, tokens: numpy.ndarray, draw: numpy.random.RandomState) -> list[numpy.ndarray]:
        """Three parts, any of which may be empty."""
        by_characters = self.by_characters and not numpy.isin(tokens, self._special).any()
        text = self._tokenizer.decode(tokens.tolist()) if by_characters else HALF
        if HALF in text:
            return numpy.split(tokens, _two_places(draw, len(tokens)))
        first, last = _two_places(draw, len(text))
        # "fast": without the places of tokens in the text, which took a third of the time
        texts = [text[:first], text[first:last], text[last:]]
        parts = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [numpy.array(part.ids, dtype=numpy.int64) for part in parts]


def _two_places(draw: numpy.random.RandomState, size: int) -> list[int]:
    return sorted(draw.randint(0, size + 1, size=2).tolist())


def tokens_join(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of two texts, one after the other, stand for the two texts joined."""
    pairs = (("ab", "cd"), ("ab ", "cd"), ("ab", " cd"), ("ab\n", "  cd"))
    for first, second in pairs:
        ids = [*tokenizer.encode(first, add_special_tokens=False).ids]
        ids += tokenizer.encode(second, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != first + second:
            return False
    return True
