"""Files that appear in a folder together, or not at all.

A run writes into a staging folder beside their places, then a list of what goes, and only then moves
the files into place. A run that is killed before the list leaves everything as it was; the moves of
one that is killed after it are finished by the next run that writes to the folder.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from glm.errors import InputError, printable
from glm.files import check_plain_name, dump_json, open_regular, parse_json, write_atomically
from glm.outputs.layout import (
    CHECKPOINT,
    EXPORTED,
    LOCK,
    MODEL,
    PUBLISHED,
    REPLACED,
    RESULTS,
    TORCH,
    UNFINISHED,
    find,
)
from glm.processes import barrier

MOUNTS = "/proc/self/mountinfo"  # where the system has one


def check_replaceable(folder: Path, patterns: Collection[str]):
    """Raise InputError where what matches the ``patterns`` in ``folder`` is nothing that a run can replace.

    It replaces a file, a link, or torch/ with nothing but what an export and its user put there, and moves
    checkpoints aside. None of them may be mounted, or another user's in a folder such as /tmp.
    """
    mounts, of_folder = mount_points(), folder.stat()
    for path in find(folder, patterns):
        problem, files = None, []
        if path.name == TORCH and path.is_dir() and not path.is_symlink():
            files = [item for item in find(path, (*EXPORTED, PUBLISHED)) if item.is_file()]
            if others := sorted({*os.listdir(path)} - {item.name for item in files}):
                problem = f"holds {printable(others[0], 80)}, which no export writes"
        elif CHECKPOINT.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink() and not os.access(path, os.W_OK):
                problem = "may not be moved by this user"
        elif not (path.is_symlink() or path.is_file() and path.name != TORCH):
            problem = f"is no {'folder' if path.name == TORCH else 'file'}"
        if any(os.fsencode(item.parent.resolve() / item.name) in mounts for item in (path, *files)):
            problem = "is mounted, and can't be replaced"
        sticky, users = of_folder.st_mode & stat.S_ISVTX, (0, of_folder.st_uid, path.lstat().st_uid)
        if sticky and os.geteuid() not in users:
            problem = "is another user's"
        if problem:
            raise InputError(f"{path} {problem}: move it away, or give another --output_dir")


def mount_points():
    """Return the paths, bytes, on which something is mounted: folders, and files as docker does it."""
    with contextlib.suppress(OSError):
        paths = (line.split()[4] for line in Path(MOUNTS).read_bytes().splitlines())
        return {re.sub(rb"\\(\d{3})", lambda byte: bytes([int(byte[1], 8)]), path) for path in paths}
    return set()


@contextlib.contextmanager
def replace_together(folder: Path, patterns: Collection[str] = (), moves: bool = True):
    """Yield the path of an empty staging folder, whose files move into ``folder`` when the block ends.

    What matches the ``patterns`` in ``folder``, and is not among them, goes in the same move. An
    exception within the block takes the staging folder away. All processes have to enter and leave.

    Args:
        moves: whether this process is the one that makes and moves, one for each folder.
    """
    staging = Path(folder, UNFINISHED)
    if moves:
        if staging.is_dir() and not staging.is_symlink():
            shutil.rmtree(staging)
        else:
            staging.unlink(missing_ok=True)
        staging.mkdir(parents=True)
    barrier()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    barrier()
    if moves:
        written = {path.name for path in staging.iterdir()}
        replaced = sorted({path.name for path in find(folder, patterns)} - written)
        write_atomically(staging / REPLACED, dump_json(replaced))
        _move(staging, replaced)
        shutil.rmtree(staging)
    barrier()  # the others may read what is in place now


def finish_interrupted_replace(folder: Path):
    """Do what a run that was killed had left to move into ``folder``, if anything.

    The folder may come from a stranger: all is checked before anything is moved. The list names files
    of this folder alone, and what moves is a file, in no folder's place, or torch/.

    Raises:
        ValueError: where it is nothing that a run leaves. OSError: where it can't be read.
    """
    staging = Path(folder, UNFINISHED)
    if staging.is_symlink() or not os.path.lexists(staging / REPLACED):
        return
    with open_regular(staging / REPLACED) as file:
        names = parse_json(file.read(1 << 20))
    if not isinstance(names, list):
        raise ValueError(f"{REPLACED} holds no list")
    for name in names:
        if not any(fnmatch(check_plain_name(name), pattern) for pattern in (*MODEL, *RESULTS)):
            raise ValueError(f"{name!r} is nothing that a run replaces")
    for path in _staged(staging):
        file = path.is_file() and not Path(folder, path.name).is_dir()
        if path.is_symlink() or not (file or path.is_dir() and path.name == TORCH):
            raise ValueError(f"{path.name!r} is nothing that a run writes")
    _move(staging, names)


def _staged(staging):
    """The paths of what moves."""
    return [path for path in staging.iterdir() if path.name not in (REPLACED, LOCK, UNFINISHED)]


def _move(staging, names):
    """Move all files of the staging folder into the one that it is in, whose ``names`` go."""
    folder = staging.parent
    for path in _staged(staging):
        target = Path(folder, path.name)
        if path.is_dir():  # torch/, in which what its user put there stays
            for published in [] if target.is_symlink() else find(target, (PUBLISHED,)):
                published.replace(path / published.name)
            _remove(target)
        path.replace(target)
    for name in names:
        _remove(Path(folder, name))
    (staging / REPLACED).unlink()


def _remove(path):
    """Remove a file or a link, or of torch/ what an export has written."""
    if path.name == TORCH and path.is_dir() and not path.is_symlink():
        for file in find(path, EXPORTED):
            file.unlink()
        with contextlib.suppress(OSError):  # its user put something there
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


def check_complete(folder: str):
    """Raise InputError where a run was killed while it moved files into a ``folder`` that is only read."""
    if os.path.lexists(Path(folder, UNFINISHED, REPLACED)):
        raise InputError(
            f"--model_name_or_path {folder}: a run was killed while it replaced the model there: start it "
            f"again, or any other with --output_dir {folder}, which finishes that"
        )
