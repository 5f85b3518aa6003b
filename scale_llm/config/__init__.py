"""Layer 0: what a run is, as data. Importable without torch; imports nothing of scale_llm above it."""

from scale_llm.config.errors import UserError
from scale_llm.config.run import RunConfig

__all__ = ["RunConfig", "UserError"]
