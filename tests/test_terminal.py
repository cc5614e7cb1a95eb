"""What a run shows and reads, as a user starts it: bars, lines, and a pipe that is answered line by line."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios

import pytest
from helpers import MINI, ROOT, TRAIN, flags, pipe, read_jsonl, run

from glm.console import standard_output
from glm.errors import InputError

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
    written = lines[-1].split(f"done: in {tmp_path} are ")[1].split(", ")
    assert {"eval_results.json", "eval_predictions.jsonl", "model_state.pdparams"} <= {*written}
    assert all((tmp_path / name).is_file() for name in written)
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
    # A line out for each in: what can't be answered says why, and what follows is answered all the same.
    text = "no JSON\n\n" + json.dumps({**rows[0], "answer": "答" * 200}) + "\n" + json.dumps(rows[1]) + "\n"
    output, error = process.communicate(text, timeout=60)
    assert process.returncode == 2
    last = "error: lines without an answer: 3, the first: standard input:3: not JSON"
    assert last in error.splitlines()[-1]
    *mistakes, answer = map(json.loads, output.splitlines())
    beginnings = [
        "standard input:3: not JSON",
        "standard input:4: the line is blank",
        "standard input:5: prompt",
    ]
    assert [list(mistake) for mistake in mistakes] == [["error"]] * 3
    assert all(mistake["error"].startswith(start) for mistake, start in zip(mistakes, beginnings))
    assert answer["prediction"] == answers[1]["prediction"]
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


def test_so_many_lines_of_a_pipe():
    rows = pipe(MINI / "train.json", *TRAIN, *flags(do_train=False, max_predict_samples=2))
    assert [row["id"] for row in rows] == [row["id"] for row in read_jsonl(MINI / "train.json")[:2]]


def test_text_of_a_file_does_not_act_on_the_terminal(tmp_path):
    """Not in the last line, nor in the predictions that are shown; no line break forges a line of ours."""
    row = {"context": "c", "answer": "\x1b[2J\n[2026] finetune_generation.py: error: forged", "question": "q"}
    (tmp_path / "dev.json").write_text(json.dumps(row))
    args = [*TRAIN, *flags(do_train=False, do_eval=True, task_name=tmp_path, output_dir=tmp_path / "out")]
    lines = run(*args)
    assert any(line.endswith("answer      \\x1b[2J") for line in lines)
    assert "\x1b" not in "".join(lines) and not any(line.startswith("[2026] f") for line in lines)
    (tmp_path / "\x1b[31m\nforged").mkdir()
    *_, last = run(*args, "--task_name", tmp_path / "\x1b[31m\nforged", code=2)
    assert "\\x1b[31m forged/dev.json" in last


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    args = [*TRAIN, *flags(do_train=False, do_eval=True, max_eval_samples=2, output_dir=tmp_path)]
    command = shlex.join(map(str, [*SCRIPT, *args])) + f" {closed}"
    assert subprocess.run(command, shell=True, cwd=ROOT, capture_output=True).returncode == 0
    assert (tmp_path / "eval_results.json").exists()


def test_a_pipe_without_an_end():
    command = shlex.join(map(str, [*SCRIPT, *PREDICT, "-"])) + " 0<&-"
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL)
    assert found.returncode == 2 and b"input is not open for reading" in found.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "stdin, stdout, wrong",
    [
        (os.O_RDONLY, os.O_WRONLY, None),
        (os.O_RDWR, os.O_RDWR, None),  # a terminal
        (os.O_WRONLY, os.O_WRONLY, "input is not open for reading"),
        (os.O_DIRECTORY, os.O_WRONLY, "input is not open for reading"),
        (os.O_RDONLY, os.O_RDONLY, "output is not open for writing"),
        (os.O_RDONLY, os.O_DIRECTORY, "output is not open for writing"),
        (os.O_RDONLY, None, "output is not open for writing"),
    ],
)
def test_what_a_pipe_can_t_use_is_a_line(tmp_path, monkeypatch, stdin, stdout, wrong):
    """Before the model is loaded."""
    before = [os.dup(number) for number in (0, 1)]
    try:
        for number, (name, mode) in enumerate((("stdin", stdin), ("stdout", stdout))):
            monkeypatch.setattr(sys, f"__{name}__", mode if mode is None else sys.stderr)
            if mode is not None:
                opened = os.open(tmp_path if mode == os.O_DIRECTORY else os.devnull, mode)
                os.dup2(opened, number)
                os.close(opened)
        with pytest.raises(InputError, match=f"standard {wrong}") if wrong else contextlib.nullcontext():
            with standard_output() as output:
                print("x", file=output)
    finally:
        for number, kept in enumerate(before):
            os.dup2(kept, number)
            os.close(kept)


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


@pytest.mark.parametrize(
    "variables, named", [({"HOME": "/proc"}, "HOME"), ({"PPNLP_HOME": "/proc/none"}, "PPNLP_HOME")]
)
def test_a_home_that_cannot_be_written_is_a_line(variables, named):
    """Paddle and PaddleNLP make folders there as they are imported."""
    process = start("--help", stderr=subprocess.PIPE, env={**os.environ, **variables})
    lines = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2 and "Traceback" not in "".join(lines)
    assert lines[-1].endswith(f"which Paddle wants: set {named} to a folder that can be written to")
