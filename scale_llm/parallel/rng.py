"""Random-number generators of a rank as plain data."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """State of every generator this rank draws from: Python, numpy, torch, the device and megatron-core's tracker."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _on_cuda() else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned.

    Generators of a GPU and of a CPU take no state of each other: those of the device and of the tracker stay as they
    were seeded where the state is of the other kind.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if (state["cuda"] is not None) != _on_cuda():
        return
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _on_cuda() -> bool:
    """Whether this rank computes on a GPU: a CPU rank on a machine that has some never touches them."""
    return torch.cuda.is_initialized()
