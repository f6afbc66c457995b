"""How a program ends: the errors that become one line, by a single process, on several ranks and in a sweep, and the
exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from gspo_lightning.config.groups import check_mode, check_overrides, check_own_files, check_rewards_add_up
from gspo_lightning.distributed import first_error, rank_watch
from gspo_lightning.distributed.rendezvous import naming_the_port
from gspo_lightning.errors import UserError, named_reason
from gspo_lightning.extras import install_line
from gspo_lightning.how_to_resume import can_resume, resume_line
from gspo_lightning.program import command_line
from gspo_lightning.program.interrupt import (
    STOPPED,
    Interrupted,
    is_first_started,
    is_interrupt,
    raise_at_interrupt,
    wants_traceback,
)
from gspo_lightning.program.redact import masked, masked_stderr
from gspo_lightning.program.sweep_job import CODES, SweepStopped, overrides_of
from gspo_lightning.screen import escape_what_no_screen_shows, has_no_reader
from gspo_lightning.users_code import raised_in

EXPECTED: tuple[type[Exception], ...] = (*CODES.values(), HydraException, OmegaConfBaseException)
"""Errors that a user can mend, and those that end a run whose config was right: one line, without a traceback."""
_OF_SWEEPS = re.compile(r"Could not (?:find|load) '(hydra/(?:launcher/(?:joblib|submitit_\w+)|sweeper/optuna))'")


def run(main: Callable[[], Any], *, of_hydra: bool = True) -> None:
    """Runs a program: a mistake of the user prints one line and exits with code 2, without a traceback.

    Args:
        main: the program.
        of_hydra: whether its flags are those of Hydra; if not, it reads the command line itself.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing its own lines
    if os.getcwd() not in sys.path:  # the user's own modules; after the libraries, which they must not shadow
        sys.path.append(os.getcwd())
    escape_what_no_screen_shows()
    try:
        raise_at_interrupt()
        logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs of a mistake is in our line
        if of_hydra:
            _read_command_line()
        with masked_stderr():  # Hydra repeats the command line of a job that failed
            main()
    except EXPECTED as error:
        _exit_with_line(error, wants_traceback())
    except KeyboardInterrupt as stopped:
        if wants_traceback():  # Ctrl-C shows what a program waits for
            traceback.print_exc()
        if first_error.is_first_rank() and is_first_started():
            print(f"error: {stopped if isinstance(stopped, Interrupted) else STOPPED}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        if not has_no_reader():
            raise
        sys.exit(128 + signal.SIGPIPE)  # as a program ends that does not catch the signal
    except (OSError, ValueError, YAMLError) as error:
        if (file := _config_read(error)) is not None:
            _exit_with_line(UserError(f"{file}: {_reason(error)}; correct this config file"), wants_traceback())
        if not isinstance(error, OSError) or (key := _key_of_folder(error)) is None:
            raise
        _exit_with_line(no_run_dir(error.filename, error, key), wants_traceback())


def _read_command_line() -> None:
    line = command_line.read(sys.argv[1:])
    sys.argv[1:] = line.arguments
    if line.info:  # which is logged
        logging.getLogger("hydra").setLevel(logging.NOTSET)
    check_overrides(line.overrides)
    if line.multirun:
        check_mode(line.overrides, is_sweep=True)


_JOB_OF: dict[str, int] = {}
"""Folder -> number of the job that has it, of the sweep in this process."""


def _check_job() -> None:
    """Refuses what would have no effect without a word, another working folder than that of the command, and a job in
    the folder of an earlier one of its sweep.

    The records of that one would be set aside, and those of the one before it removed; with ``ckpt_path=auto`` it would
    be resumed.
    """
    hydra = HydraConfig.get()
    check_own_files(hydra.runtime.config_sources, hydra.runtime.choices, str(hydra.job.config_name))
    check_rewards_add_up(hydra.runtime.config_sources, _files_read(hydra))
    if hydra.job.chdir:
        raise UserError(
            "hydra.job.chdir=true: relative paths (ckpt_path, model.path, files of data) count from the folder in "
            "which the command is given, and would count from that of the run; leave it out: what a run writes is in "
            "its folder anyway, which a config names by ${hydra:runtime.output_dir}"
        )
    if hydra.mode == RunMode.RUN:  # known here alone: a config can set it too
        of_hydra, task = overrides_of(hydra)
        check_mode([*of_hydra, *task], is_sweep=False)
    elif (first := _JOB_OF.setdefault(hydra.runtime.output_dir, hydra.job.num)) != hydra.job.num:
        raise UserError(
            f"hydra.sweep.subdir={hydra.sweep.subdir}: job {first} of this sweep has that folder already; give each "
            "job its own, such as the default ${hydra.job.num}"
        )


def one_job(work: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Runs ``work``. A user's mistake ends a single run here; in a sweep it must not end the other jobs.

    A sweep runs all of its jobs and then ends with the first failure and its exit code; each failure prints a line.
    """
    try:
        _check_job()
        with naming_the_port(), _naming_the_logger():
            return work(cfg)
    except EXPECTED as error:
        rank_watch.stop()
        if HydraConfig.get().mode != RunMode.RUN:
            job = HydraConfig.get().job
            line = masked(f"job {job.num} ({job.override_dirname}): {' '.join(str(error).split())}")
            print(f"failed: {line}", file=sys.stderr, flush=True)
            raise CODES[_code(error)](line) from error
        folder = Path(HydraConfig.get().runtime.output_dir)
        # An error raised on every rank is printed by one of them.
        line = masked(" ".join(str(error).split()))
        is_news = not first_error.several_ranks() or first_error.record(folder, line, _code(error))
        first_error.leave_nothing(folder)
        _exit_with_line(error, bool(cfg.traceback), is_news=is_news)
    except Exception as error:
        rank_watch.stop()
        if (of_user := raised_in(error)) is not None:
            on = f"; mend it{how}" if (how := _and_resume()) else ""
            error.add_note(f"error: {masked(of_user)}{on}")  # below the traceback
        if first_error.several_ranks():
            _end_with_the_others(error, Path(HydraConfig.get().runtime.output_dir))
        raise
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SweepStopped) or not is_interrupt(end):
            raise
        rank_watch.stop()
        first_error.leave_nothing(Path(HydraConfig.get().runtime.output_dir))
        line = str(end) if isinstance(end, Interrupted) else STOPPED
        others = "" if HydraConfig.get().mode == RunMode.RUN else "; the jobs after it were not run"
        raise Interrupted(f"{line}{others}") from end


@contextmanager
def _naming_the_logger() -> Iterator[None]:
    """Context in which what a logger of Lightning raises is a line: W&B without a login, a server that is gone."""
    try:
        yield
    except EXPECTED:
        raise
    except Exception as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if str(frame.f_globals.get("__name__")).startswith(_LOGGERS) and "self" in frame.f_locals:
                name = type(frame.f_locals["self"]).__name__
                said = named_reason(error).removesuffix(".")
                line = f"logger: {name} raised {said}; mend it, or leave that logger out{_and_resume()}"
                raise UserError(line) from error
        raise


def _and_resume() -> str:
    """How this job's run goes on, to follow what is to be done first; empty where it has saved nothing."""
    last = Path(HydraConfig.get().runtime.output_dir) / "checkpoints" / "last.ckpt"
    return f" and {resume_line(last)}" if can_resume(last) else ""


_LOGGERS = ("lightning.pytorch.loggers.", "lightning.fabric.loggers.")


def _files_read(hydra: Any) -> list[ResultDefault]:
    """The config files that Hydra has put together for this job; empty outside of a program of it."""
    if not GlobalHydra.instance().is_initialized():
        return []
    of_hydra, task = overrides_of(hydra)
    loader = GlobalHydra.instance().config_loader()
    return loader.compute_defaults_list(str(hydra.job.config_name), [*of_hydra, *task], RunMode.RUN).defaults


def _key_of_folder(error: OSError) -> str | None:
    """The key of the folder that Hydra could not make before any of our code ran; None for any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(frame.name in ("run_job", "sweep", "launch") and "mkdir" in str(frame.line) for frame in frames):
        return None
    return "hydra.sweep.dir" if any(frame.name == "multirun" for frame in frames) else "hydra.run.dir"


def _config_read(error: Exception) -> str | None:
    """The config file at which Hydra failed; None for an error of anything else."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_hydra = [frame for frame in frames if str(frame.f_globals.get("__name__")).startswith("hydra.")]
    calls = [frame.f_locals for frame in of_hydra if frame.f_code.co_name == "load_config"]
    return next((str(call[name]) for name in ("full_path", "config_path") for call in calls if name in call), None)


def _reason(error: Exception) -> str:
    """What is wrong with a config file, and where in it."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason} at byte {error.start})"
    return " ".join(str(error).split())


def _exit_with_line(error: Exception, with_traceback: bool, *, is_news: bool = True) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    # Hydra appends its search path, OmegaConf its types.
    # Of some mistakes only the cause has words.
    text = str(error) or str(error.__cause__ or type(error).__name__)
    line = " ".join(text.split()).split(" Config search path:")[0].removesuffix(" object_type=dict")
    if isinstance(error, ConfigCompositionException) and line.startswith("Error merging") and error.__cause__:
        line = f"{line}: {str(error.__cause__).splitlines()[0]}"
    if (extra := _OF_SWEEPS.search(line)) is not None:
        line = f"{extra[1]} is not installed; run {install_line('sweep')}"
    if is_news:
        print(f"error: {masked(line)}", file=sys.stderr, flush=True)
    sys.exit(_code(error))


def _code(error: Exception) -> int:
    return next((code for code, kind in CODES.items() if isinstance(error, kind)), 2)


def _end_with_the_others(error: Exception, folder: Path) -> None:
    """On one of several ranks: notes this rank's own error; if it only lost another, ends with that one's error."""
    if not first_error.lost_a_rank(error):
        first_error.record(folder, masked(raised_in(error) or named_reason(error)), 1)
        return
    line, code = first_error.first(folder)
    print(f"error: {line}", file=sys.stderr, flush=True)
    first_error.leave_nothing(folder)
    # Threads of the process group may wait for the rank that is gone.
    os._exit(code)


def no_run_dir(folder: str | Path, error: OSError, key: str = "hydra.run.dir") -> UserError:
    """The error of a folder, set by ``key``, that cannot be written to."""
    return UserError(f"{key}={folder}: cannot write there ({error.strerror}); choose another folder")
