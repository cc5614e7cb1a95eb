"""GLM's layers as computed here: attention, the forward that is given its attention, the loss."""

import contextlib
import functools

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.distributed.fleet.meta_parallel import (
    RowParallelLinear,
    VocabParallelEmbedding,
    get_rng_state_tracker,
)
from paddle.distributed.fleet.utils import recompute

from glm.device import all_reduce, on_cpu

MASKED = -65504.0  # added to the attention scores of hidden positions: float16's lowest number


def log_sum_exp(largest_logits, largest_probabilities, group):
    """Log-sum-exp over this process's part of the vocabulary, and over the whole vocabulary.

    It is computed from a softmax that is at hand: the log-probability of the likeliest
    token is its logit minus the log-sum-exp. Its probability is at least 1 / V, so that it
    does not underflow.

    Args:
        largest_logits: float32 [...], of each row the largest logit of this process's part.
        largest_probabilities: float32 [...], their probabilities within this part.
        group: of tensor parallelism; None where one process holds the whole vocabulary.

    Returns:
        two tensors, float32 [...]. Without a group they are the same one.
    """
    local = whole = largest_logits - paddle.log(largest_probabilities)
    if group is not None:
        largest = local.clone()
        all_reduce(largest, group, dist.ReduceOp.MAX)
        total = paddle.exp(local - largest)
        all_reduce(total, group)
        whole = largest + paddle.log(total)
    return local, whole


class LabelSmoothedLoss(PyLayer):
    """Compute the head and the label-smoothed cross entropy in one, so that one [N, V] table exists.

    The loss of a target is (1 - e) * (-log p[label]) + e * mean over the vocabulary of
    (-log p) (Szegedy et al., arXiv 1512.00567), in float32. Its gradient with respect
    to the logits is p - (1 - e) * onehot(label) - e / V.

    With tensor parallelism each process holds a part of the vocabulary. Only vectors
    [N] and the gradient of the hidden states are reduced over the group.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, label_smoothing, group=None):
        """Return the losses, float32 [N].

        Args:
            hidden_states: [N, C]. weight: [V / processes, C]. labels: int64 [N].
            label_smoothing (float): e. group: of tensor parallelism.
        """
        logits = paddle.matmul(hidden_states, weight, transpose_y=True)  # [N, V / processes]
        ctx.dtype, ctx.group = logits.dtype, group
        logits = logits.astype("float32")
        part_size = logits.shape[1]
        ctx.vocab_size = part_size * (1 if group is None else group.nranks)
        labels = labels - (0 if group is None else group.rank * part_size)
        in_this_part = ((labels >= 0) & (labels < part_size)).astype("float32")
        # Where the labels' logits are in the flat table.
        label_index = paddle.arange(len(labels)) * part_size + labels.clip(0, part_size - 1)
        label_logits = logits.reshape([-1]).gather(label_index) * in_this_part
        sums = paddle.stack([label_logits, logits.sum(-1)])
        largest = logits.max(-1)
        probabilities = F.softmax_(logits)
        local, whole = log_sum_exp(largest, probabilities.max(-1), group)
        if group is not None:
            all_reduce(sums, group)
        ctx.label_weight = (1 - label_smoothing) * in_this_part
        ctx.smoothing_weight = label_smoothing / ctx.vocab_size
        part_probability = paddle.exp(local - whole)
        ctx.save_for_backward(hidden_states, weight, probabilities, label_index, part_probability)
        return whole - (1 - label_smoothing) * sums[0] - ctx.smoothing_weight * sums[1]

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight, table, label_index, part_probability = ctx.saved_tensor()
        if ctx.group is not None:  # from probabilities within this part to those within the vocabulary
            table.multiply_(part_probability.unsqueeze(-1))
        table.subtract_(paddle.full([1], ctx.smoothing_weight))
        flat = table.reshape([-1])
        flat.scatter_(label_index, flat.gather(label_index) - ctx.label_weight)
        table = flat.reshape(table.shape).multiply_(grad.unsqueeze(-1)).astype(ctx.dtype)
        grad_hidden_states = paddle.matmul(table, weight.astype(ctx.dtype))
        grad_hidden_states = grad_hidden_states.astype(hidden_states.dtype)
        if ctx.group is not None:
            all_reduce(grad_hidden_states, ctx.group)
        if weight.stop_gradient:  # as with LoRA
            return grad_hidden_states, None
        grad_weight = paddle.matmul(table, hidden_states.astype(ctx.dtype), transpose_x=True)
        return grad_hidden_states, grad_weight.astype(weight.dtype)


def additive_mask(visible, dtype):
    """Return what attention scores get: 0 where ``visible`` is 1, MASKED where it is 0."""
    return ((1 - visible) * MASKED).astype(dtype)


def attend(query, keys, values, mask, drop=None):
    """Compute scaled dot-product attention (Vaswani et al., arXiv 1706.03762).

    Args:
        query: [..., H, Q, D]. keys, values: [..., H, K, D].
        mask: 0 or MASKED, [B, H or 1, Q, K], or None where every key is visible.
        drop: the dropout of the attention weights, a function, or None.

    Returns:
        [..., H, Q, D].
    """
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, keys, transpose_y=True)
    if mask is not None:
        scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    weights = F.softmax(scores)
    return paddle.matmul(weights if drop is None else drop(weights), values)


@functools.lru_cache(maxsize=64)
def _row_order(shape, order):
    """Return the rows of a tensor [*shape, D] as transposing by ``order`` arranges them."""
    return paddle.to_tensor(np.arange(np.prod(shape)).reshape(shape).transpose(order))


def _transpose_rows(inputs, order):
    """Return ``inputs.transpose([*order, last])``, where ``last`` is the last dimension."""
    if not on_cpu():
        return inputs.transpose([*order, len(order)])
    # An embedding of whole rows takes a CPU a tenth of a transposition's time, and so
    # does its gradient.
    rows = inputs.reshape([-1, inputs.shape[-1]])
    return F.embedding(_row_order(tuple(inputs.shape[:-1]), tuple(order)), rows)


def laid_out_by_head(attention):
    """Return whether query_key_value gives [q k v] head by head, or [all q | all k | all v]."""
    return attention.config.tensor_parallel_degree > 1


def split_heads(attention, projected):
    """Split the output of query_key_value, [B, Q, 3 * H * D].

    Returns:
        queries, keys and values in one tensor, [3, B, H, Q, D].
    """
    batch_size, length, _ = projected.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    if laid_out_by_head(attention):
        projected = projected.reshape([batch_size, length, heads, 3, head_size])
        return _transpose_rows(projected, [3, 0, 2, 1])
    projected = projected.reshape([batch_size, length, 3, heads, head_size])
    return _transpose_rows(projected, [2, 0, 3, 1])


def _merge_heads(context):
    """Reshape the heads' outputs, [1, B, H, Q, D] or [B, H, Q, D], to [B, Q, H * D]."""
    *batch, heads, length, head_size = context.shape
    last = len(batch)
    context = _transpose_rows(context, [*range(last), last + 1, last])
    return context.reshape([-1, length, heads * head_size])


def _dropout(dropout, state, inputs):
    """Apply ``dropout``, with tensor parallelism by its generator named ``state``."""
    tracker = get_rng_state_tracker()
    switched = dropout.p > 0 and state in tracker.states_
    with tracker.rng_state(state) if switched else contextlib.nullcontext():
        return paddle.nn.Dropout.forward(dropout, inputs)


def _linear_on_cpu(layer, inputs):
    """Return ``inputs @ weight + bias``, with the bias as a product.

    The bias's gradient is then a product too. Paddle's gradient of a bias is a sum over
    rows. It takes a CPU as long as the gradients of the inputs and the weight together.
    """
    ones = paddle.ones([*inputs.shape[:-1], 1], inputs.dtype)
    return paddle.matmul(inputs, layer.weight) + paddle.matmul(ones, layer.bias.unsqueeze(0))


def _attention_forward(attention, hidden_states, mask, cache=None):
    """Compute what PaddleNLP's attention does, with a mask of 0 and MASKED that is added."""
    projected = attention.query_key_value(hidden_states)
    query, key, value = paddle.unbind(split_heads(attention, projected))
    drop = None
    if attention.training:  # in evaluation dropout would copy its input
        drop = functools.partial(_dropout, attention.attention_dropout, "local_seed")
    context = _merge_heads(attend(query, key, value, mask, drop))
    return _dropout(attention.output_dropout, "global_seed", attention.dense(context))


def _recompute(layer, hidden_states, mask, cache):
    """Return what ``layer`` computes, and have the backward pass compute it again.

    Dropout draws the same numbers again. Left to Paddle, NumPy's and Python's generators
    would be kept and set too, which takes the host a sixth of a millisecond a layer.
    """
    tracker = get_rng_state_tracker()
    states = []

    def forward(*inputs):
        outside = paddle.get_rng_state(), tracker.get_states_tracker()
        if not states:  # the forward pass
            states.extend(outside)
            return layer(*inputs)
        try:
            paddle.set_rng_state(states[0])
            tracker.set_states_tracker(states[1])
            return layer(*inputs)
        finally:
            paddle.set_rng_state(outside[0])
            tracker.set_states_tracker(outside[1])

    return recompute(forward, hidden_states, mask, cache, preserve_rng_state=False)


def prepare_for_training(model):
    """Change how PaddleNLP's layers compute, not what they compute.

    - The attention takes a mask of 0 and MASKED, and adds it. PaddleNLP multiplies the scores by
      one mask and adds another, which it makes in every layer: three more passes over its largest
      tensors, kept for the backward pass.
    - The model returns hidden states, through any wrapper: the head is applied to targets alone.
    - With tensor parallelism all processes drop the same embeddings. PaddleNLP draws them from the
      generator that differs between processes, which only the split heads may use.
    - The plain linears are their operator alone; on a CPU they have fast gradients of their
      biases.
    - Layers that are computed again keep the generators' states that dropout needs, no others.
    """
    model.glm.output_predict = False
    stack = model.glm.transformer
    stack.recompute_training = _recompute
    for layer in stack.layers:
        layer.attention.forward = functools.partial(_attention_forward, layer.attention)

    def embedding_dropout(inputs):
        outputs = _dropout(stack.embedding_dropout, "embedding_seed", inputs)
        # LoRA trains nothing below the first layer: without a gradient there, recompute
        # would keep the first layer's activations.
        if stack.enable_recompute:
            outputs.stop_gradient = False
        return outputs

    stack.embedding_dropout.forward = embedding_dropout
    compute = _linear_on_cpu if on_cpu() else linear
    for layer in model.sublayers():
        # A linear with an adapter is of another class.
        if type(layer) is paddle.nn.Linear and not layer.bias.stop_gradient:
            layer.forward = functools.partial(compute, layer)


def linear(layer, inputs):
    """Return what a linear computes, with its adapter if it has one, without dropout.

    The layers' own ways take the host longer than the operators take a card: PaddleNLP 3
    puts a choice of precisions before F.linear, and fleet's layers put collectives without
    effect around theirs. Paddle's operator has no public name.
    """
    if type(layer) is paddle.nn.Linear:
        return paddle._C_ops.linear(inputs, layer.weight, layer.bias)
    split_inputs = isinstance(layer, RowParallelLinear)
    if split_inputs:
        outputs = paddle.matmul(inputs, layer.weight)
    else:
        outputs = paddle._C_ops.linear(inputs, layer.weight, layer.bias)
    adapter = getattr(layer, "lora_A", None)
    if adapter is not None:
        adapted = paddle.matmul(paddle.matmul(inputs, adapter), layer.lora_B)
        outputs = outputs + adapted * layer.scaling
    if split_inputs:
        all_reduce(outputs, layer.model_parallel_group)
        outputs = outputs + layer.bias
    return outputs


def _embedding(layer, token_ids):
    """Return the rows of ``token_ids``, with tensor parallelism those of all processes' parts."""
    if type(layer) is not VocabParallelEmbedding:
        return layer(token_ids)
    first, count = layer.vocab_start_index, layer.num_embeddings
    rows = paddle._C_ops.c_embedding(layer.weight, token_ids, first, count)
    all_reduce(rows, layer.model_parallel_group)
    return rows


def forward(model, input_ids, position_ids, core_attention):
    """Run GLM's layers without dropout, with an attention that is given.

    PaddleNLP's own forward caches hidden states, and projects the whole prefix to keys
    and values at every step.

    Args:
        input_ids: int64 [B, Q]. position_ids: int64 [B or 1, 2, Q or 1].
        core_attention: a function of a layer's number, its attention and the output of
            query_key_value, [B, Q, 3 * H * D]. It returns the heads' outputs, [1, B, H,
            Q, D].

    Returns:
        hidden states after the last layer norm, [B, Q, C].
    """
    glm, stack = model.glm, model.glm.transformer
    hidden_states = (
        _embedding(glm.word_embeddings, input_ids)
        + stack.position_embeddings(position_ids[:, 0])
        + stack.block_position_embeddings(position_ids[:, 1])
    )  # [B, Q, C]
    for number, layer in enumerate(stack.layers):
        attention, mlp = layer.attention, layer.mlp
        projected = linear(attention.query_key_value, layer.input_layernorm(hidden_states))
        context = _merge_heads(core_attention(number, attention, projected))
        hidden_states = hidden_states + linear(attention.dense, context)
        inner = linear(mlp.dense_h_to_4h, layer.post_attention_layernorm(hidden_states))
        inner = F.gelu(inner, approximate=True)
        hidden_states = hidden_states + linear(mlp.dense_4h_to_h, inner)
    return stack.final_layernorm(hidden_states)


def target_losses(model, wrapped, inputs, label_smoothing, group=None):
    """Compute the label-smoothed losses of a batch's N targets.

    Args:
        model: the GLM, prepared for training. wrapped: the same in the Trainer's wrappers.
        inputs: a batch of ``data.DataCollator``, as tensors.
        label_smoothing (float): e of LabelSmoothedLoss. group: of tensor parallelism.

    Returns:
        float32 [N].
    """
    mask = additive_mask(inputs["attention_mask"].astype("float32"), "float32")  # [B, 1, L, L]
    if on_cpu():  # which is slow at broadcasting
        attention = model.glm.transformer.layers[0].attention
        mask = mask.tile([1, attention.num_attention_heads, 1, 1])
    hidden_states = wrapped(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask
    )[0]
    hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]])
    hidden_states = hidden_states.gather(inputs["target_positions"])  # [N, C]
    weight = model.glm.word_embeddings.weight
    return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], label_smoothing, group)
