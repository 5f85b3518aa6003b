"""Hugging Face models -> `torch_dist` checkpoints and back, tensor by tensor; and straight into a running model.

The tables of `models.huggingface` say which tensors make which; nothing here knows a family.
"""

from scale_llm.checkpoint.huggingface.exporting import export_huggingface
from scale_llm.checkpoint.huggingface.importing import import_huggingface
from scale_llm.checkpoint.huggingface.source import HuggingFaceModel

__all__ = ["HuggingFaceModel", "export_huggingface", "import_huggingface"]
