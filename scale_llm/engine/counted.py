"""Logits only where the loss counts: a prompt needs none, and the matrix of the vocabulary is a large part of a step.

Shapes: b rows, s places of this rank, m places that are kept.
"""

import torch

COUNTED = "counted"
"""Key of a batch: int64 [m], places in the order of [s, b] whose logits the model makes."""

UNIT = 64
"""m is a multiple of this, so that few shapes are seen."""
WORTH = 0.9
"""Share of places that count from which on all of them are computed."""

_OF_THE_MODEL = ("tokens", "position_ids")


def only_counted(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with its COUNTED places, and what the loss reads [b, s] cut to them as one row, [1, m].

    On the host, as the loader made it: on a GPU the number of places would have to be waited for, so what a loader has
    brought there already stays as it is. Places that do not
    count fill up the last unit; their mask is 0. Batches without a mask, and those that mostly count, stay as they are.
    """
    if "loss_mask" not in batch or "labels" not in batch or batch["loss_mask"].is_cuda:
        return batch
    counts = batch["loss_mask"].t().flatten() != 0
    wanted = max(-(-int(counts.sum()) // UNIT), 1) * UNIT
    if wanted > WORTH * counts.numel():
        return batch
    places = torch.cat([counts.nonzero()[:, 0], (~counts).nonzero()[:, 0][: wanted - int(counts.sum())]])
    shape = batch["tokens"].shape
    of_the_loss = [key for key, value in batch.items() if value.shape == shape and key not in _OF_THE_MODEL]
    kept = {key: batch[key].t().flatten()[places][None] for key in of_the_loss}
    return {**batch, **kept, COUNTED: places}
