"""Hugging Face models as tables: which config keys and tensors of theirs are which of Megatron's."""

from scale_llm.models.huggingface.config import FAMILIES, export_family, family_of, read_model, write_config
from scale_llm.models.huggingface.table import Family, Form, Part, Tensor

__all__ = ["FAMILIES", "Family", "Form", "Part", "Tensor", "export_family", "family_of", "read_model", "write_config"]
