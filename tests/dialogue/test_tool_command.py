"""`environment=tools` from the command line, as docs/multi_turn.md shows it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from gspo_lightning import cli
from gspo_lightning.config import checks
from gspo_lightning.config.build import build, build_data
from gspo_lightning.data.preview import build_datamodule
from gspo_lightning.errors import UserError
from tests.conf.test_groups import given, resolved
from tests.dialogue.tool_support import TEMPLATE, call, heard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PAGE = (Path(__file__).parents[2] / "docs/multi_turn.md").read_text()
ROWS = [{"question": f"{n} + 3?", "answer": str(n + 3), "documents": ["a tea", "a b"]} for n in range(6)]


@pytest.fixture()
def project(tmp_path, monkeypatch, micro_model_dir):
    """The page's files in a folder, entered, with rows and a model that knows tools; the overrides that use them."""
    (python,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S) if text.startswith("# my_tools.py"))
    (yaml,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "with_tools.yaml" in text)
    (tmp_path / "my_tools.py").write_text(python)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/with_tools.yaml").write_text(yaml.partition("\n")[2])
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shutil.copytree(micro_model_dir, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield [f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=with_tools", "model.path=model"]
    sys.modules.pop("my_tools", None)  # another test's file has that name too


def test_the_tools_of_the_page_are_shown_by_the_prompts_and_can_be_called(project):
    plain = resolved(*project, "data.task.num_validation=2", "data.prompts_per_rollout=4")
    checks.check(plain)
    data = build_data(plain, build(plain["reward"]))
    prompt = data.batch_at(0).prompts[0]
    shown = data.tokenizer.decode(prompt.input_ids)
    assert all(f'"name": "{name}"' in shown for name in ("add", "search")) and '"name": "reset"' not in shown
    tools = build(plain["environment"])
    assert data.chat_template_kwargs == tools.chat_template_kwargs
    dialogue = tools.begin(prompt, 0, data.tokenizer)
    turn = call("add", '{"a": 0.5, "b": 3}') + call("search", '{"word": "tea"}')
    heard(dialogue, turn, (data.tokenizer.eos_token_id,))
    assert [message["content"] for message in dialogue.messages[1:]] == ["3.5", '["a tea"]']
    shown_by_preview = build_datamodule([*project, "data.prompts_per_rollout=4"]).chat_template_kwargs
    assert shown_by_preview == data.chat_template_kwargs


def test_a_run_with_tools_leaves_their_metrics(project, tmp_path):
    small = ["data.task.num_validation=2", "data.prompts_per_rollout=2", "rollout.num_generations=2",
             "rollout.max_completion_length=8", "max_rollouts=1", "logger=none", "export.enabled=false",
             "trainer.accelerator=cpu", "update.num_minibatches=2", "model.dtype=float32"]  # fmt: skip
    cfg = given(*project, *small, run_dir=tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        cli._train(cfg)
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open(newline="")))
    (rollout,) = (row for row in rows if row["dialogue/turns"])  # the others are validations
    assert rollout["dialogue/tool_calls"] == "0.0"  # random letters call nothing, so there is no share of failures
    assert rollout.get("dialogue/tool_failures", "") == ""


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.task.conversational=false"], r"^row rows:\S+ the prompt is a plain string, but tools are shown by the chat "),
        (["data.chat_template_kwargs.tools=[my_tools.add]"], "^environment.chat_template_kwargs.tools are others than"),
        (["environment.functions=[my_tools.subtract]"], "^environment.functions: cannot import my_tools.subtract"),
        (["reward=environment"], "^reward.functions.environment: functions give no reward; name a class with a reward method"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_run(project, overrides, line):
    plain = resolved(*project, "data.task.num_validation=2", "data.prompts_per_rollout=4", *overrides)
    with pytest.raises(UserError, match=line):
        checks.check(plain)
        build_data(plain, build(plain["reward"]))
