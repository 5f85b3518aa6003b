"""tools/chat.py as a person uses it: on a terminal, and in a pipe."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import families
from support.ranks import environment
from support.runs import TP2
from support.terminal import CTRL_C, CTRL_D, Terminal

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--temperature", "0", "--max-new-tokens", "12"]
PLACES = ["precision=fp32", "cluster=local_cpu", "cluster.omp_num_threads=1"]


def command(*words) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "chat.py"), *map(str, words), *PLACES]


def once(*words, said: str | None = None, status: int = 0) -> tuple[str, str]:
    """What the tool writes to either stream where standard input is no terminal."""
    done = subprocess.run(command(*words), input=said or "", capture_output=True, text=True, env=environment())
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def generated(runs, base, tmp_path):
    """What stage=generate answers to conversations; the n-th has the seed of the n-th answer of a session."""

    def answers(conversations: list[list[dict]], *more: str) -> list[str]:
        data = tmp_path / "prompts.jsonl"
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
        run = tmp_path / "generate"
        words = ["stage=generate", "model=from_checkpoint", f"checkpoint.load={base}", f"data.path={data}",
                 "stage.max_new_tokens=64", "train.seed=1", "model.seq_length=512"]  # fmt: skip
        assert runs(run, *words, *more) == []
        return [json.loads(line)["generated"] for line in (run / "generations.jsonl").read_text().splitlines()]

    return answers


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.fixture
def session(base):
    """Starts a chat with the base model and reads its first lines."""
    started = []

    def start(seq_length: int) -> Terminal:
        words = [base, "--max-new-tokens", "64", "--seed", "1", f"model.seq_length={seq_length}"]
        started.append(Terminal(command(*words), environment()))
        assert f"{seq_length} tokens of conversation" in started[-1].until("\n> ")
        return started[-1]

    yield start
    for terminal in started:
        terminal.process.kill()


def ask(terminal: Terminal, text: str) -> str:
    """What is shown after a line, up to the next prompt; /set marks its end, as models may write prompts too."""
    terminal.type(f"{text}\n/set\n")
    shown = terminal.until("/set\ntemperature=")
    terminal.until("\n> ")
    return shown.removeprefix(f"{text}\n").removesuffix("> /set\ntemperature=").split(" (cut off after 64 tokens")[0]


def test_a_conversation(session, generated):
    """Answers are those of stage=generate; what has been said before enters, as does the system's text. Ctrl-C stops
    what is being written and keeps what there is. Sampled: the likeliest tokens of so small a model are one letter."""
    terminal = session(4096)
    first = ask(terminal, "Why?")
    second = ask(terminal, "And then?")
    assert ask(terminal, "/undo") == "taken back: And then?\n"
    assert ask(terminal, "/system def main(self): return 0") == "the system says so from now on\n"
    third = ask(terminal, "And then?")
    history = [said("user", "Why?"), said("assistant", first)]
    asked = said("user", "And then?")
    conversations = [history[:1], [*history, asked], [said("system", "def main(self): return 0"), *history, asked]]
    wanted, without = generated(conversations), generated([history[:1], [asked], [*history, asked]])
    assert [first, second, third] == wanted
    assert second != without[1] and third != without[2], "what was said before enters"

    ask(terminal, "/set temperature=0")
    ask(terminal, "/set max_new_tokens=4000")
    terminal.type("Tell me all.\n")
    terminal.until("Tell me all.\n")
    terminal.until("ssss")  # of the answer
    terminal.type(CTRL_C)
    terminal.until(" (stopped)\n> ")
    assert ask(terminal, "/undo") == "taken back: Tell me all.\n", "the part that was written is kept"
    time.sleep(1)  # Python loses one that comes between the prompt's text and the reading of keys
    terminal.type(CTRL_C)
    terminal.until("(/exit or Ctrl-D leaves)\n> ")
    ask(terminal, "/set temperature=1")
    ask(terminal, "/set max_new_tokens=64")
    assert ask(terminal, "/reset") == "begun anew\n" and ask(terminal, "/system") == "the system says nothing\n"
    assert ask(terminal, "Why?") == first, "as at the beginning"
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_mistakes_leave_the_session_as_it_is(session):
    terminal = session(96)
    assert ask(terminal, "/nonsense") == "/nonsense: no such command; /help shows those there are\n"
    assert "top_p=0.0: is a share of probability" in ask(terminal, "/set top_p=0")
    assert ask(terminal, "/set top_p=x") == "/set top_p=x: not a number; give one, such as /set top_p=1\n"
    assert "no such setting; one of temperature, top_k" in ask(terminal, "/set heat=1")
    assert ask(terminal, "/undo") == "nothing has been said yet\n"
    assert "/system TEXT" in ask(terminal, "/help")
    shown = ask(terminal, "Why? " * 30)
    assert "leaves no room for an answer in model.seq_length=96" in shown and "/undo takes back" in shown
    terminal.type("/set stop='a\\nb'\n")
    terminal.until("top_p=1.0 max_new_tokens=64 ")
    terminal.until("stop=['a\\nb']\n> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_one_answer_in_a_pipe_and_on_two_ranks(base, generated):
    (wanted,) = generated([[said("user", "Why?")]], "stage.temperature=0", "stage.max_new_tokens=12")
    assert once(base, *SHORT, "--prompt", "Why?") == (wanted + "\n", "")
    assert once(base.parent, *SHORT, TP2, said="Why?\n") == (wanted + "\n", "")


def test_a_hugging_face_directory_and_its_stop_strings(tmp_path):
    directory = families.save("llama3", tmp_path)
    words = (directory, "--temperature", "0", "--prompt", "Why?", "model.seq_length=96", "--max-new-tokens", "16")
    whole, _ = once(*words)
    part = whole[4:6]
    cut, _ = once(*words, "--stop", part)
    assert cut.rstrip("\n") in whole and part in cut and len(cut) < len(whole)


def test_bad_input_is_said_before_a_model_is_loaded(base, tmp_path):
    def problem(*words, status=1) -> str:
        return once(*words, status=status)[1]

    assert "no such directory; give a run's checkpoints" in problem(tmp_path / "nothing", "--prompt", "x")
    assert "the prompt is empty" in problem(base)
    said = problem(base, "--prompt", "x", "--top-p", "3", "model.head=reward")
    assert "model.head=reward: gives numbers, no text" in said and "stage.top_p=3.0" in said
    assert "data.path" not in said
