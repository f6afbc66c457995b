"""The protocol of an environment, and the class that runs one dialogue with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any, Protocol, cast

from transformers import PreTrainedTokenizerBase

from gspo_lightning.dialogue.template import continuation
from gspo_lightning.dialogue.threads import Threads
from gspo_lightning.errors import UserError
from gspo_lightning.precision import without_autocast
from gspo_lightning.types import Messages, Prompt, ToolCounts
from gspo_lightning.users_code import LARGEST, RAISED, copied, finite_number

_LONGEST_TOKEN = 64
"""Characters; a few tokens of some vocabularies are longer, all of a text hardly ever."""


@dataclass(frozen=True)
class Reply:
    """What an environment says to a turn of the policy."""

    text: str | None
    """None ends the dialogue."""
    role: str = "user"
    """Role of the message in the chat template, such as ``tool``."""
    reward: float | None = None
    """Reward of the policy's turn; None in all turns if the dialogue is rewarded as a whole. A final `Reply(None, ...)`
    has that of the last turn."""
    more: tuple[str, ...] = ()
    """Texts of further messages in the same role: the results of several calls are a message each, which templates
    mark one by one."""
    call_ids: tuple[str, ...] = ()
    """Ids of the calls that the messages answer, one each, for templates that read ``tool_call_id``; or none."""

    def __post_init__(self) -> None:
        text, role = cast("tuple[object, object]", (self.text, self.role))
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"Reply: the text is of type {kind}; give a string, such as str(...), or None for the end")
        more: object = self.more
        if not isinstance(more, tuple) or not all(isinstance(x, str) for x in more) or (more and text is None):
            raise UserError(f"Reply: more={more!r} must be a tuple of strings, after a text")
        ids: object = self.call_ids
        if ids != () and not (isinstance(ids, tuple) and len(ids) == 1 + len(self.more) and text is not None):
            raise UserError(f"Reply: call_ids={ids!r} must be a tuple of one id for each text, or empty")
        if not isinstance(role, str) or role == "assistant":
            raise UserError(f"Reply: role={role!r} must be a string such as user or tool; assistant is the policy")


class Environment(Protocol):
    """One dialogue about one dataset row. Everything random in it must derive from the row and ``seed``."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """Begins the dialogue, whose first message is the row's prompt; ``row`` is a copy, its lists included."""
        ...

    def step(self, text: str) -> Reply:
        """Answers a finished turn of the policy, decoded without special tokens."""
        ...

    def reward(self) -> float:
        """Reward of the whole dialogue, once it has ended: by a `Reply` without text, the turn limit or the length."""
        ...


@dataclass(frozen=True)
class Environments:
    """Makes an environment for every dialogue.

    Args:
        make: returns a fresh `Environment`.
        max_turns: turns of the policy after which a dialogue ends.
        chat_template_kwargs: arguments of the chat template, the same as for the prompts.
        workers: most dialogues whose environments run at the same time. With 1 they run one after another in the
            trainer's thread; with more, in threads: calls of one environment come from different ones, and what
            environments share must bear calls at the same time.
    """

    make: Callable[[], Environment]
    max_turns: int = 4
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    threads: Threads = field(init=False, repr=False, compare=False)
    """The threads in which environments run."""

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise UserError(f"environment.max_turns={self.max_turns} must be at least 1")
        if self.workers < 1:
            raise UserError(f"environment.workers={self.workers} must be at least 1")
        if not callable(self.make):
            raise UserError(
                f"environment.make is of type {type(self.make).__name__}, but must make an environment for every "
                "dialogue; name the environment as environment.make._target_, with environment.make._partial_=true"
            )
        object.__setattr__(self, "threads", Threads(self.workers))

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses, before a model is loaded, what cannot work with its tokenizer; here nothing.

        Raises:
            UserError: names the key of the config.
        """

    def begin(self, prompt: Prompt, seed: int, tokenizer: PreTrainedTokenizerBase) -> OpenDialogue:
        """Begins a dialogue about the row of ``prompt``."""
        (dialogue,) = self.begin_all([(prompt, seed)], tokenizer)
        return dialogue

    def begin_all(
        self, prompts: Sequence[tuple[Prompt, int]], tokenizer: PreTrainedTokenizerBase
    ) -> list[OpenDialogue]:
        """Begins a dialogue about the row of each prompt, with its seed."""
        dialogues = [self.dialogue_of(prompt, tokenizer) for prompt, _ in prompts]
        if len({id(dialogue.environment) for dialogue in dialogues}) < len(dialogues):
            raise UserError(
                "environment.make returned one object for two dialogues, which would answer the one with the state of "
                "the other; return a new one for each"
            )
        self.threads.all(
            [partial(dialogue.reset, seed) for dialogue, (_, seed) in zip(dialogues, prompts, strict=True)]
        )
        return dialogues

    def dialogue_of(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> OpenDialogue:
        """A dialogue about the row of ``prompt`` whose environment has not been reset yet; subclasses extend this."""
        return OpenDialogue(_asked("environment.make", prompt, self.make), prompt, self, tokenizer)


class OpenDialogue:
    """A dialogue in progress. Errors of the environment become one line that names the row."""

    def __init__(
        self, environment: Environment, prompt: Prompt, settings: Environments, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.environment, self.prompt, self.settings, self.tokenizer = environment, prompt, settings, tokenizer
        self.messages: Messages = []
        self.turn_rewards: list[float | None] = []
        self.kept: frozenset[str] = frozenset()
        """Special tokens that the environment must see; all others are left out of a turn's text."""

    def reset(self, seed: int) -> None:
        """Begins the dialogue in the environment."""
        # A copy: what one dialogue removes from a list of its row must still be there for the others and on resuming.
        self.ask("reset", copied(dict(self.prompt.sample)), seed)

    def step(self, text: str) -> Reply:
        """What the environment says to a turn of the policy, as `decode` gives it."""
        answer = self.ask("step", text)
        if not isinstance(answer, Reply):
            raise UserError(f"{self._name}.step must return a Reply, not {type(answer).__name__} ({self._where})")
        return answer

    def hear(
        self, text: str, answer: Reply, has_end: bool, eos: tuple[int, ...], room: int | None = None
    ) -> list[int] | None:
        """Tokens between a turn of the policy and its next one; None ends the dialogue.

        Args:
            text: the turn.
            answer: of `step`.
            has_end: whether its last token is an end-of-sequence token (and not the end of a stop string).
            eos: end-of-sequence tokens of the policy, the usual one first.
            room: tokens that fit. A text that is far longer is cut before it is tokenised, and still does not fit.
        """
        self.add(text)
        self.turn_rewards.append(answer.reward)
        if answer.text is None or len(self.turn_rewards) >= self.settings.max_turns:
            return None
        texts = list(map(_without_lone_surrogates, (answer.text, *answer.more)))
        ids = [{"tool_call_id": call_id} for call_id in answer.call_ids] or [{} for _ in texts]
        messages = [{"role": answer.role, "content": text, **named} for text, named in zip(texts, ids, strict=True)]
        self.messages += messages
        if room is not None and any(len(text) > room * _LONGEST_TOKEN for text in texts):
            # The tokens of ten million characters take most of a minute.
            cut = [message | {"content": message["content"][: room * _LONGEST_TOKEN]} for message in messages]
            between = self._after_turn(cut, has_end, eos)
            if len(between) > room + _LONGEST_TOKEN:
                return between
        return self._after_turn(messages, has_end, eos)

    def _after_turn(self, messages: Messages, has_end: bool, eos: tuple[int, ...]) -> list[int]:
        kwargs = self.settings.chat_template_kwargs
        return continuation(self.tokenizer, messages, kwargs, has_end, eos, self.prompt.prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a turn of the policy, without special tokens other than ``kept``."""
        if not self.kept:
            return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        added = self.tokenizer.added_tokens_decoder
        ids = [i for i in token_ids if i not in added or not added[i].special or added[i].content in self.kept]
        return str(self.tokenizer.decode(ids))

    def add(self, text: str) -> None:
        """Records a turn of the policy."""
        self.messages.append({"role": "assistant", "content": text})

    def result(self) -> tuple[float, tuple[float, ...]]:
        """The reward of the whole dialogue, and those of its turns if there are any.

        Raises:
            UserError: a reward is not a finite number, or some turns have one and others none.
        """
        whole = self._number(self.ask("reward"))
        given = [self._number(reward) for reward in self.turn_rewards if reward is not None]
        if given and len(given) < len(self.turn_rewards):
            raise UserError(f"{self._name}: some turns have a reward and others none ({self._where})")
        # A turn that was cut by length has not been shown to the environment: it earns nothing of its own.
        turns = sum(message["role"] == "assistant" for message in self.messages)
        return whole, (*given, *(0.0,) * (turns - len(given) if given else 0))

    @property
    def tool_counts(self) -> ToolCounts | None:
        """Calls of tools so far; None if the environment does not count them."""
        counts = getattr(self.environment, "tool_counts", None)
        return counts if isinstance(counts, ToolCounts) else None

    def _number(self, reward: Any) -> float:
        number = finite_number(reward)
        if number is None:
            raise UserError(f"{self._name}: a reward must be a finite number, not {reward!r} ({self._where})")
        if abs(number) > LARGEST:
            raise UserError(f"{self._name}: a reward must not be beyond {LARGEST:g}, but is {reward!r} ({self._where})")
        return number

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls the environment."""
        return _asked(f"{self._name}.{method}", self.prompt, methodcaller(method, *arguments), self.environment)

    @property
    def _name(self) -> str:
        return f"environment {type(self.environment).__name__}"

    @property
    def _where(self) -> str:
        return f"row {self.prompt.uid}"


def _asked(name: str, prompt: Prompt, call: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a call of the user's code; what that raises becomes one line with its name and the row.

    An environment that computes with torch does so in its own precision, as rewards do, not in that of the model.
    """
    try:
        with without_autocast():
            result = call(*arguments)
    except UserError as error:
        raise UserError(f"{name}: {error} (row {prompt.uid})") from error
    except RAISED as error:
        columns = f"; it has {', '.join(map(str, prompt.sample))}" if isinstance(error, KeyError) else ""
        raise UserError(f"{name} raised {type(error).__name__}: {error} (row {prompt.uid}{columns})") from error
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that nobody awaited it
        raise UserError(f"{name} is async, but nothing awaits it; make it a plain function (row {prompt.uid})")
    return result


def _without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which ``errors="surrogateescape"`` leaves and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
