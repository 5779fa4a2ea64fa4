"""Run one untrusted program; a script that ``code_runner`` starts, standard library only.

Before the program starts, this process permanently restricts itself, by kernel mechanisms that need
no privileges:

- CPU time, memory, file size, open files and core dumps: ``setrlimit``;
- writing outside its folder, and reading outside its folder, Python and the system libraries:
  Landlock, Linux >= 6.2;
- sockets, new processes, signals to other processes and similar calls: a seccomp filter;
- capabilities, if it has any.

Restrictions that cannot be enforced are written to the first line of stdout as JSON; the program
then runs only if the caller allows it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_CLONE_THREAD = 0x00010000

# System call numbers of x86-64; other machines are not supported.
_DENIED = {
    "socket": 41,
    "fork": 57,
    "vfork": 58,
    "kill": 62,
    "tkill": 200,
    "tgkill": 234,
    "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297,
    "pidfd_send_signal": 424,
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "setrlimit": 160,
    "setpriority": 141,
    "sched_setscheduler": 144,
    "sched_setaffinity": 203,
    "chmod": 90,
    "fchmod": 91,
    "fchmodat": 268,
    "fchmodat2": 452,
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "fchownat": 260,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "utime": 132,
    "utimes": 235,
    "utimensat": 280,
    "shmget": 29,
    "semget": 64,
    "msgget": 68,
    "mq_open": 240,
    "memfd_create": 319,
    "unshare": 272,
    "setns": 308,
    "mount": 165,
    "umount2": 166,
    "bpf": 321,
    "perf_event_open": 298,
    "add_key": 248,
    "keyctl": 250,
}
_ABSENT = {"clone3": 435, "io_uring_setup": 425}  # ENOSYS: callers fall back to filtered calls
_CLONE, _PRLIMIT = 56, 302

_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14))
_READS, _FILE_RIGHTS = (1 << 2) | (1 << 3), (1 << 1) | (1 << 2) | (1 << 14)


def limit_resources(limits: dict[str, Any]) -> None:
    """Limit CPU seconds, and bytes of memory and of each file; hard limits cannot be raised."""
    for kind, amount in [
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]:
        resource.setrlimit(kind, (amount, amount))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))


def restrict_files(folder: str) -> None:
    """Landlock: allow writing in ``folder``, and reading in it, Python and the system libraries."""
    abi = _LIBC.syscall(444, None, 0, 1)
    if abi < 3:
        raise OSError(f"Landlock with truncation needs Linux 6.2; this kernel has version {abi}")
    ruleset = _checked(_LIBC.syscall(444, struct.pack("Q", _WRITES | _READS), 8, 0), "Landlock")
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__)}
    readable |= {"/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"}
    for path in sorted(readable):
        _allow(ruleset, path, _READS)
    _allow(ruleset, "/dev/null", _READS | _WRITES)
    _allow(ruleset, folder, _READS | _WRITES)
    _no_new_privileges()
    _checked(_LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= _FILE_RIGHTS
    rule = struct.pack("=Qi", rights, descriptor)
    _checked(_LIBC.syscall(445, ruleset, 1, rule, 0), f"Landlock rule for {path}")
    os.close(descriptor)


def filter_calls() -> None:
    """seccomp: deny the calls above and new processes; allow new threads."""
    if platform.machine() != "x86_64":
        raise OSError(f"the seccomp filter knows x86_64, not {platform.machine()}")
    load, jump_eq, jump_ge, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [
        (load, 0, 0, 4),
        (jump_eq, 1, 0, 0xC000003E),  # only x86-64 calls; the x32 table is denied below
        (give, 0, 0, _EPERM),
        (load, 0, 0, 0),
        (jump_ge, 0, 1, 0x40000000),
        (give, 0, 0, _EPERM),
    ]
    for numbers, answer in ((_DENIED, _EPERM), (_ABSENT, _ENOSYS)):
        for number in numbers.values():
            rules += [(jump_eq, 0, 1, number), (give, 0, 0, answer)]
    rules += [(jump_eq, 0, 4, _CLONE), (load, 0, 0, 16), (jump_set, 1, 0, _CLONE_THREAD)]
    rules += [(give, 0, 0, _EPERM), (give, 0, 0, _ALLOW)]
    rules += [(jump_eq, 0, 4, _PRLIMIT), (load, 0, 0, 32), (jump_eq, 1, 0, 0)]
    rules += [(give, 0, 0, _EPERM), (give, 0, 0, _ALLOW), (give, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(buffer))
    _no_new_privileges()
    _checked(_LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, program, 0, 0), "seccomp")


def drop_capabilities() -> None:
    """Drop all capabilities, so that the other limits also apply to root."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _checked(_LIBC.syscall(126, header, nothing), "capset")


def _no_new_privileges() -> None:
    _checked(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def confine(limits: dict[str, Any]) -> dict[str, str]:
    """Apply all restrictions; return those that failed, with the reason."""
    failed = {}
    for name, apply in {
        "resources": lambda: limit_resources(limits),
        "files": lambda: restrict_files(limits["folder"]),
        "capabilities": drop_capabilities,
        "network and processes": filter_calls,
    }.items():
        try:
            apply()
        except (OSError, ValueError) as error:
            failed[name] = str(error)
    return failed


def main() -> None:
    """Read {limits, code, tests, token, allow_unenforced} from stdin, restrict the process and run.

    The output of the program follows the first line. The token is written after the tests, so a
    program that exits early, even with status 0, does not pass.
    """
    task = json.loads(sys.stdin.readline())
    os.chdir(task["limits"]["folder"])
    failed = confine(task["limits"])
    print(json.dumps(failed), flush=True)
    if failed and not task["allow_unenforced"]:
        return
    token, names = task.pop("token"), {"__name__": "__main__"}
    exec(compile(task["code"], "<program>", "exec"), names)
    exec(compile(task["tests"], "<tests>", "exec"), names)
    sys.stdout.flush()
    os.write(1, token.encode())


if __name__ == "__main__":
    main()
