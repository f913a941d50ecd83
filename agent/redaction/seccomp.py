"""A system call filter for a process that has everything it needs: no new file, socket, process; hands off others.

`forbid` cannot be undone. What is forbidden fails with EPERM; a call in another architecture's numbering ends the
process. The numbers are those of Linux's tables for x86-64 and aarch64; elsewhere, and in kernels without seccomp,
`forbid` returns False and the resource limits of the worker stand alone.
"""

from __future__ import annotations

import ctypes
import platform
import struct

SET_MODE_FILTER, ALL_THREADS = 1, 1  # seccomp(2): operation and the flag TSYNC
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: errno 1, EPERM
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
X32_BIT = 0x40000000  # x86-64's second numbering; no number of aarch64 is as large

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}  # the number of seccomp(2)
# name: (x86-64, aarch64); None where an architecture does not have it
# fmt: off
FORBIDDEN: dict[str, tuple[int, int | None]] = {
    "open": (2, None), "creat": (85, None), "openat": (257, 56), "openat2": (437, 437),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "truncate": (76, 45),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None), "fchmodat": (268, 53), "chown": (92, None), "fchownat": (260, 54),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "shmget": (29, 194), "msgget": (68, 186), "mq_open": (240, 180),
}
# fmt: on


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter for a machine as BPF instructions (code, jump if true, jump if false, operand)."""
    column = list(ARCHITECTURES).index(machine)
    numbers = [number for pair in FORBIDDEN.values() if (number := pair[column]) is not None]
    left = len(numbers)
    return [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, left + 1, 0, X32_BIT),
        *((JUMP_IF_EQUAL, left - place, 0, number) for place, number in enumerate(numbers)),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]


def forbid() -> bool:
    """Apply the filter to every thread of this process; True where the kernel took it. Needs no_new_privs."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    code = b"".join(struct.pack("=HBBI", *step) for step in program(machine))
    steps = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(code) // 8, ctypes.addressof(steps))
    return bool(ctypes.CDLL(None).syscall(SECCOMP[machine], SET_MODE_FILTER, ALL_THREADS, header) == 0)
