"""GLM's layers as computed here, and the device that computes them.

The loss, attention, the forward that takes its attention from outside, loading. Modules above ask here what the machine
can do; no other looks at a device.
"""

import contextlib
import copy
import ctypes
import functools
import glob
import logging
import mmap
import os
import pickle
import re

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers.conversion_utils import split_or_merge_func
from paddlenlp.utils.log import logger

from data import InputError

PADDLE_2_ARCHS = (61, 70, 75, 80, 86)  # what PyPI's wheel of 2.6.2 has code for, read from it: it can't be asked
MASKED = -65504.0  # what is added to the attention score of a hidden position: float16's lowest


# ---------------------------------------------------------------------------------------------------------- device


def use_device(name=""):
    """Make ``name`` the device in use, as paddle.set_device does, or the CPU where Paddle can use no GPU.

    Args:
        name (str): gpu, gpu:N, cpu, xpu or npu; "": a GPU if there is one, else the CPU.

    Returns:
        str: the device in use. Raises InputError where there is no card N.
    """
    # Asked first, for paddle.set_device("gpu") without a GPU ends the process with nothing to catch.
    cards = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if not name or (name.startswith("gpu") and not cards):
        name = "gpu" if cards else "cpu"
        if not cards:
            logger.warning("Paddle can use no GPU here: running on the CPU")
    if name.startswith("gpu:") and name[4:] not in map(str, range(cards)):
        raise InputError(f"--device is {name}: the {cards} cards here are gpu:0 to gpu:{cards - 1}")
    if name.startswith("gpu"):
        check_card(int(name[4:] or os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]))
    paddle.set_device(name)
    # The position embeddings' gradients would be summed in another order on each tensor-parallel process of a GPU, and
    # the copies, which are updated each by its own, drift apart.
    with contextlib.suppress(ValueError):  # builds without GPU code have no such flag
        paddle.set_flags({"FLAGS_embedding_deterministic": 1})
    return name


def check_card(card):
    """Raise InputError where the installed Paddle has no machine code for the GPU number ``card``; else kernels fail.

    Code runs on cards of its own major compute capability whose minor one is not lower. Paddle 3 says what it has code
    for; it may also hold PTX for newer cards, which is compiled when first used: those are a warning.
    """
    major, minor = paddle.device.cuda.get_device_capability(card)
    compiled = paddle.version.cuda_archs() if hasattr(paddle.version, "cuda_archs") else PADDLE_2_ARCHS
    compiled = [divmod(int(arch), 10) for arch in compiled]
    if not compiled or any(major == arch[0] and minor >= arch[1] for arch in compiled):
        return
    stack, newer = "requirements.txt", (major, minor) > max(compiled)
    if (major, minor) > divmod(PADDLE_2_ARCHS[-1], 10):
        stack = "requirements-paddle3.txt and the GPU wheel of your CUDA version that it names"
    text = f"Paddle {paddle.__version__} has no code for a card of compute capability {major}.{minor}: install {stack}"
    if newer and hasattr(paddle.version, "cuda_archs"):
        logger.warning(text + ", if this run fails at its first kernel")
    else:
        raise InputError(text)


def on_cpu():
    """Whether the device in use is the CPU."""
    return paddle.get_device() == "cpu"


def supports_dtype(name):
    """Whether the device in use computes in ``name``, 'float16' or 'bfloat16', and gains by it.

    On NVIDIA's cards from compute capability 7 and 8: those of 5.3 to 6.2 know float16, but most compute in it slower
    than in float32.
    """
    kind = paddle.get_device().split(":")[0]
    if kind == "gpu":
        return paddle.device.cuda.get_device_capability() >= {"float16": (7, 0), "bfloat16": (8, 0)}[name]
    return kind != "cpu" and getattr(paddle.amp, f"is_{name}_supported")()


def use_the_whole_cpu():
    """Let Paddle use the whole of a CPU. To be called before the first product.

    Paddle starts with one thread, its MKL takes a slow path on processors that are not Intel's, and glibc returns each
    large tensor to the system, so that the next one costs page faults again: more than many an operator itself. A
    thread count that the user set stays; processes of one launch share the cores.
    """
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    libc = ctypes.CDLL(None)
    # Beside a GPU the memory in which a checkpoint was read is better returned.
    if on_cpu() and hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there for the next ones
    try:  # importing paddle sets the variable, to 1, in os.environ: what the user gave is what the process began with
        with open("/proc/self/environ", "rb") as file:
            given = b"\0OMP_NUM_THREADS=" in b"\0" + file.read()
    except OSError:
        given = False
    if given:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # By this call, not by OMP_NUM_THREADS, whose use makes paddle print a warning at import.
    paddle.base.core.set_num_threads(max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", 1))))


# ------------------------------------------------------------------------------------------------------------ loss


def log_sum_exp(logits, probabilities, group):
    """Of the whole rows, of which each process of ``group`` holds a part: what it is here, and of all, float32 [...].

    From what is at hand: the likeliest token's log p is its logit less the log-sum-exp, and its p is at least 1 / V, so
    that nothing underflows.
    """
    local = whole = logits - paddle.log(probabilities)
    if group is not None:
        largest = local.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        total = paddle.exp(local - largest)
        dist.all_reduce(total, group=group)
        whole = largest + paddle.log(total)
    return local, whole


class LabelSmoothedLoss(PyLayer):
    """Head and label-smoothed cross entropy in one, so that only one [N, V] table ever exists.

    Per target: (1 - e) * (-log p[label]) + e * mean over the vocabulary of (-log p), after Szegedy et al.
    (arXiv 1512.00567), in float32. Its gradient by the logits is p - (1 - e) * onehot(label) - e / V.

    With tensor parallelism each process holds a part of the vocabulary; only vectors [N] and the hidden states'
    gradient are reduced over the group.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, label_smoothing, group=None):
        """Args: hidden_states [N, C], weight [V / processes, C], labels int64 [N]. Returns the losses, float32 [N]."""
        logits = paddle.matmul(hidden_states, weight, transpose_y=True)  # [N, V / processes]
        ctx.dtype, ctx.group = logits.dtype, group
        logits = logits.astype("float32")
        part = logits.shape[1]
        labels = labels - (0 if group is None else group.rank * part)
        here = ((labels >= 0) & (labels < part)).astype("float32")  # whether the label is in this part
        label_index = paddle.arange(labels.shape[0]) * part + labels.clip(0, part - 1)  # in the flat table
        sums = paddle.stack([logits.reshape([-1]).gather(label_index) * here, logits.sum(-1)])
        largest = logits.max(-1)
        probabilities = F.softmax_(logits)
        local, whole = log_sum_exp(largest, probabilities.max(-1), group)
        ctx.vocab_size = part
        if group is not None:
            dist.all_reduce(sums, group=group)
            ctx.vocab_size *= group.nranks
        ctx.label_share, ctx.smooth_share = (1 - label_smoothing) * here, label_smoothing / ctx.vocab_size
        ctx.save_for_backward(hidden_states, weight, probabilities, label_index, paddle.exp(local - whole))
        return whole - (1 - label_smoothing) * sums[0] - ctx.smooth_share * sums[1]

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight, table, label_index, part_share = ctx.saved_tensor()
        if ctx.group is not None:  # from probabilities within this part to those within the vocabulary
            table.multiply_(part_share.unsqueeze(-1))
        table.subtract_(paddle.full([1], ctx.smooth_share))
        flat = table.reshape([-1])
        flat.scatter_(label_index, flat.gather(label_index) - ctx.label_share)
        table = flat.reshape(table.shape).multiply_(grad.unsqueeze(-1)).astype(ctx.dtype)
        grad_hidden_states = paddle.matmul(table, weight.astype(ctx.dtype)).astype(hidden_states.dtype)
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_states, group=ctx.group)
        if weight.stop_gradient:  # as with LoRA
            return grad_hidden_states, None
        grad_weight = paddle.matmul(table, hidden_states.astype(ctx.dtype), transpose_x=True)
        return grad_hidden_states, grad_weight.astype(weight.dtype)


# -------------------------------------------------------------------------------------------------------- attention


def additive_mask(visible, dtype):
    """0 where ``visible`` is 1, MASKED where it is 0: what is added to attention scores. Made on the device."""
    return ((1 - visible) * MASKED).astype(dtype)


def attend(query, keys, values, mask, drop=None):
    """Scaled dot-product attention, all [..., H, length, D].

    Args:
        mask: 0 or MASKED, [B, H or 1, queries, keys], or None where every key is visible.
        drop: dropout of the attention weights.
    """
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, keys, transpose_y=True)
    if mask is not None:
        scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    weights = F.softmax(scores)
    return paddle.matmul(weights if drop is None else drop(weights), values)


@functools.lru_cache(maxsize=64)
def _transposed_rows(shape, order):
    """Where the rows of [*shape, D] come from when all dimensions but the last change places, of the new shape."""
    return paddle.to_tensor(np.arange(np.prod(shape)).reshape(shape).transpose(order))


def _transpose_rows(inputs, order):
    """``inputs.transpose([*order, last])``: all but the last dimension change places."""
    if not on_cpu():
        return inputs.transpose([*order, len(order)])
    # The same from a look-up, which copies rows whole, takes Paddle a tenth of the time on a CPU, and its gradient too.
    return F.embedding(_transposed_rows(tuple(inputs.shape[:-1]), tuple(order)), inputs.reshape([-1, inputs.shape[-1]]))


def laid_out_by_head(attention):
    """Whether query_key_value gives [q k v] of one head after the other, or all q, all k, all v."""
    return attention.config.tensor_parallel_degree > 1


def split_heads(attention, projected):
    """What query_key_value gives, [B, Q, 3 * H * D], as queries, keys and values in one tensor, [3, B, H, Q, D]."""
    batch_size, length, _ = projected.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    if laid_out_by_head(attention):
        return _transpose_rows(projected.reshape([batch_size, length, heads, 3, head_size]), [3, 0, 2, 1])
    return _transpose_rows(projected.reshape([batch_size, length, 3, heads, head_size]), [2, 0, 3, 1])


def _merge_heads(context):
    """[..., B, H, Q, D] to [B, Q, H * D]."""
    *rest, heads, length, head_size = context.shape
    last = len(rest)
    return _transpose_rows(context, [*range(last), last + 1, last]).reshape([-1, length, heads * head_size])


def _dropout(dropout, state, inputs):
    """Drop by the generator ``state`` of tensor parallelism, or the one there is without it."""
    tracker = get_rng_state_tracker()
    with tracker.rng_state(state) if state in tracker.states_ else contextlib.nullcontext():
        return dropout(inputs)


def _linear_of_cpu(layer, inputs):
    """``inputs @ weight + bias``, with the bias as a product, for then its gradient is one.

    Paddle's gradient of a bias, a sum over rows, takes a CPU as long as those of the inputs and the weight together.
    """
    ones = paddle.ones([*inputs.shape[:-1], 1], inputs.dtype)
    return paddle.matmul(inputs, layer.weight) + paddle.matmul(ones, layer.bias.unsqueeze(0))


def prepare_for_training(model):
    """Change how PaddleNLP's layers compute, not what: the mask they are given is then 0 and MASKED, and added.

    The model then returns hidden states, through any wrapper; the head is applied to target positions alone. PaddleNLP
    multiplies the scores by a mask and adds another, made of it in every layer: three more passes over its largest
    tensors, which it keeps for the backward pass.
    """

    def forward(attention, hidden_states, mask, cache=None):
        query, key, value = paddle.unbind(split_heads(attention, attention.query_key_value(hidden_states)))
        # In evaluation dropout would copy what it is given.
        drop = functools.partial(_dropout, attention.attention_dropout, "local_seed") if attention.training else None
        context = _merge_heads(attend(query, key, value, mask, drop))
        return _dropout(attention.output_dropout, "global_seed", attention.dense(context))

    model.glm.output_predict = False
    for layer in model.glm.transformer.layers:
        layer.attention.forward = functools.partial(forward, layer.attention)
    # With tensor parallelism PaddleNLP draws this dropout from the generator that differs between the processes, as it
    # must for the split heads alone. Here they drop the same embeddings, and what follows is the same on all of them.
    stack = model.glm.transformer
    drop = functools.partial(_dropout, stack.embedding_dropout.forward, "embedding_seed")

    def embedding_dropout(inputs):
        outputs = drop(inputs)
        if stack.enable_recompute:  # else the first layer's activations, below which LoRA trains nothing, would be kept
            outputs.stop_gradient = False
        return outputs

    stack.embedding_dropout.forward = embedding_dropout
    if on_cpu():
        for layer in model.sublayers():
            if type(layer) is paddle.nn.Linear and not layer.bias.stop_gradient:  # not one with an adapter
                layer.forward = functools.partial(_linear_of_cpu, layer)


def linear(layer, inputs):
    """What ``layer`` computes: a plain one without what training adds, another (tensor-parallel, LoRA) by itself."""
    return F.linear(inputs, layer.weight, layer.bias) if type(layer) is paddle.nn.Linear else layer(inputs)


def forward(model, input_ids, position_ids, core):
    """GLM's layers without dropout, with their attention given: ``core(number, attention, projected)``.

    PaddleNLP's own forward caches hidden states and projects the whole prefix to keys and values at every step.

    Args:
        input_ids int64 [B, Q], position_ids int64 [B or 1, 2, Q or 1].
        core: of a layer's number, its attention and what that projects, [B, Q, 3 * H * D], makes [1, B, H, Q, D].

    Returns:
        hidden states after the last layer norm, [B, Q, C].
    """
    glm, stack = model.glm, model.glm.transformer
    hidden_states = (
        glm.word_embeddings(input_ids)
        + stack.position_embeddings(position_ids[:, 0])
        + stack.block_position_embeddings(position_ids[:, 1])
    )  # [B, Q, C]
    for number, layer in enumerate(stack.layers):
        attention, mlp = layer.attention, layer.mlp
        projected = linear(attention.query_key_value, layer.input_layernorm(hidden_states))
        context = _merge_heads(core(number, attention, projected))
        hidden_states = hidden_states + linear(attention.dense, context)
        inner = F.gelu(linear(mlp.dense_h_to_4h, layer.post_attention_layernorm(hidden_states)), approximate=True)
        hidden_states = hidden_states + linear(mlp.dense_4h_to_h, inner)
    return stack.final_layernorm(hidden_states)


def target_losses(model, wrapped, inputs, label_smoothing, group=None):
    """Label-smoothed losses of a batch's N targets, float32 [N].

    Args:
        model: the GLM, prepared for training. wrapped: the same, in what the Trainer has wrapped it in.
        inputs: tensors, as ``data.DataCollator`` gives them. group: of tensor parallelism.
    """
    mask = additive_mask(inputs["attention_mask"].astype("float32"), "float32")  # [B, 1, L, L]
    if on_cpu():  # which is slow at broadcasting
        mask = mask.tile([1, model.glm.transformer.layers[0].attention.num_attention_heads, 1, 1])
    hidden_states = wrapped(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask)[0]
    hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]]).gather(inputs["target_positions"])  # [N, C]
    weight = model.glm.word_embeddings.weight
    return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], label_smoothing, group)


# ------------------------------------------------------------------------------------------------------------ LoRA

LORA_WEIGHTS = "lora_model_state.pdparams"  # as PaddleNLP calls the file
LORA_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the linears of a layer


def is_split_adapter(name):
    """Whether tensor parallelism splits this weight of an adapter: B where outputs are split, A where inputs are."""
    return ("query_key_value" in name or "h_to_4h" in name) == name.endswith("lora_B")


class LoRA(LoRAModel):
    """PaddleNLP's low-rank adapters (arXiv 2106.09685), which are the same on one process and split over several."""

    # Its own split cuts query_key_value's output where one process has it, [all q | all k | all v], but the model's
    # parts have it by heads: an adapter trained with tensor parallelism would be another one on a single process, where
    # it knows no split at all.
    def _get_tensor_parallel_mappings(self, config, is_split=True):
        action = split_or_merge_func(
            is_split, config.tensor_parallel_degree, config.tensor_parallel_rank, config.num_attention_heads
        )
        return {
            name: functools.partial(action, is_column=name.endswith("lora_B"), is_old_qkv="query_key_value" in name)
            for name in self.state_dict()
            if ".lora_" in name and is_split_adapter(name)
        }

    def get_tensor_parallel_convert_actions(self, config, names, is_split):
        """As the models have it: functions by the names of the weights that are split over processes."""
        return self._get_tensor_parallel_convert_actions(names, is_split, config=config)

    def read_checkpoint(self, checkpoint):
        """This process's weights in a checkpoint, numpy by name: one file on every layout."""
        return self.split(read_arrays(os.path.join(checkpoint, LORA_WEIGHTS)))

    def state_dict(self, *args, **kwargs):
        """By the names that its files have, not by those below this wrapper."""
        return self.model.state_dict(*args, **kwargs)

    def split(self, weights):
        """This process's part of an adapter's ``weights``, both numpy by name."""
        return self._convert_tensor_parallel(dict(weights)) if self.lora_config.tensor_parallel_degree > 1 else weights


def find_base(lora_args, name):
    """The folder of the adapter that ``name`` is, or None, and the name of the model to load."""
    if os.path.isfile(os.path.join(name, "lora_config.json")) and not glob.glob(
        os.path.join(glob.escape(name), "model_state*")
    ):
        lora_args.lora = True
        return name, lora_args.lora_base or load(LoRAConfig, name, "lora_config.json").base_model_name_or_path
    if lora_args.lora_base:
        raise InputError(f"--lora_base is for an adapter, and --model_name_or_path {name} is none: leave it out")
    if lora_args.merge_lora and not lora_args.lora:
        raise InputError(f"--merge_lora: there is no adapter in --model_name_or_path {name}, and no --lora True")
    return None, name


def new_lora_config(rank=None, alpha=None, modules=None, rslora=False):
    """The LoRAConfig of a new adapter."""
    rank = rank or 8
    return LoRAConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules(modules), rslora=rslora)


def target_modules(modules=None):
    """The patterns of the linears beside which an adapter stands, list[str]."""
    return [rf".*\.{module}" for module in LORA_MODULES if module in (modules or LORA_MODULES)]


def make_lora_config(lora_args, adapter, base, dtype, degree):
    """The LoRAConfig of the folder ``adapter``, or of a new one where it is None."""
    modules = lora_args.lora_target_modules
    if adapter is None:
        config = new_lora_config(lora_args.lora_rank, lora_args.lora_alpha, modules, lora_args.rslora)
    else:
        config = load(LoRAConfig, adapter, "lora_config.json")
        for name, given, own in (
            ("lora_rank", lora_args.lora_rank, config.r),
            ("lora_alpha", lora_args.lora_alpha, config.lora_alpha),
            ("lora_target_modules", modules and target_modules(modules), config.target_modules),
            ("rslora", lora_args.rslora or None, config.rslora),
        ):
            if given is not None and given != own:
                raise InputError(f"--{name}: the adapter in {adapter} has {own}: leave it out")
    # A folder is found from anywhere.
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.dtype, config.tensor_parallel_degree, config.merge_weights = dtype, degree, False
    return config


def adapter_shapes(config, lora_config):
    """The shapes of an adapter's weights on one process, by name: A [inputs, rank] and B [rank, outputs]."""
    width, shapes = config.hidden_size, {}
    linears = {
        "attention.query_key_value": (width, 3 * width), "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (width, 4 * width), "mlp.dense_4h_to_h": (4 * width, width),
    }  # fmt: skip
    for number in range(config.num_layers):
        for linear, (inputs, outputs) in linears.items():
            name = f"glm.transformer.layers.{number}.{linear}"
            if any(re.fullmatch(target, name) for target in lora_config.target_modules):
                shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = [inputs, lora_config.r], [lora_config.r, outputs]
    return shapes


def new_adapter(config, lora_config, seed):
    """Weights of an adapter that changes nothing yet, numpy by name, the same on every layout.

    A is uniform within 1 / sqrt(inputs), which is Kaiming's with a slope of sqrt(5), and B is 0.
    """
    weights = {}
    for number, (name, shape) in enumerate(adapter_shapes(config, lora_config).items()):
        most = shape[0] ** -0.5 if name.endswith("lora_A") else 0.0
        weights[name] = np.random.default_rng([seed, number]).uniform(-most, most, shape).astype("float32")
    return weights


def read_adapter(folder, config, lora_config):
    """The weights of the adapter in ``folder``, numpy by name. Raises InputError where they don't fit the base."""
    path = os.path.join(folder, LORA_WEIGHTS)
    try:
        weights = paddle.load(path, return_numpy=True)
        found = {name: list(weight.shape) for name, weight in weights.items()}
    except Exception as error:  # paddle.load raises many kinds
        raise InputError(f"{path} can't be loaded ({str(error)[:200]}): give the folder of a whole adapter") from error
    shapes = adapter_shapes(config, lora_config)
    for name in sorted({*shapes, *found}):
        if found.get(name) != shapes.get(name):
            raise InputError(
                f"the adapter in {folder} is of another base: its {name} is {found.get(name, 'missing')}, where "
                f"{shapes.get(name, 'none')} would fit: give its own base by --lora_base"
            )
    return weights


def add_lora(model, lora_config, weights):
    """Freeze ``model`` and put an adapter with ``weights`` beside its linears. Returns the LoRA."""
    lora = LoRA(model, lora_config)
    lora.set_state_dict(cast_weights(lora.split(weights), model))
    return lora


def merge_lora(lora):
    """Add the adapters to the weights they stand beside, in float32, and take them away. Returns the GLM."""
    for layer in lora.model.sublayers():
        if hasattr(layer, "lora_A"):
            change = paddle.matmul(layer.lora_A.astype("float32"), layer.lora_B.astype("float32")) * layer.scaling
            layer.weight.set_value((layer.weight.astype("float32") + change).astype(layer.weight.dtype))
            layer.merged = True  # its forward then is that of the plain layer
            del layer.lora_A, layer.lora_B
    return lora.model


# ---------------------------------------------------------------------------------------------------------- memory


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
    residual = 4 if precision == "O1" else size  # of hidden states; autocast keeps sums and softmax in float32
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
    needs = {"weights": count * weight_size, "optimizer": optimizer, "gradients": gradients, "activations": activations}
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
        (0, mask + batch_size * length * width * size * layers + batch_size * target_length * vocab * (4 + size)),
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


# --------------------------------------------------------------------------------------------------------- loading


def load(loader, name, what, adapter=None, **kwargs):
    """``loader.from_pretrained(name)``; an InputError that calls it ``what`` if it can't be loaded, or only in part.

    ``adapter``: the folder whose base ``name`` is.
    """
    where = f"--model_name_or_path {adapter}: its base {name}" if adapter else f"--model_name_or_path {name}"
    warnings = []
    collector = logging.Handler()
    collector.emit = lambda record: warnings.append(record.getMessage())
    logger.logger.addHandler(collector)
    try:
        loaded = loader.from_pretrained(name, **kwargs)
    except Exception as error:  # PaddleNLP and its hubs raise many kinds
        raise InputError(
            f"{where}: its {what} can't be loaded ({str(error)[:200]}): give {'by --lora_base ' if adapter else ''}"
            "a published model's name, if its host can be reached, or a folder with config.json, "
            "model_state.pdparams and the tokenizer"
        ) from error
    finally:
        logger.logger.removeHandler(collector)
    missing = "".join(warning for warning in warnings if "newly initialized" in warning)
    if "word_embeddings" in missing or ".layers." in missing:
        raise InputError(f"{where}: its weights lack some of GLM's: give those of a GLM")
    return loaded


class _MappedFile:
    """What pickle reads a file from, without copying it."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data, self.position = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), 0

    def read(self, size):
        self.position += size
        part = self.data[self.position - size : self.position]
        return part if size > 4096 else bytes(part)  # as pickle wants what is no array

    def readline(self):
        raise pickle.UnpicklingError("paddle.save writes no lines")


class _MappedArray:
    """Stands for a numpy array while it is read: its values stay in the file."""

    def __init__(self, *_):
        """As numpy's own constructor for pickles is called."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


class _ArrayReader(pickle._Unpickler):  # the public one, in C, copies all it reads
    def find_class(self, module, name):
        return _MappedArray if name == "_reconstruct" else super().find_class(module, name)


def read_arrays(path):
    """The dict that paddle.save wrote to ``path``, with numpy arrays that stay in the file until they are used.

    paddle.load reads all of a file, of which one of eight tensor-parallel processes needs an eighth.
    """

    def unwrap(value):
        if isinstance(value, dict):
            return {name: unwrap(part) for name, part in value.items()}
        if isinstance(value, tuple) and len(value) == 2:  # a name of Paddle's, and an array
            value = value[1]
        return value.array if isinstance(value, _MappedArray) else value

    return unwrap(_ArrayReader(_MappedFile(path)).load())


def convert_layout(model, saved_degree):
    """By the model's own tensor-parallel mappings, from ``saved_degree`` processes' parts to this one's.

    Returns:
        convert(name, parts): this process's part of the weight ``name``, or of its moments, numpy. ``parts``: those of
        all of the processes in their order, or its own alone, where there were as many.
    """
    degree, names = max(model.config.tensor_parallel_degree, 1), model.state_dict().keys()

    def actions(degree, is_split):
        config = copy.deepcopy(model.config)
        config.tensor_parallel_degree = degree
        if degree == 1:
            return {}
        return model.get_tensor_parallel_convert_actions(config, names, is_split)

    join, split = actions(saved_degree, is_split=False), actions(degree, is_split=True)

    def convert(name, parts):
        if saved_degree == degree:
            return parts[0]
        whole = join[name](parts) if name in join else parts[0]
        return np.ascontiguousarray(split[name](whole)) if name in split else whole

    return convert


def _saved_dtype(value):
    return "bfloat16" if value.dtype == np.uint16 else str(value.dtype)  # numpy has none: its bits are saved


def _float32(value):
    """A saved array as a float32 tensor."""
    if _saved_dtype(value) == "bfloat16":
        value = (value.astype("uint32") << 16).view("float32")
    return paddle.to_tensor(value.astype("float32"))


def cast_weights(state_dict, model):
    """A checkpoint's weights, numpy by their names, in the types of the model's."""
    result, casts = dict(state_dict), set()
    for name, parameter in model.state_dict().items():
        wanted = str(parameter.dtype).split(".")[-1]
        if name in result and list(result[name].shape) != parameter.shape:  # Paddle would leave it out
            raise ValueError(f"its {name} is {list(result[name].shape)}, where this run has {parameter.shape}")
        if name in result and _saved_dtype(result[name]) != wanted:
            casts.add(f"from {_saved_dtype(result[name])} to {wanted}")
            result[name] = _float32(result[name]).astype(wanted)
    if casts:
        logger.train(f"the checkpoint's weights are cast {', '.join(sorted(casts))}")
    return result


def convert_optimizer_state(parts, names, model, convert, master_weights, read_weights, wanted):
    """An AdamW's state from training in any precision and layout, for this process, with or without master weights.

    Moments are float32 in every precision, but called by what they are of: the weight, or its float32 master weight.
    Where this run's weights are of another type than the checkpoint's were, its master weights are taken for them,
    which are more exact. Those that are wanted and missing are made of the checkpoint's weights.

    Args:
        parts: what the optimizers of all tensor-parallel processes of the checkpoint held, as convert_layout's convert
            wants them: dicts of numpy arrays. names (dict): what the model calls the weights that they name.
        convert: of convert_layout. master_weights (bool): whether this run's optimizer has them.
        read_weights (function): returns the checkpoint's weights, numpy by name.
        wanted: the names, as Paddle has them, of the parameters that this process's optimizer updates.

    Returns:
        dict: moments as numpy arrays, master weights as tensors, by the names of this run's optimizer.
    """
    state, weights = {"LR_Scheduler": parts[0]["LR_Scheduler"]}, model.state_dict()
    masters = [part.get("master_weights") or {} for part in parts]
    saved = read_weights() if master_weights and not masters[0] else {}
    if saved:
        logger.train("the checkpoint has no master weights: they are its weights")
    elif masters[0] and not master_weights:
        logger.train("the checkpoint has master weights: this run goes on with them as its weights")
    state["master_weights"] = {}
    for name, key in names.items():
        weight = weights[key]
        if name in masters[0]:
            master = convert(key, [part[name] for part in masters])
            weight.set_value(paddle.to_tensor(master).astype(weight.dtype))
        elif weight.dtype != paddle.float32 and not weight.stop_gradient and key in saved:
            master = saved[key]
        else:
            continue
        if master_weights and weight.name in wanted:
            state["master_weights"][weight.name] = master = _float32(master)
            master.name = f"{weight.name}_fp32_master_0"  # as the optimizer would call it
    for saved_name, value in parts[0].items():
        moment = re.fullmatch(r"(.+?)(?:_fp32_master_0)?_((?:moment|beta)\d.*)", saved_name)
        if moment is None or weights[names[moment[1]]].name not in wanted:
            continue
        key = names[moment[1]]
        if moment[2].startswith("moment"):
            value = convert(key, [part[saved_name] for part in parts])
        name = weights[key].name
        state[f"{name}{'_fp32_master_0' if name in state['master_weights'] else ''}_{moment[2]}"] = value
    if not state["master_weights"]:
        del state["master_weights"]
    return state


def read_parts(checkpoint, kind, ending, model):
    """What tensor-parallel processes wrote into the files ``kind`` of a checkpoint, as convert_layout wants it.

    Returns: list of dicts of numpy arrays, whose values stay in the files until they are used; of how many
    processes the checkpoint is.
    """
    parts = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(checkpoint), f"{kind}*{ending}"))):
        rank = re.search(r"\.tp(\d+)", os.path.basename(path))
        parts.setdefault(int(rank[1]) if rank else 0, []).append(path)
    degree = len(parts)
    if degree == max(model.config.tensor_parallel_degree, 1):
        parts = {0: parts[max(model.config.tensor_parallel_rank, 0)]}
    joined = []
    for _, paths in sorted(parts.items()):
        part = {}
        for path in paths:  # with sharding an optimizer's state is in several, each of other weights
            found = read_arrays(path)
            masters = {**part.get("master_weights", {}), **found.get("master_weights", {})}
            part.update(found, **({"master_weights": masters} if masters else {}))
        joined.append(part)
    return joined, degree


def read_weights(checkpoint, model):
    """This process's weights in a checkpoint by their names, numpy, in the type they were saved in."""
    if hasattr(model, "read_checkpoint"):
        return model.read_checkpoint(checkpoint)
    parts, degree = read_parts(checkpoint, "model_state", ".pdparams", model)
    convert = convert_layout(model, degree)
    return {name: convert(name, [part[name] for part in parts]) for name in parts[0]}


def read_optimizer_state(checkpoint, optimizer, model, names, master_weights):
    """What the ``optimizer`` of this process goes on with, from a checkpoint of any precision and layout.

    Args: names (dict): what the model calls the weights that the checkpoint's state names, or None.
    """
    parts, degree = read_parts(checkpoint, "optimizer", ".pdopt", model)
    while hasattr(optimizer, "_inner_opt"):  # fleet's wrappers; with sharding the innermost updates some weights
        optimizer = optimizer._inner_opt
    names = names or {weight.name: name for name, weight in model.state_dict().items()}
    return convert_optimizer_state(
        parts, names, model, convert_layout(model, degree), master_weights,
        functools.partial(read_weights, checkpoint, model), {weight.name for weight in optimizer._parameter_list},
    )  # fmt: skip
