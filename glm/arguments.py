"""The arguments of a run, their limits, and the checks of them against each other."""

import glob
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import List, Optional

import paddle
from paddle.distributed.fleet.utils import log_util
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.transformers import GLMConfig
from paddlenlp.utils.log import logger

from glm.device import supports_dtype, use_device
from glm.errors import InputError
from glm.lora import LORA_MODULES
from glm.memory import count_parameters


def require_range(arguments, name, low, most=None, below=None):
    """Raise InputError unless ``arguments.name`` is a finite number from ``low`` to ``most``, or under ``below``."""
    value = getattr(arguments, name)
    if low <= value < float("inf") and (most is None or value <= most) and (below is None or value < below):
        return
    upper = f" and at most {most}" if most is not None else f" and under {below}" if below is not None else ""
    raise InputError(f"--{name} is {value}: it must be a finite number of at least {low}{upper}")


@dataclass
class ModelArguments:
    """The model and its loss."""

    model_name_or_path: str = field(
        default="THUDM/glm-large-chinese",
        metadata={"help": "A published model's name, or a folder that holds one."},
    )
    label_smoothing: float = field(
        default=0.1, metadata={"help": "The share of a target's weight that is spread over the vocabulary."}
    )
    lr_decay_ratio: float = field(
        default=0.1, metadata={"help": "The share of the peak rate that a linear schedule ends at."}
    )

    def __post_init__(self):
        require_range(self, "label_smoothing", 0, below=1)
        require_range(self, "lr_decay_ratio", 0, most=1)


@dataclass
class LoRAArguments:
    """Low-rank adapters (arXiv 2106.09685): small weights that are trained beside the frozen ones."""

    lora: bool = field(
        default=False, metadata={"help": "Train an adapter, and leave the model's weights as they are."}
    )
    lora_rank: Optional[int] = field(
        default=None, metadata={"help": "Its rank: 8, or that of the adapter at hand."}
    )
    lora_alpha: Optional[float] = field(
        default=None,
        metadata={"help": "What it adds is multiplied by lora_alpha / rank; by default 2 * rank."},
    )
    lora_target_modules: Optional[List[str]] = field(
        default=None,
        metadata={"help": f"The linears beside which it stands: {', '.join(LORA_MODULES)}, or some."},
    )
    rslora: bool = field(
        default=False, metadata={"help": "Multiply by lora_alpha / sqrt(rank) (arXiv 2312.03732)."}
    )
    lora_base: Optional[str] = field(
        default=None,
        metadata={"help": "The model an adapter belongs to, where it is not where the adapter says."},
    )
    merge_lora: bool = field(
        default=False,
        metadata={"help": "Write a whole model with the adapter in its weights into output_dir."},
    )

    def __post_init__(self):
        for name, low in (("lora_rank", 1), ("lora_alpha", 1e-30)):
            if getattr(self, name) is not None:
                require_range(self, name, low)
        for name in self.lora_target_modules or []:
            if name not in LORA_MODULES:
                raise InputError(f"--lora_target_modules has {name}: give some of {', '.join(LORA_MODULES)}")


@dataclass
class DataArguments:
    """What to read, and how much of it."""

    task_name: str = field(
        default="dureader_qg",
        metadata={
            "help": "dureader_qg (downloaded by paddlenlp) or a folder with train.json, dev.json and test.json."
        },
    )
    src_length: int = field(
        default=608,
        metadata={"help": "Most token ids of a source: prompt, answer, context and special tokens."},
    )
    predict_file: str = field(
        default="",
        metadata={
            "help": "JSON lines to predict from, not test.json; -: from standard input to standard output."
        },
    )

    max_train_samples: Optional[int] = field(
        default=None, metadata={"help": "Train on the first so many records."}
    )
    max_eval_samples: Optional[int] = field(
        default=None, metadata={"help": "Evaluate the first so many records."}
    )
    max_predict_samples: Optional[int] = field(
        default=None, metadata={"help": "Predict the first so many records."}
    )

    def __post_init__(self):
        require_range(self, "src_length", 1)
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None:
                require_range(self, name, 1)


@dataclass
class GenerationArguments:
    """Beam search; the names and the rules are those of THUDM/GLM."""

    tgt_length: int = field(
        default=160, metadata={"help": "Most tokens of a question, in training and generation."}
    )
    min_tgt_length: int = field(
        default=55, metadata={"help": "Fewest tokens generated before the end token."}
    )
    num_beams: int = field(default=5, metadata={"help": "Beams; 1 with select_topk is greedy search."})
    num_return_sequences: int = field(
        default=1,
        metadata={"help": "Candidates a record in the predictions, the best first; at most num_beams."},
    )
    length_penalty: float = field(
        default=0.7,
        metadata={"help": "A hypothesis scores sum of log-probabilities / length ** length_penalty."},
    )
    no_repeat_ngram_size: int = field(
        default=3, metadata={"help": "No n-gram of this size twice; 0: no limit."}
    )
    select_topk: bool = field(
        default=True,
        metadata={"help": "Go on with the best continuations; False: draw them by their probability."},
    )
    top_k: int = field(
        default=0, metadata={"help": "Draw from a beam's top_k likeliest tokens only; 0: from all."}
    )
    top_p: float = field(
        default=0.0,
        metadata={"help": "Draw from a beam's fewest tokens that hold this probability; 0 or 1: from all."},
    )

    def __post_init__(self):
        for name, low in (
            ("tgt_length", 1),
            ("min_tgt_length", 0),
            ("num_beams", 1),
            ("no_repeat_ngram_size", 0),
        ):
            require_range(self, name, low)
        require_range(self, "num_return_sequences", 1, most=self.num_beams)
        require_range(self, "length_penalty", -100, most=100)
        require_range(self, "top_k", 0)
        require_range(self, "top_p", 0, most=1)
        if self.min_tgt_length > self.tgt_length:
            raise InputError(
                f"--min_tgt_length {self.min_tgt_length} is over --tgt_length {self.tgt_length}: lower it or raise that"
            )
        if self.select_topk and (self.top_k or self.top_p):
            raise InputError("--top_k and --top_p are for draws: add --select_topk False, or leave them out")


# The ranges of PaddleNLP's own arguments: the least, the most, and what it must be under, as require_range takes them.
RANGES = {
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"), (0,)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, None, 1)),
    **dict.fromkeys(("adam_epsilon", "num_train_epochs", "scale_loss"), (1e-30,)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, 4096)),
    "gradient_accumulation_steps": (1,),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps", "eval_accumulation_steps"), (1,)),
    **dict.fromkeys(("save_total_limit", "early_stopping_patience"), (1,)),
    "dataloader_num_workers": (0, 256),
    "warmup_ratio": (0, 1),
    "seed": (0, None, 2**31),
}

# What PaddleNLP can do, but not with what is here.
REFUSED = {
    "to_static": "the training code here is dynamic",
    "enable_auto_parallel": "PaddleNLP's GLM can't be run this way",
    "use_expert_parallel": "GLM has no experts",
    **dict.fromkeys(  # of PaddleNLP 3
        (
            "skip_data_intervals",
            "ordered_save_group_size",
            "use_async_save",
            "offload_optim",
            "pdc_download_ckpt",
        ),
        "the runs here do without",
    ),
    "metrics_output_path": "trainer_state.json holds every log",  # of PaddleNLP 3, too
    **dict.fromkeys(
        ("unified_checkpoint", "save_sharding_stage1_model", "load_sharding_stage1_model"),
        "runs here go on from a checkpoint of any layout without it",
    ),
}

# Of what a config.json says the types and the ranges, both ends included.
CONFIG_RANGES = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "vocab_size"), (int, 1, 2**31)),
    "max_sequence_length": (int, 1, 2**31),
    **dict.fromkeys(
        ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), ((int, float), 0, 1)
    ),
    **dict.fromkeys(("layernorm_epsilon", "initializer_range"), ((int, float), 0, 1)),
    "block_position_encoding": (bool, True, True),
}


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with defaults that any machine can honour, and checked."""

    output_dir: str = field(
        default="", metadata={"help": "The folder for checkpoints, the model and the results."}
    )
    device: str = field(
        default="", metadata={"help": "gpu, cpu, xpu or npu; a GPU if Paddle can use one, else cpu."}
    )
    group_by_length: bool = field(
        default=True,
        metadata={"help": "Train on batches of records of like length, in an order left to chance."},
    )
    amp_master_grad: Optional[bool] = field(
        default=None,
        metadata={"help": "Gradients in float32; by default in O2, where float16 ones would overflow."},
    )
    early_stopping_patience: Optional[int] = field(
        default=None,
        metadata={"help": "End training after so many evaluations without a better one than the best."},
    )
    log_level: str = field(
        default="train",
        metadata={
            "help": "debug, info, train, eval or warning: train shows the run, info PaddleNLP's own lines too."
        },
    )

    def __post_init__(self):
        if self.log_level not in ("debug", "info", "train", "eval", "warning"):
            raise InputError(f"--log_level is {self.log_level}: give debug, info, train, eval or warning")
        logger.set_level(self.log_level.upper())
        log_util.set_log_level("INFO" if self.log_level in ("debug", "info") else "WARNING")  # Paddle's own
        if self.device.split(":")[0] not in ("", "gpu", "cpu", "xpu", "npu"):
            raise InputError(f"--device is {self.device}: give gpu, cpu, xpu or npu")
        self.device = use_device(self.device)
        name = "fp16" if self.fp16 else "bf16"
        if self.fp16 != self.bf16 and not supports_dtype({"fp16": "float16", "bf16": "bfloat16"}[name]):
            logger.warning(f"{name} needs a GPU: running in float32")
            self.fp16 = self.bf16 = False
        if self.amp_master_grad is None:
            self.amp_master_grad = self.fp16_opt_level == "O2" and (self.fp16 or self.bf16)
        self._check()
        # do_eval alone would make PaddleNLP evaluate every eval_steps; here, as elsewhere, evaluation_strategy says so.
        do_eval, self.do_eval = self.do_eval, False
        log_level = self.log_level
        super().__post_init__()
        self.do_eval, self.log_level = self.do_eval or do_eval, log_level
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()  # no bars in files

    @property
    def records_a_step(self):
        """The number of records between two updates, of all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.dataset_world_size

    def weights_dtype(self):
        """In which type the weights are loaded: in half precision, but for O1, which trains float32 weights."""
        if (self.fp16 or self.bf16) and (self.fp16_opt_level == "O2" or not self.do_train):
            return "float16" if self.fp16 else "bfloat16"
        return "float32"

    def _check(self):
        """What PaddleNLP would find out in the middle of a run, or not at all. Raises InputError."""
        for name, limits in RANGES.items():
            if getattr(self, name) is not None:
                require_range(self, name, *limits)
        for name, value in vars(self).items():
            if isinstance(value, int):  # which goes into logs and files that hold 64 bits
                require_range(self, name, -(2**63), below=2**63)
        if self.minimum_eval_times and not self.eval_steps:
            raise InputError("--minimum_eval_times needs --evaluation_strategy steps and --eval_steps")
        if self.max_steps != -1:  # PaddleNLP's way to say: as num_train_epochs has it
            require_range(self, "max_steps", 1)
        if self.fp16_opt_level not in ("O1", "O2"):
            raise InputError(f"--fp16_opt_level is {self.fp16_opt_level}: give O1 or O2")
        if self.optim != "adamw":
            raise InputError(f"--optim is {self.optim}: PaddleNLP has adamw alone")
        for name, reason in REFUSED.items():
            if getattr(self, name, None) not in (None, False):
                raise InputError(f"--{name}: {reason}, leave it out")
        metrics = ("loss", "rouge1", "rouge2", "rougel", "bleu4")
        if self.metric_for_best_model is not None and self.metric_for_best_model not in metrics:
            raise InputError(
                f"--metric_for_best_model is {self.metric_for_best_model}: give {', '.join(metrics)}"
            )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise InputError(
                "--early_stopping_patience needs --load_best_model_at_end and --evaluation_strategy: add them"
            )
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in ("all", "none", *get_available_reporting_integrations()):
                raise InputError(
                    f"--report_to {name} is not installed here, or unknown: give visualdl or none"
                )
        if self.sharding not in ("", "stage1"):
            # stage3 clears the embedding after the forward, which the loss and decoding read; stage2, of which Paddle
            # has GPU code alone, has not been seen to give what one process gives.
            raise InputError(f"--sharding is {self.sharding}: this project runs with stage1 alone")
        processes = paddle.distributed.get_world_size()
        if processes > 1 and ":" in self.device:
            raise InputError(
                f"--device {self.device} puts all {processes} processes on one card: leave it out, and choose "
                "cards by --gpus of python -m paddle.distributed.launch"
            )
        if self.tensor_parallel_degree > 1 and processes % self.tensor_parallel_degree:
            raise InputError(
                f"--tensor_parallel_degree {self.tensor_parallel_degree} does not divide the {processes} processes of "
                "this run: start that many by python -m paddle.distributed.launch"
            )
        kinds = ("pipeline", "sep", "context", "expert", "expert_tensor")
        for name, most in {**{f"{kind}_parallel_degree": 1 for kind in kinds}, "past_index": -1}.items():
            if getattr(self, name, -1) > most:
                raise InputError(
                    f"--{name} is {getattr(self, name)}: PaddleNLP's GLM can't be run this way, leave it"
                )


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument. A mistake in it is an InputError."""
    parser = PdArgumentParser(
        (ModelArguments, LoRAArguments, DataArguments, GenerationArguments, GLMTrainingArguments)
    )
    try:
        if len(sys.argv) >= 2 and sys.argv[1].endswith(".json"):
            groups = parser.parse_json_file_and_cmd_lines()
        else:
            groups = parser.parse_args_into_dataclasses()
    except (ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        # PaddleNLP's assertions have no words of their own.
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise InputError(str(error) or f"PaddleNLP refuses these arguments, by its rule: {line}") from error
    for group in groups:
        for name, value in vars(group).items():
            try:
                valid = not isinstance(value, str) or b"\0" not in value.encode()
            except UnicodeEncodeError:  # half of a character
                valid = False
            if not valid:  # for a file's name or a log
                raise InputError(
                    f"--{name} is {value!r}, which is no text in UTF-8: give it without such characters"
                )
    return groups


def check_task(args, lora_args, data_args):
    """Raise InputError where there is nothing to do, or a pipe to answer and something else."""
    if not (args.do_train or args.do_eval or args.do_predict or lora_args.merge_lora):
        raise InputError(
            "nothing to do: give --do_train, --do_eval, --do_predict, --predict_file or --merge_lora"
        )
    if data_args.predict_file == "-" and (
        args.do_train or args.do_eval or lora_args.merge_lora or args.world_size > 1
    ):
        raise InputError(
            "--predict_file - goes without --do_train, --do_eval and --merge_lora, on one process"
        )


def check_config(config, name, data_args, generation, degree):
    """Raise InputError where the model is no GLM, or not one for these lengths, beams and processes."""
    if not isinstance(config, GLMConfig):
        raise InputError(f"--model_name_or_path {name} is no GLM, but a {config.model_type}")
    for key, (kind, least, most) in CONFIG_RANGES.items():
        value = getattr(config, key)
        if not isinstance(value, kind) or not least <= value <= most:
            expected = "true" if least is most else f"a number from {least} to {most}"
            raise InputError(
                f"--model_name_or_path {name}: {key} in its config.json is {value}: it must be {expected}"
            )
    files = [
        path
        for kind in ("pdparams", "safetensors")
        for path in glob.glob(f"{glob.escape(name)}/model*.{kind}")
    ]
    size, count = sum(map(os.path.getsize, files)), count_parameters(config)[0]
    if files and size < 1.9 * count:  # float16 has two bytes
        raise InputError(
            f"--model_name_or_path {name}: its weights can't be loaded: they are {size} bytes, its config.json is of a "
            f"model of {count} weights: give whole files of one model"
        )
    for what, number in (
        ("attention heads", config.num_attention_heads),
        ("vocabulary entries", config.vocab_size),
    ):
        if number % degree:
            raise InputError(
                f"--tensor_parallel_degree {degree} does not divide the {number} {what} of {name}: give one that does"
            )
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"--model_name_or_path {name}: hidden_size {config.hidden_size} in its config.json is no multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if data_args.src_length + generation.tgt_length > config.max_sequence_length:
        raise InputError(
            f"--src_length {data_args.src_length} + --tgt_length {generation.tgt_length} is over the "
            f"{config.max_sequence_length} positions of {name}: lower one of them"
        )
    if generation.num_beams > config.vocab_size:
        raise InputError(
            f"--num_beams {generation.num_beams} is over the {config.vocab_size} entries of the vocabulary"
        )


def check_tokenizer(tokenizer, config, name):
    """Raise InputError where the tokenizer has more entries than the model."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--model_name_or_path {name}: its tokenizer has {len(tokenizer)} entries, its model {config.vocab_size}: "
            "they are not of one model"
        )


def check_accumulation(args, train_dataset):
    """Raise InputError where the last passes of a step could only repeat records."""
    passes = -(-len(train_dataset) * args.gradient_accumulation_steps // args.records_a_step)
    if args.gradient_accumulation_steps > max(passes, 1):
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the {len(train_dataset)} records are "
            f"seen in {passes} passes: give at most as many"
        )
