"""Checkpoints of a run: written completely, given their manifest, removed when there are too many."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Callable, Optional

from paddlenlp.trainer.trainer_callback import TrainerCallback, TrainerState
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from glm.errors import Fault
from glm.files import dump_json, open_regular, write_atomically
from glm.outputs.checkpoints import checkpoint_paths, compute_checksums, list_files, open_checkpoint
from glm.outputs.folder import RunFolder
from glm.outputs.layout import INCOMPLETE, MANIFEST, TRAINER_STATE
from glm.processes import barrier, is_first_of_machine


class SaveCheckpoints(TrainerCallback):
    """Give a checkpoint a last file, the manifest, that says what the others are; then remove old ones.

    PaddleNLP removes old ones before the new one is complete, and on a single process none at all.

    Args:
        folder: output_dir.
        limit: save_total_limit.
        describe: returns what a manifest says of the run's progress.
        settle_best: takes the state that a run goes on with, and finds its best checkpoint.
        evaluate: evaluates the current weights, and returns the metrics.
    """

    def __init__(
        self,
        folder: RunFolder,
        limit: Optional[int] = None,
        describe: Callable[[], dict] = dict,
        settle_best: Callable[[TrainerState], None] = lambda state: None,
        evaluate: Optional[Callable[[], dict]] = None,
    ):
        self.folder, self.limit = folder, limit
        self.describe, self.settle_best, self.evaluate = describe, settle_best, evaluate
        self.saving = None  # the path of the checkpoint that is being written

    def on_train_begin(self, args, state, control, **kwargs):
        self.folder.begin_run()
        self.settle_best(state)

    def on_step_begin(self, args, state, control, **kwargs):
        self.make_up_evaluation(args, state)

    def make_up_evaluation(self, args, state):
        """Evaluate the checkpoint that the run goes on from, where a signal came before its evaluation.

        The Trainer compares with the best what it evaluates in its own loop alone.
        """
        resumed = self.folder.resumed
        if resumed is None or not resumed.evaluation_is_due or state.global_step != resumed.step:
            return
        name, path = args.metric_for_best_model, resumed.path
        if args.evaluation_strategy == IntervalStrategy.NO or args.ignore_load_lr_and_optim:
            return
        metrics, best = self.evaluate(), state.best_metric
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
        # As the Trainer calls it.
        path = self.saving = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if is_first_of_machine():
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
        path, first = self.saving, is_first_of_machine()
        if first:
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
        if first:
            write_atomically(path / MANIFEST, dump_json(manifest))
            (path / INCOMPLETE).unlink()
            self._remove_old_ones(best)
        barrier()  # who says where to go on has to find the manifest
        self.saving = None

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
