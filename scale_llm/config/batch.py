"""Batch arithmetic: how many samples each step takes. Pure numbers, no torch."""

from scale_llm.config.train import TrainConfig


def global_batch_size(train: TrainConfig, consumed_samples: int) -> int:
    """Samples of the step that starts after `consumed_samples`; grows during ramp-up as Megatron's does."""
    if not train.rampup_batch_size:
        return train.global_batch_size
    start, increment, ramp_samples = train.rampup_batch_size
    steps = max(1, (train.global_batch_size - start) // increment)
    done = int(consumed_samples / (ramp_samples / steps)) if ramp_samples > 0 else steps
    return min(start + done * increment, train.global_batch_size)


def total_samples(train: TrainConfig) -> int:
    """Samples the whole run consumes. A length in epochs must have been settled (`settle_epochs`) with the data."""
    if train.train_samples is not None:
        return train.train_samples
    assert train.train_iters is not None, "validated: train_iters or train_samples is set"
    if not train.rampup_batch_size:
        return train.train_iters * train.global_batch_size
    return samples_after(train, train.train_iters)


def settle_epochs(train: TrainConfig, samples: int) -> None:
    """Gives a run whose epochs hold so many samples its length: as many whole batches as it takes, the last of which
    may be partly empty."""
    consumed = 0
    while consumed < samples:
        size = global_batch_size(train, consumed)
        steps = -(-(samples - consumed) // size) if size == train.global_batch_size else 1
        consumed += steps * size
    train.train_samples = consumed


def samples_after(train: TrainConfig, iterations: int) -> int:
    """Samples consumed by the first `iterations` steps."""
    consumed = 0
    for done in range(iterations):
        size = global_batch_size(train, consumed)
        if size == train.global_batch_size:
            return consumed + (iterations - done) * size
        consumed += size
    return consumed


def total_iterations(train: TrainConfig) -> int:
    """Steps of the whole run; the last incomplete batch of train_samples is left out."""
    if train.train_iters is not None:
        return train.train_iters
    assert train.train_samples is not None, "validated: train_iters or train_samples is set"
    consumed = iterations = 0
    while True:
        size = global_batch_size(train, consumed)
        if size == train.global_batch_size:
            return iterations + (train.train_samples - consumed) // size
        if consumed + size > train.train_samples:
            return iterations
        consumed += size
        iterations += 1
