"""The card of an exported model, and its way to the hub."""

from __future__ import annotations

import contextlib
import io
import json
from unittest import mock

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from gspo_lightning import cli
from gspo_lightning.errors import UserError
from gspo_lightning.policy import hub
from gspo_lightning.report.model_card import model_card
from tests.conf.test_groups import given

PLAIN = {
    "model": {"path": "Qwen/Qwen2.5-0.5B-Instruct"},
    "objective": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "data": {"task": {"name": "gsm8k"}, "prompts_per_rollout": 8},
    "rollout": {"num_generations": 4},
    "seed": 3,
}
SUMMARY = {
    "steps": 10, "optimizer_steps": 38, "val_accuracy_before": 0.25, "val_accuracy_after": 0.5, "val_sampled_before": 0.125,
    "val_sampled_after": 0.375, "val_reward_before": None, "val_reward_after": 0.4,
}  # fmt: skip


def test_the_card_says_what_the_model_is_and_what_was_measured():
    card = model_card(PLAIN, SUMMARY, is_adapter=True)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "library_name": "peft",
        "tags": ["reinforcement-learning", "gspo", "gspo_lightning"],
    }
    assert "| held-out accuracy, greedy | 0.250 | 0.500 |" in text
    assert "| held-out reward | not measured | 0.400 |" in text
    assert "10 rollouts of 8 prompts with 4 completions each, 38 optimizer steps, seed 3" in text


@pytest.mark.parametrize(
    ("loss", "level", "tag", "said"),
    [
        ("grpo", "sequence", "gspo", "trained by GSPO\n\nGSPO (`loss_type=grpo`, importance ratio per sequence) on"),
        ("grpo", "sequence_token", "gspo", "trained by GSPO\n\nGSPO (`loss_type=grpo`, importance ratio per sequence_token) on"),
        ("grpo", "token", "grpo", "trained by GRPO\n\nGRPO (`loss_type=grpo`, importance ratio per token) on"),
        ("sapo", "sequence", "sapo", "trained by SAPO\n\nSAPO (`loss_type=sapo`, importance ratio per sequence) on"),
        ("dr_grpo", "token", "dr-grpo", "trained by Dr. GRPO\n\nDr. GRPO (`loss_type=dr_grpo`, importance ratio per token) on"),
        ("vespo", "token", "vespo", "trained by VESPO\n\nVESPO (`loss_type=vespo`) on"),
        ("reinforce", "token", "reinforce", "trained by REINFORCE\n\nREINFORCE (`loss_type=reinforce`) on"),
        ({"_target_": "hydra.utils.get_method", "path": "mine.gated"}, "token", "gated", "trained by gated\n\ngated (`loss_type=gated`, importance"),
    ],
)  # fmt: skip
def test_the_card_names_the_loss_that_was_minimised(loss, level, tag, said):
    plain = {**PLAIN, "objective": {"importance_sampling_level": level, "loss_type": loss}}
    _, front, text = model_card(plain, SUMMARY, is_adapter=False).split("---\n", 2)
    assert yaml.safe_load(front)["tags"][1] == tag and said in text


@pytest.mark.parametrize("path", ["bundled:micro", "/my/folder", "./folder/model", "folder", "models/tiny"])
def test_a_folder_is_not_named_as_a_model_of_the_hub(path, tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    _, front, _ = model_card({**PLAIN, "model": {"path": path}}, SUMMARY, is_adapter=False).split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["reinforcement-learning", "gspo",
                                                                             "gspo_lightning"]}  # fmt: skip


class ConnectTimeoutError(Exception):
    """As those of the client that the hub's library calls: neither its own nor an OSError, and without a message."""


class Api:
    """A hub that remembers; it refuses what is called refused."""

    calls: list[tuple[str, object]]

    def create_repo(self, repository, **options):
        if "refused" in repository:
            raise HfHubHTTPError("403 Forbidden\nmore", response=mock.Mock(headers={}))
        if "unreachable" in repository:
            raise ConnectTimeoutError
        self.calls.append((repository, options))
        return f"https://hub/{repository}"

    def upload_folder(self, **options):
        self.calls.append(("upload", options))


@pytest.fixture
def api(monkeypatch):
    Api.calls = []
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
    return Api


def train(folder, *overrides):
    cfg = given("experiment=micro", "max_rollouts=1", *overrides, run_dir=folder)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        cli._train(cfg)
    return screen.getvalue()


def test_a_run_uploads_its_export_with_the_card(api, tmp_path):
    screen = train(tmp_path, "export.push_to_hub=me/my-model", "export.private=false")
    assert "uploaded to https://hub/me/my-model" in screen
    (made, options), (_, upload) = api.calls
    assert made == "me/my-model" and options == {"private": False, "exist_ok": True}
    assert upload["folder_path"] == tmp_path / "model"
    summary = json.loads((tmp_path / "summary.json").read_text())
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| held-out reward | {summary['val_reward_before']:.3f} | {summary['val_reward_after']:.3f} |" in card


def test_a_refused_upload_is_one_line_that_says_where_the_model_lies(api, tmp_path):
    with pytest.raises(UserError, match=r"push_to_hub=me/refused: 403 Forbidden; the model is in /tmp/model$"):
        hub.push(tmp_path.__class__("/tmp/model"), "me/refused", private=True)
    with pytest.raises(UserError, match=r"=me/unreachable: ConnectTimeoutError; the model is in /tmp/model$"):
        hub.push(tmp_path.__class__("/tmp/model"), "me/unreachable", private=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("me/x", False, True), "export.push_to_hub=me/x has no effect with export.enabled=false"),
        (("not a name!", True, True), "export.push_to_hub=not a name!: not the name of a repository"),
        ((None, True, False), "export.private=false has no effect without export.push_to_hub"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_run(settings, message, api):
    repository, exported, private = settings
    with pytest.raises(UserError, match=f"^{message}"):
        hub.check_push(repository, exported=exported, private=private)


def test_a_missing_token_is_refused_before_the_run(api, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token: hf auth login"):
        hub.check_push("me/x", exported=True, private=True)
