"""What is asked for and what is given back, and a sample between the two."""

from collections.abc import Callable
from dataclasses import dataclass, field

from scale_llm.config.errors import UserError
from scale_llm.config.validate_sampling import sampling_problems

Decode = Callable[[list[int]], str]

OnToken = Callable[[int, int], bool | None]
"""(number of the prompt, token just drawn) -> whether its sample ends here, unfinished. Called on every rank, where it
must answer alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """temperature: logits are divided by it; 0 takes the likeliest token always. top_k: of these many likeliest tokens
    only; 0: of all. top_p: of the fewest likeliest tokens whose probabilities (after top_k) reach this sum.

    stop: token ids that end a sample, which includes them. stop_strings: texts that end a sample, which includes the
    token that completes them; the Generator needs `decode` for them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """A sentence for every value that is out of range."""
        return sampling_problems(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, max_new_tokens=self.max_new_tokens,
            stop_strings=self.stop_strings,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Completion:
    """tokens: new ones, a stop token included. log_probs: of each, FP32, under the full distribution at the sampling
    temperature, before top_k and top_p (at temperature 1 where it is 0). finished: a stop token or stop string was
    reached, not the length limit."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool


@dataclass(slots=True)
class Sample:
    """A sample while it grows. number: its place among the prompts."""

    number: int
    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def latest(self) -> int:
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def position(self) -> int:
        """Of the latest token."""
        return len(self.prompt) + len(self.tokens) - 1


class Stopping:
    """Decides after each token whether a sample has ended."""

    MARGIN = 4
    """Tokens that are decoded beyond those a stop string can span: decoders may treat the first ones otherwise."""

    def __init__(self, params: SamplingParams, decode: Decode | None, on_token: OnToken | None = None):
        if params.stop_strings and decode is None:
            raise UserError(
                f"stop_strings={params.stop_strings}: the Generator was made without `decode`, which turns tokens into "
                "text; give it the tokenizer's"
            )
        self._params, self._decode, self._on_token = params, decode, on_token
        # Every token has a byte at least, so a string cannot span more tokens than it has bytes.
        self._tail = max((len(text.encode()) for text in params.stop_strings), default=0) + self.MARGIN

    def add(self, sample: Sample, token: int, log_prob: float) -> bool:
        """Appends a token; whether it is the sample's last."""
        sample.tokens.append(token)
        sample.log_probs.append(log_prob)
        sample.finished = token in self._params.stop or self._completes(sample.tokens)
        halted = self._on_token is not None and bool(self._on_token(sample.number, token))
        return halted or sample.finished or len(sample.tokens) == self._params.max_new_tokens

    def _completes(self, tokens: list[int]) -> bool:
        if not self._params.stop_strings:
            return False
        text = self._decode(tokens[-self._tail :])
        return any(stop in text for stop in self._params.stop_strings)
