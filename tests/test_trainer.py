"""GLMTrainer: the loss of a global batch, the schedule, the evaluation."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import log_softmax, make_batch, make_trainer, random_glm

from data import DataCollator


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


def test_evaluation_is_not_under_autocast(tmp_path, monkeypatch):
    """Autocast would cast every weight again at each token."""
    trainer = make_trainer(tmp_path, random_glm())
    monkeypatch.setattr(trainer, "autocast_smart_context_manager", lambda: 1 / 0)
    trainer.tokenizer = SimpleNamespace(sop_token_id=1, eop_token_id=2)
    trainer.outputs, trainer.generated_tokens, trainer.start = {}, 0, 0.0
    trainer.bar = SimpleNamespace(update=lambda count: None, set_postfix_str=lambda text: None)
    _, batch = make_batch()
    trainer.model.eval()
    trainer.prediction_step(trainer.model, {key: paddle.to_tensor(value) for key, value in batch.items()})
    assert sorted(trainer.outputs) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        trainer.training_step(trainer.model, {key: paddle.to_tensor(value) for key, value in batch.items()})


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
