"""Weight gradients of linear layers, added to a buffer of higher precision."""

import torch

from scale_llm.parallel.fused import add_into, compiling, fused


def accumulate_weight_gradient(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_output^T x, for x [..., in] and grad_output [..., out].

    The product of BF16 matrices is accumulated in FP32 and rounded once to BF16 before the addition.
    """
    x, grad = x.reshape(-1, x.size(-1)), grad_output.reshape(-1, grad_output.size(-1))
    if main_grad.dtype == grad.dtype:
        main_grad.addmm_(grad.t(), x)
    elif not compiling():
        main_grad.add_(torch.mm(grad.t(), x))
    # oneDNN multiplies BF16 at half its rate where the left matrix is transposed in memory, so the smaller of the two
    # is transposed first, which torch's own copy would do too slowly to gain anything.
    elif x.size(1) <= grad.size(1):
        add_into(main_grad, torch.mm(_transposed(x), grad).t())
    else:
        add_into(main_grad, torch.mm(_transposed(grad), x))


@fused
def _transposed(x):
    return x.t().contiguous()
