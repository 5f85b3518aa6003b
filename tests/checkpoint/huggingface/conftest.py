"""Models of every family, saved once by transformers and imported once by us."""

import pytest
import torch
from support import families
from support.tool import TOOL

from scale_llm.checkpoint.huggingface import import_huggingface


class Models:
    """Directories of models by family name, made when they are first asked for."""

    def __init__(self, root):
        self._root = root

    def original(self, name):
        path = self._root / name
        return path if path.is_dir() else families.save(name, path)

    def sharded(self, name):
        path = self._root / f"{name}_sharded"
        return path if path.is_dir() else families.save(name, path, max_shard_size="250KB")

    def imported(self, name):
        path = self._root / f"{name}_imported"
        if not path.is_dir():
            import_huggingface(self.original(name), path, silent)
        return path

    def saved(self, name: str, value) -> str:
        """A file with a tensor, for ranks to read."""
        path = self._root / f"{name}.pt"
        if not path.is_file():
            torch.save(value, path)
        return str(path)


@pytest.fixture
def tool(ranks):
    """Calls tools/convert_checkpoint.py; what it prints. It must end with `status`."""

    def run(*words, status: int) -> str:
        ((found, printed),) = ranks.fresh(1, "support.tool:run", program=TOOL, words=[str(word) for word in words])
        assert found == status, printed
        return printed

    return run


def silent(_total):
    return lambda _done: None


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("families"))
