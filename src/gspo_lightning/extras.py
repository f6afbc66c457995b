"""Says what to install if an optional package is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def install_line(extra: str) -> str:
    """A ``pip install`` command with the packages of an extra, in the versions that were tested.

    It names the packages, because the extra itself can be installed only in the repository's folder.

    Args:
        extra: a key of ``[project.optional-dependencies]``.
    """
    try:
        lines = requires("gspo-lightning") or []
    except PackageNotFoundError:  # sources on the path, installed nowhere
        lines = []
    packages = [name for line in lines for name, _, of in [line.partition(";")] if _extra(of) == extra]
    if not packages:
        return f"pip install -e '.[{extra}]' in the folder of the repository"
    return "pip install " + " ".join(name.strip() for name in packages)


def _extra(marker: str) -> str | None:
    found = re.search(r"""extra == ['"]([^'"]+)['"]""", marker)
    return found and found[1]
