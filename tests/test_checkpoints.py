"""Checkpoints: which one a run goes on from, what it moves aside and removes, and what is none."""

import errno
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    TINY_GLM,
    TRAIN,
    flags,
    last_checkpoint,
    losses,
    make_trainer,
    random_glm,
    run,
    run_folder,
    small_data,
)
from paddlenlp.trainer.trainer_callback import TrainerState

from glm.errors import Fault, InputError
from glm.files import dump_json
from glm.outputs.checkpoints import Run, compute_checksums, open_checkpoint, read_run
from glm.outputs.layout import INCOMPLETE, MANIFEST, RUN, TRAINER_STATE
from glm.outputs.resuming import compare_training, describe_training, keep_global_batch_size
from glm.training.saving import SaveCheckpoints

STATE = {"global_step": 3, "log_history": [{"loss": 1.5, "step": 3}], "epoch": 1.5, "total_flos": 1e21}
NO_MODEL = SimpleNamespace(state_dict=dict)


def write_checkpoint(folder, step, run="a", parent=None, **manifest):
    """A checkpoint as a run of that id writes it; one of an old version, which told no run, with run None."""
    path = Path(folder, f"checkpoint-{step}")
    path.mkdir(parents=True)
    for name in ("model_state.pdparams", "optimizer.pdopt", "scheduler.pdparams"):
        (path / name).write_bytes(b"x")
    (path / TRAINER_STATE).write_text(json.dumps({**STATE, "global_step": step}))
    if run:
        manifest = {"step": step, "run": {"id": run, "parent": parent}, **manifest}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def saver(folder, limit=None, run="a"):
    """The callback in a run that has begun; a function that saves a step as the Trainer would."""
    made = run_folder(folder)
    made.run = made.new_run = Run(run)
    callback = SaveCheckpoints(made, limit)

    def save(step, best=None):
        state = SimpleNamespace(global_step=step, best_model_checkpoint=best and str(best))
        callback.on_step_end(made.args, state, SimpleNamespace(should_save=True))
        (folder / f"checkpoint-{step}" / TRAINER_STATE).write_text(json.dumps({"global_step": step}))
        callback.on_save(made.args, state, None, model=NO_MODEL)

    return callback, save


def steps(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


# Written.


def test_a_checkpoint_that_is_written_anew_is_not_complete_meanwhile(tmp_path):
    path = write_checkpoint(tmp_path, 4)
    (path / "lora_model_state.pdparams").touch()  # of a run of another kind
    callback, _ = saver(tmp_path)
    args, state = callback.folder.args, SimpleNamespace(global_step=4, best_model_checkpoint=None)
    callback.on_step_end(args, state, SimpleNamespace(should_save=False))
    assert (path / MANIFEST).exists()
    callback.on_step_end(args, state, SimpleNamespace(should_save=True))
    assert [entry.name for entry in path.iterdir()] == [INCOMPLETE]
    (path / TRAINER_STATE).write_text('{"global_step": 4, "consumed_samples": 32, "best_metric": NaN}')
    model = SimpleNamespace(state_dict=lambda: {"w": SimpleNamespace(name="w_0")})
    callback.on_save(args, state, None, model=model)
    text = b'{\n  "best_metric": null,\n  "global_step": 4\n}'
    assert json.loads((path / MANIFEST).read_text()) == {
        "files": {TRAINER_STATE: [len(text), hashlib.blake2b(text, digest_size=16).hexdigest()]},
        "parameters": {"w_0": "w"},
        "records": 24,
        "step": 4,
        "run": {"id": "a", "parent": None},
    }
    # PaddleNLP 2 refuses what PaddleNLP 3 adds to the state; JSON has no NaN.
    assert (path / TRAINER_STATE).read_bytes() == text
    assert open_checkpoint(path).parameters == {"w_0": "w"} and last_checkpoint(tmp_path) == str(path)
    control = SimpleNamespace(should_save=True)  # again, for an evaluation that was cancelled
    callback.on_step_end(args, state, control)
    assert not control.should_save and (path / MANIFEST).exists()


LIMITS = [
    (2, None, [3, 4]),
    (2, 1, [1, 4]),
    (1, 1, [1, 4]),
    (1, None, [4]),
    (3, 2, [2, 3, 4]),
    (9, None, [1, 2, 3, 4]),
]


@pytest.mark.parametrize("limit, best, kept", LIMITS)
def test_the_newest_and_the_best_checkpoint_stay(tmp_path, limit, best, kept):
    _, save = saver(tmp_path, limit)
    for number in range(1, 5):
        save(number, best and tmp_path / f"checkpoint-{best}")
        os.utime(tmp_path / f"checkpoint-{number}", (1000 - number, 1000 - number))
    assert steps(tmp_path) == [f"checkpoint-{number}" for number in kept]


def test_what_a_run_did_not_write_it_does_not_remove(tmp_path):
    """A limit takes this run's alone, its incomplete ones first; where it writes, others are moved aside."""
    write_checkpoint(tmp_path, 1, run="b")
    (write_checkpoint(tmp_path, 2) / MANIFEST).unlink()  # copied without it
    write_checkpoint(tmp_path / "disk", 3)
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "disk/checkpoint-3")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / INCOMPLETE).write_text("a")  # killed while it was written
    write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 6, run="b")
    (tmp_path / "checkpoint-7").write_text("mine")
    (tmp_path / "checkpoint-8").symlink_to(tmp_path / "disk")
    callback, save = saver(tmp_path, limit=2)
    for number in (6, 7, 8):
        save(number)
    assert steps(tmp_path) == [f"checkpoint-{number}" for number in (1, 2, 3, 7, 8)]
    aside = callback.folder.aside
    assert (aside / "checkpoint-6/model_state.pdparams").exists()
    assert (aside / "checkpoint-7").read_text() == "mine" and (aside / "checkpoint-8").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["checkpoint-3"]


def test_paddlenlp_removes_no_checkpoint(tmp_path):
    """It would before the new one is complete; SaveCheckpoints does afterwards."""
    trainer = make_trainer(tmp_path, random_glm(), save_total_limit=2)
    assert trainer.args.save_total_limit is None and trainer.checkpoints.limit == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_waits_for_a_process_that_is_gone_is_not_unwritable(tmp_path, processes):
    """Then the collective's error ends the process, and the folder stays as it was."""
    unwritable = OSError(28, "No space left on device")
    collective = OSError("(External) NCCL error")  # as Paddle raises it, without a number
    for error in (unwritable, collective, ConnectionResetError(104, "Connection reset by peer")):
        callback = SaveCheckpoints(run_folder(tmp_path))
        callback.saving = tmp_path / "checkpoint-2"
        callback.saving.mkdir(exist_ok=True)
        (callback.saving / INCOMPLETE).write_text(callback.folder.new_run.id)
        args = SimpleNamespace(world_size=processes)
        with pytest.raises(BaseException) as raised:
            with callback.failing_as_fault(args, SimpleNamespace(should_evaluate=False)):
                raise error
        file_failed = error is unwritable or (error is collective and processes == 1)
        assert isinstance(raised.value, Fault) == file_failed
        assert callback.saving.is_dir() != file_failed


# Found again.

ORDERS = [
    (None, (None, None), 9),  # older versions, of whose runs nothing is known
    (("a", None), ("a", None), 9),
    (None, ("a", None), 9),
    (("a", None), ("b", None), None),  # written over by another run
    (("b", ["a", 6]), ("a", None), 6),  # which went on from step 6
    (("a", None), (None, None), None),
    (("c", [None, 6]), (None, None), 6),
]


@pytest.mark.parametrize("folder_run, checkpoint_run, last", ORDERS)
def test_the_last_checkpoint_is_of_the_folders_own_run(tmp_path, folder_run, checkpoint_run, last):
    """By the steps that they tell of themselves, whatever the times of their files."""
    if folder_run:
        values = {"id": folder_run[0], "parent": folder_run[1], "base": "x", "settings": {}}
        (tmp_path / RUN).write_text(json.dumps(values))
    for time, step in enumerate((12, 9, 6, 3)):
        path = write_checkpoint(tmp_path, step, *checkpoint_run)
        os.utime(path / MANIFEST, (1000 + time, 1000 + time))
    (tmp_path / "checkpoint-12" / MANIFEST).unlink()
    (tmp_path / "checkpoint-12" / TRAINER_STATE).unlink()  # not written to its end
    assert last_checkpoint(tmp_path) == (last and f"{tmp_path}/checkpoint-{last}")


@pytest.mark.parametrize(
    "name", ["checkpoint-", "checkpoint-x-5", "checkpoint-٥", "checkpoint-5²", "checkpoint-" + "9" * 200]
)
def test_other_names_are_no_checkpoints(tmp_path, name):
    write_checkpoint(tmp_path, 3).rename(tmp_path / name)
    assert last_checkpoint(tmp_path) is None


def test_a_copy_without_its_manifest_is_not_begun_anew(tmp_path):
    path = write_checkpoint(tmp_path, 3)
    (path / MANIFEST).unlink()
    with pytest.raises(
        InputError, match="holds checkpoint-3, which can't be gone on with .* give one by --resume"
    ):
        last_checkpoint(tmp_path)
    args = {"resume_from_checkpoint": str(path)}
    assert str(run_folder(tmp_path, **args).find_checkpoint(lora=False)) == str(path)
    assert run_folder(tmp_path, overwrite_output_dir=True).find_checkpoint(lora=False) is None
    (path / INCOMPLETE).write_text("a")  # a run was killed while it wrote it
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_of_another_user_is_not_begun_anew(tmp_path, monkeypatch):
    """A folder that can't be searched, as the system tells everyone but root."""
    path, before = write_checkpoint(tmp_path, 6), write_checkpoint(tmp_path, 3)

    def refuse(name, stat):
        def refusing(asked, **options):
            if str(asked).startswith(f"{path}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(asked))
            return stat(asked, **options)

        monkeypatch.setattr(os, name, refusing)

    for name in ("stat", "lstat"):
        refuse(name, getattr(os, name))
    assert last_checkpoint(tmp_path) == str(before)
    folder = run_folder(tmp_path)
    [(skipped, reason, meant)] = folder.list_checkpoints()[1]
    assert skipped == path and meant and "Permission denied" in reason
    given = run_folder(tmp_path, resume_from_checkpoint=str(path))
    with pytest.raises(InputError, match=f"{path}: its {MANIFEST} can't be read .*Permission denied"):
        given.find_checkpoint(lora=False)
    shutil.rmtree(before)
    with pytest.raises(InputError, match="holds checkpoint-6, which can't be gone on with"):
        folder.find_checkpoint(lora=False)


def test_the_resume_hint_names_the_flags_that_would_do_otherwise(tmp_path):
    def hint(began=True, **changes):
        folder = run_folder(tmp_path, **changes)
        folder.training_began = began
        return folder.resume_hint()

    assert hint() == "there is no checkpoint to resume from"
    write_checkpoint(tmp_path, 3)
    goes_on = f"goes on from {tmp_path}/checkpoint-3"
    assert hint(began=False) == hint() == f"the same command {goes_on}"
    changes = {"overwrite_output_dir": True}
    assert hint(**changes) == f"the same command without --overwrite_output_dir {goes_on}"
    assert hint(began=False, **changes) == hint(do_train=False) == "the same command starts again"
    changes["resume_from_checkpoint"] = "elsewhere"
    without = "without --overwrite_output_dir and --resume_from_checkpoint"
    assert hint(**changes) == f"the same command {without} {goes_on}"


@pytest.mark.parametrize("where", ["moved along", "here", "where it was", "gone", "another run's", "damaged"])
def test_the_best_checkpoint_is_found_by_its_name(tmp_path, where):
    old, new = tmp_path / "old", tmp_path / "new"
    folder = run_folder(new)
    folder.new_run = Run("a")
    home = old if where == "where it was" else new
    if where != "gone":
        files = {"files": {"model_state.pdparams": [9, "x"]}} if where == "damaged" else {}
        write_checkpoint(home, 3, run="x" if where == "another run's" else "a", **files)
    if where == "moved along":
        folder = run_folder(tmp_path / "other")
        folder.resumed = open_checkpoint(write_checkpoint(new, 6))
    expected = None if where in ("gone", "another run's", "damaged") else f"{home}/checkpoint-3"
    best = folder.find_best(f"{old}/checkpoint-3")
    assert (best and str(best)) == expected


BESTS = [
    ("loss", False, ["loss", False], 3, 6.5),
    ("eval_loss", False, ["loss", False], 3, 6.5),
    ("rougel", True, ["loss", False], 6, 0.2),
    ("rougel", False, ["rougel", True], 3, 0.1),
    ("loss", True, ["loss", False], 6, 7),
    ("bleu4", True, ["loss", False], None, None),  # by which none was evaluated
    ("loss", False, None, 3, 6.5),  # an old version's: by the history
    ("rougel", True, None, 6, 0.2),
]


@pytest.mark.parametrize("metric, greater, recorded, step, value", BESTS)
def test_a_best_belongs_to_its_metric_and_direction(tmp_path, metric, greater, recorded, step, value):
    """By another one it is the best of those that were evaluated and are here: the ninth is gone."""
    callback, _ = saver(tmp_path)
    write_checkpoint(tmp_path, 3)
    resumed = callback.folder.resumed = open_checkpoint(write_checkpoint(tmp_path, 6, best_of=recorded))
    history = [
        {"step": 3, "eval_loss": 6.5, "eval_rougel": 0.1},
        {"step": 5, "eval_loss": 0, "eval_rougel": 1.0},
        {"step": 6, "eval_loss": 7, "eval_rougel": 0.2},
        {"step": "../../x", "eval_loss": -1.0, "eval_rougel": "1"},
    ]
    state = TrainerState(log_history=history, best_metric=6.5, best_model_checkpoint="old/checkpoint-3")
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater)
    kept = callback.settle_best(args, state, resumed, {"loss": "x", "text": "y"})  # the file says neither
    assert kept == ((step, value) == (3, 6.5))
    found = (state.best_model_checkpoint, state.best_metric)
    assert found == (step and str(tmp_path / f"checkpoint-{step}"), value)
    again = TrainerState(log_history=[], best_metric=6.5)  # as the Trainer reads it
    callback.on_train_begin(args, again, None)
    assert (again.best_model_checkpoint, again.best_metric, again.log_history) == (*found, history)


@pytest.mark.parametrize(
    "metric, now, step",
    [
        ("loss", {"loss": "l", "text": "t"}, 3),
        ("loss", {"loss": "l", "text": "other"}, 3),
        ("loss", {"loss": "other", "text": "t"}, None),
        ("loss", {}, 3),
        ("rougel", {"loss": "other", "text": "t"}, 6),
        ("rougel", {"loss": "l", "text": "other"}, None),
    ],
)
def test_a_best_is_of_comparable_evaluations(tmp_path, metric, now, step):
    callback, _ = saver(tmp_path)
    write_checkpoint(tmp_path, 3)
    manifest = {"best_of": ["loss", False], "measures": {"loss": "l", "text": "t"}}
    resumed = callback.folder.resumed = open_checkpoint(write_checkpoint(tmp_path, 6, **manifest))
    history = [
        {"step": 3, "eval_loss": 6.5, "eval_rougel": 0.1},
        {"step": 6, "eval_loss": 7, "eval_rougel": 1},
    ]
    state = TrainerState(log_history=history, best_metric=6.5, best_model_checkpoint="old/checkpoint-3")
    args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=metric != "loss")
    assert callback.settle_best(args, state, resumed, now) == (step == 3)
    assert state.best_model_checkpoint == (step and str(tmp_path / f"checkpoint-{step}"))
    assert (state.best_metric is None) == (step is None)


@pytest.mark.parametrize("value", [math.nan, math.inf, pytest.param(10**400, id="huge"), True])
@pytest.mark.parametrize("greater", [True, False])
def test_what_is_no_number_is_no_best(tmp_path, value, greater):
    """Nothing would be better than NaN, or than infinity."""
    callback, _ = saver(tmp_path)
    write_checkpoint(tmp_path, 3)
    resumed = callback.folder.resumed = open_checkpoint(
        write_checkpoint(tmp_path, 6, best_of=["loss", False])
    )
    wrong = value if greater or value is True else -value
    history = [{"step": 3, "eval_rougel": wrong}, {"step": 6, "eval_rougel": 0.2 if greater else 2.0}]
    state = TrainerState(log_history=history, best_metric=6.5, best_model_checkpoint="old/checkpoint-3")
    args = SimpleNamespace(metric_for_best_model="rougel", greater_is_better=greater)
    callback.settle_best(args, state, resumed, {})
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert state.best_metric == history[1]["eval_rougel"]


def test_the_best_of_the_run_before_the_last_is_found(tmp_path, monkeypatch):
    """Three runs, each in a folder of its own, that went on from one another; and by another spelling."""
    best = write_checkpoint(tmp_path / "one", 3)
    last = write_checkpoint(tmp_path / "two", 9, run="b", best_run="a")
    folder = run_folder(tmp_path / "three")
    folder.resumed = open_checkpoint(last)
    assert str(folder.find_best(str(best))) == str(best)
    monkeypatch.chdir(tmp_path)
    folder = run_folder("one")
    folder.new_run, folder.resumed = Run("a"), open_checkpoint(write_checkpoint(tmp_path / "one", 6))
    assert str(folder.find_best(str(best))) == "one/checkpoint-3"


# What begins, and what it moves aside.


def begin(folder, checkpoint, **changes):
    made = run_folder(folder, **changes)
    made.new_run = Run("new")
    made.resumed = checkpoint and open_checkpoint(checkpoint)
    made.new_run, made.to_move = made._choose_run(made.resumed)
    made.begin_run()
    assert read_run(folder) == made.run == made.new_run
    moved = steps(made.aside) if made.aside.exists() else []
    return made.run.id, [int(name[11:]) for name in moved]


BEGINNINGS = [
    ("anew", {"overwrite_output_dir": True}, None, "new", [3, 6, 9]),
    ("last", {}, 9, "a", []),
    ("last, given", {"resume_from_checkpoint": "x"}, 9, "a", []),
    ("earlier, given", {"resume_from_checkpoint": "x"}, 3, "a", [6, 9]),
    ("weights alone", {"ignore_load_lr_and_optim": True}, 6, "new", [3, 9]),
    ("elsewhere", {"resume_from_checkpoint": "x"}, "elsewhere", "new", [3, 6, 9]),
]


@pytest.mark.parametrize("how, changes, step, run, moved", BEGINNINGS)
def test_which_run_begins(tmp_path, how, changes, step, run, moved):
    out = tmp_path / "out"
    for number in (3, 6, 9):
        write_checkpoint(out, number)
    (out / RUN).write_text('{"id": "a", "parent": null, "model": 9}')
    path = (
        write_checkpoint(tmp_path / "x", 6, run="b")
        if step == "elsewhere"
        else step and out / f"checkpoint-{step}"
    )
    assert begin(out, path, **changes) == (run, moved)
    # The model of step 9 that lies there is this run's, unless it goes another way to that step.
    assert read_run(out).model == (9 if (run, moved) == ("a", []) else None)
    assert steps(out) == [f"checkpoint-{number}" for number in (3, 6, 9) if number not in moved]


def test_a_checkpoint_that_can_t_be_moved_aside_is_a_line(tmp_path, monkeypatch):
    """One that is read-only, as a copy from such a disk."""
    write_checkpoint(tmp_path, 3, run="b")

    def rename(path, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "rename", rename)
    expected = f"--output_dir {tmp_path} can't be used .*Permission denied: '{tmp_path}/checkpoint-3'"
    with pytest.raises(InputError, match=expected):
        begin(tmp_path, None)


def test_a_later_checkpoint_that_can_t_be_moved_is_a_line_before_the_work(tmp_path, monkeypatch):
    """A run that skipped it writes another one in its place."""
    paths = [write_checkpoint(tmp_path, step) for step in (3, 6, 9)]
    monkeypatch.setattr(os, "access", lambda path, mode: path != paths[1])  # root may all
    folder = run_folder(tmp_path)
    folder.check_contents(open_checkpoint(paths[2]))
    folder.check_contents(open_checkpoint(paths[1]))
    run_folder(tmp_path, do_train=False).check_contents(None, replaces=False)
    with pytest.raises(InputError, match="checkpoint-6 may not be moved by this user: move it"):
        folder.check_contents(open_checkpoint(paths[0]))
    paths[1].rename(tmp_path / "elsewhere")
    paths[1].symlink_to("elsewhere")
    folder.check_contents(open_checkpoint(paths[0]))


def test_a_run_of_an_old_version_is_gone_on_with(tmp_path):
    """Its checkpoints tell no run, and stay those that the folder's run goes on from."""
    write_checkpoint(tmp_path, 3, run=None)
    assert begin(tmp_path, write_checkpoint(tmp_path, 6, run=None)) == ("new", [])
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-6"
    write_checkpoint(tmp_path, 9, run=None)  # of no run that is known
    assert last_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-6"


# What differs.


def describe(model=TINY_GLM, questions=("who", "what"), weights="w", **changes):
    records = [{"context": "c", "answer": "a", "question": question} for question in questions]
    values = {"max_steps": 6, "num_train_epochs": 3.0, "seed": 42, "learning_rate": 1e-3, **changes}
    pretrained = SimpleNamespace(name=str(model), fingerprint=weights, adapter=None)
    return describe_training(values, pretrained, records)


def compare(tmp_path, before, now, replaced=False):
    path = write_checkpoint(tmp_path, 3)
    (path / MANIFEST).write_text(json.dumps({"run": {"id": "a", "parent": None, **before}}))
    compare_training(open_checkpoint(path), now, replaced, given=False)


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
def test_what_differs_is_one_line(tmp_path, monkeypatch, changes, text):
    lines = []
    monkeypatch.setattr("glm.outputs.resuming.logger.train", lines.append)
    compare(tmp_path, describe(), describe(**changes))
    prefix = f"this run differs from the one that wrote {tmp_path}/checkpoint-3: "
    assert lines == ([prefix + text] if text else [])


def test_texts_don_t_run_into_each_other():
    assert describe(questions=("ab", "c"))["texts"] != describe(questions=("a", "bc"))["texts"]


def test_another_base_is_refused(tmp_path):
    other = str(tmp_path / "other")
    compare(tmp_path / "1", describe(), describe(model=other))  # a copy, or a folder that was moved
    with pytest.raises(InputError, match=f"was trained from the weights of {TINY_GLM}, and not {other}"):
        compare(tmp_path / "2", describe(), describe(model=other, weights="v"))
    with pytest.raises(InputError, match="those have changed since: .* or start anew with --overwrite"):
        compare(tmp_path / "3", describe(), describe(weights="v"))
    # By the run itself, into the folder that it started from.
    compare(tmp_path / "4", describe(), describe(weights="v"), replaced=True)


def test_another_adapter_is_refused(tmp_path):
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["x"], "rslora": False}
    before, now = {**describe(), "adapter": adapter}, {**describe(), "adapter": {**adapter, "lora_alpha": 32}}
    with pytest.raises(InputError, match="--lora_alpha: .* has 16, and this run's has 32"):
        compare(tmp_path, before, now)


# Of a stranger.

DEEP = "[" * 100_000
MANIFESTS = {
    "list": "[]",
    "null": "null",
    "deep": DEEP,
    "no JSON": "{",
    "bad UTF-8": b"\xff",
    **{
        f"step {value!r}": {"step": value}
        for value in ("x", [1], 10**30, float("inf"), -1, True, 2.5, 2**31, None)
    },
    "a list as a setting": {"run": {"settings": {"seed": ["x"]}}},
    **{f"null {name}": {name: None} for name in ("files", "run", "evaluation_is_due", "steps_ahead")},
    **{
        f"{part} {value!r:.20}": {"run": {"settings": {}, part: {"r": value}}}
        for part in ("settings", "adapter")
        for value in ({}, [5], [[]], ["\ud800"], "x" * 20_000, float("nan"), 10**400)
    },
    **{f"files {value!r}": {"files": value} for value in (["a"], 5, {"a": 5}, {"a": [1]}, {"a": [1, 2]})},
    **{
        f"files {name!r:.20}": {"files": {name: [1, "x"]}}
        for name in ("/dev/zero", "/etc/passwd", "../x", "..", "a/b", "", "a\0b")
    },
    **{f"parameters {value!r}": {"parameters": value} for value in (["a"], 5, {"a": 5})},
    **{f"records {value!r}": {"records": value} for value in ("x", 0, -4, 10**30, 2.5, [1])},
    **{f"run {value!r}": {"run": value} for value in ([], 5, {"id": 5}, {"parent": 5}, {"parent": ["a"]})},
    **{
        f"run {value!r}": {"run": value}
        for value in ({"parent": ["a", "z"]}, {"parent": ["a", -1]}, {"settings": 5}, {"adapter": 5})
    },
    **{f"run {value!r}": {"run": value} for value in ({"base": 5}, {"records": -1}, {"texts": 5})},
    **{f"patience {value!r}": {"evaluations_without_better": value} for value in ("x", 10**30, -1)},
    "best_run": {"best_run": 5},
    **{f"measures {value!r}": {"measures": value} for value in (5, ["x"], {"loss": 5}, {"text": None})},
    **{f"best_of {value!r}": {"best_of": value} for value in (5, ["loss"], ["loss", 0], [True, True])},
}
STATES = {
    "list": "[]",
    "deep": DEEP,
    "no step": {"global_step": None},
    **{f"step {value!r}": {"global_step": value} for value in ("x", -5, 10**30, 2.5, 2**31)},
    **{f"history {value!r}": {"log_history": value} for value in (5, None, [5], [{"loss": [1]}])},
    **{f"best {value!r:.20}": {"best_model_checkpoint": value} for value in (5, "a\0b", "x" * 5000)},
    **{f"metric {value!r:.20}": {"best_metric": value} for value in ("x", float("nan"), 10**400)},
    **{f"epoch {value!r:.20}": {"epoch": value} for value in (float("inf"), -(10**400))},
    "a deep value": {"trial_params": json.loads("[" * 400 + "]" * 400)},
    **{f"{name} of text": {name: "x"} for name in ("epoch", "max_steps", "total_flos", "evil")},
}


def put(path, content):
    if isinstance(content, dict):
        content = json.dumps({**(json.loads(path.read_text())), **content})
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_of_another_shape_is_a_line(tmp_path, content):
    path = write_checkpoint(tmp_path, 3)
    put(path / MANIFEST, content)
    with pytest.raises(InputError, match="holds checkpoint-3, which can't be gone on with"):
        last_checkpoint(tmp_path)
    with pytest.raises(InputError, match=f"--resume_from_checkpoint {path}: its {MANIFEST} can't be read"):
        run_folder(tmp_path, resume_from_checkpoint=str(path)).find_checkpoint(lora=False)
    assert run_folder(tmp_path).resume_hint() == "there is no checkpoint to resume from"


@pytest.mark.parametrize("content", STATES.values(), ids=STATES.keys())
def test_a_trainer_state_of_another_shape_is_a_line(tmp_path, content):
    path = write_checkpoint(tmp_path, 3)
    assert run_folder(tmp_path).find_checkpoint(lora=False).read_state().total_flos == 1e21
    put(path / TRAINER_STATE, content)
    with pytest.raises(InputError, match=f"{path} can't be loaded .its {TRAINER_STATE}: "):
        run_folder(tmp_path).find_checkpoint(lora=False)


@pytest.mark.parametrize("run", ["a", None])
def test_no_step_is_taken_over_that_a_later_run_would_refuse(tmp_path, run):
    """In .run.json it would stand as the model's, or as the last one of the run before."""
    for step in (2**31 - 1, 2**31):
        path = write_checkpoint(tmp_path / str(step), step, run)
        values = {"step": 3} if run else {}
        put(path / MANIFEST, {**json.loads((path / MANIFEST).read_text()), **values})
        put(path / TRAINER_STATE, {"global_step": 3})
        folder = run_folder(tmp_path / str(step), resume_from_checkpoint=str(path))
        if step < 2**31:
            folder.run, _ = folder._choose_run(folder.find_checkpoint(lora=False))
            (folder.path / RUN).write_text(dump_json(folder.run._asdict()))
            assert read_run(folder.path) == folder.run
        else:
            with pytest.raises(InputError, match="its number is that of no step"):
                folder.find_checkpoint(lora=False)


def test_steps_that_no_run_has_done_are_a_line(tmp_path):
    """Steps ahead of the records, more than the steps: 2 billion would be left to train."""
    path = write_checkpoint(tmp_path, 3, steps_ahead=3)
    assert run_folder(tmp_path).find_checkpoint(lora=False).steps_ahead == 3
    put(path / MANIFEST, {"steps_ahead": 2**31 - 1})
    with pytest.raises(InputError, match="its 'global_step' is under the 'steps_ahead'"):
        run_folder(tmp_path).find_checkpoint(lora=False)


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to(path.parent)])
def test_what_is_in_the_place_of_those_moved_aside_is_a_line(tmp_path, make):
    made, path = run_folder(tmp_path), write_checkpoint(tmp_path, 3)
    make(made.aside)
    with pytest.raises(InputError, match="superseded-.* is no folder, and in the way of one: remove it"):
        made.move_aside([path])
    assert path.is_dir()


def test_a_file_of_holes_is_not_read_to_its_end(tmp_path):
    """A terabyte of nothing; and one that has another size than it should have."""
    path = write_checkpoint(tmp_path, 3, files={"optimizer.pdopt": [1 << 40, "x"]})
    for size in (1 << 40, 1 << 41):
        os.truncate(path / "optimizer.pdopt", size)
        assert (
            open_checkpoint(path).find_damage()
            == f"its optimizer.pdopt is not what was written ({size} bytes)"
        )
        assert compute_checksums(path, ["optimizer.pdopt"])["optimizer.pdopt"] == [size, None]


@pytest.mark.parametrize("size", [0, 1, 1 << 16, 5 << 20, 50 << 20])
def test_an_honest_file_may_have_holes(tmp_path, size):
    """As a copy of moments that are zero in large part."""
    path = tmp_path / "optimizer.pdopt"
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"x" * (size // 50))
    data = path.read_bytes()
    expected = [len(data), hashlib.blake2b(data, digest_size=16).hexdigest()]
    assert compute_checksums(tmp_path, [path.name]) == {path.name: expected}


@pytest.mark.parametrize(
    "batch_size, processes, passes, size, expected",
    [
        (4, 1, 2, 16, 4),
        (4, 2, 2, 8, 1),
        (2, 2, 3, 12, 3),
        (8, 1, 4, 8, 1),
        (4, 2, 1, 12, 1),
        (4, 1, 2, None, 2),
    ],
)
def test_updates_stay_of_as_many_records(batch_size, processes, passes, size, expected):
    """By the passes of this run's batch, where they go into it: 12 records are not two of 8."""
    args = SimpleNamespace(
        gradient_accumulation_steps=passes, global_batch_size=batch_size * processes * passes
    )
    keep_global_batch_size(args, size)
    assert args.gradient_accumulation_steps == expected


def test_a_checkpoint_may_be_named_in_any_way(tmp_path, monkeypatch):
    """By a link, by ".", by a path through its folder: it lies in the folder, and is not moved aside."""
    for step in (3, 6):
        write_checkpoint(tmp_path / "out", step)
    path = tmp_path / "out/checkpoint-3"
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(path)
    for given in (
        path,
        f"{path}/",
        f"{path}/../checkpoint-3",
        tmp_path / "link",
        ".",
        "../checkpoint-3",
        f"{path}/.",
    ):
        made = run_folder(tmp_path / "out", resume_from_checkpoint=str(given))
        made.run = Run("a")
        checkpoint = made.find_checkpoint(lora=False)
        run, moved = made._choose_run(checkpoint)
        assert checkpoint.step == 3 and run.id == "a", given
        assert [found.name for found in moved] == ["checkpoint-6"], given


KINDS = {"folder": Path.mkdir, "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_what_is_no_file_is_a_line(tmp_path, make):
    for name in (MANIFEST, TRAINER_STATE):
        path = write_checkpoint(tmp_path / name, 3)
        (path / name).unlink()
        make(path / name)
        with pytest.raises(InputError):
            run_folder(tmp_path / name).find_checkpoint(lora=False)
    path = write_checkpoint(tmp_path / "named", 3, files={"x": [1, "x"]})
    make(path / "x")
    damage = "its x is missing"
    assert open_checkpoint(path).find_damage() == damage


MISSING = [
    (False, ["model_state.pdparams"], {}, "has no model_state.pdparams: give a run's checkpoint-N folder"),
    (True, [], {}, "has no lora_model_state.pdparams: .* of a run with --lora True"),
    (False, ["optimizer.pdopt"], {}, "has no optimizer.pdopt: give --ignore_load_lr_and_optim True"),
    (
        False,
        ["optimizer.pdopt", "scheduler.pdparams"],
        {},
        "has no optimizer.pdopt and no scheduler.pdparams",
    ),
    (False, ["trainer_state.json"], {}, "has no trainer_state.json"),
    (False, ["optimizer.pdopt", "trainer_state.json"], {"ignore_load_lr_and_optim": True}, None),
]


@pytest.mark.parametrize("lora, names, changes, text", MISSING)
def test_what_a_checkpoint_lacks_is_named_by_its_file(tmp_path, lora, names, changes, text):
    path = write_checkpoint(tmp_path, 3)
    for name in names:
        (path / name).unlink()
    if text is None:
        assert str(run_folder(tmp_path, **changes).find_checkpoint(lora)) == str(path)
        return
    with pytest.raises(InputError, match=f"^{path} {text}"):
        run_folder(tmp_path).find_checkpoint(lora)
    with pytest.raises(InputError, match=f"^--resume_from_checkpoint {path} {text}"):
        run_folder(tmp_path, resume_from_checkpoint=str(path)).find_checkpoint(lora)


# Of whole commands.

FILES = ["model_state.pdparams", "optimizer.pdopt", "scheduler.pdparams", "trainer_state.json"]


def damaged(folder, name, how):
    path = folder / name
    if how == "cut short":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The output of a run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run(*TRAIN, *flags(output_dir=folder, max_steps=2, save_steps=1))
    return folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut short", "changed", "missing"])
def test_damage_is_found_by_the_manifest(two_checkpoints, tmp_path, name, how):
    shutil.copytree(two_checkpoints, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-2"
    damaged(tmp_path / "out/checkpoint-2", name, how)
    assert last_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-1"
    damaged(tmp_path / "out/checkpoint-1", name, how)
    with pytest.raises(InputError, match="holds checkpoint-2, which can't be gone on with"):
        last_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named(two_checkpoints, tmp_path, name):
    """One whose manifest has no checksums, as an older run wrote it."""
    shutil.copytree(two_checkpoints, tmp_path / "out")
    path = tmp_path / "out/checkpoint-2" / name
    os.truncate(path, path.stat().st_size // 2)
    (tmp_path / "out/checkpoint-2" / MANIFEST).write_text("")
    (tmp_path / "out/.run.json").unlink()
    lines = run(*TRAIN, *flags(output_dir=tmp_path / "out", max_steps=3), code=2)
    assert "Traceback" not in "".join(lines) and f"{tmp_path}/out/checkpoint-2 can't be loaded (" in lines[-1]
    assert lines[-1].endswith("the checkpoint before it")


def test_a_damaged_checkpoint_is_skipped(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "out")
    damaged(tmp_path / "out/checkpoint-2", "optimizer.pdopt", "changed")
    size = (tmp_path / "out/checkpoint-2/optimizer.pdopt").stat().st_size
    lines = run(*TRAIN, *flags(output_dir=tmp_path / "out", max_steps=2))
    damage = f"is damaged: its optimizer.pdopt is not what was written ({size} bytes)"
    assert any(f"skipping {tmp_path}/out/checkpoint-2, which {damage}" in line for line in lines)
    assert any(f"resuming from {tmp_path}/out/checkpoint-1" in line for line in lines)
    assert losses(tmp_path / "out") == pytest.approx(losses(two_checkpoints), abs=1e-5)
    # By name, it is a mistake.
    first = tmp_path / "out/checkpoint-1"
    args = [*TRAIN, *flags(output_dir=tmp_path / "out", max_steps=3, resume_from_checkpoint=first)]
    run(*args)
    damaged(first, "scheduler.pdparams", "cut short")
    line = run(*args, code=2)[-1]
    assert "checkpoint-1 is damaged: its scheduler.pdparams is not what was written" in line


def test_only_as_many_checkpoints_as_wanted_stay(tmp_path):
    run(*TRAIN, *flags(output_dir=tmp_path, save_steps=1, max_steps=4, save_total_limit=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_model_beside_an_incomplete_checkpoint_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "model_state.pdparams").write_text("mine")
    lines = run(*TRAIN, *flags(output_dir=tmp_path, max_steps=1), code=2)
    assert (
        "--overwrite_output_dir" in lines[-1]
        and "holds a model and no checkpoint to resume from" in lines[-1]
    )
    assert (tmp_path / "model_state.pdparams").read_text() == "mine"


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


def test_a_run_that_overwrites_moves_the_others_aside(trained, tmp_path):
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
    assert (next(out.glob("superseded-*")) / "checkpoint-6").is_dir()
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
    assert (next(out.glob("superseded-*")) / "checkpoint-6").is_dir()
    said(run(*args), f"resuming from {out}/checkpoint-9")


def test_arguments_are_written_as_they_were_in_effect(trained):
    folder, _ = trained
    groups = json.loads((folder / "out/arguments.json").read_text())
    assert [*groups] == [f"{name}Arguments" for name in ("Model", "Data", "Generation", "GLMTraining")]
    assert groups["GLMTrainingArguments"]["lr_scheduler_type"] == "linear"
    assert groups["DataArguments"]["src_length"] == 160


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


@pytest.mark.parametrize("last", [3, 6])
def test_an_evaluation_that_a_signal_cancelled_is_made_up_for(trained, tmp_path, last):
    """The first is the best one, for training makes it worse; also where nothing is left to train."""
    folder, args = trained
    args = [*args, "--do_eval", "--load_best_model_at_end", *flags(metric_for_best_model="loss")]
    args += flags(greater_is_better="False", evaluation_strategy="steps", eval_steps=3, max_steps=last)
    args += flags(learning_rate=0.3, warmup_steps=3)
    run(*args, "--output_dir", tmp_path / "one")
    run(*args, "--output_dir", tmp_path / "two", hook=["fault", "SIGTERM", "training_step", 3], code=143)
    assert open_checkpoint(tmp_path / "two/checkpoint-3").evaluation_is_due
    run(*args, "--output_dir", tmp_path / "two")
    states = [json.loads((tmp_path / name / TRAINER_STATE).read_text()) for name in ("one", "two")]
    assert states[1]["best_model_checkpoint"] == f"{tmp_path}/two/checkpoint-3"
    assert states[1]["best_metric"] == pytest.approx(states[0]["best_metric"], abs=1e-5)
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert results[1]["eval_loss"] == pytest.approx(states[0]["best_metric"], abs=1e-5)
    assert not open_checkpoint(tmp_path / f"two/checkpoint-{last}").evaluation_is_due or last == 3


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
    assert (
        open_checkpoint(tmp_path / "out/checkpoint-2").run.id
        != open_checkpoint(folder / "out/checkpoint-6").run.id
    )
