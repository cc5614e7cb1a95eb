"""The arguments of a run, and how they are read."""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import List, Optional, get_origin

from paddle.distributed.fleet.utils import log_util
from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.trainer_utils import SchedulerType
from paddlenlp.utils.log import logger

from glm.checks import check_argument, check_together
from glm.device import supports_dtype, supports_tensor_parallelism, use_device
from glm.errors import InputError, as_input_error

LORA_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the linears of a layer
METRICS = ("loss", "rouge1", "rouge2", "rougel", "bleu4")


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
    lora_rank: Optional[int] = argument(None, "Its rank: 8, or that of the adapter at hand.")
    lora_alpha: Optional[float] = argument(
        None, "The adapter is scaled by lora_alpha / rank; by default 2 * rank."
    )
    lora_target_modules: Optional[List[str]] = argument(
        None, "The linears that get an adapter: all, or some.", choices=LORA_MODULES
    )
    rslora: bool = argument(False, "Scale by lora_alpha / sqrt(rank) (arXiv 2312.03732).")
    lora_base: Optional[str] = argument(
        None, "The model an adapter belongs to, where the adapter names another place."
    )
    merge_lora: bool = argument(False, "Write a whole model with the adapter in its weights into output_dir.")
    export_torch: bool = argument(
        False, "Write the model into output_dir/torch as PyTorch's transformers loads it."
    )


@dataclass
class DataArguments:
    """The records to read."""

    task_name: str = argument(
        "dureader_qg",
        "dureader_qg (downloaded by paddlenlp), or a folder with train.json, dev.json and test.json.",
    )
    src_length: int = argument(608, "Most token ids of a source: prompt, answer, context, special tokens.")
    predict_file: str = argument(
        "", "JSON lines to predict from, in place of test.json; -: from standard input to standard output."
    )
    max_train_samples: Optional[int] = argument(None, "Train on the first so many records.")
    max_eval_samples: Optional[int] = argument(None, "Evaluate the first so many records.")
    max_predict_samples: Optional[int] = argument(None, "Predict the first so many records.")


@dataclass
class GenerationArguments:
    """Beam search; the names and the rules are those of THUDM/GLM."""

    tgt_length: int = argument(160, "Most tokens of a question, in training and generation.")
    min_tgt_length: int = argument(55, "Fewest tokens generated before the end token.")
    num_beams: int = argument(5, "Beams; 1 with select_topk is greedy search.")
    num_return_sequences: int = argument(1, "Candidates a record in the predictions, the best first.")
    length_penalty: float = argument(0.7, "A hypothesis scores log-probability / length ** length_penalty.")
    no_repeat_ngram_size: int = argument(3, "No n-gram of this size twice; 0: no limit.")
    select_topk: bool = argument(True, "Go on with the best tokens; False: draw them by their probability.")
    temperature: float = argument(
        1.0, "Draw by the probabilities of logits / temperature, before top_k and top_p."
    )
    top_k: int = argument(0, "Draw from a beam's top_k likeliest tokens only; 0: from all.")
    top_p: float = argument(
        0.0, "Draw from a beam's fewest tokens that hold this probability; 0 or 1: from all."
    )


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with the loss and the schedule used here, and defaults for any machine."""

    label_smoothing: float = argument(
        0.1, "The part of a target's weight that is spread over the vocabulary."
    )
    lr_decay_ratio: float = argument(0.1, "A linear schedule ends at lr_decay_ratio * learning_rate.")
    early_stopping_patience: Optional[int] = argument(
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
    fp16_opt_level: str = argument("O1", "O1: autocast; O2: weights in half precision.", choices=("O1", "O2"))
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
            logger.warning(f"{'fp16' if self.fp16 else 'bf16'} needs a GPU: running in float32")
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


class ArgumentParser(PdArgumentParser):
    """PaddleNLP's, which checks what it read before it makes the dataclasses."""

    def error(self, message):
        """Raise InputError; argparse's own prints a hundred lines of usage first."""
        raise InputError(message)

    def read_json(self, json_file):
        """Read an argument file. Returns a command line; each entry is checked by itself."""
        with as_input_error(f"{json_file} can't be read", "give a JSON object, no comments"):
            entries = json.loads(Path(json_file).read_text("utf-8-sig"))
        if not isinstance(entries, dict):
            kind = type(entries).__name__
            self.error(f"{json_file} is a {kind}: it must be a JSON object")
        types = {item.name: item.type for group in self.dataclass_types for item in fields(group)}
        command_line = []
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
        check_argument(name, getattr(parsed, name), self.get_default(name))
        return words

    def parse_known_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{' '.join(unknown)}: there is no such argument: see --help")
        values.do_predict = values.do_predict or bool(values.predict_file)
        for name, value in vars(values).items():
            check_argument(name, value, self.get_default(name))
        check_together(values)
        return values, unknown


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument and what follows it.

    Returns:
        tuple: ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments. Raises
        InputError where an argument is wrong.
    """
    parser = ArgumentParser((ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments))
    refusals = (ValueError, TypeError, AttributeError, AssertionError, OSError)
    with as_input_error("PaddleNLP refuses these arguments", "change them", refusals):
        if len(sys.argv) >= 2 and sys.argv[1].endswith(".json"):
            return parser.parse_json_file_and_cmd_lines()
        return parser.parse_args_into_dataclasses()
