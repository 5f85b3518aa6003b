"""Every planted fault is found, clean documents stay, and the report says so."""

import json
import re
from collections import Counter
from pathlib import Path

from curate.conftest import documents, removed
from support import planted

from scale_llm.curate.pii import is_card
from scale_llm.curate.words import WORDS


def _report(output: Path) -> dict:
    return json.loads((output / "report.json").read_text())


def _kinds(output: Path) -> dict[str, list[str]]:
    """The report's table of recall and precision: kind -> cells."""
    table = (output / "report.md").read_text().split("## Recall and precision by kind")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([a-z0-9.]+) \| (\d.*) \|$", table, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_every_planted_fault_is_found(curated: Path) -> None:
    """By its own step where all of the kind were planted; by some step where documents had it themselves, and of
    letters in disorder, which the language step may have told as no language."""
    kinds = _kinds(curated)
    planted_kinds = {
        "exact", "near", "decontaminate", "pii.card", "pii.ip", "pii.id", "c4.policy", "c4.javascript", "sentences",
        "language", "toxicity", "url",
    }  # fmt: skip
    assert planted_kinds | {"quality", "repetition", "pii.email", "pii.phone", "gopher"} == set(kinds)
    for name in planted_kinds:
        assert kinds[name][2] == "100%", (name, kinds[name])
    for name in ("quality", "repetition", "pii.email", "pii.phone"):
        assert kinds[name][0] == kinds[name][3], (name, kinds[name])


def test_precision(curated: Path) -> None:
    """What copies, masks and lists act on is what was planted; rules on quality also meet faults nobody planted."""
    kinds = _kinds(curated)
    sure = (
        "exact",
        "near",
        "decontaminate",
        "pii.card",
        "pii.ip",
        "pii.id",
        "pii.email",
        "c4.policy",
        "toxicity",
        "url",
    )
    assert [kinds[name][4] for name in sure] == ["100%"] * len(sure)
    assert all(int(kinds[name][4].rstrip("%")) >= 65 for name in kinds), kinds


def test_clean_documents_stay(curated: Path) -> None:
    kept = re.search(r"Of (\d+) clean documents (\d+) are kept", (curated / "report.md").read_text())
    assert kept and int(kept[1]) > 150 and int(kept[2]) / int(kept[1]) > 0.95


def test_every_document_is_accounted_for(curated: Path, web: list[str]) -> None:
    """Each line of the input is in documents/ or in removed/, once; counts of the report are those of the files."""
    source = Path(web[1].removeprefix("input="))
    lines = {(str(file), n) for file in source.iterdir() for n, _ in enumerate(file.open(), start=1)}
    kept = [(row["source"]["file"], row["source"]["line"]) for row in documents(curated)]
    gone = removed(curated)
    assert Counter([*kept, *((row["file"], row["line"]) for row in gone)]) == Counter(lines)
    report = _report(curated)
    assert report["documents_in"] == len(lines) and report["documents_out"] == len(kept)
    assert Counter(row["step"] for row in gone) == Counter(
        {name: sum(step["removed"].values()) for name, step in report["steps"].items() if step["removed"]}
    )
    tokens = sum(len(WORDS.word_tokenize(row["text"])) for row in documents(curated))
    assert tokens == report["steps"]["pii"]["tokens_out"]


def test_personal_data_is_masked_and_the_rest_is_not(curated: Path) -> None:
    by_fault = {}
    for row in documents(curated):
        by_fault.setdefault(str(row["fault"]), []).append(row["text"])
    assert all("<EMAIL>" in text and "@mail.example" not in text for text in by_fault["pii.email"][-12:])
    assert all("<CARD>" in text and not any(card in text for card in planted.CARDS) for text in by_fault["pii.card"])
    assert all("<IP>" in text for text in by_fault["pii.ip"]) and all("<ID>" in text for text in by_fault["pii.id"])
    shown = (curated / "report.md").read_text().split("**pii: email**")[1].split("## Languages")[0]
    assert "<EMAIL>" in shown and "<CARD>" in shown and "mail.example" not in shown and planted.CARDS[0] not in shown
    assert all(is_card(card) for card in planted.CARDS) and not is_card("4111 1111 1111 1112")


def test_boilerplate_is_cut_out_and_one_footer_stays(curated: Path) -> None:
    texts = "\n".join(row["text"] for row in documents(curated))
    assert not any(line in texts for _, line in planted.BOILERPLATE)
    assert texts.count(planted.FOOTER[:60]) == 1


def test_report_shows_pictures_examples_and_clusters(curated: Path) -> None:
    html, markdown = ((curated / name).read_text() for name in ("report.html", "report.md"))
    assert (curated / "report.png").read_bytes().startswith(b"\x89PNG") and "data:image/png;base64," in html
    for text in (html, markdown):
        assert "became" in text and "near copy" in text and "2 documents:" in text and "dup_line_frac" in text
    assert (
        "<script" not in html and "| de |" in markdown and _report(curated)["found"]["clusters"]["sizes"] == {"2": 12}
    )
