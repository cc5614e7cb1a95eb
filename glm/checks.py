"""Limits of arguments, and checks of them against each other and the records."""

import re
from math import inf
from pathlib import Path
from typing import NamedTuple

import paddle.distributed as dist
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.utils.log import logger

from glm.errors import InputError


class Limits(NamedTuple):
    """The range of a number: at least, at most, and under."""

    least: float
    most: float = 2**63 - 1  # which is what logs and files hold
    under: float = inf

    def check(self, value, name):
        """Raise InputError, which calls ``value`` by its ``name``, unless it is in the range."""
        number = isinstance(value, (int, float))
        if number and self.least <= value <= self.most and value < self.under:
            return
        upper = f" and under {self.under}" if self.under < inf else ""
        if self.most < 2**63 - 1 or number and value > self.most:
            upper = f" and at most {self.most}"
        expected = f"a finite number of at least {self.least}{upper}"
        raise InputError(f"{name} is {value}: it must be {expected}")


ANY = Limits(-(2**63))
COUNT = Limits(1)
POSITIVE = Limits(1e-30)
NOT_NEGATIVE = Limits(0)
FRACTION = Limits(0, most=1)

# The limits of all arguments; the other numbers are only kept from overflowing.
LIMITS = {
    **dict.fromkeys(("label_smoothing", "adam_beta1", "adam_beta2"), Limits(0, under=1)),
    **dict.fromkeys(("lr_decay_ratio", "warmup_ratio", "top_p"), FRACTION),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("max_grad_norm", "min_tgt_length", "top_k"), NOT_NEGATIVE),
    "no_repeat_ngram_size": NOT_NEGATIVE,
    **dict.fromkeys(("adam_epsilon", "scale_loss", "lora_alpha", "temperature"), POSITIVE),
    "num_train_epochs": POSITIVE,
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience", "lora_rank"), COUNT),
    **dict.fromkeys(("max_train_samples", "max_eval_samples"), COUNT),
    **dict.fromkeys(("max_predict_samples", "src_length", "tgt_length"), COUNT),
    **dict.fromkeys(("num_beams", "num_return_sequences"), COUNT),
    "per_device_train_batch_size": Limits(1, most=4096),
    "per_device_eval_batch_size": Limits(1, most=4096),
    "dataloader_num_workers": Limits(0, most=256),
    "seed": Limits(0, under=2**31),
    "length_penalty": Limits(-100, most=100),
    # ways of running that PaddleNLP's GLM does not know
    **{
        f"{kind}_parallel_degree": Limits(-1, most=1)
        for kind in ("pipeline", "sep", "context", "expert", "expert_tensor")
    },
}

# What PaddleNLP can do, but not with what is here: only the default is taken.
REFUSED = {
    "to_static": "the training code here is dynamic",
    "past_index": "PaddleNLP's GLM can't be run this way",
    "enable_auto_parallel": "PaddleNLP's GLM can't be run this way",
    "use_expert_parallel": "GLM has no experts",
    "unified_checkpoint": "runs here go on from any layout without it",
    "save_sharding_stage1_model": "runs here go on from any layout without it",
    "load_sharding_stage1_model": "runs here go on from any layout without it",
    # of PaddleNLP 3
    "skip_data_intervals": "the runs here do without",
    "ordered_save_group_size": "the runs here do without",
    "use_async_save": "the runs here do without",
    "offload_optim": "the runs here do without",
    "pdc_download_ckpt": "the runs here do without",
    "metrics_output_path": "trainer_state.json holds every log",
}


def check_argument(name, value, default):
    """Raise InputError where an argument is out of its limits, or refused."""
    if value == default:
        return
    if isinstance(value, (int, float)):
        LIMITS.get(name, ANY).check(value, f"--{name}")
    if name in REFUSED:
        raise InputError(f"--{name}: {REFUSED[name]}, leave it out")
    # NUL and halves of characters, which neither a file's name nor a log can hold
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise InputError(f"--{name} is {value!r}, which is no text in UTF-8: give it in UTF-8")


def check_together(values):
    """Raise InputError where arguments do not fit each other.

    Args: values (argparse.Namespace): the arguments of all groups by name.
    """
    check_tasks(values)
    check_generation(values)
    check_steps(values)
    check_processes(values)


def check_tasks(values):
    """Raise InputError where there is nothing to do, or a pipe beside other tasks."""
    alone = not (values.do_train or values.do_eval or values.merge_lora or values.export_torch)
    if alone and not values.do_predict:
        raise InputError(
            "nothing to do: give --do_train, --do_eval, --do_predict, --predict_file, "
            "--merge_lora or --export_torch"
        )
    if values.predict_file == "-" and not (alone and dist.get_world_size() == 1):
        raise InputError(
            "--predict_file - goes without --do_train, --do_eval, --merge_lora and "
            "--export_torch, on one process"
        )


def check_generation(values):
    """Raise InputError where arguments of beam search exclude each other."""
    if values.min_tgt_length > values.tgt_length:
        raise InputError(
            f"--min_tgt_length {values.min_tgt_length} is over "
            f"--tgt_length {values.tgt_length}: lower it or raise that"
        )
    if values.num_return_sequences > values.num_beams:
        raise InputError(
            f"--num_return_sequences {values.num_return_sequences} is over "
            f"--num_beams {values.num_beams}: lower it or raise that"
        )
    if values.select_topk and (values.top_k or values.top_p or values.temperature != 1):
        raise InputError(
            "--top_k, --top_p and --temperature are for draws: add --select_topk False, or leave them out"
        )


def check_steps(values):
    """Raise InputError where what happens at a step lacks an argument that it needs."""
    if values.max_steps == 0 or values.max_steps < -1:  # -1: as num_train_epochs says
        raise InputError(f"--max_steps is {values.max_steps}: it must be at least 1")
    if values.minimum_eval_times and not values.eval_steps:
        raise InputError("--minimum_eval_times needs --evaluation_strategy steps and --eval_steps: add them")
    checkpoint = values.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: there is no such folder: give a "
            "run's checkpoint-N, or leave it out to go on from the last in --output_dir"
        )
    if values.early_stopping_patience and not values.load_best_model_at_end:
        raise InputError(
            "--early_stopping_patience needs --load_best_model_at_end and --evaluation_strategy: add them"
        )
    reports = values.report_to or []
    if len(reports) > 1 and {"all", "none"} & {*reports}:
        raise InputError(
            f"--report_to {' '.join(reports)}: all and none go alone: give one of them, or names"
        )
    for name in reports:
        if name not in ("all", "none", *get_available_reporting_integrations()):
            raise InputError(f"--report_to {name} is not installed here, or unknown: give visualdl or none")


def check_processes(values):
    """Raise InputError where the devices are unknown, or too few for the processes."""
    processes, degree = dist.get_world_size(), values.tensor_parallel_degree
    if values.device.split(":")[0] not in ("", "gpu", "cpu", "xpu", "npu"):
        raise InputError(f"--device is {values.device}: give gpu, cpu, xpu or npu")
    if processes > 1 and ":" in values.device:
        raise InputError(
            f"--device {values.device} puts all {processes} processes on one card: leave "
            "it out, and choose cards by --gpus of python -m paddle.distributed.launch"
        )
    if degree > 1 and processes % degree:
        number = "one process" if processes == 1 else f"{processes} processes"
        raise InputError(
            f"--tensor_parallel_degree {degree} does not divide the {number} of this run: "
            f"start {degree} by python -m paddle.distributed.launch, or a multiple"
        )


def check_accumulation(args, records):
    """Raise InputError where the last passes of a step could only repeat ``records``."""
    passes = -(-records * args.gradient_accumulation_steps // args.global_batch_size)
    if args.gradient_accumulation_steps > max(passes, 1):
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the "
            f"{records} records are seen in {passes} passes: give at most as many"
        )


def check_min_length(min_tgt_length, dataset):
    """Warn where all predictions are made longer than any question of the ``dataset``."""
    # Of the labels, the end token is not counted: the minimum is of tokens before it.
    longest = max((len(features["labels"]) - 1 for features in dataset), default=0)
    if 0 < longest < min_tgt_length:
        logger.warning(
            f"--min_tgt_length {min_tgt_length} is over the longest question of the data, "
            f"which has {longest} tokens with its opening: all predictions will be longer"
        )
