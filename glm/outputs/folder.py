"""What stands in output_dir: written whole, of one model and one run, told apart from others.

A run writes what it leaves behind into a folder of its own in output_dir, then a list of
what that replaces, and only then moves it into place. A run that is killed before the
list leaves output_dir as it was; one that is killed after it has its moves done by the
next command.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import paddle.distributed as dist
from paddlenlp.utils.log import logger

from glm.errors import InputError
from glm.processes import LOCK, barrier, gather_objects, locked

UNFINISHED = ".unfinished"  # in output_dir: where a run writes what is then moved into place
REPLACED = ".replaced"  # the last file written there: the names in output_dir that go
RUN = ".run.json"  # in output_dir: the run that the folder is of, and the step of the model there
NAME_MAX = 255  # bytes of a folder's name

# The forms that a model has, as PaddleNLP and PyTorch write them, and what describes one.
WHOLE_MODEL = (
    "model_state*.pdparams",
    "model*.safetensors",
    "pytorch_model*.bin",
    "model*.index.json",
    "pytorch_model*.index.json",
)
ADAPTER = ("lora_config.json", "lora_model_state*")
DESCRIPTIONS = ("config.json", "added_tokens.json", "special_tokens_map.json")
RESULTS = (
    "train_results.json",
    "eval_results.json",
    "test_results.json",
    "all_results.json",
    "eval_predictions.jsonl",
    "test_predictions.jsonl",
    "trainer_state.json",
    "torch",
)
MODEL = (*WHOLE_MODEL, *ADAPTER, *DESCRIPTIONS)

# What a run leaves in output_dir besides its model, and what its launcher does.
TRACES = (
    RUN,
    "checkpoint-*",
    "runs/*",
    "*_results.json",
    "*_predictions.jsonl*",
    "workerlog.*",
    "*/workerlog.*",
)


def find(folder, patterns):
    """The paths in ``folder`` that match any of the glob ``patterns``, list[Path], sorted."""
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})


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


def read_json(path):
    """The dict in a JSON file; an empty one where there is no such file, or none that is whole."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def finishing(output_dir, replaces=()):
    """Yield the path of an empty folder, whose files are moved to ``output_dir`` when the block ends.

    All of them are moved or none, also if the run is killed: see the top of this file.
    What matches the patterns ``replaces`` in output_dir, and is not among them, goes
    in the same move. The folder holds a copy of all_results.json, to which results
    are added, unless that is replaced. An OSError within takes the folder away. All
    processes have to enter and leave.
    """
    folder, first = Path(output_dir, UNFINISHED), dist.get_rank() == 0
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if "all_results.json" not in replaces:
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
        written = {path.name for path in folder.iterdir()}
        replaced = {path.name for path in find(output_dir, replaces)} - written
        write_whole(folder / REPLACED, json.dumps(sorted(replaced)))
        move_into_place(output_dir)
        folder.rmdir()


def replaced_by(run, step, output_dir, checkpoint):
    """The patterns of what the model of a ``run`` (dict) at ``step`` replaces in ``output_dir``.

    Results stay where the model there is the same already. ``checkpoint``: the one that
    the run went on from, or None.
    """
    there = read_json(Path(output_dir, RUN))
    if there:
        same = there["id"] == run["id"] and there.get("model") == step
    else:  # of a version that told of no run
        same = checkpoint is not None and is_same_folder(Path(checkpoint).parent, output_dir)
    return MODEL if same else (*MODEL, *RESULTS)


def is_same_folder(one, other):
    """Whether the paths ``one`` and ``other`` are of the same folder, as far as there are such."""
    return os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other)


def move_into_place(output_dir):
    """Do the moves of a run that had written all of its files, or go on with them."""
    folder = Path(output_dir, UNFINISHED)
    if not Path(folder, REPLACED).exists():
        return
    for path in folder.iterdir():
        target = Path(output_dir, path.name)
        if path.name == REPLACED:
            continue
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    for name in json.loads(Path(folder, REPLACED).read_text(encoding="utf-8")):
        path = Path(output_dir, name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    Path(folder, REPLACED).unlink()


def complete_moves(output_dir, model):
    """Do what a killed run had left to move in ``output_dir``, and in the folder ``model`` to read.

    All processes have to call it, while this run holds the lock of output_dir.
    """
    if dist.get_rank() == 0 and output_dir:
        move_into_place(output_dir)
    pending = Path(model, UNFINISHED, REPLACED)
    if gather_objects(pending.exists())[0]:  # not in output_dir, where it has just been done
        with locked(model, "--model_name_or_path"):
            if dist.get_rank() == 0:
                move_into_place(model)
    barrier()


def write_results(folder, split, metrics, rows=()):
    """Write ``metrics`` as {split}_results.json, and add them to all_results.json.

    Args:
        metrics (dict): numbers by name.
        rows (list[dict]): those of {split}_predictions.jsonl, which there is if there are
            any.
    """
    combined = Path(folder, "all_results.json")
    text = json.dumps(metrics, indent=4, sort_keys=True)
    Path(folder, f"{split}_results.json").write_text(text)
    everything = {**read_json(combined), **metrics}
    combined.write_text(json.dumps(everything, indent=4, sort_keys=True))
    if rows:
        write_predictions(folder, split, rows)


def write_predictions(folder, split, rows):
    """Write the ``rows``, list[dict], as JSON lines into {split}_predictions.jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(Path(folder, f"{split}_predictions.jsonl"), "".join(lines))


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
    try:  # os.access lets root write in /proc. The other processes look for other names than LOCK*.
        tempfile.TemporaryFile(prefix=LOCK, dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{flag} {folder}: {existing} can't be written to ({error.strerror}): give another one"
        ) from error


def check_other_models(output_dir, model, adapter_base=None):
    """Tell where results would lie beside a model that they are not of.

    Args:
        model (str): the one that is evaluated, or None where the run writes one.
        adapter_base (str): the model that an adapter which is trained or merged belongs
            to.

    Raises:
        InputError: where what the run writes would replace the base of its adapter.
    """
    if adapter_base and is_same_folder(adapter_base, output_dir):
        raise InputError(
            f"--output_dir {output_dir} holds the model that the adapter belongs to, and what this "
            "run writes would replace it: give another folder"
        )
    if model and find(output_dir, (*WHOLE_MODEL, *ADAPTER)) and not is_same_folder(model, output_dir):
        logger.warning(f"the results in {output_dir} will be of {model}, not of the model that lies there")


def _check_contents(folder, checkpoint):
    """Raise InputError where ``folder`` holds a model that is not gone on with, or nothing of a run."""
    names = [name for name in os.listdir(folder) if not name.startswith(LOCK)]
    if UNFINISHED in names:  # a run of this folder was killed while it saved
        return
    if find(folder, (*WHOLE_MODEL, *ADAPTER)) and checkpoint is None:
        raise InputError(
            f"--output_dir {folder} holds a model and no checkpoint to resume from: "
            "give another folder, or --overwrite_output_dir"
        )
    of_a_run = find(folder, TRACES) or any(is_own_output(os.path.join(folder, name)) for name in names)
    if names and not of_a_run:
        raise InputError(
            f"--output_dir {folder} holds {names[0]} and nothing of a run: "
            "give a folder of its own, or --overwrite_output_dir"
        )
