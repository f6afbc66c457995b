"""The exception for mistakes a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a dataset row, a model folder or a reward function.

    The message is one line that names the key, row or file and the fix. The command line prints it
    without a traceback and exits with code 2.
    """
