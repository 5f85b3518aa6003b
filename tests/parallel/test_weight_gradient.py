"""Weight gradients against an einsum in FP64."""

import pytest
import torch

from scale_llm.parallel import weight_gradient
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


def test_a_kernel_for_a_gpu_is_taken_only_where_it_rounds_nothing():
    """The one for CPUs rounds the product to BF16; this torch has none of a GPU's for a CPU."""
    cpu = torch.device("cpu")
    assert not weight_gradient._is_exact(accumulate_weight_gradient, cpu)
    assert weight_gradient._is_exact(
        lambda x, dy, buffer: accumulate_weight_gradient(x.float(), dy.float(), buffer), cpu
    )
    assert weight_gradient.kernel_for_gpu(cpu) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kernel", [weight_gradient.accumulate_on_gpu, weight_gradient.accumulate_on_gpu_apart])
def test_on_a_gpu_twice_into_one_buffer_is_the_sum_in_fp32(kernel):
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(64, 2, n, generator=generator, device="cuda").bfloat16() for n in (256, 128))
    exact = 2 * torch.einsum("sbo,sbi->oi", dy.double(), x.double())
    buffer = torch.zeros(128, 256, device="cuda")
    kernel(x, dy, buffer)
    kernel(x, dy, buffer)
    assert (buffer - exact).norm() < 1e-6 * exact.norm()
