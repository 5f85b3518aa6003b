"""`data.path` in all its forms, and its mistakes, found without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from scale_llm.config.errors import UserError
from scale_llm.data.sources import Source, parse_path, path_problems


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl", "c.parquet", "d.txt", "below/e.txt.gz", "README.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for extension in (".bin", ".idx"):
        (tmp_path / "indexed").mkdir(exist_ok=True)
        (tmp_path / "indexed" / f"x_text_document{extension}").write_bytes(b"")
    return tmp_path


def test_none_is_the_embedded_corpus():
    assert parse_path(None) == [Source(kind="embedded", name="the standard library of Python")]


@pytest.mark.parametrize(
    ("path", "kind", "names"),
    [
        ("a.jsonl", "raw", ["a.jsonl"]),
        ("*.jsonl", "raw", ["a.jsonl", "b.jsonl"]),
        ("below", "raw", ["below/e.txt.gz"]),
        ("**/*.txt*", "raw", ["below/e.txt.gz", "d.txt"]),
        ("indexed/x_text_document", "indexed", ["indexed/x_text_document"]),
        ("indexed/x_text_document.idx", "indexed", ["indexed/x_text_document"]),
        ("indexed", "indexed", ["indexed/x_text_document"]),
    ],
)
def test_one_entry(files: Path, path: str, kind: str, names: list[str]):
    expected = Source(kind=kind, files=tuple(str(files / name) for name in names), name=str(files / path))
    assert parse_path(str(files / path)) == [expected]
    assert parse_path([str(files / path)]) == [expected]


def test_weights_before_paths(files: Path):
    a, b = str(files / "a.jsonl"), str(files / "indexed" / "x_text_document")
    found = parse_path([0.7, a, "0.3", b])
    assert [(source.weight, source.kind, source.files) for source in found] == [
        (0.7, "raw", (a,)),
        (0.3, "indexed", (b,)),
    ]
    assert [source.weight for source in parse_path([a, b])] == [None, None]


def test_sources_by_name(files: Path):
    a, b, d = (str(files / name) for name in ("a.jsonl", "b.jsonl", "d.txt"))
    weighted = parse_path({"web": {"path": a, "weight": 2}, "books": {"path": [b, d], "weight": "1"}})
    assert [(source.name, source.weight, source.files) for source in weighted] == [
        ("web", 2.0, (a,)),
        ("books", 1.0, (b, d)),
    ]
    repeated = parse_path({"web": a, "books": {"path": b, "epochs": 2}})
    assert [(source.name, source.weight, source.epochs) for source in repeated] == [
        ("web", None, None),
        ("books", None, 2.0),
    ]
    assert [source.name for source in parse_path({"web": a, "books": [b, d]}, temperature=3.0)] == ["web", "books"]


@pytest.mark.parametrize(
    ("path", "temperature", "words"),
    [
        ({}, 1.0, "names no source"),
        ({"x": {"weight": 0.5}}, 1.0, "data.path.x: a weight that names no source"),
        ({"x": {"path": "a.jsonl", "wieght": 0.5}}, 1.0, "data.path.x.wieght: no such key"),
        ({"x": {"path": "a.jsonl", "weight": 0}}, 1.0, "data.path.x.weight=0: must be a finite number above 0"),
        ({"x": {"path": "a.jsonl", "epochs": float("nan")}}, 1.0, "data.path.x.epochs=nan"),
        ({"x": {"path": "a.jsonl", "weight": True}}, 1.0, "data.path.x.weight=True"),
        ({"x": {"path": "a.jsonl", "weight": 1}, "y": "b.jsonl"}, 1.0, "x with a weight and y without"),
        ({"x": {"path": "a.jsonl", "weight": 1}, "y": {"path": "b.jsonl", "epochs": 2}}, 1.0, "x with .* y with"),
        ({"x": {"path": "a.jsonl", "weight": 1, "epochs": 2}}, 1.0, "x with a weight and x with epochs"),
        ({"x": ["a.jsonl", "indexed"]}, 1.0, "mixes indexed files with text"),
        ({"x": {"path": 3}}, 1.0, "must be a path or a list of paths"),
        ([0.5, "a.jsonl", float("nan"), "b.jsonl"], 1.0, "weight nan must be a finite number"),
        ([0.5, "a.jsonl", 0.5, "b.jsonl"], 3.0, "temperature=3: data.path has weights"),
        ({"x": {"path": "a.jsonl", "epochs": 2}, "y": "b.jsonl"}, 3.0, "temperature=3: data.path has epochs"),
        (["a.jsonl", "b.jsonl"], 0.3, "temperature=0.3: .* give its inverse, 3.33"),
        (["a.jsonl", "b.jsonl"], float("inf"), "temperature=inf: must be a finite number"),
        ("a.jsonl", 2.0, "there is one source"),
        (None, 2.0, "there is one source"),
    ],
)
def test_mistakes_of_a_mixture(files: Path, monkeypatch: pytest.MonkeyPatch, path, temperature: float, words: str):
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=words) as caught:
        parse_path(path, temperature)
    assert len(caught.value.problems) == 1
    assert path_problems(path, temperature=temperature) == caught.value.problems


def test_all_mistakes_of_a_mixture_at_once(files: Path):
    path = {"x": {"weight": -1}, "y": {"path": "/nowhere.txt", "weight": 2}, "z": {"path": str(files / "a.jsonl")}}
    problems = path_problems(path, temperature=2.0)
    assert len(problems) == 5
    expected = ("x.weight=-1", "names no source", "y with a", "temperature", "nowhere")
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.jsonl", "no such file"),
        ("*.csv", "no such file"),
        ("README.md", "unknown kind"),
        ([0.5, "a.jsonl", "b.jsonl"], "do not alternate"),
        (["a.jsonl", 0.5], "do not alternate"),
        ([-1, "a.jsonl"], "above 0"),
        (["a.jsonl", None], "not a path"),
        ([], "must be a path"),
        (3, "must be a path"),
        (".", "mixes indexed files"),
    ],
)
def test_mistakes(files: Path, monkeypatch: pytest.MonkeyPatch, path, words: str):
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=words) as caught:
        parse_path(path)
    assert path_problems(path) == caught.value.problems


def test_all_mistakes_at_once_and_a_lost_half(files: Path):
    (files / "indexed" / "x_text_document.bin").unlink()
    problems = path_problems([str(files / "no.txt"), str(files / "indexed" / "x_text_document"), "/nowhere/*"])
    assert len(problems) == 3
    assert "x_text_document.bin is missing" in problems[1]


def test_no_torch_on_this_path(files: Path):
    """`scale-llm --check` must answer within seconds."""
    code = (
        "import sys; from scale_llm.data.sources import path_problems; import scale_llm.data.splits;"
        f"assert path_problems({str(files / 'indexed')!r}); assert path_problems(None) == [];"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
