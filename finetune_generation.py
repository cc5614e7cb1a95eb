"""Fine-tune GLM for question generation: train, evaluate by beam search, predict.

python finetune_generation.py --help, or with one JSON file of the same arguments: see README.md.
"""

import glob
import os
import sys
from dataclasses import dataclass, field

# utils first: it prepares the CPU before anything loads paddle.
from utils import GLMTrainer  # isort:skip

import numpy as np
import paddle
from paddlenlp.trainer import PdArgumentParser, TrainingArguments, get_last_checkpoint
from paddlenlp.transformers import AutoConfig, AutoModelForConditionalGeneration, AutoTokenizer
from paddlenlp.utils.log import logger

from data import DataArguments, DataCollator, InputError, build_dataset, read_records


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
        for name in ("label_smoothing", "lr_decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be from 0 to 1")


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
            if getattr(self, name) < low:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be at least {low}")
        if self.min_tgt_length > self.tgt_length:
            raise InputError(
                f"--min_tgt_length {self.min_tgt_length} is over --tgt_length {self.tgt_length}: lower it or raise that"
            )
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise InputError(f"--top_k is {self.top_k}, --top_p {self.top_p}: top_k is 0 or more, top_p from 0 to 1")
        if not np.isfinite(self.length_penalty):
            raise InputError(f"--length_penalty is {self.length_penalty}: it must be a finite number")


@dataclass
class GLMTrainingArguments(TrainingArguments):
    """PaddleNLP's, with defaults that any machine can honour."""

    device: str = field(default="", metadata={"help": "gpu, cpu, xpu or npu; a GPU if Paddle can use one, else cpu."})

    group_by_length: bool = field(
        default=True, metadata={"help": "Train on batches of records of like length, in an order left to chance."}
    )

    def __post_init__(self):
        # Asked first, for paddle.set_device("gpu") without a GPU ends the process with nothing to catch.
        has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
        if not self.device or (self.device.startswith("gpu") and not has_gpu):
            self.device = "gpu" if has_gpu else "cpu"
            if self.device == "cpu":
                logger.warning("Paddle can use no GPU here: running on the CPU")
        if self.device == "cpu" and (self.fp16 != self.bf16):
            logger.warning(f"{'fp16' if self.fp16 else 'bf16'} needs a GPU: running in float32")
            self.fp16 = self.bf16 = False
        # do_eval alone would make PaddleNLP evaluate every eval_steps; here, as elsewhere, evaluation_strategy says so.
        do_eval, self.do_eval = self.do_eval, False
        processes = paddle.distributed.get_world_size()
        if self.tensor_parallel_degree > 1 and processes % self.tensor_parallel_degree:
            raise InputError(
                f"--tensor_parallel_degree {self.tensor_parallel_degree} does not divide the {processes} processes of "
                "this run: start that many by python -m paddle.distributed.launch"
            )
        super().__post_init__()
        self.do_eval = self.do_eval or do_eval


def parse_arguments():
    """Read the command line, or the JSON file that is its first argument. A mistake in it is an InputError."""
    parser = PdArgumentParser((ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments))
    try:
        if len(sys.argv) >= 2 and sys.argv[1].endswith(".json"):
            return parser.parse_json_file_and_cmd_lines()
        return parser.parse_args_into_dataclasses()
    except (ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error


def find_last_checkpoint(args):
    """The checkpoint to resume from, or None. Refuses to train over what a finished run left."""
    if not args.do_train:
        return None
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and not args.overwrite_output_dir and os.path.isdir(args.output_dir):
        checkpoint = get_last_checkpoint(args.output_dir)
        if checkpoint is None and os.path.exists(os.path.join(args.output_dir, "model_state.pdparams")):
            raise InputError(
                f"--output_dir {args.output_dir} holds a model and no checkpoint to resume from: "
                "give another folder, or --overwrite_output_dir"
            )
    if checkpoint is None:
        return None
    # The number of data-parallel processes may change, but each tensor-parallel process has files of its own.
    saved = len(glob.glob(os.path.join(checkpoint, "model_state.tp*.pdparams"))) or 1
    degree = max(args.tensor_parallel_degree, 1)
    if saved != degree:
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and can't be resumed with {degree}: "
            f"give --tensor_parallel_degree {saved}, or start anew with --overwrite_output_dir or another --output_dir"
        )
    logger.info(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
    return checkpoint


def run(model_args, data_args, generation, training_args):
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    paddle.set_device(training_args.device)
    checkpoint = find_last_checkpoint(training_args)

    # Everything that can be wrong is read and checked before the weights are.
    config = AutoConfig.from_pretrained(model_args.model_name_or_path)
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
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)

    def dataset(split, wanted):
        if not wanted:
            return None
        records = read_records(data_args.task_name, split, require_question=split != "test")
        return build_dataset(tokenizer, records, data_args.src_length, generation.tgt_length)

    train_dataset = dataset("train", training_args.do_train)
    dev_dataset = dataset("dev", training_args.do_eval)
    test_dataset = dataset("test", training_args.do_predict)

    dtype = "float32"
    if training_args.fp16_opt_level == "O2" and (training_args.fp16 or training_args.bf16):
        dtype = "float16" if training_args.fp16 else "bfloat16"
    model = AutoModelForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        dtype=dtype,
        tensor_parallel_degree=training_args.tensor_parallel_degree,
        tensor_parallel_rank=training_args.tensor_parallel_rank,
    )

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
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        metrics = trainer.predict(test_dataset).metrics
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)


def main():
    try:
        run(*parse_arguments())
    except InputError as error:
        if int(os.environ.get("PADDLE_RANK_IN_NODE", 0)) == 0:  # under a launcher one process says it
            print(f"finetune_generation.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
