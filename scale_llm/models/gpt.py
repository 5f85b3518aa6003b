"""Builds the GPTModel chunks of this rank."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from scale_llm.config.model import ModelConfig
from scale_llm.models.init import initialise
from scale_llm.models.spec import block_spec, choose_backend
from scale_llm.parallel.mesh import Mesh


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding: the next multiple of `divisible_by * tp` (Megatron's rule)."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def build_gpt(
    model: ModelConfig, config: TransformerConfig, mesh: Mesh, *, vocab_size: int, seed: int, on_cuda: bool
) -> list[GPTModel]:
    """This rank's chunks of the model, one per virtual pipeline stage, with initial weights.

    vocab_size: tokens before padding. The weights depend on the seed and on global names alone, not on the mesh.
    """
    backend = choose_backend(model.backend, on_cuda=on_cuda)
    chunks = [
        _build_chunk(model, config, mesh, vocab_size, vp_stage=stage, backend=backend)
        for stage in range(mesh.sizes.vpp or 1)
    ]
    for chunk in chunks:
        if on_cuda:
            chunk.cuda(torch.cuda.current_device())
    initialise(chunks, config, mesh, seed=seed)
    return chunks


def _build_chunk(model, config, mesh, vocab_size, *, vp_stage, backend) -> GPTModel:
    vpp = mesh.sizes.vpp
    pre = mesh.is_first_stage and (vpp is None or vp_stage == 0)
    post = mesh.is_last_stage and (vpp is None or vp_stage == vpp - 1)
    stage = vp_stage if vpp is not None else None
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, backend, vp_stage=stage, pp_rank=mesh.pp_rank),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, mesh.sizes.tp),
        max_sequence_length=model.max_position_embeddings or model.seq_length,
        pre_process=pre,
        post_process=post,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type.value,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=mesh.groups,
        vp_stage=stage,
    )
