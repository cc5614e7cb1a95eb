"""Fine-tune GLM for question generation: train, evaluate by beam search, predict.

python finetune_generation.py --help, or with one JSON file of the same arguments: see README.md.
"""

import contextlib
import errno
import glob
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import List, Optional

import paddle
from paddle.distributed.fleet.utils import log_util
from paddlenlp.trainer import PdArgumentParser, TrainingArguments, set_seed
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.transformers import AutoConfig, AutoModelForConditionalGeneration, GLMConfig, GLMTokenizer
from paddlenlp.utils.log import logger
from tqdm.contrib.logging import logging_redirect_tqdm

from data import (
    DataArguments,
    DataCollator,
    InputError,
    build_dataset,
    parse_lines,
    read_in_batches,
    read_records,
    require_range,
)
from generation import beam_search
from modeling import (
    LORA_MODULES,
    LORA_WEIGHTS,
    add_lora,
    count_parameters,
    evaluation_memory,
    find_base,
    free_memory,
    load,
    make_lora_config,
    new_adapter,
    new_lora_config,
    read_adapter,
    supports_dtype,
    training_memory,
    use_device,
    use_the_whole_cpu,
)
from utils import (
    LOCK,
    UNFINISHED,
    Fault,
    GLMTrainer,
    Peers,
    find_damage,
    last_whole_checkpoint,
    locked,
    prediction_row,
    read_mark,
    where_to_resume,
)


@dataclass
class ModelArguments:
    """The model and its loss."""

    model_name_or_path: str = field(
        default="THUDM/glm-large-chinese", metadata={"help": "A published model's name, or a folder that holds one."}
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

    lora: bool = field(default=False, metadata={"help": "Train an adapter, and leave the model's weights as they are."})
    lora_rank: Optional[int] = field(default=None, metadata={"help": "Its rank: 8, or that of the adapter at hand."})
    lora_alpha: Optional[float] = field(
        default=None, metadata={"help": "What it adds is multiplied by lora_alpha / rank; by default 2 * rank."}
    )
    lora_target_modules: Optional[List[str]] = field(
        default=None, metadata={"help": f"The linears beside which it stands: {', '.join(LORA_MODULES)}, or some."}
    )
    rslora: bool = field(default=False, metadata={"help": "Multiply by lora_alpha / sqrt(rank) (arXiv 2312.03732)."})
    lora_base: Optional[str] = field(
        default=None, metadata={"help": "The model an adapter belongs to, where it is not where the adapter says."}
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Write a whole model with the adapter in its weights into output_dir."}
    )

    def __post_init__(self):
        for name, low in (("lora_rank", 1), ("lora_alpha", 1e-30)):
            if getattr(self, name) is not None:
                require_range(self, name, low)
        for name in self.lora_target_modules or []:
            if name not in LORA_MODULES:
                raise InputError(f"--lora_target_modules has {name}: give some of {', '.join(LORA_MODULES)}")


@dataclass
class GenerationArguments:
    """Beam search; the names and the rules are those of THUDM/GLM."""

    tgt_length: int = field(default=160, metadata={"help": "Most tokens of a question, in training and generation."})
    min_tgt_length: int = field(default=55, metadata={"help": "Fewest tokens generated before the end token."})
    num_beams: int = field(default=5, metadata={"help": "Beams; 1 with select_topk is greedy search."})
    num_return_sequences: int = field(
        default=1, metadata={"help": "Candidates a record in the predictions, the best first; at most num_beams."}
    )
    length_penalty: float = field(
        default=0.7, metadata={"help": "A hypothesis scores sum of log-probabilities / length ** length_penalty."}
    )
    no_repeat_ngram_size: int = field(default=3, metadata={"help": "No n-gram of this size twice; 0: no limit."})
    select_topk: bool = field(
        default=True, metadata={"help": "Go on with the best continuations; False: draw them by their probability."}
    )
    top_k: int = field(default=0, metadata={"help": "Draw from a beam's top_k likeliest tokens only; 0: from all."})
    top_p: float = field(
        default=0.0, metadata={"help": "Draw from a beam's fewest tokens that hold this probability; 0 or 1: from all."}
    )

    def __post_init__(self):
        for name, low in (("tgt_length", 1), ("min_tgt_length", 0), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
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


NAME_MAX = 255  # bytes of a folder's name

# What PaddleNLP can do, but not with what is here.
REFUSED = {
    "to_static": "the training code here is dynamic",
    "enable_auto_parallel": "PaddleNLP's GLM can't be run this way",
    "use_expert_parallel": "GLM has no experts",
    **dict.fromkeys(  # of PaddleNLP 3
        ("skip_data_intervals", "ordered_save_group_size", "use_async_save", "offload_optim", "pdc_download_ckpt"),
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
    **dict.fromkeys(("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob"), ((int, float), 0, 1)),
    **dict.fromkeys(("layernorm_epsilon", "initializer_range"), ((int, float), 0, 1)),
    "block_position_encoding": (bool, True, True),
}


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with defaults that any machine can honour, and checked."""

    output_dir: str = field(default="", metadata={"help": "The folder for checkpoints, the model and the results."})
    device: str = field(default="", metadata={"help": "gpu, cpu, xpu or npu; a GPU if Paddle can use one, else cpu."})
    group_by_length: bool = field(
        default=True, metadata={"help": "Train on batches of records of like length, in an order left to chance."}
    )
    amp_master_grad: Optional[bool] = field(
        default=None, metadata={"help": "Gradients in float32; by default in O2, where float16 ones would overflow."}
    )
    early_stopping_patience: Optional[int] = field(
        default=None, metadata={"help": "End training after so many evaluations without a better one than the best."}
    )
    log_level: str = field(
        default="train",
        metadata={"help": "debug, info, train, eval or warning: train shows the run, info PaddleNLP's own lines too."},
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
            raise InputError(f"--metric_for_best_model is {self.metric_for_best_model}: give {', '.join(metrics)}")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise InputError(
                "--early_stopping_patience needs --load_best_model_at_end and --evaluation_strategy: add them"
            )
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in ("all", "none", *get_available_reporting_integrations()):
                raise InputError(f"--report_to {name} is not installed here, or unknown: give visualdl or none")
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
                raise InputError(f"--{name} is {getattr(self, name)}: PaddleNLP's GLM can't be run this way, leave it")


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument. A mistake in it is an InputError."""
    parser = PdArgumentParser((ModelArguments, LoRAArguments, DataArguments, GenerationArguments, GLMTrainingArguments))
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
                raise InputError(f"--{name} is {value!r}, which is no text in UTF-8: give it without such characters")
    return groups


def is_own_output(path):
    """Whether what this run prints goes to the file ``path``."""
    try:
        return any(os.path.samestat(os.fstat(number), os.stat(path)) for number in (1, 2))
    except OSError:  # a link to nowhere, or an output that is closed
        return False


def check_output_dir(args, checkpoint):
    """Raise InputError where the output can't be written, or would be mixed with what is not a run's.

    ``checkpoint`` is the one to resume from, or None.
    """
    if not args.output_dir:
        raise InputError("--output_dir is missing: give the folder for checkpoints, the model and the results")
    for name in ("output_dir", "logging_dir"):
        if max(map(len, os.fsencode(getattr(args, name, None) or "").split(b"/"))) > NAME_MAX:
            raise InputError(f"--{name} is longer than a folder's name may be: give a shorter one")
    existing = os.path.abspath(args.output_dir)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise InputError(f"--output_dir {args.output_dir}: {existing} is not a folder: give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {args.output_dir}: {existing} can't be written to: give another one")
    if not args.do_train or args.overwrite_output_dir or not os.path.isdir(args.output_dir):
        return
    names = [name for name in os.listdir(args.output_dir) if name != LOCK]
    if UNFINISHED in names:  # a run of this folder was killed while it saved
        return
    if any(name.endswith("model_state.pdparams") for name in names) and checkpoint is None:
        raise InputError(
            f"--output_dir {args.output_dir} holds a model and no checkpoint to resume from: "
            "give another folder, or --overwrite_output_dir"
        )
    # The launcher's logs may lie there, and what this run prints.
    traces = ("checkpoint-*", "runs/*", "*_results.json", "*_predictions.jsonl*", "workerlog.*", "*/workerlog.*")
    found = [path for pattern in traces for path in glob.glob(os.path.join(glob.escape(args.output_dir), pattern))]
    if names and not found and not any(is_own_output(os.path.join(args.output_dir, name)) for name in names):
        raise InputError(
            f"--output_dir {args.output_dir} holds {names[0]} and nothing of a run: "
            "give a folder of its own, or --overwrite_output_dir"
        )


def find_last_checkpoint(args, lora):
    """The checkpoint to resume from, or None: the one asked for, or the last whole one in the output folder.

    ``lora`` (bool): whether this run trains an adapter.
    """
    if not args.do_train:
        return None
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and not args.overwrite_output_dir:
        checkpoint = last_whole_checkpoint(args)
    elif checkpoint is not None and (damage := find_damage(checkpoint)):
        raise InputError(f"--resume_from_checkpoint {checkpoint} is damaged: {damage}: give another one")
    if checkpoint is None:
        return None
    weights = "lora_model_state*" if lora else "model[-_]*"
    for pattern in (weights, "optimizer[-.]*", "scheduler.pdparams", "trainer_state.json"):
        if not glob.glob(os.path.join(glob.escape(checkpoint), pattern)):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint} has no {pattern}: give a run's checkpoint-N folder"
                + (f", of one with {'' if lora else 'no '}--lora True" if pattern == weights else "")
            )
    # Without the names in its mark the weights of an optimizer's state are known by those that Paddle gave them, which
    # depend on the layout.
    mark, degree = read_mark(checkpoint), max(args.tensor_parallel_degree, 1)
    saved = len({name[:14] for name in os.listdir(checkpoint) if name.startswith("optimizer.tp")}) or 1
    if saved != degree and not mark:
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and no names of its weights, and can't be "
            f"resumed with {degree}: give --tensor_parallel_degree {saved}, or start anew with --overwrite_output_dir"
        )
    keep_records_a_step(args, mark.get("records"))
    logger.train(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
    return checkpoint


def keep_records_a_step(args, records):
    """Let each update be of as many ``records`` as before (int, or None), or the order of the data would be another."""
    now = args.records_a_step
    if records in (None, now):
        return
    passes = now // args.gradient_accumulation_steps
    if records % passes:
        logger.warning(
            f"the checkpoint's steps are of {records} records and this run's of {now}: the order of the data, the "
            "schedule and the number of steps become this run's"
        )
        return
    args.gradient_accumulation_steps = records // passes
    logger.train(
        f"the checkpoint's steps are of {records} records: this run takes gradient_accumulation_steps "
        f"{args.gradient_accumulation_steps} for as many"
    )


def check_accumulation(args, train_dataset):
    """Raise InputError where the last passes of a step could only repeat records."""
    passes = -(-len(train_dataset) * args.gradient_accumulation_steps // args.records_a_step)
    if args.gradient_accumulation_steps > max(passes, 1):
        raise InputError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: the {len(train_dataset)} records are "
            f"seen in {passes} passes: give at most as many"
        )


def check_config(config, name, data_args, generation, degree):
    """Raise InputError where the model is no GLM, or not one for these lengths, beams and processes."""
    if not isinstance(config, GLMConfig):
        raise InputError(f"--model_name_or_path {name} is no GLM, but a {config.model_type}")
    for key, (kind, least, most) in CONFIG_RANGES.items():
        value = getattr(config, key)
        if not isinstance(value, kind) or not least <= value <= most:
            expected = "true" if least is most else f"a number from {least} to {most}"
            raise InputError(f"--model_name_or_path {name}: {key} in its config.json is {value}: it must be {expected}")
    files = [path for kind in ("pdparams", "safetensors") for path in glob.glob(f"{glob.escape(name)}/model*.{kind}")]
    size, count = sum(map(os.path.getsize, files)), count_parameters(config)[0]
    if files and size < 1.9 * count:  # float16 has two bytes
        raise InputError(
            f"--model_name_or_path {name}: its weights can't be loaded: they are {size} bytes, its config.json is of a "
            f"model of {count} weights: give whole files of one model"
        )
    for what, number in (("attention heads", config.num_attention_heads), ("vocabulary entries", config.vocab_size)):
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


def check_task(args, lora_args, data_args):
    """Raise InputError where there is nothing to do, or a pipe to answer and something else."""
    if not (args.do_train or args.do_eval or args.do_predict or lora_args.merge_lora):
        raise InputError("nothing to do: give --do_train, --do_eval, --do_predict, --predict_file or --merge_lora")
    if data_args.predict_file == "-" and (args.do_train or args.do_eval or lora_args.merge_lora or args.world_size > 1):
        raise InputError("--predict_file - goes without --do_train, --do_eval and --merge_lora, on one process")


def estimate_memory(args, config, lora_config, generation, train_dataset, test_dataset):
    """Say what memory this run is about to take, and warn where that is more than there is. Never ends the run.

    Returns:
        dict: bytes of "train" and "eval", of those that are to be.
    """
    degree, half = max(args.tensor_parallel_degree, 1), args.fp16 or args.bf16
    common = {"degree": degree, "lora_config": lora_config}

    def need(kind, **changes):
        """Bytes of the batch that takes most, with some of the settings changed."""
        dataset = train_dataset if kind == "train" else test_dataset
        source_length = max(feature["source_length"] for feature in dataset)
        target_length = max(len(feature["labels"]) for feature in dataset)
        setting = {"source_length": source_length, "target_length": target_length, **common}
        if kind == "train":
            setting.update(
                batch_size=args.per_device_train_batch_size, precision=args.fp16_opt_level if half else "float32",
                recompute=args.recompute, master_grad=args.amp_master_grad,
                sharding_degree=max(args.sharding_parallel_degree, 1),
            )  # fmt: skip
            return training_memory(config, **{**setting, **changes})
        setting.update(
            batch_size=args.per_device_eval_batch_size, num_beams=generation.num_beams, dtype=args.weights_dtype(),
            target_length=max(target_length, generation.tgt_length),
        )  # fmt: skip
        return evaluation_memory(config, **{**setting, **changes})

    datasets = {"train": train_dataset, "eval": test_dataset}
    needs = {kind: need(kind) for kind in datasets if datasets[kind]}
    if len(needs) == 2:  # what the optimizer holds stays
        needs["eval"]["total"] += needs["train"]["optimizer"]
    if not needs:
        return {}
    free = free_memory()
    texts = []
    for kind, parts in needs.items():
        numbers = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        texts.append(f"{parts['total'] / 1e9:.2f} GB to {kind} ({numbers})")
    device = paddle.get_device()  # of a GPU Paddle can't say what others take
    has = "" if free is None else f"; {device} has {free / 1e9:.2f} GB{' free' if device == 'cpu' else ''}"
    logger.train(f"each process is about to need {' and '.join(texts)}{has}")
    kind = max(needs, key=lambda kind: needs[kind]["total"])
    if free is not None and needs[kind]["total"] > free:
        ways = {
            f"--tensor_parallel_degree {2 * degree}": {"degree": 2 * degree},
            f"--per_device_{kind}_batch_size 1": {"batch_size": 1},
        }
        if kind == "train":
            ways["--recompute"], ways["--fp16 --fp16_opt_level O2"] = {"recompute": True}, {"precision": "O2"}
            if lora_config is None:
                ways["--lora True"] = {"lora_config": new_lora_config()}
        now = need(kind)["total"]
        saved = {way: now - need(kind, **changes)["total"] for way, changes in ways.items()}
        best = [
            f"{way} ({saved[way] / 1e9:.2f} GB less)" for way in sorted(saved, key=saved.get)[::-1] if saved[way] > 0
        ]
        logger.warning(f"that may not fit: what would help most is {', '.join(best)}")
    return {kind: parts["total"] for kind, parts in needs.items()}


@contextlib.contextmanager
def standard_output(wanted):
    """The standard output as a text stream, if ``wanted``: whatever else is printed goes to standard error."""
    if not wanted:
        yield None
        return
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of the pipe does
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        yield output


def predict_lines(model, tokenizer, src_length, generation, batch_size, output):
    """Answer the lines of standard input, those that are there in one batch, by JSON lines in the stream ``output``."""
    model.eval()
    collate = DataCollator(tokenizer.pad_token_id)
    # A file of its own: a thread that waits in sys.stdin would hinder the interpreter's end.
    standard_input = os.fdopen(os.dup(0), "rb")
    for records in read_in_batches(parse_lines(standard_input, "standard input", require_question=False), batch_size):
        features, mistake = [], None
        for index, record in enumerate(records):
            try:
                features += build_dataset(tokenizer, [{**record, "question": None}], src_length, generation.tgt_length)
            except InputError as error:  # after those before it are answered
                mistake, records = error, records[:index]
                break
        if records:
            batch = collate(features)
            source_length = batch["source_length"]
            input_ids = paddle.to_tensor(batch["input_ids"][:, : source_length.max()])
            start, end = tokenizer.sop_token_id, tokenizer.eop_token_id
            for record, hypotheses in zip(
                records, beam_search(model, input_ids, source_length, generation, start, end)
            ):
                row = prediction_row(tokenizer, record, hypotheses, generation.num_return_sequences > 1)
                print(json.dumps(row, ensure_ascii=False), file=output)
            output.flush()
        if mistake:
            raise mistake


def load_model(base, adapter, lora_config, weights, args):
    """The GLM ``base``, with an adapter of ``weights`` where there is a ``lora_config``."""
    model = load(
        AutoModelForConditionalGeneration, base, "weights", adapter, dtype=args.weights_dtype(),
        tensor_parallel_degree=max(args.tensor_parallel_degree, 1),
        tensor_parallel_rank=max(args.tensor_parallel_rank, 0),
    )  # fmt: skip
    return add_lora(model, lora_config, weights) if lora_config else model


def show_results(results, rows, args, lora_args):
    """The last lines of a run: a table of its results, three predictions beside their references, what it wrote."""
    kinds = ("loss", "rouge1", "rouge2", "rougel", "bleu4", "samples_per_second", "memory_peak_gb")
    shown = {name: value for name, value in results.items() if name.endswith(kinds) and value is not None}
    lines = [f"{name:{max(map(len, shown))}}  {value:.4g}" for name, value in sorted(shown.items())]
    for row in rows[:3]:
        lines += [f"answer      {row['answer']}", f"prediction  {row['prediction']}"]
        lines += [f"reference   {row['reference']}"] if row["reference"] is not None else []
    for line in lines:
        logger.eval(line)
    wanted = {"eval": args.do_eval, "test": args.do_predict}
    files = [f"{split}_{kind}" for split in wanted if wanted[split] for kind in ("results.json", "predictions.jsonl")]
    files += [LORA_WEIGHTS if lora_args.lora else "model_state.pdparams"] if args.do_train else []
    files += ["model_state.pdparams"] if lora_args.merge_lora else []
    logger.eval(f"done: in {args.output_dir} are {', '.join(files)}")


def run(model_args, lora_args, data_args, generation, args, output=None):
    """Check, read, load, train, evaluate, predict; or, with a text stream ``output``, answer standard input there."""
    args.do_predict = args.do_predict or bool(data_args.predict_file)
    check_task(args, lora_args, data_args)
    name, degree = model_args.model_name_or_path, max(args.tensor_parallel_degree, 1)
    adapter, base = find_base(lora_args, name)
    checkpoint = find_last_checkpoint(args, lora_args.lora)
    if output is None:
        check_output_dir(args, checkpoint)

    # Everything that can be wrong is read and checked before the weights are.
    config = load(AutoConfig, base, "config.json", adapter)
    check_config(config, base, data_args, generation, degree)
    tokenizer = load(GLMTokenizer, name, "tokenizer")  # AutoTokenizer of PaddleNLP 3 does not know the Chinese one
    check_tokenizer(tokenizer, config, name)

    def read(split, limit, source=data_args.task_name):
        records = read_records(source, split, require_question=split != "test")[:limit]
        return build_dataset(tokenizer, records, data_args.src_length, generation.tgt_length, args.disable_tqdm)

    train_dataset = read("train", data_args.max_train_samples) if args.do_train else []
    if args.do_train:
        check_accumulation(args, train_dataset)
    dev_dataset = read("dev", data_args.max_eval_samples) if args.do_eval else []
    test_dataset = []
    if args.do_predict and output is None:
        test_dataset = read("test", data_args.max_predict_samples, data_args.predict_file or data_args.task_name)
    lora_config = weights = None
    if lora_args.lora:
        lora_config = make_lora_config(lora_args, adapter, base, args.weights_dtype(), degree)
        weights = read_adapter(adapter, config, lora_config) if adapter else new_adapter(config, lora_config, args.seed)

    memory = estimate_memory(args, config, lora_config, generation, train_dataset, dev_dataset + test_dataset)
    model = load_model(base, adapter, lora_config, weights, args)
    if output is not None:
        set_seed(args.seed)
        size = args.per_device_eval_batch_size
        return predict_lines(model, tokenizer, data_args.src_length, generation, size, output)
    trainer = GLMTrainer(
        model=model, args=args, data_collator=DataCollator(tokenizer.pad_token_id), train_dataset=train_dataset or None,
        eval_dataset=dev_dataset or None, tokenizer=tokenizer, generation=generation,
        label_smoothing=model_args.label_smoothing, lr_decay_ratio=model_args.lr_decay_ratio, memory=memory,
    )  # fmt: skip
    results = {}

    def keep(split, metrics):
        if metrics:  # none of training, if the checkpoint was of the last step
            trainer.save_metrics(split, metrics)
            results.update(metrics)

    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        with trainer.finishing():
            trainer.save_model(merge_tensor_parallel=degree > 1)
            keep("train", metrics)
            trainer.save_state()
    if lora_args.merge_lora:
        with trainer.finishing():
            trainer.save_merged()
    for split, wanted, evaluate in (
        ("eval", args.do_eval, trainer.evaluate),
        ("test", args.do_predict, lambda: trainer.predict(test_dataset).metrics),
    ):
        if wanted:
            metrics = evaluate()
            with trainer.finishing():
                keep(split, metrics)
    show_results(results, trainer.rows, args, lora_args)


def stop(number, _):
    raise Fault(f"stopped by {signal.Signals(number).name}", exit_code=128 + number)


def end_the_run(error):
    """End the process after an exception in one of its threads: who waits for the thread would wait for ever."""
    sys.__excepthook__(error.exc_type, error.exc_value, error.exc_traceback)
    os._exit(1)


def main():
    if not sys.stderr.isatty():
        os.environ["NO_COLOR"] = "1"
    threading.excepthook = end_the_run
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    peers = None
    try:
        *arguments, args = parse_arguments()
        use_the_whole_cpu()
        if args.world_size > 1:
            peers = Peers(lambda: where_to_resume(args) if args.do_train else "the same command starts again")
        # On a terminal a log line goes above the bar that is there.
        share = logging_redirect_tqdm([logger.logger]) if sys.stderr.isatty() else contextlib.nullcontext()
        pipe = arguments[2].predict_file == "-"
        with share, standard_output(pipe) as output, locked("" if pipe else args.output_dir):
            run(*arguments, args, output)
        if peers:
            peers.leave(b"done")
        return
    except (InputError, Fault) as error:
        code = error.exit_code
        # Under a launcher all processes find the same mistake, and one says it.
        if isinstance(error, Fault) or int(os.environ.get("PADDLE_RANK_IN_NODE", 0)) == 0:
            print("finetune_generation.py: error:", *str(error).split(), file=sys.stderr)
    except Exception as error:
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            if peers:
                peers.explain()
            raise
        code = 1
        print(f"finetune_generation.py: error: can't write: {error.strerror}: give it room and start again,",
              "checkpoints and predictions written before are whole", file=sys.stderr)  # fmt: skip
    if peers:
        peers.leave(b"ending")
    sys.exit(code)


if __name__ == "__main__":
    main()
