"""Functions that the policy may call in a dialogue: the chat template describes them, and its calls are answered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from gspo_lightning.dialogue.calls import CallError, check_arguments
from gspo_lightning.dialogue.environment import Environments, OpenDialogue, Reply
from gspo_lightning.dialogue.forms import FORMS, Form, form_of
from gspo_lightning.dialogue.functions import Tool, by_name, found, schemas_of, template_tools
from gspo_lightning.dialogue.limited import LimitedTools
from gspo_lightning.errors import UserError, check_time_limit
from gspo_lightning.types import Prompt, ToolCounts
from gspo_lightning.users_code import call_tool, copied

_HARMONY = "<|call|>"
"""Ends a call of gpt-oss, which says in a header, not in JSON, whom it calls."""


class Tools(Environments):
    """Dialogues in which the policy may call Python functions; a turn without a call is the answer.

    Args:
        functions: each a function, or a class, or the dotted name of one. A class is made for every dialogue, without
            arguments, and its public methods are tools; a method ``reset(row, seed)`` is called first with a copy of
            the row, and a method ``reward()`` at the end: the environment's reward is the sum of these.
        max_turns: turns of the policy after which a dialogue ends; a call in the last one is made, but not answered.
        chat_template_kwargs: arguments of the chat template, the same as for the prompts. If there are ``tools`` among
            them, they must be the functions; if not, they are added: give the prompts this object's
            ``chat_template_kwargs``.
        call_form: how the policy writes calls, one of `forms.FORMS`; None: as the chat template writes them.
        timeout_s: with a limit the tools run in a warm process of their own, which is killed if a call takes longer;
            the policy is told so. An object of a class is sent there and back with each call, so it must be possible to
            pickle it, and a call that is stopped leaves it as it was. Without a limit they run in the trainer.
        workers: most dialogues whose tools run at the same time, so a function is called several times at once (see
            `Environments`); with a limit, in this many processes. The calls of one turn are made one after another.

    Raises:
        UserError: a function is misconfigured (see `functions.schemas_of`), or the prompts describe other tools.
    """

    def __init__(
        self,
        functions: Sequence[Tool],
        max_turns: int = 4,
        chat_template_kwargs: dict[str, Any] | None = None,
        call_form: str | None = None,
        timeout_s: float | None = None,
        workers: int = 1,
    ) -> None:
        if timeout_s is not None:
            check_time_limit("environment.timeout_s", timeout_s, "; null means no limit")
        if call_form not in (None, *FORMS):
            raise UserError(f"environment.call_form={call_form!r} must be null or one of {', '.join(FORMS)}")
        where = "environment.functions"
        tools = found(functions, where)
        schemas = schemas_of(tools, where)
        kwargs = {"tools": list(schemas.values()), **(chat_template_kwargs or {})}
        if template_tools(kwargs["tools"], "environment.chat_template_kwargs.tools") != list(schemas.values()):
            raise UserError(
                "environment.chat_template_kwargs.tools are others than environment.functions; leave "
                "data.chat_template_kwargs.tools as environment=tools sets it: ${environment.functions}"
            )
        limited = LimitedTools(tools, timeout_s) if timeout_s is not None else None
        make = functools.partial(ToolDialogue, tools, schemas, limited)
        super().__init__(make, max_turns, {**kwargs, "tools": list(schemas.values())}, workers)
        object.__setattr__(self, "call_form", call_form)
        object.__setattr__(self, "_found", None)
        object.__setattr__(self, "names", tuple(schemas))
        object.__setattr__(self, "rewards", any(hasattr(tool, "reward") for tool in tools if inspect.isclass(tool)))

    call_form: str | None
    """How the policy writes calls; None: as the chat template does."""
    _found: tuple[PreTrainedTokenizerBase, Form] | None
    """The tokenizer that was asked last, and its form."""
    names: tuple[str, ...]
    """What the policy calls the tools."""
    rewards: bool
    """Whether a class among the functions has a reward."""

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a model that writes calls in another way than is read.

        Raises:
            UserError: names the key, and the forms that are read.
        """
        self._form(tokenizer)

    def _form(self, tokenizer: PreTrainedTokenizerBase) -> Form:
        """The form of this tokenizer, looked for once and not in every dialogue: that renders several templates."""
        if self._found is None or self._found[0] is not tokenizer:
            if _HARMONY in tokenizer.get_added_vocab():
                raise UserError("environment.functions: calls in the harmony format are not read; use another model")
            form = form_of(tokenizer, self.chat_template_kwargs, self.call_form)
            object.__setattr__(self, "_found", (tokenizer, form))
        assert self._found is not None
        return self._found[1]

    def dialogue_of(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> OpenDialogue:
        """See `Environments.dialogue_of`.

        Raises:
            UserError: the prompt does not name a tool, so that the policy cannot know it; or calls are written in
                another way than is read.
        """
        told = str(tokenizer.decode(prompt.input_ids))
        for name in self.names:
            if name not in told:
                raise UserError(
                    f"environment.functions: the prompt does not name the tool {name}; give the prompts the same "
                    f"chat_template_kwargs, tools: ${{environment.functions}} (row {prompt.uid})"
                )
        dialogue = super().dialogue_of(prompt, tokenizer)
        form = self._form(tokenizer)
        cast("ToolDialogue", dialogue.environment).form = form
        dialogue.kept = frozenset(form.tokens)
        return dialogue


class ToolDialogue:
    """The `Environment` of one dialogue with tools."""

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]],
        schemas: dict[str, dict[str, Any]],
        limited: LimitedTools | None = None,
    ) -> None:
        self.schemas, self.limited = schemas, limited
        self.things: list[Any] = [tool() if inspect.isclass(tool) else tool for tool in tools]
        self.places = {name: number for number, tool in enumerate(tools) for name, _ in by_name([tool])}
        self.tool_counts = ToolCounts()
        self.form = FORMS["json"]

    def reset(self, row: dict[str, Any], seed: int) -> None:
        """See `Environment.reset`."""
        for reset in self._own("reset"):
            reset(copied(row), seed)
        if self.limited is not None:
            self.limited.check(self.things)

    def _own(self, method: str) -> list[Callable[..., Any]]:
        """That method of each object that has it."""
        owners = [thing for thing in self.things if not inspect.isroutine(thing)]
        return [getattr(owner, method) for owner in owners if hasattr(owner, method)]

    def step(self, text: str) -> Reply:
        """See `Environment.step`: the results of all calls of the turn, in their order."""
        calls = self.form.calls(text)
        if not calls:
            return Reply(None)
        ids = tuple(self._id(number, call) for number, call in enumerate(calls)) if self.form.call_id else ()
        first, *others = [self._result(call) for call in calls]
        return Reply(first, role="tool", more=tuple(others), call_ids=ids)

    def _id(self, number: int, call: str) -> str:
        """The id of a call of this turn: the model's own, or a running number where it gave none."""
        assert self.form.call_id is not None
        return self.form.call_id(call) or f"{self.tool_counts.calls + number:09d}"

    def reward(self) -> float:
        """See `Environment.reward`: the sum over the objects that have one; 0 if none has."""
        return sum((reward() for reward in self._own("reward")), 0.0)

    def _result(self, call: str) -> str:
        """What the model is told: the function's result, or what was wrong."""
        failed = 0
        try:
            result = self._called(*self.form.read(call, self.schemas))
        except CallError as error:
            result, failed = f"error: {error}", 1
        self.tool_counts = ToolCounts(self.tool_counts.calls + 1, self.tool_counts.failures + failed)
        return result

    def _called(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self.places:
            raise CallError(f"there is no tool {name}; the tools are {', '.join(self.places)}")
        check_arguments(arguments, self.schemas[name])
        number = self.places[name]
        if self.limited is not None:
            outcome, text, self.things[number] = self.limited.call(name, number, self.things[number], arguments)
        else:
            thing = self.things[number]
            # The arguments are fresh from the text: nothing else holds them.
            outcome, text = call_tool(thing if inspect.isroutine(thing) else getattr(thing, name), arguments)
        if outcome == "refused":
            raise UserError(f"tool {name} {text}")
        if outcome == "failed":
            raise CallError(text)
        return text
