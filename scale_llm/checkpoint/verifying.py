"""Whether two models are the same function: by their tensors where both are of one kind, else by what they compute.

Differences are largest absolute ones, in FP32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_llm.checkpoint.huggingface.merging import Reader, is_adapters, model_reader
from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.torch_dist import TorchDistReader, find_checkpoint, is_of_model
from scale_llm.config.checkpoint_files import is_huggingface
from scale_llm.config.errors import UserError

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """name: of a tensor, a layer, or the logits. largest: None where only one side has it, or shapes differ (`why`)."""

    name: str
    largest: float | None
    why: str = ""


def compare_tensors(a: Path | str, b: Path | str, progress: Callable[[int], Progress]) -> Iterator[Difference]:
    """Two directories of one kind, tensor by tensor; optimizer state and a critic are left out.

    Raises:
        UserError: they are of two kinds, or damaged.
    """
    kinds = [is_huggingface(path) for path in (a, b)]
    if kinds[0] is not kinds[1]:
        raise UserError(f"{a} and {b} are of two kinds: their tensors cannot be compared, their logits can")
    left, right = (_Tensors(Path(path)) for path in (a, b))
    names = sorted({*left.shapes, *right.shapes})
    step = progress(len(names))
    for name in names:
        yield _difference(name, left, right)
        step(1)


def same_kind(a: Path | str, b: Path | str) -> bool:
    return is_huggingface(a) is is_huggingface(b)


class _Tensors:
    """Names, shapes and values of either kind; stacked layers are taken one at a time."""

    def __init__(self, path: Path):
        if is_huggingface(path):
            folder = SafetensorsFolder(path)
            self.shapes = {name: entry.shape for name, entry in folder.entries.items()}
            self.read: Callable[[str], torch.Tensor] = folder.read
        else:
            # Adapters are compared as the model that they and their base are
            reader: Reader = model_reader(path) if is_adapters(path) else TorchDistReader(find_checkpoint(path))
            self._places = dict(_places(reader))
            self.shapes = {name: tuple(reader.tensors[key].size[len(i) :]) for name, (key, i) in self._places.items()}
            self.read = lambda name: reader.read(*self._places[name])


def _places(reader: Reader) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for key, entry in reader.tensors.items():
        if not is_of_model(key):
            continue
        if not key.startswith("decoder.layers."):
            yield key, (key, ())
            continue
        for layer in range(entry.size[0]):
            name = key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
            if ".experts.experts." not in key:
                yield name, (key, (layer,))
                continue
            for expert in range(entry.size[1]):
                yield name.replace(".experts.experts.", f".experts.{expert}."), (key, (layer, expert))


def _difference(name: str, left: _Tensors, right: _Tensors) -> Difference:
    shapes = left.shapes.get(name), right.shapes.get(name)
    if None in shapes:
        return Difference(name, None, f"only in the {'first' if shapes[1] is None else 'second'}")
    a, b = left.read(name).float(), right.read(name).float()
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):  # padding depends on the layout
        rows = min(a.size(0), b.size(0))
        if max(a.size(0), b.size(0)) > rows and not (a[rows:].any() or b[rows:].any()):
            a, b = a[:rows], b[:rows]
    if a.shape != b.shape:
        return Difference(name, None, f"shapes {tuple(shapes[0] or ())} and {tuple(shapes[1] or ())}")
    return Difference(name, (a - b).abs().max().item() if a.numel() else 0.0)
