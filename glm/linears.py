"""Linears of every kind: plain, split over processes, in int8, each with an adapter or without one.

Training computes them with a gradient, decoding without one and by fewer calls of the host.
"""

from typing import Optional

import paddle
from paddle import Tensor
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from paddle.incubate.nn.functional import fused_matmul_bias

from glm.device import on_cpu, supports_fused_linear
from glm.graphs import all_reduce
from glm.quantization import Product, is_quantized, linear


def in_dtype(tensor: Tensor, dtype: Optional[paddle.dtype]) -> Tensor:
    """Return ``tensor`` in a type: itself, its ``half_copy``, or a cast of it. None stands for its own."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    copy = getattr(tensor, "half_copy", None)
    return tensor.astype(dtype) if copy is None else copy


def compute_with_gradient(
    layer: paddle.nn.Layer, inputs: Tensor, dtype: Optional[paddle.dtype] = None
) -> Tensor:
    """Compute a linear, or the word embeddings, as the layers do themselves.

    Args:
        layer: The linear, which may have an adapter, or the embeddings.
        inputs: [..., inputs], or token ids.
        dtype: What a linear computes in, where its weights are of another type. Autocast would do so, but
            takes the host longer than the operators do, and casts the weights at each use.

    Returns:
        [..., outputs].
    """
    if isinstance(layer, (paddle.nn.Embedding, VocabParallelEmbedding)):
        return layer(inputs)
    inputs, bias, adapted = in_dtype(inputs, dtype), in_dtype(layer.bias, dtype), None
    if type(layer) is paddle.nn.Linear and not is_quantized(layer):
        return _product(inputs, in_dtype(layer.weight, dtype), bias)
    split_outputs = isinstance(layer, ColumnParallelLinear)
    split_inputs = isinstance(layer, RowParallelLinear)
    if hasattr(layer, "lora_A"):
        adapted = paddle.matmul(layer.lora_dropout(inputs), in_dtype(layer.lora_A, dtype))
    if split_outputs:
        group = layer.model_parallel_group
        inputs = mp_ops._c_identity(inputs, group=group)
        adapted = adapted if adapted is None else mp_ops._c_identity(adapted, group=group)
    if is_quantized(layer):
        outputs = Product.apply(inputs, layer)
        outputs = outputs if split_inputs else outputs + bias
    else:
        outputs = _product(inputs, in_dtype(layer.weight, dtype), None if split_inputs else bias)
    if split_inputs:
        reduced = {"group": layer.model_parallel_group, "use_calc_stream": True, "use_model_parallel": True}
        outputs = mp_ops._mp_allreduce(outputs, **reduced)
        adapted = adapted if adapted is None else mp_ops._mp_allreduce(adapted, **reduced)
    if adapted is not None:
        outputs = outputs + paddle.matmul(adapted, in_dtype(layer.lora_B, dtype)) * layer.scaling
    return outputs + bias if split_inputs else outputs


def _product(inputs, weight, bias):
    if bias is None:
        return paddle.matmul(inputs, weight)
    if supports_fused_linear() and not bias.stop_gradient:
        return fused_matmul_bias(inputs, weight, bias)
    if not on_cpu() or bias.stop_gradient:
        return paddle._C_ops.linear(inputs, weight, bias)
    # With the bias as a product, its gradient is a product too. Paddle's gradient of a bias is a sum
    # over rows, which takes a CPU as long as the gradients of the inputs and the weight together.
    ones = paddle.ones([*inputs.shape[:-1], 1], inputs.dtype)
    return paddle.matmul(inputs, weight) + paddle.matmul(ones, bias.unsqueeze(0))


def compute_without_gradient(layer: paddle.nn.Layer, inputs: Tensor) -> Tensor:
    """Compute a linear, with its adapter if it has one, or the word embeddings; without dropout.

    The layers' own ways take the host longer than the operators take a card: PaddleNLP 3 puts a choice of
    precisions before F.linear, and fleet's layers put collectives without effect around theirs.
    """
    if type(layer) is paddle.nn.Linear:
        return linear(inputs, layer.weight, layer.bias)
    if isinstance(layer, paddle.nn.Embedding):
        return layer(inputs)
    if isinstance(layer, VocabParallelEmbedding):
        first, count = layer.vocab_start_index, layer.num_embeddings
        rows = paddle._C_ops.c_embedding(layer.weight, inputs, first, count)
        all_reduce(rows, layer.model_parallel_group)
        return rows
    split_inputs = isinstance(layer, RowParallelLinear)
    outputs = linear(inputs, layer.weight, None if split_inputs else layer.bias)
    adapter = getattr(layer, "lora_A", None)
    if adapter is not None:
        adapted = paddle.matmul(paddle.matmul(inputs, adapter), layer.lora_B)
        outputs = outputs + adapted * layer.scaling
    if split_inputs:
        all_reduce(outputs, layer.model_parallel_group)
        outputs = outputs + layer.bias
    return outputs
