"""Arrays of any layout, precision and framework become a model's weights."""

import contextlib
import copy
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import paddle
from paddlenlp.peft import LoRAModel
from paddlenlp.transformers import (
    AutoModelForConditionalGeneration,
    GLMConfig,
    GLMForConditionalGeneration,
    PretrainedModel,
)
from paddlenlp.transformers.model_utils import no_init_weights
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.device import on_cpu
from glm.outputs.layout import PARTS, find
from glm.processes import tensor_parallel_part
from glm.quantization import LARGEST, largest_weights, quantize, set_quantized
from glm.weights.formats import LINEAR, Arrays, read_arrays, release_pages
from glm.weights.shapes import get_split, shard, unshard, weight_shapes

LORA_WEIGHTS = "lora_model_state.pdparams"  # as PaddleNLP calls the file
# numpy has no bfloat16, whose bits are saved as uint16.
DTYPES = {"float64": "float64", "float32": "float32", "float16": "float16", "uint16": "bfloat16"}
LARGE = 2e9  # bytes that take a while to read
# The bits of an exponent: all of them are set in NaN and infinity alone.
EXPONENTS = {"float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
PIECE = 1 << 17  # numbers that are looked at together


@contextlib.contextmanager
def without_weights():
    """Make layers within this block whose weights have no memory until they are set.

    Drawing random weights takes longer than reading a file.
    """
    with no_init_weights(), paddle.LazyGuard():
        yield


def make_model(
    config: GLMConfig, dtype: str = "float32", degree: int = 1, rank: int = 0
) -> GLMForConditionalGeneration:
    """Return the GLM of a ``config`` without its weights, for process ``rank`` of ``degree``."""
    config = copy.deepcopy(config)
    config.dtype, config.architectures = dtype, ["GLMForConditionalGeneration"]
    config.tensor_parallel_degree, config.tensor_parallel_rank = degree, rank
    with without_weights():
        return AutoModelForConditionalGeneration.from_config(config)


def load_model(pretrained, dtype: str = "float32", degree: int = 1, rank: int = 0):
    """Return a GLM with its weights, without its adapter.

    Args:
        pretrained (Pretrained): the model.
        dtype: of its weights here.
        degree, rank: of tensor parallelism.

    Raises:
        InputError: where the weights can't be read.
    """
    parts = pretrained.arrays
    model = make_model(pretrained.config, dtype, degree, rank)
    with pretrained.reading_weights():
        own_parts = parts[rank : rank + 1] if len(parts) == degree else parts
        fill(model, own_parts, len(parts), quantized_from=parts if pretrained.quantized else None)
    return model


def check_weights(config: GLMConfig, parts: list[Arrays]):
    """Raise ValueError where ``parts``, one a process, don't hold exactly the weights of a ``config``."""
    expected, names = weight_shapes(config), parts[0].keys()
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing:
        raise ValueError(f"they lack {len(missing)} of the model's weights, the first is {missing[0]}")
    if unexpected:
        raise ValueError(f"they hold {len(unexpected)} that the model has not, the first is {unexpected[0]}")
    for part in parts:
        for name, shape in expected.items():
            split = get_split(name)
            if split and len(parts) > 1:
                shape = list(shape)
                shape[split[0]] //= len(parts)
            check_array(name, part.get(name), shape)


def check_array(name: str, array: np.ndarray, shape: list[int]):
    """Raise ValueError where the weight ``name`` is no array of floating point numbers of a ``shape``."""
    if not isinstance(array, np.ndarray) or str(array.dtype) not in DTYPES:
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{name} is of type {kind}, which no weight is")
    if list(array.shape) != list(shape):
        raise ValueError(f"its {name} is {list(array.shape)}, where this run has {list(shape)}")


def check_finite(name: str, array: np.ndarray):
    """Raise ValueError where a weight holds NaN or infinity, piece by piece: it may be mapped to a file."""
    rows = max(PIECE // max(array[:1].size, 1), 1)
    for start in range(0, len(array), rows):
        piece = array[start : start + rows]
        if array.dtype == np.float64:  # which no model here has: what float32 can't hold becomes infinite
            with np.errstate(over="ignore"):
                piece = piece.astype("float32")
        exponent = EXPONENTS[saved_dtype(piece)]
        # NumPy's own test takes six times as long for halves.
        if (piece.view(f"uint{8 * piece.itemsize}") & exponent == exponent).any():
            raise ValueError(f"its {name} holds NaN or infinity, which no trained model has")


def converted_arrays(
    config: GLMConfig, parts: list[Arrays], saved_degree: int, shapes: dict[str, list[int]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield this process's part of those weights that ``parts`` hold, one after the other.

    What a weight's file takes in memory is released once the next one is asked for.

    Args:
        config: of the model here: its layout.
        parts: arrays by name, as convert_layout's function takes them.
        saved_degree: of tensor parallelism, where they were saved.
        shapes: of this process's weights, by name, in the order of what is yielded.

    Raises:
        ValueError: where a weight has another shape, or holds what is no number.
    """
    convert, names = convert_layout(config, saved_degree), [name for name in shapes if name in parts[0]]
    size, terminal = sum(part[name].nbytes for part in parts for name in names), sys.stderr.isatty()
    if size > LARGE and not terminal:
        logger.train(f"loading {size / 1e9:.2f} GB of weights")
    bar = {"total": size, "unit": "B", "unit_scale": True, "delay": 5, "leave": False}
    with tqdm(desc="loading the weights", disable=not terminal, **bar) as progress:
        for name in names:
            arrays = [part[name] for part in parts]
            array = convert(name, arrays)
            check_array(name, array, shapes[name])
            check_finite(name, array)
            yield name, array
            for array in arrays:
                release_pages(array)
                progress.update(array.nbytes)


def fill(
    model: PretrainedModel,
    parts: list[Arrays],
    saved_degree: int,
    quantized_from: Optional[list[Arrays]] = None,
) -> set[tuple[str, str]]:
    """Set those weights of ``model`` that ``parts`` hold, one after the other.

    Beside the model there is never more than one weight in memory.

    Args:
        model: a GLM, or one with an adapter.
        parts, saved_degree: as converted_arrays has them.
        quantized_from: the parts of all processes, where the linears are to be int8.

    Returns:
        The types that weights were cast from and to.

    Raises:
        ValueError: where a weight that is trained is missing, has another shape than the model's, or
            holds what is no number.
    """
    weights, casts = model.state_dict(), set()
    layers = dict(model.named_sublayers()) if quantized_from else {}
    missing = [name for name, weight in weights.items() if name not in parts[0] and not weight.stop_gradient]
    if missing:
        raise ValueError(f"they lack {len(missing)} of the model's weights, the first is {missing[0]}")
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, array in converted_arrays(model.config, parts, saved_degree, shapes):
        weight = weights[name]
        saved, dtype = saved_dtype(array), str(weight.dtype).split(".")[-1]
        if saved != dtype:
            casts.add((saved, dtype))
        if quantized_from and LINEAR.fullmatch(name):
            scale = _output_scale(name, array, quantized_from)
            set_quantized(layers[name.removesuffix(".weight")], _quantize(array, scale), scale)
        else:
            _set_weight(weight, array, dtype)
    return casts


def _set_weight(weight, array, dtype):
    """Copy a saved array into a weight of its shape and of the type ``dtype`` (str)."""
    if saved_dtype(array) == dtype:
        weight.set_value(array)
    elif dtype == "float32" and on_cpu():
        # Cast to where it stays: an array in between would take as long again. There is no public way to
        # give a weight memory without a copy.
        made = paddle.empty(array.shape, dtype)
        memory = (ctypes.c_char * (4 * array.size)).from_address(made.data_ptr())
        into = np.frombuffer(memory, dtype).reshape(array.shape)
        with ThreadPoolExecutor() as pool:  # NumPy casts without Python's lock
            pieces = (np.array_split(rows, os.cpu_count()) for rows in (array, into))
            list(pool.map(_cast_to_float32, *pieces))
        weight.get_tensor()._share_data_with(made.get_tensor())
    elif dtype == "float32":
        weight.set_value(to_float32(array))
    else:
        weight.set_value(paddle.to_tensor(to_float32(array)).astype(dtype))  # numpy has no bfloat16


def _output_scale(name, array, parts):
    """Return the scales of the outputs that ``array`` has of the weight ``name``, float32.

    Where processes split its inputs they are those of the complete weight, so that any layout has the same.
    """
    split = get_split(name)
    arrays = [part[name] for part in parts] if split[0] == 0 else [array]
    return np.max([to_float32(largest_weights(array)) for array in arrays], axis=0) / np.float32(LARGEST)


def _quantize(array, scale):
    """Return a saved array in int8."""
    into = np.empty(array.shape, "int8")
    rows = max((1 << 20) // array.shape[1], 1)  # so that few numbers at a time are in float32

    def quantize_rows(first):
        piece = slice(first, first + rows)
        quantize(to_float32(array[piece]), scale, into[piece])

    with ThreadPoolExecutor() as pool:  # NumPy computes without Python's lock
        list(pool.map(quantize_rows, range(0, len(array), rows)))
    return into


def convert_layout(config: GLMConfig, saved_degree: int) -> Callable:
    """Return a function from ``saved_degree`` processes' parts of a weight to this process's part.

    Args:
        config: of the model here.
        saved_degree: of tensor parallelism, where they were saved.

    Returns:
        convert(name, parts): this process's part of the weight ``name``, or of one of its moments. ``parts``
        are those of all processes in their order, or this process's alone where the degrees are the same.
    """
    rank, degree = tensor_parallel_part(config)

    def convert(name, parts):
        split = get_split(name)
        if split is None or saved_degree == degree:
            return parts[0]
        layout = (*split, config.num_attention_heads)
        complete = unshard(parts, *layout) if saved_degree > 1 else parts[0]
        return shard(complete, degree, rank, *layout) if degree > 1 else complete

    return convert


def saved_dtype(array: np.ndarray) -> str:
    """Return the type of a saved array: uint16 is bfloat16."""
    return DTYPES.get(str(array.dtype), str(array.dtype))


def to_float32(array: np.ndarray) -> np.ndarray:
    """Return a saved array in float32."""
    into = np.empty(array.shape, "float32")
    _cast_to_float32(array, into)
    return into


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return a float32 array in another type; bfloat16 is rounded to nearest even, as uint16."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.view("uint32")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")


def _cast_to_float32(array, into):
    if saved_dtype(array) == "bfloat16":
        np.left_shift(array, 16, out=into.view("uint32"), dtype="uint32")
    else:
        into[...] = array


def read_parts(checkpoint, kind: str, ending: str, model: PretrainedModel) -> tuple[list[dict], int]:
    """Read what tensor-parallel processes wrote into the files ``kind`` of a checkpoint.

    Returns:
        Dicts of arrays that are mapped to the files, one for each process or, where this run has as many,
        that of this process alone; the number of processes.

    Raises:
        ValueError: where a process's files are missing, or there are those of one process too.
    """
    parts, alone = {}, []
    for path in find(checkpoint, [f"{kind}{part}{ending}" for part in PARTS]):
        rank = re.search(r"\.tp(\d\d)", path.name)
        (parts.setdefault(int(rank[1]), []) if rank else alone).append(path)
    degree = len(parts) or 1
    if bool(alone) == bool(parts) or parts.keys() - range(degree):
        raise ValueError(f"its {kind}*{ending} are not those of all processes")
    parts = parts or {0: alone}
    this_part, this_degree = tensor_parallel_part(model.config)
    if degree == this_degree:
        parts = {0: parts[this_part]}
    joined = []
    for _, paths in sorted(parts.items()):
        part, masters = {}, {}
        for path in paths:  # with sharding each file has the optimizer's state of other weights
            found = read_arrays(path)
            more = found.pop("master_weights", None) or {}
            if not isinstance(more, dict):
                raise ValueError("its master_weights are no arrays by name")
            masters.update(more)
            part.update(found)
        joined.append({**part, "master_weights": masters} if masters else part)
    return joined, degree


def read_checkpoint(checkpoint, model: PretrainedModel) -> tuple[list[Arrays], int]:
    """Return what ``fill`` needs of the trained weights in a checkpoint of any layout: parts and degree."""
    if isinstance(model, LoRAModel):  # every layout has one file
        return [read_arrays(Path(checkpoint, LORA_WEIGHTS))], 1
    return read_parts(checkpoint, "model_state", ".pdparams", model)


def load_checkpoint(checkpoint, model: PretrainedModel):
    """Set the model's weights to those of a checkpoint of any precision and layout."""
    for saved, dtype in sorted(fill(model, *read_checkpoint(checkpoint, model))):
        logger.train(f"the checkpoint's weights are cast from {saved} to {dtype}")
