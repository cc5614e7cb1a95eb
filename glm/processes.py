"""The processes of a run: which one this is, what all of them have to know, the signals that end them."""

import contextlib
import os
import signal
import threading
import time
from signal import SIGHUP, SIGINT, SIGTERM

import paddle.distributed as dist

from glm.errors import Fault, InputError

STOP_SIGNALS = (SIGINT, SIGTERM, SIGHUP)  # those that end a run in good order
REPEATS = 2  # seconds in which a launcher, or a kernel and a shell, send one signal several times


def is_first_of_run() -> bool:
    """Return whether this process is the first of all."""
    return dist.get_rank() == 0


def place_on_machine():
    """Return the number of this process among those of its machine, and how many they are, ints."""
    size = int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    return dist.get_rank() % size, size


def is_first_of_machine() -> bool:
    """Return whether this process is the first one on its machine."""
    return place_on_machine()[0] == 0


def are_several_machines() -> bool:
    """Return whether the processes of this run are on more than one machine."""
    return dist.get_world_size() > place_on_machine()[1]


def tensor_parallel_part(settings):
    """Return the number of this process's part of the model, from 0, and the number of parts, ints.

    Args:
        settings: a run's arguments, or a model's config.
    """
    return max(settings.tensor_parallel_rank, 0), max(settings.tensor_parallel_degree, 1)


def gather_objects(value):
    """Gather the ``value`` of each process. Returns a list in the order of their ranks.

    All processes have to call it, with anything that can be pickled.
    """
    values = [value]
    if dist.get_world_size() > 1:
        values = []
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together():
    """Raise an InputError that any process finds within this block in all of them.

    All processes have to enter, and within it none may wait for another.
    """
    mistake = None
    try:
        yield
    except InputError as error:
        mistake = error
    found = [text for text in gather_objects(mistake and str(mistake)) if text]
    if mistake:
        raise mistake
    if found:
        raise InputError(found[0])


def barrier():
    """Wait until all processes of the run have come here."""
    if dist.get_world_size() > 1:
        dist.barrier()


def in_main_thread() -> bool:
    """Return whether this is the main thread, the only one that may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


def set_signals(handler):
    """Have ``handler`` called at each of STOP_SIGNALS, but for those that are ignored: they stay so.

    Returns:
        dict: the handlers before, by number, for ``restore_signals``. Empty but in the main thread.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if in_main_thread()}
    before = {number: found for number, found in before.items() if found not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def restore_signals(handlers):
    """Set the handlers, a dict by number, that ``set_signals`` has returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_by_signal(number: int, message: str):
    """Raise the Fault by which the signal ``number`` ends the run.

    What ends a run takes a moment, into which no other signal may break: those of the next REPEATS
    seconds do nothing, and a later one ends the process at once.
    """
    began = time.monotonic()

    def end(later_number, _):
        if time.monotonic() - began > REPEATS:
            os._exit(128 + later_number)

    set_signals(end)
    raise Fault(message, 128 + number)
