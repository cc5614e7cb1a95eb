"""Adapters against hand computation, plain GLMs and a run without them; what a run needs of memory against its peak."""

import json
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from conftest import ROOT, TINY_GLM, random_glm
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration
from test_cli import FAST, read_jsonl, run, small_data
from test_loss import make_batch, make_trainer
from test_mistakes import main

from data import DataCollator
from glm import arguments, lora, memory, modeling


def lora_config(modules=lora.LORA_MODULES, **changes):
    targets = [rf".*\.{module}" for module in modules]
    return LoRAConfig(**{"r": 2, "lora_alpha": 6, "dtype": "float32", "target_modules": targets, **changes})


def random_adapter(model, config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = lora.adapter_shapes(model.config, config)
    return {name: rng.normal(size=shape).astype("float32") * 0.3 for name, shape in shapes.items()}


def logits(model):
    model.eval()
    _, batch = make_batch()
    inputs = {key: paddle.to_tensor(batch[key]) for key in ("input_ids", "position_ids")}
    mask = paddle.to_tensor(batch["attention_mask"].astype("float32"))
    with paddle.no_grad():
        return model(**inputs, attention_mask=mask, return_dict=True).logits.numpy()


@pytest.mark.parametrize("rslora, scaling", [(False, 3.0), (True, 6 / 2**0.5)])
@pytest.mark.parametrize("modules", [lora.LORA_MODULES, ["dense", "query_key_value"]])
def test_an_adapter_adds_the_product_of_its_matrices(modules, rslora, scaling):
    """To the weights, as numpy has it in float64: beside them, and merged into them."""
    model, plain = random_glm(), random_glm()
    config = lora_config(modules, rslora=rslora)
    weights = random_adapter(model, config)
    changed = 0
    for name, weight in plain.named_parameters():
        linear = name[: -len(".weight")]
        if f"{linear}.lora_A" in weights:
            a, b = (weights[f"{linear}.lora_{part}"].astype("float64") for part in "AB")
            weight.set_value((weight.numpy() + scaling * a @ b).astype("float32"))
            changed += 1
    assert changed == 2 * len(modules)
    expected = logits(plain)
    adapted = lora.add_lora(model, config, weights)
    np.testing.assert_allclose(logits(adapted), expected, atol=2e-4)
    merged = lora.merge_lora(adapted)
    np.testing.assert_allclose(logits(merged), expected, atol=2e-4)
    assert set(merged.state_dict()) == set(plain.state_dict())


def test_a_new_adapter_changes_nothing_and_is_kaimings():
    model = random_glm()
    expected = logits(random_glm())
    weights = lora.adapter_weights(None, model.config, lora_config(), 5)
    assert len(weights) == 2 * 4 * 2
    for name, weight in weights.items():
        if name.endswith("lora_A"):
            bound = weight.shape[0] ** -0.5
            assert abs(weight).max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.25)
    np.testing.assert_array_equal(logits(lora.add_lora(model, lora_config(), weights)), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_moves_every_adapter_weight_and_no_other(tmp_path, recompute):
    model = random_glm()
    adapted = lora.add_lora(model, lora_config(), random_adapter(model, lora_config()))
    features, _ = make_batch()
    dataset = [{**feature, "index": index} for index, feature in enumerate(features)]
    trainer = make_trainer(
        tmp_path, adapted, recompute=recompute, max_steps=1, learning_rate=1e-2, per_device_train_batch_size=3,
        weight_decay=0.1, save_strategy="no",
    )  # fmt: skip
    trainer.train_dataset, trainer.data_collator = dataset, DataCollator(0)
    inputs, layers = [], model.glm.transformer.layers
    layers[0].register_forward_pre_hook(lambda layer, given: inputs.append(given[0].stop_gradient))
    before = {name: weight.numpy().copy() for name, weight in adapted.named_parameters()}
    trainer.train()
    moved = {name for name, weight in adapted.named_parameters() if (weight.numpy() != before[name]).any()}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 16
    for name, weight in adapted.named_parameters():
        if name in moved:
            assert (weight.numpy() != before[name]).mean() > 0.9, name
    # A moment for nothing else, and the first layer recomputed as the others.
    moments = [name for name in trainer.optimizer.state_dict() if "moment" in name]
    assert len(moments) == 2 * 16
    assert len(inputs) == (2 if recompute else 1)


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


TRAIN = ["--model_name_or_path", TINY_GLM, "--lora", "True", "--lora_rank", 4, "--do_train", "--max_steps", 6]
TRAIN += ["--save_steps", 3, "--logging_steps", 1, *FAST, "--learning_rate", 1e-2]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    data = small_data(folder / "data")
    run(*TRAIN, "--task_name", data, "--do_eval", "--output_dir", folder / "out")
    return folder


def predictions(folder):
    rows = read_jsonl(folder / "eval_predictions.jsonl")
    return [row["token_ids"] for row in rows], [row["score"] for row in rows]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def test_an_adapter_folder_is_a_model(adapter, tmp_path):
    """Read, evaluated, merged, and the merged model evaluated: the same predictions."""
    out = adapter / "out"
    for name in ("lora_config.json", "lora_model_state.pdparams", "tokenizer_config.json"):
        assert (out / name).is_file()
    assert not list(out.rglob("model_state.pdparams"))  # in the checkpoints neither
    whole = (TINY_GLM / "model_state.pdparams").stat().st_size
    assert (out / "lora_model_state.pdparams").stat().st_size < whole / 20
    expected, scores = predictions(out)
    common = ["--task_name", adapter / "data", *FAST, "--do_eval"]
    run("--model_name_or_path", out, *common, "--output_dir", tmp_path / "reloaded")
    assert predictions(tmp_path / "reloaded") == (expected, scores)
    merged = tmp_path / "merged"
    run("--model_name_or_path", out, "--merge_lora", "True", *FAST, "--output_dir", merged)
    assert (merged / "model_state.pdparams").stat().st_size == pytest.approx(whole, rel=0.01)
    assert not (merged / "lora_config.json").exists() and not (merged / "eval_results.json").exists()
    run("--model_name_or_path", merged, *common, "--output_dir", tmp_path / "evaluated")
    tokens, merged_scores = predictions(tmp_path / "evaluated")
    assert tokens == expected and merged_scores == pytest.approx(scores, abs=1e-5)
    results = json.loads((tmp_path / "evaluated/eval_results.json").read_text())
    assert results["eval_memory_estimated_gb"] > 0 and results["eval_memory_peak_gb"] > 0


def test_resuming_and_going_on(adapter, tmp_path):
    """A checkpoint of step 3 gives the same steps 4 to 6; an adapter folder is trained on from where it is."""
    (tmp_path / "out").mkdir()
    shutil.copytree(adapter / "out/checkpoint-3", tmp_path / "out/checkpoint-3")
    run(*TRAIN, "--task_name", adapter / "data", "--output_dir", tmp_path / "out")
    assert losses(tmp_path / "out")[3:] == losses(adapter / "out")[3:]
    flags = [*TRAIN[6:], "--task_name", adapter / "data", "--max_steps", 1, "--merge_lora", "True"]
    run("--model_name_or_path", adapter / "out", *flags, "--output_dir", tmp_path / "more")
    first, last = losses(adapter / "out")[0], losses(tmp_path / "more")[0]
    assert last < first - 0.1  # the same batch as the first run's first
    assert {"model_state.pdparams", "lora_model_state.pdparams"} <= {
        path.name for path in (tmp_path / "more").iterdir()
    }


def other_base(folder, **changes):
    model = GLMForConditionalGeneration(
        GLMConfig(**{**json.loads((TINY_GLM / "config.json").read_text()), **changes})
    )
    model.save_pretrained(str(folder))


def test_mistakes(adapter, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, nothing written; before the weights are loaded."""
    out, data = adapter / "out", adapter / "data"
    moved, broken, wider = tmp_path / "moved", tmp_path / "broken", tmp_path / "wider"
    for folder in (moved, broken):
        folder.mkdir()
        for path in out.iterdir():
            if path.is_file():
                shutil.copy(path, folder)
    config = json.loads((moved / "lora_config.json").read_text())
    (moved / "lora_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    (broken / "lora_model_state.pdparams").write_bytes(b"torn")
    other_base(wider, hidden_size=160)
    full = tmp_path / "full"
    (full / "checkpoint-1").mkdir(parents=True)
    for name in (
        "model_state.pdparams",
        "optimizer.pdopt",
        "scheduler.pdparams",
        "trainer_state.json",
        ".checkpoint_done",
    ):
        (full / "checkpoint-1" / name).write_text("{}")
    glm, new = ["--model_name_or_path", TINY_GLM], ["--output_dir", tmp_path / "new"]
    for flags, expected in (
        ([*glm, *new, "--lora", "True", "--lora_rank", 0], "--lora_rank is 0: it must be a finite number of at"),
        ([*glm, *new, "--lora", "True", "--lora_alpha", "nan"], "--lora_alpha is nan: it must be a finite number"),
        ([*glm, *new, "--lora", "True", "--lora_target_modules", "dense", "query"], "--lora_target_modules has query:"),
        ([*glm, *new, "--merge_lora", "True"], "--merge_lora: there is no adapter in"),
        ([*glm, *new, "--lora_base", TINY_GLM], "--lora_base is for an adapter, and"),
        (["--model_name_or_path", out, *new, "--lora", "True", "--lora_rank", 8], "--lora_rank: the adapter in"),
        (["--model_name_or_path", out, *new, "--rslora", "True"], "--rslora: the adapter in"),
        (["--model_name_or_path", out, *new, "--lora_base", wider], "is of another base: its glm.transformer."),
        (["--model_name_or_path", moved, *new], f"its base {tmp_path}/gone: its config.json can't be loaded"),
        (["--model_name_or_path", broken, *new], "lora_model_state.pdparams can't be loaded"),
        ([*glm, "--lora", "True", "--output_dir", full], "has no lora_model_state*: give a run's checkpoint-N folder"),
    ):  # fmt: skip
        code, lines = main(monkeypatch, capsys, *flags, "--task_name", data, *FAST, "--do_train", "--do_eval")
        assert code == 2, lines
        assert lines[-1].startswith("finetune_generation.py: error: ") and expected in lines[-1], lines[-1]
        assert not any("Traceback" in line for line in lines) and not (tmp_path / "new").exists()
    run("--model_name_or_path", moved, *new, "--lora_base", TINY_GLM, "--task_name", data, *FAST, "--do_eval")
    assert predictions(tmp_path / "new") == predictions(out)


@pytest.mark.parametrize("config", [None, lora_config(), lora_config(["dense_h_to_4h"], r=5)])
def test_parameters_are_counted(config):
    model = random_glm(num_layers=3)
    whole = trained = None
    if config:
        model = lora.add_lora(model, config, lora.adapter_weights(None, model.config, config, 0))
        trained = sum(weight.size for weight in model.parameters() if not weight.stop_gradient)
    whole = sum(weight.size for weight in model.parameters())
    assert memory.count_parameters(model.config, 1, config) == (whole, trained or whole)


def test_memory_of_several_processes_by_hand():
    """Of GLM-10B's layout on 8 processes: an eighth of each linear and of the embedding, norms and positions whole."""
    config = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
    linears = 48 * (4096 * (3 + 1 + 4 + 4) * 4096 + (3 + 4) * 4096) + 50048 * 4096
    whole = 48 * (2 + 4) * 4096 + 2 * (config.max_sequence_length + 1) * 4096 + 2 * 4096
    assert memory.count_parameters(config, 8) == (linears // 8 + whole,) * 2
    needs = memory.training_memory(config, 2, 608, 160, "O2", recompute=True, degree=8)
    count = linears // 8 + whole
    assert needs["weights"] == 2 * count and needs["optimizer"] == 12 * count  # two moments, master weights
    assert needs["gradients"] == 8 * count  # in float32, and once more while they are clipped
    assert needs["total"] == sum(size for name, size in needs.items() if name != "total")
    adapter = memory.training_memory(
        config, 2, 608, 160, "O2", recompute=True, degree=8, lora_config=lora_config()
    )
    assert adapter["optimizer"] < needs["optimizer"] / 100 and adapter["total"] < 0.25 * needs["total"]


@pytest.mark.parametrize("setting", ["train", "train recompute lora"])
def test_estimates_are_close_to_peaks(tmp_path, setting):
    """In a process of its own, by the benchmark's own check."""
    config = GLMConfig(
        num_layers=4, hidden_size=256, num_attention_heads=8, vocab_size=2000, max_sequence_length=1024
    )
    GLMForConditionalGeneration(config).save_pretrained(str(tmp_path))
    command = [sys.executable, "tests/benchmarks/memory.py", "--check", "--model", tmp_path, "--worker", "batch 4",
               "--setting", setting, "--source", 384, "--target", 64]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    assert 0.75 < printed["estimate"] / printed["peak"] < 1.25, printed
    assert (printed["share"] < 0.05) == ("lora" in setting) and printed["speed"] > 0


def test_a_run_says_what_it_needs(tmp_path, monkeypatch, capfd):
    """More than there is: a warning that names what would help, the most first, and no error."""
    args = arguments.GLMTrainingArguments(output_dir=str(tmp_path), do_train=True, device="cpu")
    config = GLMConfig(num_layers=48, hidden_size=4096, num_attention_heads=64, vocab_size=50048)
    dataset = [{"source_length": 600, "labels": [1] * 25}, {"source_length": 20, "labels": [1] * 30}]
    generation = arguments.GenerationArguments()
    logged = []
    for level in ("train", "warning"):
        monkeypatch.setattr(memory.logger, level, logged.append)
    for free, warned in ((1e9, True), (1e12, False)):
        logged.clear()
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        needs = memory.estimate_memory(args, config, None, generation, dataset, dataset)
        expected = memory.training_memory(config, args.per_device_train_batch_size, 600, 30)
        assert needs["train"] == expected["total"] and needs["eval"] > expected["optimizer"]
        assert (
            f"{expected['total'] / 1e9:.2f} GB to train" in logged[0]
            and f"{free / 1e9:.2f} GB free" in logged[0]
        )
        assert len(logged) == 1 + warned
    logged.clear()
    monkeypatch.setattr(memory, "free_memory", lambda: 1e9)
    memory.estimate_memory(args, config, None, generation, dataset, [])
    saved = [float(text.split()[0]) for text in logged[1].split("(")[1:]]
    assert saved == sorted(saved, reverse=True)
    for flag in (
        "--lora True",
        "--recompute",
        "--tensor_parallel_degree 2",
        "--per_device_train_batch_size 1",
    ):
        assert flag in logged[1]
