"""Prompts in their order, and what the policy answers to them."""

import numpy as np
import torch.distributed as dist

from scale_llm.config.policy import PolicyStageConfig
from scale_llm.config.run import RunConfig
from scale_llm.data.chat.prompts import Prompt
from scale_llm.data.sequence_stream import SingleStream
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import Completion, SamplingParams
from scale_llm.stages.context import RunContext
from scale_llm.stages.generate import seed_of
from scale_llm.stages.policy.answers import Answers, gathered
from scale_llm.stages.policy.roles import Role


class Draws:
    """Prompts by their place in the order in which a run draws them: shuffled anew every epoch."""

    def __init__(self, cfg: RunConfig, prompts: list[Prompt], numbers: np.ndarray, *, shuffle: bool = True):
        """numbers: of the prompts that are drawn."""
        self._prompts, self._numbers = prompts, numbers
        self._stream = SingleStream(len(numbers), seed=cfg.train.seed, shuffle=shuffle)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, draw: int) -> Prompt:
        return self._prompts[int(self._numbers[self._stream.sample(draw)[0]])]


class Rollout:
    """Answers of the rollout's model, whole on every rank of the job."""

    def __init__(self, run: RunContext, role: Role, tokenizer: Tokenizer):
        stage = run.cfg.stage
        assert isinstance(stage, PolicyStageConfig)
        self._group, self._seed, self._each = run.mesh.host_group, run.cfg.train.seed, stage.num_generations_per_prompt
        self.params = SamplingParams(
            temperature=stage.temperature, top_k=stage.top_k, top_p=stage.top_p, max_new_tokens=stage.max_new_tokens,
            stop=frozenset(run.prepared.stop), stop_strings=tuple(stage.stop_strings),
        )  # fmt: skip
        self._greedy = SamplingParams(
            temperature=0.0, max_new_tokens=stage.max_new_tokens, stop=self.params.stop,
            stop_strings=self.params.stop_strings,
        )  # fmt: skip
        self._role, self._generator = role, None
        if role.is_here:
            self._generator = Generator(
                role.engine, max_batch_size=stage.generation_batch_size,
                max_seq_length=run.prepared.longest + stage.max_new_tokens,
                decode=tokenizer.decode if stage.stop_strings else None,
            )  # fmt: skip

    def sampled(self, draws: Draws, numbers: list[int]) -> Answers:
        """So many answers to each of these draws as the stage asks for."""
        return self._answers(draws, numbers, self._each, self.params)

    def likeliest(self, draws: Draws, numbers: list[int]) -> Answers:
        """One to each."""
        return self._answers(draws, numbers, 1, self._greedy)

    def _answers(self, draws: Draws, numbers: list[int], each: int, params: SamplingParams) -> Answers:
        asked = [number for number in numbers for _ in range(each)]
        prompts = [draws[number] for number in asked]
        made: dict[int, Completion] = {}
        if self._generator is not None:
            mesh = self._role.run.mesh
            mine = list(range(mesh.dp_rank, len(asked), mesh.sizes.dp))
            found = self._generator.generate(
                [prompts[place].tokens for place in mine], params,
                [seed_of(self._seed, asked[place], place % each) for place in mine],
            )  # fmt: skip
            self._generator.release()
            if self._role.speaks and mesh.cp_rank == 0:
                made = dict(zip(mine, found, strict=True))
        together = gathered(made, self._group)
        return Answers(prompts, [together[place] for place in range(len(asked))], asked)


def writes() -> bool:
    """Whether this rank writes what one rank must write."""
    return dist.get_rank() == dist.get_world_size() - 1
