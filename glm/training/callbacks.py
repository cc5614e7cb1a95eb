"""What happens at a step: progress, seeds, signals, gradients, losses that are not finite."""

import functools
import signal
import time

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_callback import EarlyStoppingCallback, TrainerCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.errors import Fault
from glm.outputs.checkpoints import where_to_resume

NEVER = 2**62  # a step that is never reached
MOST_SKIPPED = 10  # losses in a row that may be no numbers, if gradients are scaled
ADVICE = "lower --learning_rate, or look at the data of that step"
SHOWN = 10  # best and worst predictions of an evaluation


class TrainingProgress(TrainerCallback):
    """Shows a bar with loss and samples/s on a terminal; elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            desc="train",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=args.disable_tqdm or not state.is_world_process_zero,
            dynamic_ncols=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        loss, rate = f"loss {logs['loss']:.4f}", f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            step = f"step {state.global_step}/{state.max_steps}"
            logger.train(f"{step}: {loss}, learning rate {logs['learning_rate']:.3g}, {rate}")
        else:
            self.bar.set_postfix_str(f"{loss}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class Curves(VisualDLCallback):
    """Adds an evaluation's best and worst predictions, and all its ROUGE-L, to PaddleNLP's curves.

    Args: get_rows (callable): returns the rows of the last evaluation, as its predictions
        file has them.
    """

    def __init__(self, get_rows):
        super().__init__()
        self.get_rows, self.in_training = get_rows, False

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.in_training = True

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the writer open, which PaddleNLP closes: an evaluation may follow."""
        self.in_training = False

    def on_evaluate(self, args, state, control, **kwargs):
        rows = [row for row in self.get_rows() if row["rougel"] is not None]
        # By args: without training the Trainer's state takes every process for the first.
        if not rows or args.process_index != 0:
            return
        if self.vdl_writer is None:  # nothing was trained
            self._init_summary_writer(args)  # PaddleNLP's: in logging_dir
        rows.sort(key=lambda row: row["rougel"])
        when = f"step {state.global_step}" if self.in_training else "at the end"
        self.show(f"worst predictions/{when}", rows[:SHOWN])
        self.show(f"best predictions/{when}", rows[::-1][:SHOWN])
        # Not eval/rougel, which is a curve: a tag of two kinds ends VisualDL's server.
        scores = [row["rougel"] for row in rows]
        self.vdl_writer.add_histogram("eval/rougel of the records", scores, state.global_step)
        self.vdl_writer.flush()

    def show(self, tag, rows):
        """Write a text for each row. VisualDL takes out line breaks, and calls a text's rank its step."""
        for rank, row in enumerate(rows, 1):
            fields = ("answer", "prediction", "reference")
            text = " | ".join([f"ROUGE-L {row['rougel']:.2f}", *(f"{name}: {row[name]}" for name in fields)])
            self.vdl_writer.add_text(tag, text, rank)


class EarlyStopping(EarlyStoppingCallback):
    """Ends training after so many evaluations in a row that were no better than the best.

    A checkpoint keeps the count, early_stopping_patience_counter, and a resumed run
    counts on.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Nothing: PaddleNLP's wants load_best_model_at_end, which the Trainer here does itself."""

    def restore(self, mark):
        """Count on from a checkpoint, by what read_mark says of it, dict."""
        count = mark.get("evaluations_without_better", 0)
        self.early_stopping_patience_counter = count

    def is_due(self):
        """Whether training has ended by it."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class SeedEachStep(TrainerCallback):
    """Seeds all generators at each step by --seed and its number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's
    generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        rng = np.random.default_rng([args.seed, state.global_step, args.dataset_rank])
        seed = int(rng.integers(2**40)) * 1024
        tracker = get_rng_state_tracker()
        tracker.reset()
        if args.tensor_parallel_degree > 1:
            # The processes draw alike, but for what is dropped in the heads that are split
            # over them.
            tracker.add("embedding_seed", seed + 1)
            tracker.add("global_seed", seed + 2)
            tracker.add("local_seed", seed + 3 + args.tensor_parallel_rank)
        paddle.seed(seed)


class StopBySignal(TrainerCallback):
    """Ends training by SIGINT or SIGTERM within a step, with a checkpoint of it.

    Several processes take a second step, in which they agree on it. A second signal, or
    one in evaluation, which may take long, ends the run at once.
    """

    signal_number = None  # of the signal that training is to end by, the same on all processes
    received = 0  # the number of the signal that this process has got
    pending_exchange = None  # of the largest number received, begun the step before
    handlers_before = None  # those before training began

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.received, first = 0, time.monotonic()

        def note(number, _):
            nonlocal first
            # Paddle's launcher sends one up to three times in 0.6 seconds.
            if args.world_size > 1 and self.received and time.monotonic() - first < 2:
                return
            if self.received or not model.training:
                self.stop(number, args, state)
            self.received, first = number, time.monotonic()

        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers_before = {number: signal.signal(number, note) for number in numbers}

    def exchange(self, world_size):
        """Take the largest number that any process had received a call ago, and send this one's.

        The answer to what is sent now is taken at the next call, so that no step waits
        for it.
        """
        if world_size == 1:
            self.signal_number = self.received or None
            return
        if self.pending_exchange is not None:
            self.pending_exchange.wait()
            self.signal_number = self.largest.tolist() or None
        self.largest = paddle.to_tensor(self.received)
        self.pending_exchange = dist.all_reduce(self.largest, dist.ReduceOp.MAX, sync_op=False)

    def on_optimizer_end(self, args, state, control, **kwargs):
        # Here a GradScaler has just waited for the device, so that this need not.
        self.exchange(args.world_size)
        if self.signal_number is not None:  # before the others' on_step_end, where they look at should_save
            control.should_save = args.save_strategy != IntervalStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal_number is not None:
            control.should_evaluate = False
            if args.save_strategy == IntervalStrategy.NO:
                self.stop(self.signal_number, args, state)

    def on_save(self, args, state, control, **kwargs):
        if self.signal_number is not None:
            self.stop(self.signal_number, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        for _ in range(2):  # what was sent before, and what is sent now
            self.exchange(args.world_size)
        self.on_save(args, state, control)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    @staticmethod
    def stop(number, args, state):
        """Raise the Fault that ends the run by the signal ``number``."""
        stopped = f"stopped by {signal.Signals(number).name} at step {state.global_step}"
        raise Fault(f"{stopped}: {where_to_resume(args)}", 128 + number)


class Gradients(TrainerCallback):
    """Frees the gradients after each step, and makes them float32 before they are used, if ``master``.

    In float16 small gradients would vanish when they are unscaled, and a squared norm
    past 65504 would overflow, so that clipping makes the update zero.
    """

    def __init__(self, master):
        self.master = master

    def on_optimizer_begin(self, args, state, control, model=None, **kwargs):
        if self.master:
            # As paddle.amp.decorate(master_grad=True) does after a backward pass, of
            # which recompute has many.
            parameters = [weight for weight in model.parameters() if weight.grad is not None]
            paddle.base.core.eager.set_master_grads(parameters)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        # The Trainer calls it without arguments, by which gradients are filled with zeros and kept.
        optimizer.clear_grad = functools.partial(optimizer.clear_grad, set_to_zero=False)


class CheckFinite(TrainerCallback):
    """Ends the run at a loss or a weight that is no number, before anything is logged or saved after it.

    Where gradients are scaled (fp16), the GradScaler leaves out the update of such a
    step, as of one whose gradients overflow. The run then ends after MOST_SKIPPED such
    losses in a row.
    """

    def __init__(self):
        self.skipped = self.in_a_row = 0  # steps without an update in this process
        self.last_loss = paddle.zeros([])
        self.forget()

    def forget(self):
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    def note(self, loss, step):
        """Keep the first ``step`` whose ``loss`` is no number, on the device, where nothing waits for it.

        Returns the loss, or the last one that was a number, for the Trainer adds them up.
        """
        finite = paddle.isfinite(loss)
        bad_step = paddle.where(finite, NEVER, step).reshape([])
        self.first_bad_step = paddle.minimum(self.first_bad_step, bad_step)
        self.last_loss = paddle.where(finite, loss, self.last_loss.astype(loss.dtype))
        return self.last_loss

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.scheduler_step = lr_scheduler.last_epoch

    def on_optimizer_end(self, args, state, control, lr_scheduler=None, scaler=None, **kwargs):
        if scaler is None:
            return
        if lr_scheduler.last_epoch != self.scheduler_step:  # the Trainer steps it after an update alone
            self.in_a_row = 0
            return
        lr_scheduler.step()  # so that the schedule ends at the last step, whatever is skipped
        self.skipped += 1
        bad = (self.first_bad_step != NEVER).astype("int64")
        if args.world_size > 1:  # they must end together
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.in_a_row = self.in_a_row + 1 if bad.tolist() else 0
        self.forget()
        if self.in_a_row == MOST_SKIPPED:
            last = state.global_step + 1
            self.stop(
                f"loss is not finite in {MOST_SKIPPED} steps in a row, the last of them step {last}", args
            )

    def read(self, loss, args):
        """Return the ``loss`` to log, float; end the run if one of those added up in it was no number.

        Both are read at once, so that a logged step waits for the device a single time.
        """
        bad = (self.first_bad_step != NEVER).astype(loss.dtype)
        value, bad = paddle.stack([loss, bad]).tolist()
        if bad:
            self.check_losses(args)
        return value

    def check_losses(self, args):
        step = self.first_bad_step.tolist()
        if step != NEVER:
            self.stop(f"loss is not finite at step {step}", args)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_evaluate or control.should_save:  # a loss that is logged is read then
            self.check_losses(args)
        if control.should_save:
            trained = [weight for weight in model.parameters() if not weight.stop_gradient]
            if not all(paddle.isfinite(weight).all().item() for weight in trained):
                self.stop(f"weights are not finite after step {state.global_step}", args)

    on_epoch_end = on_step_end

    @staticmethod
    def stop(what, args):
        """Raise the Fault that says ``what`` is not finite, and where to go on."""
        raise Fault(f"the {what}: {ADVICE}; {where_to_resume(args)}")
