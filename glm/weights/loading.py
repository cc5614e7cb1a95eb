"""A model's weights, read from files of any layout, precision and framework."""

import contextlib
import copy
import ctypes
import hashlib
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.transformers import GLMForConditionalGeneration
from paddlenlp.transformers.model_utils import dtype_guard, no_init_weights
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.device import on_cpu
from glm.errors import as_input_error
from glm.files import open_regular
from glm.outputs.layout import ADAPTER, WHOLE_MODEL, find
from glm.weights.formats import find_forms, read_arrays, read_file, release_pages

SAMPLES, SAMPLE_SIZE = 256, 1 << 16  # of a file of weights: how many parts are read, and their bytes


def where_and_advice(name, adapter=None):
    """Return the words of a message about the model ``name``, or about the base of the folder ``adapter``."""
    advice = (
        "a published model's name, if its host can be reached, or a folder with config.json, "
        "weights (model_state.pdparams, model.safetensors or pytorch_model.bin) and the tokenizer"
    )
    if adapter is None:
        return f"--model_name_or_path {name}", f"give {advice}"
    return (f"--model_name_or_path {adapter}: its base {name}", f"give by --lora_base {advice}")


def load(loader, name, what, adapter=None):
    """Return ``loader.from_pretrained(name)``.

    Args:
        what (str): what is loaded, for a message.
        adapter (str): the folder whose base ``name`` is, or None.

    Raises:
        InputError: where it can't be loaded.
    """
    where, advice = where_and_advice(name, adapter)
    with as_input_error(f"{where}: its {what} can't be loaded", advice):
        return loader.from_pretrained(name)


@contextlib.contextmanager
def without_weights():
    """Make layers within this block whose weights have no memory until they are set.

    Drawing random weights takes longer than reading a file.
    """
    with no_init_weights(), paddle.LazyGuard():
        yield


def open_model(name, config, dtype="float32", degree=1, rank=0, adapter=None):
    """Find the files of the GLM ``name``, and make the model without its weights.

    Args:
        config (GLMConfig): its config. dtype (str): of its weights here.
        degree, rank (int): of tensor parallelism.
        adapter (str): the folder whose base it is, or None.

    Returns:
        the model; arrays and a degree, as ``fill`` takes them.

    Raises:
        InputError: where the files can't be read, or don't hold exactly the model's
        weights.
    """
    where, advice = where_and_advice(name, adapter)
    with as_input_error(f"{where}: its weights can't be loaded", advice):
        paths = find_weights(name)
        saved_degree = len(paths)
        if saved_degree == degree:
            paths = [paths[rank]]
        parts = [with_prefix(read_file(path)) for path in paths]
        config = copy.deepcopy(config)
        config.dtype = dtype
        config.tensor_parallel_degree, config.tensor_parallel_rank = degree, rank
        with without_weights(), dtype_guard(dtype):
            model = GLMForConditionalGeneration(config)
        check_names(model, parts[0].keys())
    for form in find_forms(name)[1:]:
        logger.train(f"{name} holds {form[0].name} too: {paths[0].name} is read")
    return model, parts, saved_degree


def load_model(name, config, dtype="float32", degree=1, rank=0, adapter=None):
    """Return the GLM ``name`` with its weights; see open_model for the arguments and errors."""
    model, parts, saved_degree = open_model(name, config, dtype, degree, rank, adapter)
    where, advice = where_and_advice(name, adapter)
    with as_input_error(f"{where}: its weights can't be loaded", advice):
        fill(model, parts, saved_degree)
    return model


def find_weights(name):
    """Return the files to read a model from, list of Path: one, or one of each tensor-parallel process."""
    if not Path(name).is_dir():
        # The one way to PaddleNLP's cache of published models. PyTorch's files are read
        # here, not converted.
        file, *_ = GLMForConditionalGeneration._resolve_model_file_path(name, convert_from_torch=True)
        return [Path(file)]
    forms = find_forms(name)
    if not forms:
        raise ValueError(
            "it has no model_state.pdparams, model.safetensors or pytorch_model.bin, whole or in shards"
        )
    return forms[0]


def check_files(name, count):
    """Raise ValueError where a folder's weights can't be read, or are too few for a model of ``count``.

    A published name passes: its files may not be downloaded yet.
    """
    if Path(name).is_dir():
        found = sum(array.size for path in find_weights(name) for array in read_file(path).values())
        if found < 0.9 * count:
            raise ValueError(f"they are {found}, its config.json is of a model of {count}")


def with_prefix(arrays):
    """Return the arrays by a GLMForConditionalGeneration's names; files of a GLMModel lack their prefix."""
    return {name if name.startswith("glm.") else f"glm.{name}": array for name, array in arrays.items()}


def fingerprint_weights(folders):
    """Return BLAKE2b of the files of weights in ``folders``, str; None where one of them is no folder.

    Of a large file it takes SAMPLES parts that lie evenly in it: a model's training changes all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        paths = find(folder, (*WHOLE_MODEL, *ADAPTER))
        if not paths:
            return None
        for path in paths:
            size = path.stat().st_size
            digest.update(b"%d " % size)
            with open_regular(path) as file:
                for start in range(0, size, max(size // SAMPLES, SAMPLE_SIZE)):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()


def check_names(model, names):
    """Raise ValueError where ``names`` are not exactly those of the model's weights."""
    expected = model.state_dict().keys()
    missing, unexpected = sorted(expected - names), sorted(names - expected)
    if missing:
        raise ValueError(f"they lack {len(missing)} of the model's weights, the first is {missing[0]}")
    if unexpected:
        raise ValueError(f"they hold {len(unexpected)} that the model has not, the first is {unexpected[0]}")


def fill(model, parts, saved_degree):
    """Set those weights of ``model`` that ``parts`` hold, one after the other.

    Beside the model there is never more than one weight in memory.

    Args:
        parts (list of dict): arrays by name, as convert_layout's function takes them.

    Returns:
        the types that weights were cast from and to, set of (str, str).

    Raises:
        ValueError: where a weight has another shape than the model's.
    """
    weights, convert, casts = (model.state_dict(), convert_layout(model, saved_degree), set())
    names = [name for name in weights if name in parts[0]]
    size = sum(part[name].nbytes for part in parts for name in names)
    start, terminal = time.time(), sys.stderr.isatty()
    told = terminal
    with tqdm(
        total=size,
        desc="loading the weights",
        unit="B",
        unit_scale=True,
        delay=5,
        leave=False,
        disable=not terminal,
    ) as bar:
        for name in names:
            arrays, weight = [part[name] for part in parts], weights[name]
            array = convert(name, arrays)
            saved_shape, shape = list(array.shape), list(weight.shape)
            if saved_shape != shape:
                raise ValueError(f"its {name} is {saved_shape}, where this run has {shape}")
            saved, dtype = saved_dtype(array), str(weight.dtype).split(".")[-1]
            if saved != dtype:
                casts.add((saved, dtype))
            _set_weight(weight, array, dtype)
            for array in arrays:
                release_pages(array)
                bar.update(array.nbytes)
            if not told and time.time() - start > 5:
                told = True
                logger.train(f"loading {size / 1e9:.2f} GB of weights")
    return casts


def _set_weight(weight, array, dtype):
    """Copy a saved array into a weight of its shape and of the type ``dtype`` (str)."""
    if saved_dtype(array) == dtype:
        weight.set_value(array)
    elif dtype == "float32" and on_cpu():
        # Cast to where it stays: an array in between would take as long again. There is no
        # public way to give a weight memory without a copy.
        made = paddle.empty(array.shape, dtype)
        memory = (ctypes.c_char * (4 * array.size)).from_address(made.data_ptr())
        into = np.frombuffer(memory, dtype).reshape(array.shape)
        with ThreadPoolExecutor() as pool:  # NumPy casts without Python's lock
            pieces = (np.array_split(whole, os.cpu_count()) for whole in (array, into))
            list(pool.map(_cast_to_float32, *pieces))
        weight.get_tensor()._share_data_with(made.get_tensor())
    elif dtype == "float32":
        weight.set_value(float32(array))
    else:
        weight.set_value(paddle.to_tensor(float32(array)).astype(dtype))  # numpy has no bfloat16


def convert_layout(model, saved_degree):
    """Return a function from ``saved_degree`` processes' parts of a weight to this process's part.

    Which weights are split, and how, is what the model's own tensor-parallel mappings
    say.

    Returns:
        convert(name, parts): this process's part of the weight ``name``, or of one of
        its moments, numpy. ``parts`` are those of all processes in their order, or this
        process's alone where the degrees are the same.
    """
    config = copy.deepcopy(model.config)
    degree, rank = (max(config.tensor_parallel_degree, 1), max(config.tensor_parallel_rank, 0))
    if saved_degree == degree:
        return lambda name, parts: parts[0]
    config.tensor_parallel_degree = max(saved_degree, degree)
    # PaddleNLP's functions themselves cut a weight into thousands of tensors; here
    # their arguments are read.
    actions = model.get_tensor_parallel_convert_actions(config, model.state_dict().keys(), is_split=True)

    def convert(name, parts):
        if name not in actions:
            return parts[0]
        layout = {
            "axis": -1 if actions[name].keywords.get("is_column", True) else 0,
            "by_head": actions[name].keywords.get("is_old_qkv", False),
            "heads": config.num_attention_heads,
        }
        whole = join_parts(parts, **layout) if saved_degree > 1 else parts[0]
        return take_part(whole, degree, rank, **layout) if degree > 1 else whole

    return convert


def join_parts(parts, axis, by_head, heads):
    """Return the whole weight of which tensor-parallel processes have the ``parts``.

    Args:
        axis (int): which is split.
        by_head (bool): whether the outputs are [q k v] of one head after the other in the
            parts, and all q, all k, all v in the whole.
        heads (int): of all processes.
    """
    whole = np.concatenate(parts, axis)
    if not by_head:
        return whole
    *inputs, outputs = whole.shape
    return np.moveaxis(whole.reshape(*inputs, heads, 3, -1), -2, -3).reshape(*inputs, outputs)


def take_part(whole, degree, rank, axis, by_head, heads):
    """Return the part of process ``rank`` of ``degree``; see join_parts. It copies nothing but the part."""
    if by_head:
        *inputs, outputs = whole.shape
        by_process = whole.reshape(*inputs, 3, degree, heads // degree, -1)
        part = np.moveaxis(by_process[..., rank, :, :], -3, -2)
        return part.reshape(*inputs, outputs // degree)
    size = whole.shape[axis] // degree
    rows = slice(rank * size, (rank + 1) * size)
    return whole[rows] if axis == 0 else whole[..., rows]


def saved_dtype(value):
    """Return the type of a saved array, str. numpy has no bfloat16, whose bits are saved as uint16."""
    return "bfloat16" if value.dtype == np.uint16 else str(value.dtype)


def float32(value):
    """Return a saved array in float32."""
    into = np.empty(value.shape, "float32")
    _cast_to_float32(value, into)
    return into


def _cast_to_float32(value, into):
    if saved_dtype(value) == "bfloat16":
        np.left_shift(value, 16, out=into.view("uint32"), dtype="uint32")
    else:
        into[...] = value


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


def read_checkpoint(checkpoint, model):
    """Return what ``fill`` needs of the model's weights in a checkpoint of any layout: parts and degree."""
    if hasattr(model, "read_checkpoint"):  # a LoRA's
        return model.read_checkpoint(checkpoint)
    return read_parts(checkpoint, "model_state", ".pdparams", model)


def load_checkpoint(checkpoint, model):
    """Set the model's weights to those of a checkpoint of any precision and layout."""
    for saved, dtype in sorted(fill(model, *read_checkpoint(checkpoint, model))):
        logger.train(f"the checkpoint's weights are cast from {saved} to {dtype}")
