"""Every mistake ends with exit code 2 and one line, before anything is written. Broken lines and odd text at random."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, TINY_GLM, main

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


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


MISTAKES = [
    # the arguments alone
    ("--label_smoothing 1", None, "--label_smoothing is 1.0: it must be a finite number of at least 0 and under 1"),
    ("--label_smoothing nan", None, "--label_smoothing is nan"),
    ("--lr_decay_ratio -0.1", None, "--lr_decay_ratio is -0.1"),
    ("--src_length 0", None, "--src_length is 0: it must be a finite number of at least 1"),
    ("--tgt_length 0", None, "--tgt_length is 0"),
    ("--min_tgt_length -1", None, "--min_tgt_length is -1"),
    ("--min_tgt_length 161", None, "--min_tgt_length 161 is over --tgt_length 160"),
    ("--num_beams 0", None, "--num_beams is 0"),
    ("--num_beams 2000", None, "--num_beams 2000 is over the 1216 entries of the vocabulary"),
    ("--length_penalty inf", None, "--length_penalty is inf"),
    ("--no_repeat_ngram_size -1", None, "--no_repeat_ngram_size is -1"),
    ("--select_topk False --top_k -1", None, "--top_k is -1"),
    ("--select_topk False --top_p 1.5", None, "--top_p is 1.5"),
    ("--top_k 5", None, "add --select_topk False"),
    ("--learning_rate=-1e-5", None, "--learning_rate is -1e-05"),
    ("--learning_rate much", None, "argument --learning_rate: invalid float value: 'much'"),
    ("--num_train_epochs 0", None, "--num_train_epochs is 0.0"),
    ("--max_steps 0", None, "--max_steps is 0"),
    ("--warmup_ratio 2", None, "--warmup_ratio is 2.0"),
    ("--warmup_ratio nan", None, "--warmup_ratio is nan"),
    ("--minimum_eval_times 3", None, "--minimum_eval_times needs --evaluation_strategy steps and --eval_steps"),
    ("--warmup_steps -1", None, "--warmup_steps is -1"),
    ("--weight_decay -1", None, "--weight_decay is -1.0"),
    ("--adam_beta2 1", None, "--adam_beta2 is 1.0"),
    ("--adam_epsilon 0", None, "--adam_epsilon is 0.0"),
    ("--max_grad_norm -1", None, "--max_grad_norm is -1.0"),
    ("--per_device_train_batch_size 0", None, "--per_device_train_batch_size is 0"),
    ("--per_device_eval_batch_size 0", None, "--per_device_eval_batch_size is 0"),
    ("--gradient_accumulation_steps 0", None, "--gradient_accumulation_steps is 0"),
    ("--logging_steps 0", None, "--logging_steps is 0"),
    ("--save_steps 0", None, "--save_steps is 0"),
    ("--eval_steps 0", None, "--eval_steps is 0"),
    ("--save_total_limit 0", None, "--save_total_limit is 0"),
    ("--seed -1", None, "--seed is -1"),
    ("--num_return_sequences 4 --num_beams 3", None, "--num_return_sequences 4 is over --num_beams 3"),
    ("--early_stopping_patience 2", None, "--early_stopping_patience needs --load_best_model_at_end and"),
    ("--early_stopping_patience 0", None, "--early_stopping_patience is 0: it must be"),
    ("--max_train_samples 0", None, "--max_train_samples is 0: it must be a finite number of at least 1"),
    ("--max_predict_samples -3", None, "--max_predict_samples is -3: it must be a finite number of at least 1"),
    ("--seed 2147483648", None, "--seed is 2147483648: it must be a finite number of at least 0 and under 2147483648"),
    ("--dataloader_num_workers -1", None, "--dataloader_num_workers is -1"),
    ("--dataloader_num_workers 1000", None, "--dataloader_num_workers is 1000"),
    ("--fp16 --bf16", None, "At most one of fp16 and bf16"),
    ("--fp16_opt_level O7", None, "--fp16_opt_level: invalid choice: 'O7'"),
    ("--device abacus", None, "--device is abacus: give gpu, cpu, xpu or npu"),
    ("--log_level loud", None, "--log_level: invalid choice: 'loud'"),
    ("--report_to paper", None, "--report_to paper is not installed here, or unknown"),
    ("--lr_scheduler_type zigzag", None, "--lr_scheduler_type: invalid choice: 'zigzag'"),
    ("--evaluation_strategy often", None, "argument --evaluation_strategy: invalid choice: 'often'"),
    ("--load_best_model_at_end", None, "--load_best_model_at_end requires the save and eval strategy to match"),
    ("--metric_for_best_model beauty", None, "--metric_for_best_model: invalid choice: 'beauty'"),
    ("--tensor_parallel_degree 3", None, "--tensor_parallel_degree 3 does not divide the 1 processes"),
    ("--pipeline_parallel_degree 2", None, "--pipeline_parallel_degree is 2"),
    ("--optim adafactor", None, "--optim: invalid choice: 'adafactor'"),
    ("--to_static", None, "--to_static: the training code here is dynamic"),
    ("--sharding stage3", None, "--sharding: invalid choice: 'stage3'"),
    ("--sharding stage2", None, "--sharding: invalid choice: 'stage2'"),
    ("--past_index 0", None, "--past_index: PaddleNLP's GLM can't be run this way"),
    ("--hybrid_parallel_topo_order up", None, "assert self.hybrid_parallel_topo_order in"),
    ("--do_train maybe", None, "Truthy value expected: got maybe"),
    ("--num_beems 5", None, "--num_beems"),
    ("--do_train False", None, "nothing to do: give --do_train, --do_eval, --do_predict, --predict_file or"),
    ("--predict_file -", None, "--predict_file - goes without --do_train, --do_eval and --merge_lora"),
    ("--predict_file {folder}/none.json", None, "none.json: No such file or directory"),
    ("--src_length 900", None, "--src_length 900 + --tgt_length 160 is over the 1024 positions"),
    ("--src_length 12", None, "train.json:1: prompt and answer take"),
    ("--min_tgt_length 0 --tgt_length 5", None, "--tgt_length 5 has no room for a question"),
    # where the output goes
    ("--output_dir {folder}/data/dev.json", None, "dev.json is not a folder: give another one"),
    ("--output_dir {folder}/data/dev.json/out", None, "dev.json is not a folder: give another one"),
    ("--output_dir {folder}/data", None, "and nothing of a run: give a folder of its own, or --overwrite_output_dir"),
    ("--output_dir {folder}/texts", write("texts/thesis.txt", "mine"), "holds thesis.txt and nothing of a run"),
    ("--output_dir {folder}/texts", write("texts/notes.log", "mine"), "holds notes.log and nothing of a run"),
    ("--output_dir {folder}/model", None, "holds a model and no checkpoint to resume from"),
    ("--output_dir=", None, "--output_dir is missing"),
    ("--resume_from_checkpoint {folder}/data", None, "data has no model[-_]*: give a run's checkpoint-N"),
    # the data
    ("--task_name {folder}/nowhere", None, "nowhere is neither dureader_qg nor a folder"),
    ("", remove("data/train.json"), "train.json: No such file or directory"),
    ("--do_eval", remove("data/dev.json"), "dev.json: No such file or directory"),
    ("--do_predict", remove("data/test.json"), "test.json: No such file or directory"),
    ("", write("data/train.json", ""), "train.json has no records: at least one is needed"),
    ("", write("data/train.json", "\n \n"), "train.json has no records"),
    ("", write("data/train.json", '{"context": "c"'), "train.json:1: not JSON"),
    ("", write("data/train.json", "[" * 100_000), "train.json:1: not JSON"),
    ("", write("data/train.json", b'\n{"context": "\xff"}'), "train.json:2: byte 14 is not UTF-8: save"),
    ("", write("data/train.json", "[1, 2]"), "train.json:1: a list: each line must be one JSON object"),
    ("", record(context=...), "train.json:3: the field 'context' is missing"),
    ("", record(answer=...), "train.json:3: the field 'answer' is missing"),
    ("", record(question=...), "train.json:3: the field 'question' is missing"),
    ("", record(context=7), "train.json:3: the field 'context' is a int: it must be a string"),
    ("", record(answer=["a"]), "train.json:3: the field 'answer' is a list: it must be a string"),
    ("", record(question=" "), "train.json:3: the field 'question' is empty"),
    ("", record(id={}), "train.json:3: 'id' is a dict"),
    ("", record(answer="长" * 700), "train.json:3: prompt and answer take"),
    ("--do_eval", record("dev", question=...), "dev.json:3: the field 'question' is missing"),
    # the model
    ("--model_name_or_path {folder}/nowhere", None, "nowhere: its config.json can't be loaded"),
    ("", remove("model/config.json"), "its config.json can't be loaded"),
    ("", write("model/config.json", "{"), "its config.json can't be loaded"),
    ("", config(model_type="bert", architectures=["BertModel"]), "is no GLM, but a bert"),
    ("", remove("model/tokenizer_config.json"), "its tokenizer can't be loaded"),
    ("", remove("model/cog-pretrain.model"), "its tokenizer can't be loaded"),
    ("", write("model/cog-pretrain.model", "x"), "its tokenizer can't be loaded"),
    ("", remove("model/model_state.pdparams"), "its weights can't be loaded"),
    ("", torn_weights, "its weights can't be loaded"),
    ("", other_weights, "its weights lack some of GLM's: give those of a GLM"),
    ("", config(hidden_size=64), "its weights can't be loaded"),
    ("", config(vocab_size=800), "its tokenizer has"),
]  # fmt: skip


@pytest.mark.parametrize("flags, damage, message", MISTAKES, ids=[f"{i}" for i in range(len(MISTAKES))])
def test_a_mistake_ends_with_one_line(folder, monkeypatch, capsys, flags, damage, message):
    if damage:
        damage(folder)
    before = files(folder)
    flags = flags.format(folder=folder).split()
    code, lines = main(
        monkeypatch, capsys, "--model_name_or_path", folder / "model", "--task_name", folder / "data",
        "--output_dir", folder / "out", "--do_train", *flags,
    )  # fmt: skip
    assert code == 2, lines
    print(lines[-1].replace(str(folder), "F"))
    assert lines[-1].startswith("finetune_generation.py: error: ") and message in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert files(folder) == before and not (folder / "out").exists()


def test_processes_that_the_degree_does_not_divide(folder, monkeypatch, capsys):
    monkeypatch.setattr(finetune_generation.paddle.distributed, "get_world_size", lambda: 3)
    code, lines = main(
        monkeypatch, capsys, "--output_dir", folder / "out", "--do_train", "--tensor_parallel_degree", 2
    )
    assert code == 2 and "--tensor_parallel_degree 2 does not divide the 3 processes" in lines[-1]


def test_a_run_may_log_into_its_own_folder(folder):
    (folder / "out").mkdir()
    command = [sys.executable, "finetune_generation.py", "--model_name_or_path", folder / "model", "--task_name",
               folder / "data", "--output_dir", folder / "out", "--do_train", "--max_steps", "1"]  # fmt: skip
    with open(folder / "out/train.log", "w") as log:
        assert subprocess.run(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log).returncode == 0
    assert (folder / "out/model_state.pdparams").exists()


def test_one_card_for_several_processes(folder, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "use_device", lambda name: name)
    monkeypatch.setattr(finetune_generation.paddle.distributed, "get_world_size", lambda: 2)
    code, lines = main(monkeypatch, capsys, "--output_dir", folder / "out", "--do_train", "--device", "gpu:1")
    assert code == 2 and "--device gpu:1 puts all 2 processes on one card: leave it out" in lines[-1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(folder, monkeypatch, capsys):
    (folder / "data").chmod(0o500)
    code, lines = main(monkeypatch, capsys, "--model_name_or_path", folder / "model", "--task_name", folder / "data",
                       "--output_dir", folder / "data/out", "--do_train")  # fmt: skip
    assert code == 2 and "can't be written to: give another one" in lines[-1]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "arguments.json does not exist"),
        ("{", "Expecting property name"),
        ('{"num_beems": 5}', "--num_beems"),
        ('{"num_beams": "many"}', "argument --num_beams: invalid int value: 'many'"),
        ('{"do_train": true, "label_smoothing": 7}', "--label_smoothing is 7.0"),
    ],
)
def test_mistakes_in_a_json_file_of_arguments(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "arguments.json").write_text(content)
    code, lines = main(monkeypatch, capsys, tmp_path / "arguments.json", "--output_dir", tmp_path / "out")
    assert code == 2 and lines[-1].startswith("finetune_generation.py: error: ") and message in lines[-1]


def test_a_host_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """The names of what is published, where no network is, or a proxy that answers to nobody."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for flags, message in (
        (
            ["--model_name_or_path", "nobody/no-such-model"],
            "nobody/no-such-model: its config.json can't be loaded",
        ),
        (["--model_name_or_path", TINY_GLM], "dureader_qg could not be downloaded"),
    ):
        code, lines = main(monkeypatch, capsys, *flags, "--output_dir", tmp_path / "out", "--do_train")
        assert code == 2 and message in lines[-1]


def test_a_bug_of_ours_shows_its_traceback(folder):
    code = "import finetune_generation as f\nf.build_dataset = lambda *args: 1 / 0\nf.main()"
    command = [sys.executable, "-c", code, "--model_name_or_path", folder / "model", "--task_name", folder / "data",
               "--output_dir", folder / "out", "--do_train"]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr
