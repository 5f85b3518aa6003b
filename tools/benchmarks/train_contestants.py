"""Training steps of one shape: ours, megatron-core's own layers in a bare loop, Hugging Face transformers.

Every builder returns a step: forward, backward, clipping, AdamW on FP32 weights, on random tokens.
"""

from benchmarks.common import (
    BETAS,
    CLIP,
    EPSILON,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    SEQUENCE,
    VOCABULARY,
    WEIGHT_DECAY,
    adamw,
    alone,
    llama_config,
    set_optimizer,
    shape,
    threads,
    update,
)

BATCH = 4
TOKENS = SEQUENCE * BATCH


def _tokens(seed: int = 0):
    """Tokens and their labels, each [b, s]."""
    import torch

    text = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def ours(precision: str, compiled: bool = False):
    """The engine as a run builds it. compiled: model.compile_ops."""
    alone()
    from scale_llm.config.run import RunConfig
    from scale_llm.parallel import device as devices

    device = devices.start("cpu", threads=threads(), compile_ops=compiled)
    import torch

    from scale_llm.engine.engine import Engine
    from scale_llm.losses.language_model import language_model_loss
    from scale_llm.parallel.mesh import MeshSizes, build_mesh

    cfg = RunConfig(run_dir="unused", model=shape())
    set_optimizer(cfg)
    cfg.precision.bf16 = precision == "bf16"
    cfg.train.micro_batch_size = cfg.train.global_batch_size = BATCH
    cfg.train.train_iters = 1000
    mesh = build_mesh(MeshSizes(), device.backend)
    devices.seed_everything(1234, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)
    engine = Engine(cfg, mesh, device, vocab_size=VOCABULARY)
    tokens, labels = _tokens()
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(BATCH, SEQUENCE),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
    }

    def loss(output, batch):
        return language_model_loss(output, batch, mesh.groups.tp, VOCABULARY)

    return lambda: engine.train_step([batch], loss, samples=BATCH)


def bare_megatron(precision: str):
    """megatron-core's GPTModel with its local spec, its data-parallel wrapper, optimizer and schedule; nothing of ours
    but what lets it run on a CPU."""
    alone()
    from scale_llm.parallel import cpu

    cpu.adapt()
    import torch

    threads()
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    config, spec = _megatron_config(torch.bfloat16 if precision == "bf16" else torch.float32)
    module = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    wrapped = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config=config, ddp_config=wrapped, module=module)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            adam_eps=EPSILON, clip_grad=CLIP, bf16=precision == "bf16", params_dtype=config.params_dtype,
        ),
        [model],
    )  # fmt: skip
    tokens, labels = _tokens()
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    hidden = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    run = get_forward_backward_func()

    def forward(iterator, model):
        losses = model(tokens, positions, hidden, labels=labels)
        return losses, lambda output: (output.float().mean(), {})

    def step():
        model.zero_grad_buffer()
        optimizer.zero_grad()
        run(
            forward_step_func=forward, data_iterator=iter([]), model=[model], num_microbatches=1, seq_length=SEQUENCE,
            micro_batch_size=BATCH, forward_only=False,
        )  # fmt: skip
        optimizer.step()

    return step


def _megatron_config(dtype):
    import torch.nn.functional as F
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype.itemsize == 2, masked_softmax_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False,
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    return config, TransformerBlockSubmodules(layer_specs=[layer] * LAYERS, layer_norm=WrappedTorchNorm)


def transformers_llama(precision: str, compiled: bool = False):
    """LlamaForCausalLM as the Trainer runs it: FP32 weights, BF16 by autocast, sdpa, torch's fused AdamW, clipping."""
    import torch
    from transformers import LlamaForCausalLM

    threads()
    torch.manual_seed(1234)
    model = LlamaForCausalLM(llama_config(SEQUENCE))
    weights = list(model.parameters())
    optimizer = adamw(weights)
    tokens, labels = _tokens()

    def loss_of(tokens, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, VOCABULARY), labels.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def step():
        loss_of(tokens, labels).backward()
        update(optimizer, weights)

    return step


MATMUL_SIZE = 4096


def matmul(precision: str):
    """One product of two square matrices: the rate that a perfect step would reach."""
    import torch

    threads()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)
