"""Builds the GPTModel chunks of this rank."""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from scale_llm.config.model import Head, ModelConfig
from scale_llm.config.parameters import padded_rows
from scale_llm.models.heads import ScalarHead
from scale_llm.models.init import initialise
from scale_llm.models.rope_scaling import stretched
from scale_llm.models.spec import block_spec, choose_backend
from scale_llm.parallel.mesh import Mesh


class GPT(GPTModel):
    """megatron-core's GPTModel, which answers with logits [s, b, v/tp] instead of a transposed copy, or with one number
    for each token [s, b, 1], and whose tied output layer finds its data-parallel rank in its own groups instead of the
    global ones."""

    def __init__(self, *args, model: ModelConfig, **kwargs):
        super().__init__(*args, **kwargs)
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.inv_freq = stretched(self.rotary_pos_emb.inv_freq, model)
        self._scores = model.head is not Head.language_model
        if self._scores and self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection.tp, bias=model.head is Head.value)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._scores:
            for name in ("weight", "bias"):
                tensor = state.get(f"{prefix}output_layer.{name}")
                if tensor is not None:  # another name, so that no row of an output table is taken for it
                    tensor.key, tensor.allow_shape_mismatch = f"{prefix}score.{name}", False
        return state

    def _postprocess(self, hidden_states, *args, labels=None, runtime_gather_output=None, **kwargs):
        if not self.post_process:
            return hidden_states
        if self._scores:
            return self.output_layer(hidden_states)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        return logits

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict, output_layer_weight_key, first_stage_word_emb_key, metadata=None
    ):
        """The last stage's copy of the embedding is a replica of the first stage's in a checkpoint."""
        if not self.post_process or self.pre_process:
            return
        del sharded_state_dict[output_layer_weight_key]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, self.pg_collection.dp_cp.rank()),
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=self.pg_collection.dp_cp,
        )


def build_gpt(
    model: ModelConfig, config: TransformerConfig, mesh: Mesh, *, vocab_size: int, seed: int, on_cuda: bool
) -> list[GPT]:
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


def _build_chunk(model, config, mesh, vocab_size, *, vp_stage, backend) -> GPT:
    vpp = mesh.sizes.vpp
    pre = mesh.is_first_stage and (vpp is None or vp_stage == 0)
    post = mesh.is_last_stage and (vpp is None or vp_stage == vpp - 1)
    stage = vp_stage if vpp is not None else None
    return GPT(
        config=config,
        transformer_layer_spec=block_spec(config, backend, vp_stage=stage, pp_rank=mesh.pp_rank),
        vocab_size=padded_rows(vocab_size, model.make_vocab_size_divisible_by, mesh.sizes.tp),
        max_sequence_length=model.max_position_embeddings or model.seq_length,
        pre_process=pre,
        post_process=post,
        parallel_output=True,
        share_embeddings_and_output_weights=(
            model.head is Head.language_model and not model.untie_embeddings_and_output_weights
        ),
        position_embedding_type=model.position_embedding_type.value,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=mesh.groups,
        vp_stage=stage,
        model=model,
    )
