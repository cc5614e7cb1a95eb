"""What PaddleNLP's Trainer gets wrong: resuming, the best model, the order of batches, speed metrics.

It goes on from a checkpoint of any precision and layout, and its results are this process's.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from paddlenlp.trainer import Trainer
from paddlenlp.trainer.trainer_callback import PrinterCallback, ProgressCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy, TrainOutput
from paddlenlp.utils.log import logger

from glm.device import memory_peak
from glm.errors import Fault, InputError, as_input_error, is_out_of_memory
from glm.outputs.checkpoints import Checkpoint
from glm.outputs.folder import RunFolder
from glm.outputs.layout import TRAINER_STATE
from glm.processes import gather_objects
from glm.training.flat_optimizer import flatten
from glm.training.memory import MemoryEstimate
from glm.training.numerics import CheckFinite, Gradients, SeedEachStep, are_finite
from glm.training.progress import TrainingProgress, memory_metrics
from glm.training.sampler import GroupedBatchSampler
from glm.training.saving import SaveCheckpoints, best_of, make_state_readable
from glm.training.stopping import EarlyStopping, EvaluationCancelled, StopBySignal
from glm.weights.adapters import merge_lora
from glm.weights.formats import read_state
from glm.weights.loading import load_checkpoint
from glm.weights.optimizer_state import read_optimizer_state


class Resume(NamedTuple):
    """Where training goes on.

    Attributes:
        step: the updates done, as the checkpoint numbers them.
        steps_ahead: how many more these are than the records of before take at this run's global
            batch size: what is left to train is counted in records.
    """

    checkpoint: Optional[Checkpoint] = None
    step: int = 0
    steps_ahead: int = 0


class ResumableTrainer(Trainer):
    """PaddleNLP's Trainer with the callbacks, the checkpoints and the results of a run here.

    Args (beside the Trainer's):
        memory (MemoryEstimate): what the run is estimated to take.
        folder (RunFolder): output_dir.
    """

    def __init__(self, *, args, memory=None, folder=None, **kwargs):
        # The Trainer's own way leaves main gradients unscaled on one process, and removes checkpoints
        # too early.
        master_grad, args.amp_master_grad = args.amp_master_grad, False
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(args=args, **kwargs)
        self.memory = memory or MemoryEstimate({})
        self.folder = folder or RunFolder(args)
        self.resume = Resume()
        self.cached_metrics = None  # of the current weights
        self.weights_step = None  # of the current weights, if not the last one of training
        self.train_memory_peak = 0  # bytes
        self.train_tokens = 0  # of the global batches, without padding
        # Callbacks act in this order. What is not finite is not saved; a signal ends the run when its
        # checkpoint is complete.
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        self.early_stopping = None
        if args.early_stopping_patience:
            self.early_stopping = EarlyStopping(args.early_stopping_patience)
            self.add_callback(self.early_stopping)
        self.check_finite = CheckFinite(self.folder.resume_hint)
        self.checkpoints = SaveCheckpoints(self.folder, save_total_limit, self.describe)
        self.stop_by_signal = StopBySignal(self.folder.resume_hint)
        callbacks = (TrainingProgress(), SeedEachStep(), Gradients(master_grad), self.check_finite)
        for callback in (*callbacks, self.checkpoints, self.stop_by_signal):
            self.add_callback(callback)

    # Training, and going on with it.

    def train(self, resume_from_checkpoint: Optional[Checkpoint] = None, **kwargs) -> TrainOutput:
        """Train. Replaces PaddleNLP's resuming, best-model loading and speed metrics."""
        args, checkpoint = self.args, resume_from_checkpoint
        self.resume = Resume(checkpoint)
        if checkpoint and not args.ignore_load_lr_and_optim:
            self.take_over(checkpoint)
            reason = self.why_finished()
            if reason:
                logger.train(f"nothing is left to train: {checkpoint} {reason}")
                return self.load_finished()
        given = args.max_steps, args.load_best_model_at_end
        args.load_best_model_at_end = False  # load_best does it, from any precision and layout
        if self.resume.steps_ahead:
            args.max_steps = self.last_step()
            logger.train(f"counted in records, what is left to train ends at step {args.max_steps}")
        memory_peak(reset=True)
        try:
            # The Trainer begins with an item() of what all send, which keeps Python's lock while it waits.
            gather_objects(None)
            with self.checkpoints.failing_as_fault(args, self.control):
                output = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
        except Exception as error:
            if self.stop_by_signal.fault:  # which a backward pass has made an exception of Paddle's
                raise self.stop_by_signal.fault from error
            if not is_out_of_memory(error):
                raise
            what = self.memory.explain(f"in training after step {self.state.global_step}", "train")
            raise Fault(f"{what}; {self.folder.resume_hint()}") from error
        args.max_steps, args.load_best_model_at_end = given
        if args.load_best_model_at_end:
            self.load_best()
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        peak = memory_metrics("train", self.memory.totals.get("train"), self.train_memory_peak)
        output.metrics.update(peak)
        return output

    def take_over(self, checkpoint: Checkpoint):
        """Take over the state of ``checkpoint``, and make up the evaluation that a signal cancelled."""
        state = self.state = checkpoint.read_state()
        state.is_world_process_zero = self.is_world_process_zero()
        self.resume = self.count_records(checkpoint, state.global_step)
        # Where nothing is left to train, nothing is compared with the best any more.
        measures = self.measures if self.resume.step < self.last_step() else {}
        kept = self.checkpoints.settle_best(self.args, state, checkpoint, measures)
        if self.early_stopping:
            count = checkpoint.evaluations_without_better if kept else 0
            self.early_stopping.early_stopping_patience_counter = count
        if checkpoint.evaluation_is_due and self.args.evaluation_strategy != IntervalStrategy.NO:
            self._load_from_checkpoint(checkpoint)
            self.checkpoints.compare_with_best(self.args, state, self.evaluate(), checkpoint.path)

    def count_records(self, checkpoint: Checkpoint, step: int) -> Resume:
        """Return where training goes on from the ``step`` of ``checkpoint``, counted in records."""
        size, now = checkpoint.global_batch_size, self.args.global_batch_size
        if self.args.max_steps > 0:  # --max_steps counts steps
            return Resume(checkpoint, step)
        ahead = checkpoint.steps_ahead
        if size and size != now:
            ahead = step - round((step - ahead) * size / now)
        return Resume(checkpoint, step, ahead)

    def last_step(self) -> int:
        """Return the number of the last step."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        epoch = len(self._get_train_sampler()) // self.args.gradient_accumulation_steps
        return int(epoch * self.args.num_train_epochs) + self.resume.steps_ahead

    def why_finished(self) -> Optional[str]:
        """Return why nothing is left to train, or None."""
        args, step, last_step = self.args, self.resume.step, self.last_step()
        if step >= last_step:
            given = f"--max_steps {args.max_steps} ends"
            if args.max_steps <= 0:
                records = f"over {len(self.train_dataset)} records end"
                given = f"--num_train_epochs {args.num_train_epochs:g} {records}"
            return f"is of step {step}, and {given} this run at step {last_step}"
        patience, early_stopping = args.early_stopping_patience, self.early_stopping
        if early_stopping and early_stopping.early_stopping_patience_counter >= patience:
            return f"is of step {step}, where --early_stopping_patience {patience} ended this run"
        return None

    def load_finished(self) -> TrainOutput:
        """Load the weights of a run that had come to its end: the Trainer would go a step further."""
        if self.args.load_best_model_at_end:
            self.load_best()
        if self.weights_step is None and self.cached_metrics is None:  # else they are there
            self._load_from_checkpoint(self.resume.checkpoint)
        return TrainOutput(self.state.global_step, None, {})

    # The best checkpoint.

    @property
    def measures(self) -> dict:
        """What the values of an evaluation depend on: see Checkpoint.measures."""
        return {}

    def describe(self) -> dict:
        """Return what the manifest of a checkpoint says of this run's progress."""
        values = {"steps_ahead": self.resume.steps_ahead}
        values.update(best_of=best_of(self.args), measures=self.measures)
        if self.early_stopping:
            values["evaluations_without_better"] = self.early_stopping.early_stopping_patience_counter
        return values

    def load_best(self):
        """Load the weights of the best checkpoint, unless they are the current ones or gone."""
        recorded, last_step = self.state.best_model_checkpoint, self.state.global_step
        if not recorded or Path(recorded).name == f"checkpoint-{last_step}":
            return
        best = self.folder.find_best(recorded, compare_files=False)
        if best is None:
            return
        self._load_from_checkpoint(best)
        self.cached_metrics, self.weights_step = None, best.step
        logger.train(f"the weights are those of {best}, the best up to step {last_step}")

    # Batches.

    def of_this_batch(self, numbers: np.ndarray) -> int:
        """Return the one of ``numbers``, of an epoch's global batches, that is of the current batch."""
        # With ignore_data_skip the Trainer begins an epoch anew where it goes on.
        begun = self.resume.step if self.args.ignore_data_skip else 0
        return int(numbers[(self.state.global_step - begun) % len(numbers)])

    def training_step(self, *args, **kwargs):
        """Count the tokens of a batch, and record its loss."""
        self.cached_metrics, step = None, self.state.global_step
        loss = self.check_finite.record_loss(super().training_step(*args, **kwargs), step + 1)
        tokens = self.of_this_batch(self.train_sampler.tokens)
        self.train_tokens += tokens / self.args.gradient_accumulation_steps
        return loss

    def make_sampler(self, dataset, **kwargs) -> GroupedBatchSampler:
        """Return a sampler of this process's batches."""
        layout = {"num_replicas": self.args.dataset_world_size, "rank": self.args.dataset_rank}
        return GroupedBatchSampler(dataset, seed=self.args.seed, **layout, **kwargs)

    # Metrics.

    def evaluate(self, *args, **kwargs) -> dict:
        """Evaluate; weights that were evaluated already keep their results."""
        if self.cached_metrics is None:
            try:
                self.cached_metrics = super().evaluate(*args, **kwargs)
            except InputError as error:  # the model that is evaluated is no mistake of the user's then
                if not self.args.do_train:
                    raise
                self.check_finite.stop(
                    f"model can't be evaluated at step {self.current_step} ({error})", self.args
                )
            except EvaluationCancelled:
                event = self.args, self.state, self.control
                self.stop_by_signal.save_unevaluated(*event)
                if self.checkpoints.saving is None:
                    self.checkpoints.on_step_end(*event)
        return self.cached_metrics

    def evaluation_loop(self, *args, **kwargs):
        """Run the Trainer's loop; a signal cancels it in training."""
        with self.stop_by_signal.cancelling(self.is_in_train):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs, **kwargs):
        """Log the numbers that there are, and keep the history, which PaddleNLP 3 empties.

        trainer_state.json and a resumed run hold it.
        """
        if "train_loss" in logs:
            self.correct_speed_metrics(logs)
        numbers = {name: value for name, value in logs.items() if value is not None}
        history, self.state.log_history = self.state.log_history, []
        super().log(numbers, **kwargs)
        logs.update(numbers)
        history.append({**numbers, "step": self.state.global_step})
        self.state.log_history = history

    def correct_speed_metrics(self, metrics: dict):
        """Correct the Trainer's ``metrics``, which are of all steps and, in part, of one process."""
        step, first_step = self.state.global_step, self.resume.step
        steps = step - first_step
        # Of the steps after the last log each process has added up its own part.
        metrics["train_loss"] = float(np.mean(gather_objects(metrics["train_loss"]))) * step / steps
        for name in ("train_samples_per_second", "train_steps_per_second"):
            metrics[name] = round(metrics[name] * steps / self.state.max_steps, 4)
        metrics["train_first_step"], metrics["train_last_step"] = first_step + 1, step
        metrics["train_skipped_steps"] = self.check_finite.skipped
        tokens_per_second = self.train_tokens / metrics["train_runtime"]
        metrics["train_tokens_per_second"] = round(tokens_per_second, 2)

    @property
    def current_step(self):
        """The step that the current weights are of."""
        return self.weights_step or self.state.global_step

    def writing(self):
        """Return the context in which the trained model is written: a signal ends the run behind it."""
        return self.stop_by_signal.writing(self.args, self.state)

    def save_trained(self, folder):
        """Write the trained model, or the adapter alone, and the Trainer's state."""
        self.save_model(str(folder), merge_tensor_parallel=self.args.tensor_parallel_degree > 1)
        if self.args.should_save:
            self.state.save_to_json(folder / TRAINER_STATE)
            make_state_readable(folder / TRAINER_STATE)

    def save_merged(self, folder):
        """Write the model with the adapter in its weights, which stays in them."""
        model = merge_lora(self.model)
        if not are_finite(model.parameters()):
            raise Fault("the merged weights are not finite: merge them by --bf16 True or in float32")
        self.cached_metrics, folder = None, str(folder)
        if self.args.should_save:
            self.tokenizer.save_pretrained(folder)
        if self.args.should_save_model_state:
            model.save_pretrained(
                folder,
                merge_tensor_parallel=self.args.tensor_parallel_degree > 1,
                variant=self.args.weight_name_suffix,
                is_main_process=self.args.should_save,
                max_shard_size="1024GB",
            )

    # What follows overrides private methods of PaddleNLP's Trainer, which its next release may rename.

    # Its samplers shuffle otherwise on one process than on several, and don't group by length. The
    # public way round them, get_train_dataloader and get_eval_dataloader, would be a copy of both.
    def _get_train_sampler(self):
        self.train_sampler = self.make_sampler(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            global_batch_size=self.args.global_batch_size,
            shuffle=True,
            group_by_length=self.args.group_by_length,
            steps_ahead=self.resume.steps_ahead,
        )
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset):
        # From long to short, so that a batch has little padding, and of no more records than are.
        replicas, batch_size = self.args.dataset_world_size, self.args.per_device_eval_batch_size
        batch_size = min(batch_size, -(-len(eval_dataset) // replicas))
        return self.make_sampler(eval_dataset, batch_size=batch_size, global_batch_size=batch_size * replicas)

    # A checkpoint may be of another precision and layout than this run, and theirs know the current
    # layout alone.
    def _load_from_checkpoint(self, checkpoint=None):
        if checkpoint is not None:
            with loading(checkpoint):
                load_checkpoint(checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.ignore_load_lr_and_optim:
            return
        # multi_precision: O2 trains float32 master weights of the half-precision ones.
        half = self.args.fp16 or self.args.bf16
        master_weights = self.args.fp16_opt_level == "O2" and half
        names, scaler = self.resume.checkpoint.parameters, Path(checkpoint, "scaler.pdparams")
        with loading(checkpoint):
            state = read_optimizer_state(checkpoint, self.optimizer, self.model, names, master_weights)
            # paddle.load would run what these files hold.
            schedule = read_state(Path(checkpoint, "scheduler.pdparams"), self.lr_scheduler.state_dict())
            self.optimizer.set_state_dict({"LR_Scheduler": schedule, **state})
            if self.do_grad_scaling and scaler.exists():
                self.scaler.load_state_dict(read_state(scaler, self.scaler.state_dict()))
        # Which computes the rate anew, by this run's --learning_rate.
        self.lr_scheduler.step(self.resume.step - self.resume.steps_ahead)

    # The schedule is of this run's global batches.
    def create_optimizer_and_scheduler(self, num_training_steps):
        super().create_optimizer_and_scheduler(num_training_steps - self.resume.steps_ahead)
        self.optimizer = flatten(self.optimizer, self.model, self.args)

    # The forward pass casts what it has to. Autocast would look at each operator for it, so it is left at
    # once: a GradScaler that finds no trace of it scales nothing.
    def autocast_smart_context_manager(self):
        with super().autocast_smart_context_manager():
            return contextlib.nullcontext()

    # PaddleNLP 3 waits here for the loss of every step. CheckFinite does when one is logged.
    def _check_loss_valid(self, loss):
        """Nothing to check."""

    def _get_item_from_loss(self, loss):
        return self.check_finite.loss_to_log(loss, self.args)

    # The Trainer's fails where the GPU build runs on a CPU, and SeedEachStep needs no state.
    def _load_rng_state(self, checkpoint):
        """Nothing to load."""


def loading(checkpoint):
    """Return a context that turns an exception of a library into an InputError about the checkpoint."""
    return as_input_error(f"{checkpoint} can't be loaded", "remove it to go on from the checkpoint before it")
