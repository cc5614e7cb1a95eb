"""An AdamW's state, read from a checkpoint of any layout and precision.

Three name spaces meet here. A ``saved_name`` is what Paddle called a weight in the run that wrote the
checkpoint, such as linear_3.w_0. A ``model_name`` is the weight's in the model and in its files, such as
glm.transformer.layers.0.mlp.dense_h_to_4h.weight. A ``paddle_name`` is what Paddle calls it in this run.
"""

import re
from typing import Callable, Optional

import numpy as np
import paddle
from paddlenlp.utils.log import logger

from glm.errors import printable
from glm.weights.loading import DTYPES, convert_layout, read_checkpoint, read_parts, to_float32

LARGEST = np.finfo("float32").max
KINDS = {"moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"}  # what AdamW has of a weight
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # AdamW divides by what a beta's power lacks of 1


def sort_optimizer_state(
    parts: list[dict],
    model_names: dict[str, str],
    convert: Callable,
    shapes: dict[str, list[int]],
    updated: set[str],
) -> tuple[dict, dict]:
    """Return what a checkpoint holds of an optimizer, sorted by weights.

    Args:
        parts: what the optimizers of the checkpoint's processes held, as ``read_parts`` gives them. A
            moment is called by the weight's saved_name or, with master weights, by the master's.
        model_names: by saved_name.
        convert: as ``convert_layout`` gives it.
        shapes: of this process's weights, by model_name.
        updated: the model_names of the weights whose moments this process needs.

    Returns:
        This process's part, by model_name: {"moment1_0": float32 array, "beta1_pow_acc_0": array, ...}; and
        the float32 master weights, none where the run had none.

    Raises:
        ValueError: where a moment or a master weight is missing, is none of its weight, or has values that
            training never gives it.
    """
    moments, masters = {}, {}

    def join(saved_name, key, table, power=False):
        """The weight's model_name, and its ``key`` in ``table`` of all processes, as this one's part."""
        model_name = model_names.get(saved_name)
        if model_name not in shapes:
            raise ValueError(f"its optimizer has {printable(key, 80)}, which is of no weight here")
        values = [part.get(key) for part in map(table, parts)]
        if not all(isinstance(value, np.ndarray) and str(value.dtype) in DTYPES for value in values):
            raise ValueError(f"its optimizer's {printable(key, 80)} is no array of numbers")
        value = values[0] if power else convert(model_name, values)  # all have the powers
        if list(value.shape) != ([1] if power else list(shapes[model_name])):
            raise ValueError(f"its optimizer's {printable(key, 80)} has the shape {list(value.shape)}")
        value = value if value.dtype == np.float32 else to_float32(value)
        least, most = (0, BELOW_ONE) if power else (-LARGEST, LARGEST)
        if not (value.min() >= least and value.max() <= most):  # NaN, which either is then, is in no range
            raise ValueError(f"its optimizer's {printable(key, 80)} has values that no training gives it")
        return model_name, value

    for key in parts[0]:
        match = re.fullmatch(r"(.+?)(?:_fp32_master_0)?_((?:moment|beta)\d.*)", key)
        # With sharding a process needs no other one's.
        if match is None or (match[1] in model_names and model_names[match[1]] not in updated):
            continue
        model_name, value = join(match[1], key, lambda part: part, match[2].startswith("beta"))
        moments.setdefault(model_name, {})[match[2]] = value
    for model_name in sorted(updated):  # Paddle would miss it in the first step
        missing = sorted(KINDS - moments.get(model_name, {}).keys())
        if missing:
            raise ValueError(f"its optimizer has no {missing[0]} of {model_name}, which this run trains")
    for saved_name in parts[0].get("master_weights", ()):
        model_name, value = join(saved_name, saved_name, lambda part: part.get("master_weights", {}))
        masters[model_name] = value
    return moments, masters


def read_optimizer_state(
    checkpoint, optimizer, model, model_names: Optional[dict[str, str]], master_weights: bool
) -> dict:
    """Read what this process's ``optimizer`` goes on with, of any precision and layout.

    Where the checkpoint has master weights, the model's weights are set to them, which are more exact.
    Where it has none and this run does, they are made of the checkpoint's weights.

    Args:
        checkpoint: its folder.
        optimizer: an AdamW or FlatAdamW, maybe in fleet's wrappers.
        model: a GLM, or one with an adapter.
        model_names: by the saved_names in the checkpoint, or None where both are of one layout.
        master_weights: whether this run's optimizer has them.

    Returns:
        What the optimizer's set_state_dict takes, beside the state of its schedule.
    """
    while hasattr(optimizer, "_inner_opt"):  # fleet's wrappers; with sharding the innermost has some weights
        optimizer = optimizer._inner_opt
    parameters = {weight.name for weight in getattr(optimizer, "weights", optimizer._parameter_list)}
    weights = model.state_dict()
    model_names = model_names or {weight.name: name for name, weight in weights.items()}
    trained = {name: weight for name, weight in weights.items() if not weight.stop_gradient}
    updated = {name for name, weight in trained.items() if weight.name in parameters}
    shapes = {name: weight.shape for name, weight in weights.items()}

    parts, degree = read_parts(checkpoint, "optimizer", ".pdopt", model)
    convert = convert_layout(model.config, degree)
    moments, masters = sort_optimizer_state(parts, model_names, convert, shapes, updated)
    for model_name, master in masters.items():
        weight = weights[model_name]
        weight.set_value(paddle.to_tensor(master).astype(weight.dtype))
    if masters and not master_weights:
        logger.train("the checkpoint has master weights: this run goes on with them as its weights")
        masters = {}
    elif master_weights and not masters:
        logger.train("the checkpoint has no master weights: they are its weights")
        parts, degree = read_checkpoint(checkpoint, model)
        convert = convert_layout(model.config, degree)
        for name in updated & parts[0].keys():
            if weights[name].dtype != paddle.float32:
                masters[name] = convert(name, [part[name] for part in parts])
    elif masters:
        for name in sorted(updated - masters.keys()):
            if weights[name].dtype != paddle.float32:
                raise ValueError(f"its optimizer has no master weight of {name}, which this run trains")
    # Moments are float32 in every precision, but called by the master weight where there is one.
    state, named_masters = {}, {}
    for model_name, weight in weights.items():
        if model_name not in updated:
            continue
        paddle_name = weight.name
        if model_name in masters:
            paddle_name = f"{weight.name}_fp32_master_0"  # as the optimizer would call it
            named_masters[weight.name] = paddle.to_tensor(to_float32(masters[model_name]))
            named_masters[weight.name].name = paddle_name
        for kind, moment in moments.get(model_name, {}).items():
            state[f"{paddle_name}_{kind}"] = moment
    return {**state, "master_weights": named_masters} if named_masters else state
