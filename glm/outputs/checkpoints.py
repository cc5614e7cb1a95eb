"""The checkpoints in output_dir: written whole, marked, found again in their order, removed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import paddle.distributed as dist
from paddlenlp.trainer.trainer_callback import TrainerCallback
from paddlenlp.utils.log import logger

from glm.errors import Fault, InputError
from glm.outputs.folder import RUN, read_json, write_whole
from glm.outputs.runs import compare_runs, is_of_run, new_run
from glm.processes import barrier, gather_objects

CHECKPOINT_DONE = ".checkpoint_done"  # a checkpoint's last file, which says what the others are


def read_mark(checkpoint):
    """Read the last file of a checkpoint. Returns a dict of those that the run that wrote it knew:

    ``files``: the sizes in bytes and checksums of the other files by name.
    ``parameters``: what the model calls the weights that the optimizer's state names.
    ``records``: those of a step. ``run``: what describe_run says of the run.
    ``evaluations_without_better``: in a row, for early stopping. And, always, ``step``:
    that of the checkpoint, or None.
    """
    number = re.search(r"\d+$", Path(checkpoint).name)
    mark = read_json(Path(checkpoint, CHECKPOINT_DONE))
    return {"step": int(number[0]) if number else None, **mark}


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

    A file that can't be read has [None, None]. The processes of a machine share the work;
    all of them have to call it.
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

    Returns what is wrong with it on any machine, str, or None. All processes have to call
    it.
    """
    expected, damage = read_mark(checkpoint).get("files", {}), None
    for name, (size, digest) in checksums(checkpoint, expected).items():
        if size is None:
            damage = f"its {name} is missing"
        elif [size, digest] != expected[name]:
            damage = f"its {name} is not what was written ({size} bytes)"
    return next(filter(None, gather_objects(damage)), None)


def whole_checkpoints(folder, tell=False):
    """The checkpoints of the folder's own run that are written to their end, the last step first.

    Args: tell (bool): whether to say which others there are.

    Returns: list of their paths, str.
    """
    run, steps, others = read_json(Path(folder, RUN)), {}, []
    advice = "give it by --resume_from_checkpoint"
    for path in sorted(Path(folder).glob("checkpoint-*[0-9]")):
        mark = read_mark(path)
        if not Path(path, CHECKPOINT_DONE).exists():
            if tell:
                reason = f"which was not written to its end; if it is another script's, {advice}"
                logger.warning(f"skipping {path}, {reason}")
        elif is_of_run(mark, run):
            steps[str(path)] = mark["step"]
        else:
            others.append(path.name)
    if others and tell:
        others = ", ".join(others)
        logger.train(f"another run wrote {others} in {folder}: to go on from one of them, {advice}")
    return sorted(steps, key=steps.get, reverse=True)


def last_whole_checkpoint(output_dir):
    """The last checkpoint in ``output_dir`` that is as it was written, on every machine, or None.

    All processes have to call it.
    """
    found = gather_objects(whole_checkpoints(output_dir, tell=True))
    for path in found[0]:
        if not all(path in paths for paths in found):  # machines may have folders of their own
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
    flags = [
        f"--{name}" for name in ("overwrite_output_dir", "resume_from_checkpoint") if getattr(args, name)
    ]
    without = f" without {' and '.join(flags)}" if flags else ""
    return f"the same command{without} goes on from {checkpoint}"


def find_last_checkpoint(args, lora):
    """The checkpoint to resume from, given or the last whole one of output_dir, or None.

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
    keep_global_batch_size(args, read_mark(checkpoint).get("records"))
    logger.train(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
    return checkpoint


def _check_files(checkpoint, lora):
    """Raise InputError where a checkpoint lacks a file that the run goes on with."""
    weights = "lora_model_state*" if lora else "model[-_]*"
    for pattern in (weights, "optimizer[-.]*", "scheduler.pdparams", "trainer_state.json"):
        if not any(Path(checkpoint).glob(pattern)):
            of = f", of one with {'' if lora else 'no '}--lora True" if pattern == weights else ""
            advice = f"give a run's checkpoint-N folder{of}"
            raise InputError(f"--resume_from_checkpoint {checkpoint} has no {pattern}: {advice}")


def _check_layout(checkpoint, degree):
    """Raise InputError where the weights of an optimizer's state can't be told apart.

    Without names in the mark they are known by those that Paddle gave them, which depend
    on the layout.
    """
    ranks = {path.name[:14] for path in Path(checkpoint).glob("optimizer.tp*")}
    saved = len(ranks) or 1
    if saved != degree and "parameters" not in read_mark(checkpoint):
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and no names of its "
            f"weights, and can't be resumed with {degree}: give --tensor_parallel_degree {saved}, "
            "or start anew with --overwrite_output_dir"
        )


def keep_global_batch_size(args, records):
    """Let each update be of as many ``records`` as before, int, or None where that is not known.

    With others the order of the data would be another.
    """
    now = args.global_batch_size
    if records in (None, now):
        return
    passes = now // args.gradient_accumulation_steps
    if records % passes:
        logger.warning(
            f"the checkpoint's steps are of {records} records and this run's of {now}: "
            "the order of the data, the schedule and the number of steps become this run's"
        )
        return
    args.gradient_accumulation_steps = records // passes
    logger.train(
        f"the checkpoint's steps are of {records} records: this run takes gradient_accumulation_steps "
        f"{args.gradient_accumulation_steps} for as many"
    )


def begin_run(args, run, checkpoint):
    """Give ``run``, of describe_run, the ``id`` and the ``parent`` that runs.py tells of.

    ``checkpoint`` is the one to resume from, or None. Raises InputError where going on
    with it makes no sense. All processes have to call it.
    """
    run.update(gather_objects(new_run())[0])
    if checkpoint is None or args.ignore_load_lr_and_optim:  # its steps begin at 0
        return
    mark, given = read_mark(checkpoint), args.resume_from_checkpoint is not None
    before, folder = mark.get("run", {}), read_json(Path(args.output_dir, RUN))
    if "settings" in before:
        compare_runs(checkpoint, mark, run, given)
        run["base"], run["weights"] = before["base"], before["weights"]
    if given and whole_checkpoints(args.output_dir)[:1] != [str(Path(checkpoint))]:
        run["parent"] = [before.get("id"), mark["step"]]
    elif folder or before:
        run["id"], run["parent"] = (folder or before)["id"], (folder or before)["parent"]
    else:
        run["parent"] = [None, mark["step"]]


class WholeCheckpoints(TrainerCallback):
    """Gives a checkpoint a last file that says that all others are whole, and then removes old ones.

    PaddleNLP removes old ones before the new one is whole, and on a single process none
    at all.

    Args:
        limit (int): save_total_limit, or None.
        run (dict): as begin_run leaves it.
        early_stopping (EarlyStopping): the callback whose count a checkpoint keeps, or
            None.
    """

    def __init__(self, limit, run, early_stopping=None):
        self.limit, self.run, self.early_stopping = limit, run, early_stopping
        self.folder = None  # the checkpoint that is being written
        self.resumed = None  # the one that the run goes on from

    def on_train_begin(self, args, state, control, **kwargs):
        """Make output_dir this run's before anything else is written there."""
        if state.best_model_checkpoint:
            state.best_model_checkpoint = self.find_best(state.best_model_checkpoint, args.output_dir)
        if args.local_rank in (-1, 0):
            path, text = Path(args.output_dir, RUN), dict(self.run)
            there = read_json(path)
            if there.get("id") == text["id"] and "model" in there:  # a model of this run, before
                text["model"] = there["model"]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(text))
        barrier()
        args.training_began = True

    def find_best(self, recorded, output_dir):
        """The path of the best checkpoint, str, which the run ``recorded``; None where it is gone.

        A folder may have been moved since: it is looked for beside the checkpoint that
        the run goes on from, then in output_dir, then where it was. All processes
        have to call it.
        """
        name = Path(recorded).name
        folders = [Path(self.resumed).parent] if self.resumed else []
        for path in [*(folder / name for folder in folders), Path(output_dir, name), Path(recorded)]:
            whole = Path(path, CHECKPOINT_DONE).exists() and is_of_run(read_mark(path), self.run)
            if all(gather_objects(whole)) and find_damage(path) is None:
                return str(path)
        advice = "the best from here on, or the last weights, take its place"
        logger.warning(f"the best checkpoint, {recorded}, is gone or damaged: {advice}")
        return None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            # As the Trainer calls it. One of another run, or of another kind, goes.
            self.folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            if args.local_rank in (-1, 0) and os.path.isdir(self.folder):
                Path(self.folder, CHECKPOINT_DONE).unlink(missing_ok=True)
                shutil.rmtree(self.folder)
            barrier()

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        first = args.local_rank in (-1, 0)
        if first:
            self._make_state_readable()
        barrier()  # all have written theirs
        mark = {
            "files": checksums(self.folder, {*os.listdir(self.folder)} - {CHECKPOINT_DONE}),
            "parameters": {weight.name: name for name, weight in model.state_dict().items()},
            "records": args.global_batch_size,
            "step": state.global_step,
            "run": self.run,
        }
        if self.early_stopping:
            mark["evaluations_without_better"] = self.early_stopping.early_stopping_patience_counter
        if first:
            write_whole(Path(self.folder, CHECKPOINT_DONE), json.dumps(mark))
            self._remove_old_ones(args.output_dir, state.best_model_checkpoint)
        barrier()  # who says where to go on has to find the mark
        self.folder = None

    def _make_state_readable(self):
        """Take out of the trainer's state what PaddleNLP 3 adds and PaddleNLP 2 refuses."""
        path = Path(self.folder, "trainer_state.json")
        state = json.loads(path.read_text(encoding="utf-8"))
        if state.pop("consumed_samples", None) is not None:
            path.write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")

    def _remove_old_ones(self, output_dir, best):
        """Remove what is over the limit: torn ones and another run's first, then by step."""
        checkpoints = list(Path(output_dir).glob("checkpoint-*[0-9]"))
        kept = {Path(self.folder), Path(best or self.folder)}

        def age(path):
            mark = read_mark(path)
            whole = Path(path, CHECKPOINT_DONE).exists()
            return whole and is_of_run(mark, self.run), mark["step"]

        old = sorted((path for path in checkpoints if path not in kept), key=age)
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
            # Nor did it where a process is gone that this one waited for. Paddle's errors
            # have no number.
            collective = args.world_size > 1 and error.errno is None
            if collective or isinstance(error, ConnectionError):
                raise
            shutil.rmtree(self.folder, ignore_errors=True)
            reason = error.strerror or error
            raise Fault(f"{self.folder} can't be written: {reason}; {where_to_resume(args)}") from error
