"""Weight gradients against an einsum in FP64."""

import pytest
import torch
from support.native import compiled_kernels, same_by_any_threads

from scale_llm.parallel import weight_gradient
from scale_llm.parallel.fused import use_compiler
from scale_llm.parallel.native import library
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


@pytest.fixture
def native():
    with compiled_kernels():
        assert library(weight_gradient.SOURCE) is not None
        yield


@pytest.mark.parametrize(
    ("tokens", "size"),
    [
        (0, (4, 6)),
        (1, (2, 2)),
        (37, (18, 51)),
        (512, (128, 128)),
        (1100, (130, 300)),
        (65, (700, 34)),
        (600, (1030, 1040)),
    ],
)
def test_added_in_fp32_on_a_cpu_that_multiplies_bf16(native, tokens, size):
    """Nothing is rounded to BF16, at sizes within tiles, of whole tiles and beyond."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(tokens, n, generator=generator).bfloat16() for n in size)
    buffer = torch.ones(size[1], size[0])
    accumulate_weight_gradient(x, dy, buffer)
    exact = 1 + dy.double().t() @ x.double()
    assert (buffer - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("size", [(300, 200), (600, 700)])
def test_threads_change_nothing(native, size):
    """Also where the rows of a panel, here two groups of 512, are dealt out to tasks of their own."""
    x, dy = (torch.randn(600, n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in size)

    def compute():
        buffer = torch.zeros(size[1], size[0])
        accumulate_weight_gradient(x, dy, buffer)
        return [buffer]

    assert same_by_any_threads(compute)


@pytest.mark.parametrize("out", [9, 12])
def test_other_matrices_than_it_takes(native, out):
    """An odd number of outputs, and a buffer that is a part of another's columns."""
    x, dy = torch.randn(40, 16).bfloat16(), torch.randn(40, out).bfloat16()
    wide = torch.zeros(out, 20)
    accumulate_weight_gradient(x, dy, wide[:, :16])
    exact = dy.double().t() @ x.double()
    assert (wide[:, :16] - exact).norm() < 1e-2 * exact.norm() and not wide[:, 16:].any()


def test_a_kernel_for_a_gpu_is_taken_only_where_it_rounds_nothing():
    """The one for CPUs that is not compiled rounds the product to BF16; this torch has none of a GPU's for a CPU."""
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
