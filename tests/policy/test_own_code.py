"""Code that a model brings along is never run, whatever is typed at the terminal."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest

import gspo_lightning
from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.processor import load_processor
from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor
from tests.vision.models import small_config

SOURCES = sorted(Path(gspo_lightning.__file__).parent.rglob("*.py"))
REFUSAL = "needs code from the model's repository, which is never run; choose a model that transformers supports itself"


def loading_calls(source: str) -> list[ast.Call]:
    """Calls of ``from_pretrained`` and ``from_config``, but those of a class that is named: its code is known."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loading = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in ("from_pretrained", "from_config")
    ]
    return [c for c in loading if not ast.unparse(c.func)[0].isupper() or ast.unparse(c.func).startswith("Auto")]


def test_every_call_that_could_run_it_says_no():
    calls = [(path.name, call) for path in SOURCES for call in loading_calls(path.read_text(encoding="utf-8"))]
    assert {name for name, _ in calls} >= {
        "fake.py", "load.py", "processor.py", "reading.py", "reward_model.py", "smollm2.py", "tiny_vlm.py",
    }  # fmt: skip
    for name, call in calls:
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert said.get("trust_remote_code") == "False", f"{name}:{call.lineno}"


def bring_code(folder: Path, file: str, auto_map: dict[str, object], **entries: str) -> None:
    """Lets one file of a model's folder name code that lies beside it."""
    (folder / "own_code.py").write_text("raise SystemExit('the code of the model ran')\n")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | entries | {"auto_map": auto_map}))


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("transformers asked whether to run the code"))


@pytest.mark.parametrize(
    ("file", "auto_map", "entries", "what"),
    [
        ("config.json", {"AutoConfig": "own_code.C"}, {"model_type": "unknown_x"}, "config.json"),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own_code.T"]}, {"tokenizer_class": "T"}, "the tokenizer"),
    ],
)
def test_a_model_with_code_is_refused_in_one_line(file, auto_map, entries, what, micro_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(micro_model_dir, folder)
    bring_code(folder, file, auto_map, **entries)
    with pytest.raises(UserError) as error:
        PolicyLoader(str(folder)).load()
    assert str(error.value) == f"model.path={folder}: {what} {REFUSAL}"


def test_so_is_a_processor_with_code(smollm2_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("gspo_lightning.policy.processor._has_video_half", lambda _: True)
    folder = tmp_path / "model"
    small_config(SPECIAL_IDS).save_pretrained(folder)
    build_processor(smollm2_dir, tmp_path).save_pretrained(folder)
    bring_code(folder, "processor_config.json", {"AutoProcessor": "own_code.P"}, processor_class="P")
    with pytest.raises(UserError) as error:
        load_processor(str(folder))
    assert str(error.value) == f"model.path={folder}: the processor {REFUSAL}"
