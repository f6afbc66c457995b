"""A seccomp filter for the sandbox, in the form ``bwrap --seccomp`` reads: compiled classic BPF.

Namespaces hide what is outside; this filter takes away the system calls that could make new namespaces or mounts
(memory without limit, more of the kernel to attack), sockets (a virtual machine's vsock is in no namespace), memory
that no resource limit counts, and the usual ways to look into other processes.
"""

from __future__ import annotations

import errno
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {  # name: number on (x86_64, aarch64), from asm/unistd_64.h and asm-generic/unistd.h
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425),  # its rings could open sockets past this filter
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "vmsplice": (278, 75),  # a page in a pipe keeps its whole huge page, and no limit counts what was unmapped
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
_CLONE = (56, 220)
_CLONE3 = 435  # its flags are behind a pointer, which a filter cannot follow; libc falls back to clone
_NEW_NAMESPACE = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_PRCTL = (157, 167)
_THP_DISABLE = 41  # PR_SET_THP_DISABLE: the runner sets it, for good
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT, _THIRD_ARGUMENT = 0, 4, 16, 24, 32  # in struct seccomp_data


def supported() -> bool:
    """Whether this module knows the system call numbers of this machine."""
    return platform.machine() in _ARCHITECTURES


def program() -> bytes:
    """The filter for this machine."""
    machine = platform.machine()
    column = list(_ARCHITECTURES).index(machine)
    code = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
        _op(_AT_LEAST, _X32, 0, 1),
        _op(_RETURN, _KILL),
    ]
    for numbers in _DENIED.values():
        code += [_op(_EQUAL, numbers[column], 0, 1), _op(_RETURN, _ERROR | errno.EPERM)]
    code += [_op(_EQUAL, _CLONE3, 0, 1), _op(_RETURN, _ERROR | errno.ENOSYS)]
    code += [  # of huge pages, prctl may only disable them, even where madvise requests them
        _op(_EQUAL, _PRCTL[column], 0, 8),
        _op(_LOAD, _FIRST_ARGUMENT),
        _op(_EQUAL, _THP_DISABLE, 0, 4),
        _op(_LOAD, _SECOND_ARGUMENT),
        _op(_EQUAL, 1, 0, 3),
        _op(_LOAD, _THIRD_ARGUMENT),
        _op(_EQUAL, 0, 0, 1),
        _op(_RETURN, _ALLOW),
        _op(_RETURN, _ERROR | errno.EPERM),
    ]
    code += [
        _op(_EQUAL, _CLONE[column], 0, 3),
        _op(_LOAD, _FIRST_ARGUMENT),
        _op(_ANY_BIT, _NEW_NAMESPACE, 0, 1),
        _op(_RETURN, _ERROR | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
