"""What the loop asks of a stage."""

from typing import Any, Protocol

from scale_llm.engine.engine import Engine, StepResult


class Stage(Protocol):
    """One kind of training: which batches, which loss, which evaluation. The loop does the rest."""

    engine: Engine

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        """One optimizer step on the global batch that begins at sample `consumed_samples`."""

    def evaluate(self) -> dict[str, float]:
        """Metrics by their TensorBoard tag; empty where there is nothing to evaluate."""

    def state(self) -> dict[str, Any]:
        """Plain state beyond the engine's, the same on every rank."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Ends what the stage started, such as loader threads."""
