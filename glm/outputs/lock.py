"""Who may write to a folder: one run at a time, where the system lets it."""

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path

from glm.errors import InputError, printable
from glm.files import open_regular
from glm.outputs.layout import LOCK, UNFINISHED
from glm.outputs.replace import finish_interrupted_replace
from glm.processes import are_several_machines, gather_objects, is_first_of_run

NAME_MAX = 255  # bytes of a folder's name
LONGEST_NAME = 200  # characters of a process's


def check_writable(flag: str, folder: str):
    """Raise InputError where ``folder`` can't be made, or can't be written to."""
    if max(map(len, os.fsencode(folder).split(b"/"))) > NAME_MAX:
        raise InputError(f"{flag} is longer than a folder's name may be: give a shorter one")
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise InputError(f"{flag} {folder}: {existing} is not a folder: give another one")
    try:  # os.access lets root write in /proc. The other processes look for other names than LOCK*.
        tempfile.TemporaryFile(prefix=LOCK, dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{flag} {folder}: {existing} can't be written to ({error.strerror}): give another one"
        ) from error


@contextlib.contextmanager
def hold_together(folder: Path, own: bool, writes: bool):
    """Hold a ``folder`` for this run within the block, and finish what a killed run had left to move there.

    The processes of all machines share it, and the first of the run holds its lock. Or each machine has
    its own, and the process that writes there holds that. The system takes a lock from a process that
    ends, however it does. All processes have to enter and leave.

    Args:
        own: whether machines have their own. writes: whether this process is the one that writes.

    Raises:
        InputError: where another run holds it, or machines share it or not, other than ``own`` says.
    """
    first = is_first_of_run()
    with contextlib.ExitStack() as held:
        problem = held.enter_context(_hold(folder)) if first else None
        problem, owner = gather_objects((problem, name_this_process()))[0]
        if problem is None:
            shared = all(gather_objects(first or is_locked_by(folder, owner)))
            if not (shared or own):
                problem = (
                    f"is not the folder that the first of this run has locked ({owner}): give one that all "
                    "machines share, or, where none holds a part of the model, --save_on_each_node"
                )
            elif shared and own and are_several_machines():
                problem = "is one folder for all machines: leave --save_on_each_node out"
            elif not shared:
                problems = gather_objects(held.enter_context(_hold(folder)) if writes and not first else None)
                problem = next(filter(None, problems), None)
        if problem:
            raise InputError(f"--output_dir {folder} {problem}")
        yield


@contextlib.contextmanager
def _hold(folder):
    """Yield None while this process holds ``folder``, made if need be; or why it can't, str."""
    file, path, made, what = None, Path(folder, LOCK), not folder.exists(), "lock can't be taken"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file, problem = take_lock(path)
            what = f"{UNFINISHED} can't be moved"
            if file:
                finish_interrupted_replace(folder)
        except (OSError, ValueError) as error:
            problem = f"can't be used, its {what} ({error}): remove that, or give another folder"
        yield problem
    finally:
        if file:
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()
            if made:
                with contextlib.suppress(OSError):  # something was written
                    folder.rmdir()


def take_lock(path: Path):
    """Lock the file ``path``, which no link leads to.

    Returns:
        it, open, and None; or None and why it can't be had, str.

    Raises:
        OSError: where it can't be opened.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+")
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            return None, f"holds a {LOCK} that no run wrote: remove it"
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = printable(file.read(LONGEST_NAME).strip(), LONGEST_NAME) or "one that has just begun"
            return None, f"is in use by another run, {owner}: wait for its end, or give another folder"
        except OSError:  # a file system without locks
            break
        if os.fstat(file.fileno()).st_nlink:  # else a run that ended meanwhile has removed it
            break
    file.truncate(0)
    print(name_this_process(), file=file, flush=True)
    os.fsync(file.fileno())  # another machine is about to read it
    return file, None


def name_this_process() -> str:
    """Return what the owner of a lock writes into it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_locked_by(folder: Path, name: str) -> bool:
    """Return whether another process of that ``name`` holds the lock of ``folder``, as this one sees it.

    The owner itself must not ask: the system would take it from a process that closes the file.
    """
    with contextlib.suppress(OSError, ValueError), open_regular(folder / LOCK) as file:
        return file.read(LONGEST_NAME).decode().strip() == name
    return False


def is_own_output(path: Path) -> bool:
    """Return whether what this run prints goes to the file ``path``."""
    try:
        return any(os.path.samestat(os.fstat(number), os.stat(path)) for number in (1, 2))
    except OSError:  # a link to nowhere, or an output that is closed
        return False
