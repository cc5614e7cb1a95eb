"""The loss and its gradients, against float64 numpy and hand computation."""

import numpy as np
import paddle
import pytest
from helpers import make_batch, make_trainer, random_glm, reference_loss
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from glm import modeling
from glm.modeling import LabelSmoothedLoss


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_gives_the_same_gradients(tmp_path, dropout):
    _, batch = make_batch()
    gradients = []
    for recompute in (False, True):
        model = random_glm(dropout=dropout)
        trainer = make_trainer(tmp_path, model, recompute=recompute)
        assert model.glm.transformer.enable_recompute == recompute
        model.train()
        paddle.seed(3)
        tracker = get_rng_state_tracker()
        tracker.reset()  # the others' dropout is by the generator of all else
        tracker.add("local_seed", 4)
        trainer.compute_loss(model, {key: paddle.to_tensor(value) for key, value in batch.items()}).backward()
        gradients.append({name: parameter.grad.numpy() for name, parameter in model.named_parameters()})
        # The backward pass leaves the generators as they were.
        gradients[-1]["generator"] = paddle.rand([4]).numpy()
        with tracker.rng_state("local_seed"):
            gradients[-1]["local generator"] = paddle.rand([4]).numpy()
        tracker.reset()
    for name, gradient in gradients[0].items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = paddle.randn([3, 4]), paddle.randn([7, 4])
    gradients = []
    for frozen in (False, True):
        h, w = (paddle.to_tensor(tensor, stop_gradient=False) for tensor in (hidden, weight))
        w.stop_gradient = frozen
        modeling.LabelSmoothedLoss.apply(h, w, paddle.to_tensor([0, 6, 2]), 0.1).sum().backward()
        assert (w.grad is None) == frozen
        gradients.append(h.grad.numpy())
    np.testing.assert_array_equal(*gradients)
