"""Every mistake ends with exit code 2 and one line that names it, before anything is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from helpers import ROOT, TINY_GLM, TRAIN, flags, main, run
from paddlenlp.utils.log import logger

import finetune_generation
from glm import arguments

RECORD = {"context": "明霜峰高1205米。", "answer": "1205米", "question": "明霜峰有多高？"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a model and data that are right, and the command that uses them."""
    shutil.copytree(TINY_GLM, tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "dev", "test"):
        (tmp_path / f"data/{split}.json").write_text(
            json.dumps(RECORD, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return tmp_path


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(name, content):
    """A damage: this content, str or bytes, in the file ``name``."""

    def damage(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def record(split="train", **changes):
    row = {key: value for key, value in {**RECORD, **changes}.items() if value is not ...}
    return write(f"data/{split}.json", json.dumps(RECORD) + "\n\n" + json.dumps(row) + "\n")


def config(**changes):
    def damage(folder):
        path = folder / "model/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def other_weights(folder):
    import paddle

    path = str(folder / "model/model_state.pdparams")
    paddle.save({f"bert.{name}": value for name, value in paddle.load(path).items()}, path)


def torn_weights(folder):
    os.truncate(folder / "model/model_state.pdparams", 1_000_000)


# The flags, what is done to the folder, and the name that the line has to have: of a flag, a file, a field.
MISTAKES = [
    # the arguments alone
    ("--label_smoothing nan", None, "--label_smoothing"),
    ("--learning_rate much", None, "--learning_rate"),
    ("--learning_rate 1e30", None, "and at most 9223372036854775807"),
    ("--num_train_epochs 0", None, "--num_train_epochs"),
    ("--min_tgt_length 161", None, "--tgt_length 160"),
    ("--num_beams 2000", None, "--num_beams"),
    ("--num_return_sequences 4 --num_beams 3", None, "--num_return_sequences"),
    ("--minimum_eval_times 3", None, "--minimum_eval_times"),
    ("--early_stopping_patience 2", None, "--early_stopping_patience"),
    ("--load_best_model_at_end", None, "--load_best_model_at_end"),
    ("--fp16 --bf16", None, "fp16 and bf16"),
    ("--fp16_opt_level O7", None, "--fp16_opt_level"),
    ("--device abacus", None, "--device"),
    ("--report_to paper", None, "--report_to"),
    ("--lr_scheduler_type zigzag", None, "zigzag"),
    ("--evaluation_strategy often", None, "--evaluation_strategy"),
    ("--weight_quantize_algo nf4 --lora True", None, "--weight_quantize_algo"),
    ("--weight_quantize_algo weight_only_int8", None, "weights in int8 can't be trained, but an adapter"),
    ("--tensor_parallel_degree 3", None, "--tensor_parallel_degree 3 does not divide the one process"),
    ("--sharding stage2", None, "--sharding"),
    ("--save_on_each_node --tensor_parallel_degree 2", None, "--save_on_each_node keeps"),
    ("--save_on_each_node --sharding stage1", None, "and with --sharding that is a part"),
    ("--past_index 0", None, "--past_index"),
    ("--hybrid_parallel_topo_order up", None, "hybrid_parallel_topo_order"),
    ("--do_train maybe", None, "maybe"),
    ("--disable_tqdm", None, "--disable_tqdm"),
    ("--save_steps 0.5", None, "--save_steps"),
    ("--report_to visualdl none", None, "--report_to visualdl none"),
    ("--logging_dir {folder}/data/dev.json/x", None, "--logging_dir {folder}/data/dev.json/x"),
    ("--logging_dir /proc/runs", None, "--logging_dir /proc/runs: /proc can't be written to"),
    ("--num_beems 5", None, "--num_beems"),
    ("--predict_file -", None, "--predict_file -"),
    ("--predict_file {folder}/none.json", None, "none.json"),
    ("--src_length 900", None, "--src_length 900"),
    ("--src_length 12", None, "train.json:1"),
    ("--min_tgt_length 0 --tgt_length 5", None, "--tgt_length 5"),
    # where the output goes
    ("--output_dir {folder}/data/dev.json/out", None, "dev.json"),
    ("--output_dir {folder}/texts", write("texts/notes.log", "mine"), "notes.log"),
    ("--output_dir=", None, "--output_dir"),
    ("--output_dir /proc/out", None, "--output_dir /proc/out: /proc can't be written to"),
    ("--resume_from_checkpoint {folder}/data", None, "--resume_from_checkpoint"),
    ("--resume_from_checkpoint {folder}/gone", None, "gone: there is no such folder"),
    ("--resume_from_checkpoint True", None, "True: there is no such folder"),
    # the data, whose lines tests/test_data.py has
    ("--task_name {folder}/nowhere", None, "nowhere"),
    ("--do_predict", remove("data/test.json"), "test.json"),
    ("", write("data/train.json", "\n \n"), "train.json"),
    ("", write("data/train.json", "[" * 100_000), "train.json:1"),
    ("", record(answer="长" * 700), "train.json:3"),
    ("--do_eval", record("dev", question=...), "dev.json:3"),
    # the model
    ("--model_name_or_path {folder}/nowhere", None, "nowhere"),
    ("", write("model/config.json", "{"), "config.json"),
    ("", remove("model/tokenizer_config.json"), "tokenizer"),
    ("", write("model/tokenizer_config.json", '{"tokenizer_class": []}'), "tokenizer"),
    ("", write("model/tokenizer_config.json", "7"), "tokenizer"),
    ("", write("model/cog-pretrain.model", "x"), "tokenizer"),
    ("", remove("model/cog-pretrain.model"), "cog-pretrain.model is missing"),
    ("", config(vocab_size=800), "tokenizer"),
    ("", remove("model/model_state.pdparams"), "weights"),
    ("", torn_weights, "weights"),
    ("", config(hidden_size=64), "weights"),
]
SENTENCES = [
    (
        "--label_smoothing 1",
        None,
        "--label_smoothing is 1.0: it must be a finite number of at least 0 and under 1",
    ),
    ("--top_k 5", None, "add --select_topk False"),
    ("--do_train False", None, "nothing to do: give --do_train, --do_eval, --do_predict, --predict_file"),
    ("--metric_for_best_model beauty", None, "--metric_for_best_model: invalid choice: 'beauty'"),
    ("--optim adafactor", None, "--optim: invalid choice: 'adafactor'"),
    (
        "--output_dir {folder}/data",
        None,
        "and nothing of a run: give a folder of its own, or --overwrite_output_dir",
    ),
    ("--output_dir {folder}/model", None, "holds a model and no checkpoint to resume from"),
    ("", write("data/train.json", b'\n{"context": "\xff"}'), "train.json:2: byte 14 is not UTF-8: save"),
    ("", config(model_type="bert", architectures=["BertModel"]), "is no GLM, but a bert"),
    ("", other_weights, "they lack 53 of the model's weights, the first is"),
]


@pytest.mark.parametrize("given, damage, name", MISTAKES + SENTENCES)
def test_a_mistake_ends_with_one_line(folder, monkeypatch, capsys, given, damage, name):
    if damage:
        damage(folder)
    before = files(folder)
    args = ["--model_name_or_path", folder / "model", "--task_name", folder / "data", "--do_train"]
    args += ["--output_dir", folder / "out", *given.format(folder=folder).split()]
    code, lines = main(monkeypatch, capsys, *args)
    assert code == 2, lines
    assert lines[-1].startswith("finetune_generation.py: error: ")
    assert name.format(folder=folder) in lines[-1]
    assert not any("Traceback" in line or "usage" in line for line in lines)
    assert files(folder) == before and not (folder / "out").exists()


def test_processes_that_the_degree_does_not_divide(folder, monkeypatch, capsys):
    monkeypatch.setattr(finetune_generation.paddle.distributed, "get_world_size", lambda: 3)
    code, lines = main(
        monkeypatch, capsys, "--output_dir", folder / "out", "--do_train", "--tensor_parallel_degree", 2
    )
    assert code == 2 and "--tensor_parallel_degree 2 does not divide the 3 processes" in lines[-1]


def test_tensor_parallelism_on_cpus(folder, monkeypatch, capsys):
    monkeypatch.setattr(finetune_generation.paddle.distributed, "get_world_size", lambda: 2)
    code, lines = main(
        monkeypatch, capsys, "--output_dir", folder / "out", "--do_train", "--tensor_parallel_degree", 2
    )
    assert code == 2 and "--tensor_parallel_degree 2 needs cards" in lines[-1]


def test_one_card_for_several_processes(folder, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "use_device", lambda name: name)
    monkeypatch.setattr(finetune_generation.paddle.distributed, "get_world_size", lambda: 2)
    code, lines = main(monkeypatch, capsys, "--output_dir", folder / "out", "--do_train", "--device", "gpu:1")
    assert code == 2 and "--device gpu:1 puts all 2 processes on one card: leave it out" in lines[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(folder, monkeypatch, capsys):
    (folder / "data").chmod(0o500)
    args = flags(
        model_name_or_path=folder / "model", task_name=folder / "data", output_dir=folder / "data/out"
    )
    code, lines = main(monkeypatch, capsys, *args, "--do_train")
    assert code == 2 and "can't be written to (Permission denied): give another one" in lines[-1]


# What an argument file says, and what the line has to have beside the file's name.
ARGUMENT_FILES = [
    (None, "can't be read"),
    ("{", "Expecting property name"),
    ('{\n  // steps\n  "max_steps": 1}', "line 2 column 3"),
    ('["--do_train"]', "is a list"),
    ("7", "is a int"),
    ('{"num_beems": 5}', "--num_beems"),
    ('{"num_beems": null}', "--num_beems"),
    ('{"optimizer": {"learning_rate": 1}}', "--optimizer"),
    ('{"learning_rate": {"value": 1}}', "--learning_rate is {"),
    ('{"num_beams": [1, 2]}', "--num_beams is [1, 2]"),
    ('{"report_to": [["none"]]}', "--report_to is [["),
    ('{"num_beams": "many"}', "--num_beams: invalid int value: 'many'"),
    ('{"save_steps": 0.5}', "--save_steps: invalid int value: '0.5'"),
    ('{"max_steps": true}', "--max_steps: invalid int value: 'True'"),
    ('{"do_train": 0.5}', "--do_train"),
    ('{"logging_dir": 5}', "--logging_dir is 5"),
    ('{"resume_from_checkpoint": true}', "--resume_from_checkpoint is true"),
    ('{"learning_rate": -1e-5}', "--learning_rate is -1e-05"),
    ('{"label_smoothing": 7}', "--label_smoothing is 7.0"),
    ('{"run_name": "\\ud800"}', "--run_name"),
    ('{"to_static": true}', "--to_static"),
    ('{"amp_custom_black_list": ["softmax"]}', "--amp_custom_black_list"),
]


@pytest.mark.parametrize("content, message", ARGUMENT_FILES)
def test_mistakes_in_an_argument_file(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "arguments.json").write_text(content)
    code, lines = main(
        monkeypatch, capsys, tmp_path / "arguments.json", "--output_dir", tmp_path / "out", "--do_train"
    )
    start = f"finetune_generation.py: error: {tmp_path}/arguments.json"
    assert code == 2 and lines[-1].startswith(start) and message in lines[-1]
    assert len(lines) == 1


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("args.yaml", b"do_eval: true", "give a JSON file"),
        ("args", b"\xff\xfe", "give a JSON file"),
        ("deep.json", b"[" * 100_000, "nested too deeply"),
        ("deep.json", b'{"run_name": ' + b"[" * 100_000, "nested too deeply"),
        ("number.json", b'{"learning_rate": NaN}', "--learning_rate is nan"),
        ("number.json", b'{"seed": 1e400}', "--seed"),
        ("number.json", b'{"max_steps": ' + b"9" * 4000 + b"}", "--max_steps is 999"),
        ("esc.json", b'{"\\u001b[2J\\nforged": 1}', "--\\x1b[2J forged: there is no such argument"),
        ("esc.json", b'{"run_name": "\\u0000"}', "--run_name"),
        ("large.json", b'{"run_name": "' + b"x" * (1 << 21) + b'"}', "give a JSON file"),
        ("fifo", None, "give a JSON file"),
    ],
)
def test_files_that_are_no_argument_files(tmp_path, monkeypatch, capsys, name, content, message):
    path = tmp_path / name
    os.mkfifo(path) if content is None else path.write_bytes(content)
    code, lines = main(monkeypatch, capsys, path, "--do_eval")
    assert code == 2 and len(lines) == 1 and lines[0].isprintable() and len(lines[0]) <= 1000
    assert lines[0].startswith(f"finetune_generation.py: error: {path}") and message in lines[0]
    for device in (tmp_path, "/dev/zero"):
        code, lines = main(monkeypatch, capsys, device, "--do_eval")
        assert code == 2 and len(lines) == 1 and "can't be read" in lines[0]


def test_a_path_in_a_locale_without_utf_8(tmp_path):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "a.json").write_text('{"task_name": "\\u6570\\u636e", "do_eval": true}')
    for args in (["--task_name", "数据", "--do_eval"], [tmp_path / "a.json"]):
        command = list(map(str, [sys.executable, "finetune_generation.py", *args]))
        found = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True)
        last = found.stderr.splitlines()[-1]
        assert found.returncode == 2 and b"--task_name is" in last and b"LC_ALL=C.UTF-8" in last


def test_main_leaves_the_process_as_it_found_it(tmp_path, monkeypatch, capsys):
    """In the main thread, and in another, where no handler of a signal can be set."""

    def state():
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
        handlers = [signal.getsignal(number) for number in numbers]
        return handlers, threading.excepthook, logger.logger.filters[:], os.environ.get("NO_COLOR")

    monkeypatch.setattr(sys, "argv", ["finetune_generation.py", "--do_eval", "--task_name", str(tmp_path)])
    before, codes, warnings = state(), [], []
    monkeypatch.setattr(logger, "warning", warnings.append)

    def call():
        try:
            finetune_generation.main()
        except SystemExit as end:
            codes.append(end.code)

    call()
    assert state() == before
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert state() == before and codes == [2, 2]
    assert sum("not in the main thread" in line for line in warnings) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_host_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """The names of what is published, where no network is, or a proxy that answers to nobody."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for args, name in (
        (["--model_name_or_path", "nobody/no-such-model"], "nobody/no-such-model"),
        (["--model_name_or_path", TINY_GLM], "dureader_qg could not be downloaded"),
    ):
        code, lines = main(monkeypatch, capsys, *args, "--output_dir", tmp_path / "out", "--do_train")
        assert code == 2 and name in lines[-1]


def test_a_bug_of_ours_shows_its_traceback(tmp_path):
    hook = ["fault", "AssertionError", "training_step"]
    lines = run(*TRAIN, *flags(output_dir=tmp_path / "out", max_steps=1), hook=hook, code=1)
    assert any("Traceback" in line for line in lines) and lines[-1] == "AssertionError: AssertionError"
