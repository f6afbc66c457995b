"""The exception for mistakes a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a dataset row, a model folder or a reward function.

    The message is one line that names the key, row or file and the fix. The command line prints it
    without a traceback and exits with code 2.
    """


def reason(error: BaseException) -> str:
    """What an exception of someone else's code says, in one line that is never empty.

    A message that says nothing by itself (none at all, or the key of a KeyError) has the name of its type.
    """
    said = " ".join(str(error).split())
    if said and not isinstance(error, KeyError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
