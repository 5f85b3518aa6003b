"""What stands for Transformer Engine and Apex in the path of Python: taken, hidden from megatron-core, or refused.

Each case is a package that a test writes; megatron-core is not imported, and no GPU is asked."""

import sys
import textwrap

import pytest
import torch

from scale_llm.config.errors import UserError
from scale_llm.config.model import Backend
from scale_llm.config.precision import Fp8Recipe
from scale_llm.parallel import gpu


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes packages, {"name/file.py": text}, which are then the first in the path."""
    names = ("transformer_engine", "apex", "amp_C")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(textwrap.dedent(text))

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(before)


def engine(version: str, pytorch: str = "") -> dict[str, str]:
    """As Transformer Engine is: its own import of its torch part fails without a word."""
    init = f"""
        __version__ = "{version}"
        try:
            from . import pytorch
        except ImportError:
            pass
        """
    return {"transformer_engine/__init__.py": init, "transformer_engine/pytorch/__init__.py": pytorch}


BROKEN = "raise ImportError('transformer_engine_torch.so: undefined symbol: _ZN3c105ErrorC2E')"


def refusal(backend: Backend, recipe: Fp8Recipe | None = None) -> str:
    with pytest.raises(UserError) as caught:
        gpu.prepare(backend, recipe)
    return str(caught.value)


def test_one_that_works_is_left_alone(packages, capsys):
    packages(engine("2.11.0"))
    gpu.prepare(Backend.auto, None)
    assert sys.modules["transformer_engine"] is not None and capsys.readouterr().out == ""


def test_one_built_for_another_torch_is_refused_with_its_words_and_ours(packages):
    packages(engine("2.11.0", BROKEN))
    text = refusal(Backend.transformer_engine)
    assert text.startswith(f"model.backend=transformer_engine: Transformer Engine does not work with torch "
                           f"{torch.__version__}")  # fmt: skip
    assert "undefined symbol: _ZN3c105ErrorC2E" in text and "build it against this torch" in text
    assert refusal(Backend.transformer_engine, Fp8Recipe.delayed).startswith("precision.fp8_recipe=delayed: ")


@pytest.mark.parametrize("backend", [Backend.auto, Backend.torch])
def test_where_it_is_not_asked_for_it_is_hidden_with_a_warning(packages, capsys, backend):
    packages(engine("2.11.0", BROKEN))
    gpu.prepare(backend, None)
    with pytest.raises(ImportError):
        import transformer_engine.pytorch  # noqa: F401
    assert "undefined symbol" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.8.0", "2.12.0", "1.13"])
def test_a_version_that_megatron_core_is_not_made_for(packages, version):
    packages(engine(version))
    assert f"Transformer Engine {version} is not one" in refusal(Backend.transformer_engine)


def test_what_is_not_installed(packages, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "not installed" in refusal(Backend.transformer_engine)
    gpu.prepare(Backend.auto, None)
    assert capsys.readouterr().out == "", "nobody asked for it"


def test_an_apex_that_is_not_nvidias_is_never_imported(packages, tmp_path):
    packages(engine("2.11.0") | {"apex/__init__.py": "raise RuntimeError('the web toolkit ran')"})
    assert not gpu.is_nvidias_apex()
    gpu.prepare(Backend.auto, None)
    with pytest.raises(ImportError):
        import apex  # noqa: F401


def test_nvidias_apex_is_known_by_its_optimizer_and_its_kernels(packages):
    packages({"apex/__init__.py": "", "apex/optimizers/fused_adam.py": ""})
    assert not gpu.is_nvidias_apex(), "built without CUDA"
    packages({"amp_C.py": ""})
    assert gpu.is_nvidias_apex()


def test_fp8_asks_the_card_then_transformer_engine(packages, monkeypatch):
    manager = """
        class FP8GlobalStateManager:
            is_fp8_available = staticmethod(lambda: (True, ""))
            is_fp8_block_scaling_available = staticmethod(lambda: (False, "needs CUDA >= 12.9."))
        """
    packages(engine("2.11.0") | {"transformer_engine/pytorch/fp8.py": manager})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    gpu.prepare(Backend.transformer_engine, Fp8Recipe.tensorwise)
    assert "needs CUDA >= 12.9" in refusal(Backend.transformer_engine, Fp8Recipe.blockwise)
    text = refusal(Backend.transformer_engine, Fp8Recipe.mxfp8)
    assert text.startswith("precision.fp8_recipe=mxfp8: NVIDIA H100: needs a GPU of compute capability 10.0")
