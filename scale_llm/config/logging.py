"""What a run prints and writes."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    tensorboard: bool = True
    progress: bool = True
    """A live bar when standard output is a terminal."""
    log_params_norm: bool = False
    log_num_zeros_in_grad: bool = False
