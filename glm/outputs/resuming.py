"""Whether a run may go on from a checkpoint, and in what it differs from the run that wrote it."""

import hashlib
import os
from typing import Optional

from paddlenlp.utils.log import logger

from glm.errors import InputError, printable
from glm.outputs.checkpoints import Checkpoint
from glm.outputs.layout import TRAINER_STATE

# What --ignore_load_lr_and_optim does without: the pattern of each file that an optimizer's state has.
OPTIMIZER_FILES = {"optimizer.pdopt": "optimizer[-.]*", "scheduler.pdparams": "scheduler.pdparams"}
BESIDE_WEIGHTS = (*OPTIMIZER_FILES.values(), "scaler.pdparams", TRAINER_STATE)

# The arguments that change what a step computes or which model is the best, in the order of a message.
SETTINGS = (
    *("max_steps", "num_train_epochs", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("warmup_ratio", "lr_decay_ratio", "label_smoothing", "weight_decay", "max_grad_norm"),
    *("source_template", "target_template", "truncation", "src_length", "tgt_length", "group_by_length"),
    *("metric_for_best_model", "greater_is_better"),
)
ADAPTER_FLAGS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
    "rslora": "rslora",
}


def check_files(checkpoint: Checkpoint, lora: bool, degree: int, weights_alone: bool, given: bool):
    """Raise InputError where a file is missing, or is none, that the run goes on with.

    Args:
        lora: whether this run trains an adapter.
        degree: of this run's tensor parallelism.
        weights_alone: whether it takes the weights alone.
        given: whether the user named the checkpoint.
    """
    where = f"--resume_from_checkpoint {checkpoint}" if given else str(checkpoint)

    def has(pattern):
        return any(checkpoint.path.glob(pattern))

    whole, adapter = has("model[-_]*"), has("lora_model_state*")
    if not (adapter if lora else whole):
        name = "lora_model_state.pdparams" if lora else "model_state.pdparams"
        other = f" of a run {'with' if lora else 'without'} --lora True" if whole or adapter else ""
        raise InputError(f"{where} has no {name}: give a run's checkpoint-N folder{other}")
    if weights_alone:
        return
    missing = [name for name, pattern in OPTIMIZER_FILES.items() if not has(pattern)]
    if missing:
        otherwise = "leave it out" if given else "start anew by --overwrite_output_dir"
        raise InputError(
            f"{where} has no {' and no '.join(missing)}: give --ignore_load_lr_and_optim True, which takes "
            f"its weights and begins at step 1, or {otherwise}"
        )
    if not os.path.lexists(checkpoint.path / TRAINER_STATE):
        raise InputError(f"{where} has no {TRAINER_STATE}: give a run's checkpoint-N folder")
    checkpoint.read_state()
    # Without ``parameters`` weights are known by the names that Paddle gave them, which depend on the layout.
    saved = len({path.name[:14] for path in checkpoint.path.glob("optimizer.tp*")}) or 1
    if saved != degree and checkpoint.parameters is None:
        raise InputError(
            f"{checkpoint} was saved with tensor_parallel_degree {saved} and no names of its "
            f"weights, and can't be resumed with {degree}: give --tensor_parallel_degree {saved}, "
            "or start anew with --overwrite_output_dir"
        )


def keep_global_batch_size(args, size: Optional[int]):
    """Let each update be of as many records as before: with others the order of the data would change.

    Args:
        args (GLMTrainingArguments): whose gradient_accumulation_steps changes.
        size: of the checkpoint's updates, or None where that is not known.
    """
    now = args.global_batch_size
    if size in (None, now):
        return
    passes = now // args.gradient_accumulation_steps
    if size % passes:
        logger.warning(
            f"the checkpoint's steps are of {size} records and this run's of {now}: "
            "the order of the data, the schedule and the number of steps become this run's"
        )
        return
    args.gradient_accumulation_steps = size // passes
    logger.train(
        f"the checkpoint's steps are of {size} records: this run takes gradient_accumulation_steps "
        f"{args.gradient_accumulation_steps} for as many"
    )


def describe_training(arguments: dict, pretrained, records: list) -> dict:
    """Return what a manifest says of a run: see Checkpoint.described.

    Args:
        arguments: of all groups. pretrained (Pretrained): what training starts from.
        records: to train on, dicts.
    """
    base, lora_config = pretrained.name, pretrained.adapter and pretrained.adapter.config
    settings = {name: arguments.get(name) for name in SETTINGS}
    # The other of these two is not looked at.
    settings["num_train_epochs" if settings["max_steps"] > 0 else "max_steps"] = None
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        texts = [text for name, text in record.items() if name not in ("id", "where")]
        digest.update("\0".join([*texts, ""]).encode("utf-8", "surrogatepass"))
    return {
        "base": os.path.realpath(base) if os.path.isdir(base) else base,
        "weights": pretrained.fingerprint,
        "records": len(records),
        "texts": digest.hexdigest(),
        "adapter": {name: getattr(lora_config, name) for name in ADAPTER_FLAGS} if lora_config else None,
        "settings": settings,
    }


def compare_training(checkpoint: Checkpoint, now: dict, replaced: bool, given: bool):
    """Say in a line in what a run differs from the one that wrote ``checkpoint``.

    Args:
        now: the run, as describe_training returns it.
        replaced: whether the checkpoint's run wrote its model over the one that it started from.
        given: whether the user named the checkpoint.

    Raises:
        InputError: where going on makes no sense, with another base or another adapter.
    """
    before = checkpoint.described
    if "settings" not in before:
        return
    anew = "leave out --resume_from_checkpoint" if given else "start anew with --overwrite_output_dir"
    advice = f"or {anew}, or give another --output_dir"
    base, weights, adapter = (before.get(name) for name in ("base", "weights", "adapter"))
    if weights and now["weights"] and weights != now["weights"] and not replaced:
        changed = "those have changed since" if base == now["base"] else f"not {now['base']}"
        raise InputError(
            f"--model_name_or_path {now['base']}: {checkpoint} was trained from the weights of "
            f"{base}, and {changed}: give that model, {advice}"
        )
    for name, flag in ADAPTER_FLAGS.items():
        if adapter and now["adapter"] and adapter.get(name) != now["adapter"][name]:
            raise InputError(
                f"--{flag}: the adapter in {checkpoint} has {adapter.get(name)}, and this run's "
                f"has {now['adapter'][name]}: give what it has, {advice}"
            )
    changes = []
    if before.get("records") != now["records"]:
        changes.append(f"records {before.get('records')} -> {now['records']}")
    elif before.get("texts") != now["texts"]:
        changes.append(f"other texts in its {now['records']} records")
    settings = before["settings"] or {}
    for name, value in now["settings"].items():
        if settings.get(name, value) != value:
            changes.append(f"{name} {settings[name]} -> {value}")
    if base != now["base"] and not (weights and now["weights"]):
        changes.append(f"model {base} -> {now['base']}")
    if changes:
        differs = f"this run differs from the one that wrote {checkpoint}: {', '.join(changes)}"
        logger.train(printable(differs))
