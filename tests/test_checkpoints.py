"""What stands in output_dir: checkpoints that are whole, damaged or another's, and who may write there."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from helpers import TRAIN, flags, last_whole_checkpoint, losses, make_trainer, random_glm, run

from glm.errors import Fault
from glm.outputs import checkpoints
from glm.outputs.checkpoints import CHECKPOINT_DONE, WholeCheckpoints


def saving_arguments(folder):
    return SimpleNamespace(output_dir=str(folder), local_rank=-1, world_size=1, global_batch_size=24)


NO_MODEL = SimpleNamespace(state_dict=dict)
RUN_A, RUN_B = {"id": "a", "parent": None}, {"id": "b", "parent": ["a", 6]}


def test_a_checkpoint_that_is_written_anew_is_not_whole_meanwhile(tmp_path):
    args = saving_arguments(tmp_path)
    state, control = (
        SimpleNamespace(global_step=4, best_model_checkpoint=None),
        SimpleNamespace(should_save=False),
    )
    done = tmp_path / "checkpoint-4" / CHECKPOINT_DONE
    done.parent.mkdir()
    done.touch()
    (done.parent / "lora_model_state.pdparams").touch()  # of a run of another kind
    callback = WholeCheckpoints(None, RUN_A)
    callback.on_step_end(args, state, control)
    assert done.exists()
    control.should_save = True
    callback.on_step_end(args, state, control)
    assert not done.parent.exists() and last_whole_checkpoint(tmp_path) is None
    done.parent.mkdir()
    (done.parent / "trainer_state.json").write_text('{"global_step": 4, "consumed_samples": 32}')
    callback.on_save(
        args, state, control, model=SimpleNamespace(state_dict=lambda: {"w": SimpleNamespace(name="w_0")})
    )
    text = b'{\n  "global_step": 4\n}'
    assert json.loads(done.read_text()) == {
        "files": {"trainer_state.json": [len(text), hashlib.blake2b(text, digest_size=16).hexdigest()]},
        "parameters": {"w_0": "w"},
        "records": 24,
        "step": 4,
        "run": RUN_A,
    }
    # PaddleNLP 2 refuses what PaddleNLP 3 adds to the state.
    assert json.loads((done.parent / "trainer_state.json").read_text()) == {"global_step": 4}


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
    callback, args = WholeCheckpoints(limit, RUN_A), saving_arguments(tmp_path)
    for number in range(1, 5):
        state = SimpleNamespace(global_step=number)
        state.best_model_checkpoint = best and f"{tmp_path}/checkpoint-{best}"
        callback.on_step_end(args, state, SimpleNamespace(should_save=True))
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text("{}")
        os.utime(tmp_path / f"checkpoint-{number}", (1000 - number, 1000 - number))
        callback.on_save(args, state, None, model=NO_MODEL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{number}" for number in kept]


def write_checkpoint(folder, step, run, time=0):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    mark = {"step": step, "run": run} if run else {}  # as older versions wrote it
    (path / CHECKPOINT_DONE).write_text(json.dumps(mark))
    os.utime(path / CHECKPOINT_DONE, (1000 + time, 1000 + time))
    return str(path)


ORDERS = [
    (None, None, 9),  # older versions, of whose runs nothing is known
    (RUN_A, RUN_A, 9),
    (None, RUN_A, 9),
    (RUN_A, RUN_B, None),  # written over by another run
    (RUN_B, RUN_A, 6),  # which goes on from step 6
    (RUN_A, None, None),
    ({"id": "c", "parent": [None, 6]}, None, 6),
]


@pytest.mark.parametrize("folder_run, checkpoint_run, last", ORDERS)
def test_the_last_checkpoint_is_of_the_folders_own_run(tmp_path, folder_run, checkpoint_run, last):
    """By the steps that they tell of themselves, whatever the times of their files."""
    if folder_run:
        (tmp_path / ".run.json").write_text(json.dumps(folder_run))
    for time, step in enumerate((12, 9, 6, 3)):
        write_checkpoint(tmp_path, step, checkpoint_run, time)
    (tmp_path / "checkpoint-12" / CHECKPOINT_DONE).unlink()  # not written to its end
    assert last_whole_checkpoint(tmp_path) == (last and f"{tmp_path}/checkpoint-{last}")


def test_where_to_resume_names_the_flags_that_would_do_otherwise(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), overwrite_output_dir=True)
    args.resume_from_checkpoint = None
    assert checkpoints.where_to_resume(args) == "there is no checkpoint to resume from"
    write_checkpoint(tmp_path, 3, RUN_A)
    goes_on = f"goes on from {tmp_path}/checkpoint-3"
    without = "the same command without --overwrite_output_dir"
    assert checkpoints.where_to_resume(args) == f"{without} {goes_on}"
    args.resume_from_checkpoint = "elsewhere"
    assert checkpoints.where_to_resume(args) == f"{without} and --resume_from_checkpoint {goes_on}"
    args.overwrite_output_dir, args.resume_from_checkpoint = False, None
    assert checkpoints.where_to_resume(args) == f"the same command {goes_on}"


def test_a_limit_takes_what_another_run_wrote_first(tmp_path):
    for step in (8, 9):
        write_checkpoint(tmp_path, step, {"id": "another", "parent": None})
    for step in (1, 2):
        write_checkpoint(tmp_path, step, RUN_A)
    callback, args = WholeCheckpoints(3, RUN_A), saving_arguments(tmp_path)
    state = SimpleNamespace(global_step=3, best_model_checkpoint=None)
    callback.on_step_end(args, state, SimpleNamespace(should_save=True))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/trainer_state.json").write_text("{}")
    callback.on_save(args, state, None, model=NO_MODEL)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["1", "2", "3"]


@pytest.mark.parametrize("where", ["moved along", "in output_dir", "where it was", "gone", "another run's"])
def test_the_best_checkpoint_is_found_by_its_name(tmp_path, where):
    old, new, callback = tmp_path / "old", tmp_path / "new", WholeCheckpoints(None, RUN_A)
    old.mkdir()
    new.mkdir()
    folder = old if where == "where it was" else new
    if where != "gone":
        write_checkpoint(folder, 3, {"id": "x"} if where == "another run's" else RUN_A)
    callback.resumed = f"{new}/checkpoint-6" if where == "moved along" else None
    expected = None if where in ("gone", "another run's") else f"{folder}/checkpoint-3"
    assert callback.find_best(f"{old}/checkpoint-3", str(new)) == expected


def test_paddlenlp_removes_no_checkpoint(tmp_path):
    """It would before the new one is whole; WholeCheckpoints does afterwards."""
    trainer = make_trainer(tmp_path, random_glm(), save_total_limit=2)
    assert trainer.args.save_total_limit is None and trainer.checkpoints.limit == 2


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
def test_damage_is_found_by_the_mark(two_checkpoints, tmp_path, name, how):
    shutil.copytree(two_checkpoints, tmp_path / "out")
    assert last_whole_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-2"
    damaged(tmp_path / "out/checkpoint-2", name, how)
    assert last_whole_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-1"
    damaged(tmp_path / "out/checkpoint-1", name, how)
    assert last_whole_checkpoint(tmp_path / "out") is None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named(two_checkpoints, tmp_path, name):
    """One whose mark has no checksums, as an older run wrote it."""
    shutil.copytree(two_checkpoints, tmp_path / "out")
    path = tmp_path / "out/checkpoint-2" / name
    os.truncate(path, path.stat().st_size // 2)
    (tmp_path / "out/checkpoint-2" / CHECKPOINT_DONE).write_text("")
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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_waits_for_a_process_that_is_gone_is_not_unwritable(tmp_path, processes):
    """Then the collective's error ends the process, and the folder stays as it was."""
    unwritable = OSError(28, "No space left on device")
    collective = OSError("(External) NCCL error")  # as Paddle raises it, without a number
    args = SimpleNamespace(world_size=processes, output_dir=str(tmp_path))
    for error in (unwritable, collective, ConnectionResetError(104, "Connection reset by peer")):
        whole = WholeCheckpoints(None, RUN_A)
        whole.folder = str(tmp_path / "checkpoint-2")
        os.makedirs(whole.folder, exist_ok=True)
        with pytest.raises(BaseException) as raised:
            with whole.failing_as_fault(args, SimpleNamespace(should_evaluate=False)):
                raise error
        file_failed = error is unwritable or (error is collective and processes == 1)
        assert isinstance(raised.value, Fault) == file_failed
        assert os.path.isdir(whole.folder) != file_failed


def test_a_model_beside_a_torn_checkpoint_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "model_state.pdparams").write_text("mine")
    lines = run(*TRAIN, *flags(output_dir=tmp_path, max_steps=1), code=2)
    assert (
        "--overwrite_output_dir" in lines[-1]
        and "holds a model and no checkpoint to resume from" in lines[-1]
    )
    assert (tmp_path / "model_state.pdparams").read_text() == "mine"
