"""output_dir: its lock, what it holds, whose it is, and how it is written.

A checkpoint belongs to the folder's run or not. A run that starts anew is another run, and moves the
checkpoints that it finds into a folder beside them; so does one that goes on from an earlier
checkpoint with the later ones. What a run did not write, it does not remove.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from paddlenlp.utils.log import logger

from glm.errors import InputError, as_input_error, printable
from glm.files import dump_json, parse_json, write_atomically
from glm.outputs import layout, resuming
from glm.outputs.checkpoints import Checkpoint, Run, checkpoint_paths, number_of, open_checkpoint, read_run
from glm.outputs.layout import ALL_RESULTS, MANIFEST, MODEL, RESULTS, RUN, TRAINER_STATE, find
from glm.outputs.lock import check_writable, hold_together, is_own_output
from glm.outputs.replace import check_replaceable, replace_together
from glm.outputs.results import read_results
from glm.processes import barrier, gather_objects, is_first_of_run, tensor_parallel_part


class RunFolder:
    """output_dir, while this run holds it.

    Made by ``open_run_folder``; one that is made otherwise is not locked, and nothing in it is read.

    Args:
        args (GLMTrainingArguments): of this run.

    Attributes:
        run: the Run that the folder is of, or None.
        training_began: whether the folder is this command's. wrote_model: whether it wrote a model.
        new_run: the Run that this command is, and what it is of, as a Checkpoint has it.
        resumed: the Checkpoint that it goes on from, or None.
        written: the names of the files that it has written, but for checkpoints.
    """

    def __init__(self, args):
        self.args, self.path = args, Path(args.output_dir)
        self.run, self.new_run, self.described, self.resumed = None, Run(uuid.uuid4().hex), {}, None
        self.training_began = self.wrote_model = False
        self.aside = self.path / f"{layout.SUPERSEDED}{time.strftime('%Y%m%d-%H%M%S')}"
        self.to_move, self.arguments = [], "{}"  # what begin_run does
        self.written = set()

    # What may be done here.

    def check_contents(self, checkpoint: Optional[Checkpoint], replaces: bool = True):
        """Raise InputError where training would be mixed with what is not a run's, or can't be written.

        Args:
            checkpoint: the one to resume from, or None.
            replaces: whether the run writes a model or torch/.
        """
        if not self.path.is_dir():
            return
        names = (RUN, layout.ARGUMENTS, *(name for name in RESULTS if name != layout.TORCH))
        model = (*layout.WRITTEN, layout.TORCH) if replaces else ()
        step = (checkpoint and checkpoint.step) or 0
        later = checkpoint_paths(self.path) if self.args.do_train else ()  # this run writes them anew
        later = [path.name for path in later if number_of(path) > step]
        with as_input_error(f"--output_dir {self.path} can't be read", "give another one", OSError):
            check_replaceable(self.path, (*names, *(f"{name}.tmp" for name in names), *model, *later))
            files = os.listdir(self.path) if self.args.do_train else []
        runs = self.path / "runs"
        for path in (runs, Path(getattr(self.args, "logging_dir", None) or runs)):
            if path.is_symlink() and runs in (path, path.parent):
                raise InputError(f"{path} is a link: remove it, or give what it leads to by --logging_dir")
        if not self.args.do_train or self.args.overwrite_output_dir:
            return
        names = [name for name in files if not name.startswith(layout.LOCK)]
        if layout.UNFINISHED in names:  # a run of this folder was killed while it saved
            return
        if checkpoint is None and find(self.path, (*layout.WHOLE_MODEL, *layout.ADAPTER)):
            raise InputError(
                f"--output_dir {self.path} holds a model and no checkpoint to resume from: "
                "give another folder, or --overwrite_output_dir"
            )
        of_a_run = find(self.path, layout.TRACES) or any(is_own_output(self.path / name) for name in names)
        if names and not of_a_run:
            raise InputError(
                f"--output_dir {self.path} holds {names[0]} and nothing of a run: "
                "give a folder of its own, or --overwrite_output_dir"
            )

    def check_models(self, pretrained, writes_model: bool, exports: bool = False):
        """Warn where results would lie beside a model that they are not of.

        Args:
            pretrained (Pretrained): the run's. writes_model: whether it trains or merges one.
            exports: whether it writes torch/.

        Raises:
            InputError: where the run would take away what its model or the base of its adapter is.
        """
        for name in {pretrained.name, pretrained.base} if self.args.do_train else ():
            model = Path(name).resolve()
            for path in checkpoint_paths(self.path) if os.path.isdir(model) else ():
                if model.is_relative_to(path.resolve()):
                    raise InputError(
                        f"the model {name} lies in {path}, which training into {self.path} may "
                        "move aside or remove: give another --output_dir, or copy the model"
                    )
        base, torch = pretrained.base, self.path / layout.TORCH
        replaced = writes_model and self.is_same(base)
        replaced |= (writes_model or exports) and os.path.realpath(base) == os.path.realpath(torch)
        if pretrained.adapter and replaced:
            raise InputError(
                f"--output_dir {self.path} holds the model that the adapter belongs to, and what this "
                "run writes would replace it: give another folder"
            )
        other = not (writes_model or self.is_same(pretrained.name))
        if other and find(self.path, (*layout.WHOLE_MODEL, *layout.ADAPTER)):
            model = pretrained.name
            logger.warning(f"the results in {self.path} will be of {model}, not of the model that lies there")

    def is_same(self, other: str) -> bool:
        """Return whether the path ``other`` is this folder, as far as there are such."""
        return self.path.is_dir() and os.path.isdir(other) and os.path.samefile(self.path, other)

    # Checkpoints.

    def find_checkpoint(self, lora: bool) -> Optional[Checkpoint]:
        """Return the checkpoint to go on from, given or the last one of the folder's run, or None.

        All processes have to call it.

        Args:
            lora: whether this run trains an adapter.

        Raises:
            InputError: where one can't be gone on with, or none of those that are here.
        """
        args, given = self.args, self.args.resume_from_checkpoint
        if not args.do_train or (args.overwrite_output_dir and given is None):
            return None
        weights_alone = args.ignore_load_lr_and_optim
        but = resuming.BESIDE_WEIGHTS if weights_alone else ()
        if given is None:
            checkpoint = self._find_last(but)
        else:
            where = f"--resume_from_checkpoint {given}"
            with as_input_error(f"{where}: its {MANIFEST} can't be read", "give another checkpoint"):
                checkpoint = open_checkpoint(given, named=True)
            if damage := checkpoint.find_damage(but):
                raise InputError(f"{where} is damaged: {damage}: give another one")
        if checkpoint is None:
            return None
        degree = tensor_parallel_part(args)[1]
        resuming.check_files(checkpoint, lora, degree, weights_alone, given is not None)
        resuming.keep_global_batch_size(args, checkpoint.global_batch_size)
        logger.train(f"resuming from {checkpoint}; --overwrite_output_dir starts anew")
        return checkpoint

    def list_checkpoints(self) -> tuple[list[Checkpoint], list]:
        """Return the complete checkpoints of the folder's run, the last step first, and what the others are.

        Returns:
            them; of each other one its path, why it is none, and whether a user may have meant it to be
            gone on with.
        """
        own, others = [], []
        for path in checkpoint_paths(self.path):
            try:
                checkpoint = open_checkpoint(path)
            except (OSError, ValueError) as error:
                others.append((path, f"whose {MANIFEST} can't be read ({error})", True))
                continue
            if checkpoint.complete and (self.run is None or self.run.owns(checkpoint)):
                own.append(checkpoint)
            elif checkpoint.complete:
                others.append((path, "which another run wrote", False))
            elif os.path.lexists(path / layout.INCOMPLETE) or not os.path.lexists(path / TRAINER_STATE):
                others.append((path, "which was not written to its end", False))
            else:
                others.append((path, f"which has no {MANIFEST}, as a copy without it", True))
        return sorted(own, key=lambda checkpoint: checkpoint.step, reverse=True), others

    def _find_last(self, but):
        """Return the last of the folder's own checkpoints that is undamaged on every machine, or None."""
        own, others = self.list_checkpoints()
        if is_first_of_run():
            for path, reason, _ in others:
                advice = "if it is complete, --resume_from_checkpoint goes on from it"
                logger.warning(f"skipping {path}, {printable(reason, 300)}: {advice}")
        refused = [path for path, _, meant in others if meant]
        # Machines may have folders of their own.
        names = set.intersection(*map(set, gather_objects([checkpoint.path.name for checkpoint in own])))
        for checkpoint in own:
            if checkpoint.path.name in names:
                damage = checkpoint.find_damage(but)
                if damage is None:
                    return checkpoint
                logger.warning(f"skipping {checkpoint}, which is damaged: {printable(damage, 300)}")
                refused.append(checkpoint.path)
        if refused:
            raise InputError(
                f"--output_dir {self.path} holds {refused[0].name}, which can't be gone on with (see above): "
                "complete it, give one by --resume_from_checkpoint, or --overwrite_output_dir"
            )
        return None

    def find_best(self, recorded, compare_files=True, expected=True) -> Optional[Checkpoint]:
        """Return the Checkpoint that the run recorded as its best, or None where it is gone.

        It is looked for beside the checkpoint that the run goes on from, then here, then where it was, for
        a folder may have been moved. All processes have to call it.

        Args:
            recorded: its path then. compare_files: whether its files may have changed since.
            expected: whether a line says that it is gone.
        """
        name, resumed = Path(recorded).name, self.resumed
        folders, runs = [self.path, Path(recorded).parent], [self.new_run]
        if resumed:
            folders.insert(0, resumed.path.parent)
            runs += [resumed.run, Run(resumed.best_run)]
        for folder in folders:
            best, folder = None, self.path if self.is_same(folder) else folder  # one spelling
            with contextlib.suppress(OSError, ValueError):
                best = open_checkpoint(folder / name)
            ours = best is not None and best.complete and any(run.owns(best) for run in runs)
            if all(gather_objects(ours)) and not (compare_files and best.find_damage()):
                return best
        if expected:
            gone = f"the best checkpoint, {printable(recorded, 300)}, is gone or damaged"
            logger.warning(f"{gone}: the best from here on, or the last weights, take its place")
        return None

    def resume_hint(self) -> str:
        """Return what the last line of a run that ended early says of going on."""
        args = self.args
        flags = [name for name in ("overwrite_output_dir", "resume_from_checkpoint") if getattr(args, name)]
        # Until training begins, the checkpoints here may be those of another run.
        if not args.do_train or (flags and not self.training_began):
            return "the same command starts again"
        checkpoint = next(iter(self.list_checkpoints()[0]), None)
        if checkpoint is not None:
            without = f" without --{' and --'.join(flags)}" if flags else ""
            return f"the same command{without} goes on from {checkpoint}"
        if self.wrote_model:
            return f"the trained model is in {self.path}: give it as --model_name_or_path"
        return "there is no checkpoint to resume from"

    # This command's run.

    def prepare_run(self, groups: tuple, pretrained, records: list, checkpoint: Optional[Checkpoint]):
        """Decide which run this is, and compare it with the one that wrote ``checkpoint``.

        Nothing is written yet. All processes have to call it.

        Args:
            groups: the four dataclasses of arguments.
            pretrained (Pretrained): what training starts from.
            records: to train on, dicts. checkpoint: to go on from, or None.

        Raises:
            InputError: where going on with it makes no sense.
        """
        values = {type(group).__name__: asdict(group) for group in groups}
        self.arguments = dump_json(values, indent=2, default=lambda kind: getattr(kind, "value", str(kind)))
        arguments = {}
        for group in parse_json(self.arguments).values():
            arguments.update(group)
        self.described = resuming.describe_training(arguments, pretrained, records)
        self.new_run, self.aside = gather_objects((self.new_run, self.aside))[0]
        self.resumed = checkpoint
        self.new_run, self.to_move = self._choose_run(checkpoint)
        if checkpoint is None or self.args.ignore_load_lr_and_optim:
            return
        owner = None
        with contextlib.suppress(OSError, ValueError):
            owner = read_run(self.described["base"])
        replaced, given = owner is not None and owner.owns(checkpoint), self.args.resume_from_checkpoint
        resuming.compare_training(checkpoint, self.described, replaced, given is not None)
        if "settings" in checkpoint.described:
            self.described.update({name: checkpoint.described.get(name) for name in ("base", "weights")})

    def _choose_run(self, checkpoint):
        """Return the Run that goes on from ``checkpoint``, or from None, and the checkpoints in its way."""
        there = checkpoint_paths(self.path)
        if checkpoint is None or self.args.ignore_load_lr_and_optim:  # its steps begin at 0
            mine = checkpoint and checkpoint.path.resolve()
            return self.new_run, [path for path in there if path.resolve() != mine]
        if not self.is_same(checkpoint.path.parent):
            return self.new_run, there
        run = self.run if self.run and self.run.owns(checkpoint) else checkpoint.run
        if run.id is None:  # of an old version, which names no run
            run = Run(self.new_run.id, None, (None, checkpoint.step or 0))
        later = [path for path in there if number_of(path) > (checkpoint.step or 0)]
        return run, later if self.args.resume_from_checkpoint is not None else []

    def begin_run(self):
        """Make the folder this run's before it writes anything else. All processes have to call it."""
        # Going back, the model that lies there will be another one than this run's of that step.
        kept = self.run and self.run.id == self.new_run.id and not self.to_move
        model = self.run.model if kept else None
        self.run = self.new_run = self.new_run._replace(model=model)
        if self.args.should_save:
            with as_input_error(f"--output_dir {self.path} can't be used", "give another one", OSError):
                self.path.mkdir(parents=True, exist_ok=True)
                self.move_aside(self.to_move)
                write_atomically(self.path / RUN, dump_json(self.run._asdict()))
                write_atomically(self.path / layout.ARGUMENTS, self.arguments + "\n")
        barrier()
        self.training_began = True

    def move_aside(self, paths: Sequence[Path]):
        """Move checkpoints that this run did not write into one folder beside them, and say so."""
        if self.aside.is_symlink() or self.aside.exists() and not self.aside.is_dir():
            raise InputError(f"{self.aside} is no folder, and in the way of one: remove it")
        for path in paths:
            self.aside.mkdir(exist_ok=True)
            path.rename(self.aside / path.name)
        if paths:
            names = ", ".join(path.name for path in sorted(paths, key=number_of))
            logger.train(f"moved {names} to {self.aside}, which you may remove: this run goes on without")

    # Results and the model.

    @contextlib.contextmanager
    def replacing(self, patterns: Sequence[str] = (), run: Optional[Run] = None):
        """Yield the staging folder of ``replace_together``, for all processes.

        Args:
            patterns: of what goes in the same move. run: what the folder is of afterwards, if it
                changes.
        """
        writes = self.args.should_save
        with replace_together(self.path, patterns, writes) as staging:
            if writes and ALL_RESULTS not in patterns:  # results are added to it
                if results := read_results(self.path):
                    (staging / ALL_RESULTS).write_text(dump_json(results, indent=4, sort_keys=True))
            if writes and run:
                write_atomically(staging / RUN, dump_json(run._asdict()))
            yield staging
            self.written |= {path.name for path in staging.iterdir()} - {RUN}
        if run:
            self.run, self.wrote_model = run, True

    def replacing_model(self, step: int):
        """Return the context of ``replacing`` for the model that this run trained, of ``step``.

        The model's other forms go, and the results of another model.
        """
        run, before = self.new_run._replace(model=step), self.run
        if before:
            same = (before.id, before.model) == (run.id, step)
        else:  # of an old version, which names no run
            same = self.resumed is not None and self.is_same(self.resumed.path.parent)
        return self.replacing(MODEL if same else (*MODEL, *RESULTS), run)

    def replacing_merged(self, adapter: str):
        """Return the context of ``replacing`` for a model with the ``adapter`` (a folder) in its weights."""
        if self.args.do_train or self.is_same(adapter):
            return self.replacing(layout.WHOLE_MODEL)
        return self.replacing((*MODEL, *RESULTS), self.new_run)


@contextlib.contextmanager
def open_run_folder(args):
    """Hold output_dir for this run by ``hold_together``. All processes have to enter and leave.

    Yields:
        RunFolder.

    Raises:
        InputError: where it can't be written or held, or what it says of its run is wrong.
    """
    if not args.output_dir:
        raise InputError(
            "--output_dir is missing: give the folder for checkpoints, the model and the results"
        )
    check_writable("--output_dir", args.output_dir)
    if getattr(args, "logging_dir", None):
        check_writable("--logging_dir", args.logging_dir)
    folder = RunFolder(args)
    with hold_together(folder.path, args.save_on_each_node, args.should_save):
        with as_input_error(f"{folder.path / RUN} can't be read", "remove it, or give another --output_dir"):
            folder.run = read_run(folder.path)
        yield folder
