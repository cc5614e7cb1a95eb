"""What ends training before its last step: a signal, or evaluations that get no better."""

import contextlib
import signal
import time

import paddle
import paddle.distributed as dist
from paddlenlp.trainer.trainer_callback import EarlyStoppingCallback, TrainerCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from glm.device import on_cpu
from glm.errors import Fault
from glm.processes import REPEATS, restore_signals, set_signals, stop_by_signal


class EarlyStopping(EarlyStoppingCallback):
    """End training after so many evaluations in a row that were no better than the best.

    A checkpoint keeps the count, early_stopping_patience_counter, and a resumed run counts on.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        pass  # PaddleNLP's demands load_best_model_at_end, which the Trainer here takes over


class EvaluationCancelled(BaseException):
    """What a signal raises in an evaluation within training: the step is saved without its evaluation."""


class StopBySignal(TrainerCallback):
    """End training by SIGINT, SIGTERM or SIGHUP within a step or two, with a checkpoint.

    With one process:
        step n      a signal arrives; as its update is done, the step is to be saved;
                    its checkpoint is complete: the run stops.
    With several, which have to save the same step:
        step n      a signal arrives; as its update is done, each process sends the number of the
                    signal that it has received, or 0, and waits for nothing;
        step n + 1  as its update is done, each reads the largest number, which has long arrived;
                    the step's checkpoint is complete: all stop.

    In an evaluation, which may take long, a batch takes the place of a step: it is cancelled, and the
    step before it is saved. Where that step is the last one, or the model is being written, the run stops
    once its model is written. A second signal, but for SIGHUP, ends the run at once. A signal that was
    ignored stays ignored.

    Args:
        resume_hint (callable): returns what the last line says of going on.
    """

    signal_number = None  # of the signal that training is to end by, the same on all processes
    received = 0  # the number of the signal that this process has received
    sent = False  # whether the others have been sent it
    pending_exchange = None  # of the largest number received, begun the step before
    evaluating = False  # whether a signal cancels an evaluation
    fault = None  # the Fault by which a signal ended the run at once

    def __init__(self, resume_hint):
        self.resume_hint = resume_hint
        self.handlers_before = {}  # those before training began

    def on_train_begin(self, args, state, control, **kwargs):
        self.received, self.sent = 0, False
        self.largest = paddle.to_tensor(0)  # of the numbers received: 0 until a signal is there
        self.set_handlers(args, state)

    def set_handlers(self, args, state):
        """Let signals end the run in good order."""
        self.restore_handlers()
        first = time.monotonic()

        def receive(number, _):
            nonlocal first
            # Paddle's launcher sends one up to three times in 0.6 seconds. Where a terminal is closed, the
            # kernel and the shell hang up, and each process's watch of the launcher does.
            repeated = args.world_size > 1 and time.monotonic() - first < REPEATS
            if self.received and (repeated or number == signal.SIGHUP):
                return
            if self.received:
                self.stop(number, args, state)
            self.received, first = number, time.monotonic()
            # A batch takes long on a CPU. On a card it may be within the capture of a graph.
            if self.evaluating and args.world_size == 1 and on_cpu():
                raise EvaluationCancelled

        self.handlers_before = set_signals(receive)

    def exchange(self, world_size: int):
        """Read the largest number that any process had received a call ago, and send this one's.

        The answer to what is sent now is read at the next call, so that no step waits for it.
        """
        if world_size == 1:
            self.signal_number = self.received or None
            return
        if self.pending_exchange is not None:
            self.pending_exchange.wait()
            self.signal_number = self.largest.tolist() or None
        if self.received and not self.sent:  # a copy to the device waits, with Python's lock held: once
            self.largest.set_value(paddle.full([], self.received, "int64"))
            self.sent = True
        self.pending_exchange = dist.all_reduce(self.largest, dist.ReduceOp.MAX, sync_op=False)

    @contextlib.contextmanager
    def cancelling(self, in_training: bool):
        """Let a signal raise EvaluationCancelled in an evaluation within this block, if ``in_training``."""
        self.evaluating = in_training
        try:
            yield
        finally:
            self.evaluating = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.evaluating:
            self.exchange(args.world_size)
            if self.signal_number is not None:
                raise EvaluationCancelled

    def save_unevaluated(self, args, state, control):
        """Have the step saved whose evaluation was cancelled, or the model written if it is the last."""
        self.signal_number = self.signal_number or self.received
        control.should_save = args.save_strategy != IntervalStrategy.NO
        self.on_step_end(args, state, control)

    def on_optimizer_end(self, args, state, control, **kwargs):
        if self.fault is not None:  # what was raised in a library's callback may have got lost there
            raise self.fault
        # Here a GradScaler has just waited for the device, so that this need not.
        self.exchange(args.world_size)
        if self.signal_number is not None:  # before the others' on_step_end, where they look at should_save
            control.should_save = args.save_strategy != IntervalStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal_number is not None:
            control.should_evaluate = False
            last = state.global_step >= state.max_steps
            if args.save_strategy == IntervalStrategy.NO and not last:
                self.stop(self.signal_number, args, state)

    def on_save(self, args, state, control, **kwargs):
        if self.signal_number is not None:
            self.stop(self.signal_number, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        for _ in range(2):  # what was sent before, and what is sent now
            self.exchange(args.world_size)
        if not (self.signal_number or self.received):  # else the model is written first: see ``writing``
            self.restore_handlers()

    def restore_handlers(self):
        """Let signals do again what they did before training."""
        restore_signals(self.handlers_before)
        self.handlers_before = {}

    @contextlib.contextmanager
    def writing(self, args, state):
        """Let the trained model be written within this block, then end the run if a signal has come."""
        self.set_handlers(args, state)
        try:
            yield
        finally:
            self.restore_handlers()
        number = self.signal_number or self.received
        if number:
            stopped = f"stopped by {signal.Signals(number).name} after the last step"
            stop_by_signal(number, f"{stopped}: the trained model is in {args.output_dir}")

    def stop(self, number: int, args, state):
        """Raise the Fault that ends the run by the signal ``number``."""
        stopped = f"stopped by {signal.Signals(number).name} at step {state.global_step}"
        try:
            stop_by_signal(number, f"{stopped}: {self.resume_hint()}")
        except Fault as fault:
            self.fault = fault
            raise
