"""Instruction pairs that every machine has: docstrings of the running Python's standard library.

A question about each function, method and class, answered by the start of its docstring. For comparisons, that answer
is better than the docstring of another one, a test.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from scale_llm.data.chat.comparison import Comparison
from scale_llm.data.chat.conversation import Conversation
from scale_llm.data.rows import OnBytes

SHORTEST_ANSWER = 40
LONGEST_ANSWER = 400
"""Characters; whole paragraphs up to this."""

FUNCTION_QUESTIONS = (
    "What does {name} do in Python?",
    "Explain the Python function {name}.",
    "What is {name} for?",
    "Describe what {name} does.",
)
CLASS_QUESTIONS = (
    "What is the Python class {name}?",
    "Explain the class {name}.",
    "What is {name} for?",
    "Describe the class {name} of Python's standard library.",
)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def embedded_conversations(files: list[str], on_bytes: OnBytes | None = None) -> Iterator[Conversation]:
    """The pairs of `files` (see corpus.embedded_files), in their order; what was asked or answered before left out."""
    seen: set[str] = set()
    for file in files:
        raw = Path(file).read_bytes()
        if on_bytes:
            on_bytes(len(raw))
        for name, node in _definitions(raw, _module(file)):
            answer = _answer(node)
            if answer is None or name in seen or answer in seen:
                continue
            seen |= {name, answer}
            messages = [{"role": "user", "content": _question(name, node)}, {"role": "assistant", "content": answer}]
            yield Conversation(messages=messages, file=file, line=node.lineno)


def embedded_comparisons(
    files: list[str], on_bytes: OnBytes | None = None, *, unpaired: bool = False
) -> Iterator[Comparison]:
    """Questions about the library with their own answer and, as the worse one, that of one of the library's tests.

    A preference that little text can teach: documentation reads otherwise than a word on a test. No answer occurs
    twice, or a model could tell a held-out pair by what it has learnt of its parts in others. unpaired: with its own
    answer as a desirable one, or with the other as an undesirable one, in turns.
    """
    found = list(embedded_conversations(files, on_bytes))
    others = [each for each in found if _is_test(each.file)]
    library = [each for each in found if not _is_test(each.file)]
    count = min(len(others), len(library))
    asked = [library[place * len(library) // count] for place in range(count)]  # spread over all modules
    for place, own in enumerate(asked):
        question, answer = own.messages
        other = others[place].messages[1]
        answers, label = [[answer], [other]], None
        if unpaired:
            label = place % 2 == 0
            answers = answers[:1] if label else answers[1:]
        yield Comparison(prompt=[question], answers=answers, label=label, file=own.file, line=own.line)


def _module(file: str) -> str:
    """The dotted name under which a file of the library is imported."""
    parts = Path(file).relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _is_test(file: str) -> bool:
    return any(part.startswith(("test", "idle_test")) for part in _module(file).split("."))


def _definitions(raw: bytes, module: str) -> list[tuple[str, Definition]]:
    """(qualified name, node) of everything defined at the top of a file, or in its classes."""
    if b'"""' not in raw and b"'''" not in raw:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings with odd escapes
            tree = ast.parse(raw)
    except (SyntaxError, ValueError):  # the library's tests hold some on purpose
        return []
    return _below(tree, module)


def _below(node: ast.AST, name: str) -> list[tuple[str, Definition]]:
    found: list[tuple[str, Definition]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            below = f"{name}.{child.name}"
            found.append((below, child))
            found += _below(child, below) if isinstance(child, ast.ClassDef) else []
    return found


def _answer(node: Definition) -> str | None:
    """The docstring's first paragraphs."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    answer = ""
    for paragraph in text.split("\n\n"):
        longer = f"{answer}\n\n{paragraph}" if answer else paragraph
        if len(longer) > LONGEST_ANSWER:
            break
        answer = longer
    answer = answer.strip()
    try:
        answer.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return answer if len(answer) >= SHORTEST_ANSWER else None


def _question(name: str, node: Definition) -> str:
    phrasings = CLASS_QUESTIONS if isinstance(node, ast.ClassDef) else FUNCTION_QUESTIONS
    return phrasings[_choice(name, len(phrasings))].format(name=name)


def _choice(text: str, count: int) -> int:
    """One of 0..count - 1, always the same for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % count
