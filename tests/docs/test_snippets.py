"""Every command and every snippet of the documentation: commands compose and pass the checks, Python runs, YAML parses."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gspo_lightning.config import checks
from gspo_lightning.config.build import build, build_module
from gspo_lightning.data.preview import build_datamodule
from tests.conf.test_groups import resolved
from tests.support import has_module

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
PLUGINS = {"hparams_search=": "hydra_plugins.hydra_optuna_sweeper", "two_processes": "hydra_plugins.hydra_joblib_launcher",
           "slurm_gpu": "hydra_plugins.hydra_submitit_launcher", "submitit_local": "hydra_plugins.hydra_submitit_launcher", "rollout=vllm": "vllm"}  # fmt: skip


def blocks(kind):
    for page in PAGES:
        for number, text in enumerate(
            re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        ):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    for page in PAGES:
        text = page.read_text()
        lines = []
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            lines += block.replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines += re.findall(r"`((?:python|pytest|bash|pip) [^`]+)`", prose)
        for line in dict.fromkeys(lines):
            # `objective=<file of conf/objective>` leaves the choice to the reader, and nothing to check.
            line = re.sub(r"[\w.]+=<[^>]*>", "", line)
            for part in line.split(" && "):
                words = [filled(word) for word in shlex.split(part, comments=True)]
                # Another environment's interpreter, and settings of the environment, are the reader's.
                words = [re.sub(r"^\.venv[\w-]*/bin/", "", w) for w in words if not re.match(r"[A-Z_]+=", w)]
                if words:
                    yield pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")


def filled(word):
    """A path with its placeholders filled in."""
    return re.sub(r"<[^>]*>|…", "x", word)


def jobs(words):
    """The overrides of every job of a command, as Hydra's own grammar splits a sweep."""
    sweep = [word for word in words if not word.startswith("-")]
    if len(sweep) == len(words):
        return [words]
    assert set(words) - set(sweep) == {"-m"}
    choices = []
    for override in OverridesParser.create().parse_overrides(sweep):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line])
    return [list(job) for job in itertools.product(*choices)]


def check_training(words):
    for plugin in (plugin for word in words for mark, plugin in PLUGINS.items() if mark in word):
        if not has_module(plugin):
            pytest.skip(f"needs {plugin}")
    for overrides in jobs(words):
        plain = resolved(*overrides, "hydra.job.num=0")
        checks.check(plain)
        build_module(plain)


def check_script(words):
    script = ROOT / words[0]
    assert script.exists(), f"{words[0]} does not exist"
    # Options of this one are declared in the package.
    home = ROOT / "src/gspo_lightning/migrate/__main__.py" if script.name == "from_trl.py" else script
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in home.read_text(), f"{words[0]} has no {option}"


def check_pip(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    for word in (word for word in words if word != "-e"):
        extra = re.fullmatch(r"(?:gspo-lightning|\.|/path/to/gspo_lightning)\[(\w+)\]", word)
        known = word == "pre-commit" or (extra and extra[1] in project["optional-dependencies"])
        assert word in pinned or known, f"{word} is not the pin of pyproject.toml"


@pytest.fixture
def own_project(tmp_path, monkeypatch):
    """A folder with the reward functions of the README, the tools of docs/multi_turn.md and their configs, entered;
    returns the override that finds it."""
    (python,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "# my_rewards.py" in block)
    (yaml,) = (
        block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "# conf/reward/mine.yaml" in block
    )
    (tmp_path / "my_rewards.py").write_text(python)
    (tmp_path / "conf/reward").mkdir(parents=True)
    (tmp_path / "conf/reward/mine.yaml").write_text(yaml)
    page = (ROOT / "docs/multi_turn.md").read_text()
    (python,) = re.findall(r"```python\n(# my_tools.py.*?)```", page, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n# conf/experiment/with_tools.yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_tools.py").write_text(python)
    (tmp_path / "conf/experiment").mkdir()
    (tmp_path / "conf/experiment/with_tools.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield f"hydra.searchpath=[file://{tmp_path}/conf]"
    sys.modules.pop("my_rewards", None)
    sys.modules.pop("my_tools", None)


@pytest.mark.parametrize("words", list(commands()))
@pytest.mark.filterwarnings("ignore:objective", "ignore:.*almost never act")
def test_a_command_is_one_that_works(words, request):
    match words:
        case ["gspo-train", "--config-dir", "conf", *rest]:
            check_training([*rest, request.getfixturevalue("own_project")])
        case ["python", "train.py" | "evaluate.py", *rest] | ["gspo-train" | "gspo-eval", *rest]:
            check_training(rest)
        case ["python", "-m", "gspo_lightning.data.preview", *rest]:
            build_datamodule([word for word in rest if "=" in word])
        case ["python", "-m", module, *_]:
            assert has_module(module), f"there is no module {module}"
        case ["bash" | "python", script, *_] if script.startswith(("scripts/", "examples/")):
            check_script(words[1:])
        case ["python", "program.py", *_]:
            assert all((ROOT / word).exists() for word in words if word.startswith("examples/"))
        case ["pytest", *rest]:
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
        case ["pip", "install", *rest]:
            check_pip(rest)
        case [".", "activate"]:  # of the environment that scripts/setup.sh makes
            pass
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            pytest.fail(f"a command that no test knows: {' '.join(words)}")


@pytest.mark.parametrize("text", list(blocks("python")))
def test_a_python_snippet_runs(text):
    exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})


def test_a_right_and_long_answer_counts_as_right_under_the_reward_of_the_readme(own_project):
    plain = resolved("reward=mine", own_project)
    checks.check(plain)
    rewards = build_module(plain).rewards
    name, decides = next(iter(rewards.functions.items()))
    completions = [[{"role": "assistant", "content": text}] for text in ("It is 42. " * 100, "It is 41.")]
    assert name == "right" and plain["validation"]["reward"] is None
    assert decides.function(completions, answer=[42, 42]) == [plain["validation"]["threshold"], 0.0]
    assert rewards.functions["brief"].function(completions) == [0.0, 0.91]


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_a_yaml_snippet_parses(text):
    assert OmegaConf.create(text)


def test_the_config_of_a_hydra_project_of_ones_own_composes_with_our_groups(tmp_path):
    (text,) = re.findall(
        r"^```yaml\n# your conf/train.yaml\n(.*?)^```", (ROOT / "docs/reuse.md").read_text(), re.S | re.M
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("folder: here\n")
    (tmp_path / "train.yaml").write_text(text)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        plain = OmegaConf.to_container(compose("train"), resolve=True)
    assert plain["data"] == {"folder": "here"}
    assert build(plain["objective"]).max_completion_length == plain["rollout"]["max_completion_length"] == 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_their_sections_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text()), f"{page.name}: {target}#{anchor}"


def anchors(text):
    """The anchors that GitHub gives to the headings of a page: small letters, hyphens for spaces, no other signs."""
    found = []
    for title in re.findall(r"^#{1,6} +(.+?)[ #]*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = sum(slug == earlier for _, earlier in found)
        found.append((f"{slug}-{again}" if again else slug, slug))
    return [anchor for anchor, _ in found]


def test_anchors_are_those_of_github():
    page = "# A loss: `x_y` (30 lines)\n```bash\n# no heading\n```\n## [Two -- words](a.md) ##\n## Same\n### Same\nKL(π‖π_ref)\n## 2. Übung\n"
    assert anchors(page) == ["a-loss-x_y-30-lines", "two----words", "same", "same-1", "2-übung"]
