"""What a run shows and reads, as a user starts it: bars, lines, and a pipe that is answered line by line."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from helpers import MINI, ROOT, TRAIN, flags, read_jsonl, run

SCRIPT = [sys.executable, "finetune_generation.py"]


def start(*args, **streams):
    command = [*SCRIPT, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **streams)


def test_lines_where_there_is_no_terminal(tmp_path):
    args = [*TRAIN, "--do_eval", *flags(max_steps=3, per_device_eval_batch_size=30, output_dir=tmp_path)]
    process = start(*args, stderr=subprocess.PIPE)
    text = process.communicate(timeout=120)[1]
    lines = text.splitlines()
    assert process.returncode == 0 and "\r" not in text and "\x1b" not in text
    assert re.search(r"step 3/3: loss \d\.\d{4}, learning rate [\d.e-]+, [\d.]+ samples/s", text)
    assert lines[-1].endswith(
        f"done: in {tmp_path} are eval_results.json, eval_predictions.jsonl, model_state.pdparams"
    )
    # Nothing of PaddleNLP's; the results, and of three records answer, prediction and reference. Paddle 3
    # warns at its import.
    logged = [line for line in lines if line.startswith("[")]
    assert len(logged) < 12 + 10 + 9 and sum("prediction  " in line for line in logged) == 3
    assert list((tmp_path / "runs").rglob("vdlrecords*"))


def test_bars_on_a_terminal(tmp_path):
    args = [*TRAIN, "--do_eval", *flags(max_steps=3, per_device_eval_batch_size=30, output_dir=tmp_path)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # rows and columns
    process = start(*args, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    process.communicate(timeout=60)
    os.close(ours)
    assert re.search(rb"train: 100%.*3/3.*loss \d\.\d{4}, [\d.]+ samples/s", shown)
    assert re.search(rb"eval: 100%.*60/60.*[\d.]+ tokens/s", shown)


PREDICT = [*TRAIN, *flags(do_train=False), "--predict_file"]


def test_a_pipe_is_answered_line_by_line(tmp_path):
    rows = read_jsonl(MINI / "test.json")[:2]
    del rows[1]["question"]
    process = start(*PREDICT, "-", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
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
    run(*PREDICT, tmp_path / "questions.json", "--output_dir", tmp_path / "out")
    predictions = read_jsonl(tmp_path / "out/test_predictions.jsonl")
    assert len(predictions) == 2
    for row, answer in zip(predictions, answers):
        assert row.pop("score") == pytest.approx(answer.pop("score"), abs=1e-5) and row == answer


def test_a_reader_that_leaves_ends_the_pipe():
    with open(MINI / "train.json") as lines:
        process = start(*PREDICT, "-", stdin=lines, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == -signal.SIGPIPE and "Traceback" not in error


def test_packages_import_after_paddle():
    """libpaddle's zlib symbols break packages imported after it, unless they are the pinned ones."""
    code = "import paddle, scipy.stats, sklearn.metrics, pandas, datasets, aiohttp, yarl, paddlenlp"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_a_run_may_log_into_its_own_folder(tmp_path):
    command = [*SCRIPT, *TRAIN, *flags(output_dir=tmp_path / "out", max_steps=1)]
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/train.log", "w") as log:
        assert subprocess.run(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log).returncode == 0
    assert (tmp_path / "out/model_state.pdparams").exists()
