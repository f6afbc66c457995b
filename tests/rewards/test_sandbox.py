"""Code that a model wrote can neither harm nor fool the trainer. Each attack gets the reward of failure."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import CodeTests, Limits, sandbox, sandbox_checks, sandbox_runner
from gspo_lightning.rewards.sandbox import SandboxError, session
from tests.rewards.test_workers import gone, wait_until

try:
    sandbox_checks.require("bubblewrap")
    MISSING = ""
except UserError as error:
    MISSING = str(error)

needs_isolation = pytest.mark.skipif(bool(MISSING), reason=MISSING)
LIMITS = Limits(wall_s=2.5, cpu_s=1, memory_mb=128, disk_mb=4, max_processes=4, output_mb=1)
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = [{"call": "double", "args": [21], "expected": 42}, {"call": "double", "args": [-3], "expected": -6}]


def judge(code, tests=TESTS, **settings):
    reward = CodeTests(failure=-1.0, limits=settings.pop("limits", LIMITS), **settings)
    return reward([code], [tests])[0]


def value(code, function="f", *arguments, limits=LIMITS):
    with session(code, "functions", limits, "bubblewrap") as process:
        process.receive(), process.receive()
        return process.call(function, *arguments)


ATTACKS = {
    "infinite_loop": "while True: pass",
    "loop_in_the_call": "def double(x):\n    while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread_bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory_bomb": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "one_huge_allocation": "x = bytearray(1 << 40)",
    "prints_forever": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "answers_too_much": "def double(x): return 'x' * (8 << 20)",
    "floods_the_channel": "import os\nwhile True:\n    for fd in range(3, 20):\n        try: os.write(fd, b'\\xff' * 65536)\n        except OSError: pass",
    "writes_1_gb": "with open('/tmp/big', 'wb') as f:\n    for _ in range(1024): f.write(bytes(1 << 20)); f.flush()\n"
    + RIGHT,
    "many_files": "for i in range(1024):\n    open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))\n" + RIGHT,
    "reads_passwd": "open('/etc/passwd').read()\n" + RIGHT,
    "reads_the_project": f"open({str(Path(__file__).resolve())!r}).read()\n" + RIGHT,
    "reads_the_environment_of_others": "open('/proc/1/environ').read()\n" + RIGHT,
    "writes_outside": "open('/usr/lib/x', 'w')\n" + RIGHT,
    "opens_a_socket": "import socket; socket.socket()\n" + RIGHT,
    "imports_site_packages": "import numpy\n" + RIGHT,
    "exits_well": "import os; os._exit(0)",
    "sys_exit": "import sys; sys.exit(0)",
    "exits_in_the_call": "import os\ndef double(x): os._exit(0)",
    "kills_its_parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
    "syntax_error": "def double(x:",
    "nested_brackets": "(" * 10_000 + ")" * 10_000,
    "long_unary_chain": "-" * 40_000 + "1",
    "surrogates_and_nul": "x = '\ud800'\x00",
    "raises": "raise ValueError",
    "raises_a_class_of_its_own": "class E(BaseException): pass\ndef double(x): raise E",
    "value_is_not_json": "def double(x): return object()",
    "deep_value": "def double(x):\n    y = []\n    for _ in range(900): y = [y]\n    return y",
    "equal_to_everything": "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef double(x): return A(0)",
    "wrong": "def double(x): return x",
}


@needs_isolation
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_the_reward_of_failure_within_the_limit(name):
    start = time.monotonic()
    assert judge(ATTACKS[name]) == -1.0
    assert time.monotonic() - start < LIMITS.wall_s + 5


@needs_isolation
def test_right_code_gets_its_reward_right_after_all_of_them():
    assert judge(RIGHT) == 1.0
    assert judge(f"Here it is:\n```python\n{RIGHT}```\nDone.") == 1.0


FORGED = """
import json, os, struct, sys
class Fake:
    def __getattr__(self, name): return lambda *a, **k: 42
for name in list(sys.modules): sys.modules[name] = Fake()
body = b'{"value": 42, "ready": true, "passed": true, "score": 1.0}'
for fd in range(3, 20):
    try: os.write(fd, (struct.pack(">I", len(body)) + body) * 100)
    except OSError: pass
"""


@needs_isolation
def test_a_forged_answer_counts_only_where_it_is_right():
    """It can put words on the channel; without the right answers, which are not inside, that is a guess."""
    assert judge(FORGED) == -1.0
    assert judge(FORGED, partial=True) <= 0.5


@needs_isolation
def test_it_cannot_find_the_expected_answers_in_its_process():
    code = "import gc\ndef f():\n    return any('expected' == o for o in gc.get_objects() if isinstance(o, str)) or [\n        k for o in gc.get_objects() if isinstance(o, dict) for k in o if k == 'expected']"
    assert value(code) == []


@needs_isolation
def test_its_children_are_gone_when_it_is():
    mark = f"gspo-child-{os.getpid()}"
    code = f"import os, ctypes, time\nfor _ in range(2):\n    if os.fork() == 0:\n        os.setsid()\n        ctypes.CDLL(None).prctl(15, b'{mark[:15]}', 0, 0, 0)\n        time.sleep(1000)\ndef double(x): return 2 * x"
    seen = []
    with session(code, "functions", LIMITS, "bubblewrap") as process:
        process.receive(), process.receive()
        assert process.call("double", 1) == 2
        deadline = time.monotonic() + 2
        while len(seen) < 2 and time.monotonic() < deadline:
            seen = _named(mark[:15])
    assert len(seen) == 2, "the children could not be seen while they ran"
    deadline = time.monotonic() + 5
    while _named(mark[:15]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _named(mark[:15]) == []


def _named(name):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() == name:
                    found.append(entry.name)
            except OSError:
                continue
    return found


@needs_isolation
def test_it_is_nobody_and_sees_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "x")
    code = "import os\ndef f():\n    return [os.getuid() == 0, 'SECRET_OF_THE_TRAINER' in os.environ, sorted(os.listdir('/'))]"
    as_root, secret, listing = value(code)
    assert not as_root and not secret
    assert set(listing) <= {"dev", "lib", "lib64", "python", "tmp", "usr"}


@needs_isolation
def test_system_calls_that_would_widen_its_world_are_refused():
    """Each returns -1 with EPERM (1): unshare, clone with a new user namespace, socket, memfd_create, io_uring_setup."""
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f(*a):\n    ctypes.set_errno(0)\n    return [libc.syscall(*a), ctypes.get_errno()]"
    )
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    names = sandbox.seccomp._DENIED
    column = ["x86_64", "aarch64"].index(os.uname().machine)
    calls = [(names[n][column], 0x10000000, 0, 0) for n in ("unshare", "socket", "memfd_create", "io_uring_setup")]
    with session(code, "functions", LIMITS, "bubblewrap") as process:
        process.receive(), process.receive()
        for call in [*calls, (clone, 0x10000000 | 17, 0, 0, 0, 0)]:
            assert process.call("f", *call) == [-1, 1], call
        assert process.call("f", 435, 0, 0) == [-1, 38]  # clone3: not there, so that libc falls back to clone


@needs_isolation
def test_no_page_is_kept_in_a_pipe_where_no_limit_counts_it():
    """One page of a huge one keeps all 2 MiB of it when the rest is given back; EPERM is 1."""
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def f():\n    page = ctypes.create_string_buffer(4096)\n    piece = (ctypes.c_size_t * 2)(ctypes.addressof(page), 4096)\n"
        "    return [libc.vmsplice(os.pipe()[1], piece, 1, 0), ctypes.get_errno()]"
    )
    assert value(code) == [-1, 1]


@needs_isolation
def test_memory_is_in_small_pages_which_its_bound_counts():
    """Of 16 huge pages one byte each is touched: 16 x 4 KiB, not 32 MiB. And it stays so: EPERM is 1."""
    code = (
        "import ctypes, mmap, resource\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def touched_kb():\n    area = mmap.mmap(-1, 34 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n    area.madvise(14)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    for i in range(17): area[i << 21] = 1\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "def prctl(*a):\n    ctypes.set_errno(0)\n    return [libc.prctl(*map(ctypes.c_ulong, a)), ctypes.get_errno()]"
    )
    with session(code, "functions", LIMITS, "bubblewrap") as process:
        process.receive(), process.receive()
        assert process.call("touched_kb") < 2048
        assert process.call("prctl", 41, 0, 0, 0, 0) == process.call("prctl", 41, 1, 2, 0, 0) == [-1, 1]
        assert process.call("prctl", 41, 1, 0, 0, 0) == [0, 0] and process.call("prctl", 42, 0, 0, 0, 0) == [1, 0]
        assert process.call("prctl", 15, 0, 0, 0, 0)[1] == 14  # another option reaches the kernel: EFAULT


@needs_isolation
def test_an_event_loop_runs():
    """It needs socketpair, which reaches nothing outside."""
    code = (
        "import asyncio\nasync def g():\n    await asyncio.sleep(0.001)\n    return 7\ndef f(): return asyncio.run(g())"
    )
    assert value(code) == 7


@needs_isolation
def test_its_folder_is_its_own_and_empty_each_time():
    code = "import os\nopen('note', 'w').write('x')\ndef f(): return os.listdir('.')"
    assert value(code) == ["note"]
    assert value("import os\ndef f(): return os.listdir('.')") == []


@needs_isolation
def test_no_listening_port_of_the_machine_is_reached():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket\ndef f():\n    try: socket.create_connection(('127.0.0.1', {port}), 1)\n    except OSError as e: return type(e).__name__"
        assert value(code) == "PermissionError"


def test_where_isolation_is_missing_it_refuses_in_one_line(monkeypatch):
    sandbox_checks.require.cache_clear()
    monkeypatch.setattr(sandbox_checks.shutil, "which", lambda name: None)
    try:
        with pytest.raises(UserError, match="needs bubblewrap .*sandbox=unsafe"):
            CodeTests()([RIGHT], [TESTS])
    finally:
        sandbox_checks.require.cache_clear()


def test_unsafe_runs_without_bubblewrap_and_keeps_limits_of_the_process(monkeypatch):
    monkeypatch.setattr(sandbox_checks.shutil, "which", lambda name: None)
    assert judge(RIGHT, sandbox="unsafe") == 1.0
    bombs = ("memory_bomb",) if sys.platform != "darwin" else ()  # macOS has no limit of the address space
    for attack in ("infinite_loop", *bombs, "writes_1_gb", "prints_forever", "exits_well"):
        assert judge(ATTACKS[attack].replace("/tmp/big", "big"), sandbox="unsafe") == -1.0
    with (
        pytest.raises(SandboxError),
        session("import time; time.sleep(99)", "functions", Limits(wall_s=0.3), "unsafe") as p,
    ):
        p.receive(), p.receive()


@pytest.fixture
def fresh_check():
    """The check of a sandbox runs again in the test, and again after it."""
    sandbox_checks.require.cache_clear()
    yield
    sandbox_checks.require.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process learns that its parent has died")
def test_unsafe_code_ends_with_a_trainer_that_is_killed(tmp_path):
    """As with that of a reward with timeout_s whose process is."""
    script = f"""
from gspo_lightning.rewards.sandbox import Limits, session
code = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(600)"
with session(code, "program", Limits(wall_s=600), "unsafe") as process:
    process.run("")
"""
    trainer = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        trainer.kill()
        trainer.wait(20)
        wait_until(lambda: gone((tmp_path / "pid").read_text()))
    finally:
        trainer.kill()
        subprocess.run(["kill", "-9", (tmp_path / "pid").read_text()], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("isolation", ["unsafe", pytest.param("bubblewrap", marks=needs_isolation)])
def test_limits_of_the_shell_that_are_lower_than_ours_stay_and_right_code_gets_its_reward(
    isolation, monkeypatch, fresh_check
):
    """Hard limits, of 500 KiB for a file and of 60 s of CPU: they cannot be raised, and ours is 4 MiB for a file."""
    popen = sandbox._popen
    shell = ["/bin/sh", "-c", 'ulimit -f 1000; ulimit -t 60; exec "$@"', "sh"]
    monkeypatch.setattr(sandbox, "_popen", lambda command, *rest: popen([*shell, *command], *rest))
    assert judge(RIGHT, sandbox=isolation) == 1.0
    code = (
        "import resource\ndef f(): return [resource.getrlimit(n) for n in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU)]"
    )
    tests = [{"call": "f", "args": [], "expected": [[512000, 512000], [1, 1]]}]
    assert judge(code, tests, sandbox=isolation) == 1.0


@pytest.mark.parametrize(
    ("kind", "hard", "line"),
    [
        (resource.RLIMIT_AS, 195 * 2**20, "limits.memory_mb=512 is more than the 195 that this system allows (`ulimit -Hv`)"),
        (resource.RLIMIT_FSIZE, 2**19, "limits.disk_mb=4 is more than the 0.5 that this system allows (`ulimit -Hf`)"),
        (resource.RLIMIT_CPU, 0, "limits.cpu_s=1 is more than the 0 that this system allows (`ulimit -Ht`)"),
    ],
    ids=["memory", "disk", "cpu"],
)  # fmt: skip
def test_limits_above_those_of_the_system_are_refused_because_right_code_would_fail(kind, hard, line, monkeypatch):
    given = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda of: (hard, hard) if of == kind else given(of))
    with pytest.raises(UserError) as caught:
        CodeTests(sandbox="unsafe", limits=Limits(memory_mb=512, disk_mb=4, cpu_s=1)).check()
    assert str(caught.value) == f"{line}; lower it, or raise the system's limit"


MACOS = """
import resource, sys
sys.platform = "darwin"
def setrlimit(kind, values, real=resource.setrlimit):
    if kind == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    real(kind, values)
resource.setrlimit = setrlimit
"""


def test_on_macos_which_refuses_a_limit_of_the_address_space_right_code_gets_its_reward(monkeypatch, fresh_check):
    monkeypatch.setattr(sandbox, "_RUNNER", MACOS + sandbox._RUNNER)
    assert judge(RIGHT, sandbox="unsafe") == 1.0
    assert judge(ATTACKS["writes_1_gb"].replace("/tmp/big", "big"), sandbox="unsafe") == -1.0


@pytest.mark.parametrize(("platform", "memory"), [("linux", {"RLIMIT_AS": 512 << 20}), ("darwin", {})])
def test_each_limit_is_the_lower_one_of_ours_and_the_systems(platform, memory, monkeypatch):
    hard = {"RLIMIT_NOFILE": 20, "RLIMIT_CPU": 9, "RLIMIT_AS": resource.RLIM_INFINITY}
    names = {getattr(resource, n): n for n in dir(resource) if n.startswith("RLIMIT_") and n != "RLIMIT_OFILE"}
    taken = {}
    fake = {
        "getrlimit": lambda kind: (0, hard.get(names[kind], resource.RLIM_INFINITY)),
        "setrlimit": lambda kind, values: taken.update({names[kind]: values}),
    }
    for name, function in fake.items():
        monkeypatch.setattr(sandbox_runner.resource, name, function)
    monkeypatch.setattr(sandbox_runner.sys, "platform", platform)
    monkeypatch.setattr(sandbox_runner.ctypes, "CDLL", lambda name: type("Libc", (), {"prctl": lambda *a: 0}))
    sandbox_runner.limit({"cpu_s": 5, "memory_mb": 512, "disk_mb": 16, "max_processes": None}, None)
    expected = {"RLIMIT_CORE": 0, "RLIMIT_CPU": 5, "RLIMIT_FSIZE": 16 << 20, "RLIMIT_NOFILE": 20, **memory}
    assert taken == {name: (value, value) for name, value in expected.items()}


def test_where_right_code_does_not_answer_unsafe_refuses_in_one_line(monkeypatch, fresh_check):
    monkeypatch.setattr(sandbox, "_RUNNER", "raise SystemExit(1)")
    with pytest.raises(UserError) as caught:
        judge(RIGHT, sandbox="unsafe")
    assert str(caught.value) == (
        "the code reward with sandbox=unsafe cannot run correct code here (it ended before it answered); see what "
        f"`ulimit -Ha` and `{sys.executable} -I -S -c pass` say"
    )


def test_a_trainer_with_more_than_a_thousand_open_files_can_judge():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this system allows no more than 1024 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        assert judge(RIGHT, sandbox="unsafe") == 1.0
        assert judge("print(input())", [{"input": "y" * 300_000, "output": "y" * 300_000}], sandbox="unsafe") == 1.0
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tests_of_both_forms_can_have_the_nulls_of_arrow():
    """Arrow gives every test of a row the keys of all of them; a null that is expected stays."""
    call = {"call": "f", "args": [], "expected": None, "input": None, "output": None}
    program = {"call": None, "args": None, "expected": None, "input": "", "output": "7"}
    code = "def f(): pass\nif __name__ == '__main__': print(7)"
    assert judge(code, [call, program], sandbox="unsafe") == 1.0
    assert judge(code.replace("7", "8"), [call, program], sandbox="unsafe", partial=True) == 0.5


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Limits(wall_s=0), "limits.wall_s=0"),
        (lambda: Limits(memory_mb=1), "limits.memory_mb=1"),
        (lambda: CodeTests(workers=0), "CodeTests.workers=0"),
        (lambda: CodeTests(tolerance=-1.0), "CodeTests.tolerance"),
        (lambda: CodeTests(failure=1.0), "CodeTests.failure"),
        (lambda: CodeTests(sandbox="docker"), "CodeTests.sandbox='docker'"),
        (lambda: CodeTests(sandbox="unsafe")([""], [[]]), "tests of row 0"),
        (lambda: CodeTests(sandbox="unsafe")([""], [[{"input": None, "output": None}]]), "must have the keys"),
        (lambda: CodeTests(sandbox="unsafe")([""], [[{"assert": "x"}]]), "must have the keys call, args, expected"),
        (
            lambda: CodeTests(sandbox="unsafe")([""], [[{"call": "f", "args": {"a": 1}, "expected": 1}]]),
            "a list as args",
        ),
        (lambda: CodeTests(sandbox="unsafe")([""], [[{"call": "f", "args": "12", "expected": 1}]]), "a list as args"),
        (
            lambda: CodeTests(sandbox="unsafe")([""], [[{"call": 3, "args": [], "expected": 1}]]),
            "the name of a function",
        ),
        (
            lambda: CodeTests(sandbox="unsafe")([""], [[{"call": "f", "args": [np.int64(1)], "expected": 1}]]),
            "args and expected of a test of row 0 of the batch must be JSON",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(build, text):
    with pytest.raises(UserError) as caught:
        build()
    assert text in str(caught.value)
