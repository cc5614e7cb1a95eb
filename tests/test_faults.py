"""Faults, done for real: kills, signals, a full disk, an exception in the loader's thread, a loss that is no number."""

import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import paddle
import pytest
from conftest import MINI, ROOT, TINY_GLM
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from glm import callbacks, checkpoints, processes
from glm.callbacks import SeedEachStep, StopBySignal
from glm.checkpoints import CHECKPOINT_DONE, WholeCheckpoints
from glm.errors import Fault

FLAGS = ["--task_name", MINI, "--src_length", 160, "--tgt_length", 24, "--min_tgt_length", 0, "--num_beams", 2,
         "--do_train", "--learning_rate", 1e-3, "--per_device_train_batch_size", 4, "--logging_steps", 1]  # fmt: skip


def start(*args, code=None, **options):
    program = ["-c", code] if code else ["finetune_generation.py"]
    command = [sys.executable, *program, *map(str, [*FLAGS, *args])]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def finish(process):
    """Exit code and lines of standard error."""
    error = process.communicate(timeout=120)[1]
    return process.returncode, error.splitlines()


def wait_for_line(process, text):
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the run ended before it said {text!r}")


def last_whole_checkpoint(folder):
    return checkpoints.last_whole_checkpoint(
        SimpleNamespace(output_dir=str(folder), world_size=1, local_rank=-1)
    )


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The output of a run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", folder, "--max_steps", 2, "--save_steps", 1]
    assert finish(start(*args))[0] == 0
    return folder


def model_with_dropout(folder, dropout):
    shutil.copytree(TINY_GLM, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({f"{kind}_dropout_prob": dropout for kind in ("attention", "embedding", "output")})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def kill_while_saving(folder, args):
    """Kill a run in the middle of writing checkpoint-4."""
    process = start(*args)
    while not (folder / "checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    finish(process)
    return not (folder / "checkpoint-4" / CHECKPOINT_DONE).exists()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_killed_run_goes_on_like_an_unbroken_one(tmp_path, dropout):
    common = [
        "--model_name_or_path",
        model_with_dropout(tmp_path / "model", dropout),
        "--save_steps",
        2,
        "--max_steps",
        7,
    ]
    assert finish(start(*common, "--output_dir", tmp_path / "unbroken"))[0] == 0
    expected = losses(tmp_path / "unbroken")

    broken = tmp_path / "broken"
    args = [*common, "--output_dir", broken]
    for _ in range(5):
        shutil.rmtree(broken, ignore_errors=True)
        if kill_while_saving(broken, args):
            break
    else:
        pytest.fail("no kill came in time to tear a checkpoint")
    # Again, between two checkpoints.
    process = start(*args)
    wait_for_line(process, "step 3/7")
    process.kill()
    process.communicate()
    code, lines = finish(start(*args))
    assert code == 0
    assert any(f"skipping {broken}/checkpoint-4, which was not written to its end" in line for line in lines)
    assert any(f"resuming from {broken}/checkpoint-2" in line for line in lines)
    assert losses(broken) == pytest.approx(expected, abs=1e-4) and len(expected) == 7
    trained = json.loads((broken / "train_results.json").read_text())["train_loss"]
    assert trained == pytest.approx(sum(expected[step] for step in range(3, 8)) / 5, abs=1e-4)
    print("step | unbroken | killed twice and resumed")
    for step, loss in losses(broken).items():
        print(step, expected[step], loss, sep=" | ")


def test_a_finished_run_goes_no_further(tmp_path):
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--max_steps", 4, "--save_steps", 2]
    assert finish(start(*args))[0] == 0
    weights, results = (
        (tmp_path / name).read_bytes() for name in ("model_state.pdparams", "train_results.json")
    )
    (tmp_path / "model_state.pdparams").unlink()
    code, lines = finish(start(*args))
    assert code == 0 and not any("step 5" in line for line in lines)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert (tmp_path / "model_state.pdparams").read_bytes() == weights
    assert (tmp_path / "train_results.json").read_bytes() == results


FILES = ["model_state.pdparams", "optimizer.pdopt", "scheduler.pdparams", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named(two_checkpoints, tmp_path, name):
    """One whose mark has no checksums, as an older run wrote it."""
    shutil.copytree(two_checkpoints, tmp_path / "out")
    path = tmp_path / "out/checkpoint-2" / name
    os.truncate(path, path.stat().st_size // 2)
    (tmp_path / "out/checkpoint-2" / CHECKPOINT_DONE).write_text("")
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path / "out", "--max_steps", 3]
    code, lines = finish(start(*args))
    assert code == 2 and "Traceback" not in "".join(lines)
    assert f"{tmp_path}/out/checkpoint-2 can't be loaded (" in lines[-1] and lines[-1].endswith(
        "the checkpoint before it"
    )


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


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut short", "changed", "missing"])
def test_damage_is_found_by_the_mark(two_checkpoints, tmp_path, name, how):
    shutil.copytree(two_checkpoints, tmp_path / "out")
    assert last_whole_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-2"
    damaged(tmp_path / "out/checkpoint-2", name, how)
    assert last_whole_checkpoint(tmp_path / "out") == f"{tmp_path}/out/checkpoint-1"
    damaged(tmp_path / "out/checkpoint-1", name, how)
    assert last_whole_checkpoint(tmp_path / "out") is None


def test_a_damaged_checkpoint_is_skipped(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "out")
    damaged(tmp_path / "out/checkpoint-2", "optimizer.pdopt", "changed")
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path / "out", "--max_steps", 2]
    size = (tmp_path / "out/checkpoint-2/optimizer.pdopt").stat().st_size
    skipping = (
        f"skipping {tmp_path}/out/checkpoint-2, which is damaged: its optimizer.pdopt is not what was written"
    )
    code, lines = finish(start(*args))
    assert code == 0 and any(f"{skipping} ({size} bytes)" in line for line in lines)
    assert any(f"resuming from {tmp_path}/out/checkpoint-1" in line for line in lines)
    assert losses(tmp_path / "out") == pytest.approx(losses(two_checkpoints), abs=1e-5)
    # Asked for by name, it is a mistake.
    code, lines = finish(
        start(*args, "--resume_from_checkpoint", tmp_path / "out/checkpoint-1", "--max_steps", 3)
    )
    assert code == 0
    damaged(tmp_path / "out/checkpoint-1", "scheduler.pdparams", "cut short")
    code, lines = finish(
        start(*args, "--resume_from_checkpoint", tmp_path / "out/checkpoint-1", "--max_steps", 3)
    )
    assert (
        code == 2 and "checkpoint-1 is damaged: its scheduler.pdparams is not what was written" in lines[-1]
    )


@pytest.mark.parametrize("where", ["model_state.pdparams", "train_results.json", "rename"])
def test_a_kill_in_the_final_save(tmp_path, where):
    """Without a checkpoint: what stands in the folder is whole, and the same command goes on."""
    args = [
        "--model_name_or_path",
        TINY_GLM,
        "--output_dir",
        tmp_path,
        "--max_steps",
        2,
        "--save_strategy",
        "no",
    ]
    code = "import os, finetune_generation as f\nold, moved = os.replace, []\n"
    if where == "rename":  # when two files stand in their places
        code += "def new(*args):\n    if len(moved) == 2:\n        os.kill(os.getpid(), 9)\n"
        code += "    moved.append(1)\n    return old(*args)\nos.replace = new\n"
    else:  # when this one is opened
        code += "import sys\ndef watch(event, args):\n"
        path = f"{checkpoints.UNFINISHED}/{where}"
        code += (
            f"    if event == 'open' and str(args[0]).endswith('{path}'):\n        os.kill(os.getpid(), 9)\n"
        )
        code += "sys.addaudithook(watch)\n"
    killed, lines = finish(start(*args, code=code + "f.main()"))
    assert killed == -signal.SIGKILL
    names = {path.name for path in tmp_path.iterdir()}
    assert checkpoints.UNFINISHED in names and (where == "rename" or "model_state.pdparams" not in names)
    assert finish(start(*args))[0] == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert {"model_state.pdparams", "config.json", "train_results.json", "trainer_state.json"} <= left
    assert not {checkpoints.UNFINISHED, processes.LOCK} & left and not list(tmp_path.rglob("*.tmp"))


def test_two_runs_in_one_folder(tmp_path):
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path / "out", "--max_steps", 1]
    code = "import time, finetune_generation as f\nold = f.load_model\n"
    code += "def new(*args):\n    print('LOADING', file=f.sys.stderr, flush=True)\n    time.sleep(600)\n"
    first = start(*args, code=code + "f.load_model = new\nf.main()")
    wait_for_line(first, "LOADING")
    code, lines = finish(start(*args))
    assert code == 2 and lines[-1] == (
        f"finetune_generation.py: error: --output_dir {tmp_path}/out is in use by another run, process {first.pid} on "
        f"{socket.gethostname()}: wait for its end, or give another folder"
    )
    first.kill()  # what it leaves behind stops nobody
    finish(first)
    assert (tmp_path / "out" / processes.LOCK).exists()
    assert finish(start(*args))[0] == 0 and not (tmp_path / "out" / processes.LOCK).exists()


def test_a_model_beside_a_torn_checkpoint_is_not_written_over(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "model_state.pdparams").write_text("mine")
    code, lines = finish(start("--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--max_steps", 1))
    assert code == 2 and "holds a model and no checkpoint to resume from" in lines[-1]
    assert (tmp_path / "model_state.pdparams").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_within_a_step(tmp_path, number):
    """Sent from within the third step, so that how fast the machine is does not matter."""
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--max_steps", 6, "--save_steps", 100]
    code = "import os, utils, finetune_generation as f\nold = utils.GLMTrainer.training_step\n"
    code += "def new(self, *args):\n    if self.state.global_step == 2:\n"
    code += f"        os.kill(os.getpid(), {int(number)})\n    return old(self, *args)\n"
    code, lines = finish(start(*args, code=code + "utils.GLMTrainer.training_step = new\nf.main()"))
    assert code == 128 + number
    name = signal.Signals(number).name
    ending = f"stopped by {name} at step 3: the same command goes on from {tmp_path}/checkpoint-3"
    assert lines[-1].endswith(ending) and (tmp_path / "checkpoint-3" / CHECKPOINT_DONE).exists()
    code, lines = finish(start(*args))
    assert code == 0 and any(f"resuming from {tmp_path}/checkpoint-3" in line for line in lines)
    assert sorted(losses(tmp_path)) == list(range(1, 7))


@pytest.mark.parametrize("strategy, whole", [("no", False), ("epoch", True)])
def test_a_signal_in_the_last_step(tmp_path, strategy, whole):
    """No evaluation is begun; without checkpoints there is none."""
    args = [
        "--model_name_or_path",
        TINY_GLM,
        "--output_dir",
        tmp_path,
        "--max_steps",
        2,
        "--save_strategy",
        strategy,
    ]
    args += ["--evaluation_strategy", "steps", "--eval_steps", 2, "--do_eval"]
    code = "import os, utils, finetune_generation as f\nold = utils.GLMTrainer.training_step\n"
    code += "def new(self, *args):\n    if self.state.global_step == 1:\n        os.kill(os.getpid(), 15)\n"
    code += "    return old(self, *args)\nutils.GLMTrainer.training_step = new\nf.main()"
    code, lines = finish(start(*args, code=code))
    assert code == 143 and "stopped by SIGTERM at step 2" in lines[-1]
    assert (last_whole_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2") == whole
    assert (
        not (tmp_path / "model_state.pdparams").exists()
        and not (tmp_path / "eval_predictions.jsonl").exists()
    )


def test_a_signal_in_an_evaluation_ends_it(tmp_path):
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--do_train", "False", "--do_eval",
            "--num_beams", 20, "--per_device_eval_batch_size", 1, "--min_tgt_length", 24]  # fmt: skip
    code = "import finetune_generation as f\nfrom glm import generation\nold = generation.prefill\n"
    code += "def new(*args):\n    print('prefill', file=f.sys.stderr, flush=True)\n    return old(*args)\n"
    process = start(*args, code=code + "generation.prefill = new\nf.main()")
    wait_for_line(process, "prefill")
    process.terminate()
    code, lines = finish(process)
    assert code == 143 and lines[-1].endswith("stopped by SIGTERM")
    assert not list(tmp_path.glob("*_predictions*"))


@pytest.mark.parametrize("loader", ["GLMTokenizer", "AutoModelForConditionalGeneration"])
def test_a_signal_while_loading_is_no_mistake_of_the_user(tmp_path, loader):
    code = "import os, signal, finetune_generation as f\n"
    code += "def interrupted(*args, **kwargs):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    code += f"f.{loader}.from_pretrained = interrupted\nf.main()"
    code, lines = finish(start("--model_name_or_path", TINY_GLM, "--output_dir", tmp_path / "out", code=code))
    assert code == 143 and lines[-1] == "finetune_generation.py: error: stopped by SIGTERM"
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/optimizer.pdopt").symlink_to(
        "/dev/full"
    )  # every write: no space left on device
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--save_steps", 2, "--max_steps", 6]
    code, lines = finish(start(*args))
    assert code == 1 and "Traceback" not in "".join(lines)
    assert lines[-1].endswith(
        f"{tmp_path}/checkpoint-4 can't be written: No space left on device; "
        f"the same command goes on from {tmp_path}/checkpoint-2"
    )
    assert last_whole_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"
    assert finish(start(*args))[0] == 0 and sorted(losses(tmp_path)) == list(range(1, 7))


def test_predictions_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "eval_predictions.jsonl").write_text("those of the last run\n")
    (tmp_path / "eval_predictions.jsonl.tmp").symlink_to("/dev/full")
    code, lines = finish(start("--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--do_train", "False",
                               "--do_eval", "--per_device_eval_batch_size", 30))  # fmt: skip
    assert code == 1 and "can't write: No space left on device" in lines[-1]
    assert (tmp_path / "eval_predictions.jsonl").read_text() == "those of the last run\n"
    (tmp_path / "eval_predictions.jsonl.tmp").unlink(missing_ok=True)
    # Replaced, not written over: who has the old file open, or a link to it, goes on seeing it whole.
    os.link(tmp_path / "eval_predictions.jsonl", tmp_path / "link")
    assert finish(start("--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--do_train", "False",
                        "--do_eval", "--per_device_eval_batch_size", 30))[0] == 0  # fmt: skip
    assert (tmp_path / "link").read_text() == "those of the last run\n"
    assert len((tmp_path / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 60


def test_only_as_many_checkpoints_as_wanted_stay(tmp_path):
    assert finish(start("--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--save_steps", 1, "--max_steps", 4,
                        "--save_total_limit", 2))[0] == 0  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_that_was_written_over_is_not_gone_on_with(tmp_path):
    for number, name in enumerate(("checkpoint-9", "checkpoint-2", "checkpoint-10")):
        (tmp_path / name).mkdir()
        if name != "checkpoint-10":
            (tmp_path / name / CHECKPOINT_DONE).touch()
            os.utime(tmp_path / name / CHECKPOINT_DONE, (1000 + number, 1000 + number))
    assert last_whole_checkpoint(tmp_path) == f"{tmp_path}/checkpoint-2"


def test_an_exception_in_the_loader_ends_the_run(tmp_path):
    code = "import finetune_generation as f\nold, calls = f.DataCollator.__call__, []\n"
    code += "def new(self, features):\n    calls.append(1)\n    assert len(calls) < 4, 'torn'\n"
    code += "    return old(self, features)\n"
    args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path, "--max_steps", 20]
    code, lines = finish(start(*args, code=code + "f.DataCollator.__call__ = new\nf.main()"))
    assert code == 1 and lines[-1] == "AssertionError: torn"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    named = []
    for logging_steps in (1, 5):  # looked at every step, and later
        args = ["--model_name_or_path", TINY_GLM, "--output_dir", tmp_path / str(logging_steps), "--max_steps", 20,
                "--lr_scheduler_type", "constant", "--learning_rate", 1e30, "--save_steps", 1]  # fmt: skip
        code, lines = finish(start(*args, "--logging_steps", logging_steps))
        assert code == 1 and "Traceback" not in "".join(lines)
        named.append(
            re.search(
                r"the (?:loss is not finite at|weights are not finite after) step (\d+): lower", lines[-1]
            )[1]
        )
    assert named[0] == named[1]
    args[args.index("--save_steps") + 1] = 100
    code, lines = finish(start(*args, "--logging_steps", 5, "--output_dir", tmp_path / "no checkpoint"))
    assert code == 1 and re.search(
        r"the loss is not finite at step 2: lower .*; there is no checkpoint", lines[-1]
    )


def test_bars_on_a_terminal_and_lines_elsewhere(tmp_path):
    args = [
        "--model_name_or_path",
        TINY_GLM,
        "--task_name",
        MINI,
        "--do_eval",
        "--max_steps",
        3,
        "--per_device_eval_batch_size",
        30,
    ]
    code, lines = finish(start(*args, "--output_dir", tmp_path / "lines"))
    text = "\n".join(lines)
    assert code == 0 and "\r" not in text and "\x1b" not in text
    assert re.search(r"step 3/3: loss \d\.\d{4}, learning rate [\d.e-]+, [\d.]+ samples/s", text)
    assert lines[-1].endswith(
        f"done: in {tmp_path}/lines are eval_results.json, eval_predictions.jsonl, model_state.pdparams"
    )
    # Nothing of PaddleNLP's; the results, and of three records answer, prediction and reference.
    assert len(lines) < 12 + 10 + 9 and sum("prediction  " in line for line in lines) == 3
    assert list((tmp_path / "lines/runs").rglob("vdlrecords*"))

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    command = [
        sys.executable,
        "finetune_generation.py",
        *map(str, [*FLAGS, *args, "--output_dir", tmp_path / "bars"]),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    process.wait()
    os.close(ours)
    assert re.search(rb"train: 100%.*3/3.*loss \d\.\d{4}, [\d.]+ samples/s", shown)
    assert re.search(rb"eval: 100%.*60/60.*[\d.]+ tokens/s", shown)


def test_a_pipe_is_answered_line_by_line(tmp_path):
    args = ["--do_train", "False", "--model_name_or_path", TINY_GLM]
    rows = [json.loads(line) for line in (MINI / "test.json").read_text(encoding="utf-8").splitlines()[:2]]
    del rows[1]["question"]
    process = start(*args, "--predict_file", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    answers = []
    for row in rows:  # the next is sent when the last is answered
        process.stdin.write(json.dumps(row) + "\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    process.stdin.write("no JSON\n")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 2 and output == ""
    assert "error: standard input:3: not JSON" in error.splitlines()[-1]
    assert answers[1]["reference"] is None

    # The same from a file, in a batch.
    (tmp_path / "questions.json").write_text("\n".join(map(json.dumps, rows)))
    code, _ = finish(
        start(*args, "--predict_file", tmp_path / "questions.json", "--output_dir", tmp_path / "out")
    )
    lines = (tmp_path / "out/test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert code == 0 and len(lines) == 2
    for line, answer in zip(lines, answers):
        row = json.loads(line)
        assert row.pop("score") == pytest.approx(answer.pop("score"), abs=1e-5) and row == answer


def test_a_reader_that_leaves_ends_the_pipe(tmp_path):
    process = start("--do_train", "False", "--model_name_or_path", TINY_GLM, "--predict_file", "-",
                    stdin=open(MINI / "train.json"), stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    code, lines = finish(process)
    assert code == -signal.SIGPIPE and "Traceback" not in "".join(lines)


def test_each_step_draws_anew_and_a_resumed_one_alike():
    tracker, seen = get_rng_state_tracker(), []
    for step, seed, rank in ((0, 1, 0), (1, 1, 0), (2, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)):
        args = SimpleNamespace(seed=seed, dataset_rank=0, tensor_parallel_rank=rank)
        SeedEachStep().on_step_begin(args, SimpleNamespace(global_step=step), None)
        draws = [paddle.rand([4]).tolist()]
        for name in ("embedding_seed", "global_seed", "local_seed"):
            with tracker.rng_state(name):
                draws.append(paddle.rand([4]).tolist())
        seen.append(draws)
    tracker.reset()
    first, second, third, other_seed, other_rank, again = seen
    assert second == again
    for other in (second, third, other_seed):
        assert all(a != b for a, b in zip(first, other))
    assert len({tuple(draw) for draw in first}) == 4
    # Processes of tensor parallelism share all but what they drop in their own heads.
    assert first[:3] == other_rank[:3] and first[3] != other_rank[3]


def saving_arguments(folder):
    return SimpleNamespace(
        output_dir=str(folder), local_rank=-1, world_size=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, dataset_world_size=4,
    )  # fmt: skip


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


@pytest.mark.parametrize("limit, best, kept", [(2, None, [3, 4]), (2, 1, [1, 4]), (1, 1, [1, 4]), (1, None, [4]),
                                               (3, 2, [2, 3, 4]), (9, None, [1, 2, 3, 4])])  # fmt: skip
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


@pytest.mark.parametrize("world_size, training, seconds", [(1, True, [0, 0]), (1, False, [0]), (2, False, [0]),
                                                           (2, True, [0, 0.6, 1.9, 2.1])])  # fmt: skip
def test_when_a_signal_ends_at_once(tmp_path, world_size, training, seconds, monkeypatch):
    """A second one; the first in an evaluation. A launcher's, which sends three in 0.6 seconds, are one."""
    args = SimpleNamespace(world_size=world_size, output_dir=str(tmp_path), overwrite_output_dir=False)
    state, callback, now = SimpleNamespace(global_step=7), StopBySignal(), [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    callback.on_train_begin(args, state, None, model=SimpleNamespace(training=training))
    try:
        for second in seconds[:-1]:
            now[0] = 100.0 + second
            os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 100.0 + seconds[-1]
        with pytest.raises(Fault, match="stopped by SIGTERM at step 7: there is no checkpoint") as fault:
            os.kill(os.getpid(), signal.SIGTERM)
        assert fault.value.exit_code == 143
    finally:
        for number, handler in callback.previous.items():
            signal.signal(number, handler)
