"""Read regular files alone, parse JSON within bounds, write completely or not at all and through no link.

Every room that reads a small file of a model folder, a checkpoint or output_dir does it here. Arrays
are mapped in glm/weights/formats.py, by the same ``open_regular``.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import stat
from pathlib import Path

LARGEST_JSON = 1 << 26  # bytes: a manifest of 100,000 weights has a third of it
LONGEST_TEXT = 1 << 14  # characters of a value: a path has 4096 bytes
MOST_HOLLOW = 100  # times as large as what is on a disk
MOST_LEVELS = 16  # of lists and objects in each other
MOST_VALUES = 1 << 22  # of a JSON text: each takes up to a hundred bytes of memory
# Controls, line separators, marks of direction and of no width.
UNSEEN = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


def open_regular(path):
    """Open a regular file for reading. Returns it, binary.

    Links are followed, for a model folder may be one of links: a hub's cache is. A file of no size is
    empty, also one of /proc, of which some are waited for.

    Raises:
        ValueError: where ``path`` is a folder, a pipe or a device. OSError: where it can't be opened.
    """
    # O_NONBLOCK: a pipe without a writer would be waited for.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no regular file")
        if not state.st_size:
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def is_hollow(file):
    """Return whether next to nothing of an open file is on a disk: a few bytes may stand for any size.

    A file of real values has few holes, however its file system compresses it.
    """
    size, end, data = os.fstat(file.fileno()).st_size, 0, 1 << 16
    while end < size and data * MOST_HOLLOW < size:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        except OSError as error:  # behind the last data; else of a file system that knows no holes
            return error.errno == errno.ENXIO
        data += end - start
    file.seek(0)
    return data * MOST_HOLLOW < size


def open_input(path):
    """Open for reading what the user names: a file, /dev/stdin, or another pipe such as ``<(zcat ...)``.

    Returns it, binary. A pipe without a writer is empty.

    Raises:
        ValueError: where ``path`` is a device or a socket. OSError: where it can't be opened.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(number).st_mode
        own_terminal = os.isatty(number) and os.path.sameopenfile(number, 0)
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or own_terminal):
            raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is a device, and no file")
        os.set_blocking(number, not stat.S_ISREG(mode))  # some files of /proc are waited for, too
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def parse_json(text, **kwargs):
    """Parse JSON, str or bytes of UTF-8. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text, **kwargs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path):
    """Return the object, dict, in a JSON file.

    Raises:
        ValueError: where it is no regular file, no JSON, too large, or holds something else than an
            object. OSError: where it can't be opened.
    """
    with open_regular(path) as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, LARGEST_JSON) + 1)
    if len(data) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON >> 20} MiB")
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    values = parse_json(data.decode("utf-8-sig"))
    if not isinstance(values, dict):
        raise ValueError(f"it is a {type(values).__name__}: it must be a JSON object")
    if is_too_deep(values):
        raise ValueError("it is nested too deeply")
    return values


def is_too_deep(values):
    """Return whether lists and objects are in each other more than MOST_LEVELS deep, bool.

    Python could neither copy such ``values``, a list or dict, nor write them again.
    """
    level = [values]
    for _ in range(MOST_LEVELS):
        parts = (value.values() if isinstance(value, dict) else value for value in level)
        level = [part for part in itertools.chain(*parts) if isinstance(part, (dict, list))]
    return bool(level)


def get_typed(values, name, kinds, default=None, least=-(2**63), most=2**63 - 1):
    """Return ``values[name]``, checked; ``default`` where it is missing. Without one, null is missing too.

    Args:
        values (dict): of a JSON file. kinds: a type or a tuple of types. An int is taken for a float,
            and a bool for nothing but a bool.
        least, most: of a number.

    Raises:
        ValueError: where it is of another type, out of the range, or no finite number.

    Example: ``get_typed({"step": "3"}, "step", int)`` raises "'step' is a str: it must be an int".
    """
    value = values.get(name, default)
    if value is None and default is None or name not in values:
        return default
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or isinstance(value, bool) and bool not in kinds:
        expected = " or ".join(f"{'an' if kind is int else 'a'} {kind.__name__}" for kind in kinds)
        raise ValueError(f"{name!r} is a {type(value).__name__}: it must be {expected}")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            check_text(text, repr(name))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN is in no range, and an int may be too large for math.isfinite.
    if number and not least <= value <= most:
        raise ValueError(f"{name!r} is out of its range")
    return value


def check_text(text, name):
    """Return ``text`` if any file can hold it, else raise ValueError, which calls it ``name``."""
    if len(text) > LONGEST_TEXT or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} is too long, or no text in UTF-8")
    return text


def take_known(values, kinds, owner=object):
    """Return those of ``values`` that ``kinds`` names, each checked as by get_typed. null counts as missing.

    Args:
        values (dict): of a JSON file. What ``kinds`` does not name is left out.
        kinds (dict): (type,) or (type, least, most) by name.
        owner: the class that takes the values. Its methods are no values.

    Raises:
        ValueError: where a value is of another type or out of its range, or named like a method.
    """
    for name in values:
        if name not in kinds and callable(getattr(owner, name, None)):
            raise ValueError(f"{name!r} is no setting")
    found = {name: get_typed(values, name, kind, None, *limits) for name, (kind, *limits) in kinds.items()}
    return {name: value for name, value in found.items() if value is not None}


def check_plain_name(name):
    """Return ``name`` if it is the plain name of a file, else raise ValueError: no path, no dots alone."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{str(name)[:80]!r} is no plain name of a file")
    return name


def dump_json(values, **kwargs):
    """Return ``values`` as JSON, str. A number that is not finite, which JSON has not, becomes null.

    A character that can't be seen is escaped: a terminal may obey it, and a reader may end a line there.
    """

    def finite(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps(finite(values), allow_nan=False, **kwargs)
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write_atomically(path, text):
    """Write a file completely or not at all. A link at ``path`` is replaced, and never written through."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        number = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
