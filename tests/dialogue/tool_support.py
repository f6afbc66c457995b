"""A chat template that knows tools, as Qwen's does, and tools that tests share."""

from __future__ import annotations

from typing import Any

from gspo_lightning.dialogue.environment import OpenDialogue

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def heard(dialogue: OpenDialogue, text: str, eos: tuple[int, ...], room: int | None = None) -> list[int] | None:
    """The tokens after a turn with this text, which has an end token."""
    return dialogue.hear(text, dialogue.step(text), True, eos, room)


def add(a: int, b: int = 1) -> int:
    """Adds two whole numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def divide(a: float, b: float) -> float:
    """Divides.

    Args:
        a: what is divided
        b: by what
    """
    return a / b


class Shop:
    """Has a state for each dialogue, and a reward."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        self.row, self.basket = row, []
        row.pop("stock_is_counted", None)  # of the copy alone

    def buy(self, item: str, sizes: list[int] | None = None) -> list[str]:
        """Buys one.

        Args:
            item: what (choices: ["tea", "milk"])
            sizes: which, if it has any
        """
        self.basket.append(item)
        return self.basket

    def stock(self) -> dict[str, int]:
        """Says what there is."""
        return self.row["stock"]

    def reward(self) -> float:
        return float(len(self.basket))

    def _hidden(self) -> None:
        raise AssertionError("no tool")


def undocumented(a: int) -> int:
    return a


def unhinted(a) -> int:
    """Doubles.

    Args:
        a: what
    """
    return 2 * a


def half_documented(a: int) -> int:
    """Doubles."""
    return 2 * a


async def waits(a: int) -> int:
    """Waits.

    Args:
        a: how long
    """
    return a


def listed(*numbers: int) -> int:
    """Adds.

    Args:
        numbers: any
    """
    return sum(numbers)


class Wants:
    """Cannot be made without an argument."""

    def __init__(self, path: str) -> None: ...


class AsyncReset(Shop):
    async def reset(self, row: dict[str, Any], seed: int) -> None: ...


class Empty:
    def reset(self, row: dict[str, Any], seed: int) -> None: ...


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
