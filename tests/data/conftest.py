"""Real texts and a small prepared corpus, made once per session."""

from pathlib import Path

import pytest

from scale_llm.config.data import DataConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.prepare import PreparedData, prepare

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def _real(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"real data ../shared/data/{name} is not here")
    return str(SHARED / name)


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """1.1 MB of plain text."""
    return _real("tinyshakespeare.txt")


@pytest.fixture(scope="session")
def web() -> str:
    """300 web documents as JSONL."""
    return _real("c4_web.jsonl")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer_config() -> TokenizerConfig:
    return TokenizerConfig(vocab_size=512)


@pytest.fixture(scope="session")
def embedded_config() -> DataConfig:
    return DataConfig(embedded_megabytes=0.5, split="80,10,10")


@pytest.fixture(scope="session")
def embedded(embedded_config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path) -> PreparedData:
    """Half a megabyte of the standard library."""
    return prepare(embedded_config, tokenizer_config, cache)
