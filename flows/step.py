"""Have DVC bring one step up to date, and tell what happened: it ran, it was up to date, or it failed."""

import contextvars
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from flows import own_files, verify
from nirvana.errors import InputError
from tasks.workers.process import last_error, log_file, parsed_line, read_record

_ATTEMPTS = 3  # at making a damaged result again: more would hide a disk that fails

Logger = logging.Logger | logging.LoggerAdapter


class StepFailedError(Exception):
    """A step failed; the message is its one-line cause."""


def bring_up_to_date(name: str, logger: Logger, wait_seconds: float, force: bool = False) -> bool:
    """Run, restore or leave one step, as DVC sees fit.

    Args:
        name: The step.
        logger: Where its log lines go while it runs.
        wait_seconds: How long to wait for other processes that hold the step's files.
        force: Run even if DVC sees no change.

    Returns:
        True if the step's code ran, False if its outputs were there or came back from DVC's run-cache.

    Raises:
        StepFailedError: If the step or DVC failed.
    """
    token = _token(name)
    try:
        with _followed(name, token, logger):
            _reproduce_whole(name, token, logger, wait_seconds, force)
    except StepFailedError:
        raise
    except InputError as error:
        raise StepFailedError(str(error)) from error
    except Exception as error:
        raise StepFailedError(_cause(name, token, error)) from error
    except BaseException:  # cancelled: DVC has freed its lock, so the step must not write any more
        kill_steps()
        raise
    return _token(name) != token


def _reproduce_whole(name: str, token: str | None, logger: Logger, wait_seconds: float, force: bool) -> None:
    """Call DVC until the step's outputs are what dvc.lock says of them.

    DVC restores from its caches unseen, so it is asked again without what turns out damaged.
    """
    own_files.mend_own_files(logger.warning)
    verify.give_copies(name, logger)
    for each in verify.changed_in_place(name):
        logger.warning("%s was changed since %s wrote it; made again", verify.said_files(each.files), name)
    for _ in range(_ATTEMPTS):
        verify.prepare_cache(name, logger.warning)
        try:
            _reproduce(name, logger, wait_seconds, force)
        except StepFailedError:
            raise
        except Exception as error:
            if _token(name) != token or not _mended(name, error, logger):
                raise
            continue
        if not verify.drop_damaged_outputs(name, logger.warning):
            return
        force = False
    raise StepFailedError(
        f"{name}: expected its outputs to stay as they were written, they differed {_ATTEMPTS} times; "
        "check the disk and its memory, then run the same command again"
    )


def _mended(name: str, error: Exception, logger: Logger) -> bool:
    """Tell whether something of DVC's own was damaged, and is not any more."""
    mended = own_files.mend_own_files(logger.warning)
    for recorded in verify.recorded_of(name):
        mended |= verify.drop_damaged_objects(recorded.md5, verify.Ledger(), logger.warning)
    if not mended and own_files.is_about_state(error):
        mended = own_files.drop_state(logger.warning)
    return mended


def kill_steps() -> None:
    """Kill the step processes that this process started, and theirs."""
    for child in psutil.Process().children():
        try:
            if child.cmdline()[1:3] == ["-m", "tasks"]:
                for process in [*child.children(recursive=True), child]:
                    process.kill()
                child.wait(10)
        except (psutil.Error, IndexError):
            continue


def _reproduce(name: str, logger: Logger, wait_seconds: float, force: bool) -> None:
    """Call DVC until nobody else holds the step's files.

    The repository's own lock is held for moments and waited for inside DVC (`_wait_for_lock`): giving up on it
    after the step ran would lose the run.
    """
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # that a stage runs is what the task itself says
    deadline = time.monotonic() + wait_seconds
    pause = 1.0
    while True:
        try:
            with Repo(".", _wait_for_lock=True) as repo:
                repo.reproduce(name, single_item=True, force=force)
            return
        except Exception as error:
            holder = _lock_holder(error)
            if holder is None:
                raise
            if time.monotonic() + pause > deadline:
                raise StepFailedError(
                    f"{name} waited {wait_seconds:.0f} s for {holder}; stop it or run the same command later"
                ) from error
            logger.warning("waiting for %s, which holds the files of %s; next try in %.0f s", holder, name, pause)
        time.sleep(pause)
        pause = min(pause * 2, 30.0)


def _lock_holder(error: BaseException) -> str | None:
    """Return who holds the lock if that is what DVC complains about."""
    from dvc.lock import LockError

    found: BaseException | None = error
    while found is not None and not isinstance(found, LockError):
        found = found.__cause__
    if found is None:
        return None
    found_holders = re.findall(r"\(PID (\d+)\): (.*)", str(found))
    holders = sorted({f"process {pid} ({command.strip()})" for pid, command in found_holders})
    return ", ".join(holders) or "another DVC process"


def _token(name: str) -> str | None:
    return (read_record(name) or {}).get("token")


def _cause(name: str, token: str | None, error: Exception) -> str:
    """Return the last error of the step's log if it ran, else what DVC says."""
    if _token(name) != token and (said := last_error(name)):
        return said
    # DVC wraps: the innermost error says it best
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    text = " ".join(str(innermost).split())
    if re.search(r"exited with -9$", text):
        return f"{name} was killed (signal 9), perhaps for lack of memory; run the same command again"
    return f"{name}: {text or type(innermost).__name__}"


@contextmanager
def _followed(name: str, token: str | None, logger: Logger) -> Iterator[None]:
    """Pass the step's log lines on to `logger` while the step runs."""
    done = threading.Event()
    run = contextvars.copy_context().run  # which server Prefect's logger speaks to is a setting of this context
    arguments = (_follow, name, token, logger, done)
    follower = threading.Thread(target=run, args=arguments, name=f"log of {name}", daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join(timeout=10)


def _follow(name: str, token: str | None, logger: Logger, done: threading.Event) -> None:
    started = False
    offset = 0
    while True:
        last = done.wait(0.3)
        # the log of an earlier run is not news: its token is the old one
        started = started or _token(name) != token
        if started:
            offset = _pass_on(name, offset, logger, last)
        if last:
            return


def _pass_on(name: str, offset: int, logger: Logger, last: bool) -> int:
    try:
        with log_file(name).open("rb") as file:
            file.seek(offset)
            content = file.read()
    except OSError:
        return offset
    # a line that is being written stays for the next look
    complete = content if last else content[: content.rfind(b"\n") + 1]
    for line in complete.decode("utf-8", errors="replace").splitlines():
        level, message = parsed_line(line)
        if message.strip():
            logger.log(level, "%s", message)
    return offset + len(complete)
