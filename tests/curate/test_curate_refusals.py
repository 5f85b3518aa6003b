"""What cannot be meant is refused before anything is read or written, all of it at once."""

import bz2
import lzma
from pathlib import Path

import pytest

from scale_llm.config.curate_compose import compose_curation
from scale_llm.config.errors import UserError
from scale_llm.curate.inputs import find
from scale_llm.curate.run import curate, plan

ROW = '{"text": "A document about nothing much, which nobody has ever read to its end."}\n'
PLAIN = ["curate=duplicates", "curate.near.enabled=false", "curate.sentences.enabled=false", "tasks=1"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text(ROW)
    return path


def _problems(*words: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        curate(compose_curation(list(words)), lambda _: None)
    return raised.value.problems


def test_words() -> None:
    assert _problems("curate=wob", "tsaks=3", "curate.gopher.min_word=3") == [
        "curate=wob: unknown option; did you mean curate=web?",
        "tsaks=3: unknown key or group; did you mean tasks?",
        "curate.gopher.min_word=3: unknown key; did you mean curate.gopher.min_words or curate.gopher.max_words?",
    ]
    assert _problems("tasks=2") == [
        "input: has no default; give input=PATH",
        "output: has no default; give output=PATH",
    ]
    (problem,) = _problems("input=a", "output=b", "curate.near.buckets=few")
    assert problem.startswith("curate.near.buckets=few: ") and problem.endswith("give int")
    assert _problems("input=a", "output=b", "on_bad_row=maybe")[0].startswith("on_bad_row")


def test_values() -> None:
    found = _problems(
        "input=a", "output=b", "tasks=0", "curate.near.min_similarity=1.5", "curate.near.buckets=0",
        "curate.gopher.min_words=-1", "curate.language.languages=[]", "curate.gopher.min_stop_words=20",
        "curate.repetition.top_n_grams=[2]", "curate.decontaminate.shortest=20", "cluster.nodes=3",
        "curate.url.enabled=false", "curate.url.blocked_words=[x]", "curate.max_document_megabytes=4000",
    )  # fmt: skip
    keys = [problem.split("=")[0] for problem in found]
    assert keys == [
        "curate.near.min_similarity", "curate.near.buckets", "curate.gopher.min_words",
        "curate.repetition.top_n_grams", "curate.decontaminate.shortest", "curate.max_document_megabytes",
        "curate.language.languages", "curate.gopher.min_stop_words", "curate.url.enabled", "cluster.nodes", "tasks",
    ]  # fmt: skip
    assert all(";" in problem or ":" in problem for problem in found)


def test_files_and_names(tmp_path: Path, source: Path) -> None:
    found = _problems(
        f"input=[{tmp_path / 'absent'},{__file__}]", f"output={tmp_path / 'out'}", "curate.tokenizer=no.json",
        "curate.toxicity.words=no.txt", "curate.language.languages=[en,english]",
        "curate.pii.national_ids=[us,atlantis]",
        "curate.pii.phone_region=Germany", "curate.decontaminate.against=absent.jsonl",
    )  # fmt: skip
    for start in (
        f"input={tmp_path / 'absent'}: no such file", f"input={__file__}: unknown kind", "curate.decontaminate.against",
        "curate.tokenizer=no.json: no such file", "curate.toxicity.words=no.txt: no such file",
        "curate.language.languages: 'english'",
        "curate.pii.national_ids: 'atlantis'", "curate.pii.phone_region=Germany",
    ):  # fmt: skip
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == 8 and not (tmp_path / "out").exists()
    (source.parent / "set.warc").write_bytes(b"")
    (problem,) = _problems(f"input={source}", "output=b", f"curate.decontaminate.against={source.parent / 'set.warc'}")
    assert "set.warc: cannot be read here" in problem


def test_references_are_compressed_as_training_reads_them(tmp_path: Path, source: Path) -> None:
    (tmp_path / "set.jsonl.bz2").write_bytes(bz2.compress(ROW.encode()))
    (tmp_path / "good.txt.xz").write_bytes(lzma.compress(b"A reference."))
    words = [*PLAIN, f"input={source}", "output=b", "curate.decontaminate.enabled=true", "curate.quality.enabled=true"]
    named = [
        f"curate.decontaminate.against={tmp_path}/set.jsonl.bz2",
        f"curate.quality.reference={tmp_path}/good.txt.xz",
    ]
    found = find(compose_curation([*words, *named]))
    assert found.evaluations == [f"{tmp_path}/set.jsonl.bz2"] and found.references == [f"{tmp_path}/good.txt.xz"]


def test_an_output_directory_of_something_else(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    words = [*PLAIN, f"input={source}", f"output={output}"]
    assert curate(compose_curation(words), lambda _: None) == output / "report.md"
    state = (output / "curation.json").read_text()
    (problem,) = _problems(*words, "curate.exact.enabled=false", "curate.max_document_megabytes=3")
    assert "holds the curation of another configuration" in problem
    assert "curate.max_document_megabytes: 16.0 there, 3.0 here" in problem and "curate.exact.enabled" in problem
    source.write_text(ROW * 2)
    (problem,) = _problems(*words)
    assert f"{source}: changed" in problem and (output / "curation.json").read_text() == state
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (problem,) = _problems(*PLAIN, f"input={source}", f"output={tmp_path / 'mine'}")
    assert "holds thesis.txt of no curation" in problem
    (problem,) = _problems(*PLAIN, f"input={source}", f"output={tmp_path}")
    assert "lies in output" in problem


def test_a_check_prints_the_plan_and_writes_nothing(tmp_path: Path, source: Path) -> None:
    lines = plan(compose_curation(["curate=web", f"input={source}", f"output={tmp_path / 'out'}"]))
    assert lines[0] == "1 files, 0.0 MB, 1 shards" and not (tmp_path / "out").exists()
    assert lines[1].startswith("00-rules: read, url, language, repetition, gopher, c4, fineweb, toxicity, ")
    assert any("find-pairs: pairs, 1 tasks" in line for line in lines)


def test_input_without_a_document(tmp_path: Path) -> None:
    """Every step of the web, on an empty file and on rows without text: a report of nothing kept."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jsonl").write_text("")
    (tmp_path / "in" / "1.jsonl").write_text('{"no": 1}\n' * 3)
    words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "tasks=1", "curate.shard_megabytes=0.00001"]
    report = curate(compose_curation(words), lambda _: None).read_text()
    assert "0 documents were read from 2 files, 0 are kept" in report and "1.jsonl:3: field 'text' is missing" in report
    assert len(list((tmp_path / "out" / "documents").iterdir())) == 4  # a shard for each line, one for no line


def test_the_tool_lists_keys_and_numbers_problems(tool) -> None:
    shown = tool("--help").stdout
    assert "curate   duplicates web" in shown and "curate.near.min_similarity=0.6" in shown and "--check" in shown
    done = tool("tasks=1", "curate.no=1", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: curate.no=1: unknown key; did you")


def test_every_key_changes_what_is_done(tmp_path: Path, source: Path) -> None:
    """Keys are read by code: none of them is named in its dataclass alone."""
    from scale_llm.config.curate_compose import TREE

    package = Path(__file__).resolve().parents[2] / "scale_llm" / "curate"
    code = "\n".join(path.read_text() for path in package.glob("*.py"))
    unread = [key for key in TREE.keys if not key.startswith("cluster.") and f".{key.rsplit('.', 1)[-1]}" not in code]
    assert unread == []
