"""The processes of a run: what all of them have to know, one run a folder, a process that is gone."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Client, Listener, wait

import paddle.distributed as dist

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


def place_on_machine():
    """Return the number of this process among those of its machine, and how many they are, ints."""
    size = int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    return dist.get_rank() % size, size


def is_first_of_machine():
    """Whether this process is the first one on its machine."""
    return place_on_machine()[0] == 0


def barrier():
    """Wait until all processes of the run have come here."""
    if dist.get_world_size() > 1:
        dist.barrier()


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
