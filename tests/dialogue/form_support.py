"""Chat templates that write calls as those of model families do, each as short as it can be; of no model."""

from __future__ import annotations

_TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def writes(call: str) -> str:
    """A template in which a call of an earlier turn, ``c.function``, is written as ``call``."""
    return _TOOLS + _TURNS.replace("CALL", call)


HERMES = writes('<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>')  # fmt: skip
# Qwen3 and others leave out of earlier turns what was thought.
FORGETS = HERMES.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip() }}")
# Llama 3 writes the JSON alone, with another key.
LLAMA = writes('{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}')
QWEN_CODER = writes(
    "\n<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
SEED = writes(
    "\n<seed:tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>{{ v }}</parameter>\n{% endfor %}</function>\n</seed:tool_call>"
)
# GLM ends no turn: the header of the next one does. Arguments that are no text are JSON.
GLM = (
    "[gMASK]{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}"
    "{{ '\n<tool_response>\n' + m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Mistral's templates insist on ids of nine characters, and on turns of user and assistant by turns.
MISTRAL = (
    "{% set talk = messages | rejectattr('role', 'equalto', 'tool') | list %}{% for m in talk %}"
    "{% if not m.tool_calls and (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('by turns') }}{% endif %}"
    "{% endfor %}<s>{% for m in messages %}{% if m.role == 'user' %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}CALLS</s>{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]{% endif %}{% endfor %}'
)
MISTRAL_LIST = MISTRAL.replace(
    "CALLS",
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] }}, \"id\": \"{{ c.id }}\"}{{ '' if loop.last else ', ' }}{% endfor %}]",
)
MISTRAL_ARGS = MISTRAL.replace(
    "CALLS",
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}",
)
# Families that write calls in none of the forms that are read.
FUNCTION_GEMMA = writes(
    "<start_function_call>call:{{ c.function.name }}{argument:<escape>v<escape>}<end_function_call>"
)
GRANITE = writes('<|tool_call|>[{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]')
DEEPSEEK = writes(
    "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>{{ c.function.name }}\n```json\n"
    "{{ c.function.arguments | tojson }}\n```<|tool_call_end|>"
)
PYTHONIC = writes("[{{ c.function.name }}(argument='value of the argument')]")
SILENT = writes("")
