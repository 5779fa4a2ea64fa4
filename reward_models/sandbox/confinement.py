"""Restrict the current process permanently with kernel mechanisms that need no privileges.

- ``setrlimit`` limits CPU time, memory, file sizes, open files and core dumps.
- Landlock (Linux 6.2 or newer) denies access to files and starting executables; files that Python
  needs can be read, and ``/dev/null`` can be written.
- A seccomp filter denies network sockets, new processes, signals and similar calls.
- Capabilities are dropped.
- The process is killed when the process that started it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_PDEATHSIG, _NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 1, 38, 22, 2
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
_CLONE_THREAD = 0x00010000
_AF_UNIX = 1

# System call numbers of x86-64; other machines are not supported.
_CLONE, _SOCKETPAIR, _SENDTO, _FCNTL, _IOCTL, _PRCTL, _PRLIMIT = 56, 53, 44, 72, 16, 157, 302
_LAST_KNOWN_CALL = 462  # mseal, Linux 6.10
_DENIED_CALLS = {
    # network; a socket pair needs none of these
    "socket": 41,
    "connect": 42,
    "bind": 49,
    "listen": 50,
    "accept": 43,
    "accept4": 288,
    "sendmsg": 46,
    "sendmmsg": 307,
    # processes
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "execveat": 322,
    "setsid": 112,
    "setpgid": 109,
    # other processes
    "kill": 62,
    "tkill": 200,
    "tgkill": 234,
    "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "pidfd_send_signal": 424,
    "ptrace": 101,
    "kcmp": 312,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "process_madvise": 440,
    "process_mrelease": 448,
    "migrate_pages": 256,
    "move_pages": 279,
    # System V objects and message queues of other processes, which Landlock does not restrict
    "shmat": 30,
    "shmctl": 31,
    "semop": 65,
    "semctl": 66,
    "semtimedop": 220,
    "msgsnd": 69,
    "msgrcv": 70,
    "msgctl": 71,
    "mq_unlink": 241,
    # scheduling and limits
    "setrlimit": 160,
    "setpriority": 141,
    "ioprio_set": 251,
    "sched_setparam": 142,
    "sched_setscheduler": 144,
    "sched_setattr": 314,
    "sched_setaffinity": 203,
    # attributes and locks of files, which Landlock does not restrict
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
    "removexattr": 197,
    "lremovexattr": 198,
    "fremovexattr": 199,
    "utime": 132,
    "utimes": 235,
    "futimesat": 261,
    "utimensat": 280,
    "flock": 73,
    # disk load
    "sync": 162,
    "syncfs": 306,
    # memory that RLIMIT_AS does not include
    "shmget": 29,
    "semget": 64,
    "msgget": 68,
    "mq_open": 240,
    "memfd_create": 319,
    "memfd_secret": 447,
    "io_setup": 206,
    # kernel interfaces
    "unshare": 272,
    "setns": 308,
    "chroot": 161,
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "open_by_handle_at": 304,
    "inotify_init": 253,
    "inotify_init1": 294,
    "fanotify_init": 300,
    "bpf": 321,
    "perf_event_open": 298,
    "userfaultfd": 323,
    "personality": 135,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "syslog": 103,
    "reboot": 169,
    "init_module": 175,
    "finit_module": 313,
    "kexec_load": 246,
}
# These calls return ENOSYS, so that callers use other calls, which the filter checks.
_ABSENT_CALLS = {"clone3": 435, "io_uring_setup": 425}
_DENIED_ARGUMENTS = [
    # System call, position of the argument, value.
    (_PRCTL, 0, _PDEATHSIG),
    (_FCNTL, 1, 8),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to other processes
    (_FCNTL, 1, 10),
    (_FCNTL, 1, 15),
    (_FCNTL, 1, 1024),  # F_SETLEASE: delays other processes
    (_IOCTL, 1, 0x8901),  # FIOSETOWN and SIOCSPGRP: signals to other processes
    (_IOCTL, 1, 0x8902),
    (_IOCTL, 1, 0x5412),  # TIOCSTI: input of a terminal
]
_REQUIRED_ARGUMENTS = [
    (_PRLIMIT, 2, 0),  # limits can be read but not changed
    (_SENDTO, 4, 0),  # no address
    (_SOCKETPAIR, 0, _AF_UNIX),
]

_FILE_RIGHT_BITS = {"execute": 0, "write": 1, "read": 2, "truncate": 14}  # bits of Landlock rights
_READ_RIGHTS = (1 << 2) | (1 << 3)  # files and folders
_HANDLED_RIGHTS = (1 << 15) - 1  # all rights of Landlock version 3


def limit_resources(limits: dict[str, Any]) -> None:
    """Limit CPU time (``cpu``, in seconds) and the address space (``memory``, in bytes).

    The number of open files is limited to 64, and writing files and core dumps is not possible.
    After `drop_capabilities`, the process cannot raise its hard limits.
    """
    for kind, amount in [
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]:
        resource.setrlimit(kind, (amount, amount))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))


def restrict_file_access() -> None:
    """Use Landlock to deny access to files.

    Reading files that Python needs, and writing to /dev/null, are still possible.

    Raises:
        OSError: The system is not Linux, or the kernel does not support Landlock version 3.
    """
    if sys.platform != "linux":
        raise OSError(f"Landlock needs Linux, not {sys.platform}")
    version = _LIBC.syscall(444, None, 0, 1)
    if version < 3:
        present = f"version {version}" if version > 0 else "no Landlock"
        raise OSError(f"Landlock version 3 (Linux 6.2) is needed; this kernel has {present}")
    ruleset = _require_system_call_success(
        _LIBC.syscall(444, struct.pack("Q", _HANDLED_RIGHTS), 8, 0), "Landlock"
    )
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    readable = {f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64")}
    readable |= {os.path.dirname(os.__file__), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    readable |= {"/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"}
    for path in sorted(readable):
        _allow_path(ruleset, path, _READ_RIGHTS)
    _allow_path(
        ruleset,
        "/dev/null",
        _READ_RIGHTS | 1 << _FILE_RIGHT_BITS["write"] | 1 << _FILE_RIGHT_BITS["truncate"],
    )
    _forbid_new_privileges()
    _require_system_call_success(_LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    """Add a Landlock rule that allows ``rights`` for a file or folder, if the path exists."""
    if not os.path.exists(path):
        return
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= sum(1 << bit for bit in _FILE_RIGHT_BITS.values())
    rule = struct.pack("=Qi", rights, descriptor)
    _require_system_call_success(
        _LIBC.syscall(445, ruleset, 1, rule, 0), f"Landlock rule for {path}"
    )
    os.close(descriptor)


def filter_system_calls() -> None:
    """Use seccomp to deny the calls in `_DENIED_CALLS` and new processes; new threads are allowed.

    Some arguments of other calls are also denied. The calls in `_ABSENT_CALLS` and those after
    `_LAST_KNOWN_CALL` return ENOSYS.

    Raises:
        OSError: The kernel does not support seccomp, or the machine is not Linux on x86-64.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        present = f"{sys.platform} on {platform.machine()}"
        raise OSError(f"the seccomp filter needs Linux on x86_64, not {present}")
    rules = _seccomp_filter_instructions()
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(buffer))
    _forbid_new_privileges()
    _require_system_call_success(_LIBC.prctl(_SET_SECCOMP, _FILTER_MODE, program, 0, 0), "seccomp")


def _seccomp_filter_instructions() -> list[tuple[int, int, int, int]]:
    """Return the classic BPF filter as instructions (operation, jump true, jump false, operand)."""
    load, jump_eq, jump_ge, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    load_call = (load, 0, 0, 0)
    rules = [
        (load, 0, 0, 4),
        (jump_eq, 1, 0, 0xC000003E),  # only x86-64 calls; the x32 table is denied below
        (give, 0, 0, _EPERM),
        load_call,
        (jump_ge, 0, 1, 0x40000000),
        (give, 0, 0, _EPERM),
        (jump_ge, 0, 1, _LAST_KNOWN_CALL + 1),
        (give, 0, 0, _ENOSYS),
    ]
    for numbers, result in ((_DENIED_CALLS, _EPERM), (_ABSENT_CALLS, _ENOSYS)):
        for number in numbers.values():
            rules += [(jump_eq, 0, 1, number), (give, 0, 0, result)]
    # The low half of argument i is at byte 16 + 8 i, the high half 4 bytes later.
    for number, i, value in _DENIED_ARGUMENTS:
        rules += [(jump_eq, 0, 4, number), (load, 0, 0, 16 + 8 * i), (jump_eq, 0, 1, value)]
        rules += [(give, 0, 0, _EPERM), load_call]
    for number, i, value in _REQUIRED_ARGUMENTS:
        rules += [(jump_eq, 0, 6, number), (load, 0, 0, 16 + 8 * i), (jump_eq, 0, 2, value)]
        rules += [(load, 0, 0, 20 + 8 * i), (jump_eq, 1, 0, 0), (give, 0, 0, _EPERM), load_call]
    rules += [(jump_eq, 0, 4, _CLONE), (load, 0, 0, 16), (jump_set, 1, 0, _CLONE_THREAD)]
    return [*rules, (give, 0, 0, _EPERM), load_call, (give, 0, 0, _ALLOW)]


def drop_capabilities() -> None:
    """Drop all capabilities of the process, so that the other restrictions also apply to root.

    Raises:
        OSError: The system is not Linux, or the kernel rejects the call.
    """
    if sys.platform != "linux":
        raise OSError(f"capabilities need Linux, not {sys.platform}")
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _require_system_call_success(_LIBC.syscall(126, header, nothing), "capset")


def kill_self_when_parent_ends(parent: int) -> None:
    """Let the kernel kill this process when its parent ends.

    If the process with the id ``parent`` is not the parent any more, this process exits at once.

    Raises:
        OSError: The system is not Linux, or the kernel rejects the call.
    """
    if sys.platform != "linux":
        raise OSError(f"killing a process when its parent ends needs Linux, not {sys.platform}")
    _require_system_call_success(
        _LIBC.prctl(_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "parent's end"
    )
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def _forbid_new_privileges() -> None:
    _require_system_call_success(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _require_system_call_success(result: int, what: str) -> int:
    """Return the result of a system call; raise OSError if it is negative."""
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def apply_restrictions(limits: dict[str, Any]) -> dict[str, str]:
    """Apply all restrictions; return name -> error of each restriction that cannot be applied."""
    failed = {}
    for name, apply in {
        "end with the parent": lambda: kill_self_when_parent_ends(limits["parent"]),
        "resources": lambda: limit_resources(limits),
        "files": restrict_file_access,
        "capabilities": drop_capabilities,
        "network and processes": filter_system_calls,
    }.items():
        try:
            apply()
        except (OSError, ValueError) as error:
            failed[name] = str(error)
    return failed


def read_task_and_confine() -> dict[str, Any]:
    """Read the task from stdin, set stdin to /dev/null, restrict this process and return the task.

    The restrictions that could not be applied are written to the first line of stdout as a JSON
    object. If there are any, the process exits, unless ``allow_unenforced`` is set in the task.
    """
    task = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    failed = apply_restrictions(task["limits"])
    print(json.dumps(failed), flush=True)
    if failed and not task["allow_unenforced"]:
        sys.exit(1)
    return task
