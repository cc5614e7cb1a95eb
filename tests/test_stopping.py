"""A signal ends training: when, and by which exchange of processes."""

import os
import signal
from types import SimpleNamespace

import paddle
import pytest
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from glm.errors import Fault
from glm.training import stopping
from glm.training.stopping import StopBySignal


@pytest.mark.parametrize(
    "world_size, training, seconds",
    [(1, True, [0, 0]), (1, False, [0]), (2, False, [0]), (2, True, [0, 0.6, 1.9, 2.1])],
)
def test_when_a_signal_ends_at_once(tmp_path, world_size, training, seconds, monkeypatch):
    """A second one; the first in an evaluation. A launcher's, which sends three in 0.6 seconds, are one."""
    args = SimpleNamespace(
        world_size=world_size,
        output_dir=str(tmp_path),
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
    )
    state, now = SimpleNamespace(global_step=7), [100.0]
    callback = StopBySignal(lambda: "there is no checkpoint")
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    callback.on_train_begin(args, state, None, model=SimpleNamespace(training=training))
    try:
        for second in seconds[:-1]:
            now[0] = 100.0 + second
            os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 100.0 + seconds[-1]
        with pytest.raises(Fault, match="stopped by SIGTERM at step 7: there is no checkpoint") as fault:
            os.kill(os.getpid(), signal.SIGTERM)
        assert fault.value.exit_code == 143
    finally:
        callback.restore_handlers()


def test_a_terminal_that_is_closed_hangs_up_more_than_once(monkeypatch):
    """The kernel, the shell and the watch of the launcher do: training still ends with a checkpoint."""
    callback, args = StopBySignal(lambda: "there is no checkpoint"), SimpleNamespace(world_size=1)
    callback.on_train_begin(args, None, None, model=SimpleNamespace(training=True))
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert callback.received == signal.SIGHUP and callback.fault is None
    finally:
        callback.restore_handlers()


def test_a_signal_is_exchanged_without_a_wait(monkeypatch):
    """What waits for other processes lets threads run, and item() and to_tensor() do not."""
    sent = []
    waiting = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda tensor, *_, **__: sent.append(tensor) or waiting)
    signals = StopBySignal(lambda: "there is no checkpoint")
    signals.largest = paddle.to_tensor(0)  # as training begins
    monkeypatch.setattr(paddle, "to_tensor", None)
    monkeypatch.setattr(paddle.Tensor, "item", None)
    for received, read in ((0, None), (signal.SIGTERM, None), (signal.SIGTERM, signal.SIGTERM)):
        signals.received = int(received)
        signals.exchange(world_size=2)
        assert signals.signal_number == read and sent[-1].tolist() == received


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_in_the_last_step_waits_for_the_model(tmp_path, monkeypatch, world_size):
    """The run was done: there need be no checkpoint to resume from. Handlers are as before it."""
    waiting = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *args, **kwargs: waiting)
    args = SimpleNamespace(world_size=world_size, output_dir=str(tmp_path), save_strategy=IntervalStrategy.NO)
    state, control = SimpleNamespace(global_step=6, max_steps=7), SimpleNamespace(should_evaluate=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    callback = StopBySignal(lambda: "there is no checkpoint")
    callback.on_train_begin(args, state, control, model=SimpleNamespace(training=True))
    callback.on_optimizer_end(args, state, control)
    os.kill(os.getpid(), signal.SIGTERM)
    state.global_step += 1
    if world_size == 1:
        callback.on_optimizer_end(args, state, control)
        callback.on_step_end(args, state, control)
        assert not control.should_evaluate and not control.should_save
    callback.on_train_end(args, state, control)
    assert {number: signal.getsignal(number) for number in before} == before
    with pytest.raises(
        Fault, match=f"by SIGTERM after the last step: the trained model is in {tmp_path}"
    ) as fault:
        callback.stop_when_written(args)
    assert fault.value.exit_code == 143


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, monkeypatch):
    """As of nohup, which lets a run outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    callback, args = StopBySignal(lambda: "there is no checkpoint"), SimpleNamespace(world_size=1)
    try:
        callback.on_train_begin(args, None, None, model=SimpleNamespace(training=True))
        os.kill(os.getpid(), signal.SIGHUP)
        callback.on_train_end(args, None, None)
        assert callback.signal_number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
