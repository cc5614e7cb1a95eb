"""Faults of a run on several processes: signals that they agree on, processes that die."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from helpers import ROOT, TRAIN, flags, launcher, losses

from glm.outputs.layout import MANIFEST

pytestmark = pytest.mark.slow
ARGS = [*TRAIN, *flags(tensor_parallel_degree=2, per_device_eval_batch_size=20)]


def start(processes, log_dir, *args, hook=("nothing",)):
    command = [*launcher(processes, log_dir), *ARGS, *args]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    options.update(cwd=ROOT, env={**os.environ, "HOOK": json.dumps(hook)})
    return subprocess.Popen(list(map(str, command)), **options)


def running(process):
    """The processes of a launched run that have not ended: each of them knows the folder of its logs."""
    mark, found = f"--log_dir\0{process.args[6]}\0", []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as command, open(f"/proc/{pid}/environ") as environment:
                if mark in command.read() or f"PADDLE_LOG_DIR={process.args[6]}\0" in environment.read():
                    found.append(int(pid))
        except OSError:  # it has ended meanwhile
            continue
    return found


def finish(process, seconds=300):
    """Wait for the end of all processes of a launched run; of those that are left then, fail."""
    deadline = time.time() + seconds
    try:
        process.wait(seconds)
        while running(process) and time.time() < deadline:
            time.sleep(0.05)
        assert not running(process)
    finally:
        for pid in running(process):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def logs(folder):
    return [path.read_text(errors="replace").splitlines() for path in sorted(folder.glob("workerlog.*"))]


def errors(folder):
    """The line that each process ended with, where it said one."""
    return [[line for line in lines if "finetune_generation.py: error: " in line] for lines in logs(folder)]


def seconds_since_the_fault(folder):
    return time.time() - float(re.search(r"FAULT AT ([\d.]+)", str(logs(folder)))[1])


@pytest.mark.parametrize("processes, rank", [(2, 1), (4, 2)])
def test_a_signal_to_one_process_ends_all_within_two_steps(tmp_path, processes, rank):
    out, log = tmp_path / "out", tmp_path / "log"
    args = flags(output_dir=out, max_steps=6, save_steps=100)
    assert finish(start(processes, log, *args, hook=["fault", "SIGTERM", "training_step", 3, rank])) != 0
    print(f"\n{processes} processes, SIGTERM: {seconds_since_the_fault(log):.1f} s")
    ending = f"stopped by SIGTERM at step 4: the same command goes on from {out}/checkpoint-4"
    said = errors(log)
    assert len(said) == processes and all(len(lines) == 1 and lines[0].endswith(ending) for lines in said)
    assert (out / "checkpoint-4" / MANIFEST).exists() and not (out / "model_state.pdparams").exists()
    assert finish(start(processes, tmp_path / "log2", *args)) == 0
    assert sorted(losses(out)) == list(range(1, 7))


@pytest.mark.parametrize("name, again", [("SIGINT", False), ("SIGTERM", True)])
def test_signals_to_the_launcher(tmp_path, name, again):
    """It sends each process several SIGTERM, which are one; a second one ends at once."""
    out, log = tmp_path / "out", tmp_path / "log"
    hook = ["fault", "sleep" if again else "nothing", "training_step", 2]
    process = start(2, log, *flags(output_dir=out, max_steps=1000, save_steps=10000), hook=hook)
    while "FAULT AT" not in str(logs(log)):
        assert process.poll() is None
        time.sleep(0.1)
    began = time.time()
    process.send_signal(signal.Signals[name])
    if again:
        time.sleep(4)
        process.send_signal(signal.Signals[name])
    assert finish(process) != 0
    lines = errors(log)
    print(f"\n{name} {'twice ' if again else ''}{time.time() - began:.1f} s", lines)
    if again:
        assert time.time() - began < 40
        assert "there is no checkpoint to resume from" in lines[0][0]
        return
    pattern = r"stopped by \w+ at step (\d+): the same command goes on from"
    steps = [re.search(pattern, line[0])[1] for line in lines]
    assert steps[0] == steps[1] and (out / f"checkpoint-{steps[0]}" / MANIFEST).exists()


@pytest.mark.parametrize(
    "processes, rank, method, call",
    [
        (2, 1, "training_step", 4),
        (2, 0, "on_save", 2),
        (4, 3, "training_step", 4),
        (4, 0, "prediction_step", 1),
    ],
)
def test_a_process_that_dies_ends_all(tmp_path, processes, rank, method, call):
    """In a step, before a checkpoint is marked as whole, in an evaluation."""
    out, log = tmp_path / "out", tmp_path / "log"
    args = ["--do_eval", *flags(output_dir=out, max_steps=4, save_steps=2)]
    assert finish(start(processes, log, *args, hook=["fault", "SIGKILL", method, call, rank])) != 0
    seconds = seconds_since_the_fault(log)
    print(f"\n{processes} processes, kill -9 of {rank} in {method}: {seconds:.1f} s")
    assert seconds < 60
    advice = f"so this one of {processes} ends too: the same command goes on from {out}/check"
    for number, lines in enumerate(errors(log)):
        if number != rank:
            assert len(lines) == 1 and f"process {rank} is gone, {advice}" in lines[0], logs(log)[number][-5:]
    assert finish(start(processes, tmp_path / "log2", *args)) == 0
    assert sorted(losses(out)) == [1, 2, 3, 4]
    assert len((out / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 60


@pytest.mark.parametrize("flag", ["--overwrite_output_dir", "--resume_from_checkpoint"])
def test_a_process_that_dies_before_a_run_begins_anew(tmp_path, flag):
    """The others name no checkpoint of the run before, which this one does not go on from."""
    out, log = tmp_path / "out", tmp_path / "log"
    args = flags(output_dir=out, max_steps=3, save_steps=1)
    assert finish(start(2, tmp_path / "log0", *args)) == 0
    again = [flag] if "overwrite" in flag else [flag, out / "checkpoint-2"]
    assert finish(start(2, log, *args, *again, hook=["fault", "SIGKILL", "train", 1, 1])) != 0
    (line,), _ = errors(log)
    assert line.endswith("process 1 is gone, so this one of 2 ends too: the same command starts again")
    assert (out / "checkpoint-3" / MANIFEST).exists()


@pytest.mark.parametrize("method, call", [("training_step", 4), ("on_save", 2)])
def test_a_process_that_ends_alone_ends_all(tmp_path, method, call):
    """For a reason of its own, which it says: the other names it, and shows no traceback."""
    out, log = tmp_path / "out", tmp_path / "log"
    args = flags(output_dir=out, max_steps=4, save_steps=2)
    assert finish(start(2, log, *args, hook=["fault", "Fault", method, call, 1])) != 0
    assert "Traceback" not in str(logs(log))
    (first,), (second,) = errors(log)
    assert second == "finetune_generation.py: error: no more of this"
    place = f"process 1 is gone, so this one of 2 ends too: the same command goes on from {out}/check"
    assert place in first
