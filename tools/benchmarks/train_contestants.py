"""Training steps of one shape: ours, megatron-core's own layers in a bare loop, Hugging Face transformers.

Every builder returns a step: forward, backward, clipping, AdamW on FP32 weights, on random tokens. size: of
`common.SIZES`; device: cpu or cuda.
"""

from benchmarks.common import (
    BETAS,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    SIZES,
    WEIGHT_DECAY,
    Size,
    adamw,
    alone,
    llama_config,
    precision_named,
    quick_weights,
    set_optimizer,
    shape,
    threads,
    update,
)

BATCH = SIZES["small"].batch
TOKENS = SIZES["small"].tokens


def _tokens(size: Size, device: str, seed: int = 0):
    """Tokens and their labels, each [b, s]."""
    import torch

    drawn = torch.Generator().manual_seed(seed)
    text = torch.randint(0, size.vocabulary, (size.batch, size.sequence + 1), generator=drawn).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def ours(precision: str, compiled: bool = False, size: str = "small", device: str = "cpu"):
    """The engine as a run builds it. precision: an option of our group of that name. compiled: model.compile_ops."""
    alone()
    from scale_llm.config.run import RunConfig
    from scale_llm.parallel import device as devices

    started = devices.start(device, threads=threads(), compile_ops=compiled)
    import torch

    from scale_llm.engine.engine import Engine
    from scale_llm.losses.language_model import language_model_loss
    from scale_llm.parallel.mesh import MeshSizes, build_mesh

    s = SIZES[size]
    cfg = RunConfig(run_dir="unused", model=shape(size), precision=precision_named(precision))
    set_optimizer(cfg)
    cfg.train.micro_batch_size = cfg.train.global_batch_size = s.batch
    cfg.train.train_iters = 100_000
    mesh = build_mesh(MeshSizes(), started.backend)
    devices.seed_everything(1234, tp_rank=0, pp_rank=0, ep_rank=0, etp_rank=0)
    with quick_weights():
        engine = Engine(cfg, mesh, started, vocab_size=s.vocabulary)
    tokens, labels = _tokens(s, "cpu")
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(s.batch, s.sequence),
        "position_ids": torch.arange(s.sequence).expand(s.batch, -1).contiguous(),
    }

    def loss(output, batch):
        return language_model_loss(output, batch, mesh.groups.tp, s.vocabulary)

    def step() -> None:
        result = engine.train_step([batch], loss, samples=s.batch)
        assert not result.skipped, f"nothing was learnt: {result.broken}"

    return step


def bare_megatron(precision: str, size: str = "small", device: str = "cpu"):
    """megatron-core's GPTModel with Transformer Engine's layers where there are any, else its local ones; its
    data-parallel wrapper, optimizer and schedule; nothing of ours but what lets it run on a CPU."""
    alone()
    import torch

    threads()
    if device == "cuda":
        torch.cuda.set_device(0)
    else:
        from scale_llm.parallel import cpu

        cpu.adapt()
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
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

    s = SIZES[size]
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    fused = device == "cuda" and has_transformer_engine()
    config, spec = _megatron_config(s, torch.bfloat16 if precision == "bf16" else torch.float32, device, fused)
    module = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=s.vocabulary,
        max_sequence_length=s.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=s.tied,
    ).to(device)
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
    tokens, labels = _tokens(s, device)
    positions = torch.arange(s.sequence, device=device).expand(s.batch, -1)
    hidden = None  # Transformer Engine knows a causal mask by itself
    if not fused:
        hidden = torch.ones(1, 1, s.sequence, s.sequence, dtype=torch.bool, device=device).triu(1)
    run = get_forward_backward_func()

    def forward(iterator, model):
        losses = model(tokens, positions, hidden, labels=labels)
        return losses, lambda output: (output.float().mean(), {})

    def step():
        model.zero_grad_buffer()
        optimizer.zero_grad()
        run(
            forward_step_func=forward, data_iterator=iter([]), model=[model], num_microbatches=1, seq_length=s.sequence,
            micro_batch_size=s.batch, forward_only=False,
        )  # fmt: skip
        optimizer.step()

    return step


def has_transformer_engine() -> bool:
    """Whether it can be used here."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _megatron_config(size: Size, dtype, device: str, fused: bool):
    """Its fusions are on where Transformer Engine brings the kernels; that of gradient accumulation is off, which for
    its output layer needs Apex. Without Transformer Engine, attention on a GPU is computed again in the backward pass,
    or the scores of all layers would not fit."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=size.layers, hidden_size=size.hidden, ffn_hidden_size=size.ffn, num_attention_heads=size.heads,
        num_query_groups=size.groups, normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype.itemsize == 2, masked_softmax_fusion=False, bias_dropout_fusion=fused,
        gradient_accumulation_fusion=False, bias_activation_fusion=fused, apply_rope_fusion=fused,
        cross_entropy_loss_fusion=fused, cross_entropy_fusion_impl="te" if fused else "native",
        persist_layer_norm=False, recompute_granularity="selective" if device == "cuda" and not fused else None,
        recompute_modules=["core_attn"],
    )  # fmt: skip
    if fused:
        return config, specs.get_gpt_layer_with_transformer_engine_spec()
    layer = specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    return config, TransformerBlockSubmodules(layer_specs=[layer] * size.layers, layer_norm=WrappedTorchNorm)


def transformers_llama(precision: str, compiled: bool = False, size: str = "small", device: str = "cpu"):
    """LlamaForCausalLM as the Trainer runs it: FP32 weights, BF16 by autocast, sdpa, torch's fused AdamW, clipping."""
    import torch
    from transformers import LlamaForCausalLM

    threads()
    torch.manual_seed(1234)
    s = SIZES[size]
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(s.sequence, size))
    weights = list(model.parameters())
    optimizer = adamw(weights)
    tokens, labels = _tokens(s, device)

    def loss_of(tokens, labels):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.float().view(-1, s.vocabulary), labels.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)

    def step():
        loss_of(tokens, labels).backward()
        update(optimizer, weights)

    return step


MATMUL_SIZE, MATMUL_SIZE_GPU = 4096, 8192


def matmul(precision: str, device: str = "cpu", side: int = MATMUL_SIZE):
    """One product of two square matrices: the rate that a perfect step would reach."""
    import torch

    threads()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)
