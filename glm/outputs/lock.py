"""Who may write to a folder: one run at a time, where the system lets it."""

import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path

from glm.errors import InputError, printable
from glm.outputs.layout import LOCK

NAME_MAX = 255  # bytes of a folder's name


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
            owner = printable(file.read(200).strip(), 200) or "one that has just begun"
            return None, f"is in use by another run, {owner}: wait for its end, or give another folder"
        except OSError:  # a file system without locks
            return file, None
        if os.fstat(file.fileno()).st_nlink:  # else a run that ended meanwhile has removed it
            break
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file, None


def is_own_output(path: Path) -> bool:
    """Return whether what this run prints goes to the file ``path``."""
    try:
        return any(os.path.samestat(os.fstat(number), os.stat(path)) for number in (1, 2))
    except OSError:  # a link to nowhere, or an output that is closed
        return False
