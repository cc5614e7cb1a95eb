"""The processes of a run: what all of them have to know, one run a folder, a process that is gone."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait

import paddle.distributed as dist

from glm.errors import InputError


def of_all(value):
    """The ``value`` that each process of the run has, list in their order. All of them have to call it."""
    values = [value]
    if dist.get_world_size() > 1:
        values = []
        dist.all_gather_object(values, value)
    return values


LOCK = ".lock"  # the file in output_dir that a run holds while it writes there


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of the output ``folder``, made if need be; "": none. Raises InputError while another run has it.

    The system takes it from a process that ends, however it does. Of several processes of a run the first has it.
    """
    path, made = os.path.join(folder, LOCK), not os.path.exists(folder)
    owner = file = None
    if folder and dist.get_rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            while (
                file is None or os.fstat(file.fileno()).st_nlink == 0
            ):  # a run that ended meanwhile took it away
                file = open(path, "a+", encoding="utf-8")
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        except (
            OSError
        ) as error:  # what can't be written is told by those who check it; some systems know no locks
            if file and error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                owner = file.read().strip() or "one that has just begun"
    owner = of_all(owner)[0]
    if owner:
        raise InputError(
            f"--output_dir {folder} is in use by another run, {owner}: wait for its end, or give another folder"
        )
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):
                os.remove(path)
            file.close()
            if made:
                with contextlib.suppress(OSError):  # something was written
                    os.rmdir(folder)


class Peers:
    """Ends this process when another one of the run is gone, for which it would wait in a collective for ever.

    The first process has a connection to each of the others, which the system closes when either end dies, and passes
    on who did. One that ends by itself says so before: the others get some seconds to do the same.
    """

    def __init__(self, advice):
        self.advice, self.ending, self.failed = advice, False, False
        rank, count = dist.get_rank(), dist.get_world_size()
        host, key = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0], os.urandom(16)
        listener = Listener((host, 0), backlog=count, authkey=key) if rank == 0 else None
        address, key = of_all(listener and (listener.address, key))[0]
        self.ranks = {}  # by connection
        if rank:
            self.ranks[Client(address, authkey=key)] = 0
            self.tell(b"%d" % rank)
        else:
            while len(self.ranks) < count - 1:
                with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):  # a stranger's
                    connection = listener.accept()
                    self.ranks[connection] = int(connection.recv_bytes())
            listener.close()
        for connection in self.ranks:  # a machine that is gone closes nothing
            with socket.socket(fileno=os.dup(connection.fileno())) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, number in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
                    if hasattr(socket, option):
                        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), number)
        threading.Thread(target=self.watch, daemon=True).start()

    def tell(self, word):
        for connection in self.ranks:
            with contextlib.suppress(OSError):
                connection.send_bytes(word)

    def watch(self):
        watched = dict(self.ranks)
        while watched:
            for connection in wait(list(watched)):
                rank, word = watched.pop(connection), None
                with contextlib.suppress(EOFError, OSError):
                    word = connection.recv_bytes()
                if word == b"done":
                    continue
                if word == b"ending":
                    deadline = time.monotonic() + 5
                    while time.monotonic() < deadline and not (self.ending or self.failed):
                        time.sleep(0.05)
                elif word:
                    rank = int(word)
                if self.ending:
                    return
                self.tell(b"%d" % rank)
                text = f"process {rank} is gone, so this one of {dist.get_world_size()} ends too: {self.advice()}"
                print(f"finetune_generation.py: error: {text}", file=sys.stderr, flush=True)
                os._exit(1)

    def explain(self):
        """After an exception: where it came from another process's end, this one ends here and says so."""
        for number in (signal.SIGINT, signal.SIGTERM):  # a launcher's, which has seen it, too
            signal.signal(number, signal.SIG_IGN)
        self.failed = True
        time.sleep(2)

    def leave(self, word):
        """Say to the others that this process is b"done", or is b"ending" early."""
        self.ending = True
        self.tell(word)
