"""GLMTrainer: the loss of a global batch, the schedule, the evaluation."""

import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import log_softmax, make_batch, make_trainer, random_glm

from data import DataCollator
from glm import modeling
from glm.outputs.checkpoints import Checkpoint
from glm.training.sampler import GroupedBatchSampler
from glm.training.trainer import Resume


def test_trainer_loss_is_the_mean_over_target_tokens(tmp_path):
    """A padded batch, against each record alone, unpadded, through PaddleNLP's own forward."""
    model = random_glm()
    features, batch = make_batch()
    losses = []
    for feature in features:
        single = DataCollator(0)([{**feature, "index": 0}])
        logits = model(
            **{key: paddle.to_tensor(single[key]) for key in ("input_ids", "position_ids")},
            attention_mask=paddle.to_tensor(single["attention_mask"].astype("float32")),
            return_dict=True,
        ).logits.numpy()[0]
        log_p = log_softmax(logits[feature["source_length"] :][: len(feature["labels"])])
        picked = log_p[np.arange(len(log_p)), feature["labels"]]
        losses.append(-(0.9 * picked + 0.1 * log_p.mean(-1)))
    trainer = make_trainer(tmp_path, model)
    loss = trainer.compute_loss(model, {key: paddle.to_tensor(value) for key, value in batch.items()})
    assert float(loss) == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)


def test_a_training_step_divides_by_the_targets_of_its_own_global_batch(tmp_path):
    """Of two processes and three passes, each of which adds its share of the sum to a mean over all six."""
    _, batch = make_batch()
    inputs = {key: paddle.to_tensor(value) for key, value in batch.items()}
    trainer = make_trainer(tmp_path, random_glm())
    losses = trainer.target_losses(trainer.model, inputs).numpy().astype("float64")
    trainer.is_in_train, trainer.state.global_step = True, 4
    trainer.train_sampler = SimpleNamespace(target_tokens=[50, 60, 70])
    assert float(trainer.compute_loss(trainer.model, inputs)) == pytest.approx(losses.sum() / 60, rel=1e-5)
    trainer.args = SimpleNamespace(
        dataset_world_size=2, gradient_accumulation_steps=3, label_smoothing=0.1, ignore_data_skip=False
    )
    assert float(trainer.compute_loss(trainer.model, inputs)) == pytest.approx(
        6 * losses.sum() / 60, rel=1e-5
    )


@pytest.mark.parametrize("warmup_ratio, warmup", [(0.2, 2), (0.0, 0)])
def test_linear_schedule(tmp_path, warmup_ratio, warmup):
    trainer = make_trainer(tmp_path, random_glm(num_layers=1), learning_rate=3e-5, warmup_ratio=warmup_ratio)
    scheduler = trainer.create_scheduler(11)  # steps 0 to 10
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_lr())
        scheduler.step()
    assert rates[0] == pytest.approx(0 if warmup else 3e-5)
    assert rates[warmup] == max(rates) == pytest.approx(3e-5)
    assert rates[10] == pytest.approx(3e-6) and rates[11] == pytest.approx(3e-6)
    slopes = np.diff(rates[warmup:11])
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)


def test_other_schedules_are_paddlenlps(tmp_path):
    trainer = make_trainer(tmp_path, random_glm(num_layers=1), learning_rate=1.0, lr_scheduler_type="cosine")
    scheduler = trainer.create_scheduler(10)
    for _ in range(5):
        scheduler.step()
    assert scheduler.get_lr() == pytest.approx(0.5)  # half of a half cosine


def test_o1_is_of_training_alone(tmp_path, monkeypatch):
    """An evaluation would cast every weight again at each token. float64 stands for a half type here."""
    monkeypatch.setattr("glm.arguments.GLMTrainingArguments.product_dtype", lambda args: "float64")
    trainer = make_trainer(tmp_path, random_glm())
    trainer.tokenizer = SimpleNamespace(sop_token_id=1, eop_token_id=2)
    trainer.outputs, trainer.generated_tokens, trainer.start = {}, 0, 0.0
    trainer.bar = SimpleNamespace(update=lambda count: None, set_postfix_str=lambda text: None)
    _, batch = make_batch()
    inputs = {key: paddle.to_tensor(value) for key, value in batch.items()}
    dtypes, attend = [], modeling.attend

    def watched(query, *others):
        dtypes.append(query.dtype)
        return attend(query, *others)

    for room in ("modeling", "decoding.cache"):
        monkeypatch.setattr(f"glm.{room}.attend", watched)
    trainer.model.eval()
    trainer.prediction_step(trainer.model, inputs)
    assert sorted(trainer.outputs) == [0, 1, 2] and set(dtypes) == {paddle.float32}
    dtypes.clear()
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    assert set(dtypes) == {paddle.float64}


def test_only_a_logged_step_waits_for_the_device(tmp_path, monkeypatch):
    """Once: whatever the host reads of a tensor is a wait. (A GradScaler waits beside it.)"""
    features, _ = make_batch()
    settings = {"per_device_train_batch_size": 2, "save_strategy": "no", "dataloader_num_workers": 0}
    trainer = make_trainer(tmp_path, random_glm(), max_steps=7, logging_steps=3, **settings)
    trainer.train_dataset = [{**feature, "index": i} for i, feature in enumerate(features)]
    trainer.data_collator, reads, reading = DataCollator(0), [], []

    def counted(method):
        def read(tensor, *args, **kwargs):
            reads[-1] += not reading  # one reads by another
            reading.append(method)
            try:
                return method(tensor, *args, **kwargs)
            finally:
                reading.pop()

        return read

    def training_step(*args):
        reads.append(0)
        return original(*args)

    original = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", training_step)
    for name in ("item", "numpy", "tolist", "cpu", "__array__", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(paddle.Tensor, name, counted(getattr(paddle.Tensor, name)))
    reads.append(0)
    trainer.train()
    assert reads[1:7] == [0, 0, 1, 0, 0, 1]
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2 and all(np.isfinite(logged))


def test_the_warmup_by_steps_wins_over_the_ratio(tmp_path):
    changes = {"learning_rate": 1.0, "warmup_ratio": 0.5, "warmup_steps": 4}
    scheduler = make_trainer(tmp_path, random_glm(num_layers=1), **changes).create_scheduler(20)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_lr())
        scheduler.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_the_order_of_batches_is_of_the_seed(tmp_path):
    """Of --seed, and not of the machine's generators."""
    features, _ = make_batch()
    orders = []
    for seed in (1, 2, 1):
        trainer = make_trainer(tmp_path, random_glm(num_layers=1), seed=seed, per_device_train_batch_size=1)
        trainer.train_dataset = features * 8
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("before, now, ahead", [(4, 12, 60), (12, 8, -15), (4, 4, 0), (None, 8, 0)])
def test_what_is_left_to_train_is_counted_in_records(tmp_path, before, now, ahead):
    """240 records, two epochs: of any batch before, half an epoch is left after one and a half."""
    trainer = make_trainer(
        tmp_path, random_glm(num_layers=1), per_device_train_batch_size=now, num_train_epochs=2.0
    )
    trainer.train_dataset = make_batch()[0] * 80
    step = 360 // (before or now)
    trainer.resume = trainer.count_records(Checkpoint(tmp_path, step, global_batch_size=before), step)
    assert trainer.resume.steps_ahead == ahead and trainer.last_step() - step == 120 // now
    # The records of the epoch's second half, in the order of a run that had this batch all along.
    epoch = GroupedBatchSampler(trainer.train_dataset, now, 1, 0, now, True, True, trainer.args.seed)
    epoch.set_epoch(1)
    expected = list(epoch)[120 // now :]
    sampler, found = trainer._get_train_sampler(), []
    for number in range(step // len(sampler), (step + 120 // now) // len(sampler) + 1):
        sampler.set_epoch(number)
        found += [(number * len(sampler) + i, batch) for i, batch in enumerate(sampler)]
    assert [batch for i, batch in found if step <= i < trainer.last_step()] == expected


def test_the_loss_of_training_is_the_mean_over_the_processes(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, random_glm(num_layers=1))
    monkeypatch.setattr("glm.training.trainer.gather_objects", lambda value: [value, value + 1.0])
    trainer.state.global_step, trainer.state.max_steps, trainer.resume = 10, 10, Resume(None, 5)
    metrics = {name: 1.0 for name in ("train_samples_per_second", "train_steps_per_second", "train_runtime")}
    metrics["train_loss"] = 2.0
    trainer.correct_speed_metrics(metrics)
    assert metrics["train_loss"] == 5.0 and metrics["train_steps_per_second"] == 0.5


@pytest.mark.parametrize("size, steps_ahead", [(4, 3), (8, -7), (2, 8), (None, 3)])
def test_what_was_counted_in_records_before_is_counted_on(tmp_path, size, steps_ahead):
    """Step 13 of a run that was 3 steps ahead: 10 updates of ``size`` records, and now they are of 4."""
    trainer = make_trainer(tmp_path, random_glm(), per_device_train_batch_size=4, num_train_epochs=9)
    checkpoint = SimpleNamespace(global_batch_size=size, steps_ahead=3)
    assert trainer.count_records(checkpoint, 13).steps_ahead == steps_ahead


def test_the_first_step_after_a_resume_has_this_runs_rate(tmp_path, monkeypatch):
    """And not the one that the checkpoint's schedule holds."""
    module = sys.modules["glm.training.trainer"]
    trainer = make_trainer(tmp_path, random_glm(), learning_rate=2e-3)
    trainer.lr_scheduler = paddle.optimizer.lr.LambdaDecay(2e-3, lambda step: 1 - step / 10)
    trainer.optimizer = SimpleNamespace(set_state_dict=lambda state: None)
    monkeypatch.setattr(module, "read_optimizer_state", lambda *args: {})
    monkeypatch.setattr(module, "read_state", lambda path, like: {"last_epoch": 4, "last_lr": 6e-4})
    trainer.resume = module.Resume(SimpleNamespace(parameters=None), step=4)
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert trainer.lr_scheduler.get_lr() == pytest.approx(2e-3 * 0.6)


def test_gradients_in_half_are_scaled(tmp_path, monkeypatch):
    """Though there is no autocast in a step, of which a GradScaler looks for a trace."""
    trainer = make_trainer(tmp_path, random_glm(num_layers=1))
    trainer.enable_autocast_context_manager, trainer.amp_dtype = True, "float16"
    monkeypatch.setattr(paddle.amp.auto_cast.__globals__["amp_global_state"](), "amp_dtype", "float32")
    scaler = paddle.amp.GradScaler.__new__(paddle.amp.GradScaler)  # a CPU is refused
    scaler._enable = scaler._use_dynamic_loss_scaling = True
    scaler._scale = paddle.to_tensor([4096.0])
    with trainer.autocast_smart_context_manager():
        assert paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2])).dtype == paddle.float32
    assert scaler.scale(paddle.to_tensor(0.5)).item() == 2048
