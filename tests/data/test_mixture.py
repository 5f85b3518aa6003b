"""Shares of sources, and what a run takes of each."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from support.configs import config_of

from scale_llm.config.data import DataConfig
from scale_llm.config.tokenizer import TokenizerConfig
from scale_llm.data.at_hand import tokens_at_hand
from scale_llm.data.datasets import build_dataset
from scale_llm.data.mixture import amounts, parts_of_run, repeats, shares
from scale_llm.data.prepare import PreparedData, prepare
from scale_llm.data.sources import Source
from scale_llm.data.splits import split_tokens
from scale_llm.data.tokenizer import Tokenizer
from scale_llm.data.tokenizer_json import token_id
from scale_llm.launch.mixture_table import print_mixture

SEQ = 16


def sources(**changes) -> list[Source]:
    """Three, with the given weights or epochs."""
    columns = {name: list(values) for name, values in changes.items()}
    return [Source(kind="raw", name=f"s{i}", **{key: row[i] for key, row in columns.items()}) for i in range(3)]


def test_shares():
    tokens = [1000, 10, 100]
    assert shares(sources(), tokens, 1.0) is None
    assert shares(sources(weight=[2, 1, 1]), tokens, 1.0) == [0.5, 0.25, 0.25]
    assert shares(sources(epochs=[None, 10, 4]), tokens, 1.0) == [1000 / 1500, 100 / 1500, 400 / 1500]
    roots = numpy.sqrt(tokens)
    assert shares(sources(), tokens, 2.0) == pytest.approx(list(roots / roots.sum()))
    assert shares(sources(), tokens, 1e9) == pytest.approx([1 / 3] * 3)
    assert shares(sources(), [10, 0, 10], 2.0) == [0.5, 0.0, 0.5]


def test_what_a_run_takes():
    parts = parts_of_run(sources(weight=[6, 3, 1]), [1000, 100, 10], [False, False, True], 1.0, 2000)
    assert [part.epochs for part in parts] == pytest.approx([1.2, 6.0, 20.0])
    assert [part.given for part in parts] == ["6", "3", "1"]
    assert [line.split(";")[0] for line in repeats(parts)] == [
        "warning: s1 is taken 6.0 times",
        "warning: s2 is taken about 20.0 times",
    ]
    facts = dict(amounts(100, parts, 2000))
    assert facts["tokens wanted"].startswith("2K, 20 a parameter")
    assert facts["tokens at hand"] == "about 1.11K, 0.555 of that, for training"
    assert facts["tokens trained on"] == "2K, 1 of what is wanted, 1.8 epochs of all"
    unweighted = parts_of_run(sources(), [1000, 0, 1000], [False] * 3, 1.0, None)
    assert [(part.share, part.epochs) for part in unweighted] == [(0.5, None), (0.0, None), (0.5, None)]
    assert repeats(unweighted) == [] and "tokens trained on" not in dict(amounts(100, unweighted, None))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files of text, the one four times the other."""
    directory = tmp_path_factory.mktemp("parts")
    for name, count in (("large", 80), ("small", 20)):
        rows = "".join(f'{{"text": "{name} document number {i}, which says {i * i}"}}\n' for i in range(count))
        (directory / f"{name}.jsonl").write_text(rows)
    return {name: str(directory / f"{name}.jsonl") for name in ("large", "small")}


def test_epochs_are_what_is_drawn(parts: dict[str, str], embedded: PreparedData, tmp_path: Path):
    """Over a run as long as the sum of all epochs every sample of a source comes so many times, at most one off."""
    path = {"large": parts["large"], "small": {"path": parts["small"], "epochs": 3}}
    data = DataConfig(path=path, split="90,10,0", cache_dir=str(tmp_path))
    tokenizer = TokenizerConfig(path=embedded.tokenizer_path)
    prepared = prepare(data, tokenizer, tmp_path)
    held = [split_tokens(prefix, data.split, "train") for prefix in prepared.prefixes]
    assert prepared.weights == pytest.approx([held[0] / (held[0] + 3 * held[1]), 3 * held[1] / (held[0] + 3 * held[1])])
    build = {"split": "train", "seq_length": SEQ, "seed": 1, "cache_dir": tmp_path}
    once = [stream.samples_per_epoch for stream in build_dataset(prepared, data, **build).streams]
    stream = build_dataset(prepared, data, num_samples=once[0] + 3 * once[1], **build)
    drawn = numpy.bincount(stream._which, minlength=2)
    assert abs(drawn[0] - once[0]) <= 2 and abs(drawn[1] - 3 * once[1]) <= 2


def test_tokens_at_hand_are_exact_once_indexed(parts: dict[str, str], embedded: PreparedData, tmp_path: Path):
    """A guess from bytes before; the same numbers as the indexed files after, also under other weights."""
    tokenizer = TokenizerConfig(vocab_size=300)
    data = DataConfig(path=[parts["large"], parts["small"]], split="90,10,0", cache_dir=str(tmp_path))
    before = tokens_at_hand(data, tokenizer)
    assert all(guessed for _, _, guessed in before)
    assert before[0][1] == int(Path(parts["large"]).stat().st_size * 0.9 / 4)
    prepared = prepare(data, tokenizer, tmp_path)
    data.path = {"a": {"path": parts["large"], "weight": 1}, "b": {"path": parts["small"], "weight": 2}}
    after = tokens_at_hand(data, tokenizer)
    exact = [split_tokens(prefix, data.split, "train") for prefix in prepared.prefixes]
    assert [(tokens, guessed) for _, tokens, guessed in after] == [(count, False) for count in exact]
    data.path = embedded.prefixes[0]
    count = split_tokens(embedded.prefixes[0], data.split, "train")
    found = tokens_at_hand(data, TokenizerConfig(path=embedded.tokenizer_path))
    assert [each[1:] for each in found] == [(count, False)]


def test_numbers_of_tokens_without_the_tokenizer(embedded: PreparedData):
    loaded = Tokenizer.load(embedded.tokenizer_path, "<|endoftext|>")
    for token in ("<|endoftext|>", "a", "def"):
        assert token_id(embedded.tokenizer_path, token) == loaded.backend.token_to_id(token)
    assert token_id(embedded.tokenizer_path, "<absent>") is None


def test_temperature_and_seed_alone_decide(parts: dict[str, str], embedded: PreparedData, tmp_path: Path):
    tokenizer = TokenizerConfig(path=embedded.tokenizer_path)
    paths = [parts["large"], parts["small"]]
    plain, warm, hot = (
        prepare(DataConfig(path=paths, temperature=temperature), tokenizer, tmp_path) for temperature in (1.0, 2.0, 1e6)
    )
    assert plain.weights is None and plain.prefixes == warm.prefixes == hot.prefixes
    assert plain.num_tokens and hot.weights == pytest.approx([0.5, 0.5], abs=1e-5)
    assert 0.5 < warm.weights[0] < 0.8 and sum(warm.weights) == pytest.approx(1)


def test_a_glob_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], parts: dict[str, str], tmp_path: Path):
    """Brackets are markup to the library that draws the table."""
    pattern = parts["large"].replace("large", "[l]arge")
    print_mixture(config_of(f"data.path='{pattern}'", f"data.cache_dir={tmp_path}", "train.train_iters=1"))
    assert "[l]arge.jsonl" in capsys.readouterr().out


def test_check_prints_the_mixture_without_torch(parts: dict[str, str], tmp_path: Path):
    code = (
        "import sys; from scale_llm.launch.cli import run_command;"
        "assert run_command(sys.argv[1:]) == 0; assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    words = [
        "--check", "model=tiny", "train.train_iters=100", f"run_dir={tmp_path}/run", "cluster=local_cpu",
        f"data.path={{web: {parts['large']}, wiki: {{path: {parts['small']}, epochs: 2}}}}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    for line in ("estimated from bytes", "│ web", "2 epochs", "20 a parameter", "warning: wiki is taken about"):
        assert line in done.stdout
    assert not (tmp_path / "run").exists()
