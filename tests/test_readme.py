"""Every command of the README, in its own words: only paths, what a machine without GPUs lacks, and the size change."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    COMMON,
    ROOT,
    TINY_GLM,
    free_port,
    outcome,
    read_jsonl,
    repeats_ngram,
    run_processes,
    small_data,
    tiny_glm,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
ENGLISH, CHINESE = README.split("\n# 中文\n")
IN_LINE = r"`((?:python|pip|visualdl|cat) [^`]+)`"  # short ones stand in the text
COMMANDS = re.findall(r"```bash\n(.*?)```", ENGLISH, re.DOTALL) + [
    f"{text}\n" for text in re.findall(IN_LINE, ENGLISH)
]
EIGHT = '--gpus "0,1,2,3,4,5,6,7" finetune_generation.py'


def command(start, word=""):
    """The one block of the README that starts so and has the word."""
    (found,) = [block for block in COMMANDS if block.startswith(start) and word in block]
    return found


def shell(text, folder, *replacements, add="", timeout=300):
    """Run a block of the README with paths replaced, and what is needed to be quick added. Returns standard output."""
    for old, new in replacements:
        assert old in text
        text = text.replace(old, str(new))
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (binaries / "pip").write_text(
        '#!/bin/sh\ntest "$1 $2" = "install -r" && test -f "$3"\n'
    )  # .ci/run does install it
    for path in binaries.iterdir():
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    script = f"set -e\n{text.rstrip()} {add}\n"
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


SHORT = "--tgt_length 24 --src_length 160 --num_beams 2"
MODEL = ("--model_name_or_path THUDM/glm-large-chinese", f"--model_name_or_path {TINY_GLM}")
OUTPUT = "./checkpoints/glm-large-chinese"


def test_both_languages_have_the_same_commands_and_sections():
    assert len(README.splitlines()) < 420
    lines = [line for block in COMMANDS for line in block.replace("\\\n", "").splitlines()]
    assert sorted(lines) == sorted(re.findall(IN_LINE, CHINESE))
    assert len(re.findall(r"^##+ ", ENGLISH, re.M)) == len(re.findall(r"^##+ ", CHINESE, re.M))
    for title in ("which-stack", "memory", "speed", "parameters"):  # tables that stand once
        assert f"(#{title})" in CHINESE


def test_every_command_is_run_here():
    here = open(__file__, encoding="utf-8").read()
    starts = re.findall(r"command\(\n?\s*[\"'](.*?)[\"'](?:, \"(.*?)\")?\)", here)
    for block in COMMANDS:
        assert sum(block.startswith(start) and word in block for start, word in starts) == 1, block


def test_install_and_demo(tmp_path):
    text = command("pip install -r requirements.txt && python finetune_generation.py")
    shell(
        text, tmp_path, add=f"--output_dir {tmp_path}/demo --max_steps 20 --eval_steps 10 --logging_steps 5"
    )
    assert len(read_jsonl(tmp_path / "demo/eval_predictions.jsonl")) == 60
    shell(command("python tests/fixtures/plot_demo.py"), (tmp_path / "demo"),
          add=f"{tmp_path}/demo/trainer_state.json {tmp_path}/curves.png")  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_ones_own_records(tmp_path):
    text = command("python finetune_generation.py --model_name_or_path THUDM/glm-large-chinese --task_name")
    data = small_data(tmp_path, train=4, dev=3)
    shell(
        text,
        tmp_path,
        MODEL,
        ("./my_data", data),
        ("./my_model", tmp_path / "out"),
        add=f"{SHORT} --max_steps 2",
    )
    assert len(read_jsonl(tmp_path / "out/eval_predictions.jsonl")) == 3
    assert (tmp_path / "out/model_state.pdparams").exists()


def test_the_other_stack_and_the_card(tmp_path):
    text = command("pip install -r requirements-paddle3.txt && python finetune_generation.py")
    shell(
        text,
        tmp_path,
        add=f"--output_dir {tmp_path}/demo --max_steps 2 --evaluation_strategy no --do_predict False",
    )
    assert len(read_jsonl(tmp_path / "demo/eval_predictions.jsonl")) == 60
    printed = shell(command('python -c "import paddle; print(paddle.device.get_device())'), tmp_path)
    assert printed.splitlines()[0] == "cpu" and "PaddlePaddle is installed successfully" in printed


def test_the_tests(tmp_path):
    shell(
        command("pip install -r tests/requirements.txt && python -m pytest"),
        tmp_path,
        add="--collect-only -q",
    )


def test_the_single_card_command_and_its_curves(tmp_path):
    data = small_data(tmp_path, train=4, dev=3)
    shell(command("python finetune_generation.py --model_name_or_path THUDM/glm-large-chinese --num_train_epochs"),
          tmp_path, MODEL, (OUTPUT, tmp_path / "out"), add=f"--task_name {data}")  # fmt: skip
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["max_steps"] == 8
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    assert rates[-1] == pytest.approx(3e-6)  # lr_decay_ratio of the peak
    rows = read_jsonl(tmp_path / "out/eval_predictions.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert 55 <= len(row["token_ids"]) <= 160 and not repeats_ngram(row["token_ids"], 3)

    port = free_port()
    text = command("visualdl --logdir").replace(OUTPUT, str(tmp_path / "out"))
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    server = subprocess.Popen([Path(sys.executable).parent / "visualdl", *shlex.split(text)[1:], "--port", str(port)],
                              start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(60):
            time.sleep(0.5)
            try:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/app/index", headers={"Accept-Language": "en"}
                )
                page = open_url(request, timeout=5).read()
                break
            except OSError:
                assert server.poll() is None
        assert b"VisualDL" in page
        tags = open_url(f"http://127.0.0.1:{port}/app/api/scalar/tags", timeout=5).read()
        assert b"train/loss" in tags
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_the_8_card_command(tmp_path):
    """Over 8 CPU processes, on a tiny model with 8 heads."""
    model = tiny_glm(tmp_path / "model", num_attention_heads=8, hidden_size=64, num_layers=1)
    data = small_data(tmp_path, train=2, dev=2)
    text = command('python -m paddle.distributed.launch --gpus "0,1,2', "glm-large")
    shell(text, tmp_path, (MODEL[0], f"--model_name_or_path {model}"),
          (OUTPUT, tmp_path / "out"), (EIGHT, f"--nproc_per_node 8 --log_dir {tmp_path} tests/parallel_worker.py"),
          add=f"--task_name {data}")  # fmt: skip
    rows = read_jsonl(tmp_path / "out/eval_predictions.jsonl")
    assert len(rows) == 2 and all(55 <= len(row["token_ids"]) <= 160 for row in rows)
    assert (tmp_path / "out/model_state.pdparams").exists()


def test_the_10b_commands_and_merging(tmp_path):
    """On CPU processes: an adapter on two, all weights on eight, each in half precision for a card; then the merge."""
    model = tiny_glm(tmp_path / "model", num_attention_heads=8, hidden_size=64, num_layers=1)
    data, out = small_data(tmp_path, train=4, dev=2), tmp_path / "lora"
    large = ("--model_name_or_path THUDM/glm-10b-chinese", f"--model_name_or_path {model}")
    small = f"--task_name {data} --max_steps 2 {SHORT}"
    text = command('python -m paddle.distributed.launch --gpus "0,1" ')
    two = (
        '--gpus "0,1" finetune_generation.py',
        f"--nproc_per_node 2 --log_dir {tmp_path} tests/parallel_worker.py",
    )
    shell(text, tmp_path, large, ("./checkpoints/glm-10b-lora", out), two, add=small)
    assert (out / "lora_model_state.pdparams").exists() and not (out / "model_state.pdparams").exists()
    expected = [row["token_ids"] for row in read_jsonl(out / "eval_predictions.jsonl")]
    text = command('python -m paddle.distributed.launch --gpus "0,1,2', "glm-10b")
    eight = (EIGHT, f"--nproc_per_node 8 --log_dir {tmp_path} tests/parallel_worker.py")
    shell(
        text,
        tmp_path,
        large,
        ("./checkpoints/glm-10b ", f"{tmp_path}/full "),
        eight,
        add=f"{small} --do_eval False",
    )
    assert (tmp_path / "full/model_state.pdparams").exists()
    text = command(
        "python finetune_generation.py --model_name_or_path ./checkpoints/glm-10b-lora --merge_lora"
    )
    shell(text, tmp_path, ("./checkpoints/glm-10b-lora", out), ("./checkpoints/glm-10b-merged", tmp_path / "merged"),
          add=f"--task_name {data} --do_eval --min_tgt_length 0 {SHORT}")  # fmt: skip
    assert [row["token_ids"] for row in read_jsonl(tmp_path / "merged/eval_predictions.jsonl")] == expected
    assert (tmp_path / "merged/model_state.pdparams").exists()


def test_two_machines(tmp_path):
    """Two launchers on the loopback, of one process each, against one process."""
    data, out = small_data(tmp_path, train=26, dev=7), tmp_path / "out"
    text = command("python -m paddle.distributed.launch --master").replace("\\\n", "")
    assert "--tensor_parallel_degree 8" in text and "--rank 0" in text and EIGHT in text
    flags = [*COMMON, "--per_device_train_batch_size", 2, "--task_name", data]
    text = text.replace(EIGHT, "--nproc_per_node 1 --log_dir LOG tests/parallel_worker.py").replace(*MODEL)
    text = text.replace("--tensor_parallel_degree 8", "").replace(OUTPUT, str(out))
    text = text.replace("FIRST_MACHINE:8090", f"127.0.0.1:{free_port()}")
    nodes = [text, text.replace("--rank 0", "--rank 1")]
    commands = [
        [*shlex.split(node.replace("python", sys.executable, 1).replace("LOG", f"{tmp_path}/log{i}")), *flags]
        for i, node in enumerate(nodes)
    ]
    codes, outputs = run_processes(commands)
    assert codes == [0, 0], outputs
    one = [sys.executable, "finetune_generation.py", "--model_name_or_path", TINY_GLM, *COMMON, "--task_name", data,
           "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4]  # fmt: skip
    assert run_processes([one])[0] == [0]
    losses, predictions, _ = outcome(out)
    expected = outcome(tmp_path / "one")
    np.testing.assert_allclose(losses, expected[0], atol=2e-4)
    assert predictions == expected[1]


def test_evaluation_during_training_then_prediction_and_pipe(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "data").mkdir()
    data = small_data(tmp_path / "data")
    text = command("python finetune_generation.py --model_name_or_path THUDM/glm-large-chinese --output_dir")
    shell(text, tmp_path, MODEL, (OUTPUT, out), ("--eval_steps 500 --save_steps 500", "--eval_steps 2 --save_steps 2"),
          add=f"--task_name {data} --max_steps 8 {SHORT} --learning_rate 1e-3")  # fmt: skip
    assert 3 <= len(list(out.glob("checkpoint-*"))) <= 4
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [row["eval_rougel"] for row in state["log_history"] if "eval_rougel" in row]
    assert len(scores) == 4 and state["best_metric"] == max(scores)

    replaced = [(OUTPUT, out), ("./my_data", data)]
    shell(command("python finetune_generation.py --model_name_or_path ./checkpoints/glm-large-chinese --task_name"),
          tmp_path, *replaced, ("./predictions", tmp_path / "predictions"), add=SHORT)  # fmt: skip
    predictions = read_jsonl(tmp_path / "predictions/test_predictions.jsonl")
    shell(command("cat ./my_data/test.json | python finetune_generation.py"), tmp_path, *replaced,
          ("--predict_file -", f"{SHORT} --predict_file -"), ("answers.jsonl", tmp_path / "answers.jsonl"))  # fmt: skip
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["token_ids"] for row in answers] == [row["token_ids"] for row in predictions] and len(
        answers
    ) == 3


def test_memory(tmp_path):
    """The table is the README's; test_lora runs the check of each setting."""
    lines = command("python tests/benchmarks/memory.py").splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["tests/benchmarks/memory.py"],
        ["tests/benchmarks/memory.py", "--check"],
    ]
    assert shell(lines[0], tmp_path).strip() in ENGLISH  # every figure of it


def test_benchmarks(tmp_path):
    """Each at a small size: what they print, not how long they take."""
    lines = command("python tests/benchmarks/decode.py").splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["tests/benchmarks/decode.py"],
        ["tests/benchmarks/decode.py", "--layers", "24"],
        ["tests/benchmarks/decode.py", "--growth"],
        ["tests/benchmarks/train.py"],
    ]
    for line, small, words in [
        (lines[0], "--tokens 4 --source 64 --peer_tokens 3 --batch_size 1 --beams 2",
         ["PaddleNLP generate()", "ratio", "ours / products"]),
        (lines[2], "--tokens 2 --source 64", ["source cache MB"]),
        (lines[3], "--records 2 --batch_size 1 --peer_steps 1", ["PaddleNLP's recipe", "ratio", "products / ours"]),
    ]:  # fmt: skip
        printed = shell(line, tmp_path, add=f"--layers 1 --width 64 {small}")
        assert all(word in printed for word in words)
