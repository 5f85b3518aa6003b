"""Forward and backward passes of transformer layers as CUDA graphs: one launch a pass instead of one a kernel.

torch.cuda.make_graphed_callables captures them, where megatron-core's manager would ask for its global groups. What a
graph reads and writes stays where it was: so one shape, weights that are not moved, no collective, no dropout, and
nothing that Python decides in between, to which config.validate_graphs holds a run. A layer's graph has one place for
its activations: the backward pass of a micro-batch comes before the next forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class OfTensors(torch.nn.Module):
    """A layer as a function of tensors alone: hidden states [s, b, h] and, where it has them, rotary angles."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer
        self._pass = layer.forward  # what the layer does by itself, whatever replaces it later

    def forward(self, hidden_states: torch.Tensor, angles: torch.Tensor | None = None) -> torch.Tensor:
        output, _ = self._pass(hidden_states=hidden_states, attention_mask=None, rotary_pos_emb=angles)
        return output


class Replayed:
    """In place of a layer's forward: its graph where the pass is of what was captured, the layer itself elsewhere."""

    def __init__(self, layer: torch.nn.Module, replay: Callable[..., torch.Tensor], shape: torch.Size):
        self._layer, self._itself, self._replay, self._shape = layer, layer.forward, replay, shape
        # Tables that the layer kept from the passes before its capture: the graph reads them, so they stay as long
        self._read = [getattr(module, "_tables", None) for module in layer.modules()]

    def __call__(self, hidden_states, attention_mask=None, rotary_pos_emb=None, **rest):
        trains = self._layer.training and torch.is_grad_enabled() and getattr(self._layer, "places", None) is None
        others = (attention_mask, *rest.values())
        if not trains or hidden_states.shape != self._shape or any(other is not None for other in others):
            return self._itself(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **rest)
        return self._replay(hidden_states, *([] if rotary_pos_emb is None else [rotary_pos_emb])), None


@contextmanager
def capturable() -> Iterator[None]:
    """Around what makes the nodes of autograd that add up gradients, and keeps them: those of the default stream would
    bring it into a capture, which torch refuses."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def graph_layers(model: Any, rows: int, tokens: int) -> None:
    """From now on training passes of micro-batches [rows, tokens] replay graphs of the layers; others are as before.

    model: a GPT whose weights will stay where they are. A few passes run; weights and gradients are as they were.
    """
    layers = tuple(OfTensors(layer) for layer in model.decoder.layers)
    hidden = next(model.decoder.layers.parameters()).new_zeros(tokens, rows, model.config.hidden_size)
    angles = () if model.position_embedding_type != "rope" else (model.rotary_pos_emb(tokens),)
    samples = tuple((torch.zeros_like(hidden, requires_grad=True), *angles) for _ in layers)
    graphed = torch.cuda.make_graphed_callables(layers, samples)
    for layer, replay in zip(layers, graphed, strict=True):
        layer.layer.forward = Replayed(layer.layer, replay, hidden.shape)
