"""What the data package takes from megatron-core: the only module of the package that imports it.

Without a GPU megatron-core is adapted first: whichever part of a process imports it first must do so, and
indexing runs in processes that are no ranks.
"""

import warnings

import torch

from scale_llm.parallel import cpu

if not torch.cuda.is_available():
    cpu.adapt()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex are absent is no news for a data set
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "BlendedDataset",
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
]
