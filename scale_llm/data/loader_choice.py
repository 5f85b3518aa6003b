"""Which loader a run has: data.loader."""

import importlib.util

import torch

from scale_llm.config.data import LoaderKind
from scale_llm.data.loader import Loader, SampleSource


def dali_is_installed() -> bool:
    """Whether NVIDIA DALI can be imported; it is not imported here, which takes a third of a second."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of NVIDIA's at all
        return False


def takes_dali(kind: LoaderKind, device: torch.device) -> bool:
    """auto: where there are both a GPU to copy to and DALI."""
    return kind is LoaderKind.dali or (kind is LoaderKind.auto and device.type == "cuda" and dali_is_installed())


def build_loader(
    kind: LoaderKind,
    dataset: SampleSource,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
    device: torch.device,
) -> Loader:
    """Micro-batches of one data-parallel rank; the same ones whichever loader makes them."""
    arguments = {
        "micro_batch_size": micro_batch_size,
        "data_parallel_rank": data_parallel_rank,
        "data_parallel_size": data_parallel_size,
        "num_workers": num_workers,
    }
    if not takes_dali(kind, device):
        return Loader(dataset, **arguments)
    from scale_llm.data.dali_loader import DaliLoader

    return DaliLoader(dataset, **arguments, device=device)
