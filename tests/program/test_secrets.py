"""No secret reaches what a run writes or shows, or a server that has no business with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import open_dict

from gspo_lightning import cli
from gspo_lightning.errors import UserError
from gspo_lightning.program.redact import masked, names_a_secret, redacted
from gspo_lightning.rollout import VLLMServerEngine
from gspo_lightning.rollout.http_client import Server
from tests.command_line import run
from tests.conf.test_groups import given


def test_keys_that_name_a_secret_and_values_of_such_variables_are_masked(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "hf_abcdefgh")
    plain = {
        "api_key": "k",
        "hub": {"token": "t", "password": "p"},
        "url": "https://me:hf_abcdefgh@host",
        "list": ["hf_abcdefgh"],
        "max_tokens": 5,
        "target_tokens": "7",
        "api_key_env": "HUB_TOKEN",
        "token": None,
        "tokenizer": "x",
        "openai_key": "k",
        "hf_token_value": "t",
        "wandb_api_key_2": "k",
        "MySecretKey": "k",
        "secrets": {"a": "b", "list": ["c", 4], "off": None, "password": 5},
        "db_password": 1234,
        "eos_token": "<end>",
        "pad_token_id": 3,
        "importance_sampling_level": "token",
        "keys": ["a"],
        "session_tokens": 4096,
        "hf_tokens": ["t", "u"],
        "first_pass": 1.0,
        "random_key": 7,
        "num_passwords": 3,
        "use_password": True,
        "goals": {"val/pass@8": 0.5, "file_pat": "*.jsonl"},
        "headers": {"Authorization": "Bearer abc"},
        "dsn": "postgres://me:p@ss:w0rd@host/db?x=1",
        "urls": ["redis://:pw@host", "http://127.0.0.1:8000", "http://host:80/a@b"],
    }
    assert redacted(plain) == {
        "api_key": "***",
        "hub": {"token": "***", "password": "***"},
        "url": "https://me:***@host",
        "list": ["***"],
        "max_tokens": 5,
        "target_tokens": "7",
        "api_key_env": "HUB_TOKEN",
        "token": None,
        "tokenizer": "x",
        "openai_key": "***",
        "hf_token_value": "***",
        "wandb_api_key_2": "***",
        "MySecretKey": "***",
        "secrets": {"a": "***", "list": ["***", 4], "off": None, "password": "***"},
        "db_password": "***",
        "eos_token": "<end>",
        "pad_token_id": 3,
        "importance_sampling_level": "token",
        "keys": ["a"],
        "session_tokens": 4096,
        "hf_tokens": ["***", "***"],
        "first_pass": 1.0,
        "random_key": 7,
        "num_passwords": 3,
        "use_password": True,
        "goals": {"val/pass@8": 0.5, "file_pat": "*.jsonl"},
        "headers": {"Authorization": "***"},
        "dsn": "postgres://me:***@host/db?x=1",
        "urls": ["redis://:***@host", "http://127.0.0.1:8000", "http://host:80/a@b"],
    }
    assert plain["hub"]["token"] == "t"


SECRET = (
    "PGPASSWORD MYSQL_PWD DB_PASS GITHUB_PAT api_keys hf_tokens OPENAI_APIKEY authToken MYPASSWORD HF_TOKENS_2 "
    "SMTP_PASS userPwd gh_pat hub_pat db_pass_2 aws_secrets credentials "
    "key api_key access_key AWS_ACCESS_KEY_2 secret_key private_key ssh_key signing_key master_key session_key "
    "encryption_key account_key OPENAI_KEY anthropicKey SOME_VENDOR_KEY GSPO_A_KEY image_api_key answer_secret_key VISION_KEY FUNCTION_KEY "
    "COSMOS_PRIMARY_KEY cosmos_primary_key cosmosPrimaryKey2 AZURE_SEARCH_QUERY_KEY TRANSLATOR_TEXT_KEY"
)
HARMLESS = (
    "first_pass max_pass num_pass val/pass@8 val_pass@1 pass@k file_pat glob_pat HOST_PWD OLD_PWD APPTAINER_PWD "
    "PWD OLDPWD pass PATH pat path forward_mask max_tokens special_tokens tokens keys metric_keys tokenizer token_mask "
    "passes bypass compass SSH_ASKPASS patterns API_KEY_ENV key_file eos_token token_id num_pass_through "
    "answer_key answersKey image_key images_key primary_key foreign_key sort_key cache_key prompt_key input_key "
    "label_key reward_fn_key class_key public_key ground_truth_key solution_key_2"
)


def test_names_of_secrets_are_told_from_others():
    assert [name for name in SECRET.split() if not names_a_secret(name)] == []
    assert [name for name in HARMLESS.split() if names_a_secret(name)] == []


def test_a_value_typed_under_a_harmless_key_is_no_secret_elsewhere(monkeypatch):
    typed = [
        "data.task.answer_key=solution",
        "file_pat=policy.jsonl",
        "+x.session_tokens=100000",
        "random_key=200000",
        "+db.password=300000",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed, "~hf_token=hf_abcdef", "smtp_pass='quoted'"])
    line = "solution policy.jsonl 100000 200000 300000 hf_abcdef quoted"
    assert masked(line) == "solution policy.jsonl 100000 200000 *** *** ***"


def test_a_number_in_a_variable_that_names_a_secret_is_masked_and_a_folder_is_not(monkeypatch, tmp_path):
    for name, value in {"GSPO_A_KEY": "12345678", "USER_PWD": str(tmp_path), "DB_PWD": "/aB3x9"}.items():
        monkeypatch.setenv(name, value)
    assert masked(f"12345678 {tmp_path}/x /aB3x9") == f"*** {tmp_path}/x ***"


def keys_of(node):
    for key, value in node.items() if isinstance(node, dict) else ():
        yield str(key)
        yield from keys_of(value)


def test_no_key_of_ours_is_taken_for_a_secret():
    conf = Path(cli.__file__).parents[2] / "conf"
    keys = {key for file in conf.rglob("*.yaml") for key in keys_of(yaml.safe_load(file.read_text()))}
    assert {"api_key_env", "max_tokens_per_microbatch"} <= keys
    assert {key for key in keys if names_a_secret(key)} == set()


def test_a_password_in_an_address_is_masked_in_every_line():
    assert masked("error: http://me:secret@host:80/x: no answer") == "error: http://me:***@host:80/x: no answer"
    assert masked("https://u:p,w?x#y@h postgres://u:80pw@h") == "https://u:***@h postgres://u:***@h"
    assert masked("http://a:8000,http://u:p@h") == "http://a:8000,http://u:***@h"
    harmless = (
        "['http://a:1','me@x'] http://a:1 me@x http://x.com:80?e=a@b.com http://127.0.0.1:8000,user@x "
        "http://x.com:80#a@b docker://ubuntu:22.04@sha256:abc docker://repo:5000@sha256:abc"
    )
    assert masked(harmless) == harmless


def test_a_config_sends_no_other_secret_to_the_servers_it_names(monkeypatch):
    with pytest.raises(UserError) as error:
        VLLMServerEngine(["http://elsewhere.example:8000"], 8, 8, api_key_env="HF_TOKEN")
    assert str(error.value) == (
        "rollout.engine.api_key_env=HF_TOKEN must begin with GSPO_; put the servers' key into such a variable "
        "(GSPO_ROLLOUT_KEY)"
    )
    monkeypatch.setenv("GSPO_OTHER_KEY", "k1")
    engine = VLLMServerEngine(["http://127.0.0.1:8000"], 8, 8, api_key_env="GSPO_OTHER_KEY")
    assert [member.server._api_key for member in engine.pool.members] == ["k1"]


@pytest.mark.parametrize("key", ["hunter2-key\n", " hunter2-key", "hunter2\r\nX: y", "hunter2-schlüssel"])
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(key, monkeypatch):
    monkeypatch.setenv("GSPO_ROLLOUT_KEY", key)
    with pytest.raises(
        UserError, match="^the environment variable GSPO_ROLLOUT_KEY .* set it to the key alone$"
    ) as error:
        VLLMServerEngine(["http://127.0.0.1:8000"], 8, 8)
    assert "hunter2" not in str(error.value)


def test_a_password_in_an_address_of_a_server_is_refused_and_not_repeated():
    with pytest.raises(UserError) as error:
        Server("http://me:hunter2@host:8000/v")
    assert str(error.value) == (
        "rollout.engine.urls: the name and password of http://***@host are not sent; remove them, and put the servers' "
        "key into the variable that rollout.engine.api_key_env names"
    )


def test_no_file_of_a_run_and_nothing_on_the_screen_holds_a_secret(tmp_path, monkeypatch, capfd):
    secret = "hf_do_not_tell_9f2c"
    monkeypatch.setenv("MY_API_KEY", secret)
    cfg = given(
        "experiment=micro", "max_rollouts=2", "logger=tensorboard", "checkpoint.every_n_rollouts=1",
        run_dir=tmp_path / "run",
    )  # fmt: skip
    with open_dict(cfg):
        cfg.note = {"api_key": "${oc.env:MY_API_KEY}", "url": "https://${oc.env:MY_API_KEY}@host", "rollouts": 2}
        cfg.max_rollouts = "${note.rollouts}"  # a part of the user's own needs something that refers to it
    cli._train(cfg)
    out, err = capfd.readouterr()
    assert secret not in out + err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "last.ckpt"} <= {path.name for path in files}
    assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
    assert "***" in (tmp_path / "run" / "config.yaml").read_text()


def test_hydra_masks_the_command_line_of_a_job_that_fails(tmp_path):
    command = ["experiment=micro", "update.num_minibatches=3", "+my_token=hunter2secret", f"hydra.sweep.dir={tmp_path}"]
    done = run("-m", *command, expect=2)
    assert "Error executing job with overrides" in done.stderr and "+my_token=***" in done.stderr
    assert "hunter2secret" not in done.stdout + done.stderr
