"""The arguments alone: defaults, precisions, and what fits a model."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from paddlenlp.transformers import GLMConfig

from glm import arguments
from glm.arguments import GenerationArguments, GLMTrainingArguments, check_accumulation
from glm.errors import InputError
from glm.weights.pretrained import Pretrained, check_lengths


def make_arguments(monkeypatch, tmp_path, supported=True, **changes):
    monkeypatch.setattr(arguments, "supports_dtype", lambda name: supported)
    return GLMTrainingArguments(output_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
    "changes, dtype",
    [
        ({"do_train": True}, "float32"),
        ({"do_train": True, "fp16": True}, "float32"),
        ({"do_train": True, "fp16": True, "do_eval": True}, "float32"),
        ({"do_train": True, "fp16": True, "fp16_opt_level": "O2"}, "float16"),
        ({"do_train": True, "bf16": True, "fp16_opt_level": "O2"}, "bfloat16"),
        ({"do_eval": True, "fp16": True}, "float16"),
        ({"do_predict": True, "bf16": True}, "bfloat16"),
        ({"do_eval": True}, "float32"),
    ],
)
def test_the_type_the_weights_are_loaded_in(monkeypatch, tmp_path, changes, dtype):
    assert make_arguments(monkeypatch, tmp_path, **changes).weights_dtype() == dtype
    # The same on a device that does not compute in it.
    args = make_arguments(monkeypatch, tmp_path, supported=False, **changes)
    assert args.weights_dtype() == "float32" and not args.fp16 and not args.bf16 and not args.amp_master_grad


def test_master_gradients_are_what_o2_does(monkeypatch, tmp_path):
    o2 = {"fp16": True, "fp16_opt_level": "O2"}
    assert make_arguments(monkeypatch, tmp_path, **o2).amp_master_grad is True
    assert make_arguments(monkeypatch, tmp_path, **o2, amp_master_grad=False).amp_master_grad is False
    assert make_arguments(monkeypatch, tmp_path, fp16=True).amp_master_grad is False
    assert make_arguments(monkeypatch, tmp_path, fp16_opt_level="O2").amp_master_grad is False


def parse(monkeypatch, text):
    monkeypatch.setattr(sys, "argv", ["finetune_generation.py", *text.split()])
    return arguments.parse_arguments()


def test_defaults(monkeypatch):
    parsed = parse(monkeypatch, "--output_dir unused --do_eval --eval_steps 4")
    model_args, data_args, generation, args = parsed[0], *parsed[-3:]
    assert model_args.model_name_or_path == "THUDM/glm-large-chinese" and data_args.src_length == 608
    assert (generation.tgt_length, generation.min_tgt_length, generation.num_beams) == (160, 55, 5)
    assert (generation.length_penalty, generation.select_topk) == (0.7, True)
    assert (args.label_smoothing, args.lr_decay_ratio) == (0.1, 0.1)
    # --do_eval alone evaluates after training; PaddleNLP would every eval_steps.
    assert args.do_eval and args.evaluation_strategy.value == "no"
    assert args.device == "cpu" or args.device.startswith("gpu")


# A value on either side of each limit that is refused, with what has to stand beside it.
OUTSIDE = """
    label_smoothing 1 -0.1 nan, lr_decay_ratio -0.1 1.1, src_length 0, tgt_length 0, min_tgt_length -1,
    num_beams 0, length_penalty inf, no_repeat_ngram_size -1, top_k -1, top_p -0.1 1.5,
    temperature 0 -1 nan, learning_rate -1e-5,
    num_train_epochs 0, max_steps 0, warmup_ratio 2 nan, warmup_steps -1, weight_decay -1, adam_beta2 1,
    adam_epsilon 0, max_grad_norm -1, per_device_train_batch_size 0, per_device_eval_batch_size 0,
    gradient_accumulation_steps 0, logging_steps 0, save_steps 0, eval_steps 0, save_total_limit 0,
    seed -1 2147483648, early_stopping_patience 0, max_train_samples 0, max_eval_samples 0,
    max_predict_samples -3, dataloader_num_workers -1 1000, lora_rank 0, lora_alpha nan,
    num_return_sequences 0, pipeline_parallel_degree 2
"""
INSIDE = """
    label_smoothing 0, lr_decay_ratio 0 1, src_length 1, min_tgt_length 0 160, num_beams 1,
    no_repeat_ngram_size 0, learning_rate 0, warmup_ratio 0 1, warmup_steps 0, weight_decay 0,
    max_grad_norm 0, max_steps 1 -1, per_device_train_batch_size 1, gradient_accumulation_steps 1,
    save_total_limit 1, seed 0 2147483647, max_train_samples 1, dataloader_num_workers 0, lora_rank 1,
    num_return_sequences 1 5
"""


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_argument_file(monkeypatch, tmp_path, mark):
    """Each entry in the type of its flag; null as if it were not there; flags behind the file win."""
    content = {"output_dir": "unused", "do_train": True, "learning_rate": 1e-5, "report_to": "none"}
    content.update(max_steps=3, select_topk=False, lora_target_modules=["dense"], predict_file="-x")
    content.update(dict.fromkeys(("logging_dir", "run_name", "save_total_limit", "eval_steps")))
    (tmp_path / "a.json").write_text(mark + json.dumps(content), encoding="utf-8")
    model_args, data_args, generation, args = parse(monkeypatch, f"{tmp_path}/a.json --max_steps 4")
    assert (args.do_train, args.learning_rate, args.report_to) == (True, 1e-5, [])
    assert (args.max_steps, generation.select_topk) == (4, False)
    assert (model_args.lora_target_modules, data_args.predict_file) == (["dense"], "-x")
    nothing = parse(monkeypatch, "--output_dir unused --do_train")[-1]
    for name in ("run_name", "save_total_limit", "eval_steps"):
        assert getattr(args, name) == getattr(nothing, name)
    assert args.logging_dir.startswith("unused/")


def cases(text):
    rows = [row.split() for row in text.replace("\n", " ").split(",")]
    return [(name, value) for name, *values in rows for value in values]


@pytest.mark.parametrize("name, value", cases(OUTSIDE))
def test_a_limit_is_named(monkeypatch, name, value):
    needed = dict.fromkeys(["top_k", "top_p", "temperature"], "--select_topk False")
    needed.update(dict.fromkeys(["lora_rank", "lora_alpha"], "--lora True"))
    with pytest.raises(InputError, match=f"--{name} is .*: "):
        parse(monkeypatch, f"--output_dir unused --do_train --{name}={value} {needed.get(name, '')}")


@pytest.mark.parametrize("name, value", cases(INSIDE))
def test_a_limit_itself_is_allowed(monkeypatch, name, value):
    args = {"num_beams": "--num_return_sequences 1"}.get(name, "")
    parsed = parse(monkeypatch, f"--output_dir unused --do_train --{name}={value} {args}")
    (found,) = [group for group in parsed if hasattr(group, name)]
    assert getattr(found, name) == float(value)


def test_a_checkpoint_that_can_t_be_looked_for_is_a_line(monkeypatch):
    path = "x" * 300  # which no file system takes
    with pytest.raises(InputError, match=f"^--resume_from_checkpoint {path} can't be read .*: give a run's"):
        parse(monkeypatch, f"--output_dir unused --do_train --resume_from_checkpoint {path}")


@pytest.mark.parametrize(
    "batch_size, passes, size_before, refused",
    [
        (1, 4, None, False),
        (1, 5, None, True),
        (2, 2, None, False),
        (2, 3, None, True),
        (8, 1, None, False),
        # Steps of 8 go on in smaller passes, and repeat the 4 records as they did.
        (1, 8, 8, False),
        (2, 4, 8, False),
        (1, 8, 6, True),
        (1, 256, 256, False),
        (1, 2**31, 2**31, True),  # a manifest may say any number
    ],
)
def test_passes_that_would_only_repeat_records(batch_size, passes, size_before, refused):
    args = SimpleNamespace(max_steps=3, gradient_accumulation_steps=passes)
    args.global_batch_size = batch_size * passes
    with pytest.raises(InputError, match="4 records are seen in") if refused else nullcontext():
        check_accumulation(args, 4, size_before)


def test_the_edges_of_what_fits_a_model():
    def check(heads=4, vocab_size=100, positions=168, src_length=160, tgt_length=8, num_beams=100, degree=2):
        config = GLMConfig(num_attention_heads=heads, vocab_size=vocab_size, max_sequence_length=positions)
        generation = GenerationArguments(tgt_length=tgt_length, min_tgt_length=0, num_beams=num_beams)
        pretrained = Pretrained("it", "it", "it", config, None)
        check_lengths(pretrained, src_length, generation, degree)

    check()
    for changes, message in (
        ({"heads": 5}, "does not divide the 5 attention heads"),
        ({"vocab_size": 101}, "does not divide the 4 attention heads and 101 vocabulary entries"),
        ({"tgt_length": 9}, "is over the 168 positions"),
        ({"num_beams": 101}, "is over the 100 entries"),
    ):
        with pytest.raises(InputError, match=message):
            check(**changes)
