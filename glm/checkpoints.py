"""What stands in output_dir: written whole, marked, found again, told apart from another run's."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import paddle.distributed as dist
from paddlenlp.trainer.trainer_callback import TrainerCallback
from paddlenlp.utils.log import logger

from glm.errors import Fault, InputError
from glm.processes import LOCK, barrier, gather_objects

CHECKPOINT_DONE = ".checkpoint_done"  # a checkpoint's last file, which says what the others are
UNFINISHED = ".unfinished"  # in output_dir: where a run writes what is then moved into place
NAME_MAX = 255  # bytes of a folder's name


def write_whole(path, text):
    """Write a file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def finishing(output_dir):
    """Yield the path of an empty folder, whose files are moved to ``output_dir`` when the block ends.

    So each file of output_dir is whole, or as it was. The folder holds a copy of all_results.json,
    to which results are added. An OSError within takes the folder away. All processes have to
    enter and leave; the first one makes the folder and moves the files.
    """
    folder, first = Path(output_dir, UNFINISHED), dist.get_rank() == 0
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(Path(output_dir, "all_results.json"), folder)
    barrier()
    try:
        yield folder
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    barrier()
    if first:
        for path in folder.iterdir():
            path.replace(Path(output_dir, path.name))
        folder.rmdir()


def write_results(folder, split, metrics):
    """Write a dict of ``metrics`` as {split}_results.json, and add it to all_results.json."""
    combined = Path(folder, "all_results.json")
    results = json.loads(combined.read_text()) if combined.exists() else {}
    text = json.dumps(metrics, indent=4, sort_keys=True)
    Path(folder, f"{split}_results.json").write_text(text)
    combined.write_text(json.dumps({**results, **metrics}, indent=4, sort_keys=True))


def read_mark(checkpoint):
    """Read the last file of a checkpoint. Returns a dict, empty if an older run or another script wrote it.

    ``files``: the sizes in bytes and checksums of the other files by name. ``parameters``: what
    the model calls the weights that the optimizer's state names. ``records``: those of a step.
    """
    try:
        return json.loads(Path(checkpoint, CHECKPOINT_DONE).read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}


def _checksum(path):
    """Returns [size in bytes, BLAKE2b] of a file, or [None, None] if it can't be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
            return [file.tell(), digest.hexdigest()]
    except OSError:
        return [None, None]


def checksums(folder, names):
    """Sizes and checksums of the files ``names`` in a folder, dict of [bytes, BLAKE2b] by name.

    A file that can't be read has [None, None]. The processes of a machine share the work; all of
    them have to call it.
    """
    rank, local_size = dist.get_rank(), int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    local_rank = rank % local_size
    names = sorted(names)[local_rank::local_size]
    parts = gather_objects({name: _checksum(Path(folder, name)) for name in names})
    first = rank - local_rank  # of this machine
    result = {}
    for part in parts[first : first + local_size]:
        result.update(part)
    return result


def find_damage(checkpoint):
    """Compare a checkpoint with the sizes and checksums in its mark.

    Returns what is wrong with it on any machine, str, or None. All processes have to call it.
    """
    expected, damage = read_mark(checkpoint).get("files", {}), None
    for name, (size, digest) in checksums(checkpoint, expected).items():
        if size is None:
            damage = f"its {name} is missing"
        elif [size, digest] != expected[name]:
            damage = f"its {name} is not what was written ({size} bytes)"
    return next(filter(None, gather_objects(damage)), None)


def whole_checkpoints(folder):
    """The paths (str) of the checkpoints in ``folder`` that are written to their end, the last first."""
    times = {}
    for path in Path(folder).glob("checkpoint-*[0-9]"):
        try:
            times[str(path)] = Path(path, CHECKPOINT_DONE).stat().st_mtime
        except FileNotFoundError:
            advice = "if it is another script's, give it by --resume_from_checkpoint"
            logger.warning(f"skipping {path}, which was not written to its end; {advice}")
    # By time, not by number, for an older run that --overwrite_output_dir wrote over may have
    # come further.
    return sorted(times, key=times.get, reverse=True)


def last_whole_checkpoint(output_dir):
    """The last checkpoint in ``output_dir`` that is as it was written, on every machine, or None.

    All processes have to call it.
    """
    found = gather_objects(whole_checkpoints(output_dir))
    for path in found[0]:
        if not all(path in paths for paths in found):  # machines may have folders of their own
            continue
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning(f"skipping {path}, which is damaged: {damage}")
    return None


def where_to_resume(output_dir, overwrite):
    """What the last line of a run that ended early says, str. ``overwrite``: overwrite_output_dir."""
    checkpoint = next(iter(whole_checkpoints(output_dir)), None)
    if checkpoint is None:
        return "there is no checkpoint to resume from"
    without = " without --overwrite_output_dir" if overwrite else ""
    return f"the same command{without} goes on from {checkpoint}"


def find_last_checkpoint(args, lora):
    """The checkpoint to resume from, or None: the one that is given, or the last whole one of output_dir.

    ``lora`` (bool): whether this run trains an adapter.
    """
    if not args.do_train:
        return None
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None and not args.overwrite_output_dir:
        checkpoint = last_whole_checkpoint(args.output_dir)
    elif checkpoint is not None and (damage := find_damage(checkpoint)):
        raise InputError(f"--resume_from_checkpoint {checkpoint} is damaged: {damage}: give another one")
    if checkpoint is None:
        return None
    _check_files(checkpoint, lora)
    _check_layout(checkpoint, max(args.tensor_parallel_degree, 1))
    keep_records_a_step(args, read_mark(checkpoint).get("records"))
    logger.train(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
    return checkpoint


def _check_files(checkpoint, lora):
    """Raise InputError where a checkpoint lacks a file that this run, of an adapter or not, goes on with."""
    weights = "lora_model_state*" if lora else "model[-_]*"
    for pattern in (weights, "optimizer[-.]*", "scheduler.pdparams", "trainer_state.json"):
        if not any(Path(checkpoint).glob(pattern)):
            of = f", of one with {'' if lora else 'no '}--lora True" if pattern == weights else ""
            advice = f"give a run's checkpoint-N folder{of}"
            raise InputError(f"--resume_from_checkpoint {checkpoint} has no {pattern}: {advice}")


def _check_layout(checkpoint, degree):
    """Raise InputError where the weights of an optimizer's state can't be told apart.

    Without names in the mark they are known by those that Paddle gave them, which depend on the
    layout.
    """
    ranks = {path.name[:14] for path in Path(checkpoint).glob("optimizer.tp*")}
    saved = len(ranks) or 1
    if saved != degree and not read_mark(checkpoint):
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and no names of its "
            f"weights, and can't be resumed with {degree}: give --tensor_parallel_degree {saved}, "
            "or start anew with --overwrite_output_dir"
        )


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
    folder = args.output_dir
    if not folder:
        raise InputError(
            "--output_dir is missing: give the folder for checkpoints, the model and the results"
        )
    _check_writable("--output_dir", folder)
    if getattr(args, "logging_dir", None):
        _check_writable("--logging_dir", args.logging_dir)
    if args.do_train and not args.overwrite_output_dir and os.path.isdir(folder):
        _check_contents(folder, checkpoint)


def _check_writable(flag, folder):
    """Raise InputError where ``folder`` can't be made, or can't be written to."""
    if max(map(len, os.fsencode(folder).split(b"/"))) > NAME_MAX:
        raise InputError(f"{flag} is longer than a folder's name may be: give a shorter one")
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise InputError(f"{flag} {folder}: {existing} is not a folder: give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {existing} can't be written to: give another one")


# What a run leaves in output_dir, and what its launcher does.
TRACES = ("checkpoint-*", "runs/*", "*_results.json", "*_predictions.jsonl*", "workerlog.*", "*/workerlog.*")


def _check_contents(folder, checkpoint):
    """Raise InputError where ``folder`` holds a model that is not gone on with, or nothing of a run."""
    names = [name for name in os.listdir(folder) if name != LOCK]
    if UNFINISHED in names:  # a run of this folder was killed while it saved
        return
    if any(name.endswith("model_state.pdparams") for name in names) and checkpoint is None:
        raise InputError(
            f"--output_dir {folder} holds a model and no checkpoint to resume from: "
            "give another folder, or --overwrite_output_dir"
        )
    of_a_run = any(True for pattern in TRACES for _ in Path(folder).glob(pattern))
    of_a_run = of_a_run or any(is_own_output(os.path.join(folder, name)) for name in names)
    if names and not of_a_run:
        raise InputError(
            f"--output_dir {folder} holds {names[0]} and nothing of a run: "
            "give a folder of its own, or --overwrite_output_dir"
        )


class WholeCheckpoints(TrainerCallback):
    """Gives a checkpoint a last file that says that all others are whole, and then removes old ones.

    PaddleNLP removes old ones before the new one is whole, and on a single process none at all.

    Args: limit (int): save_total_limit, or None.
    """

    def __init__(self, limit):
        self.limit = limit
        self.folder = None  # the checkpoint that is being written

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            # As the Trainer calls it.
            self.folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, CHECKPOINT_DONE))

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        first = args.local_rank in (-1, 0)
        if first:
            self._make_state_readable()
        barrier()  # all have written theirs
        mark = {
            "files": checksums(self.folder, {*os.listdir(self.folder)} - {CHECKPOINT_DONE}),
            "parameters": {weight.name: name for name, weight in model.state_dict().items()},
            "records": args.records_a_step,
        }
        if first:
            write_whole(os.path.join(self.folder, CHECKPOINT_DONE), json.dumps(mark))
            self._remove_old_ones(args.output_dir, state.best_model_checkpoint)
        barrier()  # who says where to go on has to find the mark
        self.folder = None

    def _make_state_readable(self):
        """Take out of the trainer's state what PaddleNLP 3 adds, neither needs, and PaddleNLP 2 refuses."""
        path = Path(self.folder, "trainer_state.json")
        state = json.loads(path.read_text(encoding="utf-8"))
        if state.pop("consumed_samples", None) is not None:
            path.write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")

    def _remove_old_ones(self, output_dir, best):
        checkpoints = [str(path) for path in Path(output_dir).glob("checkpoint-*[0-9]")]
        kept = {str(Path(self.folder)), str(Path(best or self.folder))}
        old = sorted((path for path in checkpoints if path not in kept), key=os.path.getmtime)
        count = len(checkpoints) - max(self.limit or len(checkpoints), len(kept))
        for path in old[: max(count, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def failing_as_fault(self, args, control):
        """Make of an OSError in writing a checkpoint a Fault, and remove what was written of it."""
        try:
            yield
        except OSError as error:
            if self.folder is None or control.should_evaluate:  # it was not the checkpoint that failed
                raise
            shutil.rmtree(self.folder, ignore_errors=True)
            resume = where_to_resume(args.output_dir, args.overwrite_output_dir)
            reason = error.strerror or error
            raise Fault(f"{self.folder} can't be written: {reason}; {resume}") from error
