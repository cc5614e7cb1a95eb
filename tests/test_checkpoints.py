"""What stands in output_dir: checkpoints that are whole, damaged or another's, and who may write there."""

import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from helpers import TRAIN, flags, last_whole_checkpoint, losses, make_trainer, random_glm, run

from glm import checkpoints
from glm.checkpoints import CHECKPOINT_DONE, WholeCheckpoints
from glm.errors import InputError


def saving_arguments(folder):
    return SimpleNamespace(output_dir=str(folder), local_rank=-1, world_size=1, records_a_step=24)


NO_MODEL = SimpleNamespace(state_dict=dict)


def test_a_checkpoint_that_is_written_anew_is_not_whole_meanwhile(tmp_path):
    args = saving_arguments(tmp_path)
    state, control = (
        SimpleNamespace(global_step=4, best_model_checkpoint=None),
        SimpleNamespace(should_save=False),
    )
    done = tmp_path / "checkpoint-4" / CHECKPOINT_DONE
    done.parent.mkdir()
    done.touch()
    (done.parent / "trainer_state.json").write_text('{"global_step": 4, "consumed_samples": 32}')
    callback = WholeCheckpoints(None)
    callback.on_step_end(args, state, control)
    assert done.exists()
    control.should_save = True
    callback.on_step_end(args, state, control)
    assert not done.exists() and last_whole_checkpoint(tmp_path) is None
    callback.on_save(
        args, state, control, model=SimpleNamespace(state_dict=lambda: {"w": SimpleNamespace(name="w_0")})
    )
    text = b'{\n  "global_step": 4\n}'
    assert json.loads(done.read_text()) == {
        "files": {"trainer_state.json": [len(text), hashlib.blake2b(text, digest_size=16).hexdigest()]},
        "parameters": {"w_0": "w"},
        "records": 24,
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
    for number in range(1, 5):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text("{}")
        os.utime(tmp_path / f"checkpoint-{number}", (1000 + number, 1000 + number))
    callback = WholeCheckpoints(limit)
    args = saving_arguments(tmp_path)
    state = SimpleNamespace(global_step=4, best_model_checkpoint=best and f"{tmp_path}/checkpoint-{best}")
    callback.on_step_end(args, state, SimpleNamespace(should_save=True))
    callback.on_save(args, state, None, model=NO_MODEL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{number}" for number in kept]


def test_a_run_that_was_written_over_is_not_gone_on_with(tmp_path):
    for number, name in enumerate(("checkpoint-9", "checkpoint-2", "checkpoint-10")):
        (tmp_path / name).mkdir()
        if name != "checkpoint-10":
            (tmp_path / name / CHECKPOINT_DONE).touch()
            os.utime(tmp_path / name / CHECKPOINT_DONE, (1000 + number, 1000 + number))
    assert last_whole_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"


def test_who_may_write_into_a_folder(tmp_path):
    """Results may go where other files are; a run that writes over another does not go on with it."""
    (tmp_path / "thesis.txt").write_text("mine")
    args = saving_arguments(tmp_path)
    args.do_train = args.overwrite_output_dir = False
    checkpoints.check_output_dir(args, None)
    args.do_train = True
    with pytest.raises(InputError, match="nothing of a run"):
        checkpoints.check_output_dir(args, None)
    args.overwrite_output_dir, args.resume_from_checkpoint, args.tensor_parallel_degree = True, None, 1
    checkpoints.check_output_dir(args, None)
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in (
        "model_state.pdparams",
        "optimizer.pdopt",
        "scheduler.pdparams",
        "trainer_state.json",
        CHECKPOINT_DONE,
    ):
        (checkpoint / name).touch()
    assert checkpoints.find_last_checkpoint(args, lora=False) is None
    args.overwrite_output_dir = False
    assert checkpoints.find_last_checkpoint(args, lora=False) == str(checkpoint)


def test_a_link_to_nowhere_is_nothing_of_a_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    args = SimpleNamespace(output_dir=str(tmp_path), do_train=True, overwrite_output_dir=False)
    with pytest.raises(InputError, match="holds link and nothing of a run"):
        checkpoints.check_output_dir(args, None)


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


def test_a_model_beside_a_torn_checkpoint_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "model_state.pdparams").write_text("mine")
    lines = run(*TRAIN, *flags(output_dir=tmp_path, max_steps=1), code=2)
    assert (
        "--overwrite_output_dir" in lines[-1]
        and "holds a model and no checkpoint to resume from" in lines[-1]
    )
    assert (tmp_path / "model_state.pdparams").read_text() == "mine"
