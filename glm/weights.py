"""Weights and optimizer states on disk: other layouts, precisions."""

import copy
import functools
import glob
import logging
import mmap
import os
import pickle
import re

import numpy as np
import paddle
from paddlenlp.utils.log import logger

from glm.errors import InputError


def load(loader, name, what, adapter=None, **kwargs):
    """``loader.from_pretrained(name)``; an InputError that calls it ``what`` if it can't be loaded, or only in part.

    ``adapter``: the folder whose base ``name`` is.
    """
    where = f"--model_name_or_path {adapter}: its base {name}" if adapter else f"--model_name_or_path {name}"
    warnings = []
    collector = logging.Handler()
    collector.emit = lambda record: warnings.append(record.getMessage())
    logger.logger.addHandler(collector)
    try:
        loaded = loader.from_pretrained(name, **kwargs)
    except Exception as error:  # PaddleNLP and its hubs raise many kinds
        raise InputError(
            f"{where}: its {what} can't be loaded ({str(error)[:200]}): give {'by --lora_base ' if adapter else ''}"
            "a published model's name, if its host can be reached, or a folder with config.json, "
            "model_state.pdparams and the tokenizer"
        ) from error
    finally:
        logger.logger.removeHandler(collector)
    missing = "".join(warning for warning in warnings if "newly initialized" in warning)
    if "word_embeddings" in missing or ".layers." in missing:
        raise InputError(f"{where}: its weights lack some of GLM's: give those of a GLM")
    return loaded


class _MappedFile:
    """What pickle reads a file from, without copying it."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.data, self.position = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), 0

    def read(self, size):
        self.position += size
        part = self.data[self.position - size : self.position]
        return part if size > 4096 else bytes(part)  # as pickle wants what is no array

    def readline(self):
        raise pickle.UnpicklingError("paddle.save writes no lines")


class _MappedArray:
    """Stands for a numpy array while it is read: its values stay in the file."""

    def __init__(self, *_):
        """As numpy's own constructor for pickles is called."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


class _ArrayReader(pickle._Unpickler):  # the public one, in C, copies all it reads
    def find_class(self, module, name):
        return _MappedArray if name == "_reconstruct" else super().find_class(module, name)


def read_arrays(path):
    """The dict that paddle.save wrote to ``path``, with numpy arrays that stay in the file until they are used.

    paddle.load reads all of a file, of which one of eight tensor-parallel processes needs an eighth.
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
    """By the model's own tensor-parallel mappings, from ``saved_degree`` processes' parts to this one's.

    Returns:
        convert(name, parts): this process's part of the weight ``name``, or of its moments, numpy. ``parts``: those of
        all of the processes in their order, or its own alone, where there were as many.
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
    return "bfloat16" if value.dtype == np.uint16 else str(value.dtype)  # numpy has none: its bits are saved


def _float32(value):
    """A saved array as a float32 tensor."""
    if _saved_dtype(value) == "bfloat16":
        value = (value.astype("uint32") << 16).view("float32")
    return paddle.to_tensor(value.astype("float32"))


def cast_weights(state_dict, model):
    """A checkpoint's weights, numpy by their names, in the types of the model's."""
    result, casts = dict(state_dict), set()
    for name, parameter in model.state_dict().items():
        wanted = str(parameter.dtype).split(".")[-1]
        if name in result and list(result[name].shape) != parameter.shape:  # Paddle would leave it out
            raise ValueError(
                f"its {name} is {list(result[name].shape)}, where this run has {parameter.shape}"
            )
        if name in result and _saved_dtype(result[name]) != wanted:
            casts.add(f"from {_saved_dtype(result[name])} to {wanted}")
            result[name] = _float32(result[name]).astype(wanted)
    if casts:
        logger.train(f"the checkpoint's weights are cast {', '.join(sorted(casts))}")
    return result


def convert_optimizer_state(parts, names, model, convert, master_weights, read_weights, wanted):
    """An AdamW's state from training in any precision and layout, for this process, with or without master weights.

    Moments are float32 in every precision, but called by what they are of: the weight, or its float32 master weight.
    Where this run's weights are of another type than the checkpoint's were, its master weights are taken for them,
    which are more exact. Those that are wanted and missing are made of the checkpoint's weights.

    Args:
        parts: what the optimizers of all tensor-parallel processes of the checkpoint held, as convert_layout's convert
            wants them: dicts of numpy arrays. names (dict): what the model calls the weights that they name.
        convert: of convert_layout. master_weights (bool): whether this run's optimizer has them.
        read_weights (function): returns the checkpoint's weights, numpy by name.
        wanted: the names, as Paddle has them, of the parameters that this process's optimizer updates.

    Returns:
        dict: moments as numpy arrays, master weights as tensors, by the names of this run's optimizer.
    """
    state, weights = {"LR_Scheduler": parts[0]["LR_Scheduler"]}, model.state_dict()
    masters = [part.get("master_weights") or {} for part in parts]
    saved = read_weights() if master_weights and not masters[0] else {}
    if saved:
        logger.train("the checkpoint has no master weights: they are its weights")
    elif masters[0] and not master_weights:
        logger.train("the checkpoint has master weights: this run goes on with them as its weights")
    state["master_weights"] = {}
    for name, key in names.items():
        weight = weights[key]
        if name in masters[0]:
            master = convert(key, [part[name] for part in masters])
            weight.set_value(paddle.to_tensor(master).astype(weight.dtype))
        elif weight.dtype != paddle.float32 and not weight.stop_gradient and key in saved:
            master = saved[key]
        else:
            continue
        if master_weights and weight.name in wanted:
            state["master_weights"][weight.name] = master = _float32(master)
            master.name = f"{weight.name}_fp32_master_0"  # as the optimizer would call it
    for saved_name, value in parts[0].items():
        moment = re.fullmatch(r"(.+?)(?:_fp32_master_0)?_((?:moment|beta)\d.*)", saved_name)
        if moment is None or weights[names[moment[1]]].name not in wanted:
            continue
        key = names[moment[1]]
        if moment[2].startswith("moment"):
            value = convert(key, [part[saved_name] for part in parts])
        name = weights[key].name
        state[f"{name}{'_fp32_master_0' if name in state['master_weights'] else ''}_{moment[2]}"] = value
    if not state["master_weights"]:
        del state["master_weights"]
    return state


def read_parts(checkpoint, kind, ending, model):
    """What tensor-parallel processes wrote into the files ``kind`` of a checkpoint, as convert_layout wants it.

    Returns: list of dicts of numpy arrays, whose values stay in the files until they are used; of how many
    processes the checkpoint is.
    """
    parts = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(checkpoint), f"{kind}*{ending}"))):
        rank = re.search(r"\.tp(\d+)", os.path.basename(path))
        parts.setdefault(int(rank[1]) if rank else 0, []).append(path)
    degree = len(parts)
    if degree == max(model.config.tensor_parallel_degree, 1):
        parts = {0: parts[max(model.config.tensor_parallel_rank, 0)]}
    joined = []
    for _, paths in sorted(parts.items()):
        part = {}
        for path in paths:  # with sharding an optimizer's state is in several, each of other weights
            found = read_arrays(path)
            masters = {**part.get("master_weights", {}), **found.get("master_weights", {})}
            part.update(found, **({"master_weights": masters} if masters else {}))
        joined.append(part)
    return joined, degree


def read_weights(checkpoint, model):
    """This process's weights in a checkpoint by their names, numpy, in the type they were saved in."""
    if hasattr(model, "read_checkpoint"):
        return model.read_checkpoint(checkpoint)
    parts, degree = read_parts(checkpoint, "model_state", ".pdparams", model)
    convert = convert_layout(model, degree)
    return {name: convert(name, [part[name] for part in parts]) for name in parts[0]}


def read_optimizer_state(checkpoint, optimizer, model, names, master_weights):
    """What the ``optimizer`` of this process goes on with, from a checkpoint of any precision and layout.

    Args: names (dict): what the model calls the weights that the checkpoint's state names, or None.
    """
    parts, degree = read_parts(checkpoint, "optimizer", ".pdopt", model)
    while hasattr(
        optimizer, "_inner_opt"
    ):  # fleet's wrappers; with sharding the innermost updates some weights
        optimizer = optimizer._inner_opt
    names = names or {weight.name: name for name, weight in model.state_dict().items()}
    return convert_optimizer_state(
        parts, names, model, convert_layout(model, degree), master_weights,
        functools.partial(read_weights, checkpoint, model), {weight.name for weight in optimizer._parameter_list},
    )  # fmt: skip
