"""A Hugging Face directory, checked before anything is made of it."""

import json
from pathlib import Path
from typing import Any

import torch

from scale_llm.checkpoint.safetensors_files import SafetensorsFolder
from scale_llm.checkpoint.staging import refuse
from scale_llm.config.errors import UserError
from scale_llm.config.model import ModelConfig
from scale_llm.config.resolve import tokenizer_vocab_size
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.models.huggingface import Family, Tensor, family_of, read_model
from scale_llm.models.huggingface.forms import STACKED, to_megatron

FOLDER = "huggingface"
"""Where an imported checkpoint keeps those files and the config.json it came with."""


class HuggingFaceModel:
    """The tensors of a Hugging Face directory, checked against its configuration.

    Raises:
        UserError: unknown architecture, damaged shards, tensors that are missing, unexpected or of another shape than
            config.json says, a tokenizer that is larger than the embedding; all at once.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        source = str(self.directory / "config.json")
        self.config = read_json(self.directory / "config.json")
        self.model: ModelConfig = read_model(self.config, source)
        self.family: Family = family_of(self.config, source)[0]
        self.tensors: list[Tensor] = self.family.tensors_of(self.model)
        self._files = SafetensorsFolder(self.directory)
        self._names = self._aliases()
        refuse([*self._differences(), *self._tokenizer_problems()])

    def _aliases(self) -> dict[str, str]:
        """Name in the table -> name in the files, which may lack the base model's prefix."""
        names = dict.fromkeys(self._files.entries)
        base = self.family.base
        found = {name: name for name in names}
        if not any(name.startswith(base) for name in names):
            found |= {base + name: name for name in names}
        return found

    def _differences(self) -> list[str]:
        entries, expected = self._files.entries, set()
        missing, wrong = [], []
        kinds: dict[str, torch.dtype] = {}  # one a Megatron tensor, whose layers are stacked
        for tensor in self.tensors:
            for index in tensor.indices(self.model):
                for name, part in zip(tensor.names(index), tensor.parts, strict=True):
                    actual, shape = self._names.get(name), part.sizes(self.model)
                    if actual is None:
                        missing.append(name)
                        continue
                    expected.add(actual)
                    dtype = entries[actual].dtype
                    if not dtype.is_floating_point or dtype.itemsize < 2:
                        wrong.append(f"{self.directory}: {name} is {_name(dtype)}; quantised weights are not supported")
                    elif kinds.setdefault(tensor.key, dtype) is not dtype:
                        wrong.append(
                            f"{self.directory}: {name} is {_name(dtype)} where the others like it are "
                            f"{_name(kinds[tensor.key])}; save the model in one number format"
                        )
                    if entries[actual].shape != shape:
                        wrong.append(
                            f"{self.directory}: {name} has shape {entries[actual].shape} where config.json says {shape}"
                        )
        unexpected = [name for name in entries if name not in expected and not self._ignored(name)]
        return [
            *(f"{self.directory}: {name} is missing, which {self.family.model_type} needs" for name in missing),
            *(f"{self.directory}: {name} is not a tensor of this {self.family.model_type}" for name in unexpected),
            *wrong,
        ]

    def _ignored(self, name: str) -> bool:
        if name.endswith(self.family.ignored):
            return True
        table = self._names.get(self.tensors[0].parts[0].name)
        if name != "lm_head.weight" or table is None or self.model.untie_embeddings_and_output_weights:
            return False
        return torch.equal(self._files.read(name), self._files.read(table))  # a copy of the table it is tied to

    def _tokenizer_problems(self) -> list[str]:
        if not (self.directory / "tokenizer.json").is_file():
            return []
        size = tokenizer_vocab_size(TokenizerConfig(path=str(self.directory)))
        rows = self.model.vocab_size or 0
        if size is None:
            return [f"{self.directory / 'tokenizer.json'}: cannot be read; fetch it again, or take it away"]
        if size is not None and size > rows:
            return [
                f"{self.directory / 'tokenizer.json'}: has {size} tokens, the embedding {rows} rows; resize the "
                "embedding (resize_token_embeddings) and save the model again"
            ]
        return []

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        return self.dtype_of(self.tensors[0])

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        first = tensor.names((0,) * len(tensor.leading(self.model)))[0]
        return self._files.entries[self._names[first]].dtype

    def megatron(self, tensor: Tensor, index: tuple[int, ...], padded_vocabulary: int) -> torch.Tensor:
        """The Megatron tensor at one index."""
        names = [self._names[name] for name in tensor.names(index)]
        if tensor.form not in STACKED:
            return to_megatron(tensor, [self._files.read(name) for name in names], self.model)
        # Rows above rows: read where they belong, which saves a copy of the largest tensors.
        whole = torch.empty(tensor.shape(self.model, padded_vocabulary), dtype=self.dtype_of(tensor))
        row = 0
        for name in names:
            rows = self._files.entries[name].shape[0]
            self._files.read(name, into=whole[row : row + rows])
            row += rows
        whole[row:] = 0
        return whole


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError where it is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; give the directory of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object")
    return found
