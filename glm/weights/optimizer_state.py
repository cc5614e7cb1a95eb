"""An AdamW's state, read from a checkpoint of any layout and precision."""

import re
from typing import NamedTuple

import paddle
from paddlenlp.utils.log import logger

from glm.weights.loading import convert_layout, float32, read_checkpoint, read_parts


class OptimizerState(NamedTuple):
    """This process's part of an AdamW's state in a checkpoint, by the model's names of the weights."""

    scheduler: dict  # the state of the learning rate's schedule
    moments: dict  # {"glm...weight": {"moment1_0": float32 array, "beta1_pow_acc_0": array, ...}}
    masters: dict  # float32 master weights, {"glm...weight": array}; empty where the run had none


def sort_optimizer_state(parts, names, convert, updated):
    """Return what a checkpoint holds of an optimizer, sorted by weights, OptimizerState.

    Args:
        parts (list of dict): what the optimizers of the checkpoint's processes held, as
            ``read_parts`` gives them. A moment is called by the weight's name there or,
            with master weights, by the master's.
        names (dict): the model's name of each weight by its name there.
        convert: as ``convert_layout`` gives it.
        updated (set): the model's names of the weights whose moments this process needs.
    """
    moments, masters = {}, {}
    for saved_name, value in parts[0].items():
        match = re.fullmatch(r"(.+?)(?:_fp32_master_0)?_((?:moment|beta)\d.*)", saved_name)
        if match is None or names[match[1]] not in updated:
            continue
        key, kind = names[match[1]], match[2]
        if kind.startswith("moment"):
            value = convert(key, [part[saved_name] for part in parts])
        moments.setdefault(key, {})[kind] = value
    for saved_name in parts[0].get("master_weights") or {}:
        key = names[saved_name]
        masters[key] = convert(key, [part["master_weights"][saved_name] for part in parts])
    return OptimizerState(parts[0]["LR_Scheduler"], moments, masters)


def name_optimizer_state(saved, model, masters, updated):
    """Return an OptimizerState by the names of this run's optimizer, as its set_state_dict takes it.

    Moments are float32 in every precision, but an optimizer calls them by its master
    weight where it has one.

    Args:
        masters (dict): arrays by the model's names, of the weights with a master here.
        updated (set): the model's names of the weights that this process's optimizer
            updates.
    """
    state, master_weights = {"LR_Scheduler": saved.scheduler}, {}
    for key, weight in model.state_dict().items():
        if key not in updated:
            continue
        name = weight.name
        if key in masters:
            name = f"{weight.name}_fp32_master_0"  # as the optimizer would call it
            master_weights[weight.name] = paddle.to_tensor(float32(masters[key]))
            master_weights[weight.name].name = name
        for kind, moment in saved.moments.get(key, {}).items():
            state[f"{name}_{kind}"] = moment
    if master_weights:
        state["master_weights"] = master_weights
    return state


def read_optimizer_state(checkpoint, optimizer, model, names, master_weights):
    """Read what this process's ``optimizer`` goes on with, of any precision and layout.

    Where the checkpoint has master weights, the model's weights are set to them, which
    are more exact. Where it has none and this run does, they are made of the
    checkpoint's weights.

    Args:
        names (dict): the model's name of each weight by the name in the checkpoint's
            state, or None where both are of one layout.
        master_weights (bool): whether this run's optimizer has them.

    Returns:
        dict, as the optimizer's set_state_dict takes it.
    """
    while hasattr(optimizer, "_inner_opt"):  # fleet's wrappers; with sharding the innermost has some weights
        optimizer = optimizer._inner_opt
    parameters = {parameter.name for parameter in optimizer._parameter_list}
    weights = model.state_dict()
    names = names or {weight.name: key for key, weight in weights.items()}
    updated = {key for key, weight in weights.items() if weight.name in parameters}

    parts, degree = read_parts(checkpoint, "optimizer", ".pdopt", model)
    convert = convert_layout(model, degree)
    saved = sort_optimizer_state(parts, names, convert, updated)
    for key, master in saved.masters.items():
        weights[key].set_value(paddle.to_tensor(master).astype(weights[key].dtype))
    masters = saved.masters
    if masters and not master_weights:
        logger.train("the checkpoint has master weights: this run goes on with them as its weights")
        masters = {}
    elif master_weights and not masters:
        logger.train("the checkpoint has no master weights: they are its weights")
        parts, degree = read_checkpoint(checkpoint, model)
        convert = convert_layout(model, degree)
        for key in updated & parts[0].keys():
            if weights[key].dtype != paddle.float32 and not weights[key].stop_gradient:
                masters[key] = convert(key, [part[key] for part in parts])
    return name_optimizer_state(saved, model, masters, updated)
