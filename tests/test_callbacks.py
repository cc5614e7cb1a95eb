"""What happens at a step: seeds, signals, gradients, losses that are no numbers, skipped steps."""

import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import FAST, TINY_GLM, run, small_data
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from visualdl import LogReader

from glm.errors import Fault
from glm.training import callbacks
from glm.training.callbacks import (
    MOST_SKIPPED,
    SHOWN,
    CheckFinite,
    Curves,
    Gradients,
    SeedEachStep,
    StopBySignal,
)


def test_each_step_draws_anew_and_a_resumed_one_alike():
    tracker, seen = get_rng_state_tracker(), []
    for step, seed, rank in ((0, 1, 0), (1, 1, 0), (2, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        args = SimpleNamespace(seed=seed, dataset_rank=0, tensor_parallel_rank=rank, tensor_parallel_degree=2)
        SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=step), None)
        draws = [paddle.rand([4]).tolist()]
        for name in ("embedding_seed", "global_seed", "local_seed"):
            with tracker.rng_state(name):
                draws.append(paddle.rand([4]).tolist())
        seen.append(draws)
    args.tensor_parallel_degree = 1  # where to switch generators would only take time
    SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=1), None)
    assert not tracker.states_ and paddle.rand([4]).tolist() == seen[-1][0]
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
    args = SimpleNamespace(
        world_size=world_size,
        output_dir=str(tmp_path),
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
    )
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


def test_who_waits_for_other_processes_lets_threads_run(tmp_path, monkeypatch):
    """Peers could end none of them otherwise: item() keeps Python's lock while the device waits."""
    monkeypatch.setattr(
        callbacks.dist, "all_reduce", lambda *args, **kwargs: SimpleNamespace(wait=lambda: None)
    )
    monkeypatch.setattr(paddle.Tensor, "item", None)
    signals = StopBySignal()
    for number in (signal.SIGTERM, 0):
        signals.received = int(number)
        signals.exchange(world_size=2)
    assert signals.signal_number == signal.SIGTERM
    run = Run(tmp_path, world_size=2)
    run.step(math.nan, True)
    run.step(math.nan, True)
    assert run.check.in_a_row == 2 and run.check.skipped == 2


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
        self.check, self.state = CheckFinite(), SimpleNamespace(global_step=0)
        self.scheduler = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: 1 - step / 100)

    def step(self, loss, skipped, scaler="a scaler"):
        control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
        common = {"lr_scheduler": self.scheduler}
        self.check.on_step_begin(self.args, self.state, control, **common)
        noted = self.check.note(paddle.to_tensor(loss), self.state.global_step + 1)
        if not skipped:
            self.scheduler.step()
        self.check.on_optimizer_end(self.args, self.state, control, scaler=scaler, **common)
        self.state.global_step += 1
        self.check.on_step_end(self.args, self.state, control, model=None)
        assert self.check.read(noted, self.args) == noted.tolist()  # as the Trainer logs it


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


def read_curves(folder):
    """What VisualDL's one log in a folder says, {kind: {tag: list of records}}."""
    (log,) = folder.glob("**/vdlrecords*")
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()
    return {kind: {tag: reader.get_data(kind, tag) for tag in tags[kind]} for kind in tags}


def test_the_best_and_worst_predictions_are_shown(tmp_path):
    rows = [
        {"rougel": score / 100, "answer": f"a{score}", "prediction": f"p{score}", "reference": f"r{score}"}
        for score in np.random.default_rng(0).permutation(30)
    ]
    curves = Curves(lambda: [*rows, {**rows[0], "rougel": None, "reference": None}])
    # As the Trainer has it where nothing was trained: every process is the first by its state.
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    curves.on_evaluate(SimpleNamespace(logging_dir=str(tmp_path), process_index=1), state, None)
    assert not list(tmp_path.iterdir())
    curves.on_evaluate(SimpleNamespace(logging_dir=str(tmp_path), process_index=0), state, None)
    shown = read_curves(tmp_path)
    texts = {tag: [record.text.encoded_text_string for record in shown["text"][tag]] for tag in shown["text"]}
    assert {tag: len(texts[tag]) for tag in texts} == {
        "best predictions/at the end": SHOWN,
        "worst predictions/at the end": SHOWN,
    }
    assert (
        texts["best predictions/at the end"][0]
        == "ROUGE-L 0.29 | answer: a29 | prediction: p29 | reference: r29"
    )
    assert [text[:12] for text in texts["worst predictions/at the end"][:2]] == [
        "ROUGE-L 0.00",
        "ROUGE-L 0.01",
    ]
    (histogram,) = shown["histogram"]["eval/rougel of the records"]
    assert sum(histogram.histogram.hist) == 30


def test_a_run_shows_its_evaluations(tmp_path):
    """Those in training by their step, the one after it at the end, and all in one log."""
    steps = "--max_steps 3 --logging_steps 1 --evaluation_strategy steps --eval_steps 2"
    flags = [*FAST, "--do_train", "--do_eval", *steps.split()]
    paths = ["--model_name_or_path", TINY_GLM, "--task_name", small_data(tmp_path, train=4, dev=3)]
    logged = run(*paths, "--output_dir", tmp_path / "out", *flags)
    assert not any("attempting to log" in line for line in logged)
    shown = read_curves(tmp_path / "out/runs")
    assert {tag.split("/")[1] for tag in shown["text"] if "predictions" in tag} == {"step 2", "at the end"}
    assert len(shown["text"]["worst predictions/at the end"]) == 3
    assert [record.id for record in shown["scalar"]["eval/rougel"]] == [2, 3]
    assert {"train/loss", "train/learning_rate"} <= set(shown["scalar"])
    assert not set(shown["scalar"]) & set(shown["histogram"])  # or VisualDL's server ends

    run(*paths, "--output_dir", tmp_path / "none", *flags, "--report_to", "none")
    assert not (tmp_path / "none/runs").exists()
