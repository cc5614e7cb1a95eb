"""FlatAdamW: what it computes, and the state that it shares with AdamW."""

import numpy as np
import paddle
import pytest

from glm.training.flat_optimizer import ALIGNMENT, FlatAdamW

RATE, BETA1, BETA2, EPSILON, DECAY = 0.1, 0.9, 0.999, 1e-8, 0.3


def make_model(seed=0):
    """Return linears, one of whose weights does not fill its place, and a frozen one between them."""
    rng = np.random.default_rng(seed)
    model = paddle.nn.Sequential(
        paddle.nn.Linear(16, 24), paddle.nn.Linear(24, 24), paddle.nn.Linear(24, 8), paddle.nn.LayerNorm(8)
    )
    for weight in model.parameters():
        weight.set_value(rng.normal(size=weight.shape).astype("float32"))
    for weight in model[1].parameters():
        weight.stop_gradient = True
    return model


def make_optimizer(model, clip=None):
    decayed = [weight.name for name, weight in model.named_parameters() if "bias" not in name]
    schedule = paddle.optimizer.lr.LambdaDecay(RATE, lambda step: 1 / (1 + step))
    return paddle.optimizer.AdamW(
        schedule,
        BETA1,
        BETA2,
        EPSILON,
        parameters=model.parameters(),
        weight_decay=DECAY,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=clip and paddle.nn.ClipGradByGlobalNorm(clip),
    )


def backward(model, step):
    """Accumulate the gradients of two passes."""
    for part in range(2):
        rng = np.random.default_rng([step, part])
        inputs = paddle.to_tensor(rng.normal(size=[4, 16]).astype("float32"))
        (model(inputs) ** 2).sum().backward()


def train(model, optimizer, steps):
    """Return the gradients of each step by the weights' names in the model."""
    history = []
    for step in steps:
        backward(model, step)
        history.append({name: w.grad.numpy() for name, w in model.named_parameters() if w.grad is not None})
        if isinstance(optimizer, FlatAdamW):
            optimizer.gather_gradients(master=True)
        optimizer.step()
        optimizer._learning_rate.step()
        optimizer.clear_grad(set_to_zero=False)
        assert all(weight.grad is None for weight in model.parameters())
    return history


def values(model):
    return {name: weight.numpy() for name, weight in model.named_parameters()}


def state_by_model_name(model, optimizer):
    names = {weight.name: name for name, weight in model.named_parameters()}
    state = {}
    for key, value in optimizer.state_dict().items():
        if key != "LR_Scheduler":
            name = next(name for name in names if key.startswith(name + "_"))
            state[names[name], key[len(name) :]] = value.numpy()
    return state


def test_as_adamw():
    plain, flat = make_model(), make_model()
    ours = FlatAdamW(make_optimizer(flat), flat)
    theirs = make_optimizer(plain)
    assert len(ours._parameter_list) == 2
    train(plain, theirs, range(4))
    train(flat, ours, range(4))
    for name, value in values(plain).items():
        np.testing.assert_array_equal(values(flat)[name], value, err_msg=name)
    expected, state = state_by_model_name(plain, theirs), state_by_model_name(flat, ours)
    assert state.keys() == expected.keys() and len(state) == 4 * 6
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value, err_msg=str(key))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_as_the_paper(clip):
    """Loshchilov and Hutter's algorithm 2, in float64."""
    model = make_model()
    before = values(model)
    frozen = set(before) - {name for name, weight in model.named_parameters() if not weight.stop_gradient}
    history = train(model, FlatAdamW(make_optimizer(model, clip), model), range(3))
    after = values(model)
    factors = []
    for gradients in history:
        norm = np.sqrt(sum((gradient.astype("float64") ** 2).sum() for gradient in gradients.values()))
        factors.append(min(1, clip / norm) if clip else 1)
    for name, weight in before.items():
        if name in frozen:
            np.testing.assert_array_equal(after[name], weight)
            continue
        weight, first, second = weight.astype("float64"), 0.0, 0.0
        for step, (gradients, factor) in enumerate(zip(history, factors)):
            gradient, rate = gradients[name] * factor, RATE / (1 + step)
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient**2
            unbiased = first / (1 - BETA1 ** (step + 1)), second / (1 - BETA2 ** (step + 1))
            decay = 0 if "bias" in name else DECAY
            weight = weight - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + EPSILON) + decay * weight)
        np.testing.assert_allclose(after[name], weight, rtol=2e-5, atol=2e-6, err_msg=name)


def test_a_weights_own_rate_is_kept():
    """As LoRA+ has one: PaddleNLP's adapters take it from a file."""
    plain, flat = make_model(), make_model()
    for model in (plain, flat):
        model[2].weight.optimize_attr["learning_rate"] = 4.0
    theirs, ours = make_optimizer(plain), FlatAdamW(make_optimizer(flat), flat)
    assert len(ours._parameter_list) == 3
    train(plain, theirs, range(3))
    train(flat, ours, range(3))
    for name, value in values(plain).items():
        np.testing.assert_array_equal(values(flat)[name], value, err_msg=name)


@pytest.mark.parametrize("flat_first", [True, False])
def test_state_goes_from_one_to_the_other(flat_first):
    reference, model = make_model(), make_model()
    train(reference, make_optimizer(reference), range(4))
    first, second = make_optimizer(model), make_optimizer(model)
    if flat_first:
        first = FlatAdamW(first, model)
    train(model, first, range(2))
    state = first.state_dict()
    state = {key: value if key == "LR_Scheduler" else value.numpy() for key, value in state.items()}
    if not flat_first:
        second = FlatAdamW(second, model)
    second.set_state_dict(state)
    train(model, second, range(2, 4))
    for name, value in values(reference).items():
        np.testing.assert_array_equal(values(model)[name], value, err_msg=name)


def test_weights_are_views():
    model = make_model()
    optimizer = FlatAdamW(make_optimizer(model), model)
    starts = {weight.data_ptr() for group in optimizer.groups for weight in group.weights}
    assert len(starts) == 6
    for group in optimizer.groups:
        offsets = {weight.data_ptr() - group.flat.data_ptr() for weight in group.weights}
        assert {offset % (4 * ALIGNMENT) for offset in offsets} == {0}
    weight = model[0].weight
    weight.set_value(np.full(weight.shape, 7, "float32"))  # as a checkpoint's is loaded
    assert optimizer.groups[0].flat.numpy()[: weight.size].min() == 7
    # As Layer.to does, and fleet's wrappers.
    other = paddle.full(weight.shape, 5.0)
    weight.get_tensor()._share_data_with(other.get_tensor())
    optimizer.adopt_weights()
    assert optimizer.groups[0].flat.numpy()[: weight.size].min() == 5
    assert weight.data_ptr() in starts


def test_a_weight_without_gradient_is_an_error():
    model = make_model()
    optimizer = FlatAdamW(make_optimizer(model), model)
    backward(model, 0)
    model[0].bias.clear_gradient(False)
    with pytest.raises(AttributeError):
        optimizer.gather_gradients(master=True)


def test_copies_give_the_gradients():
    """Copies of their weights' own type, for a CPU has no AdamW of another."""
    plain, model = make_model(), make_model()
    theirs, ours = make_optimizer(plain), FlatAdamW(make_optimizer(model), model, "float32")
    assert len(ours._parameter_list) == 4
    train(plain, theirs, range(3))
    for step in range(3):
        ours.copy_weights()
        for part in range(2):
            hidden = paddle.to_tensor(
                np.random.default_rng([step, part]).normal(size=[4, 16]).astype("float32")
            )
            for layer in list(model)[:3]:
                pair = (getattr(weight, "half_copy", weight) for weight in (layer.weight, layer.bias))
                hidden = paddle.nn.functional.linear(hidden, *pair)
            (model[3](hidden) ** 2).sum().backward()
            if part == 0:
                ours.accumulate_gradients()
                assert model[0].weight.half_copy.grad is None
        assert model[0].weight.grad is None
        ours.gather_gradients(master=True)
        ours.step()
        ours._learning_rate.step()
        ours.clear_grad(set_to_zero=False)
    for name, value in values(plain).items():
        np.testing.assert_array_equal(values(model)[name], value, err_msg=name)


def test_weights_that_processes_split_are_apart():
    """For the clipping adds up their norms over the processes, and counts those of the others once."""
    model = make_model()
    model[0].weight.is_distributed = True
    optimizer = FlatAdamW(make_optimizer(model), model)
    kinds = {weight.name: group.flat.is_distributed for group in optimizer.groups for weight in group.weights}
    assert [name for name, split in kinds.items() if split] == [model[0].weight.name]


def test_master_weights_are_restored():
    """Those of half-precision weights, which are rounded: a CPU has no update of such."""
    model, rng = make_model().to(dtype="bfloat16"), np.random.default_rng(5)
    given = make_optimizer(model)
    given._multi_precision = True
    optimizer = FlatAdamW(given, model)
    state = {"LR_Scheduler": optimizer._learning_rate.state_dict(), "master_weights": {}}
    for weight in optimizer.weights:
        for kind in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"):
            shape = weight.shape if "moment" in kind else [1]
            state[f"{weight.name}_fp32_master_0_{kind}_0"] = rng.normal(size=shape).astype("float32")
        state["master_weights"][weight.name] = rng.normal(size=weight.shape).astype("float32")
    optimizer.set_state_dict(state)
    found = optimizer.state_dict()
    assert len(found["master_weights"]) == 6
    for name, value in state["master_weights"].items():
        np.testing.assert_array_equal(found["master_weights"][name].numpy(), value)
    for name in set(state) - {"master_weights", "LR_Scheduler"}:
        if "moment" in name:
            np.testing.assert_array_equal(found[name].numpy(), state[name])
