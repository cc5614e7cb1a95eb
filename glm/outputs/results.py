"""Metrics and predictions, as they stand in output_dir."""

from pathlib import Path

import paddle.distributed as dist

from glm.files import dump_json, read_json, write_atomically
from glm.outputs.layout import ALL_RESULTS


def write_results(folder, split, metrics, rows=()):
    """Write ``metrics`` as {split}_results.json, and add them to all_results.json; by the first process.

    Args:
        folder (Path): the staging folder. metrics (dict): numbers by name.
        rows (list[dict]): those of {split}_predictions.jsonl, which there is if there are any.
    """
    if dist.get_rank() or not metrics:  # there are none of training if nothing was left to train
        return
    combined, everything = Path(folder, ALL_RESULTS), {}
    if combined.exists():
        everything = read_json(combined)
    for path, values in (
        (Path(folder, f"{split}_results.json"), metrics),
        (combined, {**everything, **metrics}),
    ):
        path.write_text(dump_json(values, indent=4, sort_keys=True))
    if rows:
        write_predictions(folder, split, rows)


def write_predictions(folder, split, rows):
    """Write the ``rows``, list[dict], as JSON lines into {split}_predictions.jsonl."""
    lines = [dump_json(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(Path(folder, f"{split}_predictions.jsonl"), "".join(lines))
