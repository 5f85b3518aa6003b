"""What ranks do in the tests of state that only GPUs have: stand-ins keep it as Apex and Transformer Engine do.

`FusedAdam` counts steps in its parameter groups. `TransformerEngineLinear` has the state of FP8 with delayed scaling in
`fp8_meta`, saves it as a pickle and unpickles it on loading, as Transformer Engine 2.11's module/base.py does.
"""

import contextlib
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_llm.checkpoint.checkpointer import Checkpointer, load_sharded
from scale_llm.config.checkpoint_files import iteration_dir
from scale_llm.config.errors import UserError
from scale_llm.config.precision import Fp8Format, Fp8Recipe
from scale_llm.engine import optimizer_kernels, state
from scale_llm.engine.generation.generator import Generator
from scale_llm.engine.generation.samples import SamplingParams
from scale_llm.engine.own_state import own_tensors
from scale_llm.models import fp8
from scale_llm.parallel.device import start
from scale_llm.stages.run_state import _wanted
from support.batches import GLOBAL_BATCH, samples
from support.training import config, make_engine, micro_batches


class FusedAdam(torch.optim.Optimizer):
    """AdamW in FP32, with the arguments, the state and the step count of Apex's and Transformer Engine's."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert adam_w_mode

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                mean, square = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
                mean.lerp_(param.grad, 1 - first)
                square.mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                update = (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + group["eps"])
                param.sub_(group["lr"] * (update + group["weight_decay"] * param))


def _install(library: str | None) -> None:
    """The stand-in under the name of the library; None: neither is there, as on a CPU."""
    for name in ("apex", "transformer_engine"):
        for module in (name, f"{name}.pytorch", f"{name}.optimizers", f"{name}.pytorch.optimizers"):
            sys.modules.pop(module, None)
        sys.modules[name] = None
    if library is None:
        return
    place = optimizer_kernels._PLACES[library]
    for end in range(1, place.count(".") + 2):
        name = ".".join(place.split(".")[:end])
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules[place].FusedAdam = type("FusedAdam", (FusedAdam,), {"__module__": place})


def _engine(overrides: dict[str, Any], library: str | None):
    _install(library)
    return make_engine(config(overrides))


def _steps(engine, loss, first: int, last: int) -> list[float]:
    found = []
    for step in range(first, last):
        batches = micro_batches(samples(step), engine.mesh, 1)
        found.append(engine.train_step(batches, loss, samples=GLOBAL_BATCH).metrics["lm loss"])
    return found


def moved_optimizer(directory: str, overrides: dict[str, Any], first: str | None, second: str | None) -> dict[str, Any]:
    """Three steps with one library's optimizer, saved; two more with it, and two from the checkpoint with another's."""
    one, loss = _engine(overrides, first)
    started = _steps(one, loss, 0, 3)
    path = Path(directory)
    Checkpointer(path, one.mesh.host_group).save(3, {**_wanted(one, state.Weights.all, with_optimizer=True,
                                                               loading=False)})  # fmt: skip
    plain = state.plain_state(one)
    other, loss = _engine(overrides, second)
    loaded = load_sharded(iteration_dir(path, 3), _wanted(other, state.Weights.all, with_optimizer=True, loading=True))
    state.load_model_state(other, loaded, main_weights=False)
    state.load_optimizer_state(other, loaded["optimizer"], plain)
    state.load_schedule(other, plain)
    return {"names": [one.kernels, other.kernels], "started": started, "on": _steps(one, loss, 3, 5),
            "moved": _steps(other, loss, 3, 5)}  # fmt: skip


class _Harmful:
    """A pickle that runs code when it is read."""

    def __reduce__(self):
        return _ran, ()


def _ran() -> None:
    raise AssertionError("code of a checkpoint was run")


class TransformerEngineLinear:
    """Mixed into a linear layer of megatron-core."""

    def get_extra_state(self):
        return torch.frombuffer(bytearray(pickle.dumps(_Harmful())), dtype=torch.uint8)

    def set_extra_state(self, extra):
        if extra is not None and extra.numel():
            pickle.loads(extra.numpy().tobytes())


class _Scaling:
    """DelayedScalingRecipeState: n quantizers share a history."""

    def __init__(self, length: int, n: int):
        self.scale, self.amax_history = torch.ones(n), torch.zeros(length, n)


def _fp8_engine(overrides: dict[str, Any], length: int):
    """Linear layers with the state of delayed scaling; their products stay as they are."""
    engine, loss = make_engine(config(overrides))
    for module in engine.modules:
        for layer in module.decoder.layers:
            for part in (layer.self_attention.linear_qkv, layer.self_attention.linear_proj, layer.mlp.linear_fc1,
                         layer.mlp.linear_fc2):  # fmt: skip
                part.__class__ = type(type(part).__name__, (TransformerEngineLinear, type(part)), {})
                part._fp8_workspaces = {"weight": torch.zeros(1)}
                part.fp8_meta = {"scaling_fwd": _Scaling(length, 3), "scaling_bwd": _Scaling(length, 2)}
    return engine, loss


def _fill(engine) -> dict[str, torch.Tensor]:
    """Every tensor of the state with numbers of its name."""
    for name, tensor in fp8.state(engine.modules).items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return {name: tensor.clone() for name, tensor in fp8.state(engine.modules).items()}


def saved_fp8(directory: str, overrides: dict[str, Any]) -> list[str]:
    """Saves the state of one layout; names of tensors on this rank."""
    engine, loss = _fp8_engine(overrides, 4)
    filled = _fill(engine)
    batches = micro_batches(samples(0), engine.mesh, 1)
    with fp8.unchanged(engine.modules):
        for tensor in fp8.state(engine.modules).values():
            tensor.fill_(7.0)
    assert all(torch.equal(tensor, filled[name]) for name, tensor in fp8.state(engine.modules).items())
    assert set(filled) <= set(own_tensors(engine)), "local copies hold them too"
    fp8.forget_copies(engine.modules)
    assert not any(part._fp8_workspaces for _, part in fp8._linear_layers(engine.modules))
    engine.evaluate(batches, loss)
    wanted = _wanted(engine, state.Weights.all, with_optimizer=True, loading=False)
    Checkpointer(directory, engine.mesh.host_group).save(1, wanted)
    return sorted(filled)


def loaded_fp8(directory: str, overrides: dict[str, Any]) -> str | None:
    """Loads it into another layout; what a history of another length is told."""
    engine, _ = _fp8_engine(overrides, 4)
    wanted = _fill(engine)
    state.load_fp8_state(engine, {})
    assert all(tensor.eq(0 if "history" in name else 1).all() for name, tensor in fp8.state(engine.modules).items())
    path = iteration_dir(directory, 1)
    asked = _wanted(engine, state.Weights.all, with_optimizer=True, loading=True)
    loaded = load_sharded(path, asked, optional=fp8.PREFIX)
    state.load_model_state(engine, loaded, main_weights=False)
    state.load_fp8_state(engine, loaded["fp8"])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fp8.state(engine.modules).items())
    longer, _ = _fp8_engine(overrides, 8)
    try:
        load_sharded(path, _wanted(longer, state.Weights.all, with_optimizer=True, loading=True), optional=fp8.PREFIX)
    except UserError as error:
        return error.problems[0]
    return None


def without_fp8(directory: str) -> int:
    """A checkpoint of BF16 into a model with FP8: how many tensors it has for it."""
    plain, _ = make_engine(config({"precision.bf16": True}))
    Checkpointer(directory, plain.mesh.host_group).save(
        1, _wanted(plain, state.Weights.all, with_optimizer=True, loading=False)
    )
    dist.barrier()
    engine, _ = _fp8_engine({"precision.bf16": True}, 4)
    asked = _wanted(engine, state.Weights.all, with_optimizer=True, loading=True)
    return len(load_sharded(iteration_dir(directory, 1), asked, optional=fp8.PREFIX).get("fp8", {}))


def fp8_contexts(recipe: str, first_last: bool) -> dict[str, Any]:
    """How often a training step, an evaluation and generation open Transformer Engine's FP8 context, and for which
    ranks, on layers that have no FP8."""
    opened: list[tuple[str, list[int]]] = []

    @contextlib.contextmanager
    def fp8_autocast(*, enabled, fp8_recipe, fp8_group):
        assert enabled
        opened.append((fp8_recipe, dist.get_process_group_ranks(fp8_group)))
        yield

    cfg = config({"precision.bf16": True, **({"parallel.pipeline_model_parallel_size": 2} if not first_last else {})})
    cfg.precision.fp8, cfg.precision.fp8_recipe = Fp8Format.hybrid, Fp8Recipe(recipe)
    cfg.precision.first_last_layers_bf16 = first_last
    package, module = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    package.__path__, package.pytorch, module.fp8_autocast = [], module, fp8_autocast
    fp8.fp8_utils.get_fp8_recipe = lambda config: config.fp8_recipe
    start("cpu", threads=1)
    sys.modules |= {"transformer_engine": package, "transformer_engine.pytorch": module}
    engine, loss = make_engine(cfg)
    built = len(opened)
    batches = micro_batches(samples(0), engine.mesh, 1)
    engine.train_step(batches, loss, samples=GLOBAL_BATCH)
    trained = len(opened) - built
    engine.evaluate(batches, loss)
    evaluated = len(opened) - built - trained
    with engine.whole_parameters():
        params = SamplingParams(temperature=0.0, max_new_tokens=2)
        Generator(engine, max_batch_size=2, max_seq_length=16).generate([[1, 2, 3]], params, [0])
    return {"micro_batches": len(batches), "built": built, "trained": trained, "evaluated": evaluated,
            "generated": len(opened) - built - trained - evaluated, "ranks": opened[-1]}  # fmt: skip
