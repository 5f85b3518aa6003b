"""One forward pass of generation through all pipeline stages.

Shapes: t tokens of the row, h hidden, n samples in use, v vocabulary.
"""

import torch
import torch.distributed as dist

from scale_llm.engine.engine import Engine
from scale_llm.engine.generation.batching import Plan
from scale_llm.models import fp8
from scale_llm.models.kv_cache import CachedTokens, KeyValueCache
from scale_llm.parallel import collectives
from scale_llm.parallel.fused import uncompiled


class Passes:
    """Runs planned rows, one after the other, with a cache of keys and values.

    Stages run in turn: a row is on one stage at a time. Context-parallel ranks all do the same work.
    """

    def __init__(self, engine: Engine, *, slots: int, length: int):
        self._engine, self._slots, self._length = engine, slots, length
        self._cache: KeyValueCache | None = None
        mesh = engine.mesh
        self._ranks = dist.get_process_group_ranks(mesh.groups.pp)
        # Experts of other replicas' tokens: every replica must run as many passes as the busiest.
        replica = mesh.sizes.tp * mesh.sizes.cp
        self._together = bool(engine.config.num_moe_experts) and mesh.sizes.ep * mesh.sizes.expert_tp > replica

    def wanted(self, busy: bool) -> bool:
        """Whether this rank must run another pass. A collective over replicas where they share experts."""
        if not self._together:
            return busy
        flag = torch.tensor([float(busy)], device=self._engine.device.device)
        collectives.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._engine.mesh.groups.tp_dp_cp)
        return bool(flag.item())

    def __call__(self, plan: Plan) -> torch.Tensor | None:
        """Logits [n, v/tp] of the latest tokens, on the last stage; None elsewhere."""
        if self._cache is None:
            self._cache = KeyValueCache(self._slots, self._length)
        engine, device = self._engine, self._engine.device.device
        tokens, positions = plan.tokens.to(device), plan.positions.to(device)
        cached = CachedTokens(
            cache=self._cache, positions=positions, lengths=plan.lengths, prompts=plan.prompts
        )  # fmt: skip
        logits = None
        for module in engine.modules:  # one, or this rank's virtual stages in turn
            if not module.pre_process:
                module.set_input_tensor(self._receive(tokens.numel()))
            with fp8.disabled(), uncompiled():  # calling a compiled pass takes longer than a few tokens' pass itself
                out = module(tokens[None], positions[None], None, packed_seq_params=cached)
            if module.post_process:
                logits = out
            else:
                dist.send(out.contiguous(), dst=self._neighbour(1), group=engine.mesh.groups.pp)
        return logits

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of a slot over another's."""
        self._cache.move(source, target, length)

    def release(self) -> None:
        """Gives the cache's memory back."""
        self._cache = None

    def _receive(self, length: int) -> torch.Tensor:
        """Activations [t or t/tp, 1, h] of the stage before."""
        engine, config = self._engine, self._engine.config
        shape = (length // engine.row_multiple, 1, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=engine.device.device)
        dist.recv(hidden, src=self._neighbour(-1), group=engine.mesh.groups.pp)
        return hidden

    def _neighbour(self, step: int) -> int:
        """Global rank of the next (1) or previous (-1) stage; virtual stages go round."""
        return self._ranks[(self._engine.mesh.pp_rank + step) % len(self._ranks)]
