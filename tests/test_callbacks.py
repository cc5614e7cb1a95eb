"""What happens at a step: seeds, signals, gradients, losses that are no numbers, skipped steps."""

import math
import os
import signal
from types import SimpleNamespace

import paddle
import pytest
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from glm import callbacks
from glm.callbacks import MOST_SKIPPED, CheckFinite, Gradients, SeedEachStep, StopBySignal
from glm.errors import Fault


def test_each_step_draws_anew_and_a_resumed_one_alike():
    tracker, seen = get_rng_state_tracker(), []
    for step, seed, rank in ((0, 1, 0), (1, 1, 0), (2, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        args = SimpleNamespace(seed=seed, dataset_rank=0, tensor_parallel_rank=rank)
        SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=step), None)
        draws = [paddle.rand([4]).tolist()]
        for name in ("embedding_seed", "global_seed", "local_seed"):
            with tracker.rng_state(name):
                draws.append(paddle.rand([4]).tolist())
        seen.append(draws)
    tracker.reset()
    first, second, third, other_seed, other_rank, again = seen
    assert second == again
    for other in (second, third, other_seed):
        assert all(a != b for a, b in zip(first, other))
    assert len({tuple(draw) for draw in first}) == 4
    # Processes of tensor parallelism share all but what they drop in their own heads.
    assert first[:3] == other_rank[:3] and first[3] != other_rank[3]


@pytest.mark.parametrize(
    "world_size, training, seconds",
    [(1, True, [0, 0]), (1, False, [0]), (2, False, [0]), (2, True, [0, 0.6, 1.9, 2.1])],
)
def test_when_a_signal_ends_at_once(tmp_path, world_size, training, seconds, monkeypatch):
    """A second one; the first in an evaluation. A launcher's, which sends three in 0.6 seconds, are one."""
    args = SimpleNamespace(world_size=world_size, output_dir=str(tmp_path), overwrite_output_dir=False)
    state, callback, now = SimpleNamespace(global_step=7), StopBySignal(), [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
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
        for number, handler in callback.handlers_before.items():
            signal.signal(number, handler)


def test_master_gradients_are_float32(tmp_path):
    weight = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    other = paddle.to_tensor([1.0], stop_gradient=False)
    (weight * weight).sum().backward()
    model = SimpleNamespace(parameters=lambda: [weight, other])
    gradients = Gradients(master=True)
    gradients.on_optimizer_begin(None, None, None, model=model)
    assert weight.grad.dtype == paddle.float32 and weight.grad.tolist() == [2.0, 4.0] and other.grad is None
    gradients.on_step_end(None, None, None, model=model)
    assert weight.grad is None  # not zeros, which would take memory through the next forward pass


class Run:
    """Steps of a run under a GradScaler: the Trainer's order of events."""

    def __init__(self, tmp_path, world_size=1):
        self.args = SimpleNamespace(
            world_size=world_size, output_dir=str(tmp_path), overwrite_output_dir=False
        )
        self.check, self.state = CheckFinite(), SimpleNamespace(global_step=0)
        self.scheduler = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: 1 - step / 100)

    def step(self, loss, skipped, scaler="a scaler"):
        control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
        common = {"lr_scheduler": self.scheduler}
        self.check.on_step_begin(self.args, self.state, control, **common)
        self.check.note(paddle.to_tensor(loss), self.state.global_step + 1)
        if not skipped:
            self.scheduler.step()
        self.check.on_optimizer_end(self.args, self.state, control, scaler=scaler, **common)
        self.state.global_step += 1
        self.check.on_step_end(self.args, self.state, control, model=None)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_no_numbers_under_a_scaler(tmp_path, loss):
    run = Run(tmp_path)
    run.step(1.0, False)
    for _ in range(MOST_SKIPPED - 1):
        run.step(loss, True)
    run.step(1.0, False)  # not in a row
    for _ in range(MOST_SKIPPED - 1):
        run.step(loss, True)
    assert run.check.skipped == 2 * (MOST_SKIPPED - 1)
    with pytest.raises(
        Fault, match=f"is not finite in 10 steps in a row, the last of them step {2 * MOST_SKIPPED + 1}:"
    ):
        run.step(loss, True)


def test_a_loss_that_is_no_number_is_logged_as_the_one_before_it():
    """Its sum with the others would be none, and train_loss neither."""
    check = CheckFinite()
    returned = [
        float(check.note(paddle.to_tensor(loss), 1)) for loss in (2.0, math.nan, 1.5, -math.inf, math.inf)
    ]
    assert returned == [2.0, 2.0, 1.5, 1.5, 1.5]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """Nor if only one is, whatever the loss; frozen ones are not looked at."""
    run, control = Run(tmp_path), SimpleNamespace(should_log=False, should_evaluate=False, should_save=True)
    weights = [paddle.to_tensor([1.0, 2.0], stop_gradient=False), paddle.to_tensor([math.nan])]
    model = SimpleNamespace(parameters=lambda: weights)
    run.check.on_step_end(run.args, run.state, control, model=model)
    weights.append(paddle.to_tensor([0.0, math.inf], stop_gradient=False))
    with pytest.raises(Fault, match="the weights are not finite after step"):
        run.check.on_step_end(run.args, run.state, control, model=model)


def test_a_scale_that_is_too_large_ends_nothing(tmp_path):
    run = Run(tmp_path)
    for _ in range(3 * MOST_SKIPPED):
        run.step(2.5, True)
    assert run.check.skipped == 3 * MOST_SKIPPED and run.check.in_a_row == 0


def test_without_a_scaler_the_first_ends_the_run(tmp_path):
    run = Run(tmp_path)
    run.step(1.0, False, scaler=None)
    with pytest.raises(Fault, match="the loss is not finite at step 2: lower --learning_rate"):
        run.step(math.nan, False, scaler=None)


def test_the_rate_depends_on_the_step_alone(tmp_path):
    """Ten of twenty steps skipped: the schedule ends where it would without."""
    run = Run(tmp_path)
    for number in range(20):
        assert run.scheduler.get_lr() == pytest.approx(1 - number / 100)
        run.step(1.0, number % 2 == 0)
    assert run.scheduler.get_lr() == pytest.approx(0.8) and run.check.skipped == 10
