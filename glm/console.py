"""What a run sets in its process, and sets back: streams, log lines, signals, exceptions in threads."""

import contextlib
import fcntl
import logging
import os
import signal
import stat
import sys
import threading
import time

import paddle.distributed as dist
from paddlenlp.utils.log import logger
from tqdm.contrib.logging import logging_redirect_tqdm

from glm.errors import Fault, InputError, printable
from glm.processes import in_main_thread, restore_signals, set_signals, stop_by_signal

MOST_LINES = 200  # of one log message


class PrintableFilter(logging.Filter):
    """Makes log messages printable: what a file holds may stand in them."""

    def filter(self, record):
        """Indent the lines behind the first, so that none looks like a message of its own."""
        lines = record.getMessage().splitlines()[:MOST_LINES]
        record.msg, record.args = "\n    ".join(map(printable, lines)), None
        return True


@contextlib.contextmanager
def process_settings():
    """Set up the process for a run, within this block.

    Signals end it by a Fault, and so does an exception in a thread, for which others would wait for
    ever. Log lines are printable, and above the bar on a terminal. Streams that are closed are
    replaced by ones to nowhere.
    """
    open_closed_streams()
    terminal = sys.stderr.isatty()
    filters, hook, no_color = PrintableFilter(), threading.excepthook, os.environ.get("NO_COLOR")
    if not terminal:
        os.environ["NO_COLOR"] = "1"
    if not in_main_thread():
        logger.warning("not in the main thread: signals will not end this run with a checkpoint")
    logger.logger.addFilter(filters)
    threading.excepthook = _end_process
    handlers = set_signals(_raise_fault)
    try:
        with logging_redirect_tqdm([logger.logger]) if terminal else contextlib.nullcontext():
            yield
    finally:
        restore_signals(handlers)
        threading.excepthook = hook
        logger.logger.removeFilter(filters)
        if no_color is None:
            os.environ.pop("NO_COLOR", None)


def _raise_fault(number, _):
    try:
        stop_by_signal(number, f"stopped by {signal.Signals(number).name}")
    except Fault:
        # A launcher sends one too where a process is gone: the watch then says so and ends this one.
        time.sleep(0.3 if dist.get_world_size() > 1 else 0)
        raise


def _end_process(error):
    sys.__excepthook__(error.exc_type, error.exc_value, error.exc_traceback)
    os._exit(1)


def open_closed_streams():
    """Replace standard streams that were closed when Python began, as daemons have them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would be what libraries write to
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if number and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for handler in logger.logger.handlers:
        if getattr(handler, "stream", sys.stderr) is None:
            handler.setStream(sys.stderr)


@contextlib.contextmanager
def standard_output():
    """Yield the standard output as a text stream. What else is printed goes to standard error meanwhile.

    Raises:
        InputError: where standard input can't be read, or standard output can't be written to.
    """
    streams = ((sys.__stdin__, "input", "reading", os.O_WRONLY), (sys.__stdout__, "output", "writing", 0))
    for number, (stream, name, use, unfit) in enumerate(streams):
        closed = stream is None or fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == unfit
        if closed or stat.S_ISDIR(os.fstat(number).st_mode):
            raise InputError(
                f"--predict_file -: standard {name} is not open for {use}: give a file or a pipe"
            )
    # The run ends quietly when the reader of the pipe does.
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL) if in_main_thread() else None
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        try:
            yield output
        finally:
            with contextlib.suppress(OSError):
                output.flush()
            sys.stdout.flush()
            os.dup2(output.fileno(), 1)
            if before is not None:
                signal.signal(signal.SIGPIPE, before)
