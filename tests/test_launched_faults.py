"""Faults of a run on several processes: signals they agree on, processes that die, two runs in one folder."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import MINI, ROOT, TINY_GLM, losses

from glm.checkpoints import CHECKPOINT_DONE

ARGS = ["--model_name_or_path", TINY_GLM, "--task_name", MINI, "--src_length", 160, "--tgt_length", 24,
        "--min_tgt_length", 0, "--num_beams", 2, "--do_train", "--learning_rate", 1e-3, "--logging_steps", 1,
        "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 20]  # fmt: skip


SPLIT = ["--tensor_parallel_degree", 2]


def start(processes, log_dir, *args, **environment):
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", processes, "--log_dir", log_dir,
               "tests/parallel_worker.py", *ARGS, *args]  # fmt: skip
    env = {**os.environ, **environment}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def running(launcher):
    """The processes of a launched run that have not ended: each of them knows the folder of its logs."""
    mark, found = f"--log_dir\0{launcher.args[6]}\0", []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/environ") as environment:
                if mark in command.read() or f"PADDLE_LOG_DIR={launcher.args[6]}\0" in environment.read():
                    found.append(int(pid))
        except OSError:  # it has ended meanwhile
            continue
    return found


def finish(launcher, seconds=120):
    """Wait for the end of all processes of a launched run; of those that are left then, fail."""
    deadline = time.time() + seconds
    try:
        launcher.wait(seconds)
        while running(launcher) and time.time() < deadline:
            time.sleep(0.05)
        assert not running(launcher)
    finally:
        for pid in running(launcher):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    return launcher.returncode


def logs(folder):
    return [path.read_text(errors="replace").splitlines() for path in sorted(folder.glob("workerlog.*"))]


def errors(folder):
    """The line that each process ended with, where it said one."""
    return [[line for line in lines if "finetune_generation.py: error: " in line] for lines in logs(folder)]


def at_step(step, rank, action, where="training_step"):
    """A hook: what process ``rank`` does in ``where`` when ``step`` steps are done, in the first run of its folder."""
    return f"""
import signal, time
import utils
from glm.errors import Fault
old = utils.GLMTrainer.{where}
def new(self, *args, **kwargs):
    if self.state.global_step == {step} and dist.get_rank() == {rank}:
        print("FAULT AT", time.time(), file=sys.stderr, flush=True)
        {action}
    return old(self, *args, **kwargs)
utils.GLMTrainer.{where} = new
"""


def write_hook(folder, text):
    (folder / "hook.py").write_text(text)
    return {"WORKER_HOOK": str(folder / "hook.py")}


@pytest.mark.parametrize("processes, rank", [(2, 1), (4, 2)])
def test_a_signal_to_one_process_ends_all_within_two_steps(tmp_path, processes, rank):
    out = tmp_path / "out"
    args = ["--output_dir", out, "--max_steps", 6, "--save_steps", 100, *SPLIT]
    hook = write_hook(tmp_path, at_step(2, rank, "os.kill(os.getpid(), signal.SIGTERM)"))
    launcher = start(processes, tmp_path / "log", *args, **hook)
    assert finish(launcher) != 0
    seconds = time.time() - float(re.search(r"FAULT AT ([\d.]+)", str(logs(tmp_path / "log")))[1])
    print(f"\n{processes} processes, SIGTERM: {seconds:.1f} s")
    ending = f"stopped by SIGTERM at step 4: the same command goes on from {out}/checkpoint-4"
    assert [len(lines) == 1 and lines[0].endswith(ending) for lines in errors(tmp_path / "log")] == [
        True
    ] * processes
    assert (out / "checkpoint-4" / CHECKPOINT_DONE).exists() and not (out / "model_state.pdparams").exists()
    assert finish(start(processes, tmp_path / "log2", *args)) == 0
    assert sorted(losses(out)) == list(range(1, 7))


@pytest.mark.parametrize("number, again", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_to_the_launcher(tmp_path, number, again):
    """It sends each process several SIGTERM, which are one; a second one ends at once."""
    out = tmp_path / "out"
    slow = "import time\nimport utils\nold = utils.GLMTrainer.training_step\n"
    slow += "def new(self, *args):\n    print('STEP', self.state.global_step, flush=True)\n    time.sleep(SECONDS)\n"
    slow += "    return old(self, *args)\nutils.GLMTrainer.training_step = new\n"
    hook = write_hook(
        tmp_path, slow.replace("SECONDS", "20 if self.state.global_step else 0" if again else "0.5")
    )
    args = ["--output_dir", out, "--max_steps", 100, "--save_steps", 1000, *SPLIT]
    launcher = start(2, tmp_path / "log", *args, **hook)
    while not (tmp_path / "log/workerlog.0").exists() or "STEP 1" not in str(logs(tmp_path / "log")):
        assert launcher.poll() is None
        time.sleep(0.1)
    began = time.time()
    launcher.send_signal(number)
    if again:
        time.sleep(4)
        launcher.send_signal(number)
    assert finish(launcher) != 0
    lines = errors(tmp_path / "log")
    print(f"\n{number.name} {'twice ' if again else ''}{time.time() - began:.1f} s", lines)
    if again:
        assert time.time() - began < 15
        assert "there is no checkpoint to resume from" in lines[0][0]
        return
    steps = [
        re.search(r"stopped by \w+ at step (\d+): the same command goes on from", line[0])[1]
        for line in lines
    ]
    assert steps[0] == steps[1] and (out / f"checkpoint-{steps[0]}" / CHECKPOINT_DONE).exists()


WHERE = {
    "in a step": "training_step",
    "while saving": "_save_checkpoint",
    "in evaluation": "prediction_step",
}


@pytest.mark.parametrize("processes, rank, where", [(2, 1, "in a step"), (2, 0, "while saving"),
                                                    (2, 1, "in evaluation"), (4, 3, "in a step"),
                                                    (4, 0, "in evaluation")])  # fmt: skip
def test_a_process_that_dies_ends_all(tmp_path, processes, rank, where):
    out = tmp_path / "out"
    args = ["--output_dir", out, "--max_steps", 4, "--save_steps", 2, "--do_eval", *SPLIT]
    step = {"in a step": 3, "while saving": 4, "in evaluation": 4}[where]
    hook = write_hook(tmp_path, at_step(step, rank, "os.kill(os.getpid(), signal.SIGKILL)", WHERE[where]))
    launcher = start(processes, tmp_path / "log", *args, **hook)
    assert finish(launcher) != 0
    seconds = time.time() - float(re.search(r"FAULT AT ([\d.]+)", str(logs(tmp_path / "log")))[1])
    print(f"\n{processes} processes, kill -9 of {rank} {where}: {seconds:.1f} s")
    assert seconds < 60
    place = f"process {rank} is gone, so this one of {processes} ends too: the same command goes on from {out}/check"
    for number, lines in enumerate(errors(tmp_path / "log")):
        assert number == rank or (len(lines) == 1 and place in lines[0]), logs(tmp_path / "log")[number][-5:]
    assert finish(start(processes, tmp_path / "log2", *args)) == 0
    assert sorted(losses(out)) == [1, 2, 3, 4]
    assert len((out / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 60


@pytest.mark.parametrize("where", ["training_step", "_save_checkpoint"])
def test_a_process_that_ends_alone_ends_all(tmp_path, where):
    """For a reason of its own, which it says: the other one names it, and shows no traceback of its collective."""
    args = ["--output_dir", tmp_path / "out", "--max_steps", 4, "--save_steps", 2, *SPLIT]
    step = {"training_step": 3, "_save_checkpoint": 4}[where]
    hook = write_hook(tmp_path, at_step(step, 1, "raise Fault('no more of this')", where))
    launcher = start(2, tmp_path / "log", *args, **hook)
    assert finish(launcher) != 0
    assert "Traceback" not in str(logs(tmp_path / "log"))
    (first,), (second,) = errors(tmp_path / "log")
    assert second == "finetune_generation.py: error: no more of this"
    assert (
        f"process 1 is gone, so this one of 2 ends too: the same command goes on from {tmp_path}/out/check"
        in first
    )
