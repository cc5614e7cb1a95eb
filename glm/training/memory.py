"""The memory that a run takes: estimated before, measured after."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Optional

import paddle
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig
from paddlenlp.utils.log import logger

from glm.device import captures, on_cpu
from glm.processes import gather_objects
from glm.weights.adapters import new_lora_config
from glm.weights.shapes import count_parameters

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
    num_beams: int = 1

    @property
    def weight_size(self):
        """Size of one weight, and of one number of the hidden states: autocast sums them in float32."""
        return 2 if self.precision == "O2" else 4

    @property
    def linear_size(self):
        """Size of one number that a linear gives in training."""
        return 4 if self.precision == "float32" else 2

    @property
    def length(self):
        return self.source_length + self.target_length

    @property
    def heads(self):
        """Attention heads of this process."""
        return self.config.num_attention_heads / self.degree

    @property
    def vocab_size(self):
        """Entries of the vocabulary of this process."""
        return self.config.vocab_size / self.degree

    @property
    def mask_size(self):
        """Size of the additive mask, which a CPU holds once for each head."""
        return self.batch_size * self.length**2 * 4 * (self.heads if on_cpu() else 1)


def _gradient_copies(setting):
    """Return how many times the gradients of a process exist while it clips them.

    Paddle 3 clips in place, and so do fleet's optimizers of several processes in every
    version. Paddle 2 alone on one process makes all gradients anew.
    """
    one_process = setting.degree * setting.sharding_degree == 1
    return 2 if PADDLE_2 and one_process else 1


def _largest(peaks):
    """Return that pair of ``peaks``, a dict, whose sum is the largest."""
    return max(peaks.values(), key=sum)


def _layer_memory(setting):
    """Return the bytes that a layer keeps for its backward pass, and those of that pass's peak."""
    config, degree, precision = setting.config, setting.degree, setting.precision
    residual, linear = setting.weight_size, setting.linear_size
    table = setting.batch_size * setting.length * config.hidden_size  # a hidden state's numbers
    scores = setting.batch_size * setting.heads * setting.length**2
    dropout_mask = 1 if config.attention_dropout_prob else 0
    # The first layer norm's input and output; q k v, scaled queries and the context.
    attention = table * (residual + linear + 5 * linear / degree)
    # The second layer norm's, and gelu's: autocast's float32 biases make its input float32.
    mlp = table * (residual + linear + 4 * (residual + linear) / degree)
    if config.output_dropout_prob:  # masks
        attention, mlp = attention + table, mlp + table
    if precision == "O1":  # the linears' weights, cast
        attention += 24 * config.hidden_size**2 / degree
    softmax = scores * (residual + dropout_mask)
    if dropout_mask or precision == "O1":  # and what of it is left, or what it is cast to
        softmax += scores * linear
    kept = attention + softmax + mlp
    # At the softmax its output and two gradients of its size are alive, and no more of the MLP.
    of_softmax = attention + scores * (3 * residual + dropout_mask) + 3 * table * linear
    return kept, max(of_softmax, kept + 4 * table / degree * linear)


def training_memory(setting):
    """Estimate the bytes of a process at the peak of a training step, by what they are for.

    What the layers here keep for the backward pass is counted tensor by tensor, and so
    are the largest tensors that live for a moment. What a device's library takes for
    itself is not counted.

    Returns:
        dict: weights, optimizer (moments and master weights), gradients, activations,
        and their total.
    """
    config, recompute = setting.config, setting.recompute
    count, trained = count_parameters(config, setting.degree, setting.lora_config)
    weights = count * setting.weight_size
    optimizer = trained * (12 if setting.precision == "O2" else 8) / setting.sharding_degree
    gradients = trained * setting.weight_size
    clipped = trained * (4 if setting.master_grad else setting.weight_size)

    layer, backward = _layer_memory(setting)
    layer_input = setting.batch_size * setting.length * config.hidden_size * setting.weight_size
    activations = config.num_layers * (layer_input if recompute else layer) + setting.mask_size
    logits = setting.batch_size * setting.target_length * setting.vocab_size
    loss = logits * (4 + setting.linear_size)
    embeddings = setting.vocab_size * config.hidden_size
    if setting.precision == "O1":  # the head's weight or its gradient, cast
        loss += embeddings * setting.linear_size
    head_gradient = 0 if setting.lora_config else embeddings * setting.weight_size
    peaks = {  # (gradients, activations) at the moments that may take most
        "loss": (head_gradient, activations + loss),
        "last layer": (head_gradient, activations + backward - (0 if recompute else layer)),
        "first layer": (gradients, setting.mask_size + backward),
        # The table's gradient as the embedding comes to that as the head.
        "embeddings": (gradients + head_gradient, setting.mask_size + layer_input),
        "update": (_gradient_copies(setting) * clipped, 0),
    }
    gradients, activations = _largest(peaks)
    bytes_needed = {
        "weights": weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": activations,
    }
    return {**bytes_needed, "total": sum(bytes_needed.values())}


def evaluation_memory(setting):
    """Estimate the bytes of a process at the peak of an evaluation by beam search, by what they are for.

    The cache has slots for all tokens at once where CUDA graphs are captured. Elsewhere it
    grows, and half of the slots for generated tokens are taken to hold keys and values.

    Returns:
        dict: weights, caches (keys and values), activations, and their total.
    """
    config, degree, size = setting.config, setting.degree, setting.weight_size
    width, layers, batch_size = config.hidden_size, config.num_layers, setting.batch_size
    source = batch_size * setting.source_length * width * size  # hidden states of the sources
    hidden = batch_size * setting.length * width * size  # and of whole sequences
    scores = batch_size * setting.heads * size  # of one query and one key
    tokens = setting.target_length / (1 if captures() else 2)
    slots = setting.source_length + setting.num_beams * tokens
    caches = layers * batch_size * slots * 2 * width / degree * size
    weights = count_parameters(config, degree, setting.lora_config)[0] * size

    prefill = 2 * scores * setting.source_length**2 + source * (3 + 8 / degree)
    logits = batch_size * setting.num_beams * setting.vocab_size * (size + 12)
    target_logits = batch_size * setting.target_length * setting.vocab_size * (4 + size)
    last_layer = 2 * scores * setting.length**2 + hidden * (layers + 1 + 7 / degree)
    peaks = {  # (caches, activations) at the moments that may take most
        # Keys and values, on a CPU the queries too, are kept until the beams take over.
        "prefill": (layers * (3 if on_cpu() else 2) * source / degree, prefill),
        # One layer's cache at a time is copied when it grows.
        "decoding": (caches, max(caches / layers, logits)),
        "last layer of the loss": (0, setting.mask_size + last_layer),
        "loss": (0, setting.mask_size + hidden * layers + target_logits),
    }
    caches, activations = _largest(peaks)
    bytes_needed = {"weights": weights, "caches": caches, "activations": activations}
    return {**bytes_needed, "total": sum(bytes_needed.values())}


def memory_peak(reset=False):
    """Return the bytes of this process's live tensors at their peak, by Paddle's allocator.

    The peak is that since the process began, or since the last ``reset``, which Paddle
    2.6.2 can't do.
    """
    core, (kind, _, number) = paddle.base.core, paddle.get_device().partition(":")
    kind, device = "host" if kind == "cpu" else "device", int(number or 0)
    if reset and hasattr(core, f"{kind}_memory_stat_reset_peak_value"):
        getattr(core, f"{kind}_memory_stat_reset_peak_value")("Allocated", device)
    return getattr(core, f"{kind}_memory_stat_peak_value")("Allocated", device)


def memory_metrics(kind, estimate, peak):
    """Return a run's results about memory, in GB, dict. All processes have to call it.

    Args:
        kind (str): train, eval or test.
        estimate (int): bytes, or None.
        peak (int): bytes of this process, or None. The results hold the largest process's.
    """
    peak = max((peak for peak in gather_objects(peak) if peak is not None), default=None)
    sizes = {"estimated": estimate, "peak": peak}
    return {f"{kind}_memory_{name}_gb": size and round(size / 1e9, 3) for name, size in sizes.items()}


def free_memory():
    """Return the bytes that are free on a CPU, or that a GPU has in all; None of another device."""
    kind, _, number = paddle.get_device().partition(":")
    if kind == "gpu":
        return paddle.device.cuda.get_device_properties(int(number)).total_memory
    if kind == "cpu":
        with contextlib.suppress(OSError):
            available = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
            return int(available[1]) * 1024
    return None


def longest(dataset):
    """Return the token counts of the longest source and of the longest target."""
    return {
        "source_length": max(feature["source_length"] for feature in dataset),
        "target_length": max(len(feature["labels"]) for feature in dataset),
    }


def settings_of_run(args, config, lora_config, generation, train_dataset, test_dataset):
    """Return the Settings of "train" and "eval", those that the run is about to do."""
    degree, settings = max(args.tensor_parallel_degree, 1), {}
    if train_dataset:
        settings["train"] = Setting(
            config,
            args.per_device_train_batch_size,
            **longest(train_dataset),
            precision=args.fp16_opt_level if args.fp16 or args.bf16 else "float32",
            degree=degree,
            sharding_degree=max(args.sharding_parallel_degree, 1),
            lora_config=lora_config,
            recompute=args.recompute,
            master_grad=args.amp_master_grad,
        )
    if test_dataset:
        lengths = longest(test_dataset)
        lengths["target_length"] = max(lengths["target_length"], generation.tgt_length)
        settings["eval"] = Setting(
            config,
            args.per_device_eval_batch_size,
            **lengths,
            precision="float32" if args.weights_dtype() == "float32" else "O2",
            degree=degree,
            lora_config=lora_config,
            num_beams=generation.num_beams,
        )
    return settings


def what_would_help(kind, setting):
    """Return flags and the bytes that each of them would save, [(str, float)], the most first."""
    estimate = {"train": training_memory, "eval": evaluation_memory}[kind]
    changes = {
        f"--tensor_parallel_degree {2 * setting.degree}": {"degree": 2 * setting.degree},
        f"--per_device_{kind}_batch_size 1": {"batch_size": 1},
    }
    if kind == "train":
        changes["--recompute"] = {"recompute": True}
        changes["--fp16 --fp16_opt_level O2"] = {"precision": "O2"}
        if setting.lora_config is None:
            changes["--lora True"] = {"lora_config": new_lora_config()}
    now, saved = estimate(setting)["total"], {}
    for flags, change in changes.items():
        saved[flags] = now - estimate(dataclasses.replace(setting, **change))["total"]
    ordered = sorted(saved.items(), key=lambda item: item[1], reverse=True)
    return [(flags, size) for flags, size in ordered if size > 0]


def what_would_be_faster(settings, totals, free, records):
    """Return sentences about the flags that would make the run faster and fit, list of str.

    The paces are those of GLM-Large on an H100. A CPU gains nothing by larger batches.

    Args:
        settings (dict): the Settings of "train" and "eval", those that the run is about to do.
        totals (dict): their bytes. free (int): the bytes that there are. records (int): to
            evaluate.
    """
    texts = []
    most = 0.9 * free  # the estimates may be wrong by a tenth
    if "train" in settings and settings["train"].recompute:
        size = training_memory(dataclasses.replace(settings["train"], recompute=False))["total"]
        if size < most:
            pace = "train faster" if on_cpu() else "a step take about two thirds of the time"
            size = f"{size / 1e9:.2f} GB"
            texts.append(f"without --recompute it would need {size} to train, which fits, and {pace}")
    if "eval" in settings and settings["eval"].batch_size <= 4 and records >= 16 and not on_cpu():
        setting = dataclasses.replace(settings["eval"], batch_size=16)
        size = totals["eval"] + evaluation_memory(setting)["total"]
        size -= evaluation_memory(settings["eval"])["total"]
        if size < most:
            size = f"{size / 1e9:.2f} GB"
            texts.append(
                f"with --per_device_eval_batch_size 16 it would need {size} to evaluate, which fits, "
                "and be several times as fast"
            )
    return texts


def estimate_memory(args, pretrained, generation, train_dataset, test_dataset):
    """Say what memory this run is about to take, and warn where that is more than there is.

    Returns:
        dict: bytes of "train" and "eval", those that the run is about to do.
    """
    lora_config = pretrained.adapter and pretrained.adapter.config
    settings = settings_of_run(args, pretrained.config, lora_config, generation, train_dataset, test_dataset)
    if not settings:
        return {}
    estimates = {}
    if "train" in settings:
        estimates["train"] = training_memory(settings["train"])
    if "eval" in settings:
        estimates["eval"] = evaluation_memory(settings["eval"])
        if "train" in settings:  # the optimizer stays while the run evaluates
            estimates["eval"]["total"] += estimates["train"]["optimizer"]
    totals = {kind: parts["total"] for kind, parts in estimates.items()}

    texts = []
    for kind, parts in estimates.items():
        sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        texts.append(f"{totals[kind] / 1e9:.2f} GB to {kind} ({sizes})")
    free, device = free_memory(), paddle.get_device()
    has = ""
    if free is not None:  # of a GPU Paddle can't say what other processes take
        has = f"; {device} has {free / 1e9:.2f} GB{' free' if device == 'cpu' else ''}"
    logger.train(f"each process is about to need {' and '.join(texts)}{has}")
    if free is None:
        return totals
    for text in what_would_be_faster(settings, totals, free, len(test_dataset)):
        logger.train(text)
    kind = max(totals, key=totals.get)
    if totals[kind] > free:
        ways = what_would_help(kind, settings[kind])
        advice = ", ".join(f"{flags} ({size / 1e9:.2f} GB less)" for flags, size in ways)
        logger.warning(f"that may not fit: what would help most is {advice}")
    return totals
