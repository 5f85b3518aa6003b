"""The sections of `benchmark.py gpu`: generators of (rows with their aims, what failed and why), all that is known each
time.

Contestants are those of the other benchmarks, each in a process of its own. On one card they take turns while the
memory holds two models; where it does not, they run one after the other, and the rows say so.
"""

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.alternate import Contestant, Turns, turns
from benchmarks.common import SIZES, alone, shape
from benchmarks.gpu_section import Skipped
from benchmarks.rows import Row, faster, shorter
from benchmarks.train_contestants import MATMUL_SIZE_GPU
from scale_llm.config.machine import detect
from scale_llm.config.parameters import count_parameters, flops_per_token

Found = Iterator[tuple[list[tuple[Row, str]], str]]

_TRAIN = "benchmarks.train_contestants"
_BYTES_PER_PARAMETER = 18
"""BF16 weights, FP32 gradients and main weights, Adam's two averages."""
_ACTIVATIONS_GIB = 22.0
"""Of the contestant whose turn it is, logits of 8,192 tokens included."""
_ROUNDS = {"full": 5, "tiny": 1}
_STEPS = {"full": 6, "tiny": 1}
_SIDE = {"full": MATMUL_SIZE_GPU, "tiny": 128}
_FP8 = ("fp8_delayed", "fp8_tensorwise")
"""Options of the group `precision` that a Hopper card has kernels for."""

OURS, MEGATRON, TRANSFORMERS, MATMUL = "ours", "megatron-core", "transformers", "matmul"


def train_1b(scale: str, device: str, deadline: float, directory: str) -> Found:
    yield from _train("1b", scale, device, deadline)


def train_8b(scale: str, device: str, deadline: float, directory: str) -> Found:
    yield from _train("8b_4_layers", scale, device, deadline)


def _train(size: str, scale: str, device: str, deadline: float) -> Found:
    """Steps in BF16: ours, a bare megatron-core loop, transformers, and the card's own rate of products."""
    size = size if scale == "full" else "tiny"
    peers = [_trainer(MEGATRON, "bare_megatron", size, scale, device)]
    peers.append(_trainer(TRANSFORMERS, "transformers_llama", size, scale, device, compiled=_compiler(scale)))
    ours = _our_trainer(OURS, "bf16", size, scale, device)
    matmul = Contestant(
        name=MATMUL, build=f"{_TRAIN}:matmul", steps=50 if scale == "full" else 1,
        arguments={"precision": "bf16", "device": device, "side": _SIDE[scale]},
    )  # fmt: skip
    together = _fit(size, device)
    # Not all at once: the card holds the state of two
    groups = [[ours, peers[0], matmul], [ours, peers[1]]] if together else [[ours, matmul], [peers[0]], [peers[1]]]

    def rows(found: Turns) -> list[tuple[Row, str]]:
        made = []
        tokens, manner = SIZES[size].tokens, "" if together else ", one after the other"
        compiled = f", {'torch.compile' if _compiler(scale) else 'eager'}, sdpa, fused AdamW"
        for peer, kind, aim in ((peers[0], _megatron_kind(device), "over 1.0"), (peers[1], compiled, "over 1.3")):
            pair = _pair(found, OURS, peer.name)
            if pair:
                name = f"{peer.name}{kind}{manner}"
                made += [
                    (faster(f"{size}: BF16 step", tokens / pair[0], tokens / pair[1], name, "tokens/s"), aim),
                    (shorter(f"{size}: peak memory", ours.peak_gib, peer.peak_gib, name, "GiB"), "at least 1.0"),
                ]
        pair = _pair(found, OURS, MATMUL)
        if pair:
            ours_rate = tokens / pair[0] * flops_per_token(shape(size)) / 1e12
            peak = 2 * _SIDE[scale] ** 3 / pair[1] / 1e12
            name = f"product of {_SIDE[scale]} x {_SIDE[scale]} matrices"
            row = faster(f"{size}: BF16 model FLOPs, share of the matmul rate", ours_rate, peak, name, "TFLOP/s")
            made.append((row, "over 0.55"))
        return made

    yield from _rounds(groups, rows, scale, deadline)


def fp8(scale: str, device: str, deadline: float, directory: str) -> Found:
    """Our steps in FP8 against ours in BF16; the larger layers first."""
    if device != "cuda":
        raise Skipped("FP8 needs a GPU")
    if not _has_transformer_engine():
        raise Skipped("Transformer Engine is not installed: pip install .[gpu]")
    failed = ""
    known: list[tuple[Row, str]] = []
    sizes = ("8b_4_layers", "1b") if scale == "full" else ("tiny",)
    for number, size in enumerate(sizes):
        until = time.time() + (deadline - time.time()) / (len(sizes) - number)
        ours = _our_trainer(OURS, "bf16", size, scale, device)
        low = [_our_trainer(name, name, size, scale, device) for name in _FP8]
        together = _fit(size, device)
        groups = [[ours, one] for one in low] if together else [[one] for one in (ours, *low)]

        def rows(found: Turns, size=size, low=low, ours=ours, together=together) -> list:
            made, tokens = [], SIZES[size].tokens
            name = "ours, bf16" if together else "ours, bf16, one after the other"
            for one in low:
                pair = _pair(found, one.name, OURS)
                if pair:
                    step = faster(f"{size}: {one.name} step", tokens / pair[0], tokens / pair[1], name, "tokens/s")
                    memory = shorter(f"{size}: {one.name}, peak memory", one.peak_gib, ours.peak_gib, name, "GiB")
                    made += [(step, "over 1.3"), (memory, "")]
            return made

        latest: list[tuple[Row, str]] = []
        reason = ""
        try:
            for latest, reason in _rounds(groups, rows, scale, until):
                yield known + latest, "; ".join(filter(None, [failed, reason]))
        except RuntimeError as error:  # of this size alone
            reason = f"{size}: {error}"
        known, failed = known + latest, "; ".join(filter(None, [failed, reason]))
        if time.time() > deadline:
            break
    if not known:
        raise RuntimeError(failed)
    yield known, failed


def rollout(scale: str, device: str, deadline: float, directory: str) -> Found:
    """New tokens of one batch of 64, the same number for every sample."""
    builders, size = "benchmarks.rollout_contestants", "1b" if scale == "full" else "tiny"
    shared = {"directory": None, "precision": "bf16", "workload": "64" if scale == "full" else "tiny",
              "size": size, "device": device}  # fmt: skip
    compiled = {"compiled": _compiler(scale)}
    ours = Contestant(name=OURS, build=f"{builders}:ours", arguments={**shared, **compiled})
    peer = Contestant(name=TRANSFORMERS, build=f"{builders}:transformers_generate", arguments=shared)

    def rows(found: Turns) -> list[tuple[Row, str]]:
        if not _pair(found, OURS, TRANSFORMERS):
            return []
        measure, name = f"{size}: rollout, one batch", "transformers generate, sdpa"
        return [
            (faster(measure, ours.median_rate, peer.median_rate, name, "new tokens/s"), "over 5"),
            (shorter(f"{size}: rollout, peak memory", ours.peak_gib, peer.peak_gib, name, "GiB"), ""),
        ]

    yield from _rounds([[ours, peer]], rows, scale, deadline)


def checkpoint(scale: str, device: str, deadline: float, directory: str) -> Found:
    """Stall and cost of a background save of the whole state, against a synchronous one, in turns in one process.

    The first save of each makes plans and takes memory; it counts where there was time for no other.
    """
    from benchmarks import checkpoint_rank

    alone()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    size = "1b" if scale == "full" else "tiny"
    settings = {"size": size, "device": device, "contestants": ["sync", "ours"], "longest": 10**6}
    step, contestants = checkpoint_rank.build(Path(directory), settings)
    values: list[dict[str, float]] = []
    for _ in range(1 + (3 if scale == "full" else 1)):
        began = time.time()
        one: dict[str, float] = {}
        for name in settings["contestants"]:
            checkpoint_rank.quiet(Path(directory))
            undisturbed = checkpoint_rank.timed_steps(step)
            one |= {**contestants[name](undisturbed), "undisturbed": undisturbed}
        values.append(one)
        counted = values[1:] or values
        middle = {key: median(each[key] for each in counted) for key in one}
        first = "" if len(values) > 1 else ", first saves"
        stall, sync, cost = middle["ours stall"], middle["sync"], middle["ours cost"]
        gigabytes = middle["bytes"] / 1e9
        yield [
            (shorter(f"{size}: stall of a background save{first}", stall, 0.05 * sync, "5% of a synchronous save", "s"),
             "at least 1.0"),
            (shorter(f"{size}: cost of it in all{first}", cost, sync, "synchronous save", "s"), ""),
            (shorter(f"{size}: a step meanwhile{first}", middle["ours step"], middle["undisturbed"],
                     "undisturbed", "s"), ""),
            (faster(f"{size}: synchronous save of {gigabytes:.1f} GB{first}", gigabytes / sync, gigabytes / cost,
                    "background save", "GB/s"), ""),
        ], ""  # fmt: skip
        if time.time() + (time.time() - began) > deadline:
            break
    from scale_llm.parallel.device import stop

    stop()


def convert(scale: str, device: str, deadline: float, directory: str) -> Found:
    """Import and export against a plain copy of the same files."""
    from benchmarks import convert as conversion

    model = shape("1b" if scale == "full" else "tiny")
    model.max_position_embeddings = model.seq_length
    for rows in conversion.measured(model, 3 if scale == "full" else 1, Path(directory)):
        yield [(row, "over 0.5" if row.peer_name == "plain copy" else "") for row in rows], ""
        if time.time() > deadline - 10:
            return


def _trainer(name: str, function: str, size: str, scale: str, device: str, **extra) -> Contestant:
    arguments = {"precision": "bf16", "size": size, "device": device, **extra}
    return Contestant(name=name, build=f"{_TRAIN}:{function}", arguments=arguments, steps=_STEPS[scale])


def _our_trainer(name: str, precision: str, size: str, scale: str, device: str) -> Contestant:
    arguments = {"precision": precision, "size": size, "device": device, "compiled": _compiler(scale)}
    return Contestant(name=name, build=f"{_TRAIN}:ours", arguments=arguments, steps=_STEPS[scale])


def _compiler(scale: str) -> bool:
    return bool(detect().compiler) and scale == "full"


def _has_transformer_engine() -> bool:
    """Whether it is installed. Not imported here: that takes seconds, which contestants need."""
    try:
        importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _megatron_kind(device: str) -> str:
    if device != "cuda":
        return ", local spec"
    if _has_transformer_engine():
        return ", Transformer Engine spec, bare loop"
    return ", local spec, attention recomputed, bare loop"


def _rounds(groups: list[list[Contestant]], rows: Callable[[Turns], list], scale: str, deadline: float) -> Found:
    """Turns until the rounds are over, or the last one would end too late. A group begun is given one round."""
    failures: dict[str, str] = {}
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    known: list[tuple[Row, str]] = []
    for found in turns(groups, rounds=_ROUNDS[scale], threads=threads, say=say, failures=failures, deadline=deadline):
        known = rows(found)
        yield known, _told(failures)
        if time.time() > deadline:
            break
    if not known:
        raise RuntimeError(_told(failures) or "there was no time for a round")


def _told(failures: dict[str, str]) -> str:
    """Which contestants failed, each with the last line of its error."""
    return "; ".join(f"{name} failed: {text.strip().splitlines()[-1][:300]}" for name, text in failures.items())


def _pair(found: Turns, ours: str, peer: str) -> tuple[float, float] | None:
    """Median seconds of a step of both: of the rounds that they have shared, else of all that each has had."""
    for group in found:
        if group.get(ours) and group.get(peer):
            return median(group[ours]), median(group[peer])
    each = [[seconds for group in found for seconds in group.get(name, [])] for name in (ours, peer)]
    return (median(each[0]), median(each[1])) if all(each) else None


def _fit(size: str, device: str) -> bool:
    """Whether the memory holds two models, and the activations of one."""
    if device != "cuda":
        return True
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    state = count_parameters(shape(size)).total * _BYTES_PER_PARAMETER
    return 2 * state + _ACTIVATIONS_GIB * 2**30 < total
