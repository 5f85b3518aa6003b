"""What a process gives up for good before it runs code that nobody has read. Linux only; imports the standard library.

Four layers; each process says which are in force, and `sandbox.isolation` repeats it:
- seccomp: a filter refuses system calls. No sockets, no new processes or programs, no signals to others, no reading of
  their memory, no changes of modes or owners. Threads are allowed. Works without privileges and in most containers.
- namespaces: an own network without any interface, not even a loopback, own System V IPC, and a user namespace, which
  has no rights over other processes. Many kernels and containers refuse it.
- private_files: inside those, the working directory is a file system in memory of its own, of limited size.
- landlock: files outside the working directory cannot be written, made, moved or removed (Linux 6.2 or later).

Limits on memory, CPU seconds and sizes of files hold always. No layer keeps files from being read.
"""

import ctypes
import os
import resource
import struct

from scale_llm.rewards.system_calls import seccomp_program

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18

MAX_FILE_BYTES = 16 * 2**20
MAX_FILES_BYTES = 64 * 2**20
"""Of all files in the working directory together, where private_files is in force."""
MAX_OPEN_FILES = 64

libc = ctypes.CDLL(None, use_errno=True)


def confine(directory: str, *, cpu_seconds: int, memory_bytes: int) -> list[str]:
    """Gives up everything but computing; returns the layers in force. `directory` may be written.

    Raises:
        OSError: the kernel or the architecture has no seccomp: the code must not be run.
    """
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    layers = _namespaces(directory)
    limit = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
    }
    for kind, most in limit.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    layers += _landlock(directory)
    _drop_capabilities()
    _prctl(PR_SET_PDEATHSIG, SIGKILL)  # does not outlive who started it; a change of rights would clear it
    _seccomp()
    return ["seccomp", *layers]


def _prctl(option: int, *values) -> None:
    # Each as an unsigned long: prctl is variadic, and would read garbage in the upper halves of plain ints
    words = [value if hasattr(value, "contents") else ctypes.c_ulong(value) for value in values]
    if libc.prctl(option, *words, *[ctypes.c_ulong(0)] * (4 - len(words))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) is refused")


def _namespaces(directory: str) -> list[str]:
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS) != 0:
        return []
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:  # AppArmor of recent Ubuntus: the namespaces are there, rights in them are not
        return ["namespaces"]
    files = f"size={MAX_FILES_BYTES},nr_inodes=4096,mode=700".encode()
    mounted = (
        libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) == 0
        and libc.mount(b"tmpfs", directory.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), files) == 0
    )
    return ["namespaces", "private_files"] if mounted else ["namespaces"]


WRITE_FILE, TRUNCATE, IOCTL_DEVICE = 1 << 1, 1 << 14, 1 << 15
CHANGES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # remove_dir to make_sym
REFER = 1 << 13


def _landlock(directory: str) -> list[str]:
    """Nothing outside the directory is changed. From linux/landlock.h; its calls have the same numbers everywhere."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return []
    handled = CHANGES
    for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEVICE)):
        handled |= right if version >= since else 0
    scoped = 3 if version >= 6 else 0  # neither abstract sockets nor signals to the outside
    attributes = struct.pack("QQQ", handled, 0, scoped) if version >= 6 else struct.pack("Q", handled)
    rules = libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if rules < 0:
        return []
    for path, rights in ((directory, handled), (os.devnull, WRITE_FILE)):
        opened = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights, opened)
        allowed = libc.syscall(445, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0)) == 0
        os.close(opened)
        if not allowed:
            return []
    held = libc.syscall(446, ctypes.c_int(rules), ctypes.c_uint(0)) == 0
    os.close(rules)
    return ["landlock"] if held and version >= 3 else []  # before 3 a file may still be emptied


def _drop_capabilities() -> None:
    """Root's rights, and those over the own user namespace."""
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset is refused")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _seccomp() -> None:
    program = seccomp_program(os.uname().machine)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    _prctl(PR_SET_SECCOMP, 2, ctypes.pointer(_Program(len(program), packed)))
