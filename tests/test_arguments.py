"""The arguments alone: defaults, precisions, and what fits a model."""

import sys

import pytest
from paddlenlp.transformers import GLMConfig

from glm import arguments, checks
from glm.arguments import GenerationArguments, GLMTrainingArguments
from glm.errors import InputError


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


def test_defaults():
    sys_argv, sys.argv = (
        sys.argv,
        ["finetune_generation.py", "--output_dir", "unused", "--do_eval", "--eval_steps", "4"],
    )
    try:
        model_args, data_args, generation, training_args = arguments.parse_arguments()
    finally:
        sys.argv = sys_argv
    assert model_args.model_name_or_path == "THUDM/glm-large-chinese" and data_args.src_length == 608
    assert (generation.tgt_length, generation.min_tgt_length, generation.num_beams) == (160, 55, 5)
    assert (generation.length_penalty, generation.select_topk) == (0.7, True)
    assert (training_args.label_smoothing, training_args.lr_decay_ratio) == (0.1, 0.1)
    # --do_eval alone evaluates after training; PaddleNLP would every eval_steps.
    assert training_args.do_eval and training_args.evaluation_strategy.value == "no"
    assert training_args.device == "cpu" or training_args.device.startswith("gpu")


def test_the_edges_of_what_fits_a_model():
    def check(heads=4, vocab_size=100, positions=168, src_length=160, tgt_length=8, num_beams=100, degree=2):
        config = GLMConfig(num_attention_heads=heads, vocab_size=vocab_size, max_sequence_length=positions)
        generation = GenerationArguments(tgt_length=tgt_length, min_tgt_length=0, num_beams=num_beams)
        checks.check_config(config, "it", src_length, generation, degree)

    check()
    for changes, message in (
        ({"heads": 5}, "does not divide the 5 attention heads"),
        ({"vocab_size": 101}, "does not divide the 4 attention heads and 101 vocabulary entries"),
        ({"tgt_length": 9}, "is over the 168 positions"),
        ({"num_beams": 101}, "is over the 100 entries"),
    ):
        with pytest.raises(InputError, match=message):
            check(**changes)
