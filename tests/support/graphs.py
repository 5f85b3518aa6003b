"""What a rank does in the tests of CUDA graphs, on a GPU or with a stand-in for them."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from scale_llm.config.run import RunConfig
from scale_llm.engine import engine as engines
from support.batches import GLOBAL_BATCH, samples
from support.training import config, make_engine, micro_batches


class StandIn(torch.nn.Module):
    """As torch.cuda.make_graphed_callables gives it, without a graph: what enters is copied to where the sample was,
    what left in the pass before is lost, and gradients of weights leave as outputs do."""

    replays = 0

    def __init__(self, module: torch.nn.Module, sample: tuple[torch.Tensor, ...]):
        super().__init__()
        self.module, self.sample = module, sample
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.output: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *angles: torch.Tensor) -> torch.Tensor:
        assert hidden.shape == self.sample[0].shape and len(angles) == len(self.sample) - 1
        return _Pass.apply(self, hidden, *self.weights)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: StandIn, hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        StandIn.replays += 1
        ctx.graph = graph
        with torch.no_grad():
            if graph.output is not None:
                graph.output.fill_(float("nan"))
            graph.sample[0].copy_(hidden)
        with torch.enable_grad():
            graph.output = graph.module(*graph.sample)
        return graph.output.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        graph = ctx.graph
        found = torch.autograd.grad(graph.output, (graph.sample[0], *graph.weights), gradient)
        return None, *found


def stand_in(modules, samples):
    return tuple(StandIn(module, sample) for module, sample in zip(modules, samples, strict=True))


def train(overrides: dict[str, Any], steps: int, replayed: bool, on_gpu: bool = False) -> dict[str, Any]:
    """Losses, gradient norms, losses of evaluations between, and how many passes of layers were replayed.

    replayed: False leaves the layers as they are, all else alike.
    """
    cfg = config({**overrides, "model.backend": "torch", "train.cuda_graph_impl": "local"})
    with ExitStack() as changes:  # on a GPU one process is the rank of all calls
        if not replayed:
            changes.enter_context(patch.object(engines, "graph_layers", lambda *_: None))
        elif not on_gpu:
            changes.enter_context(patch.object(torch.cuda, "make_graphed_callables", stand_in))
        return _train(cfg, steps)


def _train(cfg: RunConfig, steps: int) -> dict[str, Any]:
    engine, loss = make_engine(cfg)
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "evaluated": []}
    for step in range(steps):
        batches = micro_batches(samples(step), engine.mesh, cfg.train.micro_batch_size)
        result = engine.train_step(batches, loss, samples=GLOBAL_BATCH)
        seen["loss"].append(result.metrics["lm loss"])
        seen["grad_norm"].append(result.grad_norm)
        seen["evaluated"].append(engine.evaluate(batches, loss)["lm loss"])
    longer = {key: torch.cat([value, value], dim=1) for key, value in samples(0).items()}
    result = engine.train_step(micro_batches(longer, engine.mesh, 1), loss, samples=GLOBAL_BATCH)
    seen["another_shape"] = result.metrics["lm loss"]
    seen["replays"], seen["micro_batches"] = StandIn.replays, len(batches)
    layers = engine.modules[0].decoder.layers
    seen["graphed"] = all(type(layer.forward).__name__ == "Replayed" for layer in layers)
    return seen
