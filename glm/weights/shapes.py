"""The weights of a GLM and of its adapter: their names, their shapes, and how processes split them."""

import math
from typing import Optional

import numpy as np
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig

# The axis along which tensor parallelism splits a weight, and whether its outputs are by head then:
# [q k v] of one head after the other, where one process has all q, all k, all v. Of an adapter it
# splits B where the linear's outputs are split, and A where its inputs are.
SPLITS = {
    "word_embeddings.weight": (0, False),
    "query_key_value.weight": (-1, True),
    "query_key_value.bias": (-1, True),
    "query_key_value.lora_B": (-1, True),
    "dense.weight": (0, False),
    "dense.lora_A": (0, False),
    "dense_h_to_4h.weight": (-1, False),
    "dense_h_to_4h.bias": (-1, False),
    "dense_h_to_4h.lora_B": (-1, False),
    "dense_4h_to_h.weight": (0, False),
    "dense_4h_to_h.lora_A": (0, False),
}


def get_split(name: str) -> Optional[tuple[int, bool]]:
    """Return SPLITS' entry for the weight ``name``, or None where all processes have all of it."""
    return SPLITS.get(".".join(name.split(".")[-2:]))


def weight_shapes(config: GLMConfig) -> dict[str, list[int]]:
    """Return the shapes of a GLM's weights on one process, by name."""
    width = config.hidden_size
    top = {
        "word_embeddings.weight": [config.vocab_size, width],
        "transformer.position_embeddings.weight": [config.max_sequence_length + 1, width],
        "transformer.block_position_embeddings.weight": [config.max_sequence_length + 1, width],
        "transformer.final_layernorm.weight": [width],
        "transformer.final_layernorm.bias": [width],
    }
    shapes = {f"glm.{name}": shape for name, shape in top.items()}
    for number in range(config.num_layers):
        layer = f"glm.transformer.layers.{number}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = [width]
        for linear, shape in linear_shapes(config).items():
            shapes[f"{layer}.{linear}.weight"], shapes[f"{layer}.{linear}.bias"] = shape, shape[1:]
    return shapes


def linear_shapes(config: GLMConfig) -> dict[str, list[int]]:
    """Return the shapes, [inputs, outputs], of the linears of a layer, by name."""
    width = config.hidden_size
    return {
        "attention.query_key_value": [width, 3 * width],
        "attention.dense": [width, width],
        "mlp.dense_h_to_4h": [width, 4 * width],
        "mlp.dense_4h_to_h": [4 * width, width],
    }


def adapter_shapes(config: GLMConfig, lora_config: LoRAConfig) -> dict[str, list[int]]:
    """Return the shapes of an adapter's weights on one process, by name.

    A is [inputs, rank], B is [rank, outputs].
    """
    shapes = {}
    for number in range(config.num_layers):
        for linear, (inputs, outputs) in linear_shapes(config).items():
            name = f"glm.transformer.layers.{number}.{linear}"
            if any(matches(target, name) for target in lora_config.target_modules):
                shapes[f"{name}.lora_A"] = [inputs, lora_config.r]
                shapes[f"{name}.lora_B"] = [lora_config.r, outputs]
    return shapes


def matches(target: str, name: str) -> bool:
    r"""Whether a pattern of target_modules is one of the linear ``name``, as re.fullmatch says it.

    A pattern may come from a file, and a regular expression may take for ever. So it is taken apart here:
    names and dots, maybe with .* before and after, as in ``.*\.dense`` or ``.*query_key_value.*``.

    Raises:
        ValueError: where it is any other regular expression.
    """
    text = target.replace("\\.", ".")
    start = 2 if text.startswith(".*") else 0
    end = len(text) - 2 if text.endswith(".*") and len(text) > start else len(text)
    literal = text[start:end]
    if not all(character.isascii() and (character.isalnum() or character in "_.") for character in literal):
        raise ValueError(f"target_modules has {target[:80]!r}, which names no linears as .*\\.dense does")
    if start:
        return literal in name if end < len(text) else name.endswith(literal)
    return name.startswith(literal) if end < len(text) else name == literal


def count_parameters(
    config: GLMConfig, degree: int = 1, lora_config: Optional[LoRAConfig] = None
) -> tuple[int, int]:
    """Count the weights on one of ``degree`` tensor-parallel processes.

    Returns:
        The numbers of all weights and of those that are trained.
    """

    def count(shapes):
        return sum(math.prod(shape) // (degree if get_split(name) else 1) for name, shape in shapes.items())

    weights = count(weight_shapes(config))
    if lora_config is None:
        return weights, weights
    trained = count(adapter_shapes(config, lora_config))
    return weights + trained, trained


def unshard(parts: list[np.ndarray], axis: int, by_head: bool, heads: int) -> np.ndarray:
    """Return the complete weight of which tensor-parallel processes have the ``parts``.

    Args:
        parts: of all processes in their order.
        axis: the one that is split.
        by_head: whether the outputs are [q k v] of one head after the other in the parts, and all q,
            all k, all v in the complete weight.
        heads: of all processes.
    """
    complete = np.concatenate(parts, axis)
    if not by_head:
        return complete
    *inputs, outputs = complete.shape
    return np.moveaxis(complete.reshape(*inputs, heads, 3, -1), -2, -3).reshape(*inputs, outputs)


def shard(weight: np.ndarray, degree: int, rank: int, axis: int, by_head: bool, heads: int) -> np.ndarray:
    """Return the part of process ``rank`` of ``degree``; see unshard. It copies nothing but the part."""
    if by_head:
        *inputs, outputs = weight.shape
        by_process = weight.reshape(*inputs, 3, degree, heads // degree, -1)
        part = np.moveaxis(by_process[..., rank, :, :], -3, -2)
        return part.reshape(*inputs, outputs // degree)
    size = weight.shape[axis] // degree
    rows = slice(rank * size, (rank + 1) * size)
    return weight[rows] if axis == 0 else weight[..., rows]
