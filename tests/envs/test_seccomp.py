"""The filter's verdicts, found by a small machine that runs the program as the kernel's documentation describes it."""

import errno
import struct

import pytest

from glm5_jax.envs import seccomp

X86, ARM = ("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)
ALLOW, KILL = 0x7FFF0000, 0x80000000


def refuse(number: int) -> int:
    return 0x00050000 | number


def verdict(machine: str, architecture: int, number: int, *arguments: int) -> int:
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        else:
            true = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: accumulator & value != 0}[code]
            at += if_true if true else if_false
        at += 1


# Numbers from the kernel's tables: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h.
@pytest.mark.parametrize("world, number, arguments, expected", [
    (X86, 0, (), ALLOW),                        # read
    (X86, 59, (), ALLOW),                       # execve
    (X86, 57, (), ALLOW),                       # fork
    (X86, 165, (), KILL),                       # mount
    (X86, 272, (0x10000000,), KILL),            # unshare
    (X86, 101, (), KILL),                       # ptrace
    (X86, 435, (), refuse(errno.ENOSYS)),       # clone3
    (X86, 56, (0x003D0F00,), ALLOW),            # clone of a thread
    (X86, 56, (0x10000011,), KILL),             # clone with a new user namespace
    (X86, 56, (0x00020011,), KILL),             # clone with a new mount namespace
    (X86, 41, (2, 1), ALLOW),                   # socket: internet
    (X86, 41, (1, 1), ALLOW),                   # socket: unix
    (X86, 41, (40, 1), refuse(errno.EAFNOSUPPORT)),   # socket: vsock
    (X86, 41, (17, 3), refuse(errno.EAFNOSUPPORT)),   # socket: packet
    (X86, 16, (0, 0x5401), ALLOW),              # ioctl: TCGETS
    (X86, 16, (0, 0x5412), refuse(errno.EPERM)),      # ioctl: TIOCSTI
    (X86, 16, (0, 0x1_0000_5412), refuse(errno.EPERM)),  # the kernel reads the low half alone
    (X86, 0x40000000 + 59, (), KILL),           # x32
    (("x86_64", 0x40000003), 59, (), KILL),     # a 32-bit call
    (ARM, 63, (), ALLOW),                       # read
    (ARM, 40, (), KILL),                        # mount
    (ARM, 97, (0x10000000,), KILL),             # unshare
    (ARM, 220, (0x11,), ALLOW),                 # clone
    (ARM, 220, (0x10000011,), KILL),
    (ARM, 198, (40, 1), refuse(errno.EAFNOSUPPORT)),
    (ARM, 29, (0, 0x541C), refuse(errno.EPERM)),      # ioctl: TIOCLINUX
    (ARM, 165, (), ALLOW),                      # getrusage, mount's number elsewhere
    (("aarch64", 0xC000003E), 63, (), KILL),
])
def test_verdict(world, number, arguments, expected):
    assert verdict(*world, number, *arguments) == expected


def test_an_unknown_machine_is_refused():
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.program("riscv64")
