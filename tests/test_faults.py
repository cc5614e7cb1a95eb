"""Faults of a run on one process, done for real: kills, signals, a full disk, an exception in the loader."""

import json
import os
import re
import shutil
import signal
import socket
import time

import pytest
from helpers import TINY_GLM, TRAIN, Run, flags, folder_arguments, last_checkpoint, losses, run

from glm.outputs.folder import open_run_folder
from glm.outputs.layout import LOCK, MANIFEST, UNFINISHED

EVALUATE = [*TRAIN, *flags(do_train=False, do_eval=True, per_device_eval_batch_size=30)]


def model_with_dropout(folder, dropout):
    shutil.copytree(TINY_GLM, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({f"{kind}_dropout_prob": dropout for kind in ("attention", "embedding", "output")})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_run_goes_on_like_an_unbroken_one(tmp_path, dropout):
    """Killed before the second checkpoint is marked as whole, then between two checkpoints."""
    model = model_with_dropout(tmp_path / "model", dropout)
    common = [*TRAIN, *flags(model_name_or_path=model, save_steps=2, max_steps=7)]
    run(*common, "--output_dir", tmp_path / "unbroken")
    expected = losses(tmp_path / "unbroken")

    broken = tmp_path / "broken"
    args = [*common, "--output_dir", broken]
    run(*args, hook=["fault", "SIGKILL", "on_save", 2], code=-signal.SIGKILL)
    assert not (broken / "checkpoint-4" / MANIFEST).exists()
    run(*args, hook=["fault", "SIGKILL", "training_step", 2], code=-signal.SIGKILL)
    lines = run(*args)
    assert any(f"skipping {broken}/checkpoint-4, which was not written to its end" in line for line in lines)
    assert any(f"resuming from {broken}/checkpoint-2" in line for line in lines)
    assert losses(broken) == pytest.approx(expected, abs=1e-4) and len(expected) == 7
    trained = json.loads((broken / "train_results.json").read_text())["train_loss"]
    assert trained == pytest.approx(sum(expected[step] for step in range(3, 8)) / 5, abs=1e-4)


def test_a_finished_run_goes_no_further(tmp_path):
    args = [*TRAIN, *flags(output_dir=tmp_path, max_steps=4, save_steps=2)]
    run(*args)
    names = "model_state.pdparams", "train_results.json"
    before = [(tmp_path / name).read_bytes() for name in names]
    (tmp_path / "model_state.pdparams").unlink()
    assert not any("step 5" in line for line in run(*args))
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    "hook",
    [
        ["open", f"*/{UNFINISHED}/model_state.pdparams"],
        ["open", f"*/{UNFINISHED}/train_results.json"],
        ["os.rename", f"*/{UNFINISHED}/*", 3],
    ],
)
def test_a_kill_in_the_final_save(tmp_path, hook):
    """Without a checkpoint: what stands in the folder is whole, and the same command goes on."""
    args = [*TRAIN, *flags(output_dir=tmp_path, max_steps=2, save_strategy="no")]
    run(*args, hook=["fault_at_file", "SIGKILL", *hook], code=-signal.SIGKILL)
    names = {path.name for path in tmp_path.iterdir()}
    assert UNFINISHED in names and ("os.rename" in hook or "model_state.pdparams" not in names)
    run(*args)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"model_state.pdparams", "config.json", "train_results.json", "trainer_state.json"} <= left
    assert not {UNFINISHED, LOCK} & left and not list(tmp_path.rglob("*.tmp"))


def test_two_runs_in_one_folder(tmp_path):
    out = tmp_path / "out"
    args = [*TRAIN, *flags(output_dir=out, max_steps=1)]
    with open_run_folder(folder_arguments(out)):
        lines = run(*args, code=2)
        lock = (out / LOCK).read_bytes()
    assert lines[-1] == (
        f"finetune_generation.py: error: --output_dir {out} is in use by another run, process {os.getpid()} "
        f"on {socket.gethostname()}: wait for its end, or give another folder"
    )
    out.mkdir()
    (out / LOCK).write_bytes(lock)  # what a killed run leaves behind stops nobody
    run(*args)
    assert not (out / LOCK).exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_within_a_step(tmp_path, name):
    """Sent from within the third step, so that how fast the machine is does not matter."""
    args = [*TRAIN, *flags(output_dir=tmp_path, max_steps=6, save_steps=100)]
    lines = run(*args, hook=["fault", name, "training_step", 3], code=128 + signal.Signals[name])
    ending = f"stopped by {name} at step 3: the same command goes on from {tmp_path}/checkpoint-3"
    assert lines[-1].endswith(ending) and (tmp_path / "checkpoint-3" / MANIFEST).exists()
    assert any(f"resuming from {tmp_path}/checkpoint-3" in line for line in run(*args))
    assert sorted(losses(tmp_path)) == list(range(1, 7))


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_signal_in_the_last_step(tmp_path, strategy):
    """No evaluation is begun, and nothing is lost: the checkpoint is written, or else the model."""
    args = [*TRAIN, *flags(output_dir=tmp_path, max_steps=2, save_strategy=strategy)]
    args += ["--do_eval", *flags(evaluation_strategy="steps", eval_steps=2)]
    lines = run(*args, hook=["fault", "SIGTERM", "training_step", 2], code=143)
    saved = last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"
    assert saved == (strategy == "epoch") != (tmp_path / "model_state.pdparams").exists()
    assert ("stopped by SIGTERM at step 2: the same command goes on" in lines[-1]) == saved
    assert lines[-1].endswith(f"after the last step: the trained model is in {tmp_path}") != saved
    assert not (tmp_path / "eval_predictions.jsonl").exists()


def test_a_second_signal_in_a_backward_pass(tmp_path):
    """Paddle makes an OSError of what is raised there."""
    args = [*TRAIN, *flags(output_dir=tmp_path, max_steps=4, save_strategy="no")]
    lines = run(*args, hook=["two_signals_in_a_backward_pass"], code=143)
    assert "stopped by SIGTERM at step 1: there is no checkpoint" in lines[-1]
    assert "Traceback" not in "".join(lines)


def test_a_signal_in_an_evaluation_ends_it(tmp_path):
    """One that takes a minute: a signal from outside, when the first batch has begun."""
    slow = flags(num_beams=20, per_device_eval_batch_size=1, min_tgt_length=24)
    hook = ["fault", "nothing", "prediction_step"]
    evaluation = Run(*EVALUATE, *slow, "--output_dir", tmp_path, hook=hook)
    evaluation.wait_for("FAULT AT")
    time.sleep(0.2)
    evaluation.process.terminate()
    code, lines = evaluation.finish(30)
    assert code == 143 and lines[-1].endswith("stopped by SIGTERM")
    assert not list(tmp_path.glob("*_predictions*"))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "model_state.pdparams"])
def test_a_signal_while_loading_is_no_mistake_of_the_user(tmp_path, name):
    hook = ["fault_at_file", "SIGTERM", "open", f"*/{name}"]
    lines = run(*TRAIN, "--output_dir", tmp_path / "out", hook=hook, code=143)
    assert lines[-1] == "finetune_generation.py: error: stopped by SIGTERM"
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    args = [*TRAIN, *flags(output_dir=tmp_path, save_steps=2, max_steps=6)]
    hook = ["fault_at_file", "full disk", "open", "*/checkpoint-4/optimizer.pdopt"]
    lines = run(*args, hook=hook, code=1)
    assert "Traceback" not in "".join(lines)
    assert lines[-1].endswith(
        f"{tmp_path}/checkpoint-4 can't be written: No space left on device; "
        f"the same command goes on from {tmp_path}/checkpoint-2"
    )
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"
    run(*args)
    assert sorted(losses(tmp_path)) == list(range(1, 7))


def test_predictions_appear_whole_or_not_at_all(tmp_path):
    predictions = tmp_path / "eval_predictions.jsonl"
    predictions.write_text("those of the last run\n")
    hook = ["fault_at_file", "full disk", "open", "*/eval_predictions.jsonl.tmp"]
    lines = run(*EVALUATE, "--output_dir", tmp_path, hook=hook, code=1)
    assert "error: can't write" in lines[-1] and "No space left on device" in lines[-1]
    assert predictions.read_text() == "those of the last run\n"
    # Replaced, not written over: who has the old file open, or a link to it, goes on seeing it whole.
    os.link(predictions, tmp_path / "link")
    run(*EVALUATE, "--output_dir", tmp_path)
    assert (tmp_path / "link").read_text() == "those of the last run\n"
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == 60


def test_an_exception_in_the_loader_ends_the_run(tmp_path):
    hook = ["fault", "AssertionError", "__call__", 4]
    lines = run(*TRAIN, *flags(output_dir=tmp_path, max_steps=20), hook=hook, code=1)
    assert "AssertionError: AssertionError" in lines


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    """At the same step whether it is looked at every step or later; it says whether there is a checkpoint."""
    args = [*TRAIN, *flags(max_steps=20, lr_scheduler_type="constant", learning_rate=1e18)]
    named = []
    for logging_steps in (1, 5):
        folder = tmp_path / str(logging_steps)
        lines = run(*args, *flags(output_dir=folder, save_steps=1, logging_steps=logging_steps), code=1)
        assert "Traceback" not in "".join(lines)
        pattern = r"the (?:loss is not finite at|weights are not finite after) step (\d+): lower"
        named.append(re.search(pattern, lines[-1])[1])
    assert named[0] == named[1]
    lines = run(*args, *flags(output_dir=tmp_path / "none", save_steps=100, logging_steps=5), code=1)
    assert re.search(r"the loss is not finite at step 2: lower .*; there is no checkpoint", lines[-1])
