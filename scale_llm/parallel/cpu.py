"""Lets megatron-core run on ranks without a GPU: the one place that knows what its wheel assumes of CUDA.

`adapt()` gives every module of megatron-core a view of torch in which the current accelerator is the CPU: factories
that ask for `device="cuda"` make CPU tensors, streams and events do nothing, the CUDA generator is the CPU's, and
sums and gathers are done when asked for, through shared memory where ranks have it (collectives.py). torch itself stays
as it is, apart from `Tensor.cuda` (returns the tensor) and `Tensor.type()` (megatron-core's optimizers compare it with
the names of CUDA types). On a GPU nothing here is called.

Call it before megatron-core is first imported. Tried with megatron-core 0.16.1.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import math
import sys
import types
import warnings

import torch

from scale_llm.parallel import collectives
from scale_llm.parallel.weight_gradient import accumulate_weight_gradient

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint",
              "empty_like", "zeros_like", "ones_like", "full_like", "linspace", "eye")  # fmt: skip


_GPU_PACKAGES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
"""megatron-core takes these wherever they can be imported, and their optimizers and kernels fail without a GPU. Also,
the registry's package `apex` is another project."""


class _NoStream:
    """A CUDA stream or event on a machine without one: everything has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return _NoStream()

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass


def _nothing(*args, **kwargs):
    return None


class _View(types.ModuleType):
    """A module seen through replacements; names without one are the module's own."""

    def __init__(self, module, **replacements):
        super().__init__(module.__name__)
        self.__dict__.update(replacements)
        self.__dict__["_module"] = module

    def __getattr__(self, name):
        value = getattr(self._module, name)
        self.__dict__[name] = value  # the next look-up costs what a module's costs
        return value


def _on_cpu(factory):
    """The factory with every CUDA device among its arguments replaced by the CPU."""

    def make(*args, device=None, pin_memory=False, **kwargs):
        if device is not None and str(device).startswith("cuda"):
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    make.__name__ = factory.__name__
    return make


def _cpu_view(all_reduce) -> _View:
    stream = _NoStream()
    random = _View(
        torch.cuda.random,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    nvtx = types.SimpleNamespace(
        range_push=_nothing, range_pop=_nothing, range=lambda *a, **k: contextlib.nullcontext()
    )
    cuda = _View(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=_nothing,
        empty_cache=_nothing,
        set_device=_nothing,
        device_count=lambda: 1,
        Stream=_NoStream,
        Event=_NoStream,
        stream=lambda s=None: contextlib.nullcontext(),
        current_stream=lambda *a: stream,
        default_stream=lambda *a: stream,
        is_current_stream_capturing=lambda: False,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        random=random,
        nvtx=nvtx,
        FloatTensor=torch.FloatTensor,
        HalfTensor=torch.HalfTensor,
        BFloat16Tensor=torch.BFloat16Tensor,
        IntTensor=torch.IntTensor,
        LongTensor=torch.LongTensor,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}

    def autocast(device_type, *args, **kwargs):
        return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    distributed = _View(
        torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter, all_reduce=all_reduce
    )
    return _View(torch, cuda=cuda, autocast=autocast, compile=_identity_decorator, distributed=distributed, **factories)


def _all_gather(outputs, tensor, group=None, async_op=False):
    """all_gather that takes outputs of unequal length, which gloo refuses: one broadcast a rank."""
    if len({out.shape for out in outputs}) == 1:
        return torch.distributed.all_gather(outputs, tensor, group=group, async_op=async_op)
    ranks = torch.distributed.get_process_group_ranks(group)
    for i, out in enumerate(outputs):
        part = tensor.contiguous() if ranks[i] == torch.distributed.get_rank() else torch.empty_like(out)
        torch.distributed.broadcast(part, src=ranks[i], group=group)
        out.copy_(part)
    return None


def _reduce_scatter(output, inputs, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
    """reduce_scatter that takes inputs of unequal length, which gloo refuses: one reduction of all of them."""
    if len({part.shape for part in inputs}) == 1:
        return torch.distributed.reduce_scatter(output, list(inputs), op=op, group=group, async_op=async_op)
    whole = torch.cat(list(inputs))
    torch.distributed.all_reduce(whole, op=op, group=group)
    start = sum(part.size(0) for part in inputs[: group.rank()])
    output.copy_(whole[start : start + output.size(0)])
    return None


def _identity_decorator(function=None, **kwargs):
    """torch.compile without a compiler."""
    return function if function is not None else _identity_decorator


class _ViewLoader(importlib.abc.Loader):
    """Loads a megatron-core module as usual, then gives it the view of torch."""

    def __init__(self, loader, view, kept):
        """kept: functions of torch.distributed of which modules keep one of several, by the name that they give it."""
        self._loader, self._view, self._kept = loader, view, kept

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        compile_ = torch.compile
        torch.compile = _identity_decorator  # decorators of the module's body
        try:
            self._loader.exec_module(module)
        finally:
            torch.compile = compile_
        if module.__dict__.get("torch") is torch:
            module.torch = self._view
        for name in self._kept.keys() & module.__dict__.keys():
            setattr(module, name, self._kept[name])


class _ViewFinder(importlib.abc.MetaPathFinder):
    """Finds megatron-core's modules and has them loaded with a view."""

    def __init__(self):
        self._view = _cpu_view(collectives.at_once(collectives.all_reduce))
        self._kept = {
            "dist_all_gather_func": collectives.at_once(collectives.all_gather_into_tensor),
            "dist_reduce_scatter_func": collectives.at_once(collectives.reduce_scatter_tensor),
            "_coalescing_manager": collectives.coalesced,
        }

    def find_spec(self, name, path, target=None):
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _ViewLoader(spec.loader, self._view, self._kept)
        return spec


def _cuda_type_names():
    """`Tensor.type()` of a CPU tensor answers with the CUDA name; `Tensor.cuda()` returns the tensor."""
    plain_type = torch.Tensor.type

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        name = plain_type(self)
        return name.replace("torch.", "torch.cuda.", 1) if "cuda" not in name else name

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _adapt_random():
    """megatron-core's tracker of generator states forks the CPU generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _adapt_moe():
    """The router names a Transformer Engine function; the dispatcher wants its split sizes as lists."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    exchange = mappings.all_to_all

    def all_to_all(group, input_, output_split_sizes_=None, input_split_sizes=None, **kwargs):
        return exchange(group, input_, _as_list(output_split_sizes_), _as_list(input_split_sizes), **kwargs)

    token_dispatcher.all_to_all = all_to_all


def _adapt_linear():
    """Gives linear layers the fused weight gradient that Apex has for GPUs: added to the FP32 buffer in one pass."""
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _adapt_clipping():
    """An exact norm of the gradients: torch's FP32 vector norm on a CPU is off by 7e-5 for a million elements."""
    from megatron.core.optimizer import clip_grads

    clip_grads.l2_norm_impl = _norm_of_all


def _norm_of_all(chunk_size, overflow_buffer, tensor_lists, per_tensor=False):
    """(Euclidean norm [1] of all tensors together, None), summed in FP64 over short FP32 products."""
    total = 0.0
    for tensor in tensor_lists[0]:
        for part in tensor.reshape(-1).split(1 << 16):
            total += torch.dot(part, part).item()
    return torch.tensor([math.sqrt(total)]), None


def _as_list(sizes):
    """Split sizes that gloo accepts; megatron-core moves them to the host only for CUDA tensors."""
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def adapt() -> None:
    """Gives megatron-core a CPU in place of the GPU, once per process.

    Raises:
        RuntimeError: megatron-core was imported before.
    """
    if any(isinstance(finder, _ViewFinder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("scale_llm.parallel.cpu.adapt() must come before the first import of megatron.core")
    for name in _GPU_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # an import now fails, as where it is absent
    sys.meta_path.insert(0, _ViewFinder())
    _cuda_type_names()
    # On a CPU there are no CUDA connections to limit, nor CUDA graphs to name the scope of.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    warnings.filterwarnings("ignore", message=".*cuda_graph_scope.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.checkpoint|megatron.core")
    with warnings.catch_warnings():
        # Apex and Transformer Engine are absent on purpose.
        warnings.simplefilter("ignore")
        importlib.import_module("megatron.core")
        importlib.import_module("megatron.core.models.gpt")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    _adapt_random()
    _adapt_linear()
    _adapt_clipping()
    _adapt_moe()
