"""1 for Python code that passes the tests of its row, which are run in a sandbox (see `sandbox` for what it keeps out).

Reads the ground truths of MBPP and HumanEval (asserts) and of APPS-like problems (inputs and outputs).
"""

import ast
import json
import re
import textwrap
import time
from dataclasses import replace
from typing import Any

from scale_llm.rewards.sandbox import Limits, run_program, run_tests

FENCED = re.compile(r"^[ \t]*```[ \t]*(?P<language>[\w+.-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.S | re.M)
PYTHON = ("python", "python3", "py")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Any = None,
    *,
    limits: Limits | None = None,
    partial_credit: bool = False,
) -> float:
    """1.0 where all tests pass, otherwise 0.0, or (partial_credit) the share of tests that pass.

    Args:
        solution_str: what is run is the last block fenced as ```python; else the last fenced block without a language;
            else all of it.
        ground_truth: statements, where each assert ends a test; or a list of tests, each of them statements; or
            {"inputs": [...], "outputs": [...]}: what the code, as a program, reads and must print, white space at ends
            of lines aside. Each may be written as JSON.
        limits: of all tests of the answer together.

    Raises:
        ValueError: the ground truth holds no tests, or they are no Python.
        SandboxError: answers cannot be confined here.
    """
    limits = limits or Limits()
    code, tests = code_of(solution_str), _from_json(ground_truth)
    if isinstance(tests, dict):
        passed = _programs(code, *_pairs(tests), limits, stop_early=not partial_credit)
    else:
        passed = run_tests(code, split_tests(tests), limits)
    return sum(passed) / len(passed) if partial_credit else float(all(passed))


compute_score.concurrent = True  # type: ignore[attr-defined]  # it waits for processes and keeps no state


def code_of(answer: str) -> str:
    """The code in an answer. A fence that is not closed ends with the answer."""
    blocks = list(FENCED.finditer(answer))
    for languages in (PYTHON, ("",)):
        chosen = [block["code"] for block in blocks if block["language"].lower() in languages]
        if chosen:
            return textwrap.dedent(chosen[-1])
    return answer


def split_tests(tests: Any) -> list[str]:
    """One text for each test. Of a text, each top-level assert ends a test, and what comes after the last assert is a
    test of its own; the statements before an assert belong to it, and later tests see what they define.

    Raises:
        ValueError: no tests, or no Python.
    """
    if isinstance(tests, str):
        found = _by_asserts(tests)
    elif isinstance(tests, list | tuple) and all(isinstance(test, str) for test in tests):
        for test in tests:
            _parsed(test)
        found = [test for test in tests if test.strip()]
    else:
        raise ValueError(f"ground truth is {type(tests).__name__}; python_tests needs asserts, or inputs and outputs")
    if not found:
        raise ValueError("ground truth holds no tests; give asserts, or inputs and outputs")
    return found


def _by_asserts(text: str) -> list[str]:
    found: list[str] = []
    statements: list[str] = []
    for statement in _parsed(text).body:
        statements.append(ast.unparse(statement))
        if isinstance(statement, ast.Assert):
            found.append("\n".join(statements))
            statements = []
    return [*found, "\n".join(statements)] if statements else found


def _parsed(test: str) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(test))
    except SyntaxError as error:
        raise ValueError(f"ground truth is no Python (line {error.lineno}: {error.msg}); correct the row") from None


def _from_json(ground_truth: Any) -> Any:
    if isinstance(ground_truth, str) and ground_truth.lstrip().startswith(("{", "[")):
        try:
            return json.loads(ground_truth)
        except ValueError:  # statements may begin like that too
            return ground_truth
    return ground_truth


def _pairs(tests: dict[str, Any]) -> tuple[list[str], list[str]]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        raise ValueError("ground truth needs lists of the same length in inputs and outputs")
    if not inputs:
        raise ValueError("ground truth holds no tests; inputs is empty")
    if tests.get("fn_name"):
        raise ValueError(f"ground truth calls a function ({tests['fn_name']}); write its tests as asserts")
    return [str(text) for text in inputs], [str(text) for text in outputs]


def _programs(code: str, inputs: list[str], outputs: list[str], limits: Limits, *, stop_early: bool) -> list[bool]:
    deadline = time.monotonic() + limits.timeout_seconds
    passed: list[bool] = []
    for stdin, expected in zip(inputs, outputs, strict=True):
        left = deadline - time.monotonic()
        if left <= 0 or (stop_early and not all(passed)):
            return passed + [False] * (len(inputs) - len(passed))
        printed = run_program(code, stdin, replace(limits, timeout_seconds=left))
        passed.append(printed is not None and _lines(printed) == _lines(expected))
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
