"""The process that runs one answer: `python -I -S sandbox_child.py OPTIONS`, started by `sandbox`.

It confines itself, says on a pipe which layers are in force, and only then reads and runs the code.
"""

import json
import os
import sys
import types
from pathlib import Path


def main() -> None:
    options = json.loads(sys.argv[1])
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # -I leaves out all but the standard library
    from scale_llm.rewards.confine import confine

    directory = os.getcwd()
    results = options["results"]
    try:
        layers = confine(directory, cpu_seconds=options["cpu_seconds"], memory_bytes=options["memory_bytes"])
    except OSError as error:
        _say(results, json.dumps({"refused": str(error)}))
        os._exit(1)
    os.chdir(directory)  # by its path once more: something may be mounted there now
    _say(results, json.dumps({"layers": layers}))
    sys.path.pop()  # the directory may be that of installed packages
    sys.argv = ["answer.py"]
    with open(options["code"], "rb") as file:
        code = file.read()
    if options["tests"] is None:
        _run_program(code)
    else:
        _run_tests(code, options["tests"], results)


def _say(results: int, line: str) -> None:
    os.write(results, line.encode() + b"\n")


def _module(name: str) -> dict:
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def _run_program(code: bytes) -> None:
    exec(compile(code, "answer.py", "exec"), _module("__main__"))


def _run_tests(code: bytes, tests_pipe: int, results: int) -> None:
    """Runs the code, then asks for the tests and the token, which do not exist here before."""
    namespace = _module("answer")
    exec(compile(code, "answer.py", "exec"), namespace)
    _say(results, "ready")
    with open(tests_pipe, encoding="utf-8") as pipe:
        given = json.load(pipe)
    for number, test in enumerate(given["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), namespace)
        except BaseException:  # SystemExit too
            continue
        _say(results, f"{given['token']} {number}")
    os._exit(0)  # threads and exit handlers of the code are not waited for


if __name__ == "__main__":
    main()
