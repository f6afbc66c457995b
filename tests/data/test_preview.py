"""The preview shows what the model sees, to the last special token, and every data config composes."""

from __future__ import annotations

import io
import sys
from importlib.resources import files
from pathlib import Path
from runpy import run_module

import pytest
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from gspo_lightning.data import PromptDataModule
from gspo_lightning.data.preview import build_datamodule, main
from gspo_lightning.errors import UserError

CONFIGS = sorted(path.name.removesuffix(".yaml") for path in files("gspo_lightning.conf").joinpath("data").iterdir())


def _preview(*arguments: str) -> str:
    screen = io.StringIO()
    main(arguments, Console(file=screen, width=100))
    return screen.getvalue()


def test_the_preview_shows_template_tokens_counts_and_columns(tokenizer_dir: str) -> None:
    text = _preview("data=arithmetic", "model=path", f"model.path={tokenizer_dir}", "--num", "1")
    assert "arithmetic:train:0" in text and "<|im_start|>user" in text and "<|im_start|>assistant" in text
    # A token per character: 6 for "<|im_start|>user\n", 2 for "<|im_end|>\n", 11 where the assistant begins.
    (question,) = (line.strip("│ ").removesuffix("<|im_end|>") for line in text.splitlines() if "What is" in line)
    assert f" {6 + len(question) + 2 + 11} tokens " in text
    a, _, b = question.removeprefix("What is ").split("?")[0].split()
    assert f"answer: {int(a) + int(b)}" in text and "training rows: endless; held-out rows: 20" in text


def test_the_preview_of_the_held_out_rows_shows_them(tokenizer_dir: str) -> None:
    text = _preview("data=micro_letters", "model=path", f"model.path={tokenizer_dir}", "--validation", "--num", "9")
    assert "micro_letters:validation:7" in text and "train" not in text.replace("training rows", "")
    assert "8 prompts of 4 to 4 tokens (max_prompt_length 128)" in text


def test_the_preview_of_a_small_file_shows_each_row_once_and_finds_its_mistakes(
    tokenizer_dir: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(5)))
    overrides = ["data=rows", "model=path", f"model.path={tokenizer_dir}", f"data.task.source={path}"]
    text = _preview(*overrides, "data.task.num_validation=1", "data.prompts_per_rollout=2", "--num", "9")
    assert text.count("question ") == 4 and "4 prompts of" in text
    with pytest.raises(UserError, match=r"data\.prompts_per_rollout=8 is more than the 4 training rows"):
        _preview(*overrides, "data.task.num_validation=1")


def test_a_data_config_of_another_project_is_previewed(tokenizer_dir: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [micro_letters]\ntask: {num_validation: 3}\n")
    text = _preview("--config-dir", str(tmp_path), "data=mine", "model=path", f"model.path={tokenizer_dir}")
    assert "held-out rows: 3" in text
    with pytest.raises(UserError, match="--config-dir=nowhere: there is no such folder"):
        _preview("--config-dir", "nowhere", "data=mine")


def test_a_file_of_ones_own_with_a_name_of_ours_is_refused_as_by_a_run(tokenizer_dir: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "micro_digit.yaml").write_text("defaults: [micro_letters]\ntask: {num_validation: 3}\n")
    arguments = ("data=micro_digit", "model=path", f"model.path={tokenizer_dir}")
    line = f"{tmp_path}/data/micro_digit.yaml is not read: data/micro_digit.yaml is a name of ours, which goes first"
    for given in (("--config-dir", str(tmp_path)), (f"hydra.searchpath=['file://{tmp_path}']",)):
        with pytest.raises(UserError, match=f"^{line}; give it another name, and choose that$"):
            _preview(*given, *arguments)
    assert "held-out rows" in _preview(*arguments)


def test_a_folder_that_hydra_knows_is_known_to_the_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(20)))
    monkeypatch.chdir(tmp_path)
    rows = ["data=rows", "data.task.source='${hydra:runtime.cwd}/rows.jsonl'", "data.task.num_validation=2"]
    before = HydraConfig.instance().cfg  # what another test has left there
    assert "training rows: 18; held-out rows: 2" in " ".join(_preview(*rows, "model=micro").split())
    assert HydraConfig.instance().cfg is before


def test_a_preview_of_nothing_is_refused(tokenizer_dir: str) -> None:
    overrides = ["data=micro_letters", "model=path", f"model.path={tokenizer_dir}"]
    with pytest.raises(UserError, match="--num=0 must be at least 1"):
        _preview(*overrides, "--num", "0")
    with pytest.raises(UserError, match=r"--validation: there are no held-out rows; raise data\.task\.num_validation"):
        _preview(*overrides, "data.task.num_validation=0", "--validation")


def test_the_preview_calls_nothing_that_a_run_would_refuse_to_call(tmp_path: Path) -> None:
    call = ["~data.task.letters", "~data.task.num_validation", f"+data.task.name={tmp_path}/made"]
    with pytest.raises(
        UserError, match=r"^data\.task\._target_=os\.mkdir is not on the list of what a config may call"
    ):
        build_datamodule(["data=micro_letters", "model=micro", "data.task._target_=os.mkdir", *call])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_data_config_becomes_a_data_module(name: str, tokenizer_dir: str) -> None:
    overrides = [f"data={name}", "model=path", f"model.path={tokenizer_dir}", "seed=7"]
    needs = {
        "rows": "data.task.source=x.jsonl",
        "multiple_choice": "data.task.source=x.jsonl",
        "image_folder": "data.task.source=x",
        "reasoning_gym": "data.task=gcd",
    }
    data = build_datamodule([*overrides, *([needs[name]] if name in needs else [])])
    assert isinstance(data, PromptDataModule)
    # The seed of the run reaches the order of rows, or the task that draws its own.
    finite = name in ("rows", "gsm8k", "math", "multiple_choice", "easy_vqa", "mathvista", "image_folder")
    assert (data.model_path, data.stream.seed) == (tokenizer_dir, 7 if finite else 0)
    assert finite or getattr(data.task, "seed", 7) == 7


def test_gsm8k_takes_the_answer_behind_the_hashes(tokenizer_dir: str, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "How many?", "answer": "First 600.\\nThen twice that.\\n#### 1,200"}\n')
    data = build_datamodule(
        ["data=gsm8k", "model=path", f"model.path={tokenizer_dir}", f"data.task.source={path}",
         "data.task.config_name=null", "data.task.validation_split=null", "data.task.num_validation=0"]
    )  # fmt: skip
    row = data.task.train_row(0)
    assert row["answer"] == "1,200"
    assert row["prompt"][0]["content"].startswith("How many?\nWork it out")


@pytest.mark.filterwarnings("ignore:.*gspo_lightning.data.preview.*found in sys.modules:RuntimeWarning")
def test_the_command_takes_its_flags_between_overrides_and_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["preview", *words])
        run_module("gspo_lightning.data.preview", run_name="__main__")
        return capsys.readouterr().out

    text = shown("data=micro_letters", "--num", "2", "model=micro", "--validation", "data.task.num_validation=5")
    assert "micro_letters:validation:1" in text and "validation:2" not in text and "held-out rows: 5" in text
    for mistake, line in (("letters", "'letters' cannot be read as key=value"), ("data=none", "In 'train': Could not")):
        with pytest.raises(SystemExit, match="^2$"):
            shown(mistake, "--num", "1")
        said = capsys.readouterr().err
        assert said.startswith(f"error: {line}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "data.task.num_validation=0.5",
            "data.task.num_validation=0.5 has the wrong type; expected a whole number or null",
        ),
        ("data.task.num_validation=-1", "data.task.num_validation=-1 must be at least 0"),
        ("data.overlong_prompts=cut", "data.overlong_prompts='cut' is not one of error, drop"),
        ("data.prompts_per_rollout=0", "data.prompts_per_rollout=0 must be at least 1"),
        ("data.max_prompt_length=null", "data.max_prompt_length=None must be a whole number"),
        ("~data.max_prompt_length", "data.max_prompt_length: is missing; give it a value"),
        ("+data.task.typo=1", "data.task.typo: gspo_lightning.data.RowsTask has no such setting; it has columns,"),
        ("data.task.source=???", "data.task.source: is missing; give it a value"),
        ("+data.task.patterns={prompt: a}", "data.task.patterns.prompt='a': put parentheses around the part to keep"),
    ],
)
def test_what_a_run_would_refuse_of_the_data_is_refused_in_the_same_line(
    override: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(20)))
    rows = ["data=rows", f"data.task.source={tmp_path}/rows.jsonl", "data.task.num_validation=2"]
    with pytest.raises(UserError) as refused:
        _preview(*rows, "model=micro", override)
    assert str(refused.value).removeprefix(f"{tmp_path}/rows.jsonl row 0: ").startswith(line)
