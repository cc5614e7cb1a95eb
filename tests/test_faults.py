"""Faults, done for real: kills, signals, a full disk, an exception in the loader's thread, a loss that is no number."""

import fcntl
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

import pytest
from helpers import FLAGS, MINI, ROOT, TINY_GLM, finish, last_whole_checkpoint, losses, start

from glm import checkpoints, processes
from glm.checkpoints import CHECKPOINT_DONE


def wait_for_line(process, text):
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the run ended before it said {text!r}")


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
