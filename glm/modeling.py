"""GLM's layers as computed here: attention, the forward that is given its attention, the loss."""

import contextlib
import functools

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker

from glm.device import on_cpu

MASKED = -65504.0  # what is added to the attention score of a hidden position: float16's lowest


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
    return F.embedding(
        _transposed_rows(tuple(inputs.shape[:-1]), tuple(order)), inputs.reshape([-1, inputs.shape[-1]])
    )


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
        drop = (
            functools.partial(_dropout, attention.attention_dropout, "local_seed")
            if attention.training
            else None
        )
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
        if (
            stack.enable_recompute
        ):  # else the first layer's activations, below which LoRA trains nothing, would be kept
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
        inner = F.gelu(
            linear(mlp.dense_h_to_4h, layer.post_attention_layernorm(hidden_states)), approximate=True
        )
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
    hidden_states = wrapped(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask
    )[0]
    hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]]).gather(
        inputs["target_positions"]
    )  # [N, C]
    weight = model.glm.word_embeddings.weight
    return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], label_smoothing, group)
