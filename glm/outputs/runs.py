"""Which run wrote what: its base, its records and its settings, kept in each checkpoint and output_dir.

A run that goes on with the last checkpoint of its folder stays the same run. One that
starts anew, or that goes on with a checkpoint it is given, is another run, and remembers
as its ``parent`` the run and the step that it goes on from. So the checkpoints of a
folder's own run can be told from those of a run that was written over.
"""

import hashlib
import uuid
from pathlib import Path

from paddlenlp.utils.log import logger

from glm.errors import InputError
from glm.outputs.folder import ADAPTER, RUN, WHOLE_MODEL, find, read_json

SAMPLES, SAMPLE_SIZE = 256, 1 << 16  # of a file of weights: how many parts are read, and their bytes

# The arguments that change what a step is of, in the order in which they are told.
SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "lr_decay_ratio",
    "label_smoothing",
    "weight_decay",
    "max_grad_norm",
    "src_length",
    "tgt_length",
    "group_by_length",
)
ADAPTER_SETTINGS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
    "rslora": "rslora",
}


def new_run():
    """A run that goes on from no other: its ``id``, which no other has, and its ``parent``, None."""
    return {"id": uuid.uuid4().hex, "parent": None}


def describe_run(groups, base, adapter, lora_config, dataset):
    """What tells this run from another, a dict that can be written as JSON.

    Args:
        groups: the arguments, dataclasses.
        base (str): the model to start from. adapter (str): the folder of the adapter, or
            None.
        lora_config (LoRAConfig): of the adapter that is trained, or None.
        dataset (list[dict]): features to train on, each with its ``record``.
    """
    values = {name: value for group in groups for name, value in vars(group).items()}
    settings = {name: getattr(values[name], "value", values[name]) for name in SETTINGS}
    # The other of these two is not looked at.
    settings["num_train_epochs" if settings["max_steps"] > 0 else "max_steps"] = None
    folders = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in (adapter, base) if name]
    config = {name: getattr(lora_config, name) for name in ADAPTER_SETTINGS} if lora_config else None
    return {
        "base": folders[0],
        "weights": _fingerprint_weights(folders),
        "records": len(dataset),
        "texts": _fingerprint_texts(feature["record"] for feature in dataset),
        "adapter": config,
        "settings": settings,
    }


def _fingerprint_texts(records):
    """BLAKE2b of the texts of ``records`` in their order, str."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        texts = (record["context"], record["answer"], record["question"])
        digest.update("\0".join([*texts, ""]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _fingerprint_weights(folders):
    """BLAKE2b of the files of weights in ``folders``, str; None where one of them is no folder.

    Of a large file it takes SAMPLES parts that lie evenly in it: a model's training
    changes all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        paths = find(folder, (*WHOLE_MODEL, *ADAPTER))
        if not paths:
            return None
        for path in paths:
            size = path.stat().st_size
            digest.update(b"%d " % size)
            with path.open("rb") as file:
                for start in range(0, size, max(size // SAMPLES, SAMPLE_SIZE)):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def compare_runs(checkpoint, mark, run, given):
    """Say in a line in what ``run`` differs from the run that wrote ``checkpoint``.

    Args:
        mark (dict): what read_mark says of the checkpoint. run (dict): of describe_run.
        given (bool): whether the user named the checkpoint.

    Raises:
        InputError: where going on makes no sense, with another base or another adapter.
    """
    before = mark["run"]
    anew = "leave out --resume_from_checkpoint" if given else "start anew with --overwrite_output_dir"
    advice = f"or {anew}, or give another --output_dir"
    # A run may have replaced the model that it started from by the one that it trained.
    owner = read_json(Path(run["base"], RUN))
    replaced = "model" in owner and is_of_run(mark, owner)
    if before["weights"] and run["weights"] and before["weights"] != run["weights"] and not replaced:
        changed = "those have changed since" if before["base"] == run["base"] else f"not {run['base']}"
        raise InputError(
            f"--model_name_or_path {run['base']}: {checkpoint} was trained from the weights of "
            f"{before['base']}, and {changed}: give that model, {advice}"
        )
    for name, flag in ADAPTER_SETTINGS.items():
        if before["adapter"] and run["adapter"] and before["adapter"][name] != run["adapter"][name]:
            raise InputError(
                f"--{flag}: the adapter in {checkpoint} has {before['adapter'][name]}, and this run's "
                f"has {run['adapter'][name]}: give what it has, {advice}"
            )
    changes = []
    if before["records"] != run["records"]:
        changes.append(f"records {before['records']} -> {run['records']}")
    elif before["texts"] != run["texts"]:
        changes.append(f"other texts in its {run['records']} records")
    for name, was in before["settings"].items():
        now = run["settings"].get(name, was)
        if was != now:
            changes.append(f"{name} {was} -> {now}")
    if before["base"] != run["base"] and not (before["weights"] and run["weights"]):
        changes.append(f"model {before['base']} -> {run['base']}")
    if changes:
        logger.train(f"this run differs from the one that wrote {checkpoint}: {', '.join(changes)}")


def is_of_run(mark, run):
    """Whether the checkpoint with this ``mark`` is of the ``run`` that its folder is of, or before it.

    Both are dicts; an empty ``run`` is that of a folder that tells of none.
    """
    identity = mark.get("run", {}).get("id")
    if not run or identity == run["id"]:
        return True
    if run["parent"] is None:
        return False
    parent, last_step = run["parent"]
    return identity == parent and mark["step"] <= last_step
