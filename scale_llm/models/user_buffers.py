"""Memory that Transformer Engine's tensor-parallel collectives and matrix products share (parallel.tp_comm_overlap).

Transformer Engine takes consecutive ranks of the job for a tensor-parallel group, as the mesh of a run has them, and
makes the buffers once a process, for one shape.
"""

import importlib

from megatron.core.transformer.transformer_config import TransformerConfig

from scale_llm.config.errors import UserError

_made = False


def make_user_buffers(config: TransformerConfig, *, tokens: int) -> None:
    """Before the first pass. tokens: of a micro-batch on one context-parallel rank. A collective of the job.

    Raises:
        UserError: the GPUs or the driver have not what it takes, in Transformer Engine's words.
    """
    global _made
    if _made:
        return
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    kinds = base.UserBufferQuantizationMode
    modes = [kinds.FP8] if config.fp8 else [kinds.NONE]
    if config.fp8 and config.first_last_layers_bf16:
        modes.append(kinds.NONE)
    try:
        base.initialize_ub(
            shape=[tokens, config.hidden_size],
            tp_size=config.tensor_model_parallel_size,
            quantization_modes=modes,
            dtype=config.params_dtype,
            bootstrap_backend="nccl",
        )
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"parallel.tp_comm_overlap=true: {error}; set it to false") from error
    _made = True
