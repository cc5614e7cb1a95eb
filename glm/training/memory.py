"""The memory that a run takes: estimated before it, and what to do where it runs out."""

import contextlib
import dataclasses
from typing import Optional

import paddle
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig
from paddlenlp.utils.log import logger

from glm.device import free_memory, on_cpu, supports_cuda_graphs, supports_dtype
from glm.errors import Fault, is_out_of_memory
from glm.training.flat_optimizer import gradients_at_update
from glm.weights.adapters import new_lora_config
from glm.weights.shapes import count_parameters

# Bytes of a number.
HALF, FLOAT, BOOL, INT8 = 2, 4, 1, 1
PADDLE_2 = paddle.__version__.startswith("2.")


@dataclasses.dataclass
class Setting:
    """What the memory of one process depends on. Sizes are in bytes."""

    config: GLMConfig
    batch_size: int  # records of a pass
    source_length: int  # tokens of the longest source
    target_length: int  # tokens of the longest target
    precision: str = "float32"  # float32, O1 or O2; evaluation takes O1 for float32
    degree: int = 1  # of tensor parallelism
    sharding_degree: int = 1
    lora_config: Optional[LoRAConfig] = None
    recompute: bool = False
    master_grad: bool = True  # as --amp_master_grad
    accumulates: bool = False  # the gradients of several passes
    num_beams: int = 1
    quantized: bool = False  # linears in int8
    on_cpu: bool = dataclasses.field(default_factory=lambda: on_cpu())
    cuda_graphs: bool = dataclasses.field(default_factory=lambda: supports_cuda_graphs())
    paddle_2: bool = PADDLE_2

    @property
    def weight_size(self):
        """Size of one weight, and of one number of the hidden states: autocast sums them in float32."""
        return HALF if self.precision == "O2" else FLOAT

    @property
    def linear_size(self):
        """Size of one number that a linear gives in training."""
        return FLOAT if self.precision == "float32" else HALF

    @property
    def half_copies(self):
        """Whether FlatAdamW gives the linears' trained weights half copies, whose gradients are half too."""
        return self.precision == "O1" and self.sharding_degree == 1 and not self.on_cpu

    @property
    def length(self):
        """Tokens of the longest sequence."""
        return self.source_length + self.target_length

    @property
    def hidden(self):
        """Numbers of a batch's hidden states."""
        return self.batch_size * self.length * self.config.hidden_size

    @property
    def heads(self):
        """Attention heads of this process."""
        return self.config.num_attention_heads / self.degree

    @property
    def scores(self):
        """Numbers of a layer's attention scores."""
        return self.batch_size * self.heads * self.length**2

    @property
    def vocab_size(self):
        """Entries of the vocabulary of this process."""
        return self.config.vocab_size / self.degree

    @property
    def saved_by_int8(self):
        """Bytes that linears in int8 and their scales take less."""
        width, size = self.config.hidden_size, self.weight_size
        layer = 12 * width**2 * (size - INT8) - 9 * width * size
        return self.quantized * self.config.num_layers * layer / self.degree

    @property
    def cast_weight(self):
        """Numbers of the largest linear in int8, which a product has cast."""
        return 4 * self.config.hidden_size**2 / self.degree if self.quantized else 0

    @property
    def mask_size(self):
        """Size of the additive mask, which a CPU holds once for each head."""
        return self.batch_size * self.length**2 * FLOAT * (self.heads if self.on_cpu else 1)


def _layer_tensors(setting: Setting) -> tuple[dict, dict, dict]:
    """Return the bytes of what a layer keeps for its backward pass, by tensor: attention, softmax, MLP.

    In O1 norms and the sums behind linears are float32, linears and attention half.
    """
    residual, linear = setting.weight_size, setting.linear_size
    hidden, part = setting.hidden, setting.hidden / setting.degree  # numbers: of all heads, of those here
    norm = {"norm's input": hidden * residual, "norm's output": hidden * linear}
    attention = {
        **norm,
        "queries, keys and values": 3 * part * linear,
        "scaled queries": part * linear,
        "context": part * linear,
    }
    softmax = {"softmax": setting.scores * linear}
    mlp = {**norm, "gelu's input": 4 * part * linear, "gelu's output": 4 * part * linear}
    if setting.config.output_dropout_prob:
        attention["dropout mask"] = mlp["dropout mask"] = hidden * BOOL
    cast = setting.lora_config or not setting.half_copies  # weights without copies
    if setting.precision == "O1" and cast and not setting.quantized:
        attention["the weights, cast"] = 12 * setting.config.hidden_size**2 / setting.degree * HALF
    if setting.config.attention_dropout_prob:
        softmax["dropout mask"] = setting.scores * BOOL
        softmax["softmax, what dropout left"] = setting.scores * linear
    return attention, softmax, mlp


def _layer_memory(setting: Setting) -> tuple[float, float]:
    """Return the bytes that a layer keeps for its backward pass, and those of that pass's peak."""
    attention, softmax, mlp = _layer_tensors(setting)
    kept = sum(attention.values()) + sum(softmax.values()) + sum(mlp.values())
    at_softmax = {  # of which no more of the MLP is alive
        **attention,
        "softmax and two gradients": 3 * setting.scores * setting.linear_size,
        "softmax's dropout mask": softmax.get("dropout mask", 0),
        "gradients of queries, keys and values": 3 * setting.hidden * setting.linear_size,
    }
    at_gelu = kept + mlp["gelu's output"] + setting.cast_weight * setting.linear_size  # and its gradient
    return kept, max(sum(at_softmax.values()), at_gelu)


def _add_largest(bytes_needed: dict, peaks: dict) -> dict:
    """Add to ``bytes_needed`` what the moment of ``peaks`` takes that takes most, and the total."""
    bytes_needed = {**bytes_needed, **max(peaks.values(), key=lambda parts: sum(parts.values()))}
    return {**bytes_needed, "total": sum(bytes_needed.values())}


def training_memory(setting: Setting) -> dict[str, float]:
    """Estimate the bytes of a process at the peak of a training step, by what they are for.

    What the layers here keep for the backward pass is counted tensor by tensor, and so are the
    largest tensors that live for a moment. What a device's library takes for itself is not counted.

    Returns:
        weights, optimizer (moments, master weights, copies), gradients, activations, and their total.
    """
    config, recompute = setting.config, setting.recompute
    count, trained = count_parameters(config, setting.degree, setting.lora_config)
    moments = 2 * FLOAT + (FLOAT if setting.precision == "O2" else 0)  # and master weights
    linears = config.num_layers * 12 * config.hidden_size**2 / setting.degree
    copied = setting.half_copies * (trained if setting.lora_config else linears)
    # Those of the copies are half, but for what passes before have added up.
    gradients = trained * setting.weight_size + copied * (FLOAT * setting.accumulates - HALF)

    layer, backward = _layer_memory(setting)
    layer_input = setting.hidden * setting.weight_size
    kept = config.num_layers * (layer_input if recompute else layer) + setting.mask_size
    logits = setting.batch_size * setting.target_length * setting.vocab_size
    loss = logits * (FLOAT + setting.linear_size)
    embeddings = setting.vocab_size * config.hidden_size
    if setting.precision == "O1":  # the head's weight or its gradient, cast
        loss += embeddings * setting.linear_size
    head_gradient = 0 if setting.lora_config else embeddings * setting.weight_size
    peaks = {
        "loss": {"gradients": head_gradient, "activations": kept + loss},
        "last layer": {
            "gradients": head_gradient,
            "activations": kept + backward - (0 if recompute else layer),
        },
        "first layer": {"gradients": gradients, "activations": setting.mask_size + backward},
        # The table's gradient as the embedding comes to that as the head.
        "embeddings": {
            "gradients": gradients + head_gradient,
            "activations": setting.mask_size + layer_input,
        },
        "update": {"gradients": gradients_at_update(setting, trained), "activations": 0},
    }
    weights = {
        "weights": count * setting.weight_size - setting.saved_by_int8,
        "optimizer": trained * moments / setting.sharding_degree + copied * HALF,
    }
    return _add_largest(weights, peaks)


def evaluation_memory(setting: Setting) -> dict[str, float]:
    """Estimate the bytes of a process at the peak of an evaluation by beam search, by what they are for.

    The cache (glm/decoding/cache.py) has slots for all tokens at once where CUDA graphs are captured.
    Elsewhere it grows, and half of the slots for generated tokens are taken to hold keys and values.

    Returns:
        weights, caches (keys and values), activations, and their total.
    """
    config, degree, size = setting.config, setting.degree, setting.weight_size
    width, layers, batch_size = config.hidden_size, config.num_layers, setting.batch_size
    source = batch_size * setting.source_length * width * size  # hidden states of the sources
    hidden = setting.hidden * size  # and of complete sequences
    pair = batch_size * setting.heads * size  # the scores of one query and one key
    tokens = setting.target_length / (1 if setting.cuda_graphs else 2)
    slots = setting.source_length + setting.num_beams * tokens
    caches = layers * batch_size * slots * 2 * width / degree * size  # keys and values
    tables = 3 if setting.on_cpu else 2  # of prefill: keys, values, and on a CPU the queries

    prefill = {"softmax and its input": 2 * pair * setting.source_length**2}
    prefill["hidden states and gelu's"] = source * (3 + 8 / degree)
    prefill["a weight, cast"] = cast_weight = setting.cast_weight * size
    logits = batch_size * setting.num_beams * setting.vocab_size * (size + 3 * FLOAT)
    target_logits = batch_size * setting.target_length * setting.vocab_size * (FLOAT + size)
    last_layer = {"softmax and its input": 2 * pair * setting.length**2}
    last_layer["inputs of the layers, and the last one's own"] = hidden * (layers + 1 + 7 / degree)
    last_layer["a weight, cast"] = cast_weight
    peaks = {
        # What prefill keeps lives until the beams take over.
        "prefill": {"caches": layers * tables * source / degree, "activations": sum(prefill.values())},
        # One layer's cache at a time is copied when it grows.
        "decoding": {"caches": caches, "activations": max(caches / layers, logits, cast_weight)},
        "last layer of the loss": {"caches": 0, "activations": setting.mask_size + sum(last_layer.values())},
        "loss": {"caches": 0, "activations": setting.mask_size + hidden * layers + target_logits},
    }
    weights = count_parameters(config, degree, setting.lora_config)[0] * size - setting.saved_by_int8
    return _add_largest({"weights": weights}, peaks)


class MemoryEstimate:
    """What the tasks of a run need: said before they begin, and where memory runs out.

    Args:
        settings: the Settings of "train" and "eval", those that the run is about to do.
        records: to evaluate.

    Attributes:
        totals: bytes of "train" and "eval".
    """

    def __init__(self, settings: dict[str, Setting], records: int = 0):
        self.settings, self.records, self.parts = settings, records, {}
        if "train" in settings:
            self.parts["train"] = training_memory(settings["train"])
        if "eval" in settings:
            self.parts["eval"] = dict(evaluation_memory(settings["eval"]))
            if "train" in settings:  # the optimizer stays while the run evaluates
                self.parts["eval"]["total"] += self.parts["train"]["optimizer"]
        self.totals = {kind: parts["total"] for kind, parts in self.parts.items()}

    def log(self):
        """Say what the run needs, what would make it faster, and warn where that is more than there is."""
        if not self.settings:
            return
        texts = []
        for kind, parts in self.parts.items():
            sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
            texts.append(f"{self.totals[kind] / 1e9:.2f} GB to {kind} ({sizes})")
        free, device, has = free_memory(), paddle.get_device(), ""
        if free is not None:  # of a GPU Paddle can't say what other processes take
            has = f"; {device} has {free / 1e9:.2f} GB{' free' if device == 'cpu' else ''}"
        logger.train(f"each process is about to need {' and '.join(texts)}{has}")
        if free is None:
            return
        for text in self.what_would_be_faster(free):
            logger.train(text)
        kind = max(self.totals, key=self.totals.get)
        if self.totals[kind] > free:
            logger.warning(f"that may not fit: {self.what_would_help(kind)}")

    def what_would_help(self, kind: str) -> str:
        """Return which flags would save how much where ``kind`` takes too much, the most first."""
        setting, estimate = self.settings[kind], {"train": training_memory, "eval": evaluation_memory}[kind]
        changes = {f"--per_device_{kind}_batch_size 1": {"batch_size": 1}}
        degree = 2 * setting.degree
        if not setting.on_cpu and not (setting.config.num_attention_heads % degree):
            changes[f"--tensor_parallel_degree {degree}"] = {"degree": degree}
        if kind == "train":
            changes["--recompute"] = {"recompute": True}
            if supports_dtype("float16"):
                changes["--fp16 --fp16_opt_level O2"] = {"precision": "O2"}
            if setting.lora_config is None:
                changes["--lora True"] = {"lora_config": new_lora_config()}
        if not setting.quantized and (kind == "eval" or setting.lora_config):
            changes["--weight_quantize_algo weight_only_int8"] = {"quantized": True}
        now, saved = estimate(setting)["total"], {}
        for flags, change in changes.items():
            saved[flags] = now - estimate(dataclasses.replace(setting, **change))["total"]
        ways = sorted((flags for flags in saved if saved[flags] > 0), key=saved.get, reverse=True)
        ways = ", ".join(f"{flags} ({saved[flags] / 1e9:.2f} GB less)" for flags in ways)
        return f"what would help most is {ways}" if ways else "a smaller model or shorter texts would help"

    def what_would_be_faster(self, free: int) -> list[str]:
        """Return sentences about the flags that would make the run faster and fit into ``free`` bytes.

        The paces are those of GLM-Large on an H100. A CPU gains nothing by larger batches.
        """
        texts, most = [], 0.9 * free  # the estimates may be wrong by a tenth
        train, evaluation = self.settings.get("train"), self.settings.get("eval")
        texts += self._sharing_data(most)
        if train and train.recompute:
            size = training_memory(dataclasses.replace(train, recompute=False))["total"]
            if size < most:
                pace = "train faster" if train.on_cpu else "a step take about two thirds of the time"
                need = f"{size / 1e9:.2f} GB to train, which fits, and {pace}"
                texts.append(f"without --recompute it would need {need}")
        if evaluation and evaluation.batch_size <= 4 and self.records >= 16 and not evaluation.on_cpu:
            larger = evaluation_memory(dataclasses.replace(evaluation, batch_size=16))["total"]
            size = self.totals["eval"] + larger - evaluation_memory(evaluation)["total"]
            if size < most:
                need = f"it would need {size / 1e9:.2f} GB to evaluate, which fits, and be"
                texts.append(f"with --per_device_eval_batch_size 16 {need} several times as fast")
        return texts

    def _sharing_data(self, most: float) -> list[str]:
        """Return a sentence where the model is split though it fits on a card, list of one or none."""
        first = next(iter(self.settings.values()))
        degree, sharding = first.degree, max(old.sharding_degree for old in self.settings.values())
        if degree == 1 or first.on_cpu:
            return []
        flag = f"--tensor_parallel_degree {degree}"
        ways = {f"without {flag}": sharding if sharding == 1 else sharding * degree}
        if "train" in self.settings and sharding == 1:
            ways[f"with --sharding stage1 in place of {flag}"] = degree
        for flags, shards in ways.items():
            alone = {"degree": 1, "sharding_degree": shards}
            settings = {kind: dataclasses.replace(old, **alone) for kind, old in self.settings.items()}
            size = max(MemoryEstimate(settings).totals.values())
            if size < most:
                text = f"{flags} the same cards would share the data, {degree} times the records a step, and "
                return [f"{text}be faster: each would need {size / 1e9:.2f} GB, which fits"]
        return []

    def explain(self, doing: str, kind: str) -> str:
        """Return the line of a run that ran out of memory ``doing`` something of a ``kind``."""
        device, free = paddle.get_device(), free_memory()
        if kind not in self.settings:  # a pipe
            return f"out of memory on {device} {doing}: lower --per_device_eval_batch_size or --num_beams"
        need = f"{self.totals[kind] / 1e9:.2f} GB were estimated"
        has = "" if free is None else f", {device} has {free / 1e9:.2f} GB"
        return f"out of memory on {device} {doing} ({need}{has}): {self.what_would_help(kind)}"

    @contextlib.contextmanager
    def running_out(self, doing: str, kind: str):
        """Turn an exception for want of memory, within this block, into a Fault that explains it."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Fault(self.explain(doing, kind)) from error


def longest(dataset: list[dict]) -> dict[str, int]:
    """Return the token counts of the longest source and of the longest target."""
    sizes = zip(*((feature["source_length"], len(feature["labels"])) for feature in dataset))
    return dict(zip(("source_length", "target_length"), map(max, sizes)))


def estimate_memory(args, pretrained, generation, train_dataset, test_dataset) -> MemoryEstimate:
    """Estimate and say what memory this run is about to take."""
    config, settings = pretrained.config, {}
    common = {
        "degree": max(args.tensor_parallel_degree, 1),
        "lora_config": pretrained.adapter and pretrained.adapter.config,
        "quantized": pretrained.quantized,
    }
    if train_dataset:
        settings["train"] = Setting(
            config,
            args.per_device_train_batch_size,
            **longest(train_dataset),
            **common,
            precision=args.fp16_opt_level if args.fp16 or args.bf16 else "float32",
            sharding_degree=max(args.sharding_parallel_degree, 1),
            recompute=args.recompute,
            master_grad=args.amp_master_grad,
            accumulates=args.gradient_accumulation_steps > 1,
        )
    if test_dataset:
        lengths = longest(test_dataset)
        lengths["target_length"] = max(lengths["target_length"], generation.tgt_length)
        size, beams = args.per_device_eval_batch_size, generation.num_beams
        precision = "float32" if args.weights_dtype() == "float32" else "O2"
        settings["eval"] = Setting(config, size, **lengths, **common, precision=precision, num_beams=beams)
    estimate = MemoryEstimate(settings, len(test_dataset))
    estimate.log()
    return estimate
