"""Linears in training: the type of their products, and what their gradients come to; against float64."""

import numpy as np
import paddle
import pytest
from helpers import lora_config, random_glm

from glm.linears import compute_with_gradient
from glm.weights.adapters import LoRA


def make_linear(adapter):
    """Return a linear of 32 inputs, frozen beside an adapter if it has one."""
    model, rng = random_glm(num_layers=1), np.random.default_rng(0)
    if adapter:
        model = LoRA(model, lora_config()).model
    layer = model.glm.transformer.layers[0].attention.dense
    for name, weight in layer.named_parameters():
        weight.set_value(rng.normal(size=weight.shape).astype("float32"))
        weight.stop_gradient = adapter and "lora" not in name
    return layer


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_products_of_another_type(adapter, copies):
    """Weights are cast, or have copies, to which their gradients come. float64 stands for a half type."""
    layer, rng = make_linear(adapter), np.random.default_rng(1)
    trained = [weight for weight in layer.parameters() if not weight.stop_gradient]
    leaves = trained
    if copies:
        leaves = [
            paddle.to_tensor(weight.numpy() * 2.0, "float64", stop_gradient=False) for weight in trained
        ]
        for weight, leaf in zip(trained, leaves):
            weight.half_copy = leaf
    values = {name: getattr(weight, "half_copy", weight).numpy() for name, weight in layer.named_parameters()}
    weight, bias = values["weight"].astype("float64"), values["bias"]
    x, grad = rng.normal(size=[2, 5, 32]).astype("float32"), rng.normal(size=[2, 5, 32])
    inputs = paddle.to_tensor(x, stop_gradient=False)
    outputs = compute_with_gradient(layer, inputs, paddle.float64)
    assert outputs.dtype == paddle.float64
    (outputs * paddle.to_tensor(grad)).sum().backward()
    rows, grads = x.reshape(-1, 32).astype("float64"), grad.reshape(-1, 32)
    expected = {"weight": rows.T @ grads, "bias": grads.sum(0)}
    if adapter:
        a, b = (values[f"lora_{matrix}"].astype("float64") for matrix in "AB")
        weight = weight + layer.scaling * a @ b
        expected = {
            "lora_A": layer.scaling * rows.T @ grads @ b.T,
            "lora_B": layer.scaling * (rows @ a).T @ grads,
        }
    np.testing.assert_allclose(outputs.numpy(), x @ weight + bias, rtol=1e-12)
    np.testing.assert_allclose(inputs.grad.numpy(), grad @ weight.T, rtol=1e-5)
    names = [name for name, weight in layer.named_parameters() if not weight.stop_gradient]
    assert sorted(names) == sorted(expected)
    for name, parameter, leaf in zip(names, trained, leaves):
        assert leaf.grad.dtype == leaf.dtype and (leaf is parameter or parameter.grad is None)
        np.testing.assert_allclose(leaf.grad.numpy(), expected[name], rtol=1e-5, atol=1e-5)
