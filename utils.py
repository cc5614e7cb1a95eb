"""GLMTrainer: the loss and the evaluation inside PaddleNLP's Trainer; a row of the predictions file."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import paddle
from paddle.distributed import fleet
from paddlenlp.trainer import Trainer
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from paddlenlp.trainer.trainer_utils import SchedulerType, TrainOutput
from paddlenlp.utils.log import logger
from tqdm import tqdm

from data import decode_target
from glm.callbacks import (
    CheckFinite,
    Curves,
    EarlyStopping,
    Gradients,
    SeedEachStep,
    StopBySignal,
    TrainingProgress,
)
from glm.checkpoints import WholeCheckpoints, read_mark, write_whole
from glm.errors import mistakes
from glm.generation import beam_search
from glm.lora import merge_lora
from glm.memory import memory_metrics, memory_peak
from glm.metrics import compute_metrics, rouge
from glm.modeling import prepare_for_training, target_losses
from glm.processes import gather_objects
from glm.sampler import GroupedBatchSampler
from glm.weights import load_checkpoint, read_optimizer_state


def prediction_row(tokenizer, record, hypotheses, candidates=False):
    """What a predictions file holds of a record, dict.

    Args: hypotheses: list of (token ids, score), the best first. candidates (bool): whether to show them all.
    """
    shown = [
        {"prediction": decode_target(tokenizer, token_ids), "score": score, "token_ids": token_ids}
        for token_ids, score in hypotheses
    ]
    row = {key: record[key] for key in ("id", "context", "answer")}
    row.update(reference=record["question"], **shown[0])
    row["rougel"] = None if row["reference"] is None else rouge(row["prediction"], row["reference"])["rougel"]
    return {**row, "candidates": shown} if candidates else row


class GLMTrainer(Trainer):
    """PaddleNLP's Trainer with the label-smoothed loss, the decaying schedule and evaluation by beam search.

    Args (beside the Trainer's):
        generation (GenerationArguments): how evaluation generates.
        memory (dict): the bytes that "train" and "eval" are estimated to take, for the results.
    """

    def __init__(self, *, args, generation, memory=None, **kwargs):
        # The Trainer's own way leaves main gradients unscaled on one process, and removes checkpoints too early.
        master_grad, args.amp_master_grad = args.amp_master_grad, False
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(args=args, **kwargs)
        self.generation = generation
        prepare_for_training(self.model)
        self.tensor_parallel_group = None
        if self.args.tensor_parallel_degree > 1:
            self.tensor_parallel_group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        for callback in (ProgressCallback, PrinterCallback):
            self.pop_callback(callback)
        if self.pop_callback(VisualDLCallback):  # by --report_to
            self.add_callback(Curves(lambda: self.rows))
        self.check_finite, self.checkpoints = CheckFinite(), WholeCheckpoints(save_total_limit)
        self.stop_by_signal = StopBySignal()
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStopping(self.args.early_stopping_patience))
        # What is not finite is not saved, and a signal ends the run when its checkpoint is whole.
        self.add_callback(TrainingProgress)
        self.add_callback(SeedEachStep)
        self.add_callback(Gradients(master_grad))
        self.add_callback(self.check_finite)
        self.add_callback(self.checkpoints)
        self.add_callback(self.stop_by_signal)
        self.evaluated, self.rows = None, []  # the metrics of the weights as they are; the last predictions
        self.memory = memory or {}
        self.train_memory_peak = 0  # bytes
        self.train_tokens = 0  # of the global batches, without padding

    def target_losses(self, model, inputs):
        smoothing, group = self.args.label_smoothing, self.tensor_parallel_group
        return target_losses(self.model, model, inputs, smoothing, group)

    # training

    def compute_loss(self, model, inputs, return_outputs=False):
        """The mean over the batch's target tokens, the end token included.

        In training the batch is the global one. Every process knows the number of its target
        tokens, and divides its own sum by it, times the processes and passes that gradients are
        averaged over afterwards.
        """
        losses = self.target_losses(model, inputs)
        loss_weight = 1 / len(losses)
        if self.is_in_train:
            target_tokens = self.train_sampler.target_tokens
            tokens = int(target_tokens[self.state.global_step % len(target_tokens)])
            loss_weight = self.args.dataset_world_size * self.args.gradient_accumulation_steps / tokens
        loss = losses.sum() * loss_weight
        return (loss, losses) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        """The Trainer's, with its loss noted."""
        self.evaluated, step = None, self.state.global_step
        loss = self.check_finite.note(super().training_step(*args, **kwargs), step + 1)
        tokens = self.train_sampler.tokens
        self.train_tokens += tokens[step % len(tokens)] / self.args.gradient_accumulation_steps
        return loss

    def train(self, resume_from_checkpoint=None, **kwargs):
        """The Trainer's, repaired: each method called here says what of."""
        first_step, best_at_end = 0, self.args.load_best_model_at_end
        if resume_from_checkpoint:
            with self.loading(resume_from_checkpoint):
                path = Path(resume_from_checkpoint, "trainer_state.json")
                state = TrainerState.load_from_json(path)
            first_step = state.global_step
            if first_step >= self.last_step():
                return self.load_finished(resume_from_checkpoint, state)
        self.args.load_best_model_at_end = False  # load_best does, from any precision and layout
        memory_peak(reset=True)
        with self.loading(resume_from_checkpoint):
            with self.checkpoints.failing_as_fault(self.args, self.control):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.args.load_best_model_at_end = best_at_end
        if best_at_end:
            self.load_best()
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        self.complete(output.metrics, first_step)
        return output

    def last_step(self):
        """The number of the step that training ends with, as the Trainer counts it."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps_an_epoch = len(self._get_train_sampler()) // self.args.gradient_accumulation_steps
        return int(steps_an_epoch * self.args.num_train_epochs)

    def load_finished(self, checkpoint, state):
        """Load the weights of a run that had come to its end, for the Trainer would go one step further."""
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        with self.loading(best or checkpoint):
            self._load_from_checkpoint(best or checkpoint)
        self.state = state
        return TrainOutput(state.global_step, None, {})

    def load_best(self):
        """Load the weights of the best checkpoint, unless they are those at hand."""
        best = self.state.best_model_checkpoint
        if best and Path(best).name != f"checkpoint-{self.state.global_step}":
            self._load_from_checkpoint(best)
            self.evaluated = None

    def complete(self, metrics, first_step):
        """Mend and complete the Trainer's ``metrics`` of a training that began after ``first_step``."""
        # The Trainer divides what it summed up since it resumed by the steps of the whole run.
        step = self.state.global_step
        metrics["train_loss"] *= step / (step - first_step)
        metrics["train_skipped_steps"] = self.check_finite.skipped
        tokens_per_second = self.train_tokens / metrics["train_runtime"]
        metrics["train_tokens_per_second"] = round(tokens_per_second, 2)
        metrics.update(memory_metrics("train", self.memory.get("train"), self.train_memory_peak))

    def save_merged(self, folder):
        """Write the whole model with the adapter in its weights, which stays in them."""
        model = merge_lora(self.model)
        self.evaluated = None
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

    def log(self, logs, **kwargs):
        """The Trainer's, which in PaddleNLP 3 empties the history that trainer_state.json and a resumed run hold."""
        history, self.state.log_history = self.state.log_history, []
        super().log(logs, **kwargs)
        history.append({**logs, "step": self.state.global_step})
        self.state.log_history = history

    @contextlib.contextmanager
    def loading(self, checkpoint):
        """Tell a damaged checkpoint from a bug: an exception before training begins is an InputError."""
        try:
            yield
        except Exception as error:
            if checkpoint is None or self.stop_by_signal.handlers_before is not None:  # it has begun
                raise
            advice = "remove it to go on from the checkpoint before it"
            with mistakes(f"{checkpoint} can't be loaded", advice):
                raise error

    def create_scheduler(self, num_training_steps):
        """linear: from 0 up to learning_rate, then straight down to lr_decay_ratio of it at the last step."""
        if self.args.lr_scheduler_type != SchedulerType.LINEAR or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps)
        warmup = self.args.warmup_steps or int(self.args.warmup_ratio * num_training_steps)
        decay = max(num_training_steps - 1 - warmup, 1)  # steps from the peak to the last one

        def factor(step):
            if step < warmup:
                return step / warmup
            return 1 - (1 - self.args.lr_decay_ratio) * min((step - warmup) / decay, 1)

        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(self.args.learning_rate, factor)
        return self.lr_scheduler

    # evaluation

    def evaluate(self, *args, **kwargs):
        """The Trainer's; weights that were evaluated already keep their results."""
        if self.evaluated is None:
            self.evaluated = super().evaluate(*args, **kwargs)
        return self.evaluated

    def prediction_step(self, model, inputs, prediction_loss_only=None, ignore_keys=None):
        """Beam search and loss of one batch; ``evaluation_loop`` takes them from ``self.outputs``."""
        inputs = self._prepare_inputs(inputs)
        source_length = inputs["source_length"].numpy()
        input_ids = inputs["input_ids"][:, : source_length.max()]
        # Without autocast, which would cast every weight and the whole cache again at each token.
        with paddle.no_grad():
            hypotheses = beam_search(
                model,
                input_ids,
                source_length,
                self.generation,
                self.tokenizer.sop_token_id,
                self.tokenizer.eop_token_id,
                group=self.tensor_parallel_group,
            )
            losses = self.target_losses(model, inputs).numpy() if len(inputs["labels"]) else np.zeros(0)
        # The targets of a record stand side by side in the flattened batch, records in order.
        rows = inputs["target_positions"].numpy() // inputs["input_ids"].shape[1]
        for row, (index, best) in enumerate(zip(inputs["index"].tolist(), hypotheses)):
            self.outputs[index] = {"hypotheses": best, "losses": losses[rows == row]}
        self.generated_tokens += sum(len(best[0][0]) for best in hypotheses)
        self.bar.update(len(hypotheses))
        self.bar.set_postfix_str(f"{self.generated_tokens / (time.time() - self.start):.1f} tokens/s")
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, then the metrics and ``{eval,test}_predictions.jsonl``, in the input's order."""
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        memory_before = memory_peak(reset=True)
        self.outputs = {}  # by the record's number: batches may repeat a record
        self.generated_tokens, self.start = 0, time.time()
        with tqdm(
            total=len(dataloader.dataset) // self.args.dataset_world_size,
            desc=metric_key_prefix,
            unit="record",
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
            dynamic_ncols=True,
        ) as self.bar:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        for part in gather_objects(self.outputs):
            self.outputs.update(part)
        seconds = time.time() - self.start
        self.rows, metrics = self.score(dataloader.dataset, seconds)
        if self.is_world_process_zero():
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.eval(f"{metric_key_prefix} at step {self.state.global_step}: {numbers}")
        memory = memory_peak()
        if self.args.do_train and memory == memory_before:
            memory = None  # training took more, and Paddle 2 can't begin anew
        output.metrics.update({f"{metric_key_prefix}_{name}": metrics[name] for name in metrics})
        output.metrics.update(memory_metrics(metric_key_prefix, self.memory.get("eval"), memory))
        if self.args.should_save:
            path = Path(self.args.output_dir, f"{metric_key_prefix}_predictions.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        return output

    def score(self, dataset, seconds):
        """Rows of the predictions file, list[dict] in the input's order, and the metrics, dict.

        Args: seconds (float): how long it took to generate ``self.outputs``.
        """
        rows, losses, generated_tokens = [], [], 0
        candidates = self.generation.num_return_sequences > 1
        for index, result in sorted(self.outputs.items()):
            hypotheses = result["hypotheses"]
            rows.append(prediction_row(self.tokenizer, dataset[index]["record"], hypotheses, candidates))
            losses.append(result["losses"])
            generated_tokens += len(hypotheses[0][0])
        metrics = {"samples": len(rows), "tokens_per_second": round(generated_tokens / seconds, 2)}
        scored = [row for row in rows if row["reference"] is not None]
        if scored:
            metrics["loss"] = float(np.concatenate(losses).mean())
            predictions = [row["prediction"] for row in scored]
            references = [row["reference"] for row in scored]
            metrics.update(compute_metrics(predictions, references))
        return rows, metrics

    # What follows overrides private methods of PaddleNLP's Trainer, which its next release may rename.

    # Its samplers shuffle otherwise on one process than on several, and don't group by length. The
    # public way round them, get_train_dataloader and get_eval_dataloader, would be a copy of both.
    def _get_train_sampler(self):
        args, batch_size = self.args, self.args.per_device_train_batch_size
        self.train_sampler = GroupedBatchSampler(
            self.train_dataset,
            batch_size,
            num_replicas=args.dataset_world_size,
            rank=args.dataset_rank,
            global_batch_size=args.records_a_step,
            shuffle=True,
            group_by_length=args.group_by_length,
            seed=args.seed,
        )
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset):
        """From long to short, so that a batch has little padding; none of more records than there are."""
        args, replicas = self.args, self.args.dataset_world_size
        batch_size = min(args.per_device_eval_batch_size, -(-len(eval_dataset) // replicas))
        return GroupedBatchSampler(
            eval_dataset,
            batch_size,
            num_replicas=replicas,
            rank=args.dataset_rank,
            global_batch_size=batch_size * replicas,
            shuffle=False,
            group_by_length=True,
            seed=args.seed,
        )

    # A checkpoint may be of another precision and layout than this run. Theirs know the layout at hand alone.
    def _load_from_checkpoint(self, checkpoint=None):
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.ignore_load_lr_and_optim:
            return
        # multi_precision: O2 trains float32 master weights of the half-precision ones.
        master_weights = self.args.fp16_opt_level == "O2" and (self.args.fp16 or self.args.bf16)
        names = read_mark(checkpoint).get("parameters")
        state = read_optimizer_state(checkpoint, self.optimizer, self.model, names, master_weights)
        self.optimizer.set_state_dict(state)
        self.lr_scheduler.set_state_dict(paddle.load(f"{checkpoint}/scheduler.pdparams"))
        scaler = Path(checkpoint, "scaler.pdparams")
        if self.do_grad_scaling and scaler.is_file():
            self.scaler.load_state_dict(paddle.load(str(scaler), return_numpy=True))

    # The Trainer's fails where the GPU build runs on a CPU, and SeedEachStep needs no state.
    def _load_rng_state(self, checkpoint):
        """Nothing to load."""
