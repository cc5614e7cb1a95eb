"""What stands in output_dir: written whole, marked, found again, told apart from another run's."""

import contextlib
import glob
import hashlib
import json
import os
import shutil

import paddle.distributed as dist
from paddlenlp.trainer.trainer_callback import TrainerCallback
from paddlenlp.utils.log import logger

from glm.errors import InputError
from glm.processes import LOCK, of_all

CHECKPOINT_DONE = (
    ".checkpoint_done"  # the last file of a checkpoint to be written, which says what the others are
)
UNFINISHED = (
    ".unfinished"  # the folder in which a run writes what it leaves behind, before it stands in output_dir
)
NAME_MAX = 255  # bytes of a folder's name


def write_whole(path, text):
    """Write a file whole or not at all."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def read_mark(checkpoint):
    """What the last file of a checkpoint says, dict: the other ``files`` by name, each with its size in bytes and its
    checksum; ``parameters``, what the model calls those that the optimizer's state names; ``records`` of a step. Empty
    where an older run or another script wrote it.
    """
    try:
        with open(os.path.join(checkpoint, CHECKPOINT_DONE), encoding="utf-8") as file:
            return json.loads(file.read() or "{}")
    except (OSError, ValueError):
        return {}


def checksums(folder, names):
    """Sizes and checksums of files, {name: [bytes, BLAKE2b]}, or [None, None] of one that can't be read.

    The processes of a node share the work. All of them have to call it, and each is given the whole.
    """
    processes, found = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)), {}
    for name in sorted(names)[dist.get_rank() % processes :: processes]:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(os.path.join(folder, name), "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
                found[name] = [file.tell(), digest.hexdigest()]
        except OSError:
            found[name] = [None, None]
    first = dist.get_rank() // processes * processes
    return {name: value for part in of_all(found)[first : first + processes] for name, value in part.items()}


def find_damage(checkpoint):
    """What is wrong with a checkpoint, by the sizes and checksums in its mark, str, or None.

    All processes have to call it, for what one of them finds counts for all.
    """
    expected, damage = read_mark(checkpoint).get("files", {}), None
    for name, (size, digest) in checksums(checkpoint, expected).items():
        if [size, digest] != expected[name]:
            damage = f"its {name} is " + (
                "missing" if size is None else f"not what was written ({size} bytes)"
            )
    return next(filter(None, of_all(damage)), None)


def whole_checkpoints(folder):
    """The paths of the checkpoints in ``folder`` that were written to their end, the last one first."""
    whole = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*[0-9]")):
        try:
            whole[path] = os.path.getmtime(os.path.join(path, CHECKPOINT_DONE))
        except FileNotFoundError:
            advice = "if it is another script's, give it by --resume_from_checkpoint"
            logger.warning(f"skipping {path}, which was not written to its end; {advice}")
    # By time, not by number, for an older run that --overwrite_output_dir wrote over may have come further.
    return sorted(whole, key=whole.get, reverse=True)


def last_whole_checkpoint(args):
    """The checkpoint of the output folder that was last written to its end and is as it was then, or None.

    All processes have to call it.
    """
    first, *others = of_all(whole_checkpoints(args.output_dir))
    for path in first:
        if not all(path in other for other in others):  # machines may have folders of their own
            continue
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning(f"skipping {path}, which is damaged: {damage}")
    return None


def where_to_resume(args):
    """What the last line of a run that ended early says, str."""
    checkpoint = next(iter(whole_checkpoints(args.output_dir)), None)
    if checkpoint is None:
        return "there is no checkpoint to resume from"
    without = " without --overwrite_output_dir" if args.overwrite_output_dir else ""
    return f"the same command{without} goes on from {checkpoint}"


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
        raise InputError(
            "--output_dir is missing: give the folder for checkpoints, the model and the results"
        )
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
    traces = (
        "checkpoint-*",
        "runs/*",
        "*_results.json",
        "*_predictions.jsonl*",
        "workerlog.*",
        "*/workerlog.*",
    )
    found = [
        path for pattern in traces for path in glob.glob(os.path.join(glob.escape(args.output_dir), pattern))
    ]
    if names and not found and not any(is_own_output(os.path.join(args.output_dir, name)) for name in names):
        raise InputError(
            f"--output_dir {args.output_dir} holds {names[0]} and nothing of a run: "
            "give a folder of its own, or --overwrite_output_dir"
        )


class WholeCheckpoints(TrainerCallback):
    """A checkpoint gets a last file that says that all the others are whole; old ones go when the new one has it.

    PaddleNLP removes old ones before the new one is whole, and on a single process none at all.
    """

    def __init__(self, limit):
        self.limit = limit  # save_total_limit
        self.folder = None  # the checkpoint that is being written

    def on_train_begin(self, args, state, control, **kwargs):
        args.load_best_model_at_end = (
            False  # GLMTrainer.train does, from a checkpoint of any precision and layout
        )

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.folder = os.path.join(
                args.output_dir, f"checkpoint-{state.global_step}"
            )  # as the Trainer calls it
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, CHECKPOINT_DONE))

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        first = args.local_rank in (-1, 0)
        if first:
            self.make_state_readable()
        if args.world_size > 1:
            dist.barrier()  # all have written theirs
        mark = {
            "files": checksums(self.folder, {*os.listdir(self.folder)} - {CHECKPOINT_DONE}),
            "parameters": {weight.name: name for name, weight in model.state_dict().items()},
            "records": args.records_a_step,
        }
        if first:
            write_whole(os.path.join(self.folder, CHECKPOINT_DONE), json.dumps(mark))
            self.remove_old_ones(args, state)
        if args.world_size > 1:
            dist.barrier()  # who says where to go on has to find the mark
        self.folder = None

    def make_state_readable(self):
        """Take out of the trainer's state what PaddleNLP 3 adds and PaddleNLP 2 refuses; neither needs it here."""
        path = os.path.join(self.folder, "trainer_state.json")
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        if state.pop("consumed_samples", None) is not None:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(state, file, indent=2, sort_keys=True)

    def remove_old_ones(self, args, state):
        checkpoints = glob.glob(os.path.join(glob.escape(args.output_dir), "checkpoint-*[0-9]"))
        kept = {self.folder, state.best_model_checkpoint or self.folder}
        old = sorted((path for path in checkpoints if path not in kept), key=os.path.getmtime)
        count = len(checkpoints) - max(self.limit or len(checkpoints), len(kept))
        for path in old[: max(count, 0)]:
            shutil.rmtree(path, ignore_errors=True)
