"""GLM's layers as computed here: the loss, attention, and the forward that takes its attention from outside."""

import contextlib
import ctypes
import functools
import os

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

MASKED = -65504.0  # what is added to the attention score of a hidden position: float16's lowest


def use_the_whole_cpu():
    """Let Paddle use the whole of a CPU. Before the first product.

    Paddle starts with one thread, its MKL takes a slow path on processors that are not Intel's, and glibc returns each
    large tensor to the system, so that the next one costs page faults again: more than many an operator itself. A
    thread count that the user set stays; processes of one launch share the cores.
    """
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there for the next ones
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # By this call, not by OMP_NUM_THREADS, whose use makes paddle print a warning at import.
    paddle.base.core.set_num_threads(max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", 1))))


# ------------------------------------------------------------------------------------------------------------ loss


def _log_sum_exp(logits, probabilities, group):
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
        local, log_sum_exp = _log_sum_exp(largest, probabilities.max(-1), group)
        ctx.vocab_size = part
        if group is not None:
            dist.all_reduce(sums, group=group)
            ctx.vocab_size *= group.nranks
        ctx.label_share, ctx.smooth_share = (1 - label_smoothing) * here, label_smoothing / ctx.vocab_size
        ctx.save_for_backward(hidden_states, weight, probabilities, label_index, paddle.exp(local - log_sum_exp))
        return log_sum_exp - (1 - label_smoothing) * sums[0] - ctx.smooth_share * sums[1]

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
        grad_weight = paddle.matmul(table, hidden_states.astype(ctx.dtype), transpose_x=True)
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_states, group=ctx.group)
        return grad_hidden_states, grad_weight.astype(weight.dtype)

# ------------------------------------------------------------------------------------------------- cached decoding


def _attend(query, keys, values, mask, drop=None):
    """Scaled dot-product attention, all [B, H, length, D].

    Args:
        mask: 0 or MASKED, [B, H or 1, queries, keys], or None where every key is visible.
        drop: dropout of the attention weights.
    """
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, keys, transpose_y=True)
    if mask is not None:
        scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    weights = F.softmax(scores)
    return paddle.matmul(weights if drop is None else drop(weights), values)


@functools.lru_cache(maxsize=16)
def _transposed_rows(shape, order):
    """Where the rows of [*shape, D] come from when its dimensions but the last change places, and their new shape."""
    index = np.arange(np.prod(shape)).reshape(shape).transpose(order)
    return paddle.to_tensor(index.reshape(-1)), list(index.shape)


def _transpose_rows(inputs, order):
    """``inputs.transpose([*order, last])``: all but the last dimension change places."""
    if not inputs.place.is_cpu_place():
        return inputs.transpose([*order, len(order)])
    # The same from a gather, which copies rows whole, takes Paddle a tenth of the time on a CPU, and its gradient too.
    *shape, width = inputs.shape
    index, new_shape = _transposed_rows(tuple(shape), tuple(order))
    return inputs.reshape([-1, width]).gather(index).reshape([*new_shape, width])


def _self_attention(attention, hidden_states, attend):
    """A layer's attention on [B, Q, C], with its core given: ``attend(query, key, value)``, all [B, H, Q, D]."""
    batch_size, length, _ = hidden_states.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    projected = attention.query_key_value(hidden_states)  # [B, Q, 3 * H * D]
    if attention.config.tensor_parallel_degree > 1:  # laid out head by head, [q k v] [q k v] ...
        projected = _transpose_rows(projected.reshape([batch_size, length, heads, 3, head_size]), [3, 0, 2, 1])
    else:  # [all q | all k | all v]
        projected = _transpose_rows(projected.reshape([batch_size, length, 3, heads, head_size]), [2, 0, 3, 1])
    context = attend(*paddle.unbind(projected))  # [B, H, Q, D]
    return attention.dense(_transpose_rows(context, [0, 2, 1]).reshape([batch_size, length, heads * head_size]))


def _dropout(dropout, state, inputs):
    """Drop by the generator ``state`` of tensor parallelism, or the one there is without it."""
    tracker = get_rng_state_tracker()
    with tracker.rng_state(state) if state in tracker.states_ else contextlib.nullcontext():
        return dropout(inputs)


def _linear(layer, inputs):
    """``inputs @ weight + bias``, with the bias as a product, for then its gradient is one.

    Paddle's gradient of a bias, a sum over rows, takes a CPU as long as those of the inputs and the weight together.
    """
    ones = paddle.ones([*inputs.shape[:-1], 1], inputs.dtype)
    return paddle.matmul(inputs, layer.weight) + paddle.matmul(ones, layer.bias.unsqueeze(0))


def prepare_for_training(model):
    """Change how PaddleNLP's layers compute, not what: the mask they are given is then 0 and MASKED, and added.

    PaddleNLP multiplies the scores by a mask and adds another, made of it in every layer: three more passes over its
    largest tensors, which it keeps for the backward pass.
    """

    def forward(attention, hidden_states, mask, cache=None):
        def attend(query, key, value):
            drop = functools.partial(_dropout, attention.attention_dropout, "local_seed")
            return _attend(query, key, value, mask, drop)

        return _dropout(attention.output_dropout, "global_seed", _self_attention(attention, hidden_states, attend))

    for layer in model.glm.transformer.layers:
        layer.attention.forward = functools.partial(forward, layer.attention)
    # With tensor parallelism PaddleNLP draws this dropout from the generator that differs between the processes, as it
    # must for the split heads alone. Here they drop the same embeddings, and what follows is the same on all of them.
    dropout = model.glm.transformer.embedding_dropout
    dropout.forward = functools.partial(_dropout, dropout.forward, "embedding_seed")
    if model.glm.word_embeddings.weight.place.is_cpu_place():
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.Linear):
                layer.forward = functools.partial(_linear, layer)


def _forward(model, input_ids, position_ids, attend):
    """GLM's layers with their attention given: ``attend(layer number, query, key, value)``, all [B, H, Q, D].

    PaddleNLP's own forward caches hidden states and projects the whole prefix to keys and values at every step.

    Args:
        input_ids int64 [B, Q], position_ids int64 [B, 2, Q].

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
        attend_here = functools.partial(attend, number)
        hidden_states = hidden_states + _self_attention(
            layer.attention, layer.input_layernorm(hidden_states), attend_here
        )
        hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return stack.final_layernorm(hidden_states)
