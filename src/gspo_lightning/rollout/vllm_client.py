"""A trainer's requests to one vLLM server, and checks of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.http_client import RequestRefusedError, Server, ServerError
from gspo_lightning.rollout.vllm_requests import completion, request_fields
from gspo_lightning.types import Completion, Prompt, SamplingParams

_STATUS_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Weights:
    """One version of the weights, on disk."""

    version: str
    path: Path
    """A folder."""
    kind: Literal["full", "adapter"]
    checksum: int
    """Checksum of the tensors in the folder (``full``)."""


@dataclass(frozen=True)
class Status:
    """Answer of `gspo_lightning.rollout.vllm_worker.WeightSync.gspo_status`."""

    instance: str
    version: str | None
    shape: dict[str, Any]
    dtype: str
    logprobs_mode: str
    lora: bool
    base_replaced: bool = False
    """Whether a trainer's weights have replaced those of the model's folder, which an adapter needs."""


class VLLMClient:
    """One server; every method raises `ServerError` for an answer that cannot be used."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        self.server, self.timeout_s = server, timeout_s
        self.url = server.url

    def status(self) -> Status:
        """Instance, model and weights of the server."""
        answer = self._rpc("gspo_status")
        try:
            return Status(**answer)
        except TypeError as error:
            raise ServerError(f"{self.url} sent an invalid answer about itself: {error}") from error

    def load(self, weights: Weights) -> None:
        """Loads the weights into the server and drops what it has cached from others."""
        if weights.kind == "adapter":
            # In place: an earlier attempt may have got halfway.
            body = {"lora_name": weights.version, "lora_path": str(weights.path), "load_inplace": True}
            self.server.post("/v1/load_lora_adapter", body, self.timeout_s, is_json=False)
            self._rpc("gspo_set_version", weights.version)
        else:
            answer = self._rpc("gspo_load_folder", str(weights.path), weights.version, str(weights.checksum))
            if answer.get("checksum") != weights.checksum:
                raise ServerError(f"{self.url} loaded weights other than those written to {weights.path}")
        self.reset_caches()

    def unload_adapter(self, name: str) -> None:
        """Frees an old adapter; each version has its own name, so one that stays cannot be mistaken for another."""
        try:
            self.server.post("/v1/unload_lora_adapter", {"lora_name": name}, self.timeout_s, is_json=False)
        except (ServerError, RequestRefusedError):
            return

    def reset_caches(self) -> None:
        """Drops keys, values and image features of other weights."""
        reset = self.server.post("/reset_prefix_cache", {}, self.timeout_s)
        if not isinstance(reset, dict) or reset.get("success") is not True:
            raise ServerError(f"{self.url} did not reset its prefix cache; is somebody else using it?")
        for path in ("/reset_mm_cache", "/reset_encoder_cache"):
            self.server.post(path, {}, self.timeout_s, is_json=False)

    def complete(
        self, policy: Policy, prompt: Prompt, sampling: SamplingParams, seed: int, adapter: str | None
    ) -> list[Completion]:
        """Completions of one prompt, by the base weights or by an adapter."""
        body = request_fields(policy, prompt, sampling, seed)
        body |= {"prompt": prompt.input_ids.tolist(), "return_token_ids": True}
        if adapter is not None:
            body["model"] = adapter
        answer = self.server.post("/v1/completions", body, self.timeout_s)
        try:
            return read_completions(policy, answer, sampling.num_generations)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ServerError(f"{self.url} sent an invalid answer: {error!r}") from error

    def _rpc(self, method: str, *arguments: str) -> dict[str, Any]:
        timeout_s = self.timeout_s if arguments else min(self.timeout_s, _STATUS_TIMEOUT_S)
        try:
            answer = self.server.post("/collective_rpc", {"method": method, "args": list(arguments)}, timeout_s)
            found = answer["results"][0]
        except ServerError as error:
            if " answered 404" in str(error):
                raise ServerError(
                    f"{self.url} is not a rollout server; start one with scripts/serve_rollouts.sh"
                ) from error
            raise
        except (TypeError, KeyError, IndexError) as error:
            raise ServerError(f"{self.url}: {method} sent an invalid answer") from error
        if found is not None and not isinstance(found, dict):
            raise ServerError(f"{self.url}: {method} sent an invalid answer")
        return found or {}


def read_completions(policy: Policy, answer: Any, count: int) -> list[Completion]:
    """The ``count`` completions of vLLM's answer, in order; raises for anything that is not that."""
    choices: Sequence[dict[str, Any]] = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise ValueError(f"{len(choices)} completions, but {count} were asked for")
    return [
        completion(policy, choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])
        for choice in choices
    ]
