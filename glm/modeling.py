"""GLM as it is computed here: attention, one forward for training and decoding, the loss."""

import contextlib
import functools
from typing import Callable, Optional

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.distributed.collective import Group
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.peft import LoRAModel
from paddlenlp.transformers import GLMForConditionalGeneration
from paddlenlp.transformers.glm.modeling import GLMAttention

from glm.device import on_cpu
from glm.graphs import all_reduce
from glm.linears import compute_with_gradient, in_dtype

MASKED = -65504.0  # added to the attention scores of hidden positions: float16's lowest number


def log_sum_exp(
    largest_logits: Tensor, largest_probabilities: Tensor, group: Optional[Group]
) -> tuple[Tensor, Tensor]:
    """Compute log-sum-exp over this process's part of the vocabulary, and over the whole vocabulary.

    It is computed from a softmax that exists already: the log-probability of the likeliest token is
    its logit minus the log-sum-exp. Its probability is at least 1 / V, so that it does not underflow.

    Args:
        largest_logits: float32 [...], of each row the largest logit of this process's part.
        largest_probabilities: float32 [...], their probabilities within this part.
        group: Of tensor parallelism; None where one process holds the whole vocabulary.

    Returns:
        Two tensors, float32 [...]. Without a group they are the same one.
    """
    local_sum = global_sum = largest_logits - paddle.log(largest_probabilities)
    if group is not None:
        largest = local_sum.clone()
        all_reduce(largest, group, dist.ReduceOp.MAX)
        total = paddle.exp(local_sum - largest)
        all_reduce(total, group)
        global_sum = largest + paddle.log(total)
    return local_sum, global_sum


class LabelSmoothedLoss(PyLayer):
    """Compute the head and the label-smoothed cross entropy in one, so that one [N, V] table exists.

    The loss of a target is (1 - e) * (-log p[label]) + e * mean over the vocabulary of (-log p)
    (Szegedy et al., arXiv 1512.00567), in float32. Its gradient with respect to the logits is
    p - (1 - e) * onehot(label) - e / V.

    With tensor parallelism each process holds a part of the vocabulary. Only vectors [N] and the
    gradient of the hidden states are reduced over the group.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, label_smoothing, group=None, dtype=None):
        """Return the losses, float32 [N].

        Args:
            ctx: Paddle's, for the backward pass.
            hidden_states: [N, C].
            weight: [V / processes, C].
            labels: int64 [N].
            label_smoothing: e, a float.
            group: Of tensor parallelism.
            dtype: What the logits are computed in; by default the weight's own type.
        """
        rows, table = in_dtype(hidden_states, dtype), in_dtype(weight, dtype)
        logits = paddle.matmul(rows, table, transpose_y=True)  # [N, V / processes]
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
        local_sum, global_sum = log_sum_exp(largest, probabilities.max(-1), group)
        if group is not None:
            all_reduce(sums, group)
        ctx.label_weight = (1 - label_smoothing) * in_this_part
        ctx.smoothing_weight = label_smoothing / ctx.vocab_size
        part_probability = paddle.exp(local_sum - global_sum)
        ctx.save_for_backward(hidden_states, weight, probabilities, label_index, part_probability)
        return global_sum - (1 - label_smoothing) * sums[0] - ctx.smoothing_weight * sums[1]

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of the hidden states and of the weight, None if that is frozen."""
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


def additive_mask(visible: Tensor, dtype: str) -> Tensor:
    """Return what attention scores get: 0 where ``visible`` is 1, MASKED where it is 0."""
    return ((1 - visible) * MASKED).astype(dtype)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Optional[Tensor],
    dropout: Callable = lambda weights: weights,
) -> Tensor:
    """Compute scaled dot-product attention (Vaswani et al., arXiv 1706.03762).

    Args:
        query: [..., H, Q, D].
        keys: [..., H, K, D].
        values: [..., H, K, D].
        mask: 0 or MASKED, [B, H or 1, Q, K], or None where every key is visible.
        dropout: Of the attention weights.

    Returns:
        [..., H, Q, D].
    """
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, keys, transpose_y=True)
    if mask is not None:
        scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    return paddle.matmul(dropout(F.softmax(scores)), values)


@functools.lru_cache(maxsize=64)
def _row_order(shape, order):
    """Return the rows of a tensor [*shape, D] as transposing by ``order`` arranges them."""
    return paddle.to_tensor(np.arange(np.prod(shape)).reshape(shape).transpose(order))


def _transpose_rows(inputs, order):
    """Return ``inputs.transpose([*order, last])``, where ``last`` is the last dimension."""
    if not on_cpu():
        return inputs.transpose([*order, len(order)])
    # An embedding of whole rows takes a CPU a tenth of a transposition's time, and so does its gradient.
    rows = inputs.reshape([-1, inputs.shape[-1]])
    return F.embedding(_row_order(tuple(inputs.shape[:-1]), tuple(order)), rows)


def qkv_per_head(attention: GLMAttention) -> bool:
    """Return whether query_key_value gives [q k v] head by head, or [all q | all k | all v]."""
    return attention.config.tensor_parallel_degree > 1


def split_heads(attention: GLMAttention, projected: Tensor) -> Tensor:
    """Split the output of query_key_value, [B, Q, 3 * H * D].

    Returns:
        Queries, keys and values in one tensor, [3, B, H, Q, D].
    """
    batch_size, length, _ = projected.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    if qkv_per_head(attention):
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


def _normalize(layer, inputs):
    """Call the LayerNorm ``layer``, in less of the host's time than nn.Layer takes for it."""
    return paddle._C_ops.layer_norm(inputs, layer.weight, layer.bias, layer._epsilon, inputs.ndim - 1)


def forward(
    model: GLMForConditionalGeneration,
    input_ids: Tensor,
    position_ids: Tensor,
    core_attention: Callable,
    compute: Callable,
    dropout: Callable = lambda layer, generator, inputs: inputs,
    run_layer: Callable = lambda layer, hidden_states: layer(hidden_states),
) -> Tensor:
    """Run GLM's layers. Training and decoding differ in the functions that they give.

    PaddleNLP's own forward multiplies the attention scores by one mask and adds another, which it
    makes in each layer. For decoding it caches hidden states, and projects the whole prefix to keys
    and values at every step.

    Args:
        model: The GLM, without wrappers.
        input_ids: int64 [B, Q].
        position_ids: int64 [B or 1, 2, Q or 1].
        core_attention: Takes a layer's number, its attention and the output of query_key_value,
            [B, Q, 3 * H * D]. Returns the heads' outputs, [B, H, Q, D] or [1, B, H, Q, D].
        compute: Takes a linear or the word embeddings, and their inputs. Returns their outputs.
        dropout: Takes an nn.Dropout, the name of its generator under tensor parallelism, and inputs.
        run_layer: Takes a layer, which is a function of hidden states, and hidden states.

    Returns:
        Hidden states after the last layer norm, [B, Q, C].
    """
    glm, stack = model.glm, model.glm.transformer

    def add(hidden_states, layer, outputs):
        return hidden_states + in_dtype(dropout(layer, "global_seed", outputs), hidden_states.dtype)

    def layer_forward(number, layer, hidden_states):
        attention, mlp = layer.attention, layer.mlp
        projected = compute(attention.query_key_value, _normalize(layer.input_layernorm, hidden_states))
        context = _merge_heads(core_attention(number, attention, projected))
        hidden_states = add(hidden_states, attention.output_dropout, compute(attention.dense, context))
        inner = compute(mlp.dense_h_to_4h, _normalize(layer.post_attention_layernorm, hidden_states))
        outputs = compute(mlp.dense_4h_to_h, F.gelu(inner, approximate=True))
        return add(hidden_states, mlp.dropout, outputs)

    hidden_states = (
        compute(glm.word_embeddings, input_ids)
        + stack.position_embeddings(position_ids[:, 0])
        + stack.block_position_embeddings(position_ids[:, 1])
    )  # [B, Q, C]
    # All processes drop the same embeddings. The generator that differs between processes, by which
    # PaddleNLP draws them, is for the split heads.
    hidden_states = dropout(stack.embedding_dropout, "embedding_seed", hidden_states)
    for number, layer in enumerate(stack.layers):
        hidden_states = run_layer(functools.partial(layer_forward, number, layer), hidden_states)
    return _normalize(stack.final_layernorm, hidden_states)


# What training gives to ``forward``


def _dropout(layer, generator, inputs):
    """Apply the nn.Dropout ``layer``, under tensor parallelism by the generator of that name."""
    if not layer.training or not layer.p:  # where Paddle would copy the inputs
        return inputs
    tracker = get_rng_state_tracker()
    named = generator in tracker.states_
    with tracker.rng_state(generator) if named else contextlib.nullcontext():
        return layer(inputs)


class Recompute(PyLayer):
    """Compute a layer, and have the backward pass compute it again in place of keeping its tensors.

    Paddle's own keeps NumPy's and Python's generators and autocast's lists too, which takes the host
    more than half a millisecond a layer.
    """

    @staticmethod
    def forward(ctx, hidden_states, layer, draws):
        """Return what ``layer`` computes.

        Args:
            ctx: Paddle's, for the backward pass.
            hidden_states: The inputs.
            layer: A function of them.
            draws: Whether it draws what dropout leaves out: the backward pass draws the same again.
        """
        ctx.layer, ctx.states = layer, _random_states() if draws else None
        ctx.save_for_backward(hidden_states)
        return layer(hidden_states)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of the inputs; those of the weights are added to theirs."""
        inputs = ctx.saved_tensor()[0].detach()
        inputs.stop_gradient = False
        states = _random_states() if ctx.states else None
        try:
            if states:
                _set_random_states(ctx.states)
            with paddle.enable_grad():
                outputs = ctx.layer(inputs)
        finally:
            if states:
                _set_random_states(states)
        outputs.backward(grad)
        return inputs.grad


def _random_states():
    return paddle.get_rng_state(), get_rng_state_tracker().get_states_tracker()


def _set_random_states(states):
    paddle.set_rng_state(states[0])
    get_rng_state_tracker().set_states_tracker(states[1])


def _recompute(draws, layer, hidden_states):
    """Return what ``layer`` computes, by ``Recompute``."""
    # LoRA trains nothing below the first layer, whose own weights need the gradient of what it computes.
    hidden_states.stop_gradient = False
    return Recompute.apply(hidden_states, layer, draws)


def _forward_with_gradient(model, dtype, draws, input_ids, position_ids, attention_mask):
    """Return the hidden states of ``forward``, with dropout and recompute as the model is set."""
    mask = additive_mask(attention_mask.astype("float32"), "float32")  # [B, 1, L, L]
    if on_cpu():  # which is slow at broadcasting
        heads = model.glm.transformer.layers[0].attention.num_attention_heads
        mask = mask.tile([1, heads, 1, 1])

    # The type of the products is made once, not in each layer.
    mask_in = functools.cache(lambda dtype: in_dtype(mask, dtype))

    def core_attention(number, attention, projected):
        query, key, value = paddle.unbind(split_heads(attention, projected))
        drop = functools.partial(_dropout, attention.attention_dropout, "local_seed")
        return attend(query, key, value, mask_in(query.dtype), drop)

    dtype = dtype if model.training else None  # an evaluation computes in the weights' own type
    compute = functools.partial(compute_with_gradient, dtype=dtype)
    functions = {"compute": compute, "dropout": _dropout}
    if model.glm.transformer.enable_recompute and paddle.is_grad_enabled():
        functions["run_layer"] = functools.partial(_recompute, draws)
    return forward(model, input_ids, position_ids, core_attention, **functions)


def replace_forward(model: paddle.nn.Layer, dtype: Optional[str] = None) -> None:
    """Have ``model(...)`` run ``forward`` and return hidden states, in any wrapper.

    The Trainer wraps the model, and a wrapper has to be called for the gradients to be averaged.
    Logits are left to LabelSmoothedLoss, at the targets alone.

    Args:
        model: GLMForConditionalGeneration, or LoRAModel around it.
        dtype: What training computes products and attention in; by default the weights' own type.
    """
    glm = model.model if isinstance(model, LoRAModel) else model
    glm.product_dtype = dtype and getattr(paddle, dtype)
    draws = any(layer.p for layer in glm.sublayers() if isinstance(layer, paddle.nn.Dropout))
    # LoRAModel has kept the forward that its model had.
    model.forward = glm.forward = functools.partial(_forward_with_gradient, glm, glm.product_dtype, draws)


def target_losses(
    model: paddle.nn.Layer,
    wrapped: paddle.nn.Layer,
    inputs: dict[str, Tensor],
    label_smoothing: float,
    group: Optional[Group] = None,
) -> Tensor:
    """Compute the label-smoothed losses of a batch's N targets.

    Args:
        model: The GLM after ``replace_forward``.
        wrapped: The same in the Trainer's wrappers.
        inputs: A batch of ``data.DataCollator``, as tensors.
        label_smoothing: e of LabelSmoothedLoss.
        group: Of tensor parallelism.

    Returns:
        float32 [N].
    """
    names = "input_ids", "position_ids", "attention_mask"
    hidden_states = wrapped(**{name: inputs[name] for name in names})
    hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]])
    hidden_states = hidden_states.gather(inputs["target_positions"])  # [N, C]
    weight, dtype = model.glm.word_embeddings.weight, model.product_dtype if model.training else None
    return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], label_smoothing, group, dtype)
