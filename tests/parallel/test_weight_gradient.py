"""Weight gradients against an einsum in FP64."""

import pytest
import torch

from scale_llm.parallel.fused import use_compiler
from scale_llm.parallel.weight_gradient import accumulate_weight_gradient


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_twice_into_one_buffer_is_the_sum(dtype, tolerance, size, compiled):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(20, 3, n, generator=generator).to(dtype) for n in size)
    exact = 2 * torch.einsum("sbo,sbi->oi", dy.double(), x.double())
    buffer = torch.zeros(size[1], size[0])
    use_compiler(compiled)
    try:
        accumulate_weight_gradient(x, dy, buffer)
        accumulate_weight_gradient(x, dy, buffer)
    finally:
        use_compiler(False)
    assert (buffer - exact).norm() < tolerance * exact.norm()
