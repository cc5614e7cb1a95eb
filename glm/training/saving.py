"""Checkpoints of a run: written completely, given their manifest, the best kept, old ones removed."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Callable, Optional

from paddlenlp.trainer.trainer_callback import TrainerCallback, TrainerState
from paddlenlp.trainer.trainer_utils import IntervalStrategy
from paddlenlp.utils.log import logger

from glm.errors import Fault
from glm.files import dump_json, open_regular, write_atomically
from glm.outputs.checkpoints import (
    Checkpoint,
    checkpoint_paths,
    compute_checksums,
    list_files,
    open_checkpoint,
)
from glm.outputs.folder import RunFolder
from glm.outputs.layout import CHECKPOINT, INCOMPLETE, MANIFEST, TRAINER_STATE
from glm.processes import barrier

LARGEST = 1e300  # as a state's best_metric may be


class SaveCheckpoints(TrainerCallback):
    """Give a checkpoint a last file, the manifest, that says what the others are; then remove old ones.

    PaddleNLP removes old ones before the new one is complete, and on a single process none at all.

    Args:
        folder: output_dir.
        limit: save_total_limit.
        describe: returns what a manifest says of the run's progress.
    """

    def __init__(self, folder: RunFolder, limit: Optional[int] = None, describe: Callable[[], dict] = dict):
        self.folder, self.limit = folder, limit
        self.describe, self.resumed_state = describe, None
        self.saving = None  # the path of the checkpoint that is being written
        self.saved_step = None  # of the last one that this run has written

    def on_train_begin(self, args, state, control, **kwargs):
        self.folder.begin_run()
        if self.resumed_state:  # the Trainer has read it again
            for name in ("best_metric", "best_model_checkpoint", "log_history"):
                setattr(state, name, getattr(self.resumed_state, name))

    def settle_best(self, args, state: TrainerState, checkpoint: Checkpoint, measures: dict) -> bool:
        """Find the best checkpoint up to the one that a run goes on from. All processes have to call it.

        A best belongs to its metric and direction. By another one it is the best of those that were
        evaluated before and are still there. It also belongs to what it was measured on: of evaluations
        of other records, or by other rules, none is comparable, and the best begins anew.

        Args:
            state: of the ``checkpoint``; on_train_begin lets the Trainer's have what is found.
            measures: of this run, as a Checkpoint has them; none where it does not evaluate.

        Returns:
            whether it is by the same metric and measure as before.
        """
        self.resumed_state = state
        metric, recorded = best_of(args), state.best_model_checkpoint
        kind = "loss" if metric and metric[0] == "loss" else "text"
        measure, before = measures.get(kind), checkpoint.measures.get(kind)  # None: not known
        comparable = measure == before or None in (measure, before)
        if not metric or recorded and comparable and _is_best_of(metric, state, checkpoint):
            best = recorded and self.folder.find_best(recorded)
            state.best_model_checkpoint = best and str(best)
            return True
        name, best = f"eval_{metric[0]}", None
        rows = [row for row in state.log_history if comparable and _is_number(row.get(name))]
        state.best_metric = state.best_model_checkpoint = None
        for row in sorted(rows, key=lambda row: row[name], reverse=metric[1]):
            path = checkpoint.path.parent / f"checkpoint-{row.get('step')}"
            best = CHECKPOINT.fullmatch(path.name) and self.folder.find_best(path, expected=False)
            if best:
                state.best_metric, state.best_model_checkpoint = row[name], str(best)
                break
        if recorded:
            now = f"the {'most' if metric[1] else 'least'} {metric[0]}: {best or 'none of those before'}"
            other = "by another metric" if comparable else "on other records or by other rules of evaluation"
            logger.train(f"the best checkpoint was chosen {other}, and is now chosen by {now}")
        return not recorded

    def compare_with_best(self, args, state, metrics: dict, path: Path):
        """Let the checkpoint at ``path`` be the best of ``state``, if by its ``metrics`` it is.

        The Trainer does so with what it evaluates in its own loop alone.
        """
        name, best = args.metric_for_best_model, state.best_metric
        if not name:
            return
        value = metrics[name if name.startswith("eval_") else f"eval_{name}"]
        better = best is None or state.best_model_checkpoint is None
        if better or (value > best if args.greater_is_better else value < best):
            state.best_metric = value
            # One spelling of this folder, by which what is kept is known.
            here = self.folder.path if self.folder.is_same(path.parent) else path.parent
            state.best_model_checkpoint = str(here / path.name)

    def _is_mine(self, path):
        """Return whether this run wrote, or began to write, the checkpoint at ``path``."""
        with contextlib.suppress(OSError, ValueError):
            if not path.is_symlink() and path.is_dir():
                if os.path.lexists(path / INCOMPLETE):
                    with open_regular(path / INCOMPLETE) as file:
                        if file.read(99).decode() == self.folder.new_run.id:
                            return True
                return self.folder.new_run.id == open_checkpoint(path).run.id
        return False

    def on_step_end(self, args, state, control, **kwargs):
        if not control.should_save:
            return
        if self.saved_step == state.global_step:  # and now its evaluation was cancelled
            control.should_save = False
            return
        # As the Trainer calls it.
        path = self.saving = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save:
            if self._is_mine(path):
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)
            elif path.is_symlink() or path.exists():
                self.folder.move_aside([path])
            path.mkdir()
            (path / INCOMPLETE).write_text(self.folder.new_run.id)
        barrier()

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        path = self.saving
        if args.should_save:
            make_state_readable(path / TRAINER_STATE)
        barrier()  # all have written theirs
        run = self.folder.new_run
        manifest = {
            "files": compute_checksums(path, list_files(path)),
            "parameters": {weight.name: name for name, weight in model.state_dict().items()},
            "records": args.global_batch_size,
            "step": state.global_step,
            "run": {"id": run.id, "parent": run.parent, **self.folder.described},
            **self.describe(),
        }
        if _is_evaluation_due(args, state):
            manifest["evaluation_is_due"] = True
        best = Path(state.best_model_checkpoint or path)
        if best != path:
            with contextlib.suppress(OSError, ValueError):
                manifest["best_run"] = open_checkpoint(best).run.id
        if args.should_save:
            write_atomically(path / MANIFEST, dump_json(manifest))
            (path / INCOMPLETE).unlink()
            self._remove_old_ones(best)
        barrier()  # who says where to go on has to find the manifest
        self.saving, self.saved_step = None, state.global_step

    def _remove_old_ones(self, best):
        """Remove those of this run that are over the limit: incomplete ones first, then by step."""
        if not self.limit:
            return
        mine = [path for path in checkpoint_paths(self.folder.path) if self._is_mine(path)]
        kept = {self.saving, best}
        old = [path for path in mine[::-1] if path not in kept]
        old.sort(key=lambda path: (path / MANIFEST).exists())
        count = len(mine) - max(self.limit, len(kept))
        for path in old[: max(count, 0)]:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def failing_as_fault(self, args, control):
        """Make of an OSError in writing a checkpoint a Fault, and remove what was written of it."""
        try:
            yield
        except OSError as error:
            if self.saving is None or control.should_evaluate:  # it was not the checkpoint that failed
                raise
            # Nor did it where a process is gone that this one waited for. Paddle's errors have no number.
            collective = args.world_size > 1 and error.errno is None
            if collective or isinstance(error, ConnectionError):
                raise
            if self._is_mine(self.saving):
                shutil.rmtree(self.saving, ignore_errors=True)
            reason = error.strerror or error
            hint = self.folder.resume_hint()
            raise Fault(f"{self.saving} can't be written: {reason}; {hint}") from error


def best_of(args) -> Optional[list]:
    """Return what decides which checkpoint is the best: the metric's name, and whether more is better."""
    if not args.metric_for_best_model:
        return None
    return [args.metric_for_best_model.replace("eval_", ""), bool(args.greater_is_better)]


def _is_best_of(metric, state, checkpoint):
    """Return whether the best of ``state`` was chosen by the ``metric``, as ``best_of`` returns it."""
    if checkpoint.best_of:
        return checkpoint.best_of == metric
    # An old version's manifest does not say it, but the history has the metrics of the best step.
    step, name = Path(state.best_model_checkpoint).name, f"eval_{metric[0]}"
    rows = [row for row in state.log_history if step == f"checkpoint-{row.get('step')}" and name in row]
    values = [row[name] for row in rows]
    return (not values or state.best_metric in values) and metric[1] == (metric[0] != "loss")


def _is_number(value):
    """Return whether a value of a log's row can be compared: a file may hold NaN, or true for 1."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_evaluation_due(args, state):
    """Return whether a signal cancelled this step's evaluation, which comes before its checkpoint."""
    step = state.global_step
    if args.evaluation_strategy == IntervalStrategy.STEPS:
        due = step % args.eval_steps == 0
    else:
        both = args.evaluation_strategy == args.save_strategy == IntervalStrategy.EPOCH
        due = both and float(state.epoch).is_integer()
    rows = [row for row in state.log_history if row.get("step") == step] if due else []
    return due and not any(name.startswith("eval_") for row in rows for name in row)


def make_state_readable(path: Path):
    """Take out of the Trainer's state, a file, what PaddleNLP 3 adds and PaddleNLP 2 or JSON refuses."""
    state = json.loads(path.read_text(encoding="utf-8"))
    state.pop("consumed_samples", None)
    path.write_text(dump_json(state, indent=2, sort_keys=True), encoding="utf-8")
