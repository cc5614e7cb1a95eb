"""Which process this is, the signals that end it, and the watchdog's connections."""

import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest
from helpers import main

import finetune_generation
from glm import processes, watchdog
from glm.errors import Fault, InputError
from glm.processes import (
    failing_together,
    is_first_of_machine,
    is_first_of_run,
    restore_signals,
    set_signals,
    stop_by_signal,
    tensor_parallel_part,
)


@pytest.fixture(autouse=True)
def handlers():
    """What a test sets of signals is set back: a run that is forked from here would have it too."""
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    yield before
    restore_signals(before)


def test_the_part_of_the_model():
    settings = SimpleNamespace(tensor_parallel_degree=-1, tensor_parallel_rank=-1)
    assert tensor_parallel_part(settings) == (0, 1)
    settings = SimpleNamespace(tensor_parallel_degree=4, tensor_parallel_rank=3)
    assert tensor_parallel_part(settings) == (3, 4)


@pytest.mark.parametrize(
    "rank, size, first", [(0, None, True), (0, "2", True), (1, "2", False), (4, "2", True)]
)
def test_the_first_of_a_machine(monkeypatch, rank, size, first):
    monkeypatch.setattr(processes.dist, "get_rank", lambda: rank)
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    if size:
        monkeypatch.setenv("PADDLE_LOCAL_SIZE", size)
    assert is_first_of_machine() is first and is_first_of_run() is (rank == 0)


def test_signals_are_set_and_set_back():
    """But one that is ignored stays so, and in a thread nothing is set."""
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    received = []
    try:
        handlers = set_signals(lambda number, _: received.append(number))
        for number in before:
            os.kill(os.getpid(), number)
        assert received == [signal.SIGINT, signal.SIGTERM]
        restore_signals(handlers)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        restore_signals(before)
    assert {number: signal.getsignal(number) for number in before} == before
    found = []
    thread = threading.Thread(target=lambda: found.append(set_signals(received.append)))
    thread.start()
    thread.join()
    assert found == [{}]


def test_no_signal_breaks_into_the_end_of_a_run(monkeypatch):
    """One that is sent again at once does nothing, a later one ends the process without more."""
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    now, codes = [100.0], []
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    try:
        with pytest.raises(Fault, match="stopped by SIGINT") as fault:
            stop_by_signal(signal.SIGINT, "stopped by SIGINT")
        assert fault.value.exit_code == 130
        for seconds in (0.1, 1.9, 2.1):
            now[0] = 100 + seconds
            os.kill(os.getpid(), signal.SIGTERM)
        assert codes == [143]
    finally:
        restore_signals(before)


def test_which_process_is_gone_is_said_to_all_others(monkeypatch, capsys):
    """By the first one, to which alone they have connections, and why, where a process has said it."""
    pairs = {rank: socket.socketpair() for rank in (1, 2, 3)}
    peers = watchdog.Peers.__new__(watchdog.Peers)
    peers.ranks = {ours: rank for rank, (ours, _) in pairs.items()}
    peers.watching, peers.advice, codes = True, lambda: "start again", []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    leaving = watchdog.Peers.__new__(watchdog.Peers)
    leaving.ranks = {pairs[2][1]: 0}
    leaving.leave("dev.json:3 is no JSON")
    pairs[2][1].close()
    peers._watch()
    said = "process 2 is gone (dev.json:3 is no JSON), so this one of 4 ends too: start again"
    assert codes == [1] and said in capsys.readouterr().err
    for rank in (1, 3):
        theirs = pairs[rank][1]
        theirs.settimeout(5)
        peers.ranks = {theirs: 0}
        peers._watch()
        assert "process 2 is gone, so this one of 4 ends too: start again" in capsys.readouterr().err
    for ours, theirs in pairs.values():
        ours.close()
        theirs.close()


def test_a_mistake_of_one_process_is_one_of_all(monkeypatch):
    """Of two others: one has found the same and one has not come to it. What else is raised is this one's."""
    others = ["dev.json:3 is no JSON", None]
    monkeypatch.setattr(processes, "gather_objects", lambda found: [found, *others])
    for found in ("dev.json:4 is no JSON", None):
        with pytest.raises(InputError, match=found or others[0]), failing_together():
            if found:
                raise InputError(found)
    others[0] = None
    with failing_together():
        pass
    others[0] = "dev.json:3 is no JSON"
    with pytest.raises(KeyError), failing_together():
        raise KeyError


def test_a_launchers_signal_does_not_end_a_process_that_says_why_it_leaves(monkeypatch, capsys):
    """It comes as soon as another process has ended: the exit code stays that of the mistake."""
    peers, signals = watchdog.Peers.__new__(watchdog.Peers), []
    peers.ranks = {}

    def sleep(seconds):
        signals.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    peers.leave("")
    assert signals == [watchdog.GRACE] and not peers.watching


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_that_is_not_the_first_leaves_its_mistake_to_it(monkeypatch, capsys, launched):
    """Until the launcher ends it; and says it itself where the first one has found nothing."""
    slept = []
    if launched:
        monkeypatch.setenv("PADDLE_LOG_DIR", "log")
    monkeypatch.setattr(finetune_generation, "is_first_of_machine", lambda: False)
    monkeypatch.setattr(finetune_generation, "watch_launcher", lambda: None)
    monkeypatch.setattr(
        watchdog.time, "sleep", lambda seconds: slept.append(signal.getsignal(signal.SIGTERM))
    )
    code, lines = main(monkeypatch, capsys, "--no_such_flag", 1)
    assert code == 2 and slept == [signal.SIG_DFL] * launched
    assert any("error: " in line and "no_such_flag" in line for line in lines) is launched


def test_the_first_process_may_end_while_another_says_why_it_leaves(monkeypatch):
    """The thread that watches the connection is then done with it: both end in silence."""
    ours, theirs = socket.socketpair()

    class Connection:
        fileno, recv = ours.fileno, ours.recv

        def sendall(self, message):
            theirs.close()
            peers._watch()
            ours.sendall(message)  # which fails

    peers = watchdog.Peers.__new__(watchdog.Peers)
    peers.ranks = {Connection(): 0}
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: pytest.fail(f"ended by {code}"))
    peers.leave("dev.json:3 is no JSON")
    ours.close()


@pytest.mark.parametrize("ignored, sent", [((), "SIGHUP"), (("SIGHUP",), "SIGTERM")])
def test_a_process_whose_launcher_is_gone_stops_by_a_signal(monkeypatch, ignored, sent):
    """By one that it does not ignore: nohup ignores SIGHUP."""
    before = {number: signal.getsignal(number) for number in processes.STOP_SIGNALS}
    parents, received = iter([1, 1, 2]), threading.Event()
    monkeypatch.setenv("PADDLE_LOG_DIR", "log")
    monkeypatch.setattr(watchdog.os, "getppid", lambda: next(parents, 2))
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    numbers = []
    try:
        for number in before:
            signal.signal(number, lambda number, _: (numbers.append(number), received.set()))
        for name in ignored:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
        watchdog.watch_launcher()
        # A signal that another thread takes does not wake this one: it looks often.
        assert any(received.wait(0.05) for _ in range(400)) and numbers == [signal.Signals[sent]]
    finally:
        restore_signals(before)


def test_a_run_watches_its_launcher(monkeypatch, capsys):
    watched = []
    monkeypatch.setattr(finetune_generation, "watch_launcher", lambda: watched.append(True))
    assert main(monkeypatch, capsys, "--no_such_flag", 1)[0] == 2 and watched == [True]


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_the_port_takes_who_knows_the_secret(monkeypatch, listener):
    """Whoever says nothing, a part of it, something else, or leaves, does not keep the others out."""
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 3)
    secret, address, found = bytes(range(32)), listener.getsockname(), []
    thread = threading.Thread(target=lambda: found.append(watchdog.accept(listener, secret)))
    thread.start()
    strangers = [socket.create_connection(address) for _ in range(100)]
    for stranger, said in zip(
        strangers, [b"", secret[:31], b"GET / HTTP/1.1\r\n\r\n" + bytes(50), bytes(36)]
    ):
        stranger.sendall(said)
    strangers[-1].close()
    strangers[-2].sendall(secret[:-1] + b"\0\0\0\0\1")
    peers = []
    for rank in (2, 1):
        monkeypatch.setattr(watchdog.dist, "get_rank", lambda rank=rank: rank)
        peers.append(watchdog.connect(address, secret))
    thread.join(20)
    (ranks,) = found
    assert sorted(ranks.values()) == [1, 2]
    for connection, rank in ranks.items():
        assert connection.getpeername() == peers[2 - rank].getsockname()
    for stranger in strangers[:-1]:  # they are closed, and have been told nothing
        stranger.settimeout(5)
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
        stranger.close()


def test_processes_that_do_not_meet(monkeypatch, listener):
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(watchdog, "TIMEOUT", 0.2)
    with pytest.raises(Fault, match="only 1 of 3 processes have met"):
        watchdog.accept(listener, b"s" * 32)
    address = listener.getsockname()
    listener.close()
    with pytest.raises(Fault, match=f"can't be reached at 127.0.0.1:{address[1]}"):
        watchdog.connect(address, b"s" * 32)
