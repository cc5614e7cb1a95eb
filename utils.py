"""What the run calls: the metrics, the callbacks and GLMTrainer."""

import contextlib
import glob
import json
import os
import shutil
import signal
import sys
import time
import unicodedata
import warnings

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.metrics import BLEU
from paddlenlp.trainer import Trainer
from paddlenlp.trainer.trainer_callback import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from paddlenlp.trainer.trainer_utils import IntervalStrategy, SchedulerType, TrainOutput
from paddlenlp.utils.log import logger
from rouge import Rouge
from tqdm import tqdm

from data import GroupedBatchSampler, InputError, build_dataset, decode_target
from generation import beam_search
from modeling import MASKED, LabelSmoothedLoss, prepare_for_training, use_the_whole_cpu

# The first is said again in our own words, the second is of no use to a user.
warnings.filterwarnings("ignore", message="You are using GPU version Paddle|Setuptools is replacing distutils")
use_the_whole_cpu()

NEVER = 2**62  # a step that is never reached


def prediction_row(tokenizer, record, token_ids, score):
    """What a predictions file holds of a record, dict."""
    return {
        "id": record["id"], "context": record["context"], "answer": record["answer"], "reference": record["question"],
        "prediction": decode_target(tokenizer, token_ids), "score": score, "token_ids": token_ids,
    }  # fmt: skip


def predict_lines(model, tokenizer, records, src_length, generation, output):
    """Answer each of ``records`` as it comes by a JSON line in the text stream ``output``."""
    model.eval()
    for record in records:
        (features,) = build_dataset(tokenizer, [record], src_length, generation.tgt_length)
        source_ids = features["input_ids"][: features["source_length"]]
        ((token_ids, score),) = beam_search(
            model, paddle.to_tensor(source_ids[None]), np.array([len(source_ids)]), generation,
            tokenizer.sop_token_id, tokenizer.eop_token_id,
        )  # fmt: skip
        row = prediction_row(tokenizer, record, token_ids, score)
        print(json.dumps(row, ensure_ascii=False), file=output, flush=True)


# --------------------------------------------------------------------------------------------------------- metrics


def _characters(text):
    """The characters that count: none of the white space, and width and form as the tokenizer's NFKC leaves them."""
    return [character for character in unicodedata.normalize("NFKC", text) if not character.isspace()]


def compute_metrics(predictions, references):
    """ROUGE-1, ROUGE-2, ROUGE-L (F1, mean over the records) and corpus BLEU-4, over characters, each 0..1.

    Args: two lists of str of the same length. An empty prediction or reference scores 0.
    """
    rouge, bleu = Rouge(exclusive=False), BLEU(n_size=4)
    totals = {"rouge1": 0.0, "rouge2": 0.0, "rougel": 0.0}
    for prediction, reference in zip(predictions, references):
        prediction, reference = _characters(prediction), _characters(reference)
        bleu.add_inst(prediction, [reference])
        if prediction and reference:
            # The package finds the common subsequence by recursion, one level a character.
            sys.setrecursionlimit(max(sys.getrecursionlimit(), len(prediction) + len(reference) + 1000))
            # It splits sentences at "." and words at spaces: numbers in place of characters have neither.
            texts = (" ".join(str(ord(character)) for character in text) for text in (prediction, reference))
            scores = rouge.get_scores(*texts)[0]
            for name, key in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougel", "rouge-l")):
                totals[name] += scores[key]["f"]
    metrics = {name: total / len(predictions) for name, total in totals.items()}
    # Without a single generated character BLEU's brevity penalty has no value, and its limit is 0.
    metrics["bleu4"] = bleu.score() if bleu.bp_c else 0.0
    return metrics


# --------------------------------------------------------------------------------------------------------- trainer


class Fault(BaseException):  # as KeyboardInterrupt: a signal must pass what catches every Exception while loading
    """What ended a run and was no mistake of the user's, told in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


CHECKPOINT_DONE = ".checkpoint_done"  # the last file of a checkpoint to be written


def last_whole_checkpoint(folder):
    """The path of the checkpoint in ``folder`` that was last written to its end, or None."""
    whole = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*[0-9]")):
        try:
            whole[path] = os.path.getmtime(os.path.join(path, CHECKPOINT_DONE))
        except FileNotFoundError:
            advice = "if it is another script's, give it by --resume_from_checkpoint"
            logger.warning(f"skipping {path}, which was not written to its end; {advice}")
    # By time, not by number, for an older run that --overwrite_output_dir wrote over may have come further.
    return max(whole, key=whole.get, default=None)


@contextlib.contextmanager
def _loading(checkpoint):
    """Tell a damaged checkpoint from a bug: what PaddleNLP raises in the block is an InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{checkpoint} can't be loaded ({str(error)[:200]}): remove it to go on from the checkpoint before it"
        ) from error


class TrainingProgress(TrainerCallback):
    """A bar with loss and samples/s on a terminal; elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        disable = args.disable_tqdm or not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=disable)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            learning_rate = f"learning rate {logs['learning_rate']:.3g}"
            logger.train(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {learning_rate}, {rate}"
            )
        else:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class SeedEachStep(TrainerCallback):
    """Each step draws from generators that are seeded by --seed and its number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        seed = int(np.random.default_rng([args.seed, state.global_step, args.dataset_rank]).integers(2**40)) * 1024
        tracker = get_rng_state_tracker()
        tracker.reset()
        # Alike on all processes of tensor parallelism, but for the last, which drops in heads that are split over them.
        tracker.add("embedding_seed", seed + 1)
        tracker.add("global_seed", seed + 2)
        tracker.add("local_seed", seed + 3 + max(args.tensor_parallel_rank, 0))
        paddle.seed(seed)


class GLMTrainer(Trainer):
    """PaddleNLP's Trainer with the label-smoothed loss, the decaying schedule and evaluation by beam search.

    Args (beside the Trainer's):
        generation (GenerationArguments): how evaluation generates.
        label_smoothing (float): e of LabelSmoothedLoss.
        lr_decay_ratio (float): the share of the peak rate that a linear schedule ends at.
    """

    def __init__(self, *args, generation, label_smoothing, lr_decay_ratio, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation, self.label_smoothing, self.lr_decay_ratio = generation, label_smoothing, lr_decay_ratio
        # Through any wrapper, the model then returns hidden states; the head is applied to target positions alone.
        self.model.glm.output_predict = False
        prepare_for_training(self.model)
        self.tensor_parallel_group = None
        if self.args.tensor_parallel_degree > 1:
            self.tensor_parallel_group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        for callback in (ProgressCallback, PrinterCallback):
            self.pop_callback(callback)
        self.add_callback(TrainingProgress)
        self.add_callback(SeedEachStep)
        self.stop_signal = None  # that training is to end by
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    # training

    def _target_losses(self, model, inputs):
        """Label-smoothed losses of the batch's N targets, float32 [N]."""
        mask = (1 - inputs["attention_mask"].astype("float32")) * MASKED  # [B, 1, L, L]
        if self.args.device == "cpu":  # which is slow at broadcasting
            mask = mask.tile([1, self.model.glm.transformer.layers[0].attention.num_attention_heads, 1, 1])
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask)
        hidden_states = outputs[0]  # [B, L, C]
        hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]]).gather(inputs["target_positions"])
        weight = self.model.glm.word_embeddings.weight
        group = self.tensor_parallel_group
        return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], self.label_smoothing, group)

    def compute_loss(self, model, inputs, return_outputs=False):
        """The mean over the batch's target tokens, the end token included.

        In training the batch is the global one: this process's share of the sum, times the processes and passes that
        gradients are averaged over afterwards, over the number of its target tokens, which every process knows.
        """
        losses = self._target_losses(model, inputs)
        share = 1 / len(losses)
        if self.is_in_train:
            target_tokens = self.train_sampler.target_tokens
            tokens = int(target_tokens[self.state.global_step % len(target_tokens)])
            share = self.args.dataset_world_size * self.args.gradient_accumulation_steps / tokens
        loss = losses.sum() * share
        return (loss, losses) if return_outputs else loss

    def training_step(self, model, inputs):
        """The Trainer's; the first step whose loss is no number is noted on the device, where nothing waits for it."""
        loss = super().training_step(model, inputs)
        step = paddle.where(paddle.isfinite(loss), NEVER, self.state.global_step + 1).reshape([])
        self.first_bad_step = paddle.minimum(self.first_bad_step, step)
        return loss

    def train(self, resume_from_checkpoint=None, **kwargs):
        """The Trainer's, ended by SIGINT or SIGTERM within a step, with a checkpoint of it.

        A run that had come to its end is only loaded, for the Trainer would go one step further.
        """
        first_step = 0
        if resume_from_checkpoint:
            with _loading(resume_from_checkpoint):
                state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            first_step = state.global_step
            steps_an_epoch = len(self._get_train_sampler()) // self.args.gradient_accumulation_steps
            last_step = self.args.max_steps if self.args.max_steps > 0 else steps_an_epoch * self.args.num_train_epochs
            if first_step >= int(last_step):
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best or resume_from_checkpoint)
                self.state = state
                return TrainOutput(first_step, None, {})
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # The Trainer divides what it summed up since it resumed by the steps of the whole run.
        output.metrics["train_loss"] *= output.global_step / (output.global_step - first_step)
        return output

    def _on_signal(self, number, _):
        # Several processes would have to agree on a step to save; a second signal is urgent; evaluation takes long.
        if self.args.world_size > 1 or self.stop_signal is not None or not self.model.training:
            self._stop(number)
        self.stop_signal = number

    def _stop(self, number):
        name = signal.Signals(number).name
        raise Fault(f"stopped by {name} at step {self.state.global_step}: {self._where_to_resume()}", 128 + number)

    def _where_to_resume(self):
        checkpoint = last_whole_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "there is no checkpoint to resume from"
        without = " without --overwrite_output_dir" if self.args.overwrite_output_dir else ""
        return f"the same command{without} goes on from {checkpoint}"

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The Trainer's, at the end of each step; before it logs, evaluates or saves, see that training is sound."""
        control = self.control
        if self.stop_signal is not None:
            control.should_evaluate, control.should_save = False, self.args.save_strategy != IntervalStrategy.NO
        if control.should_log or control.should_evaluate or control.should_save:
            step = self.first_bad_step.item()
            advice = "lower --learning_rate, or look at the data of that step"
            if step != NEVER:
                raise Fault(f"the loss is not finite at step {step}: {advice}; {self._where_to_resume()}")
            if control.should_save and not all(paddle.isfinite(p).all().item() for p in self.model.parameters()):
                step = self.state.global_step
                raise Fault(f"the weights are not finite after step {step}: {advice}; {self._where_to_resume()}")
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop_signal is not None:
            self._stop(self.stop_signal)

    def _save_checkpoint(self, model, metrics=None):
        """The Trainer's, with a last file that says that all the others are whole."""
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        done = os.path.join(folder, CHECKPOINT_DONE)
        with contextlib.suppress(FileNotFoundError):
            os.remove(done)
        try:
            super()._save_checkpoint(model, metrics)
            # All processes have written theirs by now, for the last thing they do is to exchange random states.
            if self.args.local_rank in (-1, 0):
                open(done, "w").close()
                super()._rotate_checkpoints(use_mtime=True, output_dir=self.args.output_dir)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Fault(f"{folder} can't be written: {error.strerror or error}; {self._where_to_resume()}") from error

    def _rotate_checkpoints(self, *args, **kwargs):
        """Not where the Trainer calls it: before the new checkpoint is whole, and never on a single process."""

    def create_scheduler(self, num_training_steps):
        """linear: from 0 up to learning_rate, then straight down to lr_decay_ratio of it at the last step."""
        if self.args.lr_scheduler_type != SchedulerType.LINEAR or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps)
        warmup = self.args.warmup_steps or int(self.args.warmup_ratio * num_training_steps)
        decay = max(num_training_steps - 1 - warmup, 1)  # steps from the peak to the last one

        def factor(step):
            if step < warmup:
                return step / warmup
            return 1 - (1 - self.lr_decay_ratio) * min((step - warmup) / decay, 1)

        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(self.args.learning_rate, factor)
        return self.lr_scheduler

    def _get_train_sampler(self):
        args = self.args
        replicas, accumulation = args.dataset_world_size, args.gradient_accumulation_steps
        batch_size = args.per_device_train_batch_size
        self.train_sampler = GroupedBatchSampler(
            self.train_dataset, batch_size, replicas, args.dataset_rank, batch_size * replicas * accumulation,
            shuffle=True, group_by_length=args.group_by_length, seed=args.seed,
        )  # fmt: skip
        return self.train_sampler

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        with _loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        """Nothing to load: see SeedEachStep. The Trainer's own fails where the GPU build runs on a CPU."""

    # evaluation

    def _get_eval_sampler(self, eval_dataset):
        """From long to short, so that a batch has little padding."""
        args, batch_size = self.args, self.args.per_device_eval_batch_size
        return GroupedBatchSampler(
            eval_dataset, batch_size, args.dataset_world_size, args.dataset_rank, batch_size * args.dataset_world_size,
            shuffle=False, group_by_length=True, seed=args.seed,
        )  # fmt: skip

    def prediction_step(self, model, inputs, prediction_loss_only=None, ignore_keys=None):
        """Beam search and loss of one batch; ``evaluation_loop`` takes them from ``self.outputs``."""
        inputs = self._prepare_inputs(inputs)
        source_length = inputs["source_length"].numpy()
        input_ids = inputs["input_ids"][:, : source_length.max()]
        start_token_id, end_token_id = self.tokenizer.sop_token_id, self.tokenizer.eop_token_id
        with paddle.no_grad(), self.autocast_smart_context_manager():
            hypotheses = beam_search(
                model, input_ids, source_length, self.generation, start_token_id, end_token_id,
                group=self.tensor_parallel_group,
            )  # fmt: skip
            losses = self._target_losses(model, inputs).numpy() if len(inputs["labels"]) else np.zeros(0)
        # The targets of a record stand side by side in the flattened batch, records in order.
        rows = inputs["target_positions"].numpy() // inputs["input_ids"].shape[1]
        for row, (index, (token_ids, score)) in enumerate(zip(inputs["index"].tolist(), hypotheses)):
            self.outputs[index] = {"token_ids": token_ids, "score": score, "losses": losses[rows == row]}
        self.generated_tokens += sum(len(token_ids) for token_ids, _ in hypotheses)
        self.bar.update(len(hypotheses))
        self.bar.set_postfix_str(f"{self.generated_tokens / (time.time() - self.start):.1f} tokens/s")
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, then the metrics and ``{eval,test}_predictions.jsonl``, in the input's order."""
        self.outputs = {}  # by the record's number: batches may repeat a record
        self.generated_tokens, self.start = 0, time.time()
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        records = len(dataloader.dataset) // self.args.dataset_world_size
        with tqdm(total=records, desc=metric_key_prefix, unit="record", leave=False, disable=disable) as self.bar:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        if self.args.world_size > 1:
            parts = []
            dist.all_gather_object(parts, self.outputs)
            self.outputs = {index: result for part in parts for index, result in part.items()}
        seconds = time.time() - self.start
        generated_tokens = sum(len(result["token_ids"]) for result in self.outputs.values())

        rows = []
        for index, result in sorted(self.outputs.items()):
            record = dataloader.dataset[index]["record"]
            rows.append(prediction_row(self.tokenizer, record, result["token_ids"], result["score"]))
        metrics = {"samples": len(rows), "tokens_per_second": round(generated_tokens / seconds, 2)}
        scored = [row for row in rows if row["reference"] is not None]
        if scored:
            metrics["loss"] = float(np.concatenate([result["losses"] for result in self.outputs.values()]).mean())
            metrics.update(compute_metrics(*([row[key] for row in scored] for key in ("prediction", "reference"))))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.is_world_process_zero():
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.eval(f"{metric_key_prefix} at step {self.state.global_step}: {numbers}")
        if self.args.should_save:
            self._write_predictions(rows, os.path.join(self.args.output_dir, f"{metric_key_prefix}_predictions.jsonl"))
        return output

    def _write_predictions(self, rows, path):
        """Whole or not at all."""
        os.makedirs(self.args.output_dir, exist_ok=True)
        temporary = path + ".tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
