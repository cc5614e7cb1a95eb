"""GLMTrainer: the loss and the evaluation inside the Trainer; a row of the predictions file."""

import hashlib
import json
import time
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
import paddle
from paddle.distributed import fleet
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_utils import SchedulerType
from paddlenlp.utils.log import logger
from tqdm import tqdm

from data import decode_target
from glm.decoding.decoder import beam_search
from glm.device import memory_peak
from glm.metrics import compute_metrics, rouge
from glm.modeling import replace_forward, target_losses
from glm.outputs.results import write_predictions
from glm.processes import gather_objects
from glm.templates import get_templates
from glm.training.progress import Curves, memory_metrics
from glm.training.trainer import ResumableTrainer


def prediction_row(tokenizer, record, hypotheses, generation):
    """What a predictions file holds of a record.

    Args:
        hypotheses: list of (token ids, score), the best first.
        generation (GenerationArguments): whether it shows more than one.

    Returns:
        the row, dict, and what ``rouge`` says of it, dict; None without a reference.
    """
    shown = []
    for token_ids, score in hypotheses:
        text = decode_target(tokenizer, token_ids)
        shown.append({"prediction": text, "score": score, "token_ids": token_ids})
    templates = get_templates(tokenizer)
    fields = [name for name in templates.fields if name in templates.source.fields]
    row = {name: record[name] for name in ("id", *fields)}
    row.update(reference=templates.get_reference(record), **shown[0], rougel=None)
    scores = None
    if row["reference"] is not None:
        scores = rouge(row["prediction"], row["reference"])
        row["rougel"] = scores["rougel"]
    return ({**row, "candidates": shown} if generation.num_return_sequences > 1 else row), scores


def shown_fields(tokenizer):
    """Returns the names of what people are shown of a row, list[str]: all but the passage."""
    return [*get_templates(tokenizer).source.fields[:-1], "prediction", "reference"]


class GLMTrainer(ResumableTrainer):
    """The Trainer with the label-smoothed loss, the decaying schedule and beam search to evaluate.

    Args (beside ResumableTrainer's):
        generation (GenerationArguments): how evaluation generates.
    """

    def __init__(self, *, generation, **kwargs):
        super().__init__(**kwargs)
        self.generation = generation
        self.rows = []  # the last predictions, as the predictions file has them
        if self.pop_callback(VisualDLCallback):  # by --report_to
            self.add_callback(Curves(lambda: self.rows, shown_fields(self.tokenizer)))
        replace_forward(self.model, self.args.product_dtype())
        self.tensor_parallel_group = None
        if self.args.tensor_parallel_degree > 1:
            groups = fleet.get_hybrid_communicate_group()
            self.tensor_parallel_group = groups.get_model_parallel_group()

    def target_losses(self, model, inputs):
        smoothing, group = self.args.label_smoothing, self.tensor_parallel_group
        if group is not None:
            # fleet's wrapper would only send the batch to processes that have it already.
            model = self.model
        return target_losses(self.model, model, inputs, smoothing, group)

    # training

    def compute_loss(self, model, inputs, return_outputs=False):
        """The mean over the batch's target tokens, the end token included.

        In training the batch is the global one. Every process knows the number of its target tokens, and
        divides its own sum by it, times the processes and passes that gradients are averaged over afterwards.
        """
        losses = self.target_losses(model, inputs)
        loss_weight = 1 / len(losses)
        if self.is_in_train:
            tokens = self.of_this_batch(self.train_sampler.target_tokens)
            averaged = self.args.dataset_world_size * self.args.gradient_accumulation_steps
            loss_weight = averaged / tokens
        loss = losses.sum() * loss_weight
        return (loss, losses) if return_outputs else loss

    def create_scheduler(self, num_training_steps):
        """The Trainer's, but for linear.

        That goes from 0 up to learning_rate, then straight down to lr_decay_ratio of it at the last step.
        """
        args = self.args
        if args.lr_scheduler_type != SchedulerType.LINEAR or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps)
        warmup = args.warmup_steps or int(args.warmup_ratio * num_training_steps)
        decay = max(num_training_steps - 1 - warmup, 1)  # steps from the peak to the last one

        def factor(step):
            if step < warmup:
                return step / warmup
            return 1 - (1 - args.lr_decay_ratio) * min((step - warmup) / decay, 1)

        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(args.learning_rate, factor)
        return self.lr_scheduler

    # evaluation

    @cached_property
    def measures(self):
        """Fingerprints of what an evaluation's values depend on: see Checkpoint.measures.

        The loss depends on the features and its smoothing. What is generated, and its metrics, depend on
        the features, the references and the rules of beam search.
        """
        if not self.eval_dataset:
            return {}
        loss, templates = hashlib.blake2b(digest_size=16), get_templates(self.tokenizer)
        for item in self.eval_dataset:
            loss.update(json.dumps([item["source_length"], item["input_ids"].tolist()]).encode())
        text = loss.copy()
        loss.update(json.dumps(self.args.label_smoothing).encode())
        for item in self.eval_dataset:
            text.update(json.dumps(templates.get_reference(item["record"])).encode())
        # A rule that is added one day changes nothing at its default.
        rules = {item.name: getattr(self.generation, item.name) for item in fields(self.generation)}
        changed = {item.name for item in fields(self.generation) if rules[item.name] != item.default}
        changed.discard("num_return_sequences")  # which shows more of the same
        text.update(json.dumps({name: rules[name] for name in sorted(changed)}).encode())
        return {"loss": loss.hexdigest(), "text": text.hexdigest()}

    def prediction_step(self, model, inputs, prediction_loss_only=None, ignore_keys=None):
        """Put beam search and loss of a batch into ``self.outputs``, for ``evaluation_loop``."""
        inputs = self._prepare_inputs(inputs)
        source_length = inputs["source_length"].numpy()
        input_ids = inputs["input_ids"][:, : source_length.max()]
        start, end, losses = self.tokenizer.sop_token_id, self.tokenizer.eop_token_id, np.zeros(0)
        rules, group = self.generation, self.tensor_parallel_group
        # Without autocast, which would cast all weights and the whole cache again at each token.
        with paddle.no_grad():
            hypotheses = beam_search(model, input_ids, source_length, rules, start, end, group)
            if len(inputs["labels"]):
                losses = self.target_losses(model, inputs).numpy()
        # The targets of a record stand side by side in the flattened batch, records in order.
        rows = inputs["target_positions"].numpy() // inputs["input_ids"].shape[1]
        for row, (index, best) in enumerate(zip(inputs["index"].tolist(), hypotheses)):
            self.outputs[index] = {"hypotheses": best, "losses": losses[rows == row]}
        self.generated_tokens += sum(len(best[0][0]) for best in hypotheses)
        self.bar.update(len(hypotheses))
        speed = self.generated_tokens / (time.time() - self.start)
        self.bar.set_postfix_str(f"{speed:.1f} tokens/s")
        return None, None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, then the metrics and ``self.rows``, in the input's order."""
        prefix, first = metric_key_prefix, self.is_world_process_zero()
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        memory_before = memory_peak(reset=True)
        self.outputs = {}  # by the record's number: batches may repeat a record
        self.generated_tokens, self.start = 0, time.time()
        with tqdm(
            total=len(dataloader.dataset) // self.args.dataset_world_size,
            desc=prefix,
            unit="record",
            leave=False,
            disable=self.args.disable_tqdm or not first,
            dynamic_ncols=True,
        ) as self.bar:
            kwargs["metric_key_prefix"] = prefix
            with self.memory.running_out(f"in evaluation ({prefix})", "eval"):
                output = super().evaluation_loop(dataloader, *args, **kwargs)
        for part in gather_objects(self.outputs):
            self.outputs.update(part)
        seconds = time.time() - self.start
        self.rows, metrics = self.score(dataloader.dataset, seconds)
        if first:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            step = self.current_step
            of_step = f" at step {step}" if step else ""
            logger.eval(f"{prefix}{of_step}: {numbers}")
        memory = memory_peak()
        if self.args.do_train and memory == memory_before:
            memory = None  # training took more, and Paddle 2 can't begin anew
        output.metrics.update({f"{prefix}_{name}": metrics[name] for name in metrics})
        output.metrics.update(memory_metrics(prefix, self.memory.totals.get("eval"), memory))
        if self.is_in_train and self.args.should_save:  # else they are written with the results
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            write_predictions(self.args.output_dir, prefix, self.rows)
        return output

    def score(self, dataset, seconds):
        """Rows of the predictions file, list[dict] in the input's order, and the metrics, dict.

        Args: seconds (float): how long it took to generate ``self.outputs``.
        """
        rows, scores, losses = [], [], []
        for index, result in sorted(self.outputs.items()):
            record, hypotheses = dataset[index]["record"], result["hypotheses"]
            row, rouges = prediction_row(self.tokenizer, record, hypotheses, self.generation)
            rows.append(row)
            scores += [rouges] if rouges else []
            losses.append(result["losses"])
        generated_tokens = sum(len(row["token_ids"]) for row in rows)
        metrics = {"samples": len(rows), "tokens_per_second": round(generated_tokens / seconds, 2)}
        scored = [row for row in rows if row["reference"] is not None]
        if scored:
            metrics["loss"] = float(np.concatenate(losses).mean())
            predictions = [row["prediction"] for row in scored]
            references = [row["reference"] for row in scored]
            metrics.update(compute_metrics(predictions, references, scores))
        return rows, metrics
