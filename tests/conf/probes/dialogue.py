"""Environments: what they answer and what it becomes in tokens."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from gspo_lightning.data.templating import make_prompt
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.reading import load_tokenizer
from gspo_lightning.types import Prompt
from tests.conf.probes.base import Probe, built
from tests.conf.probes.data import around, task_in
from tests.dialogue.tool_support import heard

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>{% endif %}"
)
ROW = {"answer": "6", "secret": 6, "low": 1, "high": 9}


def threads_of(environments: Any) -> set[str]:
    """Names of the threads in which environments run."""
    return set(environments.threads.all([lambda: threading.current_thread().name] * 9))


def played(node: dict[str, Any], folder: Path) -> Any:
    """Six turns with the environment: tokens between them, messages and rewards."""
    tokenizer = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    tokenizer.chat_template = THINKS
    prompt = Prompt("row", [{"role": "user", "content": "?"}], torch.ones(1, dtype=torch.long), ROW)
    environments = built(node)
    dialogue = environments.begin(prompt, 0, tokenizer)
    between = []
    for text in ("<calc>2*3</calc>", "5", "4", "8", "7", "6"):
        between.append(heard(dialogue, text, (tokenizer.eos_token_id,)))
        if between[-1] is None:
            break
    return between, dialogue.messages, dialogue.result(), threads_of(environments)


def asked(node: dict[str, Any], folder: Path) -> Any:
    """Prompt and two turns with tools; what can be called is what the prompt shows."""
    tokenizer = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    tokenizer.chat_template = "{{ tools | tojson }} Write <tool_call>." + THINKS
    tools = built({**node, "chat_template_kwargs": {**node["chat_template_kwargs"], "tools": node["functions"]}})
    row = {"prompt": [{"role": "user", "content": "?"}]}
    prompt = make_prompt(row, tokenizer, "row", tools.chat_template_kwargs)
    dialogue = tools.begin(prompt, 0, tokenizer)
    call = '<tool_call>{"name": "evaluate", "arguments": {"expression": "2*3"}}</tool_call>'
    between = [heard(dialogue, call, (tokenizer.eos_token_id,)) for _ in range(2)]
    limited = dialogue.environment.limited
    timeout_s = limited and limited.timeout_s
    return prompt.input_ids.tolist(), between, dialogue.messages, timeout_s, threads_of(tools)


def one_turn(node: dict[str, Any], folder: Path) -> Any:
    """What the first turn earns."""
    environment = built(node)() if node.get("_partial_") else built(node)
    environment.reset(ROW, 0)
    return environment.step("5")


GAME = {"_target_": "gspo_lightning.dialogue.GuessTheNumber", "_partial_": True}
PROBES = [
    Probe(["environment=calculator"], "environment", played, {
        "make": GAME, "max_turns": 1, "chat_template_kwargs": {"enable_thinking": True}, "workers": 2,
    }),
    Probe(["environment=guess_the_number"], "environment.make", one_turn, {"turn_rewards": True}),
    Probe(
        ["environment=tools", "environment.functions=[gspo_lightning.dialogue.calculator.evaluate]"],
        "environment", asked, {
            "functions": ["tests.dialogue.tool_support.add"], "max_turns": 1,
            "chat_template_kwargs": {"enable_thinking": True}, "call_form": "xml",
            "timeout_s": 0.25, "workers": 2,
        },
    ),
    Probe(["data=arithmetic"], "data.task", task_in(around), {
        "instruction": "Now.", "examples": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
    }),
    Probe(["data=matmul"], "data.task", task_in(around), {
        "prompt": "Multiply.", "columns": {"letter": "e"}, "num_validation": 3, "name": "other",
    }),
    Probe(["data=secret_number"], "data.task", task_in(around), {
        "low": 2, "high": 8, "seed": 5, "num_validation": 3, "examples": [{"role": "assistant", "content": "5"}],
    }),
]  # fmt: skip
