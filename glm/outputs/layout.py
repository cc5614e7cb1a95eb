"""The names of all files in output_dir and in a checkpoint, and the patterns that tell them apart."""

import re
from collections.abc import Collection
from pathlib import Path

LOCK = ".lock"  # in output_dir: held by the run that writes there
RUN = ".run.json"  # in output_dir: the run that the folder is of, and the step of the model there
ARGUMENTS = "arguments.json"  # in output_dir: the arguments of the last training, as they were in effect
UNFINISHED = ".unfinished"  # in output_dir: where a run writes what is then moved into place
REPLACED = ".replaced"  # the last file written there: the names in output_dir that go
SUPERSEDED = "superseded-"  # in output_dir: folders of the checkpoints that a run moved aside
CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})", re.ASCII)
MANIFEST = ".checkpoint_done"  # a checkpoint's last file: the sizes and checksums of the others
INCOMPLETE = ".incomplete"  # a checkpoint's first file, until its manifest is written: by which run
TRAINER_STATE = "trainer_state.json"

# The forms that a model has, as PaddleNLP and PyTorch write them: complete, a process's part, shards and
# their index. A copy under another name is the user's.
TWO, FIVE = "[0-9]" * 2, "[0-9]" * 5
PARTS = ("", f".tp{TWO}", f".shard{TWO}", f".tp{TWO}_shard{TWO}")
WEIGHT_FILES = (("model_state", ".pdparams"), ("model", ".safetensors"), ("pytorch_model", ".bin"))
WHOLE_MODEL = tuple(
    pattern
    for name, kind in WEIGHT_FILES
    for part in PARTS
    for pattern in (
        f"{name}{part}{kind}",
        f"{name}{part}-{FIVE}-of-{FIVE}{kind}",
        f"{name}{kind}.index{part}.json",
    )
)
ADAPTER = ("lora_config.json", "lora_base.json", *(f"lora_model_state{part}.pdparams" for part in PARTS))
DESCRIPTIONS = ("config.json", "added_tokens.json", "special_tokens_map.json")
MODEL = (*WHOLE_MODEL, *ADAPTER, *DESCRIPTIONS)

ALL_RESULTS = "all_results.json"
TORCH = "torch"  # the folder of --export_torch
TOKENIZER = ("cog-pretrain.model", "tokenizer_config.json")
EXPORTED = ("model.safetensors", *DESCRIPTIONS, *TOKENIZER)  # its files
PUBLISHED = "*_glm.py"  # what a user puts beside them
RESULTS = (
    *(f"{split}_results.json" for split in ("train", "eval", "test")),
    ALL_RESULTS,
    *(f"{split}_predictions.jsonl" for split in ("eval", "test")),
    TRAINER_STATE,
    TORCH,
)

# What a run leaves in output_dir besides its model, and what its launcher does.
TRACES = (
    RUN,
    "checkpoint-*",
    f"{SUPERSEDED}*",
    "runs/*",
    "*_results.json",
    "*_predictions.jsonl*",
    "workerlog.*",
    "*/workerlog.*",
)


# All that a run writes beside its results.
WRITTEN = (*MODEL, *TOKENIZER, "generation_config.json", "training_args.bin")
# What a fingerprint is of, as old versions took it.
WEIGHTS = (
    *("model_state*.pdparams", "model*.safetensors", "pytorch_model*.bin", "model*.index.json"),
    *("pytorch_model*.index.json", "lora_config.json", "lora_base.json", "lora_model_state*"),
)


def find(folder: Path, patterns: Collection[str]) -> list[Path]:
    """Return the paths in ``folder`` that match any of the glob ``patterns``, sorted."""
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
