"""What the loop asks of a stage."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from scale_llm.engine.engine import Engine, StepResult


@dataclass(frozen=True, slots=True)
class Evaluation:
    """metrics by their TensorBoard tag; texts (Markdown) by theirs; remarks: lines for the log. Empty where there is
    nothing to evaluate."""

    metrics: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


class Stage(Protocol):
    """One kind of training: which batches, which loss, which evaluation. The loop does the rest."""

    engine: Engine | None
    """Of the model that the run is about; None on ranks that hold no part of it."""
    engines: dict[str, Engine | None]
    """Every model that is trained, by what its tensors' names in checkpoints begin with; `engine` under the empty
    name."""

    def start(self, *, fresh: bool) -> Evaluation:
        """What to do and to report once weights are loaded. fresh: no step has been done yet."""

    def step(self, consumed_samples: int, global_batch_size: int) -> StepResult:
        """One optimizer step on the global batch that begins at sample `consumed_samples`."""

    def leave_out(self, global_batch_size: int) -> None:
        """In place of a step: its samples are counted and nothing else."""

    def evaluate(self) -> Evaluation:
        """Changes nothing of the engine."""

    def state(self) -> dict[str, Any]:
        """Plain state beyond the engine's, the same on every rank."""

    def load_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Ends what the stage started, such as loader threads."""
