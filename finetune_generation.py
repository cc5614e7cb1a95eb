"""Fine-tune GLM for question generation: train, evaluate by beam search, predict.

python finetune_generation.py --help, or with one JSON file of the same arguments: see README.md.
"""

import errno
import fnmatch
import glob
import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field

import paddle
from paddle.distributed.fleet.utils import log_util
from paddlenlp.trainer import PdArgumentParser, TrainingArguments, set_seed
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.transformers import AutoConfig, AutoModelForConditionalGeneration, AutoTokenizer, GLMConfig
from paddlenlp.utils.log import logger

from data import DataArguments, DataCollator, InputError, build_dataset, parse_lines, read_records, require_range
from utils import Fault, GLMTrainer, last_whole_checkpoint, predict_lines


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
class GenerationArguments:
    """Beam search; the names and the rules are those of THUDM/GLM."""

    tgt_length: int = field(default=160, metadata={"help": "Most tokens of a question, in training and generation."})
    min_tgt_length: int = field(default=55, metadata={"help": "Fewest tokens generated before the end token."})
    num_beams: int = field(default=5, metadata={"help": "Beams; 1 with select_topk is greedy search."})
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
        require_range(self, "length_penalty", -100, most=100)
        require_range(self, "top_k", 0)
        require_range(self, "top_p", 0, most=1)
        if self.min_tgt_length > self.tgt_length:
            raise InputError(
                f"--min_tgt_length {self.min_tgt_length} is over --tgt_length {self.tgt_length}: lower it or raise that"
            )
        if self.select_topk and (self.top_k or self.top_p):
            raise InputError("--top_k and --top_p are for draws: add --select_topk False, or leave them out")


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with defaults that any machine can honour, and checked."""

    output_dir: str = field(default="", metadata={"help": "The folder for checkpoints, the model and the results."})
    device: str = field(default="", metadata={"help": "gpu, cpu, xpu or npu; a GPU if Paddle can use one, else cpu."})
    group_by_length: bool = field(
        default=True, metadata={"help": "Train on batches of records of like length, in an order left to chance."}
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
        # Asked first, for paddle.set_device("gpu") without a GPU ends the process with nothing to catch.
        has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        if not self.device or (self.device.startswith("gpu") and not has_gpu):
            self.device = "gpu" if has_gpu else "cpu"
            if self.device == "cpu":
                logger.warning("Paddle can use no GPU here: running on the CPU")
        if self.device == "cpu" and (self.fp16 != self.bf16):
            logger.warning(f"{'fp16' if self.fp16 else 'bf16'} needs a GPU: running in float32")
            self.fp16 = self.bf16 = False
        self._check()
        # do_eval alone would make PaddleNLP evaluate every eval_steps; here, as elsewhere, evaluation_strategy says so.
        do_eval, self.do_eval = self.do_eval, False
        log_level = self.log_level
        super().__post_init__()
        self.do_eval, self.log_level = self.do_eval or do_eval, log_level
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()  # no bars in files
        paddle.set_device(self.device)

    def _check(self):
        """What PaddleNLP would find out in the middle of a run, or not at all. Raises InputError."""
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"):
            require_range(self, name, 0)
        require_range(self, "dataloader_num_workers", 0, most=256)
        for name in ("adam_beta1", "adam_beta2"):
            require_range(self, name, 0, below=1)
        for name in ("adam_epsilon", "num_train_epochs", "scale_loss"):
            require_range(self, name, 1e-30)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require_range(self, name, 1)
        for name in ("logging_steps", "save_steps", "eval_steps", "save_total_limit"):
            if getattr(self, name) is not None:
                require_range(self, name, 1)
        require_range(self, "seed", 0, below=2**31)
        require_range(self, "warmup_ratio", 0, most=1)
        if self.minimum_eval_times and not self.eval_steps:
            raise InputError("--minimum_eval_times needs --evaluation_strategy steps and --eval_steps")
        if self.max_steps != -1:  # PaddleNLP's way to say: as num_train_epochs has it
            require_range(self, "max_steps", 1)
        if self.device.split(":")[0] not in ("gpu", "cpu", "xpu", "npu"):
            raise InputError(f"--device is {self.device}: give gpu, cpu, xpu or npu")
        if self.fp16_opt_level not in ("O1", "O2"):
            raise InputError(f"--fp16_opt_level is {self.fp16_opt_level}: give O1 or O2")
        if self.optim != "adamw":
            raise InputError(f"--optim is {self.optim}: PaddleNLP has adamw alone")
        if self.to_static:
            raise InputError("--to_static: the training code here is dynamic, leave it out")
        metrics = ("loss", "rouge1", "rouge2", "rougel", "bleu4")
        if self.metric_for_best_model is not None and self.metric_for_best_model not in metrics:
            raise InputError(f"--metric_for_best_model is {self.metric_for_best_model}: give {', '.join(metrics)}")
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name not in ("all", "none", *get_available_reporting_integrations()):
                raise InputError(f"--report_to {name} is not installed here, or unknown: give visualdl or none")
        processes = paddle.distributed.get_world_size()
        if self.tensor_parallel_degree > 1 and processes % self.tensor_parallel_degree:
            raise InputError(
                f"--tensor_parallel_degree {self.tensor_parallel_degree} does not divide the {processes} processes of "
                "this run: start that many by python -m paddle.distributed.launch"
            )
        for name, most in (("pipeline_parallel_degree", 1), ("sep_parallel_degree", 1), ("past_index", -1)):
            if getattr(self, name) > most:
                raise InputError(f"--{name} is {getattr(self, name)}: PaddleNLP's GLM can't be run this way, leave it")


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument. A mistake in it is an InputError."""
    parser = PdArgumentParser((ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments))
    try:
        if len(sys.argv) >= 2 and sys.argv[1].endswith(".json"):
            return parser.parse_json_file_and_cmd_lines()
        return parser.parse_args_into_dataclasses()
    except (ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        # PaddleNLP's assertions have no words of their own.
        line = traceback.extract_tb(error.__traceback__)[-1].line
        raise InputError(str(error) or f"PaddleNLP refuses these arguments, by its rule: {line}") from error


def check_output_dir(args, checkpoint):
    """Raise InputError where the output can't be written, or would be mixed with what is not a run's.

    ``checkpoint`` is the one to resume from, or None.
    """
    if not args.output_dir:
        raise InputError("--output_dir is missing: give the folder for checkpoints, the model and the results")
    existing = os.path.abspath(args.output_dir)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise InputError(f"--output_dir {args.output_dir}: {existing} is not a folder: give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {args.output_dir}: {existing} can't be written to: give another one")
    if not args.do_train or args.overwrite_output_dir or not os.path.isdir(args.output_dir):
        return
    names = os.listdir(args.output_dir)
    if "model_state.pdparams" in names and checkpoint is None:
        raise InputError(
            f"--output_dir {args.output_dir} holds a model and no checkpoint to resume from: "
            "give another folder, or --overwrite_output_dir"
        )
    traces = ("checkpoint-*", "runs", "*_results.json", "*_predictions.jsonl*", "*.log", "*.txt", "log")
    if names and not any(fnmatch.filter(names, pattern) for pattern in traces):
        raise InputError(
            f"--output_dir {args.output_dir} holds {names[0]} and nothing of a run: "
            "give a folder of its own, or --overwrite_output_dir"
        )


def find_last_checkpoint(args):
    """The checkpoint to resume from, or None: the one asked for, or the last whole one in the output folder."""
    if not args.do_train:
        return None
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and not args.overwrite_output_dir:
        checkpoint = last_whole_checkpoint(args.output_dir)
    if checkpoint is None:
        return None
    for pattern in ("model[-_]*", "optimizer[-.]*", "scheduler.pdparams", "trainer_state.json"):
        if not glob.glob(os.path.join(glob.escape(checkpoint), pattern)):
            raise InputError(
                f"--resume_from_checkpoint {checkpoint} has no {pattern}: give a run's checkpoint-N folder"
            )
    # The number of data-parallel processes may change, but each tensor-parallel process has files of its own.
    saved = len(glob.glob(os.path.join(glob.escape(checkpoint), "model_state.tp*.pdparams"))) or 1
    degree = max(args.tensor_parallel_degree, 1)
    if saved != degree:
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and can't be resumed with {degree}: "
            f"give --tensor_parallel_degree {saved}, or start anew with --overwrite_output_dir or another --output_dir"
        )
    logger.train(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
    return checkpoint


def load(loader, args, what, **kwargs):
    """``loader.from_pretrained``. What can't be loaded, or only in part, is an InputError."""
    name, warnings = args.model_name_or_path, []
    collector = logging.Handler()
    collector.emit = lambda record: warnings.append(record.getMessage())
    logger.logger.addHandler(collector)
    try:
        loaded = loader.from_pretrained(name, **kwargs)
    except Exception as error:  # PaddleNLP and its hubs raise many kinds
        raise InputError(
            f"--model_name_or_path {name}: its {what} can't be loaded ({str(error)[:200]}): give a published model's "
            "name, if its host can be reached, or a folder with config.json, model_state.pdparams and the tokenizer"
        ) from error
    finally:
        logger.logger.removeHandler(collector)
    missing = "".join(warning for warning in warnings if "newly initialized" in warning)
    if "word_embeddings" in missing or ".layers." in missing:
        raise InputError(f"--model_name_or_path {name}: its weights lack some of GLM's: give those of a GLM")
    return loaded


def run(model_args, data_args, generation, training_args):
    stream = data_args.predict_file == "-"
    training_args.do_predict = training_args.do_predict or bool(data_args.predict_file)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval, --do_predict or --predict_file")
    if stream:
        if training_args.do_train or training_args.do_eval or training_args.world_size > 1:
            raise InputError("--predict_file - goes without --do_train and --do_eval, on one process")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of the pipe does
        output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever else is printed goes to standard error
    checkpoint = find_last_checkpoint(training_args)
    if not stream:
        check_output_dir(training_args, checkpoint)

    # Everything that can be wrong is read and checked before the weights are.
    config = load(AutoConfig, model_args, "config.json")
    if not isinstance(config, GLMConfig):
        raise InputError(f"--model_name_or_path {model_args.model_name_or_path} is no GLM, but a {config.model_type}")
    degree = max(training_args.tensor_parallel_degree, 1)
    for name, number in (("attention heads", config.num_attention_heads), ("vocabulary entries", config.vocab_size)):
        if number % degree:
            raise InputError(
                f"--tensor_parallel_degree {degree} does not divide the {number} {name} of "
                f"{model_args.model_name_or_path}: give one that does"
            )
    if data_args.src_length + generation.tgt_length > config.max_sequence_length:
        raise InputError(
            f"--src_length {data_args.src_length} + --tgt_length {generation.tgt_length} is over the "
            f"{config.max_sequence_length} positions of {model_args.model_name_or_path}: lower one of them"
        )
    if generation.num_beams > config.vocab_size:
        raise InputError(
            f"--num_beams {generation.num_beams} is over the {config.vocab_size} entries of the vocabulary"
        )
    tokenizer = load(AutoTokenizer, model_args, "tokenizer")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--model_name_or_path {model_args.model_name_or_path}: its tokenizer has {len(tokenizer)} entries, its "
            f"model {config.vocab_size}: they are not of one model"
        )

    def dataset(split, wanted):
        if not wanted:
            return None
        source = data_args.predict_file if split == "test" and data_args.predict_file else data_args.task_name
        records = read_records(source, split, require_question=split != "test")
        return build_dataset(tokenizer, records, data_args.src_length, generation.tgt_length)

    train_dataset = dataset("train", training_args.do_train)
    dev_dataset = dataset("dev", training_args.do_eval)
    test_dataset = dataset("test", training_args.do_predict and not stream)

    dtype = "float32"
    if training_args.fp16_opt_level == "O2" and (training_args.fp16 or training_args.bf16):
        dtype = "float16" if training_args.fp16 else "bfloat16"
    model = load(
        AutoModelForConditionalGeneration,
        model_args,
        "weights",
        dtype=dtype,
        tensor_parallel_degree=training_args.tensor_parallel_degree,
        tensor_parallel_rank=training_args.tensor_parallel_rank,
    )
    if stream:
        set_seed(training_args.seed)
        records = parse_lines(sys.stdin.buffer, "standard input", require_question=False)
        return predict_lines(model, tokenizer, records, data_args.src_length, generation, output)

    trainer = GLMTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=dev_dataset,
        tokenizer=tokenizer,
        generation=generation,
        label_smoothing=model_args.label_smoothing,
        lr_decay_ratio=model_args.lr_decay_ratio,
    )

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(merge_tensor_parallel=training_args.tensor_parallel_degree > 1)
        if result.metrics:  # none, if the checkpoint was of the last step
            trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_args.do_predict:
        trainer.save_metrics("test", trainer.predict(test_dataset).metrics)
    wanted = {"eval": training_args.do_eval, "test": training_args.do_predict}
    files = [f"{split}_{kind}" for split in wanted if wanted[split] for kind in ("results.json", "predictions.jsonl")]
    files += ["model_state.pdparams"] if training_args.do_train else []
    logger.eval(f"done: in {training_args.output_dir} are {', '.join(files)}")


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
    try:
        run(*parse_arguments())
    except (InputError, Fault) as error:
        # Under a launcher all processes find the same mistake, and one says it.
        if isinstance(error, Fault) or int(os.environ.get("PADDLE_RANK_IN_NODE", 0)) == 0:
            print("finetune_generation.py: error:", *str(error).split(), file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"finetune_generation.py: error: can't write: {error.strerror}: give it room and start again,",
              "checkpoints and predictions written before are whole", file=sys.stderr)  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    main()
