"""vLLM in separate servers: one or several, started by ``scripts/serve_rollouts.sh``, here or elsewhere.

Weights travel through a folder that trainer and servers see under the same path (shared memory on one machine): the
trainer writes each version once, the servers read it. The servers themselves report what they run: an instance number
that changes with every start, and the version they loaded. An answer counts only if both are the same after it as they
were when the server was verified.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gspo_lightning.dialogue import Environments
from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.engine import WeightSyncError
from gspo_lightning.rollout.fingerprint import DEFAULT_TOLERANCE, PROBE_SAMPLING, Fingerprint, probe_prompt
from gspo_lightning.rollout.http_client import RequestRefusedError, Server, ServerError
from gspo_lightning.rollout.over_ranks import on_first_rank
from gspo_lightning.rollout.server_pool import Patience, ServerPool
from gspo_lightning.rollout.turn_by_turn import NextOf, Request, sample_dialogues
from gspo_lightning.rollout.vllm_client import Status, VLLMClient, Weights
from gspo_lightning.rollout.vllm_requests import refuse_images, refuse_sampling
from gspo_lightning.rollout.vllm_settings import engine_dtype
from gspo_lightning.rollout.vllm_worker import model_shape
from gspo_lightning.rollout.weights import check_base, checksum, save_adapter, save_weights, trained_parameters
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams


class VLLMServerEngine:
    """Samples with vLLM servers. Nothing is sent before the first `generate`.

    Args:
        urls: addresses, one per server.
        max_prompt_length: longest prompt in tokens; the servers must take it and a completion.
        max_completion_length: longest completion in tokens.
        api_key_env: the environment variable that holds the servers' API key, ``GSPO_...``; if it is not set, no key is
            sent.
        sync_dir: folder for weights, seen under this path by the trainer and by every server.
        dtype: dtype the servers compute in (their ``--dtype``).
        lora_sync: ``adapter`` sends only the adapter, ``merged`` sends weights with the adapter added to copies.
        ready_timeout_s: see `Patience`.
        request_timeout_s: see `Patience`; also for loading weights.
        give_up_after_s: see `Patience`.
        pause_s: see `Patience`.
        max_attempts: see `Patience`.
        max_in_flight: see `Patience`.
        tolerance: mean difference allowed between server and trainer on the probe in nats; None: by dtype.
        staleness: 0 samples every rollout from the current weights; 1 samples the next one while this one trains, from
            weights that are one update old (`gspo_lightning.training.one_step_off`).
        environments: makes every completion a dialogue (`gspo_lightning.dialogue`); they run on rank 0.
    """

    samples_on = "first_rank"
    """Where a copy of a sharded policy is kept (`GatheredEngine`)."""

    def __init__(
        self,
        urls: list[str],
        max_prompt_length: int,
        max_completion_length: int,
        api_key_env: str = "GSPO_ROLLOUT_KEY",
        sync_dir: str = "/dev/shm",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        lora_sync: Literal["adapter", "merged"] = "adapter",
        ready_timeout_s: float = 600.0,
        request_timeout_s: float = 600.0,
        give_up_after_s: float = 120.0,
        pause_s: float = 0.5,
        max_attempts: int = 8,
        max_in_flight: int = 64,
        tolerance: float | None = None,
        staleness: Literal[0, 1] = 0,
        environments: Environments | None = None,
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise UserError(f"rollout.engine.urls={urls} must name at least one server, and each only once")
        if max_in_flight < 1:
            raise UserError(f"rollout.engine.max_in_flight={max_in_flight} must be at least 1")
        if not api_key_env.startswith("GSPO_"):
            # A config names the variable and the address: any other secret of the environment could go anywhere.
            raise UserError(
                f"rollout.engine.api_key_env={api_key_env} must begin with GSPO_; put the servers' key into such a "
                "variable (GSPO_ROLLOUT_KEY)"
            )
        key = os.environ.get(api_key_env)
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UserError(
                f"the environment variable {api_key_env} (rollout.engine.api_key_env) holds a line break, white space "
                "at an end or a letter beyond ASCII, which no header of HTTP carries; set it to the key alone"
            )
        servers = [Server(url, key) for url in urls]
        patience = Patience(ready_timeout_s, request_timeout_s, give_up_after_s, pause_s, max_attempts, max_in_flight)
        self.pool = ServerPool(servers, self._prepare, self._accept, patience)
        self.max_model_len = max_prompt_length + max_completion_length
        self.api_key_env, self.sync_dir, self.dtype, self.lora_sync = api_key_env, Path(sync_dir), dtype, lora_sync
        self.timeout_s, self.tolerance, self.staleness = request_timeout_s, tolerance, staleness
        self.environments = environments
        self.syncs = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._weights: Weights | None = None
        self._trained: int | None = None
        self._proven: dict[str, tuple[str, str]] = {}
        """Server address -> (instance, version) whose fingerprint matched."""

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`."""
        refuse_images(prompts)
        refuse_sampling(sampling)
        if world_size() > 1 and self.staleness:
            raise UserError(
                f"rollout.engine.staleness=1 runs in one process, and there are {world_size()}; set it to 0, or "
                "trainer.devices=1"
            )

        def ask(everybodys: list[Prompt]) -> list[list[Completion]]:
            self._begin(policy)
            if self.environments is None:
                return self._complete([(prompt, sampling, seed) for prompt in everybodys])
            return sample_dialogues(self._complete, policy, everybodys, sampling, seed, self.environments)

        return Rollout(prompts, on_first_rank(prompts, ask, with_rows=self.environments is not None))

    def _complete(self, requests: Sequence[Request], next_of: NextOf | None = None) -> list[list[Completion]]:
        return self.pool.run(requests, self._work, next_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> VLLMServerEngine:
        """The same: callbacks that average weights copy the whole module, and servers and folder are there once."""
        return self

    def __copy__(self) -> VLLMServerEngine:
        """An engine of its own, whose pool calls it and not this one; for one that has sampled nothing yet."""
        made = object.__new__(type(self))
        made.__dict__ |= self.__dict__ | {"_proven": {}}
        servers = [member.server for member in self.pool.members]
        made.pool = ServerPool(servers, made._prepare, made._accept, self.pool.patience)
        return made

    def close(self) -> None:
        """Removes the weights from ``sync_dir``; the servers keep running, and `generate` can be called again."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = self._weights = self._trained = None

    # ---------------------------------------------------------------- weights

    def _begin(self, policy: Policy) -> None:
        """Writes the weights if they have changed; the pool's `_prepare` brings them to each server."""
        self._policy = policy
        if self._weights is not None and not self._weights.path.is_dir():
            self.close()  # somebody removed them, as systemd empties /dev/shm when a user logs out
        if self._folder is None:
            check_base(policy, self.lora_sync)
            self._folder = self._make_folder()
            self._probe = probe_prompt(policy, self.max_model_len)
            self._dtype = engine_dtype(self.dtype, policy)
            bound = DEFAULT_TOLERANCE[self._dtype] if self.tolerance is None else self.tolerance
            self._fingerprint = Fingerprint(bound)
        now = checksum(trained_parameters(policy))
        if now == self._trained:
            return
        self._write(policy, adapter=policy.has_adapter and self.lora_sync == "adapter")
        self._trained = now

    def _make_folder(self) -> tempfile.TemporaryDirectory[str]:
        try:
            # A run that fails does not wait for the next rollout, which may be writing when the folder is removed.
            return tempfile.TemporaryDirectory(prefix="gspo-weights-", dir=self.sync_dir, ignore_cleanup_errors=True)
        except OSError as error:
            raise UserError(
                f"rollout.engine.sync_dir={self.sync_dir}: cannot write there ({error.strerror})"
            ) from error

    def _write(self, policy: Policy, adapter: bool) -> None:
        assert self._folder is not None
        self.syncs += 1
        # Unique, even if another trainer uses the same servers.
        version = f"{Path(self._folder.name).name}-{self.syncs}"
        path, before = Path(self._folder.name) / version, self._weights
        if adapter:
            self._weights = Weights(version, save_adapter(policy, path), "adapter", 0)
        else:
            self._weights = Weights(version, path, "full", save_weights(policy, self._dtype, path))
        if before is not None:
            shutil.rmtree(path.with_name(before.version))

    # ---------------------------------------------------------------- one server, in a thread

    def _client(self, server: Server) -> VLLMClient:
        return VLLMClient(server, self.timeout_s)

    def _prepare(self, server: Server) -> tuple[Status, list[Completion] | None]:
        """Status of a server that runs the weights, and what it samples from the probe if it is not verified yet."""
        try:
            return self._load(self._client(server))
        except RequestRefusedError as error:
            if error.status in (401, 403):
                raise UserError(f"{error}; put the servers' key into {self.api_key_env}") from error
            raise ServerError(str(error)) from error

    def _load(self, client: VLLMClient) -> tuple[Status, list[Completion] | None]:
        weights, proven = self._weights, self._proven.get(client.url)
        assert weights is not None
        status = client.status()
        self._refuse_wrong_server(client.url, status)
        if proven == (status.instance, weights.version) == (status.instance, status.version):
            return status, None
        if weights.kind == "adapter" and proven is not None and proven[0] == status.instance:
            client.unload_adapter(proven[1])
        if status.version == weights.version:
            client.reset_caches()  # a load that was cut short may not have got that far
        else:
            client.load(weights)
            status = client.status()
        if status.version != weights.version:
            raise ServerError(f"{client.url} was restarted while it loaded weights")
        completions = client.complete(self._policy, self._probe, PROBE_SAMPLING, 0, self._adapter)
        if client.status() != status:
            raise ServerError(f"{client.url} got other weights during the probe; does another run use it?")
        return status, completions

    @property
    def _adapter(self) -> str | None:
        assert self._weights is not None
        return self._weights.version if self._weights.kind == "adapter" else None

    def _refuse_wrong_server(self, url: str, status: Status) -> None:
        wanted = model_shape(self._policy.config)
        if status.shape != wanted:
            raise ServerError(f"{url} runs another model: {status.shape}, the policy is {wanted}")
        if status.logprobs_mode != "processed_logprobs":
            raise ServerError(f"{url} ignores the temperature; start it with --logprobs-mode processed_logprobs")
        dtype = str(self._dtype).removeprefix("torch.")
        if status.dtype != dtype:
            raise ServerError(f"{url} computes in {status.dtype}; start it with --dtype {dtype}")
        if self._adapter and not status.lora:
            raise ServerError(f"{url} does not accept adapters; start it with --enable-lora, or set lora_sync=merged")
        if self._adapter and status.base_replaced:
            raise ServerError(f"{url} no longer has the base of the adapter: another run replaced it; restart it")

    def _work(self, server: Server, request: Request) -> list[Completion]:
        """Completions of one prompt, from a server whose instance and weights were the same before and after."""
        client, refusal = self._client(server), None
        try:
            completions = client.complete(self._policy, *request, self._adapter)
        except RequestRefusedError as error:
            refusal = error
        status = client.status()
        if (status.instance, status.version) != self._proven.get(server.url):
            raise ServerError(
                f"{server.url} was restarted or got other weights during a request; does another run use it?"
            )
        if refusal is not None:
            raise UserError(f"row {request[0].uid}: {refusal}") from refusal
        return completions

    # ---------------------------------------------------------------- the proof, in the trainer's thread

    def _accept(self, server: Server, prepared: tuple[Status, list[Completion] | None]) -> None:
        status, completions = prepared
        assert self._weights is not None
        if completions is None:
            return
        before = self._proven.pop(server.url, None)
        if before is None or before[0] != status.instance:
            self._fingerprint.forget(server.url)
        try:
            self._fingerprint.check(self._policy, self._probe, completions, server.url)
        except WeightSyncError as error:
            if before is not None and before[0] == status.instance:
                raise
            # It has never matched: another base model, perhaps. It is not used; the others may continue.
            raise ServerError(str(error)) from error
        self._proven[server.url] = (status.instance, self._weights.version)
