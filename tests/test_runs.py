"""Which run wrote what: what a run says of itself, and what going on with another run's checkpoint says."""

import json
import shutil
import signal

import pytest
from helpers import TINY_GLM, TRAIN, flags, losses, run, small_data

from glm.errors import InputError
from glm.outputs.checkpoints import read_mark
from glm.outputs.folder import RUN
from glm.outputs.runs import compare_runs, describe_run


class Group:
    """All the settings of a run."""

    def __init__(self, **changes):
        self.max_steps, self.num_train_epochs, self.seed, self.learning_rate = 6, 3.0, 42, 1e-3
        self.lr_scheduler_type, self.warmup_steps, self.warmup_ratio = "linear", 0, 0.0
        self.lr_decay_ratio, self.label_smoothing, self.weight_decay = 0.1, 0.1, 0.0
        self.max_grad_norm, self.src_length, self.tgt_length = 1.0, 160, 48
        self.group_by_length = True
        vars(self).update(changes)


def features(*questions):
    return [{"record": {"context": "c", "answer": "a", "question": question}} for question in questions]


def describe(model=TINY_GLM, questions=("who", "what"), **changes):
    return describe_run([Group(**changes)], str(model), None, None, features(*questions))


def line_of(before, now, capsys):
    mark = {"run": {"id": "a", "parent": None, **before}, "step": 3}
    compare_runs("out/checkpoint-3", mark, now, given=False)
    return capsys.readouterr().err


DIFFERENCES = [
    ({}, None),
    ({"questions": ("what", "who")}, "other texts in its 2 records"),
    ({"questions": ("who",)}, "records 2 -> 1"),
    ({"seed": 1, "learning_rate": 1e-4}, "seed 42 -> 1, learning_rate 0.001 -> 0.0001"),
    ({"max_steps": 9}, "max_steps 6 -> 9"),
    ({"max_steps": -1}, "max_steps 6 -> None, num_train_epochs None -> 3.0"),
    ({"num_train_epochs": 5}, None),  # max_steps says how long
]


@pytest.mark.parametrize("changes, text", DIFFERENCES)
def test_what_differs_is_one_line(capsys, monkeypatch, changes, text):
    lines = []
    monkeypatch.setattr("glm.outputs.runs.logger.train", lines.append)
    line_of(describe(), describe(**changes), capsys)
    prefix = "this run differs from the one that wrote out/checkpoint-3: "
    assert lines == ([prefix + text] if text else [])


def test_texts_don_t_run_into_each_other():
    assert describe(questions=("ab", "c"))["texts"] != describe(questions=("a", "bc"))["texts"]


def test_another_base_is_refused(tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(TINY_GLM, other)
    line_of(describe(), describe(model=other), capsys)  # a copy, or a folder that was moved
    weights = bytearray((other / "model_state.pdparams").read_bytes())
    weights[len(weights) // 2] ^= 1
    (other / "model_state.pdparams").write_bytes(weights)
    with pytest.raises(InputError, match=f"was trained from the weights of {TINY_GLM}, and not"):
        line_of(describe(), describe(model=other), capsys)
    before = describe(model=other)
    (other / "model_state.pdparams").write_bytes(b"changed")
    with pytest.raises(InputError, match="those have changed since: .* or start anew with --overwrite"):
        line_of(before, describe(model=other), capsys)
    # By the run itself, into the folder that it started from.
    (other / RUN).write_text(json.dumps({"id": "a", "parent": None, "model": 6}))
    line_of(before, describe(model=other), capsys)


def test_another_adapter_is_refused(capsys):
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["x"], "rslora": False}
    before, now = {**describe(), "adapter": adapter}, {**describe(), "adapter": {**adapter, "lora_alpha": 32}}
    with pytest.raises(InputError, match="--lora_alpha: .* has 16, and this run's has 32"):
        line_of(before, now, capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, and a run of 6 steps with a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("runs")
    small_data(folder, train=12)
    args = [*TRAIN, *flags(task_name=folder, save_steps=3)]
    run(*args, *flags(output_dir=folder / "out", max_steps=6))
    return folder, args


def said(lines, text):
    found = [line for line in lines if text in line]
    assert found, lines[-20:]
    return found[0]


def test_nothing_left_is_said_with_its_reason(trained, tmp_path):
    folder, args = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    args = [*args, "--output_dir", tmp_path / "out"]
    lines = run(*args, "--max_steps", 4)
    reason = f"{tmp_path}/out/checkpoint-6 is of step 6, and --max_steps 4 ends this run at step 4"
    assert said(lines, "nothing is left to train").endswith(reason)
    assert said(lines, "this run differs").endswith("max_steps 6 -> 4")
    lines = run(*args, "--num_train_epochs", 2, "--max_train_samples", 8)
    reason = "--num_train_epochs 2 over 8 records end this run at step 4"
    assert said(lines, "nothing is left to train").endswith(reason)


def test_a_run_that_overwrites_makes_the_folder_its_own(trained, tmp_path):
    folder, args = trained
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    args = [*args, *flags(output_dir=out, max_steps=9)]
    # Stopped before its first save: there is nothing of its own.
    stopped = [*args, "--overwrite_output_dir", "--save_strategy", "no"]
    lines = run(*stopped, hook=["fault", "SIGTERM", "training_step", 2], code=143)
    assert lines[-1].endswith("stopped by SIGTERM at step 2: there is no checkpoint to resume from")
    said(run(*args, code=2), "holds a model and no checkpoint to resume from")
    # Stopped after it: it goes on with its own, though another run had come further.
    hook = ["fault", "SIGTERM", "training_step", 4]
    lines = run(*args, "--overwrite_output_dir", hook=hook, code=143)
    said(lines, f"without --overwrite_output_dir goes on from {out}/checkpoint-4")
    lines = run(*args)
    said(lines, "another run wrote checkpoint-6 in")
    said(lines, f"resuming from {out}/checkpoint-4")


def test_a_checkpoint_that_is_given_begins_a_line_of_its_own(trained, tmp_path):
    """Going back to step 3 and killed there, the plain command goes on from step 3 again, not from 6."""
    folder, args = trained
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    args = [*args, *flags(output_dir=out, max_steps=9)]
    hook = ["fault", "SIGKILL", "training_step", 2]
    run(*args, "--resume_from_checkpoint", out / "checkpoint-3", hook=hook, code=-signal.SIGKILL)
    said(run(*args), f"resuming from {out}/checkpoint-3")
    assert read_mark(out / "checkpoint-9")["run"]["parent"][1] == 3
    said(run(*args), f"resuming from {out}/checkpoint-9")


def test_the_best_checkpoint_that_was_moved_or_lost(trained, tmp_path):
    folder, args = trained
    best = ["--do_eval", "--load_best_model_at_end", "--metric_for_best_model", "loss"]
    best += flags(greater_is_better="False", evaluation_strategy="steps", eval_steps=3)
    args = [*args, *best]
    # The first evaluation is the best one: afterwards training makes it worse.
    run(*args, *flags(output_dir=tmp_path / "one", max_steps=6, learning_rate=0.3, warmup_steps=3))
    state = json.loads((tmp_path / "one/trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-3")
    shutil.move(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    shutil.rmtree(tmp_path / "three/checkpoint-3")
    args += flags(max_steps=7, learning_rate=1e-9, save_steps=6, eval_steps=6)
    lines = run(*args, "--output_dir", tmp_path / "two")
    said(lines, f"the weights are those of {tmp_path}/two/checkpoint-3")
    lines = run(*args, "--output_dir", tmp_path / "three")
    said(lines, f"the best checkpoint, {tmp_path}/one/checkpoint-3, is gone or damaged")
    assert (tmp_path / "three/model_state.pdparams").exists()


def test_early_stopping_counts_on(trained, tmp_path):
    folder, args = trained
    args = [*args, "--do_eval", "--load_best_model_at_end", *flags(metric_for_best_model="loss")]
    args += flags(greater_is_better="False", evaluation_strategy="steps", eval_steps=3, max_steps=30)
    args += flags(early_stopping_patience=2, learning_rate=0.0)
    hook = ["fault", "SIGKILL", "training_step", 8]
    run(*args, "--output_dir", tmp_path / "out", hook=hook, code=-signal.SIGKILL)
    run(*args, "--output_dir", tmp_path / "out")
    assert (tmp_path / "out/checkpoint-9").exists() and not (tmp_path / "out/checkpoint-12").exists()
    lines = run(*args, "--output_dir", tmp_path / "out")
    said(lines, "checkpoint-9 is of step 9, where --early_stopping_patience 2 ended this run")


def test_losses_are_of_their_own_batch_without_skipping_data(trained, tmp_path):
    """In an epoch that begins anew: each is divided by the target tokens of the batch that it is of."""
    folder, args = trained
    args = [*args, *flags(learning_rate=1e-12, group_by_length="False", max_steps=8, save_steps=2)]
    run(*args, "--output_dir", tmp_path / "one")
    args += ["--resume_from_checkpoint", tmp_path / "one/checkpoint-2", "--output_dir", tmp_path / "two"]
    run(*args, "--ignore_data_skip", "True")
    first = losses(tmp_path / "one")
    expected = {step: first[1 + (step - 3) % 3] for step in (3, 4, 5)}  # the first epoch again
    found = {step: loss for step, loss in losses(tmp_path / "two").items() if step in expected}
    assert found == pytest.approx(expected, abs=1e-3)


def test_what_is_written_of_a_resumed_run_is_of_its_own_steps(trained, tmp_path):
    folder, args = trained
    shutil.copytree(folder / "out", tmp_path / "out")
    run(*args, *flags(output_dir=tmp_path / "out", max_steps=9))
    results = json.loads((tmp_path / "out/train_results.json").read_text())
    assert (results["train_first_step"], results["train_last_step"]) == (7, 9)
    assert results["train_steps_per_second"] == pytest.approx(3 / results["train_runtime"], rel=0.01)
    assert results["train_samples_per_second"] == pytest.approx(12 / results["train_runtime"], rel=0.01)
    found = losses(tmp_path / "out")
    assert results["train_loss"] == pytest.approx(sum(found[step] for step in (7, 8, 9)) / 3, abs=1e-3)
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    logged = [row["train_loss"] for row in history if "train_loss" in row]
    assert logged[-1] == results["train_loss"]


def test_weights_without_their_optimizer_begin_at_the_first_step(trained, tmp_path):
    folder, args = trained
    args = [*args, *flags(output_dir=tmp_path / "out", max_steps=2, save_steps=1)]
    args += ["--resume_from_checkpoint", folder / "out/checkpoint-6", "--ignore_load_lr_and_optim", "True"]
    run(*args)
    results = json.loads((tmp_path / "out/train_results.json").read_text())
    assert (results["train_first_step"], results["train_last_step"]) == (1, 2)
    assert read_mark(tmp_path / "out/checkpoint-2")["run"]["parent"] is None
