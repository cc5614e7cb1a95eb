"""Weights and optimizer states on disk: other layouts, other precisions."""

import copy
import logging
import mmap
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from paddlenlp.utils.log import logger

from glm.errors import InputError, mistakes


def load(loader, name, what, adapter=None, **kwargs):
    """Return ``loader.from_pretrained(name, **kwargs)``.

    Args:
        what (str): what is loaded, for a message. adapter (str): the folder whose base
        ``name`` is, or None.

    Raises:
        InputError: where it can't be loaded, or only in part.
    """
    where, advice = f"--model_name_or_path {name}", "give "
    if adapter:
        where, advice = (
            f"--model_name_or_path {adapter}: its base {name}",
            "give by --lora_base ",
        )
    advice += (
        "a published model's name, if its host can be reached, or a folder with config.json, "
        "model_state.pdparams and the tokenizer"
    )
    warnings = []
    collector = logging.Handler()
    collector.emit = lambda record: warnings.append(record.getMessage())
    logger.logger.addHandler(collector)
    try:
        with mistakes(f"{where}: its {what} can't be loaded", advice):
            loaded = loader.from_pretrained(name, **kwargs)
    finally:
        logger.logger.removeHandler(collector)
    missing = "".join(warning for warning in warnings if "newly initialized" in warning)
    if "word_embeddings" in missing or ".layers." in missing:
        raise InputError(f"{where}: its weights lack some of GLM's: give those of a GLM")
    return loaded


class _MappedFile:
    """A file that pickle reads from without copying it."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.position = 0

    def read(self, size):
        start, self.position = self.position, self.position + size
        part = self.data[start : self.position]
        return part if size > 4096 else bytes(part)  # pickle wants bytes of all but arrays

    def readline(self):
        raise pickle.UnpicklingError("paddle.save writes no lines")


class _MappedArray:
    """Stands for a numpy array that is unpickled. Its values stay in the file."""

    def __init__(self, *_):
        """Take the arguments of numpy's own constructor, which say nothing."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


class _ArrayReader(pickle._Unpickler):  # the public one, in C, copies all it reads
    def find_class(self, module, name):
        return _MappedArray if name == "_reconstruct" else super().find_class(module, name)


def read_arrays(path):
    """Return the dict that paddle.save wrote to ``path``, with numpy arrays that are mapped to the file.

    paddle.load reads all of a file, and one of eight tensor-parallel processes needs an
    eighth of it.
    """

    def unwrap(value):
        if isinstance(value, dict):
            return {name: unwrap(part) for name, part in value.items()}
        if isinstance(value, tuple) and len(value) == 2:  # a name of Paddle's, and an array
            value = value[1]
        return value.array if isinstance(value, _MappedArray) else value

    arrays = unwrap(_ArrayReader(_MappedFile(path)).load())
    arrays.pop("StructuredToParameterName@@", None)  # Paddle's table of its own names
    return arrays


def convert_layout(model, saved_degree):
    """Return a function from ``saved_degree`` processes' parts of a weight to this process's part.

    It works by the model's own tensor-parallel mappings.

    Returns:
        convert(name, parts): this process's part of the weight ``name``, or of one of
        its moments, numpy. ``parts`` are those of all processes in their order, or this
        process's alone where the degrees are the same.
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
    """Return the type of a saved array, str. numpy has no bfloat16, whose bits are saved as uint16."""
    return "bfloat16" if value.dtype == np.uint16 else str(value.dtype)


def _float32(value):
    """Return a saved array as a float32 tensor."""
    if _saved_dtype(value) == "bfloat16":
        value = (value.astype("uint32") << 16).view("float32")
    return paddle.to_tensor(value.astype("float32"))


def cast_weights(state_dict, model):
    """Return a checkpoint's weights in the types of the model's.

    Args:
        state_dict (dict): arrays by the names of the weights, of which some may be no
        weights of the model.

    Returns:
        dict: tensors of those that are cast, and the arrays of the others.

    Raises:
        ValueError: where a weight has another shape than the model's, which Paddle
        would leave out.
    """
    result, casts = dict(state_dict), set()
    for name, parameter in model.state_dict().items():
        wanted = str(parameter.dtype).split(".")[-1]
        if name not in result:
            continue
        saved, shape = _saved_dtype(result[name]), list(result[name].shape)
        if shape != parameter.shape:
            raise ValueError(f"its {name} is {shape}, where this run has {parameter.shape}")
        if saved != wanted:
            casts.add(f"from {saved} to {wanted}")
            result[name] = _float32(result[name]).astype(wanted)
    if casts:
        logger.train(f"the checkpoint's weights are cast {', '.join(sorted(casts))}")
    return result


class OptimizerState(NamedTuple):
    """This process's part of an AdamW's state in a checkpoint, by the model's names of the weights."""

    scheduler: dict  # the state of the learning rate's schedule
    moments: dict  # {"glm...weight": {"moment1_0": float32 array, "beta1_pow_acc_0": array, ...}}
    masters: dict  # float32 master weights, {"glm...weight": array}; empty where the run had none


def sort_optimizer_state(parts, names, convert, updated):
    """Return what a checkpoint holds of an optimizer, sorted by weights, OptimizerState.

    Args:
        parts (list of dict): what the optimizers of the checkpoint's processes held, as
        ``read_parts`` gives
            them. A moment is called by the weight's name there or, with master weights,
            by the master's.
        names (dict): the model's name of each weight by its name there. convert: as
        ``convert_layout`` gives it. updated (set): the model's names of the weights
        whose moments
            this process needs.
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
        masters (dict): arrays by the model's names, those of which this run has master
        weights. updated (set): the model's names of the weights that this process's
        optimizer updates.
    """
    state, master_weights = {"LR_Scheduler": saved.scheduler}, {}
    for key, weight in model.state_dict().items():
        if key not in updated:
            continue
        name = weight.name
        if key in masters:
            name = f"{weight.name}_fp32_master_0"  # as the optimizer would call it
            master_weights[weight.name] = _float32(masters[key])
            master_weights[weight.name].name = name
        for kind, moment in saved.moments.get(key, {}).items():
            state[f"{name}_{kind}"] = moment
    if master_weights:
        state["master_weights"] = master_weights
    return state


def read_parts(checkpoint, kind, ending, model):
    """Read what tensor-parallel processes wrote into the files ``kind`` of a checkpoint.

    Returns:
        dicts of arrays that are mapped to the files, one for each process or, where
        this run has as many, that of this process alone, list; the number of processes,
        int.
    """
    parts = {}
    for path in sorted(Path(checkpoint).glob(f"{kind}*{ending}")):
        rank = re.search(r"\.tp(\d+)", path.name)
        parts.setdefault(int(rank[1]) if rank else 0, []).append(path)
    degree = len(parts)
    if degree == max(model.config.tensor_parallel_degree, 1):
        parts = {0: parts[max(model.config.tensor_parallel_rank, 0)]}
    joined = []
    for _, paths in sorted(parts.items()):
        part, masters = {}, {}
        for path in paths:  # with sharding each file has the optimizer's state of other weights
            found = read_arrays(path)
            masters.update(found.pop("master_weights", None) or {})
            part.update(found)
        joined.append({**part, "master_weights": masters} if masters else part)
    return joined, degree


def read_weights(checkpoint, model):
    """Return this process's weights in a checkpoint by their names, numpy, in the type they were saved in."""
    if hasattr(model, "read_checkpoint"):
        return model.read_checkpoint(checkpoint)
    parts, degree = read_parts(checkpoint, "model_state", ".pdparams", model)
    convert = convert_layout(model, degree)
    return {name: convert(name, [part[name] for part in parts]) for name in parts[0]}


def read_optimizer_state(checkpoint, optimizer, model, names, master_weights):
    """Read what the ``optimizer`` of this process goes on with, from a checkpoint of any precision and layout.

    Where the checkpoint has master weights, the model's weights are set to them, which
    are more exact. Where it has none and this run does, they are made of the
    checkpoint's weights.

    Args:
        names (dict): the model's name of each weight by the name in the checkpoint's
        state, or None where
            both are of one layout. master_weights (bool): whether this run's optimizer
            has them.

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
    saved = sort_optimizer_state(parts, names, convert_layout(model, degree), updated)
    for key, master in saved.masters.items():
        weights[key].set_value(paddle.to_tensor(master).astype(weights[key].dtype))
    masters = saved.masters
    if masters and not master_weights:
        logger.train("the checkpoint has master weights: this run goes on with them as its weights")
        masters = {}
    elif master_weights and not masters:
        logger.train("the checkpoint has no master weights: they are its weights")
        trained = {key for key in updated if weights[key].dtype != paddle.float32}
        found = read_weights(checkpoint, model)
        masters = {key: found[key] for key in trained & found.keys() if not weights[key].stop_gradient}
    return name_optimizer_state(saved, model, masters, updated)
