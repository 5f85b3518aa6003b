"""Parts of curation by themselves; fast ways against datatrove's own."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.utils.text import simplify_text
from support import planted

from scale_llm.config.curate import CurateConfig, DecontaminateConfig, NearConfig, PiiConfig
from scale_llm.curate import near
from scale_llm.curate.decontaminate import Decontaminate, Index
from scale_llm.curate.filters import Toxicity, identifier
from scale_llm.curate.ledger import Ledger
from scale_llm.curate.pii import mask
from scale_llm.curate.quality import Model, train
from scale_llm.curate.repetition import Repetition
from scale_llm.curate.simplify import simplify
from scale_llm.curate.sources import Piece, expand, shards_of
from scale_llm.curate.words import WORDS, TokenCounter

STRANGE = [
    "Ａ “Quote” — naïve façade №5, 1,234.5 ２３",
    "\t\n ",
    "日本語とEnglish。次の文！",
    "a\x1cb\x85c\u200bd",
    "İi ǅ ß ﬁ",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real documents, and strange ones."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "c4_web.jsonl"
    if not path.is_file():
        pytest.skip("real data ../shared/data/c4_web.jsonl is not here")
    return [json.loads(line)["text"] for line in path.open()][:150] + STRANGE


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger", removed=None, examples=1, label=None)
    made.begin(0, [])
    return made


def test_fast_ways_are_datatroves_ways(texts: list[str]) -> None:
    slow, fast = GopherRepetitionFilter(language=WORDS), Repetition(language=WORDS)
    documents = [Document(text=text * times, id="") for text in texts for times in (1, 2)]
    verdicts = [fast.filter(document) for document in documents]
    assert verdicts == [slow.filter(document) for document in documents]
    assert len({str(verdict) for verdict in verdicts}) > 5
    assert [simplify(text) for text in texts] == [simplify_text(text) for text in texts]
    sign = near.Sign(Path("unused"), NearConfig())
    for text in texts[-20:]:
        shingles = MinhashDedupSignature.get_shingles(sign, text)
        assert np.array_equal(sign.get_shingles(text), shingles)
        if len(shingles):
            slow_signature = sum(MinhashDedupSignature.get_signature(sign, shingles), [])
            assert near.minima(shingles, *sign.parameters).tolist() == slow_signature
    edges = np.array([[0], [(1 << 61) - 1], [(1 << 64) - 1], [(1 << 61) - 2]], dtype=np.uint64)
    one, zero = np.ones((1, 1), dtype=np.uint64), np.zeros((1, 1), dtype=np.uint64)
    assert [int(near.minima(edge[None], one, zero)[0]) for edge in edges] == [0, 0, 7, (1 << 61) - 2]


def test_words_and_sentences() -> None:
    assert WORDS.word_tokenize("don't stop, e-mail me") == ["don't", "stop,", "e-mail", "me"]
    assert WORDS.word_tokenize("GPU は速い。") == ["GPU", "は", "速", "い", "。"]
    text = 'He left. "Why?" she asked!\nNo end… "Yes." 好。再见'
    assert WORDS.sent_tokenize(text) == ["He left.", '"Why?"', "she asked!", "No end…", '"Yes."', "好。", "再见"]
    assert "".join(text[begin:end] for begin, end in WORDS.span_tokenize(text)) == text
    assert TokenCounter(None)("three words here") == 3


def test_shards_depend_on_sizes_alone_and_know_their_lines(tmp_path: Path) -> None:
    sizes = {"a": 300, "b": 0, "c": 4000, "d": 10, "e": 2500}
    for name, size in sizes.items():
        rows, line = [], 1
        while sum(map(len, rows)) < size:
            rows.append(f'{{"text": "{line}"}}\n')
            line += 1
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    files, problems = expand(str(tmp_path), "input")
    shards = shards_of(files, 0.001)
    assert not problems and [Path(piece.file).stem for shard in shards for piece in shard] == list("abccccdeee")
    assert shards[0] == [Piece(files[0]), Piece(files[1])]
    assert len(shards_of(files, 1e308)) == 1
    for shard in shards:
        for piece in shard:
            content = Path(piece.file).read_bytes()[piece.start : piece.end]
            if piece.end is not None:
                assert json.loads(content.splitlines()[0])["text"] == str(piece.line) and content.endswith(b"\n")
    pieces = [piece for shard in shards for piece in shard if piece.file == files[2]]
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]


def test_languages() -> None:
    told = [identifier().classify(text)[0] for text in planted.FOREIGN]
    assert told == ["de", "fr", "es", "it", "nl", "ru"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail a.b+c@d-e.co.uk, not @handle or a@b.", "Mail <EMAIL>, not @handle or a@b."),
        ("Card 4111-1111-1111-1111, 378282246310005.", "Card <CARD>, <CARD>."),
        ("No card: 4111-1111-1111-1112, ISBN 9780306406157, 0000 0000 0000 0000.", None),
        ("SSN 219-09-9940, CPF 390.533.447-05, DNI 54362315K.", "SSN <ID>, CPF <ID>, DNI <ID>."),
        ("Not 000-12-3456, 390.533.447-06 or 54362315Z.", None),
        ("At 8.8.8.8 and 2001:4860:4860::8888.", "At <IP> and <IP>."),
        ("At 192.168.0.1, 127.0.0.1, version 1.2.3, 10:30:59, 999.1.1.1 and fe80::1.", None),
        ("Call +49 30 901820 or (650) 253-0000 now.", "Call <PHONE> or <PHONE> now."),
        ("In 1999-2004 we sold 1,250,000 for $3,400.50 on 2024-05-01.", None),
    ],
)
def test_personal_data(text: str, expected: str | None) -> None:
    assert mask(text, PiiConfig())[0] == (expected or text)
    nothing = PiiConfig(email=False, phone=False, ip=False, card=False, national_ids=[])
    assert mask(text, nothing) == (text, [])


def test_toxicity_counts_words_and_phrases(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "words").write_text("blargh\nvery rude\n")
    cfg = CurateConfig()
    cfg.toxicity.words, cfg.toxicity.max_share, cfg.toxicity.min_words = str(tmp_path / "words"), 0.2, 3
    step = Toxicity(cfg, ledger, TokenCounter(None))
    step.prepare(0)

    def judged(text: str):
        return step.judge(Document(text=text, id=""), 0)

    assert judged("Blargh! blargh? BLARGH, he said to us all day") == (False, "words of the list")
    assert judged("blargh very RUDE people") == (False, "words of the list")
    assert judged("blargh blargh you") is True and judged("very kind, not rude, blarghs blarghs blarghs") is True


def test_contamination_by_runs_of_words(tmp_path: Path, ledger: Ledger) -> None:
    """Runs of n_grams words; texts between shortest and n_grams words whole; shorter ones are counted and let be."""
    question = "If a train leaves Oslo at 9 with 40 people, how many arrive in Bergen at 4 o'clock?"
    short, tiny = "Which planet has the most moons of all?", "What is 2+2?"
    rows = [{"question": question, "choices": [short, tiny]}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg, path = DecontaminateConfig(n_grams=10, shortest=8), tmp_path / "index"
    Index([str(tmp_path / "set.jsonl")], cfg, path).run()
    assert json.loads((path / "index.json").read_text())["counts"] == {"in all": 3, "too short to look for": 1}
    step = Decontaminate(path, ledger, TokenCounter(None))
    step.prepare(0)

    def judged(text: str):
        return step.judge(Document(text=text, id=""), 0)

    found = (False, "text of set.jsonl")
    assert judged("So: IF A TRAIN leaves Oslo, at 7 with 33 people -- how many then?") == found  # numbers do not count
    assert judged("You ask: which planet has the most moons, of all?") == found
    assert judged("If a train leaves Oslo with forty people, how many arrive? What is 2+2?") is True


def test_perplexity_tells_noise_from_text_that_the_model_has_not_seen(texts: list[str]) -> None:
    models, median = train(texts[:100])
    assert 3 < median < 12
    noise = planted.scrambled(texts[120], random.Random(1))
    assert models[0].perplexity(noise) > 2.0 * models[0].perplexity(texts[120])
    assert models[0].perplexity("") == float("inf") and train([])[1] is None
    uniform = Model.empty()
    assert uniform.perplexity("anything at all") == pytest.approx(256)


def test_near_copies_are_estimated_by_their_shingles(texts: list[str], tmp_path: Path) -> None:
    """The share of equal hashes is the Jaccard similarity of the sets of shingles, within its standard error."""
    sign = near.Sign(tmp_path, NearConfig(buckets=100, hashes_per_bucket=10))
    for share in (0.02, 0.05, 0.2):
        text = texts[3]
        sets = [sign.get_shingles(version) for version in (text, planted.changed(text, random.Random(2), share))]
        a, b = (set(part.ravel().tolist()) for part in sets)
        jaccard = len(a & b) / len(a | b)
        equal = np.mean(
            np.array(MinhashDedupSignature.get_signature(sign, sets[0]))
            == np.array(MinhashDedupSignature.get_signature(sign, sets[1]))
        )
        assert abs(equal - jaccard) < 4 * (jaccard * (1 - jaccard) / 1000) ** 0.5
