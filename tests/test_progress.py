"""Curves of VisualDL: an evaluation's best and worst predictions."""

from types import SimpleNamespace

import numpy as np
from helpers import FAST, TINY_GLM, run, small_data
from visualdl import LogReader

from glm.training import progress
from glm.training.progress import SHOWN, Curves


def read_curves(folder):
    """What VisualDL's one log in a folder says, {kind: {tag: list of records}}."""
    (log,) = folder.glob("**/vdlrecords*")
    reader = LogReader(file_path=str(log))
    tags = reader.get_tags()
    return {kind: {tag: reader.get_data(kind, tag) for tag in tags[kind]} for kind in tags}


def test_the_best_and_worst_predictions_are_shown(tmp_path, monkeypatch):
    rows = [
        {"rougel": score / 100, "answer": f"a{score}", "prediction": f"p{score}", "reference": f"r{score}"}
        for score in np.random.default_rng(0).permutation(30)
    ]
    rows_of_all = [*rows, {**rows[0], "rougel": None, "reference": None}]
    curves = Curves(lambda: rows_of_all, ("answer", "prediction", "reference"))
    # As the Trainer has it where nothing was trained: every process is the first by its state.
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    for first in (False, True):
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(progress, "is_first_of_run", lambda first=first: first)
        curves.on_evaluate(SimpleNamespace(logging_dir=str(tmp_path)), state, None)
    shown = read_curves(tmp_path)
    texts = {tag: [record.text.encoded_text_string for record in shown["text"][tag]] for tag in shown["text"]}
    assert {tag: len(texts[tag]) for tag in texts} == {
        "best predictions/at the end": SHOWN,
        "worst predictions/at the end": SHOWN,
    }
    assert (
        texts["best predictions/at the end"][0]
        == "ROUGE-L 0.29 | answer: a29 | prediction: p29 | reference: r29"
    )
    assert [text[:12] for text in texts["worst predictions/at the end"][:2]] == [
        "ROUGE-L 0.00",
        "ROUGE-L 0.01",
    ]
    (histogram,) = shown["histogram"]["eval/rougel of the records"]
    assert sum(histogram.histogram.hist) == 30


def test_a_run_shows_its_evaluations(tmp_path):
    """Those in training by their step, the one after it at the end, and all in one log."""
    steps = "--max_steps 3 --logging_steps 1 --evaluation_strategy steps --eval_steps 2"
    flags = [*FAST, "--do_train", "--do_eval", *steps.split()]
    paths = ["--model_name_or_path", TINY_GLM, "--task_name", small_data(tmp_path, train=4, dev=3)]
    logged = run(*paths, "--output_dir", tmp_path / "out", *flags)
    assert not any("attempting to log" in line for line in logged)
    shown = read_curves(tmp_path / "out/runs")
    assert {tag.split("/")[1] for tag in shown["text"] if "predictions" in tag} == {"step 2", "at the end"}
    assert len(shown["text"]["worst predictions/at the end"]) == 3
    assert [record.id for record in shown["scalar"]["eval/rougel"]] == [2, 3]
    assert {"train/loss", "train/learning_rate"} <= set(shown["scalar"])
    assert not set(shown["scalar"]) & set(shown["histogram"])  # or VisualDL's server ends

    run(*paths, "--output_dir", tmp_path / "none", *flags, "--report_to", "none")
    assert not (tmp_path / "none/runs").exists()
