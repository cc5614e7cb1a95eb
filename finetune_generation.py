"""Fine-tune GLM for generation: train, evaluate by beam search, predict, or answer standard input.

    python finetune_generation.py configs/glm-large.json
    python finetune_generation.py --model_name_or_path FOLDER --predict_file FILE --output_dir OUT
    python finetune_generation.py --model_name_or_path FOLDER --predict_file - < lines.jsonl

``fine_tune`` is the story of a run, ``answer_lines`` that of a pipe. --help names all arguments.
"""

import contextlib
import errno
import itertools
import os
import signal
import sys

# Until main() runs, which takes some seconds of imports, Ctrl-C ends the process without a traceback.
if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    from paddlenlp.trainer import set_seed
except OSError as error:  # it and Paddle make folders for downloads at their import
    if __name__ != "__main__":
        raise
    variable = "HOME" if "/.cache" in str(error.filename) else "PPNLP_HOME"
    print(
        f"finetune_generation.py: error: {error.filename} can't be made ({error.strerror}), which Paddle "
        f"wants: set {variable} to a folder that can be written to",
        file=sys.stderr,
    )
    sys.exit(2)
import paddle
from paddlenlp.utils.log import logger

from data import (
    DataCollator,
    build_dataset,
    build_features,
    check_target_length,
    describe_generation,
    encode_source,
)
from glm.arguments import check_accumulation, parse_arguments
from glm.console import process_settings, standard_output
from glm.decoding.decoder import beam_search
from glm.device import use_the_whole_cpu
from glm.errors import Fault, InputError, error_line, printable
from glm.files import dump_json
from glm.outputs.folder import open_run_folder
from glm.outputs.results import write_results
from glm.processes import failing_together, is_first_of_machine, tensor_parallel_part
from glm.records import parse_each_line, read_in_batches, read_lines, read_records
from glm.templates import choose_templates, get_templates
from glm.training.memory import estimate_memory
from glm.watchdog import GRACE, Peers, is_launched, sleep_through_signals, watch_launcher
from glm.weights.adapters import add_lora, merge_for_decoding, save_merged
from glm.weights.loading import load_model
from glm.weights.pretrained import check_lengths, check_trainable, find_pretrained
from glm.weights.torch_folder import export_torch
from utils import GLMTrainer, prediction_row, shown_fields

# What the system says where something can't be written, or moved, or removed.
UNWRITABLE = tuple(
    getattr(errno, f"E{name}")
    for name in "NOSPC DQUOT FBIG ROFS ACCES PERM IO BUSY XDEV STALE NOTEMPTY ISDIR".split()
)


def fine_tune(pretrained, folder, model_args, data_args, generation, args):
    """Train, evaluate and predict as the arguments say, and write the model and the results.

    Args:
        pretrained (Pretrained): the model to begin with.
        folder (RunFolder): output_dir.
        model_args, data_args, generation, args: the groups that ``parse_arguments`` returns.
    """
    # Check: what can be wrong is found before the weights are loaded.
    _, degree = tensor_parallel_part(args)
    check_lengths(pretrained, data_args.src_length, generation, degree)
    if args.do_train:
        check_trainable(pretrained)
    checkpoint = folder.find_checkpoint(lora=pretrained.adapter is not None)
    data_args = choose_templates(pretrained.tokenizer, data_args, checkpoint and checkpoint.path)
    check_target_length(pretrained.tokenizer, generation.tgt_length)
    writes_model = args.do_train or model_args.merge_lora
    folder.check_contents(checkpoint, writes_model or model_args.export_torch)
    folder.check_models(pretrained, writes_model, model_args.export_torch)
    with failing_together():
        datasets = read_datasets(pretrained.tokenizer, data_args, generation, args)
    train_dataset, dev_dataset, test_dataset = datasets
    if args.do_train:
        check_accumulation(args, len(train_dataset), checkpoint and checkpoint.global_batch_size)
        groups = (model_args, data_args, generation, args)
        folder.prepare_run(groups, pretrained, [item["record"] for item in train_dataset], checkpoint)
    memory = estimate_memory(args, pretrained, generation, train_dataset, dev_dataset + test_dataset)
    if not (args.do_train or args.do_eval or args.do_predict or model_args.merge_lora):
        export_torch(folder, pretrained)  # from file to file, without a model
        return

    # Load.
    trainer = GLMTrainer(
        model=load(pretrained, args, memory),
        args=args,
        data_collator=DataCollator(pretrained.tokenizer.pad_token_id),
        train_dataset=train_dataset or None,
        eval_dataset=dev_dataset or None,
        tokenizer=pretrained.tokenizer,
        generation=generation,
        memory=memory,
        folder=folder,
    )
    results = {}

    # Train.
    if args.do_train:
        results.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
        with trainer.writing(), folder.replacing_model(trainer.current_step) as staging:
            trainer.save_trained(staging)
            write_results(staging, "train", results)
    trained = pretrained  # what is merged or exported from its files
    if args.do_train and (model_args.export_torch or model_args.merge_lora and pretrained.quantized):
        trained = pretrained.trained_in(folder.path)
    if model_args.merge_lora:
        with folder.replacing_merged(pretrained.adapter.folder) as staging:
            if pretrained.quantized:
                save_merged(staging, trained, args.weights_dtype())
            else:
                trainer.save_merged(staging)

    # Evaluate.
    if args.do_eval or args.do_predict:
        merge_for_decoding(trainer.model, pretrained)
    if args.do_eval:
        metrics = trainer.evaluate()
        with folder.replacing() as staging:
            write_results(staging, "eval", metrics, trainer.rows)
        results.update(metrics)

    # Predict.
    if args.do_predict:
        metrics = trainer.predict(test_dataset).metrics
        with folder.replacing() as staging:
            write_results(staging, "test", metrics, trainer.rows)
        results.update(metrics)

    if model_args.export_torch:
        export_torch(folder, trained)
    show_results(results, trainer.rows, shown_fields(pretrained.tokenizer))


def load(pretrained, args, memory):
    """Return the model with its weights, and its adapter if it has one.

    Args:
        pretrained (Pretrained): what to load. memory (MemoryEstimate): what was reported of it.
    """
    part, degree = tensor_parallel_part(args)
    with memory.running_out("while loading the model", "train" if args.do_train else "eval"):
        model = load_model(pretrained, args.weights_dtype(), degree, part)
        return add_lora(model, pretrained, args.seed) if pretrained.adapter else model


def read_datasets(tokenizer, data_args, generation, args):
    """Returns the features of train, dev and test, lists, empty where the run needs none."""
    templates = get_templates(tokenizer)

    def read(split, source, limit):
        records = read_records(source, split, split != "test", templates)[:limit]
        lengths = (data_args.src_length, generation.tgt_length, data_args.truncation)
        return build_dataset(tokenizer, records, *lengths, quiet=args.disable_tqdm)

    train_dataset, dev_dataset, test_dataset = [], [], []
    if args.do_train:
        train_dataset = read("train", data_args.task_name, data_args.max_train_samples)
    if args.do_eval:
        dev_dataset = read("dev", data_args.task_name, data_args.max_eval_samples)
    if args.do_predict and data_args.predict_file != "-":
        source = data_args.predict_file or data_args.task_name
        test_dataset = read("test", source, data_args.max_predict_samples)
    if args.do_eval or args.do_predict:
        describe_generation(tokenizer, generation, train_dataset + dev_dataset)
    return train_dataset, dev_dataset, test_dataset


def show_results(results, rows, fields):
    """Log a table of ``results``, and the ``fields`` of three rows of predictions."""
    kinds = ("loss", "rouge1", "rouge2", "rougel", "bleu4", "samples_per_second", "memory_peak_gb")
    for name, value in sorted(results.items()):
        if name.endswith(kinds) and value is not None:
            logger.eval(f"{name:24}  {value:.4g}")
    for row in rows[:3]:
        for name in fields:
            if row[name] is not None:
                logger.eval(f"{name:10}  {row[name]}")


def answer_lines(model_args, data_args, generation, args):
    """Answer each line of standard input by a line of standard output.

    That is a row of the predictions file, or an object with ``error`` alone: what is wrong with the
    line. Lines that are there already are answered in one batch.

    Args:
        model_args, data_args, generation, args: the groups that ``parse_arguments`` returns.

    Raises:
        InputError: at the end, where a line could not be answered.
    """
    with standard_output() as output:
        # Check, load.
        pretrained = find_pretrained(model_args)
        tokenizer = pretrained.tokenizer
        check_lengths(pretrained, data_args.src_length, generation, degree=1)
        data_args = choose_templates(tokenizer, data_args)
        check_target_length(tokenizer, generation.tgt_length)
        memory = estimate_memory(args, pretrained, generation, [], [])
        model = load(pretrained, args, memory)
        merge_for_decoding(model, pretrained)
        model.eval()
        set_seed(args.seed)

        # Answer.
        wrong_lines = []
        # A file of its own: a thread that waits in sys.stdin would hinder the interpreter's end.
        lines = read_lines(os.fdopen(os.dup(0), "rb"), "standard input")
        items = read_features(tokenizer, lines, data_args.src_length, data_args.truncation)
        items = itertools.islice(items, data_args.max_predict_samples)
        for batch in read_in_batches(items, args.per_device_eval_batch_size):
            features = [item for item in batch if not isinstance(item, InputError)]
            with memory.running_out("while answering", "eval"):
                rows = iter(predict_rows(model, tokenizer, features, generation))
            for item in batch:
                row = next(rows) if not isinstance(item, InputError) else {"error": printable(str(item))}
                print(dump_json(row, ensure_ascii=False), file=output)
            output.flush()
            wrong_lines += [item for item in batch if isinstance(item, InputError)]
    if wrong_lines:
        raise InputError(f"lines without an answer: {len(wrong_lines)}, the first: {wrong_lines[0]}")


def read_features(tokenizer, lines, src_length, truncation):
    """Yield the features of each of the ``lines``, or an InputError that says what is wrong with it."""
    for record in parse_each_line(lines, "standard input", False, get_templates(tokenizer)):
        try:
            if isinstance(record, InputError):
                raise record
            source_ids, _ = encode_source(tokenizer, record, src_length, truncation)
            features = build_features(tokenizer, source_ids, labels=[])
            yield {**features, "index": None, "record": record}
        except InputError as error:
            yield error


def predict_rows(model, tokenizer, features, generation):
    """Return the rows of the predictions file, list[dict], of a batch of ``features``, which may be empty."""
    if not features:
        return []
    batch = DataCollator(tokenizer.pad_token_id)(features)
    source_length = batch["source_length"]
    input_ids = paddle.to_tensor(batch["input_ids"][:, : source_length.max()])
    start, end = tokenizer.sop_token_id, tokenizer.eop_token_id
    hypotheses = beam_search(model, input_ids, source_length, generation, start, end)
    pairs = zip(features, hypotheses)
    return [prediction_row(tokenizer, item["record"], best, generation)[0] for item, best in pairs]


def main():
    """Run the script. Mistakes and faults are one line and an exit code."""
    with process_settings():
        exit_code = run()
    if exit_code:
        sys.exit(exit_code)


def run():
    """Parse the arguments and do what they say, in a process that is set up. Returns the exit code."""
    peers = None
    try:
        watch_launcher()
        groups = parse_arguments()
        model_args, data_args, _, args = groups
        use_the_whole_cpu()
        if args.world_size > 1:
            peers = Peers()
        if data_args.predict_file == "-":
            answer_lines(*groups)
        else:
            with open_run_folder(args) as folder:
                if peers:
                    peers.advice = folder.resume_hint
                with failing_together():
                    pretrained = find_pretrained(model_args)
                fine_tune(pretrained, folder, *groups)
                logger.eval(f"done: in {folder.path} are {', '.join(sorted(folder.written))}")
        if peers:
            peers.close()
        return 0
    except (InputError, Fault) as error:
        code, message = error.exit_code, str(error)
        # Under a launcher all processes find the same mistake, and one says it.
        reported = isinstance(error, Fault) or is_first_of_machine()
    except Exception as error:
        if getattr(error, "errno", None) not in UNWRITABLE:
            if peers:
                sleep_through_signals(2 * GRACE)  # if another one is gone, the watch ends this one
            raise
        code, reported = 1, True
        path = getattr(error, "filename2", None) or error.filename or "a file"
        message = (
            f"can't write {path}: {error.strerror}: make room or let it be written and start again, "
            "checkpoints and predictions written before are complete"
        )
    if not (peers or reported) and is_launched():
        # The first one says it when it has come as far, and then the launcher ends this one.
        sleep_through_signals(10 * GRACE, may_end=True)
        reported = True
    if reported:
        with contextlib.suppress(OSError):  # standard error is closed, or on a full disk
            print(error_line(message), file=sys.stderr, flush=True)
    if peers:
        peers.leave("" if reported else message)
    return code


if __name__ == "__main__":
    main()
