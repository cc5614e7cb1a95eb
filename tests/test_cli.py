"""The command line, run as a user would."""

import errno
import json

import numpy as np
import pytest
from helpers import FAST, MINI, TINY_GLM, flags, log_softmax, main, read_jsonl, run, small_data

import finetune_generation
from glm.metrics import compute_metrics


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Six steps with an evaluation and a checkpoint every two, the best one kept; then evaluate, predict."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    data = small_data(folder / "data")
    test_file = folder / "data/test.json"
    rows = read_jsonl(test_file)
    del rows[1]["question"]
    test_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = flags(
        model_name_or_path=TINY_GLM,
        task_name=data,
        output_dir=folder / "out",
        do_train=True,
        do_eval=True,
        do_predict=True,
        max_steps=6,
        logging_steps=1,
        evaluation_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rougel",
        bf16=True,
    )
    return folder, run(*FAST, *args)


def test_what_a_run_leaves_behind(finished_run):
    folder, lines = finished_run
    out = folder / "out"
    metrics = json.loads((out / "eval_results.json").read_text())
    for name in ("rouge1", "rouge2", "rougel", "bleu4", "loss", "samples", "runtime", "tokens_per_second"):
        assert f"eval_{name}" in metrics
    everything = json.loads((out / "all_results.json").read_text())
    assert {"train_loss", "eval_rougel", "test_rougel"} <= set(everything)
    assert (out / "model_state.pdparams").exists() and (out / "checkpoint-6/optimizer.pdopt").exists()
    assert any("bf16 needs a GPU: running in float32" in line for line in lines)
    state = json.loads((out / "trainer_state.json").read_text())
    history = [row["eval_rougel"] for row in state["log_history"] if "eval_rougel" in row]
    assert len(history) >= 3 and state["best_metric"] == max(history[:3])
    assert metrics["eval_rougel"] == pytest.approx(
        state["best_metric"], abs=1e-6
    )  # the best model was loaded again

    rows = read_jsonl(out / "eval_predictions.jsonl")
    records = read_jsonl(folder / "data/dev.json")
    assert [(r["id"], r["context"], r["answer"]) for r in rows] == [
        (r["id"], r["context"], r["answer"]) for r in records
    ]
    assert [r["reference"] for r in rows] == [r["question"] for r in records]
    scores = compute_metrics([r["prediction"] for r in rows], [r["reference"] for r in rows])
    assert all(metrics[f"eval_{name}"] == pytest.approx(value) for name, value in scores.items())
    assert metrics["eval_samples"] == 5
    tests = read_jsonl(out / "test_predictions.jsonl")
    assert len(tests) == 3 and tests[1]["reference"] is None and tests[1]["token_ids"]


def test_scores_are_those_of_the_plain_forward_in_float64(finished_run):
    import paddle
    from paddlenlp.transformers import AutoModelForConditionalGeneration, GLMTokenizer

    from data import DataCollator, build_features, encode_source

    out = finished_run[0] / "out"
    tokenizer = GLMTokenizer.from_pretrained(str(out))
    paddle.set_default_dtype("float64")
    try:
        model = AutoModelForConditionalGeneration.from_pretrained(str(out)).to(dtype="float64")
        model.eval()
        for row in read_jsonl(out / "eval_predictions.jsonl"):
            labels = [*row["token_ids"], tokenizer.eop_token_id]
            source_ids, _ = encode_source(tokenizer, {**row, "where": ""}, 160)
            batch = DataCollator(0)([{**build_features(tokenizer, source_ids, labels), "index": 0}])
            logits = model(
                input_ids=paddle.to_tensor(batch["input_ids"]),
                position_ids=paddle.to_tensor(batch["position_ids"]),
                attention_mask=paddle.to_tensor(batch["attention_mask"].astype("float64")),
                return_dict=True,
            ).logits
            assert logits.dtype == paddle.float64
            log_p = log_softmax(logits.numpy()[0, batch["target_positions"]])[np.arange(len(labels)), labels]
            ended = len(row["token_ids"]) < 24  # at tgt_length a beam ends without its end token
            total = log_p.sum() if ended else log_p[:-1].sum()
            assert row["score"] == pytest.approx(total / len(row["token_ids"]), abs=1e-3)
    finally:
        paddle.set_default_dtype("float32")


def test_eval_loss_is_the_mean_over_tokens(finished_run):
    """Of all dev records, by PaddleNLP's own forward of the saved weights; not the mean of records' means."""
    import paddle
    from paddlenlp.transformers import AutoModelForConditionalGeneration, GLMTokenizer

    from data import DataCollator, build_dataset
    from glm.records import read_records

    folder, out = finished_run[0], finished_run[0] / "out"
    dataset = build_dataset(
        GLMTokenizer.from_pretrained(str(out)), read_records(str(folder / "data"), "dev"), 160, 24
    )
    model = AutoModelForConditionalGeneration.from_pretrained(str(out))
    model.eval()
    losses = []
    for features in dataset:
        batch = DataCollator(0)([features])
        logits = model(
            input_ids=paddle.to_tensor(batch["input_ids"]),
            position_ids=paddle.to_tensor(batch["position_ids"]),
            attention_mask=paddle.to_tensor(batch["attention_mask"].astype("float32")),
            return_dict=True,
        ).logits.numpy()[0, batch["target_positions"]]
        log_p = log_softmax(logits)
        losses.append(-0.9 * log_p[np.arange(len(log_p)), batch["labels"]] - 0.1 * log_p.mean(-1))
    loss = json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert len({len(part) for part in losses}) > 1
    assert loss == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)
    assert loss != pytest.approx(np.mean([part.mean() for part in losses]), abs=1e-4)


def test_candidates_and_fewer_records(finished_run, tmp_path):
    """The first is the row's own prediction, and the one that there is without candidates."""
    folder, _ = finished_run
    lines = run(
        *FAST,
        "--do_eval",
        "--do_predict",
        *flags(
            model_name_or_path=folder / "out",
            task_name=folder / "data",
            output_dir=tmp_path,
            num_return_sequences=3,
            max_eval_samples=2,
            max_predict_samples=1,
        ),
    )
    rows, expected = (
        read_jsonl(tmp_path / "eval_predictions.jsonl"),
        read_jsonl(folder / "out/eval_predictions.jsonl"),
    )
    assert len(rows) == 2 and len(read_jsonl(tmp_path / "test_predictions.jsonl")) == 1
    for row, alone in zip(rows, expected):
        candidates = row.pop("candidates")
        assert row["token_ids"] == alone["token_ids"] and row["score"] == pytest.approx(
            alone["score"], abs=1e-5
        )
        assert (
            candidates[0] == {key: row[key] for key in ("prediction", "score", "token_ids")}
            and "rougel" in row
        )
        scores = [candidate["score"] for candidate in candidates]
        assert len({tuple(candidate["token_ids"]) for candidate in candidates}) == 3
        assert scores == sorted(scores, reverse=True)
        assert row.keys() == alone.keys()
        assert row["rougel"] == pytest.approx(
            compute_metrics([row["prediction"]], [row["reference"]])["rougel"]
        )
    lines = [line.split("] - ")[-1] for line in lines]
    value = json.loads((tmp_path / "eval_results.json").read_text())["eval_rougel"]
    assert any(line.split() == ["eval_rougel", f"{value:.4g}"] for line in lines)
    assert sum(line.startswith("prediction  ") for line in lines) == 1  # of the test set, which came last


def test_early_stopping(finished_run, tmp_path):
    """Without a step that could help, the second evaluation is the last."""
    run(
        *FAST,
        "--do_train",
        "--load_best_model_at_end",
        *flags(
            model_name_or_path=TINY_GLM,
            task_name=finished_run[0] / "data",
            output_dir=tmp_path,
            max_steps=8,
            max_train_samples=4,
            learning_rate=0,
            save_steps=1,
            evaluation_strategy="steps",
            eval_steps=1,
            max_eval_samples=1,
            early_stopping_patience=1,
        ),
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["max_steps"] == 8
    assert sum("eval_loss" in row for row in state["log_history"]) == 2


def test_the_last_step_is_evaluated_once(finished_run, tmp_path):
    folder, lines = finished_run
    state = json.loads((folder / "out/trainer_state.json").read_text())
    # Weights of another step, which load_best_model_at_end has brought, are evaluated again.
    best = int(state["best_model_checkpoint"].rsplit("-", 1)[1])
    evaluated = [step for step in (2, 4, 6) for line in lines if f"eval at step {step}:" in line]
    assert evaluated == sorted([2, 4, 6] + [best] * (best != 6))
    lines = run(
        *FAST,
        "--do_train",
        "--do_eval",
        *flags(
            model_name_or_path=TINY_GLM,
            task_name=folder / "data",
            output_dir=tmp_path,
            max_steps=2,
            logging_steps=1,
            evaluation_strategy="steps",
            eval_steps=1,
            save_strategy="no",
        ),
    )
    assert [sum(f"eval at step {step}:" in line for line in lines) for step in (1, 2)] == [1, 1]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    rows = read_jsonl(tmp_path / "eval_predictions.jsonl")
    scores = compute_metrics([row["prediction"] for row in rows], [row["reference"] for row in rows])
    assert results["eval_rougel"] == pytest.approx(scores["rougel"]) and results["eval_samples"] == 5


def test_predict_alone_from_a_fine_tuned_folder(finished_run, tmp_path):
    folder, _ = finished_run
    out = tmp_path / "predicted"
    config = {
        "model_name_or_path": str(folder / "out"),
        "task_name": str(folder / "data"),
        "output_dir": str(out),
        "do_predict": True,
        **{name[2:]: value for name, value in zip(FAST[::2], FAST[1::2])},
    }
    (tmp_path / "predict.json").write_text(json.dumps(config))
    run(tmp_path / "predict.json", "--num_beams", 3)
    assert read_jsonl(out / "test_predictions.jsonl") == read_jsonl(folder / "out/test_predictions.jsonl")


@pytest.mark.parametrize("name", ["ENOSPC", "EACCES", "EROFS", "EIO"])
def test_what_can_t_be_written_is_a_line(tmp_path, monkeypatch, capsys, name):
    def fine_tune(*args):
        raise OSError(getattr(errno, name), "as the system says", "eval_results.json")

    monkeypatch.setattr(finetune_generation, "fine_tune", fine_tune)
    paths = ["--model_name_or_path", TINY_GLM, "--task_name", MINI, "--output_dir", tmp_path / "out"]
    code, lines = main(monkeypatch, capsys, *paths, "--do_eval")
    assert code == 1 and "error: can't write eval_results.json: as the system says: " in lines[-1]
