"""What a run shows while it trains: a bar or lines, curves for VisualDL; what it took of memory."""

from collections.abc import Sequence
from typing import Callable, Optional

from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_callback import TrainerCallback
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.processes import gather_objects, is_first_of_run

SHOWN = 10  # best and worst predictions of an evaluation


class TrainingProgress(TrainerCallback):
    """Show a bar with loss and samples/s on a terminal, elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            desc="train",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            disable=args.disable_tqdm or not state.is_world_process_zero,
            dynamic_ncols=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        loss, rate = f"loss {logs['loss']:.4f}", f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            step = f"step {state.global_step}/{state.max_steps}"
            logger.train(f"{step}: {loss}, learning rate {logs['learning_rate']:.3g}, {rate}")
        else:
            self.bar.set_postfix_str(f"{loss}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class Curves(VisualDLCallback):
    """Add an evaluation's best and worst predictions, and its ROUGE-L histogram, to PaddleNLP's curves.

    Args:
        get_rows: returns the rows of the last evaluation, as its predictions file has them.
        fields: the names of what is shown of a row.
    """

    def __init__(self, get_rows: Callable[[], list[dict]], fields: Sequence[str]):
        super().__init__()
        self.get_rows, self.fields, self.in_training = get_rows, fields, False

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.in_training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False  # the writer stays open, for an evaluation may follow

    def on_evaluate(self, args, state, control, **kwargs):
        rows = [row for row in self.get_rows() if row["rougel"] is not None]
        # Without training the Trainer's state takes every process for the first.
        if not rows or not is_first_of_run():
            return
        if self.vdl_writer is None:  # nothing was trained
            self._init_summary_writer(args)  # PaddleNLP's: in logging_dir
        rows.sort(key=lambda row: row["rougel"])
        when = f"step {state.global_step}" if self.in_training else "at the end"
        self.show(f"worst predictions/{when}", rows[:SHOWN])
        self.show(f"best predictions/{when}", rows[::-1][:SHOWN])
        # Not eval/rougel, which is a curve: a tag of two kinds ends VisualDL's server.
        scores = [row["rougel"] for row in rows]
        self.vdl_writer.add_histogram("eval/rougel of the records", scores, state.global_step)
        self.vdl_writer.flush()

    def show(self, tag: str, rows: list[dict]):
        """Write a text for each row. VisualDL drops line breaks, and calls a text's rank its step."""
        for rank, row in enumerate(rows, 1):
            values = [f"{name}: {row[name]}" for name in self.fields]
            text = " | ".join([f"ROUGE-L {row['rougel']:.2f}", *values])
            self.vdl_writer.add_text(tag, text, rank)


def memory_metrics(kind: str, estimate: Optional[float], peak: Optional[int]) -> dict:
    """Return a run's results about memory, in GB. All processes have to call it.

    Args:
        kind: train, eval or test.
        estimate: bytes.
        peak: bytes of this process. The results hold the largest process's.
    """
    peak = max((peak for peak in gather_objects(peak) if peak is not None), default=None)
    sizes = {"estimated": estimate, "peak": peak}
    return {f"{kind}_memory_{name}_gb": size and round(size / 1e9, 3) for name, size in sizes.items()}
