"""The arguments of a run: each flag with its limits, how they are read, and how they fit each other."""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, List, Optional, get_origin, get_type_hints

import paddle.distributed as dist
from paddle.distributed.fleet.utils import log_util
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.trainer.trainer_utils import SchedulerType
from paddlenlp.utils.log import logger

from glm.device import supports_dtype, supports_tensor_parallelism, use_device, why_unsupported
from glm.errors import InputError, as_input_error
from glm.files import open_input, parse_json
from glm.limits import ANY, COUNT, FRACTION, NOT_NEGATIVE, POSITIVE, TRAINING_LIMITS, Limits, check_argument
from glm.quantization import ALGORITHMS
from glm.records import DATASETS
from glm.templates import DEFAULTS

METRICS = ("loss", "rouge1", "rouge2", "rougel", "bleu4")
LARGEST_FILE = 1 << 20  # bytes of an argument file
MOST_REPEATED = 64  # times that a step goes over the records where it is of more than there are
# The linears of a layer that can get an adapter.
LORA_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def argument(default, text, **metadata):
    """A field of a dataclass of arguments; ``metadata`` goes to argparse's add_argument."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """The model, and the adapter (LoRA, arXiv 2106.09685) trained beside it."""

    model_name_or_path: str = argument(
        "THUDM/glm-large-chinese", "A published model's name, or a folder that holds one."
    )
    lora: bool = argument(False, "Train an adapter, and leave the model's weights as they are.")
    lora_rank: Annotated[Optional[int], COUNT] = argument(None, "Its rank: 8, or that of the adapter.")
    lora_alpha: Annotated[Optional[float], POSITIVE] = argument(
        None, "The adapter is scaled by lora_alpha / rank; by default 2 * rank."
    )
    lora_target_modules: Optional[List[str]] = argument(
        None, "The linears that get an adapter: all, or some.", choices=LORA_MODULES
    )
    rslora: bool = argument(False, "Scale by lora_alpha / sqrt(rank) (arXiv 2312.03732).")
    lora_base: Optional[str] = argument(
        None, "The model an adapter belongs to, where the adapter names another place."
    )
    weight_quantize_algo: Optional[str] = argument(
        None,
        "Load the layers' linears in 8 bits, which LoRA, evaluation and prediction can use.",
        choices=ALGORITHMS,
    )
    merge_lora: bool = argument(False, "Write the model with the adapter in its weights into output_dir.")
    export_torch: bool = argument(
        False, "Write the model into output_dir/torch as PyTorch's transformers loads it."
    )


@dataclass
class DataArguments:
    """The records to read."""

    task_name: str = argument(
        "dureader_qg",
        f"{', '.join(DATASETS)} (downloaded), or a folder with train.json, dev.json and test.json.",
    )
    source_template: Optional[str] = argument(
        None, f"What the model reads, fields in braces; by default its own, or {DEFAULTS['source_template']}"
    )
    target_template: Optional[str] = argument(
        None, f"What it writes, in the same way; by default its own, or {DEFAULTS['target_template']}"
    )
    src_length: Annotated[int, COUNT] = argument(
        608, "Most token ids of a source: prompt, answer, context, special tokens."
    )
    truncation: str = argument(
        "end", "Cut a passage at its end, or around the answer (answer).", choices=("end", "answer")
    )
    predict_file: str = argument(
        "", "JSON lines to predict from, in place of test.json; -: from standard input to standard output."
    )
    max_train_samples: Annotated[Optional[int], COUNT] = argument(None, "Train on the first so many records.")
    max_eval_samples: Annotated[Optional[int], COUNT] = argument(None, "Evaluate the first so many records.")
    max_predict_samples: Annotated[Optional[int], COUNT] = argument(
        None, "Predict the first so many records."
    )


@dataclass
class GenerationArguments:
    """Beam search; the names and the rules are those of THUDM/GLM."""

    tgt_length: Annotated[int, COUNT] = argument(
        160, "Most tokens of a question, in training and generation."
    )
    min_tgt_length: Annotated[int, NOT_NEGATIVE] = argument(
        55, "Fewest tokens generated before the end token."
    )
    num_beams: Annotated[int, COUNT] = argument(5, "Beams; 1 with select_topk is greedy search.")
    num_return_sequences: Annotated[int, COUNT] = argument(
        1, "Candidates a record in the predictions, the best first."
    )
    length_penalty: Annotated[float, Limits(-100, most=100)] = argument(
        0.7, "A hypothesis scores log-probability / length ** length_penalty."
    )
    no_repeat_ngram_size: Annotated[int, NOT_NEGATIVE] = argument(
        3, "No n-gram of this size twice; 0: no limit."
    )
    select_topk: bool = argument(True, "Go on with the best tokens; False: draw them by their probability.")
    temperature: Annotated[float, POSITIVE] = argument(
        1.0, "Draw by the probabilities of logits / temperature, before top_k and top_p."
    )
    top_k: Annotated[int, NOT_NEGATIVE] = argument(
        0, "Draw from a beam's top_k likeliest tokens only; 0: from all."
    )
    top_p: Annotated[float, FRACTION] = argument(
        0.0, "Draw from a beam's fewest tokens that hold this probability; 0 or 1: from all."
    )


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with the loss and the schedule used here, and defaults for any machine."""

    label_smoothing: Annotated[float, Limits(0, under=1)] = argument(
        0.1, "The part of a target's weight that is spread over the vocabulary."
    )
    lr_decay_ratio: Annotated[float, FRACTION] = argument(
        0.1, "A linear schedule ends at lr_decay_ratio * learning_rate."
    )
    early_stopping_patience: Annotated[Optional[int], COUNT] = argument(
        None, "End training after so many evaluations that did not improve on the best."
    )
    output_dir: str = argument("", "The folder for checkpoints, the model and the results.")
    device: str = argument("", "gpu, cpu, xpu or npu; a GPU if Paddle can use one, else cpu.")
    group_by_length: bool = argument(True, "Train on batches of records of like length, in random order.")
    amp_master_grad: Optional[bool] = argument(
        None, "Gradients in float32; by default in O2, where float16 ones would overflow."
    )
    log_level: str = argument(
        "train",
        "train shows the run, info PaddleNLP's own lines too.",
        choices=("debug", "info", "train", "eval", "warning"),
    )
    # PaddleNLP's fields that take any text, and fail later or silently.
    fp16_opt_level: str = argument("O1", "O1: products in half; O2: the weights too.", choices=("O1", "O2"))
    lr_scheduler_type: str = argument(
        "linear",
        "The learning rate's course after the warm-up.",
        choices=[kind.value for kind in SchedulerType],
    )
    metric_for_best_model: Optional[str] = argument(
        None,
        "The metric that --load_best_model_at_end and early stopping compare.",
        choices=(*METRICS, *(f"eval_{metric}" for metric in METRICS)),
    )
    optim: str = argument("adamw", "The optimizer; PaddleNLP has adamw alone.", choices=("adamw",))
    # stage3 clears the embedding after the forward, which the loss and decoding read; stage2,
    # of which Paddle has GPU code alone, has not been seen to give what one process gives.
    sharding: str = argument(
        "", "stage1 splits the optimizer's state over the processes.", choices=("", "stage1")
    )

    def __post_init__(self):
        logger.set_level(self.log_level.upper())
        paddle_level = "INFO" if self.log_level in ("debug", "info") else "WARNING"
        log_util.set_log_level(paddle_level)
        self.device = use_device(self.device)
        if self.tensor_parallel_degree > 1 and not supports_tensor_parallelism():
            raise InputError(
                f"--tensor_parallel_degree {self.tensor_parallel_degree} needs cards, for Paddle "
                "can't compute a layer in parts on CPUs: leave it out here"
            )
        dtype = "float16" if self.fp16 else "bfloat16"
        if self.fp16 != self.bf16 and not supports_dtype(dtype):
            flag = "fp16" if self.fp16 else "bf16"
            logger.warning(f"{flag} {why_unsupported(dtype)}: running in float32")
            self.fp16 = self.bf16 = False
        if self.amp_master_grad is None:
            self.amp_master_grad = self.fp16_opt_level == "O2" and (self.fp16 or self.bf16)
        # do_eval alone would make PaddleNLP evaluate every eval_steps, and it forgets log_level.
        do_eval, self.do_eval = self.do_eval, False
        log_level = self.log_level
        super().__post_init__()
        self.do_eval, self.log_level = self.do_eval or do_eval, log_level
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()  # no bars in files

    @property
    def global_batch_size(self):
        """The number of records between two updates, of all processes."""
        passes = self.gradient_accumulation_steps * self.dataset_world_size
        return self.per_device_train_batch_size * passes

    def weights_dtype(self):
        """Returns the type that weights are loaded in: half precision, but for O1's training."""
        if (self.fp16 or self.bf16) and (self.fp16_opt_level == "O2" or not self.do_train):
            return "float16" if self.fp16 else "bfloat16"
        return "float32"

    def product_dtype(self):
        """Returns the half type that O1 multiplies float32 weights in, or None."""
        half = "float16" if self.fp16 else "bfloat16" if self.bf16 else None
        return half if self.fp16_opt_level == "O1" else None


GROUPS = (ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments)
LIMITS = {
    name: limits
    for group in GROUPS
    for name, kind in get_type_hints(group, include_extras=True).items()
    for limits in getattr(kind, "__metadata__", (TRAINING_LIMITS.get(name, ANY),))
}


class ArgumentParser(PdArgumentParser):
    """PaddleNLP's parser, which checks what it read before it makes the dataclasses."""

    def error(self, message):
        """Raise InputError; argparse's own prints a hundred lines of usage first."""
        raise InputError(message)

    def read_json(self, json_file):
        """Read an argument file. Returns a command line; each entry is checked by itself."""
        with as_input_error(f"{json_file} can't be read", "give a JSON file: one object, no comments"):
            with open_input(json_file) as file:
                entries = parse_json(file.read(LARGEST_FILE).decode("utf-8-sig"))
        if not isinstance(entries, dict):
            self.error(f"{json_file} is a {type(entries).__name__}: it must be a JSON object")
        command_line = []
        types = {item.name: item.type for group in self.dataclass_types for item in fields(group)}
        for name, value in entries.items():
            if name not in types:
                self.error(f"{json_file}: --{name}: there is no such argument: see --help")
            if value is None:  # as if it were not there
                continue
            try:
                command_line += self.parse_entry(name, value, types[name])
            except InputError as error:
                raise InputError(f"{json_file}: {error}") from error
        return command_line

    def parse_entry(self, name, value, kind):
        """Turn an entry of an argument file, whose field is of the type ``kind``, into words."""
        several, given = get_origin(kind) is list, json.dumps(value)
        values = value if several and isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in values):
            self.error(f"--{name} is {given}: it takes one value, and no group")
        if kind is str and not isinstance(value, str):
            self.error(f"--{name} is {given}: it must be a string")
        # With "=" a value may begin with a minus.
        words = [f"--{name}", *map(str, values)] if several else [f"--{name}={value}"]
        parsed, unknown = super().parse_known_args(words)
        if unknown:
            self.error(f"--{name} is {given}: it can't be read")
        check_argument(name, getattr(parsed, name), self.get_default(name), LIMITS[name])
        return words

    def parse_known_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{' '.join(unknown)}: there is no such argument: see --help")
        values.do_predict = values.do_predict or bool(values.predict_file)
        for name, value in vars(values).items():
            check_argument(name, value, self.get_default(name), LIMITS[name])
        for check in (check_tasks, check_generation, check_steps, check_processes):
            check(values)
        return values, unknown


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument and what follows it.

    Returns:
        tuple: ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments.

    Raises:
        InputError: where an argument is wrong.
    """
    parser = ArgumentParser(GROUPS)
    refusals = (ValueError, TypeError, AttributeError, AssertionError, OSError)
    with as_input_error("PaddleNLP refuses these arguments", "change them", refusals):
        if len(sys.argv) >= 2 and not sys.argv[1].startswith("-"):
            return parser.common_parse(parser.read_json(sys.argv[1]) + sys.argv[2:], False)
        return parser.parse_args_into_dataclasses()


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
    if values.do_train and values.evaluation_strategy == "steps" and not values.eval_steps:
        logger.warning(
            f"--evaluation_strategy steps without --eval_steps evaluates whenever it logs, every "
            f"{values.logging_steps} steps: give --eval_steps"
        )
    checkpoint = values.resume_from_checkpoint
    advice = "give a run's checkpoint-N, or leave it out to go on from the last in --output_dir"
    with as_input_error(f"--resume_from_checkpoint {checkpoint} can't be read", advice, OSError):
        missing = checkpoint is not None and not Path(checkpoint).is_dir()
    if missing:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: there is no such folder: {advice}")
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
    split = "tensor_parallel_degree" if degree > 1 else "sharding"
    if values.save_on_each_node and (degree > 1 or values.sharding):
        raise InputError(
            f"--save_on_each_node keeps what each machine's first process has, and with --{split} that is a "
            "part: leave it out, and let the machines share --output_dir"
        )
    if degree > 1 and processes % degree:
        number = "one process" if processes == 1 else f"{processes} processes"
        raise InputError(
            f"--tensor_parallel_degree {degree} does not divide the {number} of this run: "
            f"start {degree} by python -m paddle.distributed.launch, or a multiple"
        )


def check_accumulation(args, records, size_before=None):
    """Raise InputError where the last passes of a step could only repeat ``records``.

    A run that goes on with steps of as many records as before, ``size_before``, repeats them as that did:
    a few times, for its batch was larger than all of them.
    """
    passes = -(-records * args.gradient_accumulation_steps // args.global_batch_size)
    as_before = args.global_batch_size == size_before and size_before <= MOST_REPEATED * records
    if args.gradient_accumulation_steps > max(passes, 1) and not as_before:
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the "
            f"{records} records are seen in {passes} passes: give at most as many"
        )
    steps = -(-records // args.global_batch_size)
    if args.max_steps <= 0 and steps * args.num_train_epochs < 1:
        raise InputError(
            f"--num_train_epochs {args.num_train_epochs:g} of {steps} steps each ends before the first "
            "step: give more, or --max_steps 1"
        )
