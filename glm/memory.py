"""What a run takes: counted before, measured after."""

import contextlib
import re

import paddle
from paddlenlp.utils.log import logger

from glm.device import on_cpu
from glm.lora import adapter_shapes, is_split_adapter, new_lora_config


def count_parameters(config, degree=1, lora_config=None):
    """The numbers of all weights and of those that are trained, on one of ``degree`` tensor-parallel processes."""
    width, layers = config.hidden_size, config.num_layers
    split = layers * (12 * width**2 + 7 * width) + config.vocab_size * width
    whole = layers * 6 * width + 2 * (config.max_sequence_length + 1) * width + 2 * width
    count = split // degree + whole
    if lora_config is None:
        return count, count
    trained = 0
    for name, shape in adapter_shapes(config, lora_config).items():
        trained += shape[0] * shape[1] // (degree if is_split_adapter(name) else 1)
    return count + trained, trained


def _loading_memory(weights, table):
    """Bytes beside the ``weights`` while they are loaded, the ``table`` of embeddings among them: of tensors on a CPU.

    The file's are there too. Where Paddle can't begin a peak anew, in 2.6.2, that may be the peak of the whole run.
    """
    return weights + 2 * table if on_cpu() and paddle.__version__.startswith("2.") else 0


def training_memory(
    config, batch_size, source_length, target_length, precision="float32", recompute=False, degree=1, lora_config=None,
    master_grad=True, sharding_degree=1,
):  # fmt: skip
    """Bytes that a process needs at the peak of a training step, by what they are for.

    What the layers here keep for the backward pass is counted tensor by tensor; so are the largest of the tensors that
    live for a moment. What a device's library takes for itself is not in it.

    Args:
        config (GLMConfig). batch_size: records of a pass. source_length, target_length (int): of the longest of them.
        precision (str): float32, O1 or O2. degree: of tensor parallelism. master_grad: as --amp_master_grad.

    Returns:
        dict: of weights, optimizer (moments and master weights), gradients, activations and, the sum, total.
    """
    width, heads, layers = config.hidden_size, config.num_attention_heads / degree, config.num_layers
    vocab, length = config.vocab_size / degree, source_length + target_length
    weight_size = 2 if precision == "O2" else 4
    size = 4 if precision == "float32" else 2  # of what linears give
    residual = (
        4 if precision == "O1" else size
    )  # of hidden states; autocast keeps sums and softmax in float32
    count, trained = count_parameters(config, degree, lora_config)
    positions, pairs = batch_size * length, batch_size * heads * length**2

    # Of a layer: both inputs and outputs of layer norms, q k v and their context, twice four widths, dropout's masks.
    layer = positions * width * (2 * residual + (2 + 12 / degree) * size + 2)
    layer += pairs * (residual + (size + 1 if config.attention_dropout_prob else 0))
    layer += 24 * width**2 / degree if precision == "O1" else 0  # the linears' weights, cast
    layer_gradients = 2 * pairs * residual + positions * 4 * width / degree * size
    mask = batch_size * length**2 * 4 * (heads if on_cpu() else 1)
    table = batch_size * target_length * vocab
    head = 0 if lora_config else vocab * width * weight_size

    kept = layers * positions * width * residual if recompute else layers * layer
    gradients, optimizer = trained * weight_size, trained * (12 if precision == "O2" else 8) / sharding_degree
    loading = _loading_memory(count * weight_size, vocab * width * 4)
    activations = kept + mask
    peaks = {
        "loss": (head, activations + table * (4 + size)),
        "last layer": (head, activations + layer_gradients + (layer if recompute else 0)),
        "first layer": (gradients, mask + layer + layer_gradients),
        # Clipping makes all gradients anew.
        "update": (trained * (4 if master_grad else weight_size) * 2, 0),
        "loading": (0, loading - optimizer),  # before which there is no optimizer
    }
    gradients, activations = max(peaks.values(), key=sum)
    needs = {
        "weights": count * weight_size,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": activations,
    }
    return {**needs, "total": sum(needs.values())}


def evaluation_memory(
    config, batch_size, source_length, target_length, num_beams, dtype="float32", degree=1, lora_config=None
):
    """Bytes that a process needs at the peak of an evaluation by beam search, by what they are for.

    Args: as of ``training_memory``; dtype: of the weights. Half of the beams' past slots are taken to be seen.

    Returns:
        dict: of weights, caches (keys and values), activations and, the sum, total.
    """
    width, heads, layers = config.hidden_size, config.num_attention_heads / degree, config.num_layers
    size = 4 if dtype == "float32" else 2
    vocab, length = config.vocab_size / degree, source_length + target_length
    sources = batch_size * source_length * width * size
    pairs = batch_size * heads * size  # for each query and key
    slots = source_length + num_beams * target_length / 2
    caches = layers * batch_size * slots * 2 * width / degree * size
    mask = batch_size * length**2 * 4 * (heads if on_cpu() else 1)
    stages = [
        # prefill: q, k and v are kept until the beams take over
        (layers * 3 * sources / degree, 2 * pairs * source_length**2 + sources * (3 + 8 / degree)),
        # decoding: a layer's cache is copied when it grows; logits, and their softmax
        (caches, caches / layers + batch_size * num_beams * vocab * (size + 8)),
        # the loss
        (0, mask + 2 * pairs * length**2 + batch_size * length * width * size * (layers + 1 + 7 / degree)),
        (
            0,
            mask
            + batch_size * length * width * size * layers
            + batch_size * target_length * vocab * (4 + size),
        ),
    ]
    weights = count_parameters(config, degree, lora_config)[0] * size
    stages.append((0, _loading_memory(weights, vocab * width * 4)))
    caches, activations = max(stages, key=sum)
    needs = {"weights": weights, "caches": caches, "activations": activations}
    return {**needs, "total": sum(needs.values())}


def memory_peak(reset=False):
    """Bytes of the live tensors of this process at their peak, by Paddle's allocator, since it began or was reset.

    Args: reset (bool): begin anew, where Paddle can (2.6.2 can't).
    """
    core, (kind, _, number) = paddle.base.core, paddle.get_device().partition(":")
    kind, device = "host" if kind == "cpu" else "device", int(number or 0)
    if reset and hasattr(core, f"{kind}_memory_stat_reset_peak_value"):
        getattr(core, f"{kind}_memory_stat_reset_peak_value")("Allocated", device)
    return getattr(core, f"{kind}_memory_stat_peak_value")("Allocated", device)


def free_memory():
    """Bytes that are free on a CPU, or that a GPU has in all; None where the device in use can't be asked."""
    kind, _, number = paddle.get_device().partition(":")
    if kind != "cpu":
        return paddle.device.cuda.get_device_properties(int(number)).total_memory if kind == "gpu" else None
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        return int(re.search(r"MemAvailable:\s*(\d+)", file.read())[1]) * 1024
    return None


def estimate_memory(args, config, lora_config, generation, train_dataset, test_dataset):
    """Say what memory this run is about to take, and warn where that is more than there is. Never ends the run.

    Returns:
        dict: bytes of "train" and "eval", of those that are to be.
    """
    degree, half = max(args.tensor_parallel_degree, 1), args.fp16 or args.bf16
    common = {"degree": degree, "lora_config": lora_config}

    def need(kind, **changes):
        """Bytes of the batch that takes most, with some of the settings changed."""
        dataset = train_dataset if kind == "train" else test_dataset
        source_length = max(feature["source_length"] for feature in dataset)
        target_length = max(len(feature["labels"]) for feature in dataset)
        setting = {"source_length": source_length, "target_length": target_length, **common}
        if kind == "train":
            setting.update(
                batch_size=args.per_device_train_batch_size, precision=args.fp16_opt_level if half else "float32",
                recompute=args.recompute, master_grad=args.amp_master_grad,
                sharding_degree=max(args.sharding_parallel_degree, 1),
            )  # fmt: skip
            return training_memory(config, **{**setting, **changes})
        setting.update(
            batch_size=args.per_device_eval_batch_size, num_beams=generation.num_beams, dtype=args.weights_dtype(),
            target_length=max(target_length, generation.tgt_length),
        )  # fmt: skip
        return evaluation_memory(config, **{**setting, **changes})

    datasets = {"train": train_dataset, "eval": test_dataset}
    needs = {kind: need(kind) for kind in datasets if datasets[kind]}
    if len(needs) == 2:  # what the optimizer holds stays
        needs["eval"]["total"] += needs["train"]["optimizer"]
    if not needs:
        return {}
    free = free_memory()
    texts = []
    for kind, parts in needs.items():
        numbers = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if name != "total")
        texts.append(f"{parts['total'] / 1e9:.2f} GB to {kind} ({numbers})")
    device = paddle.get_device()  # of a GPU Paddle can't say what others take
    has = "" if free is None else f"; {device} has {free / 1e9:.2f} GB{' free' if device == 'cpu' else ''}"
    logger.train(f"each process is about to need {' and '.join(texts)}{has}")
    kind = max(needs, key=lambda kind: needs[kind]["total"])
    if free is not None and needs[kind]["total"] > free:
        ways = {
            f"--tensor_parallel_degree {2 * degree}": {"degree": 2 * degree},
            f"--per_device_{kind}_batch_size 1": {"batch_size": 1},
        }
        if kind == "train":
            ways["--recompute"], ways["--fp16 --fp16_opt_level O2"] = {"recompute": True}, {"precision": "O2"}
            if lora_config is None:
                ways["--lora True"] = {"lora_config": new_lora_config()}
        now = need(kind)["total"]
        saved = {way: now - need(kind, **changes)["total"] for way, changes in ways.items()}
        best = [
            f"{way} ({saved[way] / 1e9:.2f} GB less)"
            for way in sorted(saved, key=saved.get)[::-1]
            if saved[way] > 0
        ]
        logger.warning(f"that may not fit: what would help most is {', '.join(best)}")
    return {kind: parts["total"] for kind, parts in needs.items()}
