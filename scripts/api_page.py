"""Writes docs/api.md from the signatures and docstrings of the public names: `python scripts/api_page.py`."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import gspo_lightning

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# Public names

Everything that `from gspo_lightning import ...` offers, written by `python scripts/api_page.py` from the docstrings; a
test holds it current. Names that are not here may change in any release. Letters in shapes:

"""


def page() -> str:
    """The whole page."""
    legend = inspect.getdoc(sys.modules[gspo_lightning.PromptBatch.__module__]) or ""
    rows = re.findall(r"^([A-Z])\s{2,}(.+)$", legend, re.MULTILINE)
    table = "| letter | meaning |\n|---|---|\n" + "".join(
        f"| {letter} | {meaning.replace('``', '`')} |\n" for letter, meaning in rows
    )
    names = [name for name in gspo_lightning.__all__ if name != "__version__"]
    return HEAD + table + "".join(_section(name, getattr(gspo_lightning, name)) for name in names)


def _section(name: str, thing: Any) -> str:
    kind = "class" if inspect.isclass(thing) else "function"
    path = f"{thing.__module__}.{thing.__qualname__}"
    parts = [f"\n## {name}\n\n*{kind}*, `{path}`\n\n```py\n{name}{_signature(thing)}\n```\n\n{_doc(thing)}\n"]
    if inspect.isclass(thing):
        fields = _field_docs(thing)
        if fields:
            parts.append("\n" + "".join(f"- `{field}`: {_inline(text)}\n" for field, text in fields.items()))
        for member, method in _methods(thing):
            parts.append(f"\n**`{member}`** {_inline(inspect.getdoc(method) or '', whole=False)}\n")
    return "".join(parts)


def _signature(thing: Any) -> str:
    if issubclass(thing, Exception) if inspect.isclass(thing) else False:
        return "(message: str)"
    if getattr(thing, "_is_protocol", False):
        return ""
    signature = inspect.signature(thing)
    parameters = [p.replace(annotation=_plain(p.annotation)) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    text = re.sub(r"<factory>|<class '(\w+)'>|<function (\w+)[^>]*>", lambda m: m[1] or m[2] or "...", text)
    if len(text) > 90:
        inner = [str(p) for p in parameters]
        at = next((n for n, p in enumerate(parameters) if p.kind is inspect.Parameter.KEYWORD_ONLY), None)
        if at is not None:
            inner.insert(at, "*")
        text = "(\n" + "".join(f"    {re.sub('<factory>', '...', p)},\n" for p in inner) + ")"
    return text


def _plain(annotation: Any) -> Any:
    return annotation if annotation is inspect.Parameter.empty else _Name(annotation)


class _Name:
    """An annotation that prints as it is written in the source."""

    def __init__(self, annotation: Any) -> None:
        self.text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def _doc(thing: Any) -> str:
    text = thing.__doc__ or ""
    if text.startswith(f"{thing.__name__}("):  # what `dataclass` writes where there is no docstring
        text = ""
    lines = inspect.cleandoc(text).splitlines()
    out, listing = [], False
    for line in lines:
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            out += [f"*{line[:-1]}*", ""]
            listing = True
        elif listing and (found := re.match(r"    (\w+): (.*)", line)):
            out.append(f"- `{found[1]}`: {found[2]}")
        elif listing and line.startswith("    "):
            out.append(f"  {line.strip()}" if out[-1].startswith(("- ", "  ")) else line.strip())
        else:
            listing = listing and bool(line)
            out.append(line)
    return "\n".join(out).replace("``", "`")


def _inline(text: str, whole: bool = True) -> str:
    first = text if whole else text.split("\n\n")[0]
    return re.sub(r"\s+", " ", first).replace("``", "`")


def _field_docs(thing: type) -> dict[str, str]:
    """The strings under annotated public fields, those of a base first, which Python itself does not keep."""
    found = {}
    for base in thing.__bases__:
        if base.__module__.startswith("gspo_lightning."):
            found |= _field_docs(base)
    body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = str(after.value.value)  # type: ignore[attr-defined]
    return {field: text for field, text in found.items() if not field.startswith("_")}


def _methods(thing: type) -> list[tuple[str, Any]]:
    """Public methods and properties that the class itself defines, in the order of the source."""
    return [
        (name, method)
        for name, method in vars(thing).items()
        if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, property))
    ]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
