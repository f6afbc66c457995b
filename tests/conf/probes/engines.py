"""What each argument of the policy and of the vLLM engines does."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import EngineUnavailableError, VLLMEngine, vllm_engine
from gspo_lightning.types import SamplingParams
from tests.conf.probes.base import Probe, built, or_error
from tests.rollout.fake_server import FakeServer
from tests.scripted import Settings, build_module
from tests.support import make_prompt


def policy(node: dict[str, Any], folder: Path) -> Any:
    """What is loaded, in which dtype, what of it is trained, and whether activations are kept."""

    def load() -> Any:
        model = built(node).load_model() if node["quantization"] else built(node).load().model
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
        config = model.config
        settings = (model.is_gradient_checkpointing, len(compiled), config.rms_norm_eps, config.hidden_size)
        return next(model.parameters()).dtype, trained, settings, config._attn_implementation

    return or_error(load)


LOADER = PolicyLoader("bundled:micro", lora=LoraSettings(r=4))


@contextlib.contextmanager
def fake_vllm(started: list[Any]) -> Iterator[None]:
    """A vLLM that remembers how it was started."""

    class LLM(mock.MagicMock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            started.append((args, kwargs))

        def _get_child_mock(self, **kwargs: Any) -> Any:
            return mock.MagicMock(**kwargs)

    module = types.ModuleType("vllm")
    module.LLM = LLM  # type: ignore[attr-defined]
    with (
        mock.patch.object(
            vllm_engine, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: module))
        ),
        mock.patch.object(VLLMEngine, "_send"),
        mock.patch.object(VLLMEngine, "_prove"),
        mock.patch.dict(os.environ),
        mock.patch("atexit.register"),
    ):
        # Not by patch.dict: it would forget every module that is imported meanwhile.
        before = sys.modules.get("vllm")
        sys.modules["vllm"] = module
        try:
            yield
        finally:
            del sys.modules["vllm"]
            if before is not None:
                sys.modules["vllm"] = before


def vllm(node: dict[str, Any], folder: Path) -> Any:
    """The call that starts the engine, and the bound of its proof."""
    started: list[Any] = []
    with fake_vllm(started):

        def start() -> Any:
            engine = built(node)
            engine._start(LOADER.load())
            tolerance, folder_of_adapter = engine._fingerprint.tolerance, engine._folder
            folder_of_adapter.cleanup()
            return str(started), tolerance, engine._send.call_count

        return or_error(start)


def vllm_server(node: dict[str, Any], folder: Path) -> Any:
    """What a server is asked, with which key, where the weights lie, and the patience of the pool."""
    micro = Path(resolve_model("bundled:micro"))
    first, second = FakeServer(micro), FakeServer(micro)
    (folder / "elsewhere").mkdir(parents=True, exist_ok=True)
    places = {"first": first.url, "second": second.url}
    changed = node | {"urls": [places[name] for name in node["urls"]], "sync_dir": str(folder / node["sync_dir"])}
    keys = {"GSPO_ROLLOUT_KEY": "one", "GSPO_OTHER_KEY": "two"}
    sampling = SamplingParams(num_generations=2, max_completion_length=4, temperature=1.0)
    try:
        with mock.patch.dict(os.environ, keys):
            engine = built(changed)

        def ask() -> Any:
            engine.generate(LOADER.load(), [make_prompt([5, 6, 7])], sampling, 0)
            where = str(engine._folder.name if engine._folder else "").startswith(str(folder / "elsewhere"))
            return where

        where = or_error(ask, EngineUnavailableError)
        where = type(where) if isinstance(where, str) else where
        engine.close()
        asked = [[path for path, _ in server.calls] for server in (first, second)]
        keys_sent = [server._api_key for server in engine_servers(engine)]
        return (
            where,
            asked,
            keys_sent,
            engine._fingerprint.tolerance,
            probe_length(first),
            str(engine._dtype),
            weights_of(first),
            samples_ahead(engine),
        )
    finally:
        first.close(), second.close()


def engine_servers(engine: Any) -> list[Any]:
    return [member.server for member in engine.pool.members]


def probe_length(server: FakeServer) -> list[int]:
    return [len(body["prompt"]) for path, body in server.calls if path == "/v1/completions"]


def samples_ahead(engine: Any) -> str:
    """What a module makes of the engine."""
    m = build_module("bundled:micro", Settings())
    made = GSPOModule(
        m.policy_loader, m.rewards, objective=m.objective, sampling=m.sampling, optimizer=m.optimizer_factory,
        max_rollouts=1, engine=engine,
    )  # fmt: skip
    return type(made.engine).__name__


def weights_of(server: FakeServer) -> Any:
    return server.version is not None


PROBES = [
    Probe(["model=micro"], "model", policy, {
        "path": "bundled:smollm2-135m-instruct", "dtype": "bfloat16", "gradient_checkpointing": True,
        "attention": "sdpa", "compile": True, "quantization": "nf4", "train_vision": True, "train_language": False, "overrides": {"rms_norm_eps": 0.5},
    }),
    Probe(["rollout=vllm"], "rollout.engine", vllm, {
        "model": "bundled:smollm2-135m-instruct", "max_prompt_length": 50, "max_completion_length": 50,
        "overrides": {"rms_norm_eps": 0.5}, "dtype": "bfloat16", "memory_fraction": 0.5, "kv_cache_gb": 0.5,
        "max_num_seqs": 7, "prefix_caching": False, "enforce_eager": False, "sleep": True, "lora_sync": "merged",
        "tolerance": 0.25, "min_pixels": 100, "max_pixels": 100,
    }, {"model": "bundled:micro"}),
    Probe(["rollout=vllm_server"], "rollout.engine", vllm_server, {
        "urls": ["first", "second"], "api_key_env": "GSPO_OTHER_KEY", "sync_dir": "elsewhere", "max_prompt_length": 40,
        "max_completion_length": 20, "tolerance": 9.0, "dtype": "bfloat16",
        "lora_sync": "adapter", "staleness": 1,
    }, {"urls": ["first"], "sync_dir": "", "max_prompt_length": 8, "max_completion_length": 4,
        "lora_sync": "merged", "ready_timeout_s": 0.5, "pause_s": 0.05}),
]  # fmt: skip
