"""The numbers of a step: its seeds, its gradients, and losses and weights that are not finite."""

import functools

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.trainer.trainer_callback import TrainerCallback

from glm.errors import Fault

NEVER = 2**62  # a step that is never reached
MOST_SKIPPED = 10  # losses in a row that may be not finite, if gradients are scaled
ADVICE = "lower --learning_rate, or look at the data of that step"


def are_finite(weights: list[paddle.Tensor]) -> bool:
    """Return whether no weight holds NaN or infinity."""
    return not paddle.stack([(~paddle.isfinite(weight)).any() for weight in weights]).any().tolist()


class SeedEachStep(TrainerCallback):
    """Seed all generators at each step by --seed and the step's number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        rng = np.random.default_rng([args.seed, state.global_step, args.dataset_rank])
        seed = int(rng.integers(2**40)) * 1024
        tracker = get_rng_state_tracker()
        tracker.reset()
        if args.tensor_parallel_degree > 1:
            # The processes draw alike, but for what is dropped in the heads that are split over them.
            tracker.add("embedding_seed", seed + 1)
            tracker.add("global_seed", seed + 2)
            tracker.add("local_seed", seed + 3 + args.tensor_parallel_rank)
        paddle.seed(seed)


class Gradients(TrainerCallback):
    """Free the gradients after each step, and make them float32 before they are used, if ``master``.

    In float16 small gradients would vanish when they are unscaled, and a squared norm past 65504
    would overflow, so that clipping makes the update zero.
    """

    def __init__(self, master: bool):
        self.master = master

    def on_optimizer_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if hasattr(optimizer, "gather_gradients"):
            optimizer.gather_gradients(self.master)
        elif self.master:
            # As paddle.amp.decorate(master_grad=True) does after a backward pass, of which recompute
            # has many.
            parameters = [weight for weight in model.parameters() if weight.grad is not None]
            paddle.base.core.eager.set_master_grads(parameters)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if hasattr(optimizer, "copy_weights"):
            optimizer.copy_weights()

    def on_substep_end(self, args, state, control, optimizer=None, **kwargs):
        if hasattr(optimizer, "accumulate_gradients"):
            optimizer.accumulate_gradients()

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        # The Trainer calls it without arguments, by which gradients are filled with zeros and kept.
        optimizer.clear_grad = functools.partial(optimizer.clear_grad, set_to_zero=False)
        if hasattr(optimizer, "adopt_weights"):  # the model's wrappers may have moved them
            optimizer.adopt_weights()


class CheckFinite(TrainerCallback):
    """End the run at a loss or a weight that is not finite, before anything is logged or saved after it.

    Where gradients are scaled (fp16), the GradScaler leaves out the update of such a step, as of one
    whose gradients overflow. The run then ends after MOST_SKIPPED such losses in a row.

    Args:
        resume_hint (callable): returns what the last line says of going on.
    """

    def __init__(self, resume_hint):
        self.resume_hint = resume_hint
        self.skipped = self.in_a_row = 0  # steps without an update in this process
        self.last_loss = paddle.zeros([])
        self.reset()

    def reset(self):
        """Take all losses so far for finite."""
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    def record_loss(self, loss: paddle.Tensor, step: int) -> paddle.Tensor:
        """Keep the first ``step`` whose ``loss`` is not finite, on the device, where nothing waits for it.

        Returns:
            the loss, or the last one that was finite, for the Trainer adds them up.
        """
        # By arithmetic: paddle.isfinite waits for a card. All shapes are [], for paddle.where would
        # launch ten kernels to make others equal.
        loss = loss.reshape([])
        finite = (loss - loss) == 0
        bad_step = self.first_bad_step.clip(max=step)
        self.first_bad_step = paddle.where(finite, self.first_bad_step, bad_step)
        self.last_loss = paddle.where(finite, loss, self.last_loss.astype(loss.dtype))
        return self.last_loss

    def loss_to_log(self, loss: paddle.Tensor, args) -> float:
        """Return the ``loss`` to log; end the run if one of those added up in it was not finite.

        Both are read at once, so that a logged step waits for the device a single time.
        """
        bad = (self.first_bad_step != NEVER).astype(loss.dtype)
        value, bad = paddle.stack([loss, bad]).tolist()
        if bad:
            self.check_losses(args)
        return value

    def check_losses(self, args):
        """End the run if a loss was not finite."""
        step = self.first_bad_step.tolist()
        if step != NEVER:
            self.stop(f"loss is not finite at step {step}", args)

    def check_weights(self, args, state, model):
        """End the run if a loss was not finite, or a trained weight is not."""
        self.check_losses(args)
        trained = [weight for weight in model.parameters() if not weight.stop_gradient]
        if not are_finite(trained):
            self.stop(f"weights are not finite after step {state.global_step}", args)

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
        self.reset()
        if self.in_a_row == MOST_SKIPPED:
            last = state.global_step + 1
            self.stop(
                f"loss is not finite in {MOST_SKIPPED} steps in a row, the last of them step {last}", args
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_evaluate or control.should_save:  # a loss that is logged is read then
            self.check_weights(args, state, model)

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.check_weights(args, state, model)

    def stop(self, what: str, args):
        """Raise the Fault that says ``what`` is not finite, and where to go on."""
        raise Fault(f"the {what}: {ADVICE}; {self.resume_hint()}")
