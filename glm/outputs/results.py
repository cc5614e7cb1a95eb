"""Metrics and predictions, as they stand in output_dir."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import paddle.distributed as dist

from glm.files import dump_json, read_json, write_atomically
from glm.outputs.layout import ALL_RESULTS

MOST_RESULTS, LONGEST_NAME = 1000, 100  # of all_results.json: a run writes some forty


def read_results(folder: Path) -> dict:
    """Return the numbers by name in a folder's all_results.json, to which a run adds its own."""
    with contextlib.suppress(OSError, ValueError):
        values = read_json(Path(folder, ALL_RESULTS)).items()
        # Nested lists of a stranger's would be larger each time that they are written.
        numbers = [(name, value) for name, value in values if isinstance(value, (int, float, type(None)))]
        return {name: value for name, value in numbers[:MOST_RESULTS] if len(name) <= LONGEST_NAME}
    return {}


def write_results(folder: Path, split: str, metrics: dict, rows: Sequence[dict] = ()):
    """Write ``metrics`` as {split}_results.json, and add them to all_results.json; by the first process.

    Args:
        folder: the staging folder. metrics: numbers by name.
        rows: those of {split}_predictions.jsonl, which there is if there are any.
    """
    if dist.get_rank() or not metrics:  # there are none of training if nothing was left to train
        return
    everything = {**read_results(folder), **metrics}
    for name, values in ((f"{split}_results.json", metrics), (ALL_RESULTS, everything)):
        Path(folder, name).write_text(dump_json(values, indent=4, sort_keys=True), encoding="utf-8")
    if rows:
        write_predictions(folder, split, rows)


def write_predictions(folder: Path, split: str, rows: Sequence[dict]):
    """Write the ``rows`` as JSON lines into {split}_predictions.jsonl."""
    lines = [dump_json(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(Path(folder, f"{split}_predictions.jsonl"), "".join(lines))
