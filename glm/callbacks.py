"""What happens at a step: progress, seeds, signals, gradients, losses that are not finite."""

import signal
import time

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.trainer.trainer_callback import TrainerCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.checkpoints import where_to_resume
from glm.errors import Fault

NEVER = 2**62  # a step that is never reached
MOST_SKIPPED = 10  # losses in a row that may be no numbers, if gradients are scaled
ADVICE = "lower --learning_rate, or look at the data of that step"


class TrainingProgress(TrainerCallback):
    """A bar with loss and samples/s on a terminal; elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        disable = args.disable_tqdm or not state.is_world_process_zero
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self.bar = tqdm(desc="train", disable=disable, dynamic_ncols=True, **steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            learning_rate = f"learning rate {logs['learning_rate']:.3g}"
            logger.train(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {learning_rate}, {rate}"
            )
        else:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class SeedEachStep(TrainerCallback):
    """Each step draws from generators that are seeded by --seed and its number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        seed = (
            int(np.random.default_rng([args.seed, state.global_step, args.dataset_rank]).integers(2**40))
            * 1024
        )
        tracker = get_rng_state_tracker()
        tracker.reset()
        # Alike on all processes of tensor parallelism, but for the last, which drops in heads that are split over them.
        tracker.add("embedding_seed", seed + 1)
        tracker.add("global_seed", seed + 2)
        tracker.add("local_seed", seed + 3 + max(args.tensor_parallel_rank, 0))
        paddle.seed(seed)


class StopBySignal(TrainerCallback):
    """SIGINT and SIGTERM end training within a step, of several processes within two, with a checkpoint of it.

    At once where evaluation takes long, or by a second signal.
    """

    number = None  # of the signal that training is to end by, the same on all processes
    received = 0  # the number that this process has got
    asked = None  # the largest that any has got, being exchanged since the step before
    previous = None  # the handlers before training began

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

        self.previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def agree(self, args):
        """Let ``number`` be what any process had got when this was called last, and ask what they have got now."""
        if args.world_size == 1:
            self.number = self.received or None
            return
        if self.asked is not None:
            exchange, numbers = self.asked
            exchange.wait()
            self.number = numbers.item() or None
        numbers = paddle.to_tensor(self.received)
        self.asked = dist.all_reduce(numbers, dist.ReduceOp.MAX, sync_op=False), numbers

    def on_optimizer_end(self, args, state, control, **kwargs):
        self.agree(args)  # where a GradScaler has just waited for the device, which this then need not do
        if self.number is not None:  # before on_step_end, where others act on what is to be saved
            control.should_save = args.save_strategy != IntervalStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        if self.number is not None:
            control.should_evaluate = False
            if args.save_strategy == IntervalStrategy.NO:
                self.stop(self.number, args, state)

    def on_save(self, args, state, control, **kwargs):
        if self.number is not None:
            self.stop(self.number, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        for _ in range(2):  # what was asked before, and what is asked now
            self.agree(args)
        self.on_save(args, state, control)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @staticmethod
    def stop(number, args, state):
        name = signal.Signals(number).name
        raise Fault(f"stopped by {name} at step {state.global_step}: {where_to_resume(args)}", 128 + number)


class Gradients(TrainerCallback):
    """Gradients give their memory back after each step; in half precision, by default, they are used in float32.

    In float16 what is small would vanish when it is unscaled, and a squared norm past 65504 overflow, so that clipping
    makes the update zero.
    """

    def __init__(self, master):
        self.master = master  # whether they become float32 before they are unscaled, clipped and used

    def on_optimizer_begin(self, args, state, control, model=None, **kwargs):
        if self.master:
            # What paddle.amp.decorate(master_grad=True) does after a backward pass, of which recompute has many.
            paddle.base.core.eager.set_master_grads([p for p in model.parameters() if p.grad is not None])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for weight in model.parameters():  # the Trainer has only filled them with zeros
            weight.clear_gradient(False)


class CheckFinite(TrainerCallback):
    """A loss or a weight that is no number ends the run before anything is logged, evaluated or saved after it.

    Where gradients are scaled (fp16), the GradScaler leaves out the update of such a step, as of one whose gradients
    overflow: the run then ends after MOST_SKIPPED losses in a row that are no numbers.
    """

    def __init__(self):
        self.skipped = self.in_a_row = 0  # steps without an update, since training began or was resumed
        self.last_loss = paddle.zeros([])
        self.forget()

    def forget(self):
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    def note(self, loss, step):
        """Remember the first ``step`` whose ``loss`` is no number, on the device, where nothing waits for it.

        Returns the loss, or the last that was a number, for with it all that is logged afterwards would be none.
        """
        finite = paddle.isfinite(loss)
        self.first_bad_step = paddle.minimum(
            self.first_bad_step, paddle.where(finite, NEVER, step).reshape([])
        )
        self.last_loss = paddle.where(finite, loss, self.last_loss.astype(loss.dtype))
        return self.last_loss

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rate_step = lr_scheduler.last_epoch

    def on_optimizer_end(self, args, state, control, lr_scheduler=None, scaler=None, **kwargs):
        if scaler is None:
            return
        if lr_scheduler.last_epoch != self.rate_step:  # the Trainer steps the rate after an update alone
            self.in_a_row = 0
            return
        lr_scheduler.step()  # the rate depends on the step, and ends where it is to end, however many are left out
        self.skipped += 1
        bad = (self.first_bad_step != NEVER).astype("int64")
        if args.world_size > 1:  # of all, for they must end together
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.in_a_row = self.in_a_row + 1 if bad.item() else 0
        self.forget()
        if self.in_a_row == MOST_SKIPPED:
            where = f"in {MOST_SKIPPED} steps in a row, the last of them step {state.global_step + 1}"
            raise Fault(f"the loss is not finite {where}: {ADVICE}; {where_to_resume(args)}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        step = self.first_bad_step.item()
        if step != NEVER:
            raise Fault(f"the loss is not finite at step {step}: {ADVICE}; {where_to_resume(args)}")
        if control.should_save and not all(
            weight.stop_gradient or paddle.isfinite(weight).all().item() for weight in model.parameters()
        ):
            step = state.global_step
            raise Fault(f"the weights are not finite after step {step}: {ADVICE}; {where_to_resume(args)}")

    on_epoch_end = on_step_end
