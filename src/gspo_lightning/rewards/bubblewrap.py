"""The command line of bubblewrap, which lists everything that the process in the sandbox sees."""

from __future__ import annotations

import os
import shutil
import sys

PYTHON = "/python/bin/python"
"""Path of the interpreter inside the sandbox."""


def command(disk_mb: int, as_root: bool) -> list[str]:
    """The command line up to ``--seccomp``; ``disk_mb`` is the size of ``/tmp``, the one folder it may write to."""
    rights = ["--unshare-user"]
    if as_root:  # it stays in the trainer's user namespace until the runner becomes someone else
        rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    line = [str(shutil.which("bwrap")), *rights, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    line += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"]
    # Without this, bwrap would make the parent folders of a mount readable by itself only.
    for folder in ("/usr", "/python", "/python/bin"):
        line += ["--perms", "0755", "--dir", folder]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            line += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            line += ["--ro-bind", folder, folder]
    # Under our own path: the folders above a home are closed to the sandbox's user, and should stay hidden.
    library = os.path.join(sys.base_prefix, "lib")
    line += ["--ro-bind", os.path.realpath(sys.executable), PYTHON, "--ro-bind", library, "/python/lib"]
    line += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for root, there in ((sys.base_prefix, "/python"), ("/usr", "/usr")):
        for packages in (f"lib/{version}/site-packages", "lib/python3/dist-packages"):
            if os.path.isdir(f"{root}/{packages}"):
                line += ["--tmpfs", f"{there}/{packages}", "--remount-ro", f"{there}/{packages}"]
    line += ["--dev", "/dev", "--remount-ro", "/dev"]
    line += ["--perms", "1777", "--size", str(disk_mb << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*line, "--remount-ro", "/"]
