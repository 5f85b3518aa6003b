"""Builds the GPTModel chunks of this rank."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from scale_llm.config.model import Head, ModelConfig
from scale_llm.config.parameters import padded_rows
from scale_llm.config.peft import LOW_RANK, PeftConfig, PeftMethod
from scale_llm.config.peft_targets import chosen_parts
from scale_llm.models import fp8
from scale_llm.models.adapters.layers import Adapted, adapt_spec
from scale_llm.models.adapters.names import is_adapter
from scale_llm.models.adapters.prompt import VirtualTokens
from scale_llm.models.heads import ScalarHead
from scale_llm.models.init import initialise
from scale_llm.models.kv_cache import CachedTokens
from scale_llm.models.layer import at_places
from scale_llm.models.neftune import add_noise
from scale_llm.models.rope_scaling import stretched
from scale_llm.models.spec import block_spec, choose_backend
from scale_llm.parallel.mesh import Mesh


class GPT(GPTModel):
    """megatron-core's GPTModel, which answers with logits [s, b, v/tp] instead of a transposed copy, or with one number
    for each token [s, b, 1], and whose tied output layer finds its data-parallel rank in its own groups instead of the
    global ones."""

    def __init__(self, *args, model: ModelConfig, vocabulary: int, peft: PeftConfig, noise: float, **kwargs):
        """vocabulary: tokens before padding; noise: NEFTune's alpha."""
        super().__init__(*args, **kwargs)
        self._noise, self._is_frozen = noise, peft.method is not PeftMethod.none
        self.virtual_tokens = None
        if self.pre_process and peft.method is PeftMethod.prompt_tuning:
            self.virtual_tokens = VirtualTokens(peft.num_virtual_tokens, self.embedding, vocabulary)
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.inv_freq = stretched(self.rotary_pos_emb.inv_freq, model)
        self._scores = model.head is not Head.language_model
        # Experts are balanced over all places, FP8 wants multiples of 16, and a pass that is recomputed comes too late
        self._ends_early = self.post_process and not (
            self.config.num_moe_experts or self.config.fp8 or self.config.recompute_granularity == "full"
        )
        if self._scores and self.post_process:
            self.output_layer = ScalarHead(self.config, self.pg_collection.tp, bias=model.head is Head.value)

    def forward(self, *args, loss_mask=None, **kwargs):
        """megatron-core's. loss_mask: int64 [m], the places in the order of [s, b] whose logits are asked for,
        [m, 1, v/tp]; None: all, [s, b, v/tp]. Not with sequence parallelism, where a rank has a part of them."""
        if loss_mask is None or not self._ends_early:
            return super().forward(*args, loss_mask=loss_mask, **kwargs)
        last = self.decoder.layers[-1]
        last.places = loss_mask
        try:
            return super().forward(*args, **kwargs)
        finally:
            last.places = None

    def _preprocess(self, input_ids, position_ids, decoder_input=None, *args, packed_seq_params=None, **kwargs):
        """Embeddings with virtual tokens and noise, where there are any."""
        virtual = self.virtual_tokens
        known = input_ids if virtual is None else virtual.known(input_ids)
        embedded, *rest = super()._preprocess(
            known, position_ids, decoder_input, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.pre_process:
            if virtual is not None:
                embedded = virtual.put(embedded, input_ids)
            if self.training and self._noise:
                embedded = add_noise(embedded, self._lengths(embedded, input_ids, packed_seq_params), self._noise)
            if self.training and self._is_frozen and not embedded.requires_grad:
                embedded.requires_grad_()  # recomputed layers learn nothing unless something that enters them does
        return embedded, *rest

    def _lengths(self, embedded, input_ids, packed):
        """The length of the sequence that each place belongs to, as `add_noise` takes it."""
        if packed is None:
            return input_ids.size(1) * self.cp_group.size()
        lengths = packed.length_of_place
        tp = self.pg_collection.tp
        return lengths.chunk(tp.size())[tp.rank()] if self.config.sequence_parallel else lengths

    @property
    def is_language_model(self) -> bool:
        """Whether it answers with logits."""
        return not self._scores

    def freeze(self) -> None:
        """Leaves adapters alone to be trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = is_adapter(name)

    def begin_adapters(self, *, quantise: bool, prompt: list[int]) -> None:
        """Once the base is loaded: its weights into 4 bits if asked for, and what adapters begin with from it."""
        if self.virtual_tokens is not None:
            self.virtual_tokens.begin(self.embedding.word_embeddings, prompt)
        for module in self.modules():
            if isinstance(module, Adapted):
                module.begin(quantise=quantise)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._scores:
            for name in ("weight", "bias"):
                tensor = state.get(f"{prefix}output_layer.{name}")
                if tensor is not None:  # another name, so that no row of an output table is taken for it
                    tensor.key, tensor.allow_shape_mismatch = f"{prefix}score.{name}", False
        return state

    def _postprocess(
        self, hidden_states, *args, labels=None, runtime_gather_output=None, packed_seq_params=None, loss_mask=None,
        **kwargs,
    ):  # fmt: skip
        """loss_mask: the places [m] of the hidden states [s, b, h] whose logits are asked for; None: all of them."""
        if not self.post_process:
            return hidden_states
        if self._scores:
            return self.output_layer(hidden_states)
        if isinstance(packed_seq_params, CachedTokens):
            return self._latest_logits(hidden_states, packed_seq_params.sequences)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        hidden_states = at_places(hidden_states, loss_mask)
        logits, _ = self.output_layer(hidden_states, weight=weight, runtime_gather_output=runtime_gather_output)
        return logits

    def _latest_logits(self, hidden_states: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [count, v/tp] of the first tokens of a row [t or t/tp, 1, h]: others' are not asked for."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return F.linear(hidden_states[:count, 0], weight)

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
    model: ModelConfig, config: TransformerConfig, mesh: Mesh, *, vocab_size: int, seed: int, on_cuda: bool,
    peft: PeftConfig | None = None, noise: float = 0.0,
) -> list[GPT]:  # fmt: skip
    """This rank's chunks of the model, one per virtual pipeline stage, with initial weights.

    vocab_size: tokens before padding. The weights depend on the seed and on global names alone, not on the mesh.
    peft: adapters, beside which all else is frozen. noise: NEFTune's alpha, on embeddings while training.
    """
    peft = peft or PeftConfig()
    backend = choose_backend(model.backend, on_cuda=on_cuda, low_rank=peft.method in LOW_RANK)
    if config.fp8:
        fp8.use_group(config, mesh.groups.tp_dp_cp)
    chunks = [
        _build_chunk(model, config, mesh, vocab_size, vp_stage=stage, backend=backend, peft=peft, noise=noise)
        for stage in range(mesh.sizes.vpp or 1)
    ]
    for chunk in chunks:
        if on_cuda:
            chunk.cuda(torch.cuda.current_device())
    initialise(chunks, config, mesh, seed=seed)
    fp8.begin(chunks, config)
    return chunks


def _build_chunk(model, config, mesh, vocab_size, *, vp_stage, backend, peft, noise) -> GPT:
    vpp = mesh.sizes.vpp
    pre = mesh.is_first_stage and (vpp is None or vp_stage == 0)
    post = mesh.is_last_stage and (vpp is None or vp_stage == vpp - 1)
    stage = vp_stage if vpp is not None else None
    adapters = None
    if peft.method in LOW_RANK:
        adapters = partial(adapt_spec, parts=chosen_parts(model, peft.target_modules), peft=peft)
    chunk = GPT(
        config=config,
        transformer_layer_spec=block_spec(config, backend, vp_stage=stage, pp_rank=mesh.pp_rank, adapters=adapters),
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
        vocabulary=vocab_size,
        peft=peft,
        noise=noise,
    )
    if peft.method is not PeftMethod.none:
        chunk.freeze()
    if config.num_moe_experts and config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
        _use_expert_groups(chunk)
    return chunk


def _use_expert_groups(chunk: GPT) -> None:
    """Gradients of experts are summed over the ranks that hold the same experts: megatron-core does so with expert
    parallelism alone, and else over the data-parallel ranks, whose tensor-parallel cut of experts may be another."""
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
