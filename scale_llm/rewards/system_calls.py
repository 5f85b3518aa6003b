"""The system calls that `confine` refuses, and the filter that refuses them (Linux's seccomp).

Numbers are those of the kernel's headers: asm/unistd_64.h for x86_64, asm-generic/unistd.h for aarch64.
"""

import errno

FIRST_UNKNOWN_CALL = 452
"""System calls from here on are refused: what they do is not known. From 424 on the numbers are the same everywhere."""

REFUSED_EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447,
    "process_mrelease": 448,
}  # fmt: skip
REFUSED = {
    "x86_64": {
        "shmget": 29, "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
        "semget": 64, "msgget": 68, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94,
        "ptrace": 101, "rt_sigqueueinfo": 129, "utime": 132, "setpriority": 141, "sched_setparam": 142,
        "sched_setscheduler": 144, "mount": 165, "umount2": 166, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "tkill": 200, "sched_setaffinity": 203,
        "tgkill": 234, "utimes": 235, "mq_open": 240, "add_key": 248, "request_key": 249, "keyctl": 250,
        "ioprio_set": 251, "migrate_pages": 256, "fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272,
        "move_pages": 279, "utimensat": 280, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "sched_setattr": 314, "memfd_create": 319, "bpf": 321,
        "execveat": 322, "userfaultfd": 323,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "ioprio_set": 30, "umount2": 39, "mount": 40, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "utimensat": 88, "unshare": 97, "ptrace": 117, "sched_setparam": 118, "sched_setscheduler": 119,
        "sched_setaffinity": 122, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138,
        "setpriority": 140, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "socket": 198,
        "socketpair": 199, "add_key": 217, "request_key": 218, "keyctl": 219, "execve": 221, "migrate_pages": 238,
        "move_pages": 239, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "sched_setattr": 274, "memfd_create": 279, "bpf": 280, "execveat": 281,
        "userfaultfd": 282,
    },
}  # fmt: skip
CLONE_THREAD = 0x00010000
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
PRLIMIT, FCNTL = {"x86_64": 302, "aarch64": 261}, {"x86_64": 72, "aarch64": 25}
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
"""With these a file that becomes readable sends any signal to any process of the user."""
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCH, FIRST, SECOND = 0, 4, 16, 24
"""Where struct seccomp_data has the call's number, the architecture, and the lower halves of two arguments."""
ALLOW, REFUSE, ABSENT = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS


def seccomp_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value) of the filter for an architecture.

    Raises:
        OSError: the architecture is not known here.
    """
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no filter of system calls for {machine}")
    program = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, REFUSE),  # a 32-bit call, whose numbers mean other things
        (LOAD, 0, 0, NUMBER),
        (JUMP_GREATER_EQUAL, 0, 1, FIRST_UNKNOWN_CALL),
        (RETURN, 0, 0, ABSENT),
        (JUMP_EQUAL, 0, 1, CLONE3),  # its flags lie in memory; libc falls back to clone
        (RETURN, 0, 0, ABSENT),
    ]
    for number in [*REFUSED[machine].values(), *REFUSED_EVERYWHERE.values()]:
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    return program + [
        (JUMP_EQUAL, 0, 4, CLONE[machine]),
        (LOAD, 0, 0, FIRST),
        (JUMP_SET, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
        (JUMP_EQUAL, 0, 4, PRLIMIT[machine]),
        (LOAD, 0, 0, FIRST),
        (JUMP_EQUAL, 0, 1, 0),  # of the process itself
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
        (JUMP_EQUAL, 0, 5, FCNTL[machine]),
        (LOAD, 0, 0, SECOND),
        (JUMP_EQUAL, 2, 0, F_SETOWN),
        (JUMP_EQUAL, 1, 0, F_SETSIG),
        (JUMP_EQUAL, 0, 1, F_SETOWN_EX),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
