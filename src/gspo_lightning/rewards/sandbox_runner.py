"""The program inside the sandbox, run as ``python -I -S -c <this file>``; it needs only the standard library.

It is not trusted: once the candidate's code runs, that code may control all output of this process. The verdict is
made outside, by comparing answers with expected ones that are never sent in here.
Messages both ways are a 4-byte big-endian length and UTF-8 JSON.
"""

import ast
import builtins
import ctypes
import json
import os
import resource
import struct
import sys
import types


def read_exactly(fd: int, count: int) -> bytes:
    """``count`` bytes; fewer only at the end of the input."""
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 16))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def receive(fd: int) -> dict | None:
    """The next message, or None at the end of the input."""
    head = read_exactly(fd, 4)
    if len(head) < 4:
        return None
    return json.loads(read_exactly(fd, struct.unpack(">I", head)[0]))


def send(fd: int, message: dict) -> None:
    """Writes one message."""
    body = json.dumps(message).encode()
    data = struct.pack(">I", len(body)) + body
    while data:
        data = data[os.write(fd, data) :]


def limit(limits: dict, uid: int | None) -> None:
    """Gives up rights and resources permanently. The kernel counts no processes of root, so root changes its user.

    A hard limit that is already lower stays: it cannot be raised. macOS refuses every limit of the address space.
    """
    mib = 1 << 20
    for name, value in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", limits["cpu_s"]),
        ("RLIMIT_AS", None if sys.platform == "darwin" else limits["memory_mb"] * mib),
        ("RLIMIT_FSIZE", limits["disk_mb"] * mib),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", limits["max_processes"]),
    ):
        if value is not None:
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    if sys.platform == "linux":  # a huge page stays whole while 4 KiB of it are mapped, and RLIMIT_AS counts those
        one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
        ctypes.CDLL(None).prctl(41, one, zero, zero, zero)  # PR_SET_THP_DISABLE
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def die_with(parent: int) -> None:
    """Makes Linux kill this process when the thread that started it ends, which bubblewrap does by itself."""
    if sys.platform == "linux":
        signal_number, zero = ctypes.c_ulong(9), ctypes.c_ulong(0)  # SIGKILL
        ctypes.CDLL(None).prctl(1, signal_number, zero, zero, zero)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def foreign_imports(tree: ast.AST) -> list[str]:
    """Modules outside the standard library that the code imports by statement; ``.`` for a relative import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else (node.module or "").split(".")[0])
    return sorted(names - set(sys.stdlib_module_names))


def answer(module: types.ModuleType, request: dict) -> dict:
    """Calls a function of the candidate; returns its value, or the type of what it raised."""
    try:
        return {"value": getattr(module, request["call"])(*request["args"])}
    except BaseException as error:  # noqa: BLE001  (SystemExit of the candidate is an answer, too)
        return {"error": type(error).__name__}


def main() -> None:
    """Limits itself, inspects the code, runs it, and answers calls until the input ends."""
    order = receive(0)
    assert order is not None
    if order["parent"] is not None:
        die_with(order["parent"])
    limit(order["limits"], order["uid"])
    program = order["mode"] == "program"
    module = types.ModuleType("__main__" if program else "candidate")
    module.__file__ = "candidate.py"
    sys.modules[module.__name__] = module
    if program:
        vars(builtins).update(exit=sys.exit, quit=sys.exit)  # of the module site, which -S leaves out
        exec(compile(order["code"], "candidate.py", "exec"), module.__dict__)
        return
    inbox, outbox, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    try:
        tree = ast.parse(order["code"], "candidate.py")
        send(outbox, {"foreign": foreign_imports(tree)})
        exec(compile(order["code"], "candidate.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001
        send(outbox, {"error": type(error).__name__})
        return
    send(outbox, {"ready": True})
    while (request := receive(inbox)) is not None:
        reply = answer(module, request)
        try:
            send(outbox, reply)
        except (TypeError, ValueError, RecursionError):
            send(outbox, {"error": "NotJSON"})


if __name__ == "__main__":
    main()
