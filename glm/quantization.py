"""Frozen linears in int8, each output with a scale of its own: how they are made, and multiplied by.

A weight w [inputs, outputs] becomes round(w / scale) with scale = max|w| / 127 over the inputs of an output,
so that no weight is off by more than half a scale (arXiv 2206.01861, for weights alone). A product casts the
int8 weight to the type of its inputs, and what it has cast is gone afterwards: the backward pass casts again.
Any device has the operators. Paddle's own fused one, weight_only_linear, is of some GPUs alone, and of a
layout that has no gradient.
"""

from typing import Optional

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base.framework import EagerParamBase
from paddle.incubate.nn.functional import fused_matmul_bias

from glm.device import supports_fused_linear

ALGORITHMS = ("weight_only_int8",)  # as PaddleNLP calls it
LARGEST = 127
# Inputs are multiplied by it, and the scales are divided: in float16 a product with weights up to 127 would
# overflow, where one with weights up to 1 is as large as any linear's.
INPUT_SCALE = 2.0**-7


def largest_weights(weight: np.ndarray) -> np.ndarray:
    """Return the largest absolute value of each output, [outputs] in the type of ``weight``.

    Args:
        weight: [inputs, outputs], as it is saved: uint16 is bfloat16. A file may be mapped to it.
    """
    # Without their sign, floating point numbers are ordered as their bits are: NumPy compares halves slowly.
    kind = {2: "uint16", 4: "uint32", 8: "uint64"}[weight.dtype.itemsize]
    bits, mask = weight.view(kind), np.array((1 << 8 * weight.dtype.itemsize - 1) - 1, kind)
    largest = np.zeros(weight.shape[1], kind)
    for first in range(0, len(bits), 256):
        np.maximum(largest, (bits[first : first + 256] & mask).max(axis=0), out=largest)
    return largest.view(weight.dtype)


def quantize(weight: np.ndarray, scale: np.ndarray, into: np.ndarray):
    """Write float32 weights [n, outputs], divided by the ``scale`` of their outputs, to int8 ``into``."""
    divisors = np.where(scale == 0, np.float32(1), scale)
    np.rint(np.divide(weight, divisors, out=weight), out=weight)
    into[...] = weight  # what is no number gets some int8, and its scale stays no number


def set_quantized(layer: paddle.nn.Layer, weight: np.ndarray, scale: np.ndarray):
    """Put an int8 weight into a linear, in place of its own, whose type the scales get.

    The scales are an attribute of the weight: so a layer around it, as LoRAModel makes it, takes them over.
    """
    old = layer.weight
    parameter = EagerParamBase.from_tensor(paddle.to_tensor(weight), trainable=False, name=old.name)
    for name in ("is_distributed", "split_axis"):  # of a part of a weight
        if hasattr(old, name):
            setattr(parameter, name, getattr(old, name))
    parameter.output_scale = paddle.to_tensor(scale / np.float32(INPUT_SCALE)).astype(old.dtype)
    layer.weight = parameter


def is_quantized(layer: paddle.nn.Layer) -> bool:
    """Return whether ``layer`` is a linear in int8."""
    return layer.weight.dtype == paddle.int8


def linear(inputs: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Return inputs [..., inputs] times a weight [inputs, outputs], plus a bias; of int8 without gradient."""
    if weight.dtype != paddle.int8:
        if bias is None:
            return paddle.matmul(inputs, weight)
        # Paddle's operator of a linear has no public name.
        operator = fused_matmul_bias if supports_fused_linear() else paddle._C_ops.linear
        return operator(inputs, weight, bias)
    outputs = paddle.matmul(inputs * INPUT_SCALE, weight.astype(inputs.dtype))
    outputs.multiply_(weight.output_scale.astype(outputs.dtype))  # under autocast they are half
    return outputs if bias is None else outputs + bias


class Product(PyLayer):
    """``linear`` of an int8 weight with a gradient, which goes to the inputs alone."""

    @staticmethod
    def forward(ctx, inputs, layer):
        """Return the outputs of inputs [..., inputs] and the weight of ``layer``."""
        ctx.weight, ctx.dtype = layer.weight, inputs.dtype
        return linear(inputs, layer.weight)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of the inputs."""
        # Gradients are small: in float16 many of them would lose their last bits by INPUT_SCALE.
        weight = ctx.weight.astype(grad.dtype).scale_(INPUT_SCALE)
        grad = paddle.matmul(grad * ctx.weight.output_scale.astype(grad.dtype), weight, transpose_y=True)
        return grad.astype(ctx.dtype)
