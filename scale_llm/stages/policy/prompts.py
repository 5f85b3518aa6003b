"""Prompts in the order in which a run draws them."""

import numpy as np

from scale_llm.config.run import RunConfig
from scale_llm.data.chat.prompts import Prompt
from scale_llm.data.sequence_stream import SingleStream


class Draws:
    """Prompts by their place in that order: shuffled anew every epoch."""

    def __init__(self, cfg: RunConfig, prompts: list[Prompt], numbers: np.ndarray, *, shuffle: bool = True):
        """numbers: of the prompts that are drawn."""
        self._prompts, self._numbers = prompts, numbers
        self._stream = SingleStream(len(numbers), seed=cfg.train.seed, shuffle=shuffle)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, draw: int) -> Prompt:
        return self._prompts[int(self._numbers[self._stream.sample(draw)[0]])]
