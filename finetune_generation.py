"""Fine-tune GLM for question generation: train, evaluate by beam search, predict.

python finetune_generation.py --help, or with one JSON file of the same arguments: see README.md.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading

import paddle
from paddlenlp.trainer import set_seed
from paddlenlp.transformers import AutoConfig, AutoModelForConditionalGeneration, GLMTokenizer
from paddlenlp.utils.log import logger
from tqdm.contrib.logging import logging_redirect_tqdm

from data import DataCollator, build_dataset, parse_lines, read_in_batches, read_records
from glm.arguments import (
    check_accumulation,
    check_config,
    check_task,
    check_tokenizer,
    parse_arguments,
)
from glm.checkpoints import (
    check_output_dir,
    find_last_checkpoint,
    where_to_resume,
)
from glm.device import use_the_whole_cpu
from glm.errors import Fault, InputError
from glm.generation import beam_search
from glm.lora import LORA_WEIGHTS, adapter_weights, add_lora, prepare
from glm.memory import estimate_memory
from glm.processes import Peers, locked
from glm.weights import load
from utils import GLMTrainer, prediction_row


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
    for records in read_in_batches(
        parse_lines(standard_input, "standard input", require_question=False), batch_size
    ):
        features, mistake = [], None
        for index, record in enumerate(records):
            try:
                features += build_dataset(
                    tokenizer, [{**record, "question": None}], src_length, generation.tgt_length
                )
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
    files = [
        f"{split}_{kind}"
        for split in wanted
        if wanted[split]
        for kind in ("results.json", "predictions.jsonl")
    ]
    files += [LORA_WEIGHTS if lora_args.lora else "model_state.pdparams"] if args.do_train else []
    files += ["model_state.pdparams"] if lora_args.merge_lora else []
    logger.eval(f"done: in {args.output_dir} are {', '.join(files)}")


def run(model_args, lora_args, data_args, generation, args, output=None):
    """Check, read, load, train, evaluate, predict; or, with a text stream ``output``, answer standard input there."""
    args.do_predict = args.do_predict or bool(data_args.predict_file)
    check_task(args, lora_args, data_args)
    name, degree = model_args.model_name_or_path, max(args.tensor_parallel_degree, 1)
    base, adapter, lora_config = prepare(lora_args, name, args.weights_dtype(), degree)
    checkpoint = find_last_checkpoint(args, lora_args.lora)
    if output is None:
        check_output_dir(args, checkpoint)

    # Everything that can be wrong is read and checked before the weights are.
    config = load(AutoConfig, base, "config.json", adapter)
    check_config(config, base, data_args, generation, degree)
    tokenizer = load(
        GLMTokenizer, name, "tokenizer"
    )  # AutoTokenizer of PaddleNLP 3 does not know the Chinese one
    check_tokenizer(tokenizer, config, name)

    def read(split, limit, source=data_args.task_name):
        records = read_records(source, split, require_question=split != "test")[:limit]
        return build_dataset(
            tokenizer, records, data_args.src_length, generation.tgt_length, args.disable_tqdm
        )

    train_dataset = read("train", data_args.max_train_samples) if args.do_train else []
    if args.do_train:
        check_accumulation(args, train_dataset)
    dev_dataset = read("dev", data_args.max_eval_samples) if args.do_eval else []
    test_dataset = []
    if args.do_predict and output is None:
        test_dataset = read(
            "test", data_args.max_predict_samples, data_args.predict_file or data_args.task_name
        )
    weights = adapter_weights(adapter, config, lora_config, args.seed) if lora_config else None

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
        if not isinstance(error, OSError) or error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
        ):
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
