#!/usr/bin/env python3
"""A chat with a checkpoint: a run's checkpoints directory, or a Hugging Face directory.

  python tools/chat.py runs/demo/sft/checkpoints
  python tools/chat.py runs/demo/sft/checkpoints --temperature 0 --prompt "What does os.path.join do?"
  echo "What does os.path.join do?" | python tools/chat.py runs/demo/sft/checkpoints
  python tools/chat.py ~/models/Llama-3.2-1B --system "Be brief." --top-p 0.95 parallel.tensor_model_parallel_size=2

The conversation is written by the tokenizer's chat template. With --prompt, or where standard input is no terminal,
the model answers once. Keys at the end are those of scale-llm: layouts (their ranks are started on this machine),
precision=, model.seq_length= (by default the checkpoint's, at most 4096), tokenizer.chat_template=, ...
"""

import argparse
import ast
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scale_llm.config.errors import UserError, numbered  # noqa: E402

if TYPE_CHECKING:
    from scale_llm.config.run import RunConfig
    from scale_llm.stages.chat import Answer, ChatModel

SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "max_new_tokens": int, "seed": int}
"""What /set takes, and `stop`."""

MORE_ROOM = "/undo takes back the last question and answer, /reset begins anew"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("checkpoint", metavar="CHECKPOINTS", help="of a run, or a Hugging Face directory")
    made.add_argument("--prompt", metavar="TEXT", help="answer this once, and end")
    made.add_argument("--system", metavar="TEXT", help="what the system says before the conversation")
    made.add_argument("--temperature", type=float, help="0: the likeliest token always (default: 1)")
    made.add_argument("--top-k", type=int, help="of so many likeliest tokens only; 0: of all (default)")
    made.add_argument("--top-p", type=float, help="of the fewest likeliest tokens that reach this sum (default: 1)")
    made.add_argument("--max-new-tokens", type=int, help="of an answer (default: 256)")
    made.add_argument("--seed", type=int, help="equal seeds give equal conversations (default: by the clock)")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer; repeat")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="of scale-llm")
    return made


def words_of(arguments: argparse.Namespace) -> list[str]:
    """The options as keys of scale-llm."""
    values = {f"stage.{name}": getattr(arguments, name) for name in SETTINGS if name != "seed"}
    values["train.seed"] = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    words = [f"{key}={value}" for key, value in values.items() if value is not None]
    return [*words, *arguments.overrides]


class Session:
    """What has been said, how answers are drawn, and the commands that change either."""

    def __init__(self, model: "ChatModel", cfg: "RunConfig", system: str | None):
        self._model, self._settings, self._seed = model, cfg.stage, cfg.train.seed
        self._said: list[dict[str, str]] = []
        self._system: list[dict[str, str]] = []
        self._asked = 0  # so that an answer that is asked for again is another
        if system:
            self.set_system(system)

    def say(self, text: str, on_text: Callable[[str], None], stopped: Callable[[], bool]) -> "Answer":
        """The answer to `text`; both are kept, unless it is an error or nothing was said."""
        from scale_llm.stages.generate import seed_of

        asked = [*self._said, {"role": "user", "content": text}]
        seed = seed_of(self._seed, self._asked, 0)
        answer = self._model.answer([*self._system, *asked], self._settings, seed, on_text, stopped)
        self._asked += 1
        if answer.text.strip():
            self._said = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def command(self, line: str) -> str:
        """Obeys a line that begins with a slash; returns what there is to say."""
        name, _, rest = line[1:].partition(" ")
        commands = {
            "reset": self.reset, "undo": self.undo, "system": self.set_system, "set": self.set, "help": self.help,
        }  # fmt: skip
        if name not in commands:
            raise UserError(f"/{name}: no such command; /help shows those there are")
        return commands[name](rest.strip())

    def reset(self, _: str = "") -> str:
        self._said, self._asked = [], 0
        return "begun anew"

    def undo(self, _: str = "") -> str:
        taken, self._said = self._said[-2:], self._said[:-2]
        return f"taken back: {taken[0]['content']}" if taken else "nothing has been said yet"

    def set_system(self, text: str) -> str:
        system = [{"role": "system", "content": text}] if text else []
        self._model.prompt([*system, {"role": "user", "content": "Yes?"}])  # templates may refuse it
        self._system = system
        return "the system says so from now on" if text else "the system says nothing"

    def set(self, text: str) -> str:
        key, equals, value = text.partition("=")
        key, value = key.strip().replace("-", "_"), value.strip()
        if equals:
            self._change(key, value)
        elif key:
            raise UserError(f"/set {text}: give key=value, such as /set temperature=0.7")
        values = {name: getattr(self._settings, name, self._seed) for name in SETTINGS}
        return " ".join(f"{name}={value}" for name, value in {**values, "stop": self._settings.stop_strings}.items())

    def _change(self, key: str, value: str) -> None:
        from scale_llm.stages.generate import params_of

        if key == "stop":
            self._settings.stop_strings = [*self._settings.stop_strings, _text(value)] if value else []
            return
        if key not in SETTINGS:
            raise UserError(f"/set {key}={value}: no such setting; one of {', '.join([*SETTINGS, 'stop'])}")
        try:
            number = SETTINGS[key](value)
        except ValueError:
            raise UserError(f"/set {key}={value}: not a number; give one, such as /set {key}=1") from None
        if key == "seed":
            self._seed, self._asked = number, 0
            return
        before = getattr(self._settings, key)
        setattr(self._settings, key, number)
        if problems := params_of(self._settings, ()).problems():
            setattr(self._settings, key, before)
            raise UserError(problems)

    def help(self, _: str = "") -> str:
        return (
            "/reset            begin anew\n"
            "/undo             take back the last question and its answer\n"
            "/system TEXT      what the system says; without TEXT nothing\n"
            f"/set key=value    {', '.join(SETTINGS)}, stop (adds a text that ends answers; stop= removes all)\n"
            "/exit             leave, as Ctrl-D does\n"
            "Ctrl-C stops an answer. A line that ends with \\ goes on in the next."
        )


def _text(value: str) -> str:
    r"""The text in quotes, where it has them: '\n' is a line's end."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        with contextlib.suppress(ValueError, SyntaxError):
            return str(ast.literal_eval(value))
    return value


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop, and a second one does at once."""
    asked: list[int] = []

    def remember(number, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(session: Session) -> None:
    """Reads and answers until /exit or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys in input()

    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        except EOFError:
            print()
            return
        if line in ("/exit", "/quit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                print(session.command(line))
            else:
                answer_aloud(session, line)
        except UserError as error:
            print("\n".join(error.problems))


def read() -> str:
    """One message; lines that end with a backslash go on."""
    line = input("> ")
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input('. ')}"
    return line.strip()


def answer_aloud(session: Session, text: str) -> None:
    """Shows the answer as it comes, and why it ended where it did not by itself."""
    from scale_llm.stages.chat import NoRoom

    with interruptible() as stopped:
        try:
            answer = session.say(checked(text), write, stopped)
        except NoRoom as error:
            raise UserError([*error.problems, f"({MORE_ROOM})"]) from None
        why = ""
        if stopped():
            why = " (stopped)"
        elif answer.full:
            why = f" (the sequence is full: {MORE_ROOM})"
        elif not answer.finished:
            why = f" (cut off after {answer.tokens} tokens: /set max_new_tokens={2 * answer.tokens} for longer answers)"
        elif not answer.text.strip():
            why = "(nothing)"
    print(why)


def checked(text: str) -> str:
    from scale_llm.data.rows import encodable

    if not encodable(text):
        raise UserError("this is no UTF-8 text; type or paste it again, or convert the file")
    return text


def answer_once(session: Session, text: str) -> None:
    session.say(checked(text), write, lambda: False)
    print()


def run(arguments: argparse.Namespace) -> None:
    from scale_llm.launch.chat import chat_config, chat_model

    cfg = chat_config(arguments.checkpoint, words_of(arguments))
    cfg.stage.stop_strings += arguments.stop
    once = arguments.prompt
    if once is None and not sys.stdin.isatty():
        once = sys.stdin.read().strip()
    if once is not None and not once:
        raise UserError("the prompt is empty; give --prompt TEXT, or a text on standard input")
    with chat_model(cfg) as model:
        session = Session(model, cfg, arguments.system)
        if once is not None:
            answer_once(session, once)
            return
        ranks = f" on {os.environ['WORLD_SIZE']} ranks" if os.environ["WORLD_SIZE"] != "1" else ""
        print(f"{cfg.checkpoint.load}{ranks}, {cfg.model.seq_length} tokens of conversation; /help shows the commands")
        talk(session)


def main() -> None:
    arguments = parser().parse_intermixed_args()
    try:
        run(arguments)
    except UserError as error:
        print(numbered(error.problems), file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone
        sys.exit(1)


if __name__ == "__main__":
    main()
