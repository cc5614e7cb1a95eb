"""Run every command of the pages: only paths, sizes and the number of cards change.

A command stands in a ```bash block or, if it is short, between backquotes. ROWS knows it by its beginning.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Callable

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
    run,
    run_processes,
    small_data,
    tiny_glm,
)

from glm.arguments import (
    DataArguments,
    GenerationArguments,
    GLMTrainingArguments,
    ModelArguments,
    parse_arguments,
)

NAMES = ("README.md", "README_zh.md", "CONTRIBUTING.md", "docs/reference.md", "docs/benchmarks.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
SHORT = "--tgt_length 24 --src_length 160 --num_beams 2"
SMALL = f"{SHORT} --min_tgt_length 0 --max_steps 2"


def find_commands(text):
    """The commands of a markdown text, list of str, each on one line, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return lines + re.findall(r"`((?:python|pip|visualdl|cat) [^`]+)`", text)


def localise(command, folder):
    """Replace the models, folders and cards that a test doesn't have by those in ``folder``, a Path."""
    model = TINY_GLM
    if cards := re.search(r'--gpus "([\d,]+)" finetune_generation.py', command):
        processes = len(cards[1].split(","))
        if processes == 8:
            model = tiny_glm(folder / "model", num_attention_heads=8, hidden_size=64, num_layers=1)
        worker = f"--nproc_per_node {processes} --log_dir {folder}/log tests/parallel_worker.py"
        command = command.replace(cards[0], worker)
    (folder / "data").mkdir()
    data = small_data(folder / "data", train=4, dev=3)
    if ("--do_train" in command or "configs/" in command) and "--task_name" not in command:
        command += f" --task_name {data}"
    if "configs/" in command:
        command += f" --model_name_or_path {model} --output_dir {folder}/out"
    for old, new in {
        "./my_data": data,
        "tests/fixtures/make": f"{folder}/make",
        "answers.jsonl": f"{folder}/answers.jsonl",
        """$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")""": str(folder / "site"),
    }.items():
        command = command.replace(old, new)
    command = re.sub(r"(?<=path )(THUDM/\S+|./my_model|checkpoints/demo)", str(model), command)
    command = command.replace("path ./checkpoints", f"path {folder}")
    return re.sub(r"--output_dir \S+", f"--output_dir {folder}/out", command)


def run_in_shell(command, folder):
    """Run a command at the root; pip only looks whether its files are there. Returns what is printed."""
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    pip = 'while [ $# -gt 0 ]; do [ "$1" != -r ] || test -f "$2" || exit 1; shift; done'
    (binaries / "pip").write_text(f"#!/bin/sh\n{pip}\n")
    for path in binaries.iterdir():
        path.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def train_two_steps(folder, output, *flags):
    """Train tiny-glm on the records of ``folder``/data, with the results in ``folder``/``output``."""
    paths = [
        "--model_name_or_path",
        TINY_GLM,
        "--task_name",
        folder / "data",
        "--output_dir",
        folder / output,
    ]
    run(*paths, *SMALL.split(), "--logging_steps", 1, "--do_train", "--do_eval", *flags)


def serve_curves(command, folder):
    """Ask VisualDL's server for the curves of a short run."""
    train_two_steps(folder, "out")
    program, flag, logs = shlex.split(command)
    logs, port = logs.replace("./checkpoints/glm-large", f"{folder}/out"), free_port()
    server = subprocess.Popen(
        [Path(sys.executable).parent / program, flag, logs, "--port", str(port)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        for _ in range(480):
            time.sleep(0.5)
            try:
                tags = fetch(f"http://127.0.0.1:{port}/app/api/scalar/tags", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None
        assert b"train/loss" in tags
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def start_two_machines(command, folder):
    """Start two launchers on the loopback, of one process each, beside a run of one process."""
    flags = [*COMMON, "--per_device_train_batch_size", 2]
    command = command.replace("--nproc_per_node 8", "--nproc_per_node 1")
    command = command.replace("--tensor_parallel_degree 8", "").replace(f"{folder}/model", str(TINY_GLM))
    command = command.replace("FIRST_MACHINE:8090", f"127.0.0.1:{free_port()}")
    nodes = [
        command.replace("--rank 0", f"--rank {rank}").replace(f"{folder}/log", f"{folder}/log{rank}")
        for rank in range(2)
    ]
    codes, outputs = run_processes([[sys.executable, *shlex.split(node)[1:], *flags] for node in nodes])
    assert codes == [0, 0], outputs
    paths = ["--model_name_or_path", TINY_GLM, "--task_name", folder / "data", "--output_dir", folder / "one"]
    run(*paths, *COMMON, "--per_device_train_batch_size", 4)
    losses, predictions, _ = outcome(folder / "out")
    expected = outcome(folder / "one")
    np.testing.assert_allclose(losses, expected[0], atol=2e-4)
    assert predictions == expected[1]


def merge(command, folder):
    """Merge an adapter that two steps made: the whole model predicts what both predict together."""
    train_two_steps(folder, "glm-10b-lora", "--lora", True)
    run_in_shell(f"{command} --task_name {folder}/data --do_eval {SHORT} --min_tgt_length 0", folder)
    assert (folder / "out/model_state.pdparams").exists()
    expected, merged = (
        [row["token_ids"] for row in read_jsonl(folder / name / "eval_predictions.jsonl")]
        for name in ("glm-10b-lora", "out")
    )
    assert merged == expected


def make_fixtures(command, folder):
    """Make them beside a copy of their script: they are those of tests/fixtures."""
    fixtures = ROOT / "tests/fixtures"
    for path in fixtures.glob("make_*.py"):
        shutil.copy(path, folder)
    if "tiny_glm" in command:
        shutil.copytree(fixtures / "dureader_qg_mini", folder / "dureader_qg_mini")
    run_in_shell(command, folder)
    name = re.search(r"make_(\w+)\.py", command)[1].replace("tiny_glm", "tiny-glm")
    for path in (fixtures / name).iterdir():
        if path.suffix != ".json" or "tiny" not in name:  # config.json names PaddleNLP's version
            assert path.read_bytes() == (folder / name / path.name).read_bytes()


def predictions(count, split="eval", shortest=0):
    def check(folder, printed):
        rows = read_jsonl(folder / f"out/{split}_predictions.jsonl")
        assert len(rows) == count
        assert all(shortest <= len(row["token_ids"]) <= 160 for row in rows)
        return rows

    return check


def complete_model(count, **limits):
    def check(folder, printed):
        assert (folder / "out/model_state.pdparams").exists()
        predictions(count, **limits)(folder, printed)

    return check


def single_card(folder, printed):
    rows = predictions(3, shortest=55)(folder, printed)
    assert not any(repeats_ngram(row["token_ids"], 3) for row in rows)
    state = json.loads((folder / "out/trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    assert state["max_steps"] == 8
    assert rates[-1] == pytest.approx(3e-6)  # lr_decay_ratio of the peak


def evaluated_each_epoch(folder, printed):
    assert 2 <= len(list(folder.glob("out/checkpoint-*"))) <= 3
    state = json.loads((folder / "out/trainer_state.json").read_text())
    scores = [row["eval_rougel"] for row in state["log_history"] if "eval_rougel" in row]
    assert len(scores) == 4 and state["best_metric"] == max(scores)
    predictions(3)(folder, printed)


def titled(folder, printed):
    rows, records = predictions(2)(folder, printed), read_jsonl(ROOT / "tests/fixtures/titles/dev.json")
    assert [(row["text"], row["reference"]) for row in rows] == [(r["text"], r["title"]) for r in records]


def adapter(folder, printed):
    assert (folder / "out/lora_model_state.pdparams").exists()
    assert not (folder / "out/model_state.pdparams").exists()
    predictions(3)(folder, printed)


def exported(folder, printed):
    names = {path.name for path in (folder / "out/torch").iterdir()}
    assert {"model.safetensors", "config.json", "cog-pretrain.model"} <= names


def piped(folder, printed):
    assert [bool(row["token_ids"]) for row in read_jsonl(folder / "answers.jsonl")] == [True] * 3


def memory_tables(folder, printed):
    """Every figure of the memory tables is printed."""
    for table in printed.strip().split("\n\n"):
        assert table in TEXTS["docs/benchmarks.md"]
    for name in ("README.md", "README_zh.md"):
        rows = re.findall(r"^\| GLM-\S+ +\| .*", TEXTS[name], re.M)
        assert len(rows) == 4 and set(rows) <= set(printed.splitlines())


def link_libraries(command, folder):
    """Link CUDA's libraries as pip installs them; a library of Python's stands for each."""
    names = "cublas/lib/libcublas.so.11 cublas/lib/libcublasLt.so.11 cusolver/lib/libcusolver.so.11"
    library = importlib.util.find_spec("_ctypes").origin
    for name in f"{names} cudnn/lib/libcudnn.so.8 nccl/lib/libnccl.so.2".split():
        path = folder / "site/nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, path)
    run_in_shell(command, folder)
    assert (folder / "site/nvidia/lib/libcublasLt.so").samefile(
        path.parents[2] / "cublas/lib/libcublasLt.so.11"
    )


def prints(*words):
    def check(folder, printed):
        assert all(word in printed for word in words), printed

    return check


@dataclass
class Row:
    """How a command that begins with ``start`` is run: what is added to it, and what has to come of it.

    ``run(command, folder)`` returns what is printed, and ``check(folder, printed)`` looks at it.
    """

    start: str
    add: str = ""
    check: Callable = lambda folder, printed: None
    run: Callable = run_in_shell
    slow: bool = True


SCRIPT, LAUNCH = "python finetune_generation.py", "python -m paddle.distributed.launch"
LARGE, CARDS = "--model_name_or_path THUDM/glm-large-chinese", '--gpus "0,1,2,3,4,5,6,7"'
DEMO = f"{SCRIPT} tests/fixtures/demo.json"
TINY = "--layers 1 --width 64"
DECODE = f"{TINY} --tokens 4 --source 64"
ONE_BATCH = "--batch_size 1 --beams 2 --peer_tokens 3"
ROWS = [
    Row("pip install -r requirements.txt -r requirements-cuda11.txt", slow=False),
    Row("lib=$(python", run=link_libraries, slow=False),
    Row("pip install -r tests/requirements.txt && python -m pytest", "--collect-only -q"),
    Row("pip install -r tests/requirements.txt", slow=False),
    Row("pip install -r requirements-paddle3.txt", slow=False),
    Row(
        "pip install -r requirements-paddle3.txt && python",
        "--output_dir out --max_steps 2 --evaluation_strategy no --do_predict False",
        predictions(60),
    ),
    Row("ruff check"),
    Row("python -m pytest", "--collect-only -q"),
    Row('python -c "import paddle', check=prints("cpu\n", "PaddlePaddle is installed successfully")),
    Row(f"{SCRIPT} --help", check=prints("--num_return_sequences", "--tensor_parallel_degree"), slow=False),
    Row(DEMO, "--output_dir out --max_steps 20 --eval_steps 10 --logging_steps 5", predictions(60)),
    Row(f"{SCRIPT} configs/glm-large.json", SHORT, evaluated_each_epoch, slow=False),
    Row(f"{SCRIPT} configs/glm-large.json --task_name tests/fixtures/titles", SHORT, titled, slow=False),
    Row(f"{SCRIPT} configs/glm-10b-lora.json", SHORT, adapter),
    Row(f"{SCRIPT} {LARGE} --num_train_epochs", check=single_card),
    Row(f"{SCRIPT} {LARGE} --output_dir ./checkpoints/glm-large-dureader_qg", SMALL, complete_model(3)),
    Row("echo", check=prints('"answer": "1205米"', '"prediction": "'), slow=False),
    Row(f"{SCRIPT} --model_name_or_path ./my_model", SHORT, predictions(3, "test"), slow=False),
    Row(f"{SCRIPT} --model_name_or_path ./my_model --export_torch", check=exported, slow=False),
    Row("cat ./my_data/test.json", check=piped, slow=False),
    Row(f"{SCRIPT} --model_name_or_path ./checkpoints/glm-10b-lora --merge_lora", run=merge),
    Row(f"{LAUNCH} {CARDS} finetune_generation.py {LARGE}", check=complete_model(3, shortest=55)),
    Row(f'{LAUNCH} --gpus "0,1" ', SHORT, adapter),
    Row(
        f"{LAUNCH} {CARDS} finetune_generation.py --model_name_or_path THUDM/glm-10b",
        SMALL,
        complete_model(3),
    ),
    Row(f"{LAUNCH} --master", run=start_two_machines),
    Row("visualdl --logdir", run=serve_curves),
    Row("python tests/benchmarks/memory.py", check=memory_tables, slow=False),
    Row(
        "python tests/benchmarks/memory.py --check",
        f"{TINY} --source 32 --target 16 --batch_sizes 2",
        prints("ratio", "evaluate"),
    ),
    Row(
        "python tests/benchmarks/decode.py",
        f"{DECODE} {ONE_BATCH}",
        prints("PaddleNLP generate()", "ours / products"),
    ),
    Row("python tests/benchmarks/decode.py --growth", DECODE, prints("source cache MB")),
    Row(
        "python tests/benchmarks/train.py",
        f"{TINY} --records 2 --batch_size 1 --peer_steps 1",
        prints("PaddleNLP's recipe", "products / ours"),
    ),
    Row("python tests/fixtures/make_", run=make_fixtures),
]
COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in find_commands(text)))


def find_row(command):
    """The row with the longest beginning of the command, or None."""
    rows = [row for row in ROWS if command.startswith(row.start)]
    return max(rows, key=lambda row: len(row.start), default=None)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if (row := find_row(command)) and row.slow else ())
        for command in COMMANDS
    ],
)
def test_command(command, tmp_path):
    row = find_row(command)
    assert row, "no row of ROWS knows this command"
    command = localise(f"{command} {row.add}".rstrip(), tmp_path)
    if "predict_file -" in command:
        command = command.replace("--predict_file", f"{SHORT} --predict_file")
    printed = row.run(command, tmp_path)
    row.check(tmp_path, printed)


def test_each_row_has_a_command():
    assert {row.start for row in ROWS} == {find_row(command).start for command in COMMANDS}


def test_both_languages_have_the_same_commands():
    assert find_commands(TEXTS["README.md"]) == find_commands(TEXTS["README_zh.md"])


@pytest.mark.parametrize("name", NAMES)
def test_links(name):
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", TEXTS[name]):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_folder_is_shown_as_it_is(name):
    tree = TEXTS[name].split("\nfinetune_generation.py  ")[1].split("```")[0]
    shown = {"finetune_generation.py", *re.findall(r"\w+\.py", tree)}
    assert shown == {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("glm/**/[!_]*.py")]}


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_a_readme_is_short(name):
    assert len(TEXTS[name].splitlines()) <= 200


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_defaults(name):
    defaults = {
        item.name: item.default
        for group in (ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments)
        for item in fields(group)
    }
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", TEXTS[name], re.M)
    assert len(rows) == 8 and all(str(defaults[argument]) == default for argument, default in rows)


def test_the_seed_file_is_the_command(monkeypatch):
    """configs/glm-large-seed.json and the README's single-card command give the same arguments."""
    command = next(text for text in COMMANDS if text.startswith(f"{SCRIPT} {LARGE} --num_train_epochs"))
    words = (shlex.split(command)[2:], ["configs/glm-large-seed.json"])
    groups = []
    for arguments in words:
        monkeypatch.setattr(sys, "argv", ["finetune_generation.py", *arguments])
        groups.append([vars(group) for group in parse_arguments()])
    for values in groups:
        values[3].pop("logging_dir")  # which holds the time
    assert groups[0] == groups[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_one(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune_generation.py", "--help"])
    with pytest.raises(SystemExit):
        parse_arguments()
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    others = "--gpus --nproc_per_node --master --nnodes --rank --logdir --check --layers --growth --help"
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", TEXTS[name])) <= known | set(others.split())
