"""Adapters against hand computation, plain GLMs and a run without them."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import (
    FAST,
    TINY_GLM,
    add_lora,
    flags,
    generation_arguments,
    lora_config,
    losses,
    main,
    make_batch,
    make_trainer,
    random_glm,
    read_jsonl,
    run,
    small_data,
)
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration

from data import DataCollator
from glm import modeling
from glm.arguments import LORA_MODULES
from glm.decoding.decoder import beam_search
from glm.weights import adapters as lora
from glm.weights.shapes import adapter_shapes, get_split


def random_adapter(model, config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(model.config, config)
    return {name: rng.normal(size=shape).astype("float32") * 0.3 for name, shape in shapes.items()}


def logits(model):
    model.eval()
    _, batch = make_batch()
    inputs = {key: paddle.to_tensor(batch[key]) for key in ("input_ids", "position_ids")}
    mask = paddle.to_tensor(batch["attention_mask"].astype("float32"))
    with paddle.no_grad():
        return model(**inputs, attention_mask=mask, return_dict=True).logits.numpy()


@pytest.mark.parametrize("rslora, scaling", [(False, 3.0), (True, 6 / 2**0.5)])
@pytest.mark.parametrize("modules", [LORA_MODULES, ["dense", "query_key_value"]])
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
    adapted = add_lora(model, config, weights)
    np.testing.assert_allclose(logits(adapted), expected, atol=2e-4)
    merged = lora.merge_lora(adapted)
    np.testing.assert_allclose(logits(merged), expected, atol=2e-4)
    assert set(merged.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("cpu, quantized", [(False, False), (True, False), (False, True)])
def test_decoding_on_a_card_has_no_adapter(monkeypatch, cpu, quantized):
    """It finds the same then. A model in int8 keeps its adapter, and so does one on a CPU."""
    monkeypatch.setattr(lora, "on_cpu", lambda: cpu)
    config, source = lora_config(), paddle.to_tensor(np.arange(3, 23).reshape([2, 10]))
    model = add_lora(random_glm(), config, random_adapter(random_glm(), config))
    model.eval()
    search = [source, np.array([10, 7]), generation_arguments(num_beams=3, tgt_length=8), 1, 2]
    expected = beam_search(model, *search)
    lora.merge_for_decoding(model, SimpleNamespace(adapter=True, quantized=quantized))
    left = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert bool(left) == (cpu or quantized)
    for before, after in zip(expected, beam_search(model, *search)):
        assert [ids for ids, _ in before] == [ids for ids, _ in after]
        np.testing.assert_allclose(*([score for _, score in best] for best in (before, after)), atol=1e-4)


def test_a_new_adapter_changes_nothing_and_is_kaimings():
    model = random_glm()
    expected = logits(random_glm())
    weights = lora.new_adapter_weights(model.config, lora_config(), 5)
    assert len(weights) == 2 * 4 * 2
    for name, weight in weights.items():
        if name.endswith("lora_A"):
            bound = weight.shape[0] ** -0.5
            assert abs(weight).max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.25)
    np.testing.assert_array_equal(logits(add_lora(model, lora_config(), weights)), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_moves_every_adapter_weight_and_no_other(tmp_path, monkeypatch, recompute):
    model = random_glm()
    adapted = add_lora(model, lora_config(), random_adapter(model, lora_config()))
    features, _ = make_batch()
    dataset = [{**feature, "index": index} for index, feature in enumerate(features)]
    settings = {"max_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 3, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, adapted, recompute=recompute, save_strategy="no", **settings)
    trainer.train_dataset, trainer.data_collator = dataset, DataCollator(0)
    inputs, layers = [], model.glm.transformer.layers
    normalize = modeling._normalize

    def watched(layer, given):
        if layer is layers[0].input_layernorm:
            inputs.append(given.stop_gradient)
        return normalize(layer, given)

    monkeypatch.setattr(modeling, "_normalize", watched)
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


LORA = [
    *FAST,
    "--lora",
    "True",
    "--do_train",
    *flags(
        model_name_or_path=TINY_GLM,
        lora_rank=4,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
    ),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    data = small_data(folder / "data")
    run(*LORA, "--task_name", data, "--do_eval", "--output_dir", folder / "out")
    return folder


def predictions(folder):
    rows = read_jsonl(folder / "eval_predictions.jsonl")
    return [row["token_ids"] for row in rows], [row["score"] for row in rows]


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
    """A checkpoint of step 3 gives the same steps 4 to 6; an adapter is trained on from where it is."""
    (tmp_path / "out").mkdir()
    shutil.copytree(adapter / "out/checkpoint-3", tmp_path / "out/checkpoint-3")
    run(*LORA, "--task_name", adapter / "data", "--output_dir", tmp_path / "out")
    resumed, unbroken = losses(tmp_path / "out"), losses(adapter / "out")
    assert {step: resumed[step] for step in (4, 5, 6)} == {step: unbroken[step] for step in (4, 5, 6)}
    run(
        *FAST,
        "--do_train",
        *flags(
            model_name_or_path=adapter / "out",
            task_name=adapter / "data",
            output_dir=tmp_path / "more",
            max_steps=1,
            logging_steps=1,
            learning_rate=1e-2,
            merge_lora=True,
        ),
    )
    first, last = losses(adapter / "out")[1], losses(tmp_path / "more")[1]
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
    tuned = ["--model_name_or_path", out, *new]
    for args, expected in (
        ([*glm, *new, "--lora", "True", "--lora_target_modules", "query"], "--lora_target_modules"),
        ([*glm, *new, "--merge_lora", "True"], "--merge_lora: there is no adapter in"),
        ([*glm, *new, "--lora_base", TINY_GLM], "--lora_base"),
        ([*tuned, "--lora", "True", "--lora_rank", 8], "--lora_rank"),
        ([*tuned, "--rslora", "True"], "--rslora"),
        ([*tuned, "--lora_base", wider], "is of another base: its glm.transformer."),
        (["--model_name_or_path", moved, *new], f"its base {tmp_path}/gone: its config.json can't be loaded"),
        (["--model_name_or_path", broken, *new], "lora_model_state.pdparams"),
        ([*glm, "--lora", "True", "--output_dir", full], "has no lora_model_state.pdparams"),
    ):
        code, lines = main(monkeypatch, capsys, *args, "--task_name", data, *FAST, "--do_train", "--do_eval")
        assert code == 2, lines
        assert lines[-1].startswith("finetune_generation.py: error: ") and expected in lines[-1], lines[-1]
        assert not any("Traceback" in line for line in lines) and not (tmp_path / "new").exists()
    run("--model_name_or_path", moved, *new, "--lora_base", TINY_GLM, "--task_name", data, *FAST, "--do_eval")
    assert predictions(tmp_path / "new") == predictions(out)


def test_which_adapter_weights_processes_split():
    """B where a linear's outputs are split, A where its inputs are."""
    split = {"query_key_value": "B", "dense": "A", "dense_h_to_4h": "B", "dense_4h_to_h": "A"}
    for linear, part in split.items():
        for name in "AB":
            assert (get_split(f"layers.0.{linear}.lora_{name}") is not None) == (name == part)
