"""From `reward.function` to functions that can be called.

Users' files are imported here: by the launcher, so that faults show before ranks start, and by each rank.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from scale_llm.config.errors import UserError
from scale_llm.config.reward import SHIPPED, RewardFunctionConfig, weighted_functions
from scale_llm.config.validate_reward import is_file, name_problems, reward_problems
from scale_llm.rewards.sandbox import Limits, SandboxError, isolation

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Every function is called with these as keywords, as verl does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardFunction:
    name: str
    """In metrics: gsm8k, or file.function or module.function of the user's own."""
    weight: float
    call: Callable[..., Any]
    concurrent: bool
    """May be called by several threads at once: it has an attribute `concurrent` that says so."""


def load_functions(reward: RewardFunctionConfig) -> list[RewardFunction]:
    """The functions of a reward group with their options, in order.

    Raises:
        UserError: with the problems of the group, or else of all functions that cannot be had.
    """
    if problems := reward_problems(reward):
        raise UserError(problems)
    found: list[RewardFunction] = []
    for weight, spec in weighted_functions(reward.function):
        try:
            call = load_function(spec, reward)
        except UserError as error:
            problems += error.problems
            continue
        inner = call.func if isinstance(call, functools.partial) else call
        name = _metric_name(spec, {function.name for function in found})
        concurrent = bool(getattr(inner, "concurrent", False))
        found.append(RewardFunction(name=name, weight=weight, call=call, concurrent=concurrent))
    if problems:
        raise UserError(problems)
    return found


def load_function(spec: str, reward: RewardFunctionConfig | None = None) -> Callable[..., Any]:
    """One function: a shipped name, path/to/file.py:name or package.module:name. Imports the user's code.

    Args:
        reward: options of shipped functions; None: the defaults.

    Raises:
        UserError: there is no such function, it does not take what it is given, its file cannot be imported (with the
            file and line of the fault), or python_tests cannot confine answers on this machine.
    """
    if problems := name_problems(spec):
        raise UserError(problems)
    if spec in SHIPPED:
        return _shipped(spec, reward or RewardFunctionConfig(function=spec))
    target, _, attribute = spec.rpartition(":")
    module, where = _file(spec, target) if is_file(target) else _module(spec, target)
    if not hasattr(module, attribute):
        raise UserError(f"reward.function={spec}: {where} defines no {attribute}; it defines {_defined(module)}")
    function = getattr(module, attribute)
    if fault := _fault(function):
        raise UserError(
            f"reward.function={spec}: {attribute} in {where} {fault}; write it as "
            f"def {attribute}({', '.join(ARGUMENTS[:3])}, extra_info=None) -> float"
        )
    return function


def _shipped(name: str, reward: RewardFunctionConfig) -> Callable[..., Any]:
    function = importlib.import_module(f"scale_llm.rewards.{name}").compute_score
    if name == "gsm8k":
        return functools.partial(function, flexible=reward.gsm8k_flexible)
    if name == "regex":
        return functools.partial(function, pattern=re.compile(reward.regex_pattern or ""))
    if name == "length":
        return functools.partial(function, target_tokens=reward.length_target_tokens)
    if name == "python_tests":
        try:
            isolation()
        except SandboxError as error:
            raise UserError(
                f"reward.function=python_tests: {error}; run on Linux (x86_64 or aarch64) with seccomp, or take "
                "another function"
            ) from None
        limits = Limits(timeout_seconds=reward.timeout_seconds, memory_megabytes=reward.memory_megabytes)
        return functools.partial(function, limits=limits, partial_credit=reward.partial_credit)
    return function


def _file(spec: str, target: str) -> tuple[ModuleType, str]:
    """The module of a file. Two functions of one unchanged file share it."""
    path = os.path.abspath(os.path.expanduser(target))
    if not os.path.isfile(path):
        directory = os.path.dirname(path)
        there = "" if os.path.isdir(directory) else f" (nor a directory {directory})"
        raise UserError(f"reward.function={spec}: no file {path}{there}; correct the path before the colon")
    stem = os.path.splitext(os.path.basename(path))[0]
    state = os.stat(path)
    key = hashlib.sha256(f"{path} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:12]
    name = f"scale_llm_reward_{key}_{stem}"
    if name not in sys.modules:
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))  # last: its neighbours may be imported, and hide nothing
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None and found.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look there
        try:
            found.loader.exec_module(module)
        except BaseException as error:  # sys.exit at the top of a script
            del sys.modules[name]
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"reward.function={spec}: {path} cannot be imported: {_fault_of_import(error)}") from error
    return sys.modules[name], path


def _module(spec: str, target: str) -> tuple[ModuleType, str]:
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise UserError(_unimportable(spec, target, error)) from error
        searched = ", ".join(entry or os.getcwd() for entry in sys.path)
        raise UserError(
            f"reward.function={spec}: no module {error.name}; looked in {searched}; install it, add its directory to "
            "PYTHONPATH, or give path/to/file.py:name"
        ) from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(_unimportable(spec, target, error)) from error
    return module, f"{target} ({getattr(module, '__file__', None) or 'no file'})"


def _unimportable(spec: str, target: str, error: BaseException) -> str:
    return f"reward.function={spec}: {target} cannot be imported: {_fault_of_import(error)}"


def _fault_of_import(error: BaseException) -> str:
    """File and line of what went wrong, and the remedy."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}; correct that line"
    return f"{described(error)}; correct that line, or install what it needs"


def described(error: BaseException) -> str:
    """file:line: type: message, of the place that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"{place}{type(error).__name__}: {error}"


def _defined(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(sorted(names)) or "no function"


def _fault(function: Any) -> str | None:
    if not callable(function) or isinstance(function, type):
        return f"is a {type(function).__name__}, no function"
    if inspect.iscoroutinefunction(function):
        return "is asynchronous, which is not supported"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions do not tell
        return None
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        return f"takes {signature}, and is called with the keywords {', '.join(ARGUMENTS)} ({error})"
    return None


def _metric_name(spec: str, taken: set[str]) -> str:
    target, colon, attribute = spec.rpartition(":")
    stem = os.path.basename(target).removesuffix(".py") if is_file(target) else target.rpartition(".")[2]
    name = f"{stem}.{attribute}" if colon else spec
    return next(free for free in [name, *(f"{name}_{n}" for n in range(2, 99))] if free not in taken)
