"""Linears in int8: their errors, products and gradients, and runs beside those on the weights themselves."""

import json
import shutil

import numpy as np
import paddle
import pytest
from helpers import (
    FAST,
    TINY_GLM,
    add_lora,
    flags,
    losses,
    pipe,
    pretrained_in,
    random_glm,
    read_jsonl,
    run,
    small_data,
)
from paddlenlp.transformers import GLMConfig

from glm import linears, quantization
from glm.training import memory
from glm.weights import loading
from glm.weights.shapes import get_split, shard, unshard

INT8 = ["--weight_quantize_algo", "weight_only_int8"]
NAMES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def saved(values, dtype):
    """Values as a file has them, and what they are in float64."""
    if dtype == "bfloat16":
        bits = (values.astype("float32").view("uint32") >> 16).astype("uint16")
        return bits, (bits.astype("uint32") << 16).view("float32").astype("float64")
    array = values.astype(dtype)
    return array, array.astype("float64")


def random_weight(inputs, outputs, seed=0):
    """Outputs of unlike sizes, one of zeros, with outliers."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=[inputs, outputs]) * rng.uniform(1e-3, 0.2, outputs)
    weight[rng.integers(0, inputs, outputs), np.arange(outputs)] *= 9
    weight[:, 3] = 0
    return weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_no_weight_is_off_by_more_than_half_a_scale(dtype):
    array, exact = saved(random_weight(300, 40), dtype)
    name = "glm.transformer.layers.0.attention.query_key_value.weight"
    scale = loading._output_scale(name, array, [])
    np.testing.assert_allclose(scale, abs(exact).max(axis=0) / 127, rtol=1e-6)
    quantized = loading._quantize(array, scale)
    assert quantized.dtype == np.int8 and scale.dtype == np.float32
    error = abs(exact - quantized * scale.astype("float64"))
    assert (error <= 0.5001 * scale).all() and error.max() > 0.4 * scale.max()
    assert (abs(quantized.astype("int32")).max(axis=0) == np.where(scale, 127, 0)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("files", [1, 2])
def test_parts_of_processes_are_those_of_the_complete_weight(name, files):
    """Whether the file is of one process or of two, and whichever axis is split."""
    weight, heads = random_weight(48, 24).astype("float16"), 4
    linear = f"glm.transformer.layers.0.attention.{name}.weight"
    layout = (*get_split(linear), heads)
    scale = loading._output_scale(linear, weight, [{linear: weight}])
    quantized = loading._quantize(weight, scale)
    parts = [{linear: shard(weight, files, rank, *layout) if files > 1 else weight} for rank in range(files)]
    made, scales = [], []
    for rank in range(2):
        config = GLMConfig(num_attention_heads=heads, tensor_parallel_degree=2, tensor_parallel_rank=rank)
        convert = loading.convert_layout(config, files)
        part = convert(linear, [part[linear] for part in (parts[rank:] if files == 2 else parts)])
        scales.append(loading._output_scale(linear, part, parts))
        made.append(loading._quantize(part, scales[-1]))
    np.testing.assert_array_equal(unshard(made, *layout), quantized)
    if layout[0] == 0:
        np.testing.assert_array_equal(scales, [scale, scale])
    else:
        np.testing.assert_array_equal(unshard(scales, *layout), scale)


def quantized_linear(adapter):
    """Return a frozen linear in int8, and the weight in float64 that it stands for."""
    model = random_glm(num_layers=1)
    layer = model.glm.transformer.layers[0].mlp.dense_h_to_4h
    array = layer.weight.numpy()
    scale = abs(array).max(axis=0) / np.float32(127)
    quantization.set_quantized(layer, loading._quantize(array, scale), scale)
    if adapter:
        layer = add_lora(model).model.glm.transformer.layers[0].mlp.dense_h_to_4h
        layer.lora_B.set_value(np.random.default_rng(5).normal(size=layer.lora_B.shape).astype("float32"))
    else:
        layer.bias.stop_gradient = True
    return layer, layer.weight.numpy() * scale.astype("float64")


@pytest.mark.parametrize("adapter", [False, True])
def test_product_and_gradient_against_float64(adapter):
    layer, weight = quantized_linear(adapter)
    rng = np.random.default_rng(1)
    x, grad = rng.normal(size=[2, 7, 32]), rng.normal(size=[2, 7, 128])
    inputs = paddle.to_tensor(x.astype("float32"), stop_gradient=False)
    outputs = linears.compute_with_gradient(layer, inputs)
    (outputs * paddle.to_tensor(grad.astype("float32"))).sum().backward()
    expected, expected_grad = x @ weight + layer.bias.numpy(), grad @ weight.T
    np.testing.assert_allclose(
        quantization.linear(inputs.detach(), layer.weight, layer.bias).numpy(), expected, atol=1e-5
    )
    if adapter:
        a, b = (matrix.numpy().astype("float64") for matrix in (layer.lora_A, layer.lora_B))
        expected, expected_grad = expected + 3 * x @ a @ b, expected_grad + 3 * grad @ b.T @ a.T
        rows, grads = x.reshape(-1, 32), grad.reshape(-1, 128)
        np.testing.assert_allclose(
            layer.lora_A.grad.numpy(), 3 * rows.T @ (grads @ b.T), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(layer.lora_B.grad.numpy(), 3 * (rows @ a).T @ grads, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs.numpy(), expected, atol=5e-5)
    np.testing.assert_allclose(inputs.grad.numpy(), expected_grad, atol=5e-5)
    assert layer.weight.grad is None and layer.weight.dtype == paddle.int8


def test_small_gradients_keep_their_bits():
    """Down to the smallest that has full precision, which those of float16 are near to."""
    layer, rng = paddle.nn.Linear(2, 1), np.random.default_rng(0)
    layer.bias.stop_gradient = True
    quantization.set_quantized(layer, np.array([[127], [-127]], "int8"), np.array([1 / 127], "float32"))
    inputs, grad = paddle.ones([64, 2]), rng.uniform(1, 2, [64, 1]).astype("float32") * 2.0**-126
    inputs.stop_gradient = False
    linears.compute_with_gradient(layer, inputs).backward(paddle.to_tensor(grad.astype("float32")))
    np.testing.assert_allclose(inputs.grad.numpy() / 2.0**-126, grad * [1, -1] / 2.0**-126, rtol=1e-6)


def test_no_cast_weight_is_kept_for_the_backward_pass():
    layer = paddle.nn.Linear(1024, 1024)
    layer.bias.stop_gradient = True
    scale = np.ones(1024, "float32")
    quantization.set_quantized(layer, np.ones([1024, 1024], "int8"), scale)
    inputs = paddle.ones([1, 1024])
    inputs.stop_gradient = False
    allocated = lambda: paddle.base.core.host_memory_stat_current_value("Allocated", 0)  # noqa: E731
    before = allocated()
    outputs = linears.compute_with_gradient(layer, inputs)
    assert allocated() - before < 1e5  # in float32 the weight has 4e6 bytes
    outputs.sum().backward()
    assert inputs.grad.numpy()[0, 0] == 1024


TRAIN = [
    *FAST,
    "--do_train",
    "--do_eval",
    *flags(lora=True, lora_rank=4, max_steps=6, save_steps=3, logging_steps=1, learning_rate=2e-3),
    *("--model_name_or_path", TINY_GLM),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of an adapter trained beside int8 weights, out, and beside float32 ones, plain."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "data").mkdir()
    data = small_data(folder / "data")
    run(*TRAIN, *INT8, "--task_name", data, "--output_dir", folder / "out")
    run(*TRAIN, "--task_name", data, "--output_dir", folder / "plain")
    return folder


def rows(path):
    return [(row["token_ids"], row["score"]) for row in read_jsonl(path)]


def test_losses_are_those_of_the_weights_themselves(trained):
    ours, plain = losses(trained / "out"), losses(trained / "plain")
    assert list(ours) == list(plain) == [1, 2, 3, 4, 5, 6] and ours != plain
    np.testing.assert_allclose(list(ours.values()), list(plain.values()), rtol=0.01)


def test_resuming(trained, tmp_path):
    """The same steps 4 to 6 from a checkpoint, which holds no int8."""
    (tmp_path / "out").mkdir()
    shutil.copytree(trained / "out/checkpoint-3", tmp_path / "out/checkpoint-3")
    run(*TRAIN, *INT8, "--task_name", trained / "data", "--output_dir", tmp_path / "out")
    resumed, unbroken = losses(tmp_path / "out"), losses(trained / "out")
    assert {step: resumed[step] for step in (4, 5, 6)} == {step: unbroken[step] for step in (4, 5, 6)}
    assert {path.name for path in (trained / "out/checkpoint-3").iterdir()} == {
        path.name for path in (trained / "plain/checkpoint-3").iterdir()
    }


def test_evaluated_and_predicted_from_its_folder(trained, tmp_path):
    """With the flag: what training's own evaluation gave."""
    common = [*FAST, *INT8, "--model_name_or_path", trained / "out"]
    dev = trained / "data/dev.json"
    run(
        *common, "--task_name", trained / "data", "--do_eval", "--predict_file", dev, "--output_dir", tmp_path
    )
    expected = rows(trained / "out/eval_predictions.jsonl")
    assert rows(tmp_path / "eval_predictions.jsonl") == expected
    assert rows(tmp_path / "test_predictions.jsonl") == expected
    for row, (token_ids, score) in zip(pipe(dev, *common), expected):
        assert row["token_ids"] == token_ids and row["score"] == pytest.approx(score, abs=1e-5)


def merged(trained, tmp_path, *arguments):
    run(
        *FAST,
        *arguments,
        *("--model_name_or_path", trained / "out", "--merge_lora", "True", "--export_torch", "True"),
        *("--output_dir", tmp_path),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    weights = dict(paddle.load(str(tmp_path / "model_state.pdparams"), return_numpy=True))
    return config, weights, (tmp_path / "torch/model.safetensors").read_bytes()


def test_merging_and_exporting_take_the_weights_of_the_file(trained, tmp_path):
    """Equal to what the same adapter gives without the flag; it is a model again, with its predictions."""
    config, weights, exported = merged(trained, tmp_path / "int8", *INT8)
    expected_config, expected, expected_export = merged(trained, tmp_path / "plain")
    assert config == expected_config and exported == expected_export and weights.keys() == expected.keys()
    for name in expected:
        assert weights[name].dtype == expected[name].dtype
        np.testing.assert_allclose(weights[name], expected[name], atol=1e-6)
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    evaluate = [*FAST, "--task_name", trained / "data", "--do_eval"]
    for name in ("int8", "plain"):
        run(*evaluate, "--model_name_or_path", tmp_path / name, "--output_dir", tmp_path / f"of {name}")
    results = [rows(tmp_path / f"of {name}/eval_predictions.jsonl") for name in ("int8", "plain")]
    assert [ids for ids, _ in results[0]] == [ids for ids, _ in results[1]]


def test_a_model_without_an_adapter_is_evaluated(trained, tmp_path):
    run(
        *FAST,
        *INT8,
        *("--model_name_or_path", TINY_GLM, "--task_name", trained / "data", "--do_eval"),
        *("--output_dir", tmp_path),
    )
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_samples"] == 5 and np.isfinite(results["eval_loss"])


def test_memory_of_weights_in_int8():
    """A tiny model's, weight by weight; GLM-10B's, that a card of 16 GB has to hold."""
    pretrained = pretrained_in(TINY_GLM, lora=True, weight_quantize_algo="weight_only_int8")
    model = loading.load_model(pretrained)
    weights = [*model.state_dict().values()]
    weights += [weight.output_scale for weight in weights if weight.dtype == paddle.int8]
    size = sum(weight.size * (1 if weight.dtype == paddle.int8 else 4) for weight in weights)
    setting = memory.Setting(pretrained.config, 2, 608, 160, quantized=True)
    assert memory.evaluation_memory(setting)["weights"] == size
    assert len(weights) - len(model.state_dict()) == 4 * pretrained.config.num_layers
    config = GLMConfig(
        num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048, max_sequence_length=1024
    )
    card = {"on_cpu": False, "cuda_graphs": True, "paddle_2": False, "quantized": True, "recompute": True}
    lora = memory.new_lora_config()
    setting = memory.Setting(config, 2, 608, 160, "O2", lora_config=lora, num_beams=5, **card)
    training, evaluation = memory.training_memory(setting), memory.evaluation_memory(setting)
    assert training["total"] < 12.5e9 and evaluation["total"] + training["optimizer"] < 13e9
