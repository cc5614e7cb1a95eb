"""Fine-tune GLM for question generation: train, evaluate by beam search, predict.

python finetune_generation.py --help, or with one JSON file of the same arguments: see README.md.
"""

import contextlib
import errno
import itertools
import os
import sys

import paddle

try:
    from paddlenlp.trainer import set_seed
except OSError as error:  # it makes a folder for downloads at its import
    if __name__ != "__main__":
        raise
    print(
        f"finetune_generation.py: error: {error.filename} can't be made ({error.strerror}), which PaddleNLP "
        "wants: set PPNLP_HOME to a folder that can be written to",
        file=sys.stderr,
    )
    sys.exit(2)
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
from glm.outputs.layout import TRAINER_STATE
from glm.outputs.results import write_results
from glm.processes import is_first_of_machine, tensor_parallel_part
from glm.records import parse_each_line, read_in_batches, read_lines, read_records
from glm.training.memory import estimate_memory
from glm.watchdog import Peers, watch_launcher
from glm.weights.adapters import add_lora
from glm.weights.loading import LORA_WEIGHTS, load_model
from glm.weights.pretrained import check_lengths, find_pretrained
from glm.weights.torch_folder import export_torch
from utils import GLMTrainer, prediction_row

# What the system says where nothing more can be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def run(model_args, data_args, generation, args, folder=None, output=None):
    """Check, read, load, train, evaluate, predict; or answer standard input.

    Args:
        model_args, data_args, generation, args: the groups that ``parse_arguments`` returns.
        folder (RunFolder): output_dir; None where standard input is answered.
        output: the text stream that the answers to standard input go to, or None.
    """
    # Everything that can be wrong is read and checked before the weights are.
    part, degree = tensor_parallel_part(args)
    pretrained = find_pretrained(model_args)
    adapter, tokenizer = pretrained.adapter, pretrained.tokenizer
    check_lengths(pretrained, data_args.src_length, generation, degree)
    check_target_length(tokenizer, generation.tgt_length)
    checkpoint = None
    if folder:
        checkpoint = folder.find_checkpoint(adapter is not None)
        folder.check_contents(checkpoint)
        writes_model = args.do_train or model_args.merge_lora
        adapter_base = pretrained.base if adapter and writes_model else None
        folder.check_other_models(None if writes_model else pretrained.name, adapter_base)
    datasets = read_datasets(tokenizer, data_args, generation, args)
    train_dataset, dev_dataset, test_dataset = datasets
    if args.do_train:
        groups = (model_args, data_args, generation, args)
        records = [feature["record"] for feature in train_dataset]
        folder.prepare_run(groups, pretrained, records, checkpoint)
    generated = dev_dataset + test_dataset
    memory = estimate_memory(args, pretrained, generation, train_dataset, generated)

    if not (args.do_train or args.do_eval or args.do_predict or model_args.merge_lora):
        export_torch(args.output_dir, pretrained)
        logger.eval(f"done: in {args.output_dir} is torch")
        return
    with memory.running_out("while loading the model", "train" if args.do_train else "eval"):
        model = load_model(pretrained, args.weights_dtype(), degree, part)
        if adapter:
            model = add_lora(model, pretrained, args.seed)
    if output:
        set_seed(args.seed)
        batch_size = args.per_device_eval_batch_size
        with memory.running_out("while answering", "eval"):
            answer_lines(model, tokenizer, data_args, generation, batch_size, output)
        return
    trainer = GLMTrainer(
        model=model,
        args=args,
        data_collator=DataCollator(tokenizer.pad_token_id),
        train_dataset=train_dataset or None,
        eval_dataset=dev_dataset or None,
        tokenizer=tokenizer,
        generation=generation,
        memory=memory,
        folder=folder,
    )
    merge = model_args.merge_lora
    results = train_and_evaluate(trainer, checkpoint, merge, adapter and adapter.folder, test_dataset)
    if model_args.export_torch:
        trained = pretrained.trained_in(args.output_dir) if args.do_train else pretrained
        export_torch(args.output_dir, trained)
    show_results(results, trainer.rows)
    names = written_files(model_args, args, adapter)
    logger.eval(f"done: in {args.output_dir} are {', '.join(names)}")


def read_datasets(tokenizer, data_args, generation, args):
    """Returns the features of train, dev and test, lists, empty where the run needs none."""

    def read(split, source, limit):
        records = read_records(source, split, require_question=split != "test")[:limit]
        lengths = (data_args.src_length, generation.tgt_length)
        return build_dataset(tokenizer, records, *lengths, quiet=args.disable_tqdm)

    train_dataset, dev_dataset, test_dataset = [], [], []
    if args.do_train:
        train_dataset = read("train", data_args.task_name, data_args.max_train_samples)
        check_accumulation(args, len(train_dataset))
    if args.do_eval:
        dev_dataset = read("dev", data_args.task_name, data_args.max_eval_samples)
    if args.do_predict and data_args.predict_file != "-":
        source = data_args.predict_file or data_args.task_name
        test_dataset = read("test", source, data_args.max_predict_samples)
    if args.do_eval or args.do_predict:
        describe_generation(tokenizer, generation, train_dataset + dev_dataset)
    return train_dataset, dev_dataset, test_dataset


def train_and_evaluate(trainer, checkpoint, merge_lora, adapter, test_dataset):
    """Do what the arguments say, in this order, and write it. Returns the metrics, a dict.

    ``adapter``: the folder of the adapter that the run begins with, or None.
    """
    args, folder, results = trainer.args, trainer.folder, {}
    if args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        with folder.replacing_model(trainer.weights_step or trainer.state.global_step) as staging:
            trainer.save_model(str(staging), merge_tensor_parallel=args.tensor_parallel_degree > 1)
            write_results(staging, "train", metrics)
            if trainer.is_world_process_zero():
                trainer.state.save_to_json(staging / TRAINER_STATE)
        results.update(metrics)
        trainer.stop_by_signal.stop_when_written(args)
    if merge_lora:
        with folder.replacing_merged(adapter) as staging:
            trainer.save_merged(str(staging))
    if args.do_eval:
        metrics = trainer.evaluate()
        with folder.replacing() as staging:
            write_results(staging, "eval", metrics, trainer.rows)
        results.update(metrics)
    if args.do_predict:
        metrics = trainer.predict(test_dataset).metrics
        with folder.replacing() as staging:
            write_results(staging, "test", metrics, trainer.rows)
        results.update(metrics)
    return results


def show_results(results, rows):
    """Log a table of ``results``, and three predictions beside their references."""
    kinds = ("loss", "rouge1", "rouge2", "rougel", "bleu4", "samples_per_second", "memory_peak_gb")
    for name, value in sorted(results.items()):
        if name.endswith(kinds) and value is not None:
            logger.eval(f"{name:24}  {value:.4g}")
    for row in rows[:3]:
        logger.eval(f"answer      {row['answer']}")
        logger.eval(f"prediction  {row['prediction']}")
        if row["reference"] is not None:
            logger.eval(f"reference   {row['reference']}")


def written_files(model_args, args, adapter):
    """Returns the names of the results and the model that a run of these arguments writes."""
    names = []
    if args.do_eval:
        names += ["eval_results.json", "eval_predictions.jsonl"]
    if args.do_predict:
        names += ["test_results.json", "test_predictions.jsonl"]
    if args.do_train:
        names.append(LORA_WEIGHTS if adapter else "model_state.pdparams")
    if model_args.merge_lora:
        names.append("model_state.pdparams")
    if model_args.export_torch:
        names.append("torch")
    return names


def answer_lines(model, tokenizer, data_args, generation, batch_size, output):
    """Answer the lines of standard input by JSON lines in the text stream ``output``.

    Lines that are there already are answered in one batch. Each gets a line: the row of a predictions
    file, or an object with ``error`` alone, what is wrong with the line.

    Raises:
        InputError: at the end, where a line could not be answered.
    """

    def read_features(lines):
        for record in parse_each_line(lines, "standard input", require_question=False):
            try:
                if isinstance(record, InputError):
                    raise record
                if record["answer"] is None:
                    raise InputError(f"{record['where']}: the question has no answer: give one")
                source_ids, _ = encode_source(tokenizer, record, data_args.src_length)
            except InputError as error:
                yield error
                continue
            features = build_features(tokenizer, source_ids, labels=[])
            yield {**features, "index": None, "record": record}

    model.eval()
    collate = DataCollator(tokenizer.pad_token_id)
    candidates = generation.num_return_sequences > 1
    start, end = tokenizer.sop_token_id, tokenizer.eop_token_id
    mistakes, first_mistake = 0, None
    # A file of its own: a thread that waits in sys.stdin would hinder the interpreter's end.
    lines = read_lines(os.fdopen(os.dup(0), "rb"), "standard input")
    items = itertools.islice(read_features(lines), data_args.max_predict_samples)
    for batch in read_in_batches(items, batch_size):
        features = [item for item in batch if not isinstance(item, InputError)]
        hypotheses = iter(())
        if features:
            arrays = collate(features)
            source_length = arrays["source_length"]
            input_ids = paddle.to_tensor(arrays["input_ids"][:, : source_length.max()])
            hypotheses = iter(beam_search(model, input_ids, source_length, generation, start, end))
        for item in batch:
            if isinstance(item, InputError):
                mistakes, first_mistake = mistakes + 1, first_mistake or item
                row = {"error": printable(str(item))}
            else:
                row, _ = prediction_row(tokenizer, item["record"], next(hypotheses), candidates)
            print(dump_json(row, ensure_ascii=False), file=output)
        output.flush()
    if mistakes:
        raise InputError(f"lines without an answer: {mistakes}, the first: {first_mistake}")


def main():
    """Run the script. Mistakes and faults are one line and an exit code."""
    with process_settings():
        code = run_to_the_end()
    if code:
        sys.exit(code)


def run_to_the_end():
    """Run the script in a process that is set up. Returns its exit code."""

    def advice():
        return folder.resume_hint() if folder else "the same command starts again"

    peers = folder = None
    try:
        watch_launcher()
        model_args, data_args, generation, args = parse_arguments()
        use_the_whole_cpu()
        if args.world_size > 1:
            peers = Peers(advice)
        pipe = data_args.predict_file == "-"
        opened = contextlib.nullcontext() if pipe else open_run_folder(args)
        with standard_output(pipe) as output, opened as folder:
            run(model_args, data_args, generation, args, folder, output)
        if peers:
            peers.close()
        return 0
    except (InputError, Fault) as error:
        code, message = error.exit_code, str(error)
        # Under a launcher all processes find the same mistake, and one says it.
        reported = isinstance(error, Fault) or is_first_of_machine()
    except Exception as error:
        if getattr(error, "errno", None) not in NO_ROOM:
            if peers:
                peers.wait_to_be_ended()
            raise
        code, reported = 1, True
        message = (
            f"can't write {error.filename or 'a file'}: {error.strerror}: give it room and "
            "start again, checkpoints and predictions written before are complete"
        )
    if reported:
        with contextlib.suppress(OSError):  # standard error is closed, or on a full disk
            print(error_line(message), file=sys.stderr, flush=True)
    if peers:
        peers.leave()
    return code


if __name__ == "__main__":
    main()
