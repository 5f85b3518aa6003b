"""Weight gradients of linear layers, added to a buffer of higher precision."""

from collections.abc import Callable
from pathlib import Path

import torch

from scale_llm.parallel.fused import add_into, compiling, fused
from scale_llm.parallel.native import call, library

SOURCE = Path(__file__).with_name("weight_gradient.cpp")

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def accumulate_weight_gradient(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_output^T x, for x [..., in] and grad_output [..., out].

    The product of BF16 matrices is added in FP32 where weight_gradient.cpp is compiled. Elsewhere it is accumulated in
    FP32 and rounded once to BF16 before the addition.
    """
    x, grad = x.reshape(-1, x.size(-1)), grad_output.reshape(-1, grad_output.size(-1))
    if main_grad.dtype == grad.dtype:
        main_grad.addmm_(grad.t(), x)
    elif native := _native(x, grad, main_grad):
        a, b = (x, grad) if x.size(1) < grad.size(1) else (grad, x)
        call(native, a.contiguous(), b.contiguous(), main_grad, int(a is x), *a.shape, b.size(1))
    elif not compiling():
        main_grad.add_(torch.mm(grad.t(), x))
    # oneDNN multiplies BF16 at half its rate where the left matrix is transposed in memory, so the smaller of the two
    # is transposed first, which torch's own copy would do too slowly to gain anything.
    elif x.size(1) <= grad.size(1):
        add_into(main_grad, torch.mm(_transposed(x), grad).t())
    else:
        add_into(main_grad, torch.mm(_transposed(grad), x))


def _native(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor):
    """`weight_gradient` of weight_gradient.cpp, where it takes these matrices."""
    fits = main_grad.dtype == torch.float32 and main_grad.is_contiguous() and min(x.size(1), grad.size(1)) % 2 == 0
    found = library(SOURCE, x, grad) if fits else None
    return None if found is None else found.weight_gradient


@fused
def _transposed(x):
    return x.t().contiguous()


def accumulate_on_gpu(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """The same in one product of cuBLAS, which adds in FP32 and rounds nothing to BF16. For torch whose addmm takes an
    FP32 matrix beside BF16 ones."""
    x, grad = x.reshape(-1, x.size(-1)), grad_output.reshape(-1, grad_output.size(-1))
    if main_grad.dtype == grad.dtype:
        main_grad.addmm_(grad.t(), x)
    else:
        torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)


def accumulate_on_gpu_apart(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """The same in two passes: for torch from 2.8 on, whose mm gives FP32 of BF16 matrices."""
    x, grad = x.reshape(-1, x.size(-1)), grad_output.reshape(-1, grad_output.size(-1))
    if main_grad.dtype == grad.dtype:
        main_grad.addmm_(grad.t(), x)
    else:
        main_grad.add_(torch.mm(grad.t(), x, out_dtype=main_grad.dtype))


def kernel_for_gpu(device: torch.device) -> Kernel | None:
    """The first of the two that this torch has for the device and that is exact on whole numbers; None: neither."""
    for kernel in (accumulate_on_gpu, accumulate_on_gpu_apart):
        try:
            if _is_exact(kernel, device):
                return kernel
        except (RuntimeError, TypeError):  # NotImplementedError too: of another torch, or another device
            continue
    return None


def _is_exact(kernel: Kernel, device: torch.device) -> bool:
    """Sums of 32 products of whole numbers up to 15, which BF16 has and its sums are too long for."""
    whole = torch.arange(32 * 16, device=device).view(32, 16)
    x, grad = (whole % 13).bfloat16(), (whole % 16).bfloat16()
    main_grad = torch.ones(16, 16, dtype=torch.float32, device=device)
    exact = 1 + grad.float().t() @ x.float()
    kernel(x, grad, main_grad)
    return bool(torch.equal(main_grad, exact))
