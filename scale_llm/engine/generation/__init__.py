"""Text from a model as it trains: its own weights, its own layout, keys and values of earlier tokens kept."""

from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import Completion, SamplingParams

__all__ = ["Completion", "Generator", "SamplingParams"]
