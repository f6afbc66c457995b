"""Sampling ahead: the next rollout is generated while this one trains, from weights that are one update old.

While the policy goes from version k to k + 1, servers sample rollout k + 1 from a frozen copy of version k. The ratio
of that rollout is later taken against the copy: old log-probabilities are those of the weights that sampled, so the
update is the paper's off-policy update and not an approximation of the on-policy one.

A copy shares everything that is not trained (a LoRA base, the tokenizer); what is trained is copied once and then
overwritten in place, while no rollout is under way.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, astuple
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.dialogue.threads import as_here
from gspo_lightning.errors import UserError
from gspo_lightning.packing.compiling import allow_graphs
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.engine import RolloutEngine, close_engine, traits
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams


class OneStepOff:
    """An engine that returns the rollout generated ahead when it is requested, and passes other requests on.

    Args:
        engine: samples elsewhere, so that this process can train at the same time.

    Raises:
        UserError: the engine samples dialogues, whose environments would run in this process while it trains.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        if traits(engine).environments is not None:
            raise UserError("environment: dialogues are not sampled ahead; set rollout.engine.staleness=0")
        self.engine = engine
        self.behaviour: Policy | None = None
        """The copy of the weights that samples or sampled the pending rollout."""
        self.is_stale = False
        """Whether the rollout handed out last was generated ahead, by ``behaviour``."""
        self.seconds = 0.0
        """How long the engine took for the rollout handed out last, if that was generated ahead."""
        self._pending: _Pending | None = None
        self._taken: _Pending | None = None
        """The rollout handed out last, as long as ``behaviour`` has the weights that sampled it."""
        self._restored: list[Tensor] | None = None
        """The trained weights of ``behaviour`` from a checkpoint, until `generate` is given a policy to copy. The one
        that they are loaded with may still move to its device, and be told to run padded."""

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`; waits for a rollout under way.

        Raises:
            RolloutError: what the engine raised, ahead or now.
        """
        pending = self._pending
        if pending is not None and pending.key == _key(prompts, sampling, seed):
            # Whatever raises here leaves it pending: a checkpoint saved then must record it.
            completions, seconds = pending.result(), pending.seconds
            self._restore_behaviour(policy)
            if completions is None:  # lost with the process that generated it: generate it again
                assert self.behaviour is not None
                start = time.perf_counter()
                completions = self.engine.generate(self.behaviour, prompts, sampling, seed).completions
                seconds = time.perf_counter() - start
            self._taken, self._pending, self.is_stale, self.seconds = pending, None, True, seconds
            return Rollout(prompts, completions)
        if pending is not None:
            pending.join()  # the engine does one thing at a time, such as a validation
            pending.raise_error()
        self.is_stale = False
        return self.engine.generate(policy, prompts, sampling, seed)

    def sampling_of(self, prompts: list[Prompt], seed: int) -> SamplingParams | None:
        """The settings that the pending rollout of these prompts and this seed is sampled with; None if none is."""
        pending = self._pending
        if pending is None or pending.sampling is None or pending.key != _key(prompts, pending.sampling, seed):
            return None
        return pending.sampling

    def forget_sampling(self) -> None:
        """From now on the pending rollout is only handed out if it was sampled with the settings asked for."""
        if self._pending is not None:
            self._pending.sampling = None

    def launch(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> None:
        """Begins the next rollout, from the current weights, in a thread.

        A pending rollout that training did not request is dropped with a warning: it comes from a checkpoint with
        other settings.

        Args:
            policy: its weights are copied before this returns.
            prompts: of the next rollout.
            sampling: of training.
            seed: of the next rollout.
        """
        if self._pending is not None:
            warnings.warn(
                "rollout.engine.staleness=1: a rollout that was sampled ahead, by the run of the checkpoint or in an "
                "earlier fit, is dropped: it is not of the seed, prompts and sampling settings that came next",
                stacklevel=2,
            )
        self._copy(policy)
        self._taken = self._restored = None
        behaviour = self.behaviour
        assert behaviour is not None

        def generate() -> list[list[Completion]]:
            if any(module._compiled_call_impl is not None for module in behaviour.modules()):
                allow_graphs()  # in this thread
            with torch.no_grad():
                return self.engine.generate(behaviour, prompts, sampling, seed).completions

        self._pending = _Pending(_key(prompts, sampling, seed), sampling)
        self._pending.start(as_here(generate))

    def close(self) -> None:
        """Closes the engine; a rollout under way is not waited for."""
        close_engine(self.engine)

    @torch.no_grad()
    def _copy(self, policy: Policy) -> None:
        mine = [] if self.behaviour is None else list(self.behaviour.parameters())
        trained = [
            (own, current)
            for own, current in zip(mine, policy.parameters(), strict=bool(mine))
            if current.requires_grad
        ]
        # What was frozen when the copy was made, and is trained by now, is shared with it.
        if not mine or any(own is current for own, current in trained):
            self.behaviour = _share_frozen(policy)
            return
        for own, current in trained:
            own.copy_(current)

    @torch.no_grad()
    def _restore_behaviour(self, policy: Policy) -> None:
        """Gives the copy the weights of a checkpoint, if there are any that it does not have yet."""
        if self._restored is None:
            return
        self._copy(policy)
        assert self.behaviour is not None
        trained = (parameter for parameter in self.behaviour.parameters() if parameter.requires_grad)
        for parameter, value in zip(trained, self._restored, strict=True):
            parameter.copy_(value)
        self._restored = None

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, *, in_hand: bool = False) -> dict[str, Any]:
        """The pending rollout, which this waits for, and the weights that sampled it; empty if none is pending.

        Args:
            in_hand: the rollout handed out last is not trained on yet, and is pending again after a resume.
        """
        pending = self._pending or (self._taken if in_hand else None)
        if pending is None:
            return {}
        pending.join()
        groups, weights = pending.value, self._restored
        if weights is None:
            assert self.behaviour is not None
            weights = [p.detach().cpu().clone() for p in self.behaviour.parameters() if p.requires_grad]
        return {
            "key": list(pending.key),
            "sampling": None if pending.sampling is None else asdict(pending.sampling),
            "completions": None if groups is None else [[_pack(c) for c in group] for group in groups],
            "seconds": pending.seconds,
            "behaviour": weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the pending rollout of a checkpoint. A failed one is generated again, by the same weights."""
        if self._pending is not None:
            self._pending.join()  # of an earlier run of this module: the engine does one thing at a time
        self._pending = self._taken = self._restored = None
        if not state:
            return
        self._restored = state["behaviour"]
        groups = state["completions"]
        sampling = SamplingParams(**state["sampling"]) if state["sampling"] else None
        self._pending = _Pending(tuple(state["key"]), sampling, state["seconds"])
        self._pending.value = None if groups is None else [[Completion(**c) for c in group] for group in groups]


class _Pending:
    """A rollout under way in a thread, or the result of one."""

    def __init__(self, key: tuple[Any, ...], sampling: SamplingParams | None, seconds: float = 0.0) -> None:
        self.key, self.sampling, self.seconds = key, sampling, seconds
        self.value: list[list[Completion]] | None = None
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pending:
        """The rollout once it has ended, without the thread: callbacks that average weights copy the whole module."""
        self.join()
        made = _Pending(self.key, self.sampling, self.seconds)
        made.value, made.error = self.value, self.error
        return made

    def start(self, generate: Callable[[], list[list[Completion]]]) -> None:
        def run() -> None:
            start = time.perf_counter()
            try:
                self.value = generate()
            except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
                self.error = error
            self.seconds = time.perf_counter() - start

        # A daemon: failed training must not wait for a rollout that nobody will use.
        self._thread = threading.Thread(target=run, name="rollout ahead", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None  # which nothing that holds this could be pickled with

    def result(self) -> list[list[Completion]] | None:
        """The completions; None if they are lost. Raises what the rollout failed with, see `raise_error`."""
        self.join()
        self.raise_error()
        return self.value

    def raise_error(self) -> None:
        """Raises what the rollout failed with, once: whoever asks again wants another attempt."""
        error, self.error = self.error, None
        if error is not None:
            raise error


def _key(prompts: list[Prompt], sampling: SamplingParams, seed: int) -> tuple[Any, ...]:
    """Everything that decides what a policy samples, token ids included: edited data keeps its uids."""
    tokens = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        ids = prompt.input_ids.to("cpu", torch.int64)
        tokens.update(len(ids).to_bytes(8, "little") + ids.numpy().tobytes())
    return (seed, astuple(sampling), tokens.hexdigest(), *(prompt.uid for prompt in prompts))


def _share_frozen(policy: Policy) -> Policy:
    """A copy of the policy that has its own trained parameters and shares all other tensors."""
    shared: list[Any] = [policy.tokenizer, policy.processor, *policy.buffers()]
    shared += [parameter for parameter in policy.parameters() if not parameter.requires_grad]
    copied: Policy = copy.deepcopy(policy, {id(thing): thing for thing in shared})
    for mine, theirs in zip(copied.modules(), policy.modules(), strict=True):
        if theirs._compiled_call_impl is not None:  # a copy is not compiled, and would round differently
            mine.compile()
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _pack(completion: Completion) -> dict[str, Tensor | str]:
    """A completion as a checkpoint may hold it: tensors and text. Engines that sample elsewhere have no dialogues."""
    return {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "sampler_logprobs": completion.sampler_logprobs,
        "finish_reason": completion.finish_reason,
        "thinking": completion.thinking,
    }
