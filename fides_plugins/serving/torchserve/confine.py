"""Run a program that may write into one folder only, open no TCP connection, and use so much of the machine.

`python confine.py FOLDER PROGRAM ARGUMENTS...` limits itself and becomes the program. Writing and TCP are denied by
Landlock (Linux 5.13; TCP from 6.7 on); reading is not. What the program is started by must not depend on this
package, because it may be another Python.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

#: Seconds of processor time, bytes of one file, bytes of memory that the program asks for, processes of its user.
LIMITS = {
    resource.RLIMIT_CPU: 300,
    resource.RLIMIT_FSIZE: 4 * 1024**3,
    resource.RLIMIT_DATA: 32 * 1024**3,
    resource.RLIMIT_NPROC: 8192,
    resource.RLIMIT_CORE: 0,
}
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_NO_NEW_PRIVILEGES = 38
# linux/landlock.h: writing, removing and making anything; truncating; connecting and binding; signals to others.
_WRITE_FILE = 1 << 1
_WRITES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_TRUNCATE, _TCP, _SCOPES = 1 << 14, 3, 3
_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 where there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def confine(folder: str) -> None:
    """Limit this process and all that it starts; raises `OSError` where that cannot be done."""
    version, libc = landlock_version(), _libc()
    writes = _WRITES | (_TRUNCATE if version >= 3 else 0)
    rules = _Ruleset(writes, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0))
    for path, allowed in ((folder, writes), (os.devnull, writes & (_WRITE_FILE | _TRUNCATE))):
        beneath = _Beneath(allowed, os.open(path, os.O_PATH | os.O_CLOEXEC))
        _checked(libc.syscall(_ADD_RULE, ruleset, _BENEATH, ctypes.byref(beneath), 0))
        os.close(beneath.folder)
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    for what, limit in LIMITS.items():
        _, hard = resource.getrlimit(what)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


if __name__ == "__main__":
    confine(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
