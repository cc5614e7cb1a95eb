"""Loss, gradients and schedule against float64 numpy and hand computation."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import FakeTokenizer, generation_arguments, log_softmax, random_glm

from data import DataCollator, build_features
from glm.arguments import GLMTrainingArguments
from glm.modeling import LabelSmoothedLoss
from utils import GLMTrainer


def reference_loss(hidden_states, weight, labels, label_smoothing):
    """Losses [N] and their sum's gradients, written out in float64 from DESIGN's formula."""
    log_p = log_softmax(hidden_states @ weight.T)
    vocab_size = log_p.shape[-1]
    target = np.full(log_p.shape, label_smoothing / vocab_size)
    target[np.arange(len(labels)), labels] += 1 - label_smoothing
    grad_logits = np.exp(log_p) - target
    return -(target * log_p).sum(-1), grad_logits @ weight, grad_logits.T @ hidden_states


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.1, 30.0])  # the second makes probabilities underflow in float32
def test_loss_and_gradients(label_smoothing, spread):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=[7, 16]).astype("float32") * spread
    weight, labels = rng.normal(size=[53, 16]).astype("float32"), rng.integers(0, 53, [7])
    h, w = paddle.to_tensor(hidden, stop_gradient=False), paddle.to_tensor(weight, stop_gradient=False)
    losses = LabelSmoothedLoss.apply(h, w, paddle.to_tensor(labels), label_smoothing)
    losses.sum().backward()
    expected = reference_loss(hidden.astype("float64"), weight.astype("float64"), labels, label_smoothing)
    for ours, theirs in zip((losses, h.grad, w.grad), expected):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-5 * spread)


def test_smoothing_by_hand():
    # Logits 0 and ln 3: p = 1/4, 3/4. Label 1, e = 0.2: 0.8 * ln(4/3) + 0.2 * (ln 4 + ln(4/3)) / 2
    hidden, weight = paddle.to_tensor([[1.0]]), paddle.to_tensor([[0.0], [np.log(3.0)]], dtype="float32")
    loss = LabelSmoothedLoss.apply(hidden, weight, paddle.to_tensor([1]), 0.2)
    assert float(loss) == pytest.approx(0.8 * np.log(4 / 3) + 0.1 * (np.log(4) + np.log(4 / 3)), abs=1e-6)


def make_trainer(tmp_path, model, label_smoothing=0.1, **changes):
    args = GLMTrainingArguments(output_dir=str(tmp_path), device="cpu", **changes)
    return GLMTrainer(
        model=model,
        args=args,
        generation=generation_arguments(),
        label_smoothing=label_smoothing,
        lr_decay_ratio=0.1,
    )


def make_batch():
    rng = np.random.default_rng(3)
    features = [
        build_features(
            FakeTokenizer, rng.integers(3, 24, [length]).tolist(), [*rng.integers(3, 24, [size]), 2]
        )
        for length, size in ((9, 4), (5, 7), (12, 1))
    ]
    return features, DataCollator(0)([{**feature, "index": i} for i, feature in enumerate(features)])


def test_trainer_loss_is_the_mean_over_target_tokens(tmp_path):
    """A padded batch, against each record alone and unpadded through PaddleNLP's own forward with its logits."""
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
    trainer.args = SimpleNamespace(dataset_world_size=2, gradient_accumulation_steps=3)
    assert float(trainer.compute_loss(trainer.model, inputs)) == pytest.approx(
        6 * losses.sum() / 60, rel=1e-5
    )


def test_recompute_gives_the_same_gradients(tmp_path):
    _, batch = make_batch()
    gradients = []
    for recompute in (False, True):
        model = random_glm()
        trainer = make_trainer(tmp_path, model, recompute=recompute)
        assert model.glm.transformer.enable_recompute == recompute
        model.train()
        trainer.compute_loss(model, {key: paddle.to_tensor(value) for key, value in batch.items()}).backward()
        gradients.append({name: parameter.grad.numpy() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7, err_msg=name)


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
