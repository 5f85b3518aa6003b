"""Text from an engine's model, on its own layout."""

import torch
import torch.distributed as dist

from scale_llm.config.errors import UserError
from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.batching import Slots
from scale_llm.engine.generation.noise import token_keys
from scale_llm.engine.generation.passes import Passes
from scale_llm.engine.generation.samples import Completion, Decode, OnToken, Sample, SamplingParams, Stopping
from scale_llm.engine.generation.sampling import Sampler

PROMPT_TOKENS = 4096
"""Tokens of prompts that enter in one forward pass: bounds its memory."""


class Generator:
    """Continues prompts with the weights that the engine has at that moment."""

    def __init__(self, engine: Engine, *, max_batch_size: int, max_seq_length: int, decode: Decode | None = None):
        """max_batch_size: samples at once; max_seq_length: tokens of the longest prompt with its completion; both set
        the cache's memory, which is taken by the first call. decode: token ids -> text, for stop strings.

        Raises:
            UserError: the model cannot answer, or not at that length.
        """
        module = engine.modules[0]
        if not module.is_language_model:
            raise UserError("generation: the model has a head of one number for each token; load a language model")
        table = module.max_sequence_length
        if module.position_embedding_type == "learned_absolute" and max_seq_length > table:
            raise UserError(
                f"max_seq_length={max_seq_length}: the model has learnt {table} positions; give at most {table}"
            )
        self._engine, self._decode = engine, decode
        self._size, self._longest = max_batch_size, max_seq_length
        self._passes = Passes(engine, slots=max_batch_size, length=max_seq_length)

    # Not inference_mode: megatron-core keeps the rotary angles it makes, and training may not save those of that mode.
    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], params: SamplingParams, seeds: list[int], on_token: OnToken | None = None
    ) -> list[Completion]:
        """A completion of every prompt, in their order, the same on every rank of one model replica.

        Every rank of the replica calls it with the same arguments; data-parallel ranks may have other prompts, or none,
        but all of them call it. Token t of a sample depends on its prompt, its seed and t: not on the batch, its order
        or the layout. Each token's log-probability is that of a training forward pass. on_token: sees tokens as they
        come, and may end samples.

        Raises:
            UserError: parameters out of range, prompts that are empty or too long.
        """
        self._check(prompts, params, seeds)
        engine = self._engine
        samples = [Sample(i, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
        slots = Slots(samples, size=self._size, prompt_tokens=PROMPT_TOKENS, multiple=engine.row_multiple)
        sampler = Sampler(params, engine.mesh.groups.tp, engine.vocab_size)
        stopping = Stopping(params, self._decode, on_token)
        with engine.whole_parameters():
            while self._passes.wanted(slots.busy):
                self._step(slots, sampler, stopping)
        return [Completion(sample.tokens, sample.log_probs, sample.finished) for sample in samples]

    def release(self) -> None:
        """Gives the cache's memory back; the next call takes it again."""
        self._passes.release()

    def _step(self, slots: Slots, sampler: Sampler, stopping: Stopping) -> None:
        """One token for every sample in use."""
        logits = self._passes(slots.plan())
        running = slots.running
        if not running:  # only other replicas had something to do
            return
        tokens, log_probs = self._chosen(logits, running, sampler)
        ended = []
        for slot, (sample, token, log_prob) in enumerate(zip(running, tokens, log_probs, strict=True)):
            if stopping.add(sample, token, log_prob):
                ended.append(slot)
        slots.leave(ended, self._passes.move)

    def _chosen(self, logits: torch.Tensor | None, running: list[Sample], sampler: Sampler):
        """Tokens and their log-probabilities as lists, on every stage. logits: [n, v/tp], on the last stage."""
        mesh, device = self._engine.mesh, self._engine.device.device
        told = torch.empty(2, len(running), dtype=torch.float64, device=device)  # ids are exact in it
        if logits is not None:
            keys = token_keys([sample.seed for sample in running], [len(sample.tokens) for sample in running])
            told[0], told[1] = sampler(logits, keys.to(device))
        if mesh.sizes.pp > 1:
            dist.broadcast(told, src=mesh.last_stage_rank, group=mesh.groups.pp)
        tokens, log_probs = told.tolist()
        return [int(token) for token in tokens], log_probs

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
                    f"prompt {number} has {len(prompt)} tokens, and with max_new_tokens={params.max_new_tokens} more "
                    f"than max_seq_length={self._longest}: give at most {max(room, 0)}, or raise max_seq_length"
                )
        if problems:
            raise UserError(problems)
