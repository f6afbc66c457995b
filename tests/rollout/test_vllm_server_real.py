"""A real vLLM server, started by the script that users run: sampling, weights, an adapter, and a restart."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.micro import build_micro_model
from gspo_lightning.rollout import EngineUnavailableError, VLLMServerEngine
from gspo_lightning.types import SamplingParams
from tests.rollout.test_vllm_engine import largest_difference, move
from tests.support import make_prompt, micro_policy

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8)
PROMPTS = [make_prompt(torch.arange(n, n + 70) % 90 + 3, uid=f"t:{n}") for n in range(3)]
KEY = "the key"


def serve(folder, *options):
    """The script's process group and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["bash", "scripts/serve_rollouts.sh", "--model", str(folder), "--port", str(port), "--dtype", "float32",
               "--max-model-len", "96", *options]  # fmt: skip
    environment = {**os.environ, "GSPO_VLLM_VENV": sys.prefix, "GSPO_ROLLOUT_KEY": KEY, "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    return process, port


def stop(process, how=signal.SIGTERM):
    os.killpg(process.pid, how)
    process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("micro32")
    build_micro_model(path, num_attention_heads=2)
    return path


@pytest.fixture()
def engine(monkeypatch):
    monkeypatch.setenv("GSPO_ROLLOUT_KEY", KEY)
    engines = []

    def make(*ports):
        engines.append(VLLMServerEngine([f"http://127.0.0.1:{port}" for port in ports], 80, 12, ready_timeout_s=180))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def test_full_weights_over_two_servers_and_the_death_of_one(folder, engine):
    policy = micro_policy(folder, torch.float32)
    processes, ports = zip(serve(folder), serve(folder), strict=True)
    try:
        both = engine(*ports)
        for seed in range(3):
            assert largest_difference(policy, both.generate(policy, PROMPTS, SAMPLING, seed)) < 1e-4
            move(policy, seed)
        stop(processes[0], signal.SIGKILL)
        assert largest_difference(policy, both.generate(policy, PROMPTS, SAMPLING, 3)) < 1e-4
    finally:
        for process in processes:
            if process.poll() is None:
                stop(process)


def test_an_adapter_travels_alone(folder, engine):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=4, alpha=8)).load()
    process, port = serve(folder, "--lora", "4")
    try:
        one = engine(port)
        for seed in range(3):
            assert largest_difference(policy, one.generate(policy, PROMPTS, SAMPLING, seed)) < 1e-4
            assert sorted(path.name for path in one._weights.path.iterdir() if path.suffix != ".md") == [
                "adapter_config.json", "adapter_model.safetensors",
            ]  # fmt: skip
            move(policy, seed)
    finally:
        stop(process)


def test_a_server_that_got_all_weights_says_so_to_a_run_with_an_adapter(folder, engine):
    process, port = serve(folder, "--lora", "4")
    try:
        whole = micro_policy(folder, torch.float32)
        assert largest_difference(whole, engine(port).generate(whole, PROMPTS, SAMPLING, 0)) < 1e-4
        policy = PolicyLoader(str(folder), lora=LoraSettings(r=4, alpha=8)).load()
        late = VLLMServerEngine([f"http://127.0.0.1:{port}"], 80, 12, ready_timeout_s=1)
        with pytest.raises(
            EngineUnavailableError, match="no longer has the base of the adapter: another run replaced it"
        ):
            late.generate(policy, PROMPTS, SAMPLING, 0)
        late.close()
    finally:
        stop(process)
