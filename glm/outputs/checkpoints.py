"""A checkpoint: its manifest, read once and checked, and its files, compared with it.

A checkpoint may come from a stranger, as any file may: its manifest names plain files of its own
folder, and every value has a type and a range.
"""

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Optional

import paddle.distributed as dist
from paddlenlp.trainer.trainer_callback import TrainerState

from glm.errors import InputError
from glm.files import check_plain_name, get_typed, is_hollow, open_regular, read_json
from glm.outputs.layout import CHECKPOINT, INCOMPLETE, MANIFEST, RUN, TRAINER_STATE
from glm.processes import gather_objects, place_on_machine

MOST = 2**31 - 1  # steps, records or evaluations


class Run(NamedTuple):
    """The run that a folder or a checkpoint is of.

    Attributes:
        id: which no other run has; None where an old version wrote it.
        model: the step of the model in output_dir, or None.
        parent: the id and the last step of a run whose checkpoints are this one's too, or None: one
            that went on from those of an old version has one.
    """

    id: Optional[str] = None
    model: Optional[int] = None
    parent: Optional[tuple] = None

    def owns(self, checkpoint) -> bool:
        """Return whether the Checkpoint is one that this run wrote or went on from."""
        written_by, parent = checkpoint.run.id, self.parent
        if written_by == self.id or parent is None:
            return written_by == self.id
        return written_by == parent[0] and (checkpoint.step or 0) <= parent[1]


def parse_run(values: dict) -> Run:
    """Return the Run in a dict of a file. Raises ValueError where it says it in another way."""
    parent = get_typed(values, "parent", list)
    if parent is not None:
        if len(parent) != 2 or parent[1] is None:
            raise ValueError("its 'parent' is no id and step")
        of_parent = {"parent's id": parent[0], "parent's step": parent[1]}
        step = get_typed(of_parent, "parent's step", int, least=0, most=MOST)
        parent = get_typed(of_parent, "parent's id", str), step
    return Run(get_typed(values, "id", str), get_typed(values, "model", int, least=0, most=MOST), parent)


def read_run(folder: Path) -> Optional[Run]:
    """Return the Run that ``folder`` is of, or None where it tells of none.

    Raises:
        ValueError: where .run.json says it in another way. OSError: where it can't be read.
    """
    path = Path(folder, RUN)
    if not os.path.lexists(path):
        return None
    run = parse_run(read_json(path))
    if not run.id:
        raise ValueError("it has no 'id'")
    return run


@dataclass(frozen=True)
class Checkpoint:
    """A folder checkpoint-N, and what its manifest says of it.

    Attributes:
        step: the number of updates, or None where neither the manifest nor the name says it.
        complete: whether it has a manifest, which is written last.
        run: the Run that wrote it.
        described: what that run trained: ``base``, ``weights`` (a fingerprint), ``records``, ``texts``
            (a fingerprint), ``adapter`` and ``settings``; empty in an old version's.
        files: [bytes, BLAKE2b] by the file's name.
        parameters: the model's name of each weight by the name in the optimizer's state, or None.
        global_batch_size: the records of an update, or None.
        evaluations_without_better: in a row, for early stopping.
        evaluation_is_due: whether a signal ended the run before the evaluation of this step.
        best_of: the metric by which the best checkpoint is chosen, and whether more of it is better, list
            of str and bool; or None.
        measures: fingerprints of what the value of an evaluation's "loss" and of its "text" depends on
            beside the model; those that are not known are not in it.
        steps_ahead: how many more updates are counted than its records take at this global batch size.
        best_run: the id of the run that wrote the best checkpoint up to this one, or None.
    """

    path: Path
    step: Optional[int] = None
    complete: bool = False
    run: Run = Run()
    described: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    parameters: Optional[dict] = None
    global_batch_size: Optional[int] = None
    evaluations_without_better: int = 0
    evaluation_is_due: bool = False
    best_of: Optional[list] = None
    measures: dict = field(default_factory=dict)
    steps_ahead: int = 0
    best_run: Optional[str] = None

    def __str__(self):
        return str(self.path)

    __fspath__ = __str__

    def find_damage(self, but: Collection[str] = ()) -> Optional[str]:
        """Compare the files with the sizes and checksums in the manifest.

        All processes have to call it.

        Args:
            but: patterns of the files that are not needed.

        Returns:
            what is wrong on any machine, or None.
        """
        needed = {n: entry for n, entry in self.files.items() if not any(Path(n).match(p) for p in but)}
        damage = None
        for name, (size, digest) in compute_checksums(self.path, needed, needed).items():
            if size is None:
                damage = f"its {name} is missing"
            elif [size, digest] != needed[name]:
                damage = f"its {name} is not what was written ({size} bytes)"
        return next(filter(None, gather_objects(damage)), None)

    def read_state(self) -> TrainerState:
        """Return the Trainer's state. Raises InputError where its values are none."""
        path = self.path / TRAINER_STATE
        try:
            values = read_json(path)
            known = {item.name for item in fields(TrainerState)}
            unknown = [name for name in values if name not in known]
            if unknown:
                raise ValueError(f"{unknown[0]!r} is nothing of a Trainer's state")
            for name in ("max_steps", "num_train_epochs", "consumed_samples"):
                get_typed(values, name, int, least=0)
            if get_typed(values, "global_step", int, least=0, most=MOST) is None:
                raise ValueError("it has no 'global_step'")
            if values["global_step"] < self.steps_ahead:  # what is left to train would have no end
                raise ValueError(f"its 'global_step' is under the 'steps_ahead' in its {MANIFEST}")
            for name in ("epoch", "total_flos", "best_metric"):
                get_typed(values, name, float, least=-1e300, most=1e300)
            for row in get_typed(values, "log_history", list, []):
                if not isinstance(row, dict) or any(
                    isinstance(value, (dict, list)) for value in row.values()
                ):
                    raise ValueError("its 'log_history' is no list of a log's numbers")
            best = get_typed(values, "best_model_checkpoint", str)
            if best is not None and ("\0" in best or len(best) > 4096):
                raise ValueError("its 'best_model_checkpoint' is no path")
        except (OSError, ValueError) as error:
            where = f"{self} can't be loaded (its {TRAINER_STATE}: {error})"
            raise InputError(f"{where}: remove it to go on from the checkpoint before it") from error
        return TrainerState(**values)


def open_checkpoint(path: Path, named: bool = False) -> Checkpoint:
    """Return the Checkpoint at ``path``.

    Args:
        path: of a folder.
        named: whether a user gave it: it may be a link then, or "." in the folder, and the checkpoint's
            path becomes that by which it lies in its folder.

    Raises:
        ValueError: where its manifest is none. OSError: where it can't be read.
    """
    path = Path(path)
    if named and (path.is_symlink() or not CHECKPOINT.fullmatch(path.name)):
        path = path.resolve()
    name, manifest = CHECKPOINT.fullmatch(path.name), path / MANIFEST
    step = int(name[1]) if name else None
    if step is not None and step > MOST:
        raise ValueError("its number is that of no step")
    try:
        os.lstat(manifest)
    except (FileNotFoundError, NotADirectoryError):
        return Checkpoint(path, step)
    # An old version's is empty.
    values = {} if manifest.is_file() and manifest.stat().st_size == 0 else read_json(manifest)
    files = get_typed(values, "files", dict, {})
    for name, entry in files.items():
        check_plain_name(name)
        size, digest = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str):
            raise ValueError(f"'files' has no size and checksum of {name!r}")
    parameters = get_typed(values, "parameters", dict)
    if not all(isinstance(name, str) for name in (parameters or {}).values()):
        raise ValueError("'parameters' is no dict of names")
    described = get_typed(values, "run", dict, {})
    for name in ("base", "weights", "texts"):
        get_typed(described, name, str)
    for name in ("adapter", "settings"):  # which are compared with this run's, and printed
        found = get_typed(described, name, dict) or {}
        for key, value in found.items():
            texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
            texts = texts and name == "adapter"  # its target_modules
            get_typed(found, key, list if texts else (str, float, bool), least=-1e300, most=1e300)
    get_typed(described, "records", int, least=0)
    best_of = get_typed(values, "best_of", list)
    if best_of is not None and [type(value) for value in best_of] != [str, bool]:
        raise ValueError("'best_of' is no metric and direction")
    measures = get_typed(values, "measures", dict, {})
    if not all(isinstance(measure, str) for measure in measures.values()):
        raise ValueError("'measures' is no dict of fingerprints")
    return Checkpoint(
        path,
        get_typed(values, "step", int, step, least=0, most=MOST),
        complete=True,
        run=parse_run(described),
        described=described,
        files=files,
        parameters=parameters,
        global_batch_size=get_typed(values, "records", int, least=1, most=MOST),
        evaluations_without_better=get_typed(values, "evaluations_without_better", int, 0, 0, MOST),
        evaluation_is_due=get_typed(values, "evaluation_is_due", bool, False),
        best_of=best_of,
        measures=measures,
        steps_ahead=get_typed(values, "steps_ahead", int, 0, least=-MOST, most=MOST),
        best_run=get_typed(values, "best_run", str),
    )


def number_of(path: Path) -> int:
    """Return N of a path checkpoint-N."""
    return int(CHECKPOINT.fullmatch(path.name)[1])


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the paths in ``folder`` called checkpoint-N, the largest N first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=number_of, reverse=True)


def _checksum(path, expected_size):
    """Return [size in bytes, BLAKE2b] of a regular file, or [None, None] if it can't be read.

    It is not read to its end, and has no BLAKE2b, where its size or its holes tell that it is another one.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if expected_size not in (None, size) or is_hollow(file):
                return [size, None]
            while chunk := file.read(1 << 24):
                digest.update(chunk)
            return [file.tell(), digest.hexdigest()]
    except (OSError, ValueError):
        return [None, None]


def compute_checksums(folder: Path, names: Collection[str], expected: Optional[dict] = None) -> dict:
    """Return sizes and checksums of the files ``names`` in a folder, [bytes, BLAKE2b] by name.

    A file that can't be read has [None, None]. The processes of a machine share the work; all of them
    have to call it.

    Args:
        expected: what they were when they were written, for the names of which that is known.
    """
    rank = dist.get_rank()
    local_rank, local_size = place_on_machine()
    names = sorted(names)[local_rank::local_size]
    sizes = {name: entry[0] for name, entry in (expected or {}).items()}
    parts = gather_objects({name: _checksum(Path(folder, name), sizes.get(name)) for name in names})
    first = rank - local_rank  # of this machine
    return {name: entry for part in parts[first : first + local_size] for name, entry in part.items()}


def list_files(folder: Path) -> set[str]:
    """Return the names of a checkpoint's regular files, but for those that are about the others."""
    entries = {entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)}
    return entries - {MANIFEST, INCOMPLETE}
