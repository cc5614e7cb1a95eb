"""PaddleNLP's Trainer, repaired: it goes on from a checkpoint of any layout, and says what it did."""

import contextlib
from pathlib import Path

from paddlenlp.trainer import Trainer
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_callback import PrinterCallback, ProgressCallback
from paddlenlp.trainer.trainer_utils import TrainOutput
from paddlenlp.utils.log import logger

from glm.errors import Fault, as_input_error, is_out_of_memory
from glm.outputs.folder import RunFolder
from glm.training.memory import MemoryEstimate, memory_metrics, memory_peak
from glm.training.numerics import CheckFinite, Gradients, SeedEachStep
from glm.training.progress import Curves, TrainingProgress
from glm.training.saving import SaveCheckpoints
from glm.training.stopping import EarlyStopping, StopBySignal
from glm.weights.adapters import merge_lora
from glm.weights.formats import read_state
from glm.weights.loading import load_checkpoint
from glm.weights.optimizer_state import read_optimizer_state


class ResumableTrainer(Trainer):
    """PaddleNLP's Trainer with the callbacks, the checkpoints and the results of a run here.

    Its samplers are GroupedBatchSamplers, which know the tokens of each batch.

    Args (beside the Trainer's):
        memory (MemoryEstimate): what the run is estimated to take.
        folder (RunFolder): output_dir.
    """

    def __init__(self, *, args, memory=None, folder=None, **kwargs):
        # The Trainer's own way leaves main gradients unscaled on one process, and removes
        # checkpoints too early.
        master_grad, args.amp_master_grad = args.amp_master_grad, False
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(args=args, **kwargs)
        self.memory = memory or MemoryEstimate({})
        self.cached_metrics = None  # the metrics of the weights as they are
        self.rows = []  # the last predictions, as the predictions file has them
        self.first_step = 0  # the step that training goes on from
        self.weights_step = None  # of the weights at hand, if not the last one of training
        self.train_memory_peak = 0  # bytes
        self.train_tokens = 0  # of the global batches, without padding
        self.early_stopping = None
        self.folder = folder or RunFolder(args)
        self.check_finite = CheckFinite(self.folder.resume_hint)
        self.stop_by_signal = StopBySignal(self.folder.resume_hint)
        self.add_callbacks(master_grad, save_total_limit)

    def add_callbacks(self, master_grad, save_total_limit):
        """Replace the Trainer's own callbacks. Their order is that in which they act."""
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        if self.pop_callback(VisualDLCallback):  # by --report_to
            self.add_callback(Curves(lambda: self.rows))
        if self.args.early_stopping_patience:
            self.early_stopping = EarlyStopping(self.args.early_stopping_patience)
            self.add_callback(self.early_stopping)
        self.checkpoints = SaveCheckpoints(self.folder, save_total_limit, self.early_stopping, self.evaluate)
        self.add_callback(TrainingProgress)
        self.add_callback(SeedEachStep)
        self.add_callback(Gradients(master_grad))
        # What is not finite is not saved; a signal ends the run when its checkpoint is
        # whole.
        self.add_callback(self.check_finite)
        self.add_callback(self.checkpoints)
        self.add_callback(self.stop_by_signal)

    def in_batch(self, numbers):
        """The one of ``numbers``, an epoch's global batches', that is of the batch at hand, int."""
        # With ignore_data_skip the Trainer begins an epoch anew where it goes on.
        begun = self.first_step if self.args.ignore_data_skip else 0
        return int(numbers[(self.state.global_step - begun) % len(numbers)])

    def training_step(self, *args, **kwargs):
        """The Trainer's, with its loss noted and its tokens counted."""
        self.cached_metrics, step = None, self.state.global_step
        loss = self.check_finite.record_loss(super().training_step(*args, **kwargs), step + 1)
        tokens = self.in_batch(self.train_sampler.tokens)
        self.train_tokens += tokens / self.args.gradient_accumulation_steps
        return loss

    def train(self, resume_from_checkpoint=None, **kwargs):
        """The Trainer's, repaired: each method called here says what of."""
        args, checkpoint = self.args, resume_from_checkpoint
        self.resumed = checkpoint
        if checkpoint and not args.ignore_load_lr_and_optim:
            state = checkpoint.read_state()
            self.first_step = state.global_step
            if self.early_stopping:
                count = checkpoint.evaluations_without_better
                self.early_stopping.early_stopping_patience_counter = count
            reason = self.why_finished(state.global_step)
            if reason:
                logger.train(f"nothing is left to train: {checkpoint} {reason}")
                return self.load_finished(checkpoint, state)
        # load_best loads it, from any precision and layout.
        best_at_end, args.load_best_model_at_end = args.load_best_model_at_end, False
        memory_peak(reset=True)
        try:
            with self.loading(checkpoint), self.checkpoints.failing_as_fault(args, self.control):
                output = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
        except Exception as error:
            if self.stop_by_signal.fault:  # which a backward pass has made an exception of Paddle's
                raise self.stop_by_signal.fault from error
            if not is_out_of_memory(error):
                raise
            step = self.state.global_step
            what = self.memory.explain(f"in training after step {step}", "train")
            raise Fault(f"{what}; {self.folder.resume_hint()}") from error
        args.load_best_model_at_end = best_at_end
        if best_at_end:
            self.load_best()
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        peak = memory_metrics("train", self.memory.totals.get("train"), self.train_memory_peak)
        output.metrics.update(peak)
        return output

    def why_finished(self, step):
        """Why nothing is left to train after ``step``, str, or None."""
        args = self.args
        if args.max_steps > 0:
            last_step, given = args.max_steps, f"--max_steps {args.max_steps} ends"
        else:
            passes = len(self._get_train_sampler())
            epoch = passes // args.gradient_accumulation_steps
            last_step = int(epoch * args.num_train_epochs)
            records = f"over {len(self.train_dataset)} records end"
            given = f"--num_train_epochs {args.num_train_epochs:g} {records}"
        if step >= last_step:
            return f"is of step {step}, and {given} this run at step {last_step}"
        if self.early_stopping and self.early_stopping.is_due():
            patience = f"--early_stopping_patience {args.early_stopping_patience}"
            return f"is of step {step}, where {patience} ended this run"
        return None

    def load_finished(self, checkpoint, state):
        """Load the weights of a run that had come to its end: the Trainer would go a step further."""
        self.state, best = state, None
        if checkpoint.evaluation_is_due:
            with self.loading(checkpoint):
                self._load_from_checkpoint(checkpoint)
            self.checkpoints.make_up_evaluation(self.args, state)
        if state.best_model_checkpoint:
            best = self.folder.find_best(state.best_model_checkpoint)
            state.best_model_checkpoint = best and str(best)
        if best and self.args.load_best_model_at_end:
            if best.step != checkpoint.step:
                self.cached_metrics = None
            checkpoint, self.weights_step = best, best.step
        with self.loading(checkpoint):
            self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, None, {})

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

    def log(self, logs, **kwargs):
        """The Trainer's, of the numbers that there are, and with the history that PaddleNLP 3 empties.

        trainer_state.json and a resumed run hold the history.
        """
        if "train_loss" in logs:
            self.correct_speed_metrics(logs)
        numbers = {name: value for name, value in logs.items() if value is not None}
        history, self.state.log_history = self.state.log_history, []
        super().log(numbers, **kwargs)
        logs.update(numbers)
        history.append({**numbers, "step": self.state.global_step})
        self.state.log_history = history

    def correct_speed_metrics(self, metrics):
        """Make of the Trainer's ``metrics``, which it takes for the whole run's, this process's."""
        step = self.state.global_step
        steps = step - self.first_step
        metrics["train_loss"] *= step / steps
        for name in ("train_samples_per_second", "train_steps_per_second"):
            metrics[name] = round(metrics[name] * steps / self.state.max_steps, 4)
        metrics["train_first_step"], metrics["train_last_step"] = self.first_step + 1, step
        metrics["train_skipped_steps"] = self.check_finite.skipped
        tokens_per_second = self.train_tokens / metrics["train_runtime"]
        metrics["train_tokens_per_second"] = round(tokens_per_second, 2)

    def save_merged(self, folder):
        """Write the whole model with the adapter in its weights, which stays in them."""
        model = merge_lora(self.model)
        self.cached_metrics = None
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

    @contextlib.contextmanager
    def loading(self, checkpoint):
        """Tell a damaged ``checkpoint`` from a bug: before training begins, by an InputError."""
        try:
            yield
        except Exception as error:
            begun = bool(self.stop_by_signal.handlers_before)
            if checkpoint is None or begun or is_out_of_memory(error):
                raise
            advice = "remove it to go on from the checkpoint before it"
            with as_input_error(f"{checkpoint} can't be loaded", advice):
                raise error

    # What follows overrides private methods of PaddleNLP's Trainer, which its next
    # release may rename. A checkpoint may be of another precision and layout than this
    # run, and theirs know the layout at hand alone.
    def _load_from_checkpoint(self, checkpoint=None):
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.ignore_load_lr_and_optim:
            return
        # multi_precision: O2 trains float32 master weights of the half-precision ones.
        half = self.args.fp16 or self.args.bf16
        master_weights = self.args.fp16_opt_level == "O2" and half
        names = self.resumed.parameters
        state = read_optimizer_state(checkpoint, self.optimizer, self.model, names, master_weights)
        self.optimizer.set_state_dict(state)
        # paddle.load would run what these files hold.
        schedule = Path(checkpoint, "scheduler.pdparams")
        self.lr_scheduler.set_state_dict(read_state(schedule, self.lr_scheduler.state_dict()))
        scaler = Path(checkpoint, "scaler.pdparams")
        if self.do_grad_scaling and scaler.exists():
            self.scaler.load_state_dict(read_state(scaler, self.scaler.state_dict()))

    # PaddleNLP 3 waits here for the loss of every step. CheckFinite does when one is logged.
    def _check_loss_valid(self, loss):
        """Nothing to check."""

    def _get_item_from_loss(self, loss):
        return self.check_finite.loss_to_log(loss, self.args)

    # The Trainer's fails where the GPU build runs on a CPU, and SeedEachStep needs no
    # state.
    def _load_rng_state(self, checkpoint):
        """Nothing to load."""
