"""What a rank on a GPU finds installed for it: Transformer Engine, Apex, fused kernels.

megatron-core takes whatever it can import when it is first imported. `prepare()`, before that, hides from it what would
not work: a Transformer Engine that was built for another torch (`import transformer_engine` succeeds nevertheless, and
megatron-core's classes then fail one by one), and the registry's package `apex`, which is another project.
"""

import importlib
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from scale_llm.config.errors import UserError
from scale_llm.config.model import Backend
from scale_llm.config.precision import Fp8Recipe
from scale_llm.config.validate_precision import card_problem
from scale_llm.parallel.weight_gradient import kernel_for_gpu

VERSIONS = ((2, 9), (2, 12))
"""Of Transformer Engine, from and below, that megatron-core 0.16.1 is made for."""

INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]>=2.9,<2.12'"
REMEDY = f"build it against this torch ({INSTALL} --force-reinstall --no-deps --no-cache-dir)"
ABSENT = f"Transformer Engine is not installed; {INSTALL}"


def prepare(backend: Backend, fp8_recipe: Fp8Recipe | None) -> None:
    """Before megatron-core is imported, with the rank's own device set.

    Raises:
        UserError: Transformer Engine is asked for, by the backend or for FP8, and does not work here; or this card has
            no such FP8.
    """
    if not is_nvidias_apex():
        hide("apex")
    problem = transformer_engine_problem()
    if problem is not None:
        if fp8_recipe is not None:
            raise UserError(f"precision.fp8_recipe={fp8_recipe.value}: {problem}, or set precision=bf16")
        if backend is Backend.transformer_engine:
            raise UserError(f"model.backend=transformer_engine: {problem}, or set model.backend=torch")
        hide("transformer_engine")
        if problem is not ABSENT:
            _say(f"warning: model.backend={backend.value}: without Transformer Engine, for {problem}")
    elif fp8_recipe is not None and (problem := fp8_problem(fp8_recipe)) is not None:
        raise UserError(f"precision.fp8_recipe={fp8_recipe.value}: {problem}")


def _say(text: str) -> None:
    """On the rank whose output is the terminal's."""
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        print(text, flush=True)


def give_kernels(device: torch.device) -> None:
    """Once megatron-core can be imported: a weight gradient that is added to its FP32 buffer by the product itself,
    where Apex's is not installed. megatron-core's own linear layers need it, of which the output layer is one under
    Transformer Engine, too."""
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    if layers._grad_accum_fusion_available:
        return
    kernel = kernel_for_gpu(device)
    if kernel is not None:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=kernel, wgrad_gemm_accum_fp16=kernel
        )
        layers._grad_accum_fusion_available = True


def transformer_engine_problem() -> str | None:
    """What is wrong with the Transformer Engine that is installed; None: nothing."""
    if importlib.util.find_spec("transformer_engine") is None:
        return ABSENT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing extension is a warning there, an error here
            importlib.import_module("transformer_engine.pytorch")
            version = str(importlib.import_module("transformer_engine").__version__)
    except Exception as error:  # noqa: BLE001 - symbols that are missing, versions that differ: each has its own kind
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"Transformer Engine does not work with torch {torch.__version__} ({said}); {REMEDY}"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    lowest, end = VERSIONS
    if lowest <= found < end:
        return None
    return f"Transformer Engine {version} is not one that megatron-core is made for; {REMEDY}"


def fp8_problem(recipe: Fp8Recipe) -> str | None:
    """Why this rank's card, or its CUDA, has no FP8 of this kind, in our words or in Transformer Engine's; None: it
    has."""
    if (problem := card_problem(recipe, torch.cuda.get_device_capability())) is not None:
        return f"{torch.cuda.get_device_name()}: {problem}"
    manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    checks = {Fp8Recipe.blockwise: "is_fp8_block_scaling_available", Fp8Recipe.mxfp8: "is_mxfp8_available"}
    has, why = getattr(manager, checks.get(recipe, "is_fp8_available"))()
    return None if has else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}: {why}; set precision=bf16"


def is_nvidias_apex() -> bool:
    """Whether an installed `apex` is NVIDIA's with its CUDA kernels; it is not imported."""
    found = importlib.util.find_spec("apex")
    places = found.submodule_search_locations if found is not None else None
    has_optimizers = any(Path(place, "optimizers", "fused_adam.py").is_file() for place in places or ())
    return has_optimizers and importlib.util.find_spec("amp_C") is not None


def hide(package: str) -> None:
    """An import of it fails from now on, as where it is absent."""
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
