"""Continuous batching: finished samples leave their slots, waiting ones enter; all in use are the first ones.

Every forward pass is planned here on the host: the latest token of each sample in use, and the prompts of those that
have just entered. Legend: t tokens of the row, n slots in use.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scale_llm.engine.generation.samples import Sample


@dataclass(frozen=True, slots=True)
class Plan:
    """tokens and positions: int64 [t]. prompts: (slot, first token in the row, tokens) of each that has entered,
    without its last token. lengths: tokens of each sample in use, the latest included."""

    tokens: torch.Tensor
    positions: torch.Tensor
    prompts: tuple[tuple[int, int, int], ...]
    lengths: tuple[int, ...]


class Slots:
    """The samples in use, by slot, and those that wait."""

    def __init__(self, samples: list[Sample], *, size: int, prompt_tokens: int, multiple: int):
        """size: slots; prompt_tokens: of prompts that enter in one pass, but one prompt always may; multiple: what t
        must be divisible by."""
        self.running: list[Sample] = []
        # Those of about one length side by side: attention then reads few places that hold nothing
        self._waiting = deque(sorted(samples, key=lambda sample: -len(sample.prompt)))
        self._size, self._prompt_tokens, self._multiple = size, prompt_tokens, multiple
        self._entered: list[int] = []  # slots

    @property
    def busy(self) -> bool:
        return bool(self.running or self._waiting)

    def plan(self) -> Plan:
        """Lets waiting samples enter, and lays out the next forward pass: of padding alone where there is nothing."""
        self._admit()
        tokens = [sample.latest for sample in self.running]
        positions = [sample.position for sample in self.running]
        prompts = []
        for slot in self._entered:
            before = self.running[slot].prompt[:-1]
            if before:
                prompts.append((slot, len(tokens), len(before)))
                tokens += before
                positions += range(len(before))
        self._entered = []
        padding = max(-len(tokens) % self._multiple, 0 if tokens else self._multiple)
        return Plan(
            torch.tensor(tokens + [0] * padding),
            torch.tensor(positions + [0] * padding),
            tuple(prompts),
            tuple(position + 1 for position in positions[: len(self.running)]),
        )

    def _admit(self) -> None:
        free, room = self._size - len(self.running), self._prompt_tokens
        while self._waiting and free and (len(self._waiting[0].prompt) <= room or not self._entered):
            sample = self._waiting.popleft()
            self._entered.append(len(self.running))
            self.running.append(sample)
            free, room = free - 1, room - len(sample.prompt)

    def leave(self, ended: list[int], move: Callable[[int, int, int], None]) -> None:
        """Empties slots. move: copies so many places of a slot over another's."""
        for slot in reversed(ended):
            last = self.running.pop()
            if slot < len(self.running):
                move(len(self.running), slot, last.position + 1)
                self.running[slot] = last
