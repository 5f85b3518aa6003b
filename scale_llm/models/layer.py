"""megatron-core's transformer layer, whose MLP may be asked for some places alone."""

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer


class Layer(TransformerLayer):
    """Parameters and their names are megatron-core's.

    places: int64 [m], those in the order of [s, b] that anything after the layer reads: attention has all keys and
    values, the MLP and what follows have these [m, 1, h]; None: all, [s, b, h].
    """

    places: torch.Tensor | None = None

    def _forward_mlp(self, hidden_states, *args, **kwargs):
        return super()._forward_mlp(at_places(hidden_states, self.places), *args, **kwargs)


def at_places(hidden_states: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """[s, b, h] -> [m, 1, h], the places [m] in the order of [s, b]; None: the tensor itself."""
    if places is None:
        return hidden_states
    return hidden_states.flatten(0, 1).index_select(0, places)[:, None]
