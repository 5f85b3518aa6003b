"""Hugging Face models and peft's adapters <-> `torch_dist` checkpoints, streamed tensor by tensor.

Under torchrun every rank converts its share.
"""

from scale_llm.checkpoint.huggingface.exporting import export_huggingface
from scale_llm.checkpoint.huggingface.importing import import_huggingface
from scale_llm.checkpoint.huggingface.merging import is_adapters, merge_checkpoint
from scale_llm.checkpoint.huggingface.peft_format import export_adapters, import_adapters, is_peft
from scale_llm.checkpoint.huggingface.source import HuggingFaceModel

__all__ = [
    "HuggingFaceModel",
    "export_adapters",
    "export_huggingface",
    "import_adapters",
    "import_huggingface",
    "is_adapters",
    "is_peft",
    "merge_checkpoint",
]
