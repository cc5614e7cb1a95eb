"""A signal ends training: when, and by which exchange of processes."""

import json
import os
import signal
from types import SimpleNamespace

import paddle
import pytest
from helpers import FakeTokenizer, make_batch, make_trainer, random_glm
from paddlenlp.trainer.trainer_callback import TrainerState
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from data import DataCollator
from glm.errors import Fault
from glm.outputs.checkpoints import Checkpoint, open_checkpoint
from glm.processes import restore_signals
from glm.training import stopping
from glm.training.stopping import EvaluationCancelled, StopBySignal


@pytest.mark.parametrize("world_size, seconds", [(1, [0, 0]), (2, [0, 0.6, 1.9, 2.1])])
def test_when_a_signal_ends_at_once(tmp_path, world_size, seconds, monkeypatch):
    """A second one. A launcher's, which sends three in 0.6 seconds, are one."""
    args = SimpleNamespace(
        world_size=world_size,
        output_dir=str(tmp_path),
        overwrite_output_dir=False,
        resume_from_checkpoint=None,
    )
    state, now = SimpleNamespace(global_step=7), [100.0]
    callback = StopBySignal(lambda: "there is no checkpoint")
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    callback.on_train_begin(args, state, None)
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
    callback.on_train_begin(args, None, None)
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


@pytest.mark.parametrize("world_size, later", [(1, False), (2, False), (1, True)])
def test_a_signal_in_the_last_step_waits_for_the_model(tmp_path, monkeypatch, world_size, later):
    """Or a ``later`` one. The run was done: there need be no checkpoint. A second one does nothing."""
    waiting = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *args, **kwargs: waiting)
    args = SimpleNamespace(world_size=world_size, output_dir=str(tmp_path), save_strategy=IntervalStrategy.NO)
    state, control = SimpleNamespace(global_step=6, max_steps=7), SimpleNamespace(should_evaluate=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    callback = StopBySignal(lambda: "there is no checkpoint")
    callback.on_train_begin(args, state, control)
    callback.on_optimizer_end(args, state, control)
    if not later:
        os.kill(os.getpid(), signal.SIGTERM)
    state.global_step += 1
    if world_size == 1 and not later:
        callback.on_optimizer_end(args, state, control)
        callback.on_step_end(args, state, control)
        assert not control.should_evaluate and not control.should_save
    callback.on_train_end(args, state, control)
    try:
        if later:
            assert {number: signal.getsignal(number) for number in before} == before
        elif world_size == 2:  # as a launcher does
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(
            Fault, match=f"by SIGTERM after the last step: the trained model is in {tmp_path}"
        ) as fault:
            with callback.writing(args, state):
                if later:
                    os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert fault.value.exit_code == 143
    finally:
        restore_signals(before)


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, monkeypatch):
    """As of nohup, which lets a run outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    callback, args = StopBySignal(lambda: "there is no checkpoint"), SimpleNamespace(world_size=1)
    try:
        callback.on_train_begin(args, None, None)
        os.kill(os.getpid(), signal.SIGHUP)
        callback.on_train_end(args, None, None)
        assert callback.signal_number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("world_size, cpu, at_once", [(1, True, True), (1, False, False), (2, True, False)])
def test_a_signal_cancels_an_evaluation(monkeypatch, world_size, cpu, at_once):
    """At once on a CPU; behind the batch on a card, and where all processes have to end with the same one."""
    waiting = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *args, **kwargs: waiting)
    monkeypatch.setattr(stopping, "on_cpu", lambda: cpu)
    went_on = []
    callback, args = StopBySignal(lambda: "there is no checkpoint"), SimpleNamespace(world_size=world_size)
    callback.on_train_begin(args, None, None)
    try:
        with pytest.raises(EvaluationCancelled), callback.cancelling(True):
            callback.on_prediction_step(args, None, None)
            os.kill(os.getpid(), signal.SIGTERM)
            went_on.append(True)
            for _ in range(world_size):  # with several, what is sent now is read behind the next batch
                callback.on_prediction_step(args, None, None)
        assert bool(went_on) != at_once
        assert callback.received == signal.SIGTERM and callback.fault is None
        with callback.cancelling(False):  # after training
            callback.on_prediction_step(args, None, None)
    finally:
        callback.restore_handlers()


def evaluating_trainer(folder, monkeypatch, **changes):
    """One that trains on three records, and whose checkpoints hold no tokenizer."""
    features, _ = make_batch()
    settings = {"per_device_train_batch_size": 3, "save_steps": 9, "max_steps": 3, "logging_steps": 1}
    settings.update(evaluation_strategy="steps", do_train=True, dataloader_num_workers=0, **changes)
    trainer = make_trainer(folder, random_glm(num_layers=1), **settings)
    monkeypatch.setattr(FakeTokenizer, "save_pretrained", lambda self, folder: None, raising=False)
    monkeypatch.setattr(FakeTokenizer, "init_kwargs", {}, raising=False)
    trainer.tokenizer, trainer.data_collator = FakeTokenizer(), DataCollator(0)
    records = [{**item, "index": i, "record": {"question": f"{i}"}} for i, item in enumerate(features)]
    trainer.train_dataset = trainer.eval_dataset = records
    return trainer


@pytest.mark.parametrize("strategy, step", [("steps", 2), ("steps", 3), ("no", 2), ("no", 3)])
def test_a_signal_in_an_evaluation_loses_nothing(tmp_path, monkeypatch, strategy, step):
    """Its step is saved, though none was to be; the last one's model is written where none may be."""
    trainer = evaluating_trainer(tmp_path, monkeypatch, save_strategy=strategy, eval_steps=step)
    monkeypatch.setattr(trainer, "prediction_step", lambda *args, **kw: os.kill(os.getpid(), signal.SIGTERM))
    if strategy == "no" and step == 3:  # the last
        trainer.train()
        assert not list(tmp_path.glob("checkpoint-*"))
        with pytest.raises(Fault, match="SIGTERM after the last step: the trained model is in"):
            with trainer.writing():
                pass
    else:
        hint = f"goes on from {tmp_path}/checkpoint-{step}" if strategy == "steps" else "is no checkpoint"
        with pytest.raises(Fault, match=f"by SIGTERM at step {step}: .*{hint}"):
            trainer.train()
    if strategy == "steps":
        checkpoint = open_checkpoint(tmp_path / f"checkpoint-{step}")
        assert checkpoint.complete and checkpoint.evaluation_is_due
    assert trainer.state.global_step == step


@pytest.mark.parametrize("loss, steps", [(5.0, 1), (4.0, 3)])
def test_an_evaluation_that_is_made_up_ends_training_before_a_step(tmp_path, monkeypatch, loss, steps):
    """The one of step 1, no better than the best, where one such ends training; or better."""
    best = {"metric_for_best_model": "loss", "greater_is_better": False, "early_stopping_patience": 1}
    settings = {"save_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, **best}
    trainer = evaluating_trainer(tmp_path, monkeypatch, **settings)
    monkeypatch.setattr(trainer, "prediction_step", lambda *args, **kw: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Fault, match="at step 1"):
        trainer.train()
    # As if an evaluation before it had been better.
    state = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    state.update(best_metric=4.5, best_model_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1/trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((tmp_path / "checkpoint-1/.checkpoint_done").read_text())
    del manifest["files"]["trainer_state.json"]
    (tmp_path / "checkpoint-1/.checkpoint_done").write_text(json.dumps(manifest))
    trainer, values = evaluating_trainer(tmp_path, monkeypatch, **settings), iter((loss, 3.0, 2.0))
    trainer.folder.run = trainer.folder.new_run = open_checkpoint(tmp_path / "checkpoint-1").run
    loop = lambda *args, **kw: SimpleNamespace(metrics={"eval_loss": next(values)}, num_samples=3)  # noqa: E731
    monkeypatch.setattr(trainer, "evaluation_loop", loop)
    trainer.train(resume_from_checkpoint=open_checkpoint(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == steps
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluated == [loss, 3.0, 2.0][:steps]
    assert trainer.state.best_metric == (4.5 if steps == 1 else 4.0)  # of those that are saved


@pytest.mark.parametrize(
    "changes, steps, kept",
    [
        ({}, 3, True),
        ({"logging_steps": 2, "seed": 5}, 3, True),
        ({"label_smoothing": 0.2}, 3, False),
        ({"label_smoothing": 0.2}, 2, True),  # nothing is left to train, and the best is not compared
    ],
)
def test_a_best_belongs_to_what_it_was_measured_on(tmp_path, monkeypatch, changes, steps, kept):
    """With the same arguments and records nothing changes; by other losses the best begins anew."""
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    settings.update(metric_for_best_model="loss", greater_is_better=False, max_steps=2)

    def train(losses, checkpoint=None, **changes):
        trainer, values = evaluating_trainer(tmp_path, monkeypatch, **{**settings, **changes}), iter(losses)
        trainer.folder.run = trainer.folder.new_run = trainer.folder.new_run._replace(id="a")
        loop = lambda *args, **kw: SimpleNamespace(metrics={"eval_loss": next(values)}, num_samples=3)  # noqa: E731
        monkeypatch.setattr(trainer, "evaluation_loop", loop)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    train([2.0, 3.0])
    checkpoint = open_checkpoint(tmp_path / "checkpoint-2")
    trainer = train([4.0], checkpoint, **{"max_steps": steps, **changes})
    best = 1 if kept else 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.state.best_metric == (2.0 if kept else 4.0)
    assert trainer.current_step == best
    # What it goes on with is its own.
    again = open_checkpoint(tmp_path / f"checkpoint-{steps}").measures
    assert (again == checkpoint.measures) == (kept or steps == 2)


def test_what_an_evaluation_depends_on(tmp_path, monkeypatch):
    def measure(change=None, **changes):
        trainer = evaluating_trainer(tmp_path, monkeypatch)
        if change:
            change(trainer.eval_dataset)
        for name, value in changes.items():
            setattr(trainer.args if name == "label_smoothing" else trainer.generation, name, value)
        return trainer.measures["loss"], trainer.measures["text"]

    def other_token(dataset):
        ids = dataset[0]["input_ids"].copy()
        ids[0] += 1
        dataset[0]["input_ids"] = ids

    loss, text = measure()
    assert measure() == (loss, text) and loss != text
    assert measure(num_return_sequences=2) == (loss, text)
    assert measure(lambda dataset: dataset[0]["record"].update(id=7, where="a:7")) == (loss, text)
    for change in (list.pop, other_token, lambda dataset: dataset[0].update(source_length=8)):
        assert not {*measure(change)} & {loss, text}
    found = measure(label_smoothing=0.2)
    assert found[0] != loss and found[1] == text
    found = measure(lambda dataset: dataset[0]["record"].update(question="another"))
    assert found[0] == loss and found[1] != text
    rules = {"num_beams": 2, "tgt_length": 9, "min_tgt_length": 1, "length_penalty": 1, "select_topk": False}
    for name, value in {**rules, "no_repeat_ngram_size": 2, "top_k": 3}.items():
        found = measure(**{name: value})
        assert found[0] == loss and found[1] != text


@pytest.mark.parametrize("same_metric, count", [(True, 2), (False, 0)])
def test_evaluations_without_better_are_counted_on_by_the_same_metric(
    tmp_path, monkeypatch, same_metric, count
):
    trainer = evaluating_trainer(tmp_path, monkeypatch, early_stopping_patience=3, eval_steps=1)
    monkeypatch.setattr(trainer.checkpoints, "settle_best", lambda *args: same_metric)
    monkeypatch.setattr(Checkpoint, "read_state", lambda self: TrainerState(global_step=2))
    trainer.take_over(Checkpoint(tmp_path, 2, evaluations_without_better=2))
    assert trainer.early_stopping.early_stopping_patience_counter == count
