"""What ends a process that would wait in vain: another one of the run is gone, or the launcher is."""

import contextlib
import hmac
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import wait

import paddle.distributed as dist
from paddlenlp.utils.log import logger

from glm.errors import Fault, error_line
from glm.processes import barrier, gather_objects, is_first_of_run

GRACE = 3  # seconds in which the processes that end for one reason may each say so
TIMEOUT = 60  # seconds in which all processes have to connect
MOST_STRANGERS = 64  # connections that have not said the secret yet
NUMBER = 4  # bytes of a rank
LONGEST_REASON = 4096  # bytes of what a process says before it ends


class Peers:
    """Ends this process when another one of the run is gone, so that it waits for none in vain.

    The first process has a connection to each of the others. The system closes it when either end
    dies, and the first process sends the others the rank of the one that was gone. A process that
    ends early without a line of its own sends the first one its reason.

    A thread does so, which needs Python's lock. Tensor.item() keeps it while it waits for a device:
    what may wait for another process is read by numpy() or tolist().

    Attributes:
        advice (callable): returns what the line about a process that is gone ends with.
    """

    def __init__(self):
        self.advice, self.watching = lambda: "the same command starts again", True
        listener = invitation = None
        if is_first_of_run():
            host = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0]
            listener = socket.create_server((host, 0), backlog=dist.get_world_size() + MOST_STRANGERS)
            invitation = listener.getsockname(), secrets.token_bytes(32)
        address, secret = gather_objects(invitation)[0]
        self.ranks = accept(listener, secret) if listener else {connect(address, secret): 0}
        for connection in self.ranks:
            keep_alive(connection)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self):
        """Stop watching, once all processes have come here."""
        barrier()
        self.watching = False
        barrier()

    def leave(self, reason: str):
        """Wait, before this process ends early, until those that end so too have said why.

        Args:
            reason: what the first process says where it has found nothing wrong itself; empty where
                this one has said it.
        """
        self.watching = False
        sleep_through_signals(GRACE)
        for connection, rank in self.ranks.items():
            if rank == 0:
                with contextlib.suppress(OSError):
                    connection.sendall(reason.encode(errors="replace")[:LONGEST_REASON])

    def _watch(self):
        connection = wait(list(self.ranks))[0]
        rank, message, reason = self.ranks[connection], b"", ""
        with contextlib.suppress(OSError):
            message = connection.recv(LONGEST_REASON)
        if message and rank == 0:  # which knows who is gone
            rank = int.from_bytes(message, "big")
        elif message:
            reason = f" ({message.decode(errors='replace')})"
        if not self.watching:
            return
        for other in self.ranks.keys() - {connection}:
            with contextlib.suppress(OSError):
                other.sendall(rank.to_bytes(NUMBER, "big"))
        gone = f"process {rank} is gone{reason}, so this one of {dist.get_world_size()} ends too"
        print(error_line(f"{gone}: {self.advice()}"), file=sys.stderr, flush=True)
        os._exit(1)


def sleep_through_signals(seconds: float, may_end: bool = False):
    """Sleep, while SIGINT and SIGTERM, which a launcher may send now, do nothing or end the process."""
    action = signal.SIG_DFL if may_end else signal.SIG_IGN
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(number, action)
    time.sleep(seconds)


def accept(listener, secret):
    """Accept the connections of all other processes. Whoever does not say the secret is ignored.

    Returns:
        dict: their ranks by connection.
    """
    ranks, received, deadline = {}, {}, time.monotonic() + TIMEOUT
    while len(ranks) < dist.get_world_size() - 1:
        ready = wait([listener, *received], timeout=max(deadline - time.monotonic(), 0))
        if not ready or time.monotonic() > deadline:
            raise Fault(f"only {len(ranks) + 1} of {dist.get_world_size()} processes have met in {TIMEOUT} s")
        for connection in ready:
            if connection is listener:
                try:
                    connection, _ = listener.accept()
                except OSError:  # it is gone already
                    continue
                connection.setblocking(False)
                received[connection] = b""
                if len(received) > MOST_STRANGERS + dist.get_world_size():
                    oldest = next(iter(received))
                    del received[oldest]
                    oldest.close()
                continue
            if connection not in received:  # it was the oldest
                continue
            data = b""
            with contextlib.suppress(OSError):
                data = connection.recv(len(secret) + NUMBER - len(received[connection]))
            received[connection] += data
            if data and len(received[connection]) < len(secret) + NUMBER:
                continue
            message = received.pop(connection)
            if data and hmac.compare_digest(message[: len(secret)], secret):
                connection.setblocking(True)
                ranks[connection] = int.from_bytes(message[len(secret) :], "big")
            else:
                connection.close()
    for stranger in received:
        stranger.close()
    listener.close()
    return ranks


def connect(address, secret):
    """Connect to the first process, and say the secret and this process's rank. Returns the socket."""
    try:
        connection = socket.create_connection(address, timeout=TIMEOUT)
        connection.sendall(secret + dist.get_rank().to_bytes(NUMBER, "big"))
    except OSError as error:
        host, port = address
        raise Fault(
            f"the first process can't be reached at {host}:{port} ({error}): let the machines of a run "
            "reach each other on all ports"
        ) from error
    connection.settimeout(None)
    return connection


def keep_alive(connection):
    """Have the system look after the other end, for a machine that is gone closes nothing."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, number in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, number)


def is_launched() -> bool:
    """Return whether Paddle's launcher has started this process."""
    return "PADDLE_LOG_DIR" in os.environ  # which it gives to its processes


def watch_launcher():
    """Send this process SIGHUP when the launcher that started it is gone, if one did.

    Or SIGTERM where SIGHUP is ignored, as by nohup.
    """
    if not is_launched():
        return
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        logger.warning("the launcher of this process is gone, so this one ends too")
        for number in (signal.SIGHUP, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                os.kill(os.getpid(), number)
                return
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
