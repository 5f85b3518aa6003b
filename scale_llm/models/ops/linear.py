"""Weight gradients of linear layers, added to a buffer of higher precision."""

import torch


def accumulate_weight_gradient(
    x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor, *, overwrite: bool = False
) -> None:
    """main_grad [out, in] += grad_output^T x, for x [..., in] and grad_output [..., out].

    The product of BF16 matrices is accumulated in FP32 and rounded once to BF16 before the addition.
    overwrite: the buffer holds nothing yet, so it need not be cleared before nor read here (a quarter of the cost).
    """
    product = torch.mm(grad_output.reshape(-1, grad_output.size(-1)).t(), x.reshape(-1, x.size(-1)))
    if overwrite:
        main_grad.copy_(product)
    else:
        main_grad.add_(product)
