"""The system call filter of the sandbox: a classic BPF program for seccomp(2), made for x86-64 and aarch64.

Everything is allowed but three kinds of calls. Those that only serve to leave a sandbox or to touch the kernel kill the
process with SIGSYS. Those that ordinary libraries try and can do without answer an error. And two calls are judged by
an argument: `socket`, since VSOCK and some other families are not fenced in by a network namespace, and `clone`, which
must not make namespaces.
"""

import errno
import platform
import struct

# Numbers of (x86-64, aarch64).
KILLED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
    "setns": (308, 268), "unshare": (272, 97), "bpf": (321, 280),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225),
}
# clone3 hides its flags behind a pointer; told that it does not exist, the C library takes clone.
ABSENT = {
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "syslog": (103, 116),
}
CLONE, SOCKET, IOCTL = (56, 220), (41, 198), (16, 29)

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
UNIX, INET, INET6, NETLINK = 1, 2, 10, 16
# Put characters into a terminal's input: TIOCSTI, TIOCLINUX.
TYPING = (0x5412, 0x541C)
X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

Instruction = tuple[int, int, int, int]


def program(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one), an array of `struct sock_filter` as `bwrap --seccomp` reads it.

    Raises ValueError for a machine without a table.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"machine {machine}: expected one of {', '.join(MACHINES)}; the sandbox has no system call "
                         "table for it")
    column, architecture = MACHINES[machine]
    code = [_load(_ARCHITECTURE), *_unless(_EQUAL, architecture, _KILL), _load(_NUMBER)]
    if machine == "x86_64":
        code += _when(_AT_LEAST, X32, _KILL)
    for numbers in KILLED.values():
        code += _when(_EQUAL, numbers[column], _KILL)
    for numbers in ABSENT.values():
        code += _when(_EQUAL, numbers[column], _ERROR | errno.ENOSYS)
    code += _judge(CLONE[column], 0, _when(_ANY_BIT, NEW_NAMESPACES, _KILL) + [_return(_ALLOW)])
    families = [step for family in (UNIX, INET, INET6, NETLINK) for step in _when(_EQUAL, family, _ALLOW)]
    code += _judge(SOCKET[column], 0, families + [_return(_ERROR | errno.EAFNOSUPPORT)])
    typing = [step for request in TYPING for step in _when(_EQUAL, request, _ERROR | errno.EPERM)]
    code += _judge(IOCTL[column], 1, typing + [_return(_ALLOW)])
    code.append(_return(_ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def _load(offset: int) -> Instruction:
    return _LOAD, 0, 0, offset


def _return(action: int) -> Instruction:
    return _RETURN, 0, 0, action


def _when(test: int, value: int, action: int) -> list[Instruction]:
    return [(test, 0, 1, value), _return(action)]


def _unless(test: int, value: int, action: int) -> list[Instruction]:
    return [(test, 1, 0, value), _return(action)]


def _judge(number: int, argument: int, steps: list[Instruction]) -> list[Instruction]:
    """Steps over the low half of one argument, taken for one system call; they must end in a return."""
    return [(_EQUAL, 0, len(steps) + 1, number), _load(_ARGUMENTS + 8 * argument), *steps]
