"""tools/train_tokenizer.py: transformers loads what it writes, and the report counts what it says it counts."""

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from scale_llm.data.fertility import Text, as_markdown, fertility
from scale_llm.data.tokenizer import Tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"
ENGLISH = "The committee has decided that the people of the town should have the right to choose their own mayor. "
GERMAN = "Die Gemeinde hat beschlossen, dass die Bürgerinnen und Bürger ihren Bürgermeister selbst wählen dürfen. "
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("train_tokenizer", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory of two sources, and the words that train on them."""
    top = tmp_path_factory.mktemp("training")
    for name, text in (("en", ENGLISH), ("de", GERMAN)):
        (top / f"{name}.jsonl").write_text("".join(json.dumps({"body": f"{i} {text * 3}"}) + "\n" for i in range(40)))
    (top / "chat.jinja").write_text(TEMPLATE)
    call = ["--input", f"{top}/en.jsonl", f"{top}/de.jsonl", "--json-key", "body", "--vocab-size", "400",
            "--output", f"{top}/made", "--special-tokens", "<|im_start|>", "<|im_end|>",
            "--chat-template", f"{top}/chat.jinja"]  # fmt: skip
    return top, call


@pytest.fixture(scope="module")
def made(tool, words) -> Path:
    top, call = words
    assert tool(call) == 0
    return top / "made"


def test_transformers_loads_it(made: Path):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(str(made)), Tokenizer.load(str(made), "<|endoftext|>")
    text = "Bürger of the 漢字 town 🦊\n  <|im_end|>"
    assert theirs(text.removesuffix("<|im_end|>"))["input_ids"] == ours.encode(text.removesuffix("<|im_end|>"))
    assert ours.decode(ours.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", 0, 400)
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert {"<|im_start|>", "<|im_end|>"} <= set(theirs.all_special_tokens)
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def test_its_report(made: Path):
    """By language and source; what is reported was kept from training."""
    report = json.loads((made / "fertility.json").read_text())
    assert report["all"]["documents"] == 8 and set(report["language"]) == {"en", "de"}
    (english,) = [group for name, group in report["source"].items() if name.endswith("en.jsonl")]
    measures = english["tokenizers"][str(made)]
    assert english["documents"] == 4 and english["words"] == 4 * (1 + 3 * len(ENGLISH.split()))
    assert measures["unknown"] == 0 and 1 < measures["tokens_per_word"] < 3
    assert measures["bytes_per_token"] == pytest.approx(english["bytes"] / measures["tokens"])
    assert "## By language" in (made / "fertility.md").read_text()


def test_again_and_over_something_else(tool, words, made: Path, capsys):
    top, call = words
    before = (made / "tokenizer.json").stat().st_mtime_ns
    assert tool(call) == 0 and (made / "tokenizer.json").stat().st_mtime_ns == before
    assert tool([*call, "--vocab-size", "500"]) != 0
    assert "holds something else already" in capsys.readouterr().err
    assert tool([*call, "--output", f"{top}/small", "--vocab-size", "258"]) != 0
    assert "--vocab-size=258: a byte-level one needs at least 259 tokens, 3 of them special" in capsys.readouterr().err
    assert tool([*call, "--output", f"{top}/twice", "--special-tokens", "<a>", "<a>", "<|endoftext|>"]) != 0
    assert capsys.readouterr().err.count("--special-tokens: '") == 2
    (top / "bad.jinja").write_text("{% if %}")
    assert tool([*call, "--output", f"{top}/bad", "--chat-template", f"{top}/bad.jinja"]) != 0
    assert "bad.jinja: cannot write a question and an answer" in capsys.readouterr().err
    assert not any((top / name).exists() for name in ("small", "twice", "bad"))


def test_given_tokenizers_beside_each_other(tool, words, made: Path, capsys):
    top, _ = words
    call = ["--input", f"{top}/en.jsonl", "--json-key", "body", "--compare", str(made), f"{made}/tokenizer.json"]
    assert tool([*call, "--report", f"{top}/both"]) == 0
    report = json.loads((top / "both.json").read_text())
    one, two = report["all"]["tokenizers"].values()
    assert one == two and len(report["tokenizers"]) == 2
    assert tool(call) != 0 and "--report: missing" in capsys.readouterr().err


def test_words_split_and_unknown():
    """By hand: of `ab`, `don't`, `漢` and `字` two are split and one is unknown; `!` is a token and no word."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(["<u>", *"abdont'!漢", "do", "ab"])}, unk_token="<u>",
                   merges=[("d", "o"), ("a", "b")])
    )  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, -1, "")
    texts = [Text("one", "ab don't!"), Text("two", "ab 漢字")]
    report = fertility(texts, {"x": tokenizer}, lambda text: "zh" if "漢" in text else "en")
    one, two = report["source"]["one"], report["source"]["two"]
    assert (one["words"], two["words"], one["bytes"], two["bytes"]) == (2, 3, 9, 9)
    assert one["tokenizers"]["x"] == {
        "tokens": 6, "tokens_per_word": 3.0, "bytes_per_token": 1.5, "split_words": 0.5, "unknown": 0.0,
    }  # fmt: skip
    assert two["tokenizers"]["x"]["tokens"] == 3 and two["tokenizers"]["x"]["unknown"] == pytest.approx(1 / 3)
    assert two["tokenizers"]["x"]["split_words"] == 0
    assert report["language"]["zh"] == two and report["all"]["tokenizers"]["x"]["tokens"] == 9
    assert "| two | 1 | 3 | 0.00 | x | 1.00 | 3.00 | 0.0% | 33.33% |" in as_markdown(report)
