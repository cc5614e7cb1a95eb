"""Seeds of a step, gradients, losses and weights that are not finite, skipped steps."""

import math
from types import SimpleNamespace

import paddle
import pytest
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from glm.errors import Fault
from glm.training import numerics
from glm.training.numerics import MOST_SKIPPED, CheckFinite, Gradients, SeedEachStep


def test_each_step_draws_anew_and_a_resumed_one_alike():
    tracker, seen = get_rng_state_tracker(), []
    for step, seed, dataset_rank, rank in (
        (0, 1, 0, 0),
        (1, 1, 0, 0),
        (2, 1, 0, 0),
        (0, 2, 0, 0),
        (0, 1, 1, 0),
        (0, 1, 0, 1),
        (1, 1, 0, 0),
    ):
        ranks = {"dataset_rank": dataset_rank, "tensor_parallel_rank": rank}
        args = SimpleNamespace(seed=seed, tensor_parallel_degree=2, **ranks)
        SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=step), None)
        draws = [paddle.rand([4]).tolist()]
        for name in ("embedding_seed", "global_seed", "local_seed"):
            with tracker.rng_state(name):
                draws.append(paddle.rand([4]).tolist())
        seen.append(draws)
    args.tensor_parallel_degree = 1  # where to switch generators would only take time
    SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=1), None)
    assert not tracker.states_ and paddle.rand([4]).tolist() == seen[-1][0]
    first, second, third, other_seed, other_data, other_rank, again = seen
    assert second == again
    for other in (second, third, other_seed, other_data):  # what shares the data drops other units
        assert all(a != b for a, b in zip(first, other))
    assert len({tuple(draw) for draw in first}) == 4
    # Processes of tensor parallelism share all but what they drop in their own heads.
    assert first[:3] == other_rank[:3] and first[3] != other_rank[3]


def test_who_waits_for_other_processes_lets_threads_run(tmp_path, monkeypatch):
    """Peers could end none of them otherwise: item() keeps Python's lock while the device waits."""
    monkeypatch.setattr(numerics.dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(paddle.Tensor, "item", None)
    run = Run(tmp_path, world_size=2)
    run.step(math.nan, True)
    run.step(math.nan, True)
    assert run.check.in_a_row == 2 and run.check.skipped == 2
    weights = [paddle.to_tensor([1.0], stop_gradient=False)]
    run.check.check_weights(run.args, run.state, SimpleNamespace(parameters=lambda: weights))


def test_master_gradients_are_float32(tmp_path):
    weight = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    other = paddle.to_tensor([1.0], stop_gradient=False)
    (weight * weight).sum().backward()
    model = SimpleNamespace(parameters=lambda: [weight, other])
    gradients = Gradients(master=True)
    gradients.on_optimizer_begin(None, None, None, model=model)
    assert weight.grad.dtype == paddle.float32 and weight.grad.tolist() == [2.0, 4.0] and other.grad is None
    optimizer = paddle.optimizer.SGD(parameters=[weight, other])
    gradients.on_train_begin(None, None, None, optimizer=optimizer)
    optimizer.clear_grad()  # as the Trainer calls it
    assert weight.grad is None  # not zeros, which would take memory through the next forward pass


class Run:
    """Steps of a run under a GradScaler: the Trainer's order of events."""

    def __init__(self, tmp_path, world_size=1):
        self.args = SimpleNamespace(
            world_size=world_size,
            output_dir=str(tmp_path),
            overwrite_output_dir=False,
            resume_from_checkpoint=None,
        )
        self.check, self.state = CheckFinite(lambda: "the hint"), SimpleNamespace(global_step=0)
        self.scheduler = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: 1 - step / 100)

    def step(self, loss, skipped, scaler="a scaler"):
        control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
        common = {"lr_scheduler": self.scheduler}
        self.check.on_step_begin(self.args, self.state, control, **common)
        noted = self.check.record_loss(paddle.to_tensor(loss), self.state.global_step + 1)
        if not skipped:
            self.scheduler.step()
        self.check.on_optimizer_end(self.args, self.state, control, scaler=scaler, **common)
        self.state.global_step += 1
        self.check.on_step_end(self.args, self.state, control, model=None)
        assert self.check.loss_to_log(noted, self.args) == noted.tolist()  # as the Trainer logs it


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
    check = CheckFinite(lambda: "the hint")
    returned = [
        float(check.record_loss(paddle.to_tensor(loss), 1))
        for loss in (2.0, math.nan, 1.5, -math.inf, math.inf)
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
    with pytest.raises(Fault, match="the weights are not finite after step"):  # after the last step, too
        run.check.on_train_end(run.args, run.state, control, model=model)


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
    for name in ("should_evaluate", "should_save"):
        control = SimpleNamespace(**{"should_evaluate": False, "should_save": False, name: True})
        with pytest.raises(Fault, match="the loss is not finite at step 2: lower --learning_rate"):
            run.check.on_step_end(run.args, run.state, control, model=None)


def test_the_rate_depends_on_the_step_alone(tmp_path):
    """Ten of twenty steps skipped: the schedule ends where it would without."""
    run = Run(tmp_path)
    for number in range(20):
        assert run.scheduler.get_lr() == pytest.approx(1 - number / 100)
        run.step(1.0, number % 2 == 0)
    assert run.scheduler.get_lr() == pytest.approx(0.8) and run.check.skipped == 10
