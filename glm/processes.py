"""The processes of a run: what all of them have to know, one run a folder, a process that is gone."""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path

import paddle.distributed as dist

from glm.errors import InputError

LOCK = ".lock"  # the file in output_dir that a run holds while it writes there
GRACE = 3  # seconds in which the processes that end for one reason may each say so


def gather_objects(value):
    """Gather the ``value`` of each process. Returns a list in the order of their ranks.

    All processes have to call it, with anything that can be pickled.
    """
    values = [value]
    if dist.get_world_size() > 1:
        values = []
        dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait until all processes of the run have come here."""
    if dist.get_world_size() > 1:
        dist.barrier()


def _take_lock(path):
    """Lock the file ``path``. Returns it open and None, or None and the name of the run that has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            return None, file.read().strip() or "one that has just begun"
        except OSError:  # a file system without locks
            return file, None
        if os.fstat(file.fileno()).st_nlink:  # else a run that ended meanwhile has removed it
            break
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file, None


@contextlib.contextmanager
def locked(folder, flag="--output_dir"):
    """Hold the lock of the ``folder`` of a ``flag``, which is made if need be. "" needs no lock.

    The first process of a run holds it for all of them. The system takes it from a
    process that ends, however it does. Raises InputError while another run holds it.
    """
    path, made, file, owner = Path(folder, LOCK), not os.path.exists(folder), None, None
    if folder and dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # check_output_dir tells what can't be written
            path.parent.mkdir(parents=True, exist_ok=True)
            file, owner = _take_lock(path)
    owner = gather_objects(owner)[0]
    if owner:
        advice = "wait for its end, or give another folder"
        raise InputError(f"{flag} {folder} is in use by another run, {owner}: {advice}")
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()
            if made:
                with contextlib.suppress(OSError):  # something was written
                    path.parent.rmdir()


class Peers:
    """Ends this process when another one of the run is gone, so that it waits for none in vain.

    The first process has a connection to each of the others. The system closes it when
    either end dies, and the first process tells the others who that was. A process that
    ends by itself says "done"; or "ending", if early, and the others then have GRACE
    seconds to end for the same reason with a line of their own.

    A thread does so, which needs Python's lock. Tensor.item() keeps it while it waits for
    a device: what may wait for another process is read by numpy() or tolist().

    Args: advice (function): returns what the line about a process that is gone ends with.
    """

    def __init__(self, advice):
        self.advice, self.ranks = advice, {}  # ranks by connection
        self.has_left = False
        rank, count = dist.get_rank(), dist.get_world_size()
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
        listener = Listener((host, 0), backlog=count) if rank == 0 else None
        address = gather_objects(listener and listener.address)[0]
        if rank:
            self.ranks[Client(address)] = 0
            self._tell(b"%d" % rank)
        else:
            for _ in range(count - 1):
                connection = listener.accept()
                self.ranks[connection] = int(connection.recv_bytes())
            listener.close()
        for connection in self.ranks:
            self._keep_alive(connection)
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _keep_alive(connection):
        """Have the system look after the other end, for a machine that is gone closes nothing."""
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            options = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
            for name, number in options.items():
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), number)

    def leave(self, word):
        """Say to the others that this process is b"done", or is b"ending" early."""
        self.has_left = True
        self._tell(word)

    def _tell(self, word):
        for connection in self.ranks:
            with contextlib.suppress(OSError):
                connection.send_bytes(word)

    def _watch(self):
        watched = dict(self.ranks)
        while watched:
            for connection in wait(list(watched)):
                rank, word = watched.pop(connection), b""
                with contextlib.suppress(EOFError, OSError):
                    word = connection.recv_bytes()
                if word == b"done":
                    continue
                if word == b"ending":
                    time.sleep(GRACE)
                elif word:
                    rank = int(word)
                if self.has_left:
                    return
                self._tell(b"%d" % rank)
                gone = f"process {rank} is gone, so this one of {dist.get_world_size()} ends too"
                line = f"finetune_generation.py: error: {gone}: {self.advice()}"
                print(line, file=sys.stderr, flush=True)
                os._exit(1)

    @staticmethod
    def wait_to_be_ended():
        """Wait, after an exception, for the end that this process has if another one is gone."""
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher has seen it too
            signal.signal(number, signal.SIG_IGN)
        time.sleep(GRACE + 1)
