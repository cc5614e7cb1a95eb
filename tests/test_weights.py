"""A checkpoint's weights and optimizer states in other precisions, without half-precision kernels."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from glm.weights import loading as weights
from glm.weights import optimizer_state as optimizer
from glm.weights.shapes import get_split, shard, unshard


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

    config = SimpleNamespace(tensor_parallel_degree=-1, tensor_parallel_rank=-1)

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
    casts = weights.fill(model, [{**SAVED[saved], "other": np.zeros(1)}], 1)
    assert casts == (set() if saved == wanted else {(saved, wanted)})
    for name, exact in EXACT.items():
        value = model.state_dict()[name]
        value_saved = SAVED[saved][name]
        if saved == "bfloat16":
            value_saved = (value_saved.astype("uint32") << 16).view("float32")
            np.testing.assert_allclose(value_saved, exact, rtol=2**-8)
        rounded = paddle.to_tensor(value_saved.astype("float32")).astype(wanted).astype("float32")
        np.testing.assert_array_equal(value.astype("float32").numpy(), rounded.numpy())


def moments(masters):
    end = "_fp32_master_0" if masters else ""
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    names = [f"{name}{end}_{kind}_0" for name in ("linear_0.w_0", "linear_0.b_0") for kind in kinds]
    state = {
        name: np.full([2 if "moment" in name else 1], number / 8, "float32")
        for number, name in enumerate(names)
    }
    state["LR_Scheduler"] = {"last_epoch": 3}
    if masters:
        keys = {"linear_0.w_0": "dense.weight", "linear_0.b_0": "dense.bias"}
        state["master_weights"] = {name: EXACT[key] for name, key in keys.items()}
    return state


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_optimizer_states_with_and_without_master_weights(tmp_path, had, wanted, dtype):
    model = Model(dtype if wanted else "float32")
    paddle.save(moments(had), str(tmp_path / "optimizer.pdopt"))
    if wanted and not had:  # else the checkpoint's weights are not needed
        paddle.save(EXACT, str(tmp_path / "model_state.pdparams"))
    adamw = SimpleNamespace(_parameter_list=[model.a, model.b])
    names = {"linear_0.w_0": "dense.weight", "linear_0.b_0": "dense.bias"}
    state = optimizer.read_optimizer_state(tmp_path, adamw, model, names, wanted)
    expected = moments(wanted)
    # The schedule's state has a file of its own.
    assert set(state) == set(expected) - {"LR_Scheduler"}
    for name, value in expected.items():
        if "moment" in name or "pow" in name:
            assert state[name].tolist() == value.tolist()
    for name, master in expected.get("master_weights", {}).items():
        assert state["master_weights"][name].tolist() == master.tolist()
        assert state["master_weights"][name].dtype == paddle.float32
    if had:  # the weights are the master weights in their own type
        for name, weight in model.state_dict().items():
            exact = paddle.to_tensor(EXACT[name]).astype(weight.dtype).astype("float32")
            np.testing.assert_array_equal(weight.astype("float32").numpy(), exact.numpy())


W = "linear_0.w_0"
HOSTILE = [
    ({f"{W}_moment1_0": np.zeros(3, "float32")}, r"moment1_0 has the shape \[3\]"),
    ({f"{W}_moment1_0": np.zeros((), "float32")}, r"moment1_0 has the shape \[\]"),
    ({f"{W}_moment2_0": np.zeros(2, "int64")}, "moment2_0 is no array of numbers"),
    ({f"{W}_moment2_0": "x"}, "moment2_0 is no array of numbers"),
    ({f"{W}_moment2_0": None}, "moment2_0 is no array of numbers"),
    *(
        ({f"{W}_{name}_0": np.full(1 if "pow" in name else 2, value, dtype)}, f"{name}_0 has values that no")
        for name, value, dtype in [
            *(("moment1", value, "float32") for value in (np.nan, np.inf, -np.inf)),
            *(("moment2", value, "float32") for value in (np.nan, np.inf)),
            *(("moment1", np.nan, "float16"), ("moment1", 1e300, "float64"), ("moment2", 0x7F80, "uint16")),
            *(("beta1_pow_acc", value, "float32") for value in (np.nan, -1, 1, 2)),
            *(("beta2_pow_acc", value, "float64") for value in (1 - 1e-12, np.inf)),
        ]
    ),
    ({f"{W}_beta2_pow_acc_0": np.ones(2, "float32")}, r"beta2_pow_acc_0 has the shape \[2\]"),
    ({f"{W}_beta2_pow_acc_0": np.ones((), "float32")}, r"beta2_pow_acc_0 has the shape \[\]"),
    ({"x_moment1_0": np.zeros(2, "float32")}, "has x_moment1_0, which is of no weight here"),
    ({"master_weights": 5}, "its master_weights are no arrays by name"),
    ({"master_weights": {"x": np.zeros(2, "float32")}}, "has x, which is of no weight here"),
    ({"master_weights": {W: np.zeros(3, "float32")}}, r"linear_0.w_0 has the shape \[3\]"),
    ({"master_weights": {W: 1}}, "linear_0.w_0 is no array of numbers"),
    ({"master_weights": {W: np.array([np.inf, 1], "float32")}}, "linear_0.w_0 has values that no"),
    *(
        (kinds, f"has no {kind}_0 of dense.weight, which this run trains")
        for kinds, kind in [
            *((f"{W}_{kind}_0", kind) for kind in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")),
            (W, "beta1_pow_acc"),
        ]
    ),
    ("moment2", "has no moment2_0 of dense.bias"),
    ("", "has no beta1_pow_acc_0 of dense.bias"),
]


@pytest.mark.parametrize("changes, message", HOSTILE)
def test_hostile_optimizer_states(tmp_path, changes, message):
    """``changes`` of a right state, or what is in the names of those that it lacks."""
    model, state = Model("float32"), moments(False)
    if isinstance(changes, dict):
        state.update(changes)
    else:
        state = {name: value for name, value in state.items() if changes not in name}
    paddle.save(state, str(tmp_path / "optimizer.pdopt"))
    adamw = SimpleNamespace(_parameter_list=[model.a, model.b])
    names = {W: "dense.weight", "linear_0.b_0": "dense.bias"}
    with pytest.raises(ValueError, match=message):
        optimizer.read_optimizer_state(tmp_path, adamw, model, names, False)


def test_a_master_weight_is_missing(tmp_path):
    model, state = Model("float16"), moments(True)
    del state["master_weights"][W]
    paddle.save(state, str(tmp_path / "optimizer.pdopt"))
    adamw = SimpleNamespace(_parameter_list=[model.a, model.b])
    names = {W: "dense.weight", "linear_0.b_0": "dense.bias"}
    with pytest.raises(ValueError, match="has no master weight of dense.weight, which this run trains"):
        optimizer.read_optimizer_state(tmp_path, adamw, model, names, True)


COPIES = ["{}_old.{}", "{} (copy).{}", "{}.old.{}", "{}.tp00_old.{}", "{}.tp0.{}", "{}.shard00 (1).{}"]


@pytest.mark.parametrize("ranks", [("",), (".tp00", ".tp01"), (".shard00", ".shard01")])
def test_copies_beside_a_checkpoints_files_are_not_read(tmp_path, ranks):
    """Only what PaddleNLP calls so is; where that is of one process and of several, nothing is."""
    model = Model("float32")  # of one process
    for kind, ending in (("model_state", "pdparams"), ("optimizer", "pdopt")):
        for number, rank in enumerate(ranks):
            paddle.save({"w": paddle.full([1], number)}, str(tmp_path / f"{kind}{rank}.{ending}"))
        for name in COPIES:
            paddle.save({"w": paddle.full([1], 9)}, str(tmp_path / name.format(kind, ending)))
        parts, degree = weights.read_parts(tmp_path, kind, f".{ending}", model)
        found = [part["w"].tolist() for part in parts]
        assert (found, degree) == (([[0], [1]], 2) if ranks[0] == ".tp00" else ([[len(ranks) - 1]], 1))
        other = f"{kind}.tp00.{ending}" if degree == 1 else f"{kind}.{ending}"
        paddle.save({"w": paddle.zeros([1])}, str(tmp_path / other))
        with pytest.raises(ValueError, match="are not those of all processes"):
            weights.read_parts(tmp_path, kind, f".{ending}", model)


def test_a_process_gets_the_state_of_the_weights_that_it_updates(tmp_path):
    """With sharding: of one of two files, by the names of this run."""
    model = Model("float16")
    state = moments(True)
    masters = state.pop("master_weights")
    for number, name in enumerate(masters):
        part = {key: value for key, value in state.items() if key.startswith((name, "LR"))}
        part["master_weights"] = {name: masters[name]}
        paddle.save(part, str(tmp_path / f"optimizer.shard{number:02d}.pdopt"))
    adamw = SimpleNamespace(_inner_opt=SimpleNamespace(_parameter_list=[model.b]))
    names = {"linear_0.w_0": "dense.weight", "linear_0.b_0": "dense.bias"}
    found = optimizer.read_optimizer_state(tmp_path, adamw, model, names, True)
    assert set(found["master_weights"]) == {"linear_0.b_0"}
    kinds = {name.removeprefix("linear_0.b_0_fp32_master_0_") for name in found if name[0] == "l"}
    assert kinds == {"moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"}
    assert model.a.astype("float32").numpy() == pytest.approx(EXACT["dense.weight"], rel=1e-3)


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize(
    "linear, outputs_split",
    [("query_key_value", True), ("dense", False), ("dense_h_to_4h", True), ("dense_4h_to_h", False)],
)
def test_an_adapter_is_split_as_the_weight_beside_it(linear, outputs_split, degree):
    """The product of a process's matrices is its part of the complete product."""
    heads, rng = 4, np.random.default_rng(0)
    a, b = rng.normal(size=[16, 3]), rng.normal(size=[3, 24 if linear == "query_key_value" else 16])

    def part(name, array, rank):
        split = get_split(f"layer.{name}")
        return shard(array, degree, rank, *split, heads) if split else array

    assert (get_split(f"layer.{linear}.lora_A") is None) == outputs_split
    assert (get_split(f"layer.{linear}.lora_B") is None) != outputs_split
    parts = []
    for rank in range(degree):
        parts.append(part(f"{linear}.weight", a @ b, rank))
        own = part(f"{linear}.lora_A", a, rank) @ part(f"{linear}.lora_B", b, rank)
        np.testing.assert_allclose(own, parts[-1])
    np.testing.assert_array_equal(unshard(parts, *get_split(f"layer.{linear}.weight"), heads), a @ b)
