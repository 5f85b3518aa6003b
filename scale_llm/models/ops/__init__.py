"""The passes of a transformer layer that are not matrix products, as pure functions with hand-written gradients.

On a CPU each of them makes as few passes over memory as eager torch allows: rows are taken in parts that stay in
the second-level cache, and no copy is made that a layout can avoid. On a GPU they call torch's fused kernels where
torch has one. No megatron-core here: tensors in, tensors out.

Shapes: s sequence, b batch, h hidden, g key/value groups, r query heads of a group, d head size, f feed-forward.
"""

from scale_llm.models.ops.attention import attention, attention_of_sequences
from scale_llm.models.ops.attention_native import takes_heads
from scale_llm.models.ops.norm import rms_norm
from scale_llm.models.ops.regroup import to_batches, to_row
from scale_llm.models.ops.rope import rotary, rotary_tables, split_rotary
from scale_llm.models.ops.swiglu import swiglu

__all__ = [
    "attention", "attention_of_sequences", "rms_norm", "rotary", "rotary_tables", "split_rotary", "swiglu",
    "takes_heads", "to_batches", "to_row",
]  # fmt: skip
