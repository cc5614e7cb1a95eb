"""Faults at random, for as long as one likes: a run is killed, stopped, starved, damaged, and goes on.

python tests/soak.py [--times 40] [--processes 1 2] [--seed 0] [--folder FOLDER]

On one process and on two: runs of 24 steps with a checkpoint every second step, whose sessions each
meet a fault at a random moment of what a session takes, until every fault has come up as often as
asked for. A run that has come to its end must be like one that was never touched: losses, weights,
predictions, and no temporary file left. Then the next run begins. Prints a table of the faults, and
ends with 1 where anything was otherwise.

A full disk is a small tmpfs that is filled up where one can be mounted (root), else a limit on the
size of the files that a run writes.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import ROOT, TRAIN, flags, launcher

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import paddle

STEPS, SAVE_STEPS = 24, 2
ARGS = [
    *TRAIN,
    "--do_eval",
    *flags(max_steps=STEPS, save_steps=SAVE_STEPS, save_total_limit=3, per_device_eval_batch_size=30),
]
FAULTS = ("kill -9", "SIGTERM", "full disk", "damaged checkpoint")
BEGUN = "each process is about to need"  # said between reading and loading


class Session:
    """One start of the command on so many processes, whose standard error goes to files in ``logs``."""

    def __init__(self, processes, output_dir, logs):
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        self.log, self.logs, self.output_dir, self.began = logs / "workerlog.0", logs, output_dir, time.time()
        program = ["finetune_generation.py"]
        if processes > 1:
            program = [*launcher(processes, logs)[1:], "--tensor_parallel_degree", processes]
        command = [sys.executable, *program, *ARGS, "--output_dir", output_dir]
        with open(logs / "launcher" if processes > 1 else self.log, "w") as errors:
            options = {
                "cwd": ROOT,
                "stdout": errors,
                "stderr": errors,
                "env": {**os.environ, "SOAK": str(logs)},
            }
            self.process = subprocess.Popen(list(map(str, command)), **options)

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def pids(self):
        """Of the processes that run the script."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            launched = b"paddle.distributed.launch" in command
            if f"SOAK={self.logs}\0".encode() in environment and b"--output_dir" in command and not launched:
                found.append(int(pid))
        return sorted(found)

    def step(self):
        """The last step that was logged."""
        return max(map(int, re.findall(rf"step (\d+)/{STEPS}: loss", self.text())), default=0)

    def wait(self, seconds=300):
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit(f"a session hangs, see {self.logs}") from None
        deadline = time.time() + 60
        while self.pids():
            if time.time() > deadline:
                self.kill()
                raise SystemExit(f"a process stays, see {self.logs}")
            time.sleep(0.05)
        return code

    def kill(self):
        for pid in [*self.pids(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def outcome(folder):
    """What must be the same: losses by step, weights, predicted ids."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    weights = paddle.load(str(folder / "model_state.pdparams"), return_numpy=True)
    rows = (folder / "eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    return losses, weights, [json.loads(row)["token_ids"] for row in rows]


def differences(folder, expected):
    """What is otherwise in a run that has come to its end, list of str."""
    found, (losses, weights, predictions) = [], outcome(folder)
    if losses.keys() != expected[0].keys():
        found.append(f"losses of steps {sorted(losses)}")
    elif (worst := max(abs(losses[step] - expected[0][step]) for step in losses)) > 1e-5:
        found.append(f"losses differ by {worst}")
    if (worst := max(float(np.abs(weights[name] - expected[1][name]).max()) for name in expected[1])) > 1e-5:
        found.append(f"weights differ by {worst}")
    if predictions != expected[2]:
        found.append("predictions differ")
    left = [path for pattern in ("*.tmp", ".unfinished", ".lock") for path in folder.rglob(pattern)]
    return found + [f"{path.relative_to(folder)} is left" for path in left]


def damage_a_checkpoint(folder, draw):
    """Cut short, or change, a random file of the newest whole checkpoint. Returns whether there is one."""
    marks = sorted(folder.glob("checkpoint-*/.checkpoint_done"), key=lambda path: path.stat().st_mtime)
    if not marks:
        return False
    files = [path for path in marks[-1].parent.iterdir() if path.stat().st_size and path.name[0] != "."]
    path = draw.choice(sorted(files))
    place = draw.randrange(path.stat().st_size)
    if draw.random() < 0.5:
        os.truncate(path, place)
    else:
        with open(path, "r+b") as file:
            file.seek(place)
            value = file.read(1)[0]
            file.seek(place)
            file.write(bytes([value ^ 0x41]))
    return True


class Disk:
    """The folder of the runs: a small file system that can be filled up, if it can be mounted."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", folder]
        self.mounted = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    def fill(self, pids):
        """Leave the run of the processes ``pids`` no room, until it ends."""
        if self.mounted:
            with open(self.folder / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 18))
                except OSError:
                    return
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # less than weights, more than a log
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 18, hard))

    def empty(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self):
        if self.mounted:
            subprocess.run(["umount", self.folder], check=True)


def soak(processes, times, draw, folder):
    """Print the table of one number of processes. Returns what was otherwise, list of str."""
    disk, wrong, logs = Disk(folder / "disk"), [], folder / "logs"
    try:
        session = Session(processes, disk.folder / "untouched", logs)
        while BEGUN not in session.text():
            if session.process.poll() is not None:
                raise SystemExit(f"the untouched run failed, see {logs}")
            time.sleep(0.02)
        start_up = time.time() - session.began
        if session.wait() != 0:
            raise SystemExit(f"the untouched run failed, see {logs}")
        whole = time.time() - session.began
        expected = outcome(disk.folder / "untouched")
        shutil.rmtree(disk.folder / "untouched")

        counts, lost, back = (dict.fromkeys(FAULTS, 0) for _ in range(3))
        runs, run, last, fault = 0, disk.folder / "run", 0, None  # the step before the fault, and the fault
        while True:
            wanted = [name for name in FAULTS if counts[name] < times]
            session = Session(processes, run, logs)
            resumed = fault is None
            now = draw.choice(wanted) if wanted else None
            in_start_up = draw.random() < 0.2
            moment = draw.uniform(0, start_up) if in_start_up else draw.uniform(0, whole - start_up)
            clock, happened = session.began if in_start_up else None, False
            while session.process.poll() is None:
                time.sleep(0.01)
                text = session.text()
                if clock is None and BEGUN in text:
                    clock = time.time()
                # The first step, or the end of a run that had no step left, is where it is back.
                if not resumed and (step := session.step()):
                    resumed = True
                    first = int(re.search(rf"step (\d+)/{STEPS}: loss", text)[1])
                    lost[fault] = max(lost[fault], last - (first - 1))
                    back[fault] = max(back[fault], time.time() - session.began)
                if now and not happened and clock and time.time() - clock > moment:
                    happened, pids = True, session.pids()
                    if now in ("kill -9", "damaged checkpoint") and pids:
                        os.kill(draw.choice(pids), signal.SIGKILL)
                    elif now == "SIGTERM":
                        os.kill(draw.choice([session.process.pid, *pids]), signal.SIGTERM)
                    elif now == "full disk":
                        disk.fill(pids)
            code, text, step = session.wait(), session.text(), session.step()
            disk.empty()
            # Not what Paddle itself prints of a SIGTERM that comes while it is imported.
            if "Traceback (most recent call last)" in text.replace("C++ Traceback (most recent", ""):
                wrong.append(f"a traceback after {now}")
                shutil.copytree(logs, folder / f"traceback-{len(wrong)}")
            if code == 0:
                runs, fault, last = runs + 1, None, 0
                found = differences(run, expected)
                wrong += found
                faults, text = sum(counts.values()), "; ".join(found) or "as one never touched"
                print(f"{processes} processes: run {runs}, {faults} faults so far: {text}", flush=True)
                shutil.rmtree(run)
                if not wanted:
                    break
                continue
            if not happened:
                wrong.append(f"ended by {code} without a fault: {text.splitlines()[-1:]}")
                shutil.copytree(logs, folder / f"unasked-{len(wrong)}")
                if len(wrong) > 9:
                    break
                continue
            if now == "damaged checkpoint" and not damage_a_checkpoint(run, draw):
                continue
            counts[now] += 1
            # A run that was stopped again before its first step still has to get back to the same step.
            last, fault = max(step, last if not resumed else 0), now
        print(f"\n| {processes} processes | times | steps lost at most | seconds to be back at most |")
        print("| --- | --- | --- | --- |")
        for name in FAULTS:
            print(f"| {name} | {counts[name]} | {lost[name]} | {back[name]:.1f} |")
        print(
            f"\n{runs} runs; the untouched one took {whole:.1f} s; {len(wrong)} things otherwise\n",
            flush=True,
        )
    finally:
        session.kill()
        disk.close()
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=40, help="how often each fault is to come up")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for what the runs write; a new one by default")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    for processes in args.processes:
        (folder / str(processes)).mkdir()
        wrong += soak(processes, args.times, random.Random(args.seed), folder / str(processes))
    print("\n".join(wrong) or "all as it should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
