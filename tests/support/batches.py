"""Random tokens that depend on the step alone. No megatron-core here: the process of the tests itself makes them too.

Legend: s sequence.
"""

import torch

VOCAB_SIZE = 250  # below the 256 rows of the padded embedding, so that padding matters
GLOBAL_BATCH = 4
SEQ_LENGTH = 64


def samples(step: int, masks: str = "ones") -> dict[str, torch.Tensor]:
    """The global batch of one step, the same on every rank: tokens, labels, loss_mask, position_ids [4, s].

    masks: `ones`; `ragged`: sample i counts 18 i of its tokens, sample 0 none, so that no two micro-batches weigh the
    same; `documents`: attention_mask [4, 1, s, s] stops at document ends, which differ between samples.
    """
    generator = torch.Generator().manual_seed(step)
    # low ids are frequent, so that there is something to learn in a few steps
    tokens = (torch.rand(GLOBAL_BATCH, SEQ_LENGTH + 1, generator=generator) ** 3 * VOCAB_SIZE).long()
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(GLOBAL_BATCH, SEQ_LENGTH),
        "position_ids": torch.arange(SEQ_LENGTH).repeat(GLOBAL_BATCH, 1),
    }
    if masks == "ragged":
        for i in range(GLOBAL_BATCH):
            batch["loss_mask"][i, 18 * i :] = 0
    if masks == "documents":
        document = torch.rand(GLOBAL_BATCH, SEQ_LENGTH, generator=generator).lt(0.1).cumsum(1)
        same = document[:, None, :] == document[:, :, None]
        batch["attention_mask"] = ~(same.tril())[:, None]
    return batch
