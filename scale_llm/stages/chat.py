"""A conversation with a model: one answer at a time, its text as it comes.

Rank 0 is asked; it tells the others of the same model, which `follow`, what to answer and whether to stop.
"""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.config.checkpoint_files import latest_checkpoint
from scale_llm.config.errors import UserError
from scale_llm.config.stage import GenerateConfig
from scale_llm.data.chat.prompts import turn_ends
from scale_llm.data.chat.template import ChatTemplate
from scale_llm.data.chat.turns import Message
from scale_llm.data.of_stage import places_taken
from scale_llm.data.tokenizer import TextStream
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import Completion, OnToken, SamplingParams
from scale_llm.parallel.device import stop
from scale_llm.stages.context import RunContext
from scale_llm.stages.generate import params_of
from scale_llm.stages.run_state import load_weights

IDLE = datetime.timedelta(days=30)
"""How long a person may think: the other ranks wait in a collective meanwhile."""


class NoRoom(UserError):
    """The conversation fills the sequence."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    """Without the token that ended it."""
    tokens: int
    finished: bool
    """It ended by itself, not at a limit or by the reader's wish."""
    full: bool
    """It took all places that the sequence has."""


class ChatModel:
    """The model of checkpoint.load on the ranks of this job, ready to answer."""

    def __init__(self, run: RunContext):
        cfg = run.cfg
        self._template = ChatTemplate.load(cfg.tokenizer.path, cfg.tokenizer)
        tokenizer = self._tokenizer = self._template.tokenizer
        self._ends = turn_ends(self._template)
        self._group = dist.new_group(backend="gloo", timeout=IDLE)
        self._engine = Engine(cfg, run.mesh, run.device, vocab_size=run.vocab_size, trainable=False)
        found = latest_checkpoint(cfg.checkpoint.load)
        assert found is not None, "validated"
        load_weights(run, self._engine, found[1])
        self._virtual = list(range(run.vocab_size, run.vocab_size + places_taken(cfg)))  # prompt tuning's
        self._longest = cfg.model.seq_length
        self._generator = Generator(
            self._engine, max_batch_size=1, max_seq_length=self._longest, decode=tokenizer.decode
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        """Of this rank."""
        return sum(weight.numel() for module in self._engine.modules for weight in module.parameters())

    def prompt(self, messages: list[Message]) -> list[int]:
        """The conversation as tokens.

        Raises:
            UserError: the template cannot write it.
        """
        return self._virtual + self._template.prompt(messages)

    def answer(
        self, messages: list[Message], stage: GenerateConfig, seed: int, on_text: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Answer:  # fmt: skip
        """What the assistant says next; `on_text` gets it piece by piece. stopped: whether the reader has had enough,
        asked after each token. An answer gets as many of stage.max_new_tokens as the sequence has room for.

        Raises:
            UserError: no room for an answer (NoRoom), settings out of range, messages that the template cannot write.
        """
        prompt = self.prompt(messages)
        room = self._longest - len(prompt)
        if room < 1:
            raise NoRoom(
                f"the conversation has {len(prompt)} tokens, which leaves no room for an answer in model.seq_length="
                f"{self._longest}; shorten it, or give a larger model.seq_length at the start"
            )
        params = params_of(stage, self._ends, max_new_tokens=min(stage.max_new_tokens, room))
        if problems := params.problems():
            raise UserError(problems)
        stream = TextStream(self._tokenizer.decode)
        silent = self._ends & self._tokenizer.special_ids

        def on_token(_: int, token: int) -> bool:
            if token not in silent:
                on_text(stream.add(token))
            return self._agreed(stopped())

        self._told((prompt, params, seed))
        (found,) = self._generate(prompt, params, seed, on_token)
        on_text(stream.rest())
        shown = found.tokens[:-1] if found.tokens[-1] in silent else found.tokens
        full = not found.finished and len(found.tokens) == room
        return Answer(self._tokenizer.decode(shown), len(found.tokens), found.finished, full)

    def follow(self) -> None:
        """What the other ranks do until rank 0 closes."""
        while (asked := self._told(None)) is not None:
            prompt, params, seed = asked
            self._generate(prompt, params, seed, lambda *_: self._agreed(False))
        stop()

    def close(self) -> None:
        """Rank 0's end, and with it the others'."""
        self._told(None)
        stop()

    def _generate(self, prompt: list[int], params: SamplingParams, seed: int, on_token: OnToken) -> list[Completion]:
        return self._generator.generate([prompt], params, [seed], on_token)

    def _told(self, what: Any) -> Any:
        """What rank 0 says to all."""
        said = [what]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def _agreed(self, wish: bool) -> bool:
        """Whether all stop here: rank 0's wish."""
        if dist.get_world_size() == 1:
            return wish
        flag = torch.tensor([int(wish)])
        dist.broadcast(flag, src=0, group=self._group)
        return bool(flag)
