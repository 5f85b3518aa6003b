"""What the policy answers to prompts."""

from dataclasses import replace

from scale_llm.config.policy import PolicyStageConfig
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import Completion, SamplingParams
from scale_llm.stages.context import RunContext
from scale_llm.stages.generate import params_of, seed_of
from scale_llm.stages.policy.answers import Answers, gathered
from scale_llm.stages.policy.prompts import Draws
from scale_llm.stages.policy.roles import Role
from scale_llm.stages.policy.timing import WAIT, Timing


class Rollout:
    """Answers of the rollout's model, whole on every rank of the job."""

    def __init__(self, run: RunContext, role: Role, tokenizer: Tokenizer):
        stage = run.cfg.stage
        assert isinstance(stage, PolicyStageConfig)
        self._group, self._seed, self._each = run.mesh.host_group, run.cfg.train.seed, stage.num_generations_per_prompt
        self._params = params_of(stage, run.prepared.stop)
        self._of_held_out = replace(self._params, temperature=stage.validation_temperature)
        self._role, self._generator = role, None
        if role.is_here:
            self._generator = Generator(
                role.engine, max_batch_size=stage.generation_batch_size,
                max_seq_length=run.prepared.longest + stage.max_new_tokens,
                decode=tokenizer.decode if stage.stop_strings else None,
            )  # fmt: skip

    def sampled(self, draws: Draws, numbers: list[int], timing: Timing) -> Answers:
        """So many answers to each of these draws as the stage asks for. A collective of the whole job."""
        return self._answers(draws, numbers, self._each, self._params, timing)

    def held_out(self, draws: Draws, numbers: list[int]) -> Answers:
        """One to each, at stage.validation_temperature, likewise; the same random numbers every time."""
        return self._answers(draws, numbers, 1, self._of_held_out, Timing())

    def ended_by_string(self, answers: Answers) -> int:
        """How many ended with one of stage.stop_strings."""
        finished = [completion for completion in answers.completions if completion.finished]
        return sum(completion.tokens[-1] not in self._params.stop for completion in finished)

    def _answers(
        self, draws: Draws, numbers: list[int], each: int, params: SamplingParams, timing: Timing
    ) -> Answers:  # fmt: skip
        asked = [number for number in numbers for _ in range(each)]
        prompts = [draws[number] for number in asked]
        with timing.part("gen"), self._role.at_work():
            made = self._made([prompt.tokens for prompt in prompts], asked, each, params)
        with timing.part(WAIT):
            together = gathered(made, self._group)
        return Answers(prompts, [together[place] for place in range(len(asked))], asked)

    def _made(
        self, prompts: list[list[int]], asked: list[int], each: int, params: SamplingParams
    ) -> dict[int, Completion]:
        """Of this replica, by their place, on the rank that speaks for it."""
        if self._generator is None:
            return {}
        mesh = self._role.run.mesh
        mine = list(range(mesh.dp_rank, len(asked), mesh.sizes.dp))
        seeds = [seed_of(self._seed, asked[place], place % each) for place in mine]
        found = self._generator.generate([prompts[place] for place in mine], params, seeds)
        self._generator.release()
        return dict(zip(mine, found, strict=True)) if self._role.speaks and mesh.cp_rank == 0 else {}
