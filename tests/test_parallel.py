"""Several CPU processes over gloo against one process."""

import re
import shutil

import numpy as np
import pytest
from helpers import (
    COMMON,
    TINY_GLM,
    flags,
    outcome,
    read_jsonl,
    reference_loss,
    run,
    run_parallel,
    small_data,
    tiny_glm,
)

from glm.outputs.layout import MANIFEST


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"), train=26, dev=7)


pytestmark = pytest.mark.slow
LAYOUTS = {
    "one": (1, ["--per_device_train_batch_size", 4]),
    "TP 2": (2, ["--tensor_parallel_degree", 2, "--per_device_train_batch_size", 4]),
    "TP 4": (4, ["--tensor_parallel_degree", 4, "--per_device_train_batch_size", 4]),
    "DP 2": (2, ["--per_device_train_batch_size", 2]),
    "DP 2, accumulating": (2, ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]),
    "TP 2 x DP 2": (4, ["--tensor_parallel_degree", 2, "--per_device_train_batch_size", 2]),
    "accumulating": (1, ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]),
    "sharding stage 1": (2, ["--sharding", "stage1", "--per_device_train_batch_size", 2]),
    "DP 2, no recompute": (2, ["--per_device_train_batch_size", 2, "--recompute", False]),
    "TP 2, no recompute": (
        2,
        ["--tensor_parallel_degree", 2, "--per_device_train_batch_size", 4, "--recompute", False],
    ),
}


def test_strangers_do_not_stop_a_run(data, tmp_path):
    """Those that come before the other process, say something else than the secret, or nothing."""
    args = [*COMMON, *flags(model_name_or_path=TINY_GLM, task_name=data, output_dir=tmp_path / "out")]
    lines = run_parallel(2, *args, "--do_train", "--max_steps", 1, hook=["strangers"])
    assert any("STRANGERS" in line for line in lines) and (tmp_path / "out/model_state.pdparams").exists()


def train(name, folder, *args):
    """Train on a layout, with the output in ``folder``/out. Returns what was logged."""
    processes, layout = LAYOUTS[name]
    args = [
        *COMMON,
        *flags(model_name_or_path=TINY_GLM, save_steps=3, output_dir=folder / "out"),
        *layout,
        *args,
    ]
    return "\n".join(run_parallel(processes, *args) if processes > 1 else run(*args))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function: the output folder of six steps on a layout, with a checkpoint of the third."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("layout")
            train(name, folders[name], "--task_name", data)
        return folders[name] / "out"

    return folder


@pytest.fixture(scope="module")
def single(trained):
    return outcome(trained("one"))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_any_layout_gives_what_one_process_gives(name, single, trained):
    losses, predictions, weights = outcome(trained(name))
    expected_losses, expected_predictions, expected_weights = single
    worst_loss = np.abs(np.subtract(losses, expected_losses)).max()
    assert weights.keys() == expected_weights.keys()
    worst_weight = max(np.abs(weights[key] - expected_weights[key]).max() for key in weights)
    equal = sum(ours == theirs for ours, theirs in zip(predictions, expected_predictions))
    print(f"\n| {name} | {worst_loss:.1e} | {equal} of {len(predictions)} | {worst_weight:.1e} |")
    assert len(losses) == 6 and worst_loss < 2e-4
    assert predictions == expected_predictions
    assert worst_weight < 1e-3


CHANGES = [("one", "TP 2"), ("TP 2", "one"), ("TP 4", "TP 2"), ("DP 2", "accumulating")]
CHANGES += [("sharding stage 1", "TP 2"), ("one", "sharding stage 1")]


@pytest.mark.parametrize("before, after", CHANGES)
def test_going_on_on_another_layout(before, after, data, single, trained, tmp_path):
    """From a checkpoint of the third step: as the run on one process that never stopped."""
    (tmp_path / "out").mkdir()
    shutil.copytree(trained(before) / "checkpoint-3", tmp_path / "out/checkpoint-3")
    assert f"resuming from {tmp_path}/out/checkpoint-3" in train(after, tmp_path, "--task_name", data)
    losses, predictions, weights = outcome(tmp_path / "out")
    print(f"\n| {before} | {after} | {np.abs(np.subtract(losses, single[0])).max():.1e} |")
    np.testing.assert_allclose(losses, single[0], atol=2e-4)
    assert predictions == single[1]
    assert max(np.abs(weights[key] - single[2][key]).max() for key in weights) < 1e-3


def test_going_on_on_fewer_processes(data, single, trained, tmp_path):
    """Half of the data-parallel processes take twice as many passes a step: the order of the data stays."""
    (tmp_path / "out").mkdir()
    shutil.copytree(trained("DP 2") / "checkpoint-3", tmp_path / "out/checkpoint-3")
    output = train("one", tmp_path, "--task_name", data, "--per_device_train_batch_size", 2)
    assert "steps are of 4 records: this run takes gradient_accumulation_steps 2" in output
    np.testing.assert_allclose(outcome(tmp_path / "out")[0], single[0], atol=2e-4)


def test_a_checkpoint_without_names_of_its_weights(data, trained, tmp_path):
    """As an older run wrote it: it goes on on the layout it is of."""
    (tmp_path / "out").mkdir()
    shutil.copytree(trained("TP 2") / "checkpoint-3", tmp_path / "out/checkpoint-3")
    (tmp_path / "out/checkpoint-3" / MANIFEST).write_text("")
    args = [*COMMON, *flags(model_name_or_path=TINY_GLM, task_name=data, output_dir=tmp_path / "out")]
    assert "was saved with tensor_parallel_degree 2 and no names of its" in run(*args, code=2)[-1]
    train("TP 2", tmp_path, "--task_name", data)
    losses, expected = outcome(tmp_path / "out")[0], outcome(trained("TP 2"))[0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


LORA = ["--lora", "True", "--lora_rank", 4, "--learning_rate", 1e-2]


@pytest.mark.parametrize("name", ["DP 2", "sharding stage 1", "TP 2 x DP 2"])
def test_lora_on_any_layout(name, data, lora_single, tmp_path):
    """The adapter that one process trains, by losses, predictions and weights."""
    train(name, tmp_path, "--task_name", data, *LORA)
    losses, predictions, adapter = outcome(tmp_path / "out", "lora_model_state.pdparams")
    expected_losses, expected_predictions, expected_adapter = lora_single
    np.testing.assert_allclose(losses, expected_losses, atol=2e-4)
    assert predictions == expected_predictions and adapter.keys() == expected_adapter.keys()
    assert max(np.abs(adapter[key] - expected_adapter[key]).max() for key in adapter) < 1e-3


@pytest.fixture(scope="module")
def lora_single(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    train("one", folder, "--task_name", data, *LORA)
    return outcome(folder / "out", "lora_model_state.pdparams")


@pytest.mark.parametrize("weights", [[], ["--weight_quantize_algo", "weight_only_int8"]])
def test_lora_on_two_processes(data, tmp_path, weights):
    """The same adapter as on one, and the same whole model; the adapter is split again to evaluate it."""
    name, lora = "lora_model_state.pdparams", [*LORA, *weights]
    common = ["--model_name_or_path", TINY_GLM, "--task_name", data, *COMMON, *lora, "--merge_lora", "True"]
    run(*common, *flags(output_dir=tmp_path / "one", per_device_train_batch_size=4))
    losses, predictions, adapter = outcome(tmp_path / "one", name)
    whole = outcome(tmp_path / "one")[2]
    assert any(weight.any() for key, weight in adapter.items() if key.endswith("query_key_value.lora_B"))
    out = tmp_path / "two"
    split = flags(tensor_parallel_degree=2, per_device_train_batch_size=4)
    run_parallel(2, *common, "--output_dir", out, *split)
    other_losses, other_predictions, other_adapter = outcome(out, name)
    assert np.abs(np.subtract(losses, other_losses)).max() < 2e-4 and other_predictions == predictions
    for ours, theirs in ((other_adapter, adapter), (outcome(out)[2], whole)):
        assert ours.keys() == theirs.keys()
        assert max(np.abs(ours[key] - theirs[key]).max() for key in theirs) < 1e-3
    for path in (tmp_path / "one").glob("model_state*"):
        path.unlink()  # what is left is an adapter
    args = flags(model_name_or_path=tmp_path / "one", task_name=data, output_dir=tmp_path / "reloaded")
    run_parallel(2, *COMMON[:8], "--do_eval", *args, *split, *weights)
    assert [
        row["token_ids"] for row in read_jsonl(tmp_path / "reloaded/eval_predictions.jsonl")
    ] == predictions


def test_tensor_parallel_processes_drop_alike(data, tmp_path):
    """With dropout on, what the processes hold in common stays the same on all of them."""
    model = tiny_glm(tmp_path / "model", embedding_dropout_prob=0.2, output_dropout_prob=0.2, num_layers=1)
    args = flags(model_name_or_path=model, task_name=data, output_dir=tmp_path / "out", max_steps=2)
    args += ["--do_train", *flags(tensor_parallel_degree=2)]
    logs = "\n".join(run_parallel(2, *args, hook=["compare_hidden_states"]))
    differences = [float(number) for number in re.findall(r"LARGEST DIFFERENCE (\S+)", logs)]
    assert len(differences) == 4 and max(differences) < 1e-5


def test_split_loss_and_gradients_against_float64(tmp_path):
    rng = np.random.default_rng(0)
    hidden, weight = (
        rng.normal(size=[6, 16]).astype("float32") * 3,
        rng.normal(size=[40, 16]).astype("float32"),
    )
    labels = np.array([0, 19, 20, 39, *rng.integers(0, 40, [2])])  # the edges of both parts, too
    np.savez(tmp_path / "in.npz", hidden=hidden, weight=weight, labels=labels)
    run_parallel(2, hook=["split_loss", str(tmp_path)])
    expected = reference_loss(hidden.astype("float64"), weight.astype("float64"), labels, 0.1)
    parts = [np.load(tmp_path / f"out{rank}.npz") for rank in range(2)]
    for part in parts:
        np.testing.assert_allclose(part["losses"], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(part["hidden"], expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([p["weight"] for p in parts]), expected[2], rtol=1e-5, atol=1e-5
    )


def test_drawn_tokens_are_the_same_on_all_processes(data, tmp_path):
    """Each process generates; were their draws to differ, the decoding would mix up and the ids differ."""
    args = [
        *COMMON,
        *flags(
            model_name_or_path=TINY_GLM,
            task_name=data,
            output_dir=tmp_path / "out",
            do_train=False,
            tensor_parallel_degree=2,
            select_topk=False,
            top_k=50,
            top_p=0.9,
        ),
    ]
    lines = run_parallel(2, *args, hook=["print_hypotheses"])
    generated = [line for line in lines if line.startswith("GENERATED")]
    assert len(generated) == 6 and generated[:3] == generated[3:]  # three batches on each
    assert all(row["token_ids"] for row in read_jsonl(tmp_path / "out/eval_predictions.jsonl"))


def on_two_machines(folder, data, *args, shared=False, code=0):
    """Train on two machines of one process each, into their folders one/out and two/out."""
    machines = [folder / "one", folder / "two"]
    for machine in machines:
        machine.mkdir(exist_ok=True)
    if shared:
        (folder / "one/out").mkdir()
        (folder / "two/out").symlink_to(folder / "one/out")
    common = [*COMMON, *flags(model_name_or_path=TINY_GLM, task_name=data, output_dir="out", save_steps=1)]
    return run_parallel(2, *common, *args, machines=machines, code=code)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_machines_share_a_folder(data, tmp_path):
    on_two_machines(tmp_path, data, *flags(max_steps=3, per_device_train_batch_size=2), shared=True)
    losses, predictions, _ = outcome(tmp_path / "one/out")
    alone = flags(model_name_or_path=TINY_GLM, task_name=data, output_dir=tmp_path / "alone", max_steps=3)
    run(*COMMON, *alone, "--per_device_train_batch_size", 4)
    expected = outcome(tmp_path / "alone")
    np.testing.assert_allclose(losses, expected[0], atol=2e-4)
    assert predictions == expected[1]
    assert all((tmp_path / f"one/out/checkpoint-{step}" / MANIFEST).exists() for step in (1, 2, 3))


def test_machines_have_folders_of_their_own(data, tmp_path):
    """Each gets the checkpoints and the model, and goes on from its own; the first alone has results."""
    on_two_machines(tmp_path, data, "--save_on_each_node", "--max_steps", 2)
    on_two_machines(tmp_path, data, "--save_on_each_node", "--max_steps", 3)
    one, two = names(tmp_path / "one/out"), names(tmp_path / "two/out")
    assert all(f"checkpoint-{step}/{MANIFEST}" in two for step in (1, 2, 3))
    assert all("saved_signal" in name for name in two - one)  # PaddleNLP 3: each process has one
    results = {"all_results.json", "eval_predictions.jsonl", "eval_results.json", "train_results.json"}
    assert {name for name in one - two if "saved_signal" not in name and name[:4] != "runs"} == results
    model, other = (tmp_path / machine / "out/model_state.pdparams" for machine in ("one", "two"))
    assert model.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "shared, args, line",
    [
        (False, [], "is not the folder that the first of this run has locked"),
        (True, ["--save_on_each_node"], "is one folder for all machines: leave --save_on_each_node out"),
    ],
)
def test_whether_machines_share_a_folder_is_said_before_they_train(data, tmp_path, shared, args, line):
    lines = on_two_machines(tmp_path, data, *args, shared=shared, code=2)
    errors = [error for error in lines if error.startswith("finetune_generation.py: error:")]
    assert len(errors) == 2 and all(line in error for error in errors)
    assert not names(tmp_path)


def test_a_degree_that_does_not_divide(data, tmp_path):
    model = tiny_glm(tmp_path / "model", num_attention_heads=1, num_layers=1)
    args = flags(
        model_name_or_path=model, task_name=data, output_dir=tmp_path / "out", tensor_parallel_degree=2
    )
    args.append("--do_train")
    lines = run_parallel(2, *args, code=2)
    errors = [line for line in lines if line.startswith("finetune_generation.py: error:")]
    assert len(errors) == 1 and "does not divide the 1 attention heads" in errors[0]
    assert "Traceback" not in "".join(lines)
    assert "does not divide the one process" in run(*args, code=2)[-1]
