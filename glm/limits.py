"""The limits of a flag's value, and those of PaddleNLP's own flags."""

import os
import sys
from math import inf
from typing import NamedTuple

from glm.errors import InputError


class Limits(NamedTuple):
    """The range of a number: at least, at most, and under."""

    least: float
    most: float = 2**63 - 1  # which is what logs and files hold
    under: float = inf


ANY, COUNT, POSITIVE, NOT_NEGATIVE = Limits(-(2**63)), Limits(1), Limits(1e-30), Limits(0)
FRACTION = Limits(0, most=1)
ONLY_ONE = Limits(-1, most=1)  # for ways of running that PaddleNLP's GLM does not know

# The limits of PaddleNLP's own flags. The other numbers are only kept from overflowing.
TRAINING_LIMITS = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Limits(0, under=1)),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_epsilon", "scale_loss", "num_train_epochs"), POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "save_total_limit"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), Limits(1, most=4096)),
    "warmup_ratio": FRACTION,
    "dataloader_num_workers": Limits(0, most=256),
    "seed": Limits(0, under=2**31),
    **dict.fromkeys(("pipeline_parallel_degree", "sep_parallel_degree"), ONLY_ONE),
    **dict.fromkeys(("context_parallel_degree", "expert_parallel_degree"), ONLY_ONE),
    "expert_tensor_parallel_degree": ONLY_ONE,
}

NOT_FOR_GLM = "PaddleNLP's GLM can't be run this way"
ANY_LAYOUT = "runs here go on from any layout without it"
DO_WITHOUT = "the runs here do without"
# What PaddleNLP can do, but not with what is here: only the default is taken.
REFUSED = {
    "to_static": "the training code here is dynamic",
    **dict.fromkeys(("amp_custom_white_list", "amp_custom_black_list"), "each operator has its type here"),
    **dict.fromkeys(("past_index", "enable_auto_parallel"), NOT_FOR_GLM),
    "use_expert_parallel": "GLM has no experts",
    "unified_checkpoint": ANY_LAYOUT,
    **dict.fromkeys(("save_sharding_stage1_model", "load_sharding_stage1_model"), ANY_LAYOUT),
    # of PaddleNLP 3
    **dict.fromkeys(("skip_data_intervals", "ordered_save_group_size", "use_async_save"), DO_WITHOUT),
    **dict.fromkeys(("offload_optim", "pdc_download_ckpt"), DO_WITHOUT),
    "metrics_output_path": "trainer_state.json holds every log",
}


def check_argument(name, value, default, limits):
    """Raise InputError where an argument is out of its limits, refused, or no text for a file's name.

    Args:
        limits (Limits): those of the flag, if it is a number.
    """
    if value == default:
        return
    least, most, under = limits
    if isinstance(value, (int, float)) and not (least <= value <= most and value < under):
        upper = f" and under {under}" if under < inf else ""
        if most < 2**63 - 1 or value > most:
            upper = f" and at most {most}"
        raise InputError(f"--{name} is {value}: it must be a finite number of at least {least}{upper}")
    if name in REFUSED:
        raise InputError(f"--{name}: {REFUSED[name]}, leave it out")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            check_text(name, text)


def check_text(name, text):
    """Raise InputError where neither a file's name nor a log can hold ``text``."""
    try:
        decoded = os.fsencode(text).decode("utf-8")
    except UnicodeError:
        decoded = None
    if decoded == text and "\0" not in text:
        return
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and "\0" not in text:
        raise InputError(
            f"--{name} is {text!r}, which has no place in this locale, whose encoding is {encoding}: "
            "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    raise InputError(f"--{name} is {text!r}, which is no text in UTF-8: give it in UTF-8")
