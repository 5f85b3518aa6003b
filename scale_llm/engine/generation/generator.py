"""Text from an engine's model, on its own layout."""

from contextlib import nullcontext

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.batching import Plan, Slots
from scale_llm.engine.generation.noise import token_keys
from scale_llm.engine.generation.sampling import Sampler
from scale_llm.engine.generation.samples import Completion, Decode, Sample, SamplingParams, Stopping
from scale_llm.models.kv_cache import CachedTokens, KeyValueCache

PROMPT_TOKENS = 4096
"""Tokens of prompts that enter in one forward pass: bounds its memory."""


class Generator:
    """Continues prompts with the weights that the engine has at that moment."""

    def __init__(
        self, engine: Engine, *, max_batch_size: int, max_seq_length: int, decode: Decode | None = None
    ):  # fmt: skip
        """max_batch_size: samples at once; max_seq_length: tokens of the longest prompt with its completion; both set
        the cache's memory. decode: token ids -> text, for stop strings."""
        self._engine, self._decode = engine, decode
        self._size, self._longest = max_batch_size, max_seq_length
        self._cache: KeyValueCache | None = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], params: SamplingParams, seeds: list[int]) -> list[Completion]:
        """A completion of every prompt, in their order, the same on every rank of one model replica.

        Every rank of the replica calls it with the same arguments; data-parallel ranks may have other prompts. Token t
        of a sample depends on its prompt, its seed and t: not on the batch, its order or the layout.
        """
        self._check(prompts, params, seeds)
        engine = self._engine
        samples = [Sample(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        slots = Slots(
            list(samples), size=self._size, prompt_tokens=PROMPT_TOKENS, multiple=max(1, engine.row_multiple)
        )
        sampler = Sampler(params, engine.mesh.groups.tp, engine.vocab_size)
        stopping = Stopping(params, self._decode)
        if self._cache is None:
            self._cache = KeyValueCache(self._size, self._longest)
        with engine.whole_parameters():
            while slots.busy:
                self._step(slots, sampler, stopping)
        return [Completion(sample.tokens, sample.log_probs, sample.finished) for sample in samples]

    def _step(self, slots: Slots, sampler: Sampler, stopping: Stopping) -> None:
        """One token for every sample in use."""
        plan = slots.plan()
        logits = self._forward(plan)
        running = slots.running
        keys = token_keys([sample.seed for sample in running], [len(sample.tokens) for sample in running])
        tokens, log_probs = sampler(logits, keys.to(logits.device))
        ended = [
            slot
            for slot, (sample, token, log_prob) in enumerate(
                zip(running, tokens.tolist(), log_probs.tolist(), strict=True)
            )
            if stopping.add(sample, token, log_prob)
        ]
        slots.leave(ended, self._cache.move)

    def _forward(self, plan: Plan) -> torch.Tensor:
        device = self._engine.device.device
        tokens, positions = plan.tokens.to(device), plan.positions.to(device)
        cached = CachedTokens(
            cache=self._cache, positions=positions, sequences=plan.sequences, longest=plan.longest,
            prompts=plan.prompts,
        )  # fmt: skip
        (module,) = self._engine.modules
        return module(tokens[None], positions[None], None, packed_seq_params=cached)

    def _check(self, prompts, params: SamplingParams, seeds) -> None:
        problems = params.problems()
        if len(seeds) != len(prompts):
            problems.append(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
        room = self._longest - params.max_new_tokens
        for number, prompt in enumerate(prompts):
            if not prompt:
                problems.append(f"prompt {number} is empty: begin it with a token at least")
            elif len(prompt) > room:
                problems.append(
                    f"prompt {number} has {len(prompt)} tokens, and with max_new_tokens={params.max_new_tokens} more than "
                    f"max_seq_length={self._longest}: give at most {max(room, 0)}, or raise max_seq_length"
                )
        if problems:
            raise UserError(problems)
