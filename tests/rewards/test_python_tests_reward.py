"""Answers that are programs: what passes, and what the sandbox keeps in."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scale_llm.config.errors import UserError
from scale_llm.config.reward import RewardFunctionConfig
from scale_llm.rewards import loading, sandbox, system_calls
from scale_llm.rewards.python_tests import code_of, compute_score, split_tests
from scale_llm.rewards.sandbox import CHILD, Limits, SandboxError, isolation, run_program, run_tests
from scale_llm.rewards.scoring import Item, Rewards

try:
    LAYERS = isolation()
except SandboxError as error:
    pytest.skip(f"no sandbox on this machine: {error}", allow_module_level=True)

QUICK = Limits(timeout_seconds=20.0, memory_megabytes=256)
"""Far more than any of these needs, for a machine that is busy with other tests."""
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"


def score(answer, tests=TESTS, limits=QUICK, **options):
    return compute_score("", answer, tests, limits=limits, **options)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """After every test of this file: no directory, no process."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("answer-*"))
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        assert os.fsencode(CHILD) not in words or parent not in (1, os.getpid()), words


# Reading answers and tests


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\n```\n```text\n2\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```text\nout\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```\nout\n```", "x = 1\n"),
        ("1. so:\n   ```Python title=a\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("cut off\n```python\nx = 1\n", "x = 1\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
    ],
)
def test_the_code_of_an_answer(answer, code):
    assert code_of(answer) == code


def test_the_tests_of_a_row():
    assert split_tests("import math\nassert f(1)\n\nx = 2\nassert f(x)") == [
        "import math\nassert f(1)",
        "x = 2\nassert f(x)",
    ]
    check = "def check(f):\n    assert f(1) == 1\ncheck(add)"
    assert split_tests(check) == [check], "HumanEval's tests are one"
    assert split_tests(["assert 1", "", "assert 2"]) == ["assert 1", "assert 2"]
    for nothing in ("", [], ["", " "], "# only a comment"):
        with pytest.raises(ValueError, match="no tests"):
            split_tests(nothing)
    for wrong in ("assert f(", ["assert f("]):
        with pytest.raises(ValueError, match="no Python"):
            split_tests(wrong)
    with pytest.raises(ValueError, match="int"):
        split_tests(3)


# What passes


@pytest.mark.parametrize("tests", [TESTS, TESTS.splitlines(), json.dumps(TESTS.splitlines())])
def test_asserts(tests):
    assert score(f"So:\n```python\n{RIGHT}```", tests) == 1.0
    assert score("def add(a, b):\n    return 3", tests) == 0.0
    assert score("def add(a, b):\n    return 3", tests, partial_credit=True) == 0.5
    assert score("no code at all", tests, partial_credit=True) == 0.0


def test_humaneval_style():
    tests = "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)\n"
    assert score(RIGHT, tests) == 1.0
    assert score(RIGHT.replace("+", "-"), tests) == 0.0


def test_code_under_main_and_dataclasses_and_the_standard_library():
    code = (
        "import collections, dataclasses, heapq, re, threading\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int = 1\n"
        "done = []\nthread = threading.Thread(target=lambda: done.append(1)); thread.start(); thread.join()\n"
        "def add(a, b):\n    return a + b + Point().x - len(done)\n"
        "if __name__ == '__main__':\n    raise SystemExit('not here')\n"
    )
    assert score(code) == 1.0
    assert score("import pytest, numpy\n" + RIGHT) == 0.0, "nothing but the standard library is there"


def test_programs():
    pairs = {"inputs": ["2\n3\n", "-1\n1\n"], "outputs": ["5\n", "0"]}
    program = "def main():\n    print(int(input()) + int(input()), ' ')\n\nif __name__ == '__main__':\n    main()\n"
    for tests in (pairs, json.dumps(pairs)):
        assert score(program, tests) == 1.0
    assert score("input(); input(); print(5)", pairs) == 0.0
    assert score("input(); input(); print(5)", pairs, partial_credit=True) == 0.5
    assert score(program + "raise ValueError", pairs) == 0.0
    assert score(program + "import sys; sys.exit(1)", pairs) == 0.0
    assert score(program + "import sys; sys.exit()", pairs) == 1.0, "a program may leave like that"
    with pytest.raises(ValueError, match="same length"):
        score(program, {"inputs": ["1"], "outputs": []})
    with pytest.raises(ValueError, match="empty"):
        score(program, {"inputs": [], "outputs": []})
    with pytest.raises(ValueError, match="fn_name|function"):
        score(program, {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"})


def test_large_inputs_and_many_tests():
    """Beyond what a pipe holds, either way."""
    assert run_program("print(input())", "x" * 300_000, QUICK) == "x" * 300_000 + "\n"
    assert all(run_tests(RIGHT, [f"assert add({n}, 1) == {n + 1}  # {'x' * 200}" for n in range(2000)], QUICK))


def test_one_time_limit_for_all_programs_of_an_answer():
    started = time.monotonic()
    tests = {"inputs": ["1"] * 5, "outputs": ["1"] * 5}
    assert score("while True: pass", tests, Limits(timeout_seconds=1.0), partial_credit=True) == 0.0
    assert time.monotonic() - started < 4


def test_tests_passed_before_the_time_is_over_count_for_a_share():
    tests = ["assert f(0) == 0", "assert f(1) == 1"]
    code = "def f(n):\n    while n: pass\n    return 0"
    assert score(code, tests, Limits(timeout_seconds=3.0), partial_credit=True) == 0.5


# What earns nothing and leaves nothing


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "exit()",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b):\n    import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.abort()",
        "import ctypes; ctypes.string_at(0)",
        "print('ready'); print('passed'); print(0); print('token 0'); print(True)",
        # guesses at what the child would say, on everything that is open
        "import os\nfor fd in range(64):\n    for text in ('ready', '{}', ' 0', ' 1', 'x 0', 'x 1'):\n"
        "        try: os.write(fd, (text + '\\n').encode())\n        except OSError: pass\nos._exit(0)",
        "import os\nos.closerange(0, 64)\ndef add(a, b): return a + b",
        "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
        "import sys\nsys.setrecursionlimit(10**5)\ndef f(): f()\nf()",
        "\0",
        "def add(a, b)\n",
    ],
)
def test_leaving_early_and_saying_so_earn_nothing(code):
    started = time.monotonic()
    assert score(code, partial_credit=True) == 0.0
    assert time.monotonic() - started < QUICK.timeout_seconds, "nobody waits for what is over"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import threading, time\nthreading.Thread(target=threading.Event().wait).start()\ntime.sleep(99)",
        "def add(a, b):\n    while True:\n        try: add(a, b)\n        except BaseException: pass",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True:\n    pass",
    ],
)
def test_what_never_ends_is_ended(code):
    started = time.monotonic()
    assert score(code, limits=Limits(timeout_seconds=1.0)) == 0.0
    assert time.monotonic() - started < 10


def test_a_flood_of_output_is_ended():
    flood = (
        "import os\nwhile True:\n    for fd in range(64):\n        try: os.write(fd, b'x' * 65536)\n"
        "        except OSError: pass"
    )
    started = time.monotonic()
    assert score(flood, limits=Limits(timeout_seconds=2.0)) == 0.0
    assert run_program("while True: print('x' * 10000)", "", Limits(timeout_seconds=3.0)) is None
    assert time.monotonic() - started < 8


def test_endless_threads_end_with_the_tests():
    waiting = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    started = time.monotonic()
    assert score(waiting + RIGHT) == 1.0
    assert time.monotonic() - started < QUICK.timeout_seconds


def test_memory_is_limited():
    assert score("x = bytearray(2 * 10**9)\n" + RIGHT) == 0.0
    assert score("x = []\nwhile True: x.append(bytearray(10**6))\n" + RIGHT) == 0.0
    assert score("x = bytearray(100 * 10**6)\n" + RIGHT) == 1.0
    assert score("x = bytearray(100 * 10**6)\n" + RIGHT, limits=Limits(memory_megabytes=64)) == 0.0


def test_files_are_limited():
    code = "with open('f', 'wb') as file:\n    for _ in range({}): file.write(bytes(10**6))\n" + RIGHT
    assert score(code.format(10)) == 1.0, "the working directory may be written"
    assert score(code.format(20)) == 0.0
    many = "for n in range(20):\n    with open(str(n), 'wb') as file: file.write(bytes(10**7))\n" + RIGHT
    if "private_files" in LAYERS:
        assert score(many) == 0.0
    assert score("x = [open(__import__('os').devnull) for _ in range(100)]\n" + RIGHT) == 0.0


# What is kept out


def test_at_least_system_calls_are_filtered():
    assert "seccomp" in LAYERS


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def reached(listener):
    try:
        listener.accept()
    except TimeoutError:
        return False
    return True


CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\n"


def test_no_connection_gets_out(listener):
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        assert reached(listener), "else the test shows nothing"
    assert score(CONNECT.format(port=port) + RIGHT) == 0.0
    assert refused(CONNECT.format(port=port))
    assert not reached(listener)
    for kind in ("AF_INET, socket.SOCK_DGRAM", "AF_INET6, socket.SOCK_STREAM", "AF_UNIX, socket.SOCK_STREAM"):
        assert refused(f"socket.socket(socket.{kind})"), kind
    assert refused("socket.socketpair()")
    address = f"struct.pack('=HHI8x', 2, {socket.htons(port)}, {socket.htonl(0x7F000001)})"
    by_hand = (  # around every guard of Python's
        "import struct\nfd = libc.socket(2, 1, 0)\n"
        f"if fd < 0 or libc.connect(fd, {address}, 16) != 0: raise OSError(ctypes.get_errno(), '')"
    )
    assert refused(by_hand)
    assert not reached(listener)


def refused(code, errors="PermissionError"):
    """Did the code come as far as a refusal? A score of 0 alone might be a slip of the test."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    code = f"import ctypes, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\ntry:\n{lines}    said = 'done'\n"
    code += f"except {errors} as error:\n    said = 'refused'\n"
    outcomes = run_tests(code, ["assert said == 'refused'", "assert said == 'done'"], QUICK)
    assert any(outcomes), "the code failed in another way"
    return outcomes[0]


@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "import subprocess\nsubprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "if os.system('true') != 0: raise PermissionError",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "os.kill(os.getppid(), 0)",
        "os.killpg(0, 0)",
        "open('a', 'w').close(); os.chmod('a', 0)",
        "os.utime(os.__file__)",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.sched_setaffinity(os.getppid(), [0])",
        "import resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
        "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "if libc.unshare(0x10000000) != 0: raise OSError(ctypes.get_errno(), '')",
        "if libc.ptrace(16, os.getppid(), 0, 0) != 0: raise OSError(ctypes.get_errno(), '')",
    ],
)
def test_no_process_is_made_or_touched(code):
    assert refused(code)


def test_limits_cannot_be_raised():
    assert refused("import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "ValueError")
    assert refused("if libc.syscall(435, None, 0) < 0: raise OSError(ctypes.get_errno(), '')", "OSError")
    assert not refused("import resource\nresource.getrlimit(resource.RLIMIT_AS)"), "its own are its to read"


def test_a_fork_bomb_makes_nothing():
    code = (
        "import os\nmade = 0\n"
        "for _ in range(1000):\n    try:\n        os.fork(); made += 1\n    except OSError: pass\n" + RIGHT
    )
    assert run_tests(code, ["assert made == 0"], QUICK) == [True]


def test_the_environment_stays_outside(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    code = "import os\nseen = sorted(os.environ)\ntry:\n    theirs = open(f'/proc/{os.getppid()}/environ').read()\n"
    code += "except OSError:\n    theirs = None\n"
    ours = "assert set(seen) <= {'HOME', 'TMPDIR', 'LC_CTYPE', 'LD_LIBRARY_PATH'}, seen"
    assert run_tests(code, [ours], QUICK) == [True]
    if LAYERS & {"namespaces", "landlock"}:
        assert run_tests(code, ["assert theirs is None"], QUICK) == [True]


def test_no_privileges():
    code = "status = dict(line.split(':\\t', 1) for line in open('/proc/self/status') if ':\\t' in line)\n"
    tests = [f"assert int(status['Cap{kind}'], 16) == 0" for kind in ("Prm", "Eff")] + [
        "assert int(status['NoNewPrivs'])"
    ]
    assert run_tests(code, tests, QUICK) == [True] * 3


def test_files_outside_are_safe(tmp_path):
    if "landlock" not in LAYERS:
        pytest.skip("the kernel has no Landlock (version 3 or later): files outside are not protected")
    kept = tmp_path / "kept"
    kept.write_text("kept")
    attempts = [
        f"open({str(kept)!r}, 'w')",
        f"os.open({str(kept)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.remove({str(kept)!r})",
        f"os.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"os.link({str(kept)!r}, 'linked')",
        f"os.mkdir({str(tmp_path / 'made')!r})",
        f"open({str(tmp_path / 'made')!r}, 'w')",
        "open('/proc/self/oom_score_adj', 'w')",
    ]
    for attempt in attempts:
        assert refused(attempt, "OSError"), attempt
    assert kept.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    fine = "import os, tempfile\nopen('a', 'w').write('b'); os.rename('a', 'c'); tempfile.NamedTemporaryFile()"
    assert run_tests(fine, ["assert os.listdir() == ['c']"], QUICK) == [True]


ALONE = """
import os, socket, sys
sys.path.insert(0, {package!r})
from scale_llm.rewards import confine
for layer in {without!r}:
    setattr(confine, layer, lambda *a: [])
print(sorted(confine.confine(os.getcwd(), cpu_seconds=5, memory_bytes=2**28)))
os.chdir(os.getcwd())
for attempt in (
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2),
    lambda: os.fork() or os._exit(0),
    lambda: open({outside!r}, "w"),
):
    try:
        attempt()
        print("done")
    except OSError as error:
        print("refused")
"""


@pytest.mark.parametrize(
    ("layer", "without", "expected"),
    [
        ("seccomp", ["_namespaces", "_landlock"], ["refused", "refused", "done"]),
        ("namespaces", ["_seccomp", "_landlock"], ["refused", "done", "done"]),
        ("landlock", ["_namespaces", "_seccomp"], ["done", "done", "refused"]),
    ],
)
def test_each_layer_holds_alone(tmp_path, listener, layer, without, expected):
    """Namespaces and Landlock are not everywhere, so that the filter must not lean on them, nor they on each other."""
    if layer not in LAYERS:
        pytest.skip(f"the kernel or container refuses {layer}")
    directory = tmp_path / "inside"
    directory.mkdir()
    outside = str(tmp_path / "outside")
    port = listener.getsockname()[1]
    code = ALONE.format(package=str(CHILD.parents[2]), without=without, port=port, outside=outside)
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=directory, capture_output=True, text=True)
    assert result.stdout.splitlines()[1:] == expected, result.stdout + result.stderr
    assert os.path.exists(outside) == (expected[2] == "done")
    assert reached(listener) == (expected[0] == "done")


def test_it_ends_with_the_process_that_started_it():
    """A rank that is killed leaves no answer running."""
    code = "import time\ntime.sleep(60)"
    program = f"from scale_llm.rewards.sandbox import *\nrun_tests({code!r}, ['pass'], Limits(timeout_seconds=60))"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=CHILD.parents[2])
    _until(lambda: psutil.Process(parent.pid).children())
    (child,) = psutil.Process(parent.pid).children()
    _until(lambda: "Seccomp:\t2" in Path(f"/proc/{child.pid}/status").read_text())
    parent.kill()
    parent.wait()
    _until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_open_files_of_the_caller_do_not_matter():
    """The child's pipes then have numbers beyond its own limit."""
    opened = [open(os.devnull) for _ in range(200)]
    assert score(RIGHT) == 1.0
    for file in opened:
        file.close()


# Where it cannot work


def test_without_confinement_nothing_runs(monkeypatch, tmp_path):
    """A child that cannot confine itself says so and runs nothing; the function is refused before any rank starts."""
    child = tmp_path / "child.py"
    text = CHILD.read_text().replace("from scale_llm.rewards.confine import confine", "confine = refuse")
    child.write_text(f"def refuse(*a, **k): raise OSError(38, 'no seccomp')\n{text}")
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(SandboxError, match="no seccomp"):
        run_tests("x = 1", ["assert x"], QUICK)
    isolation.cache_clear()
    with pytest.raises(UserError, match="reward.function=python_tests: .*no seccomp.*take another function"):
        loading.load_function("python_tests")
    isolation.cache_clear()


def test_an_unknown_architecture_is_refused():
    with pytest.raises(OSError, match="riscv64"):
        system_calls.seccomp_program("riscv64")
    for machine in system_calls.REFUSED:
        program = system_calls.seccomp_program(machine)
        assert len(program) < 4096 and all(max(one[1:3]) < 256 for one in program)


def test_through_the_reward_group():
    """Many answers at once, in order; a row without tests is counted as failed."""
    rewards = Rewards(
        RewardFunctionConfig(function="python_tests", partial_credit=True, timeout_seconds=5.0, num_workers=3)
    )
    answers = [RIGHT, "def add(a, b): return 3", "1/0", RIGHT]
    items = [Item("", answer, TESTS if place < 3 else "") for place, answer in enumerate(answers)]
    scored = rewards.score(items)
    assert [one.value for one in scored] == [1.0, 0.5, 0.0, 0.0]
    assert [one.failed for one in scored] == [0, 0, 0, 1]
    assert "no tests" in next(iter(rewards.errors))
