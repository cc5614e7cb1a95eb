"""What half precision changes: types, conversions, skipped steps. Without half-precision kernels, which a CPU lacks."""

import math
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from conftest import random_glm
from test_loss import make_batch, make_trainer

from glm import arguments, weights
from glm.arguments import GLMTrainingArguments
from glm.callbacks import MOST_SKIPPED, CheckFinite, Gradients
from glm.errors import Fault


def make_arguments(monkeypatch, tmp_path, supported=True, **changes):
    monkeypatch.setattr(arguments, "supports_dtype", lambda name: supported)
    return GLMTrainingArguments(output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
    "changes, dtype",
    [
        ({"do_train": True}, "float32"),
        ({"do_train": True, "fp16": True}, "float32"),
        ({"do_train": True, "fp16": True, "do_eval": True}, "float32"),
        ({"do_train": True, "fp16": True, "fp16_opt_level": "O2"}, "float16"),
        ({"do_train": True, "bf16": True, "fp16_opt_level": "O2"}, "bfloat16"),
        ({"do_eval": True, "fp16": True}, "float16"),
        ({"do_predict": True, "bf16": True}, "bfloat16"),
        ({"do_eval": True}, "float32"),
    ],
)
def test_the_type_the_weights_are_loaded_in(monkeypatch, tmp_path, changes, dtype):
    assert make_arguments(monkeypatch, tmp_path, **changes).weights_dtype() == dtype
    # The same on a device that does not compute in it.
    args = make_arguments(monkeypatch, tmp_path, supported=False, **changes)
    assert args.weights_dtype() == "float32" and not args.fp16 and not args.bf16 and not args.amp_master_grad


def test_master_gradients_are_what_o2_does(monkeypatch, tmp_path):
    o2 = {"fp16": True, "fp16_opt_level": "O2"}
    assert make_arguments(monkeypatch, tmp_path, **o2).amp_master_grad is True
    assert make_arguments(monkeypatch, tmp_path, **o2, amp_master_grad=False).amp_master_grad is False
    assert make_arguments(monkeypatch, tmp_path, fp16=True).amp_master_grad is False
    assert make_arguments(monkeypatch, tmp_path, fp16_opt_level="O2").amp_master_grad is False


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


# ------------------------------------------------------------------------------------------------- skipped steps


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


def test_paddlenlp_removes_no_checkpoint(tmp_path):
    """It would before the new one is whole; WholeCheckpoints does afterwards."""
    trainer = make_trainer(tmp_path, random_glm(), save_total_limit=2)
    assert trainer.args.save_total_limit is None and trainer.checkpoints.limit == 2


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


# --------------------------------------------------------------------------------------- another precision on resuming


def bfloat16_bits(values):
    """The upper halves of the float32 values, rounded to nearest even, as a checkpoint holds bfloat16."""
    bits = np.asarray(values, dtype="float32").view("uint32")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")


class Model:
    """Two weights in any type, by their names in the model and in the optimizer."""

    def __init__(self, dtype):
        self.a, self.b = (paddle.zeros([2], dtype=dtype) for _ in range(2))
        self.a.stop_gradient = self.b.stop_gradient = False
        self.a.name, self.b.name = "linear_0.w_0", "linear_0.b_0"

    def state_dict(self):
        return {"dense.weight": self.a, "dense.bias": self.b}


EXACT = {"dense.weight": np.array([0.1, -3.3], "float32"), "dense.bias": np.array([1e-3, 7.7], "float32")}
SAVED = {
    "float32": EXACT,
    "float16": {name: value.astype("float16") for name, value in EXACT.items()},
    "bfloat16": {name: bfloat16_bits(value) for name, value in EXACT.items()},
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("wanted", SAVED)
def test_weights_of_every_type_in_every_other(saved, wanted):
    model = Model(wanted)
    result = weights.cast_weights({**SAVED[saved], "other": np.zeros(1)}, model)
    assert set(result) == {*EXACT, "other"}
    for name, exact in EXACT.items():
        value = result[name]
        if isinstance(value, np.ndarray):  # as it was: set_state_dict takes it
            assert saved == wanted and value is SAVED[saved][name]
            continue
        assert str(value.dtype) == f"paddle.{wanted}"
        value_saved = SAVED[saved][name]
        if saved == "bfloat16":
            value_saved = (value_saved.astype("uint32") << 16).view("float32")
            np.testing.assert_allclose(value_saved, exact, rtol=2**-8)
        rounded = paddle.to_tensor(value_saved.astype("float32")).astype(wanted).astype("float32")
        np.testing.assert_array_equal(value.astype("float32").numpy(), rounded.numpy())


def moments(masters):
    end = "_fp32_master_0" if masters else ""
    names = [f"{name}{end}_{kind}_0" for name in ("linear_0.w_0", "linear_0.b_0")
             for kind in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")]  # fmt: skip
    state = {name: np.full([2], number, "float32") for number, name in enumerate(names)}
    state["LR_Scheduler"] = {"last_epoch": 3}
    if masters:
        keys = {"linear_0.w_0": "dense.weight", "linear_0.b_0": "dense.bias"}
        state["master_weights"] = {name: EXACT[key] for name, key in keys.items()}
    return state


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_optimizer_states_with_and_without_master_weights(had, wanted, dtype):
    model = Model(dtype if wanted else "float32")
    read = []
    names = {"linear_0.w_0": "dense.weight", "linear_0.b_0": "dense.bias"}
    state = weights.convert_optimizer_state(
        [moments(had)],
        names,
        model,
        lambda name, parts: parts[0],
        wanted,
        lambda: read.append(1) or EXACT,
        set(names),
    )
    expected = moments(wanted)
    assert set(state) == set(expected) and state["LR_Scheduler"] == {"last_epoch": 3}
    for name, value in expected.items():
        if "moment" in name or "pow" in name:
            assert state[name].tolist() == value.tolist()
    for name, master in expected.get("master_weights", {}).items():
        assert state["master_weights"][name].tolist() == master.tolist()
        assert state["master_weights"][name].dtype == paddle.float32
    assert len(read) == (wanted and not had)
    if had:  # the weights are the master weights in their own type
        for name, weight in model.state_dict().items():
            exact = paddle.to_tensor(EXACT[name]).astype(weight.dtype).astype("float32")
            np.testing.assert_array_equal(weight.astype("float32").numpy(), exact.numpy())
