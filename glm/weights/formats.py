"""Files of weights: Paddle's, safetensors and PyTorch's.

Arrays are mapped: they stay in the file until they are used. A folder may hold several forms. The first of
FORMS that is there is read, so that Paddle's own files, which training writes, come before those that were
downloaded, and a complete file before its shards.

All readers return numpy arrays by name, in Paddle's layout: PyTorch keeps a linear's weight as [outputs,
inputs], Paddle as [inputs, outputs]. numpy has no bfloat16, whose bits are uint16. A file may come from a
stranger: reading one runs nothing of it, and takes no more memory than its size allows. Every reader raises
a ValueError that names the file, for whatever is wrong with it.
"""

import contextlib
import json
import math
import mmap
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Union

import numpy as np

from glm.errors import printable
from glm.files import check_plain_name, open_regular, parse_json, read_json
from glm.weights.pickles import PickleReader, Tensor, check_name, is_size, make_array

FORMS = (
    "model_state.pdparams",
    "model_state.pdparams.index.json",
    "model_state.tp[0-9][0-9].pdparams",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LINEAR = re.compile(r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
NO_TORCH = "it is truncated, or no file that torch.save writes"
LARGEST_HEADER = 1 << 24  # bytes: a weight takes about a hundred

Arrays = dict[str, np.ndarray]


def find_forms(folder: Union[str, Path]) -> list[list[Path]]:
    """Return the files of each form of weights that a folder holds. The first form is the one to read."""
    found = [sorted(Path(folder).glob(form)) for form in FORMS]
    return [paths for paths in found if paths]


def check_pointer(path: Union[str, Path]) -> None:
    """Check that a file is not empty, and not the pointer that Git LFS leaves in its place.

    Raises:
        ValueError: where it is, or is no regular file.
    """
    with open_regular(path) as file:
        start = file.read(24)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the file: fetch it by `git lfs pull`")


def map_file(path: Union[str, Path]) -> memoryview:
    """Return the bytes of a file without reading it. Raises ValueError as check_pointer does."""
    check_pointer(path)
    with open_regular(path) as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def release_pages(array: np.ndarray) -> None:
    """Take the pages of the file that ``array`` is mapped to out of this process's memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    file = array.obj if isinstance(array, memoryview) else array
    if isinstance(file, mmap.mmap):
        file.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _naming(path: Union[str, Path]) -> Iterator[None]:
    """Turn every error of a reader into a ValueError of one line that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            text = error.strerror
        elif isinstance(error, ValueError):  # of this room, json and numpy
            text = str(error)
        else:  # of zipfile and numpy
            text = f"it is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{Path(path).name}: {printable(text, 300)}") from error


def read_file(path: Union[str, Path]) -> Arrays:
    """Return the arrays of one file of weights, or of all shards that an index names.

    Raises:
        ValueError: where a file is missing, truncated or of another kind.
    """
    with _naming(path):
        if Path(path).suffix == ".json":
            return _read_shards(Path(path))
        return _read_one(Path(path))


def _read_one(path):
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix != ".pdparams":
        return _read_torch(path)
    arrays = _read_pickle(path)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"its {name} is no array")
    return arrays


def _read_shards(index):
    """The arrays of the files that the index names, which lie beside it: each from the file it says."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError("it has no weight_map")
    for name, file in names.items():
        check_name(name)
        if check_plain_name(file).endswith(".json"):
            raise ValueError(f"its {name} is in {printable(file, 80)}, which is an index itself")
    arrays = {}
    for file in sorted(set(names.values())):
        with _naming(file):
            found = _read_one(index.with_name(file))
        # Another shard may hold an old copy.
        arrays.update({name: array for name, array in found.items() if names.get(name, file) == file})
    missing = sorted(names.keys() - arrays.keys())
    if missing:
        raise ValueError(f"{missing[0]} is not in {names[missing[0]]}")
    return arrays


def transpose_linears(arrays: Arrays) -> Arrays:
    """Return PyTorch's arrays with the linears' weights transposed, as views."""
    return {name: array.T if LINEAR.fullmatch(name) else array for name, array in arrays.items()}


# Paddle


def read_arrays(path: Union[str, Path]) -> dict[str, Any]:
    """Return the dict that paddle.save wrote to ``path``, with arrays in place of tensors.

    It may hold numbers, texts, lists and further dicts, as an optimizer's state does. paddle.load reads all
    of a file, where one of eight tensor-parallel processes needs an eighth, and runs what it holds.

    Raises:
        ValueError: where it can't be read, or holds anything else.
    """
    with _naming(path):
        return _read_pickle(path)


def _read_pickle(path):
    data = map_file(path)
    arrays = PickleReader(data, len(data)).load()
    if not isinstance(arrays, dict):
        raise ValueError("it holds no weights by name")
    arrays.pop("StructuredToParameterName@@", None)  # Paddle's table of its own names
    return arrays


def read_state(path: Union[str, Path], like: dict[str, Any]) -> dict[str, Any]:
    """Return the small state that paddle.save wrote to ``path``: a schedule's, a loss scaler's.

    Args:
        path: the file.
        like: this run's own state. What is read has its names, and values of its types and shapes.

    Returns:
        The state: what changes in training is the file's, and its settings are this run's.

    Raises:
        ValueError: where it can't be read, or a value is missing, of another type, or out of its range.

    Example: with ``like`` {"last_epoch": 0, "last_lr": 1e-5}, a file of {"last_epoch": "7", ...} raises
        "scheduler.pdparams: its last_epoch is of type str: it must be of type int".
    """
    state = read_arrays(path)
    with _naming(path):
        # A scale of 0, or a count that is past its end, would skip each update for ever.
        counts = {"incr_count": "incr_every_n_steps", "decr_count": "decr_every_n_nan_or_inf"}
        changing = [name for name in ("last_epoch", "last_lr", "scale", *counts) if name in like]
        for name in changing:
            own = like[name]
            if name not in state:
                raise ValueError(f"it has no {name}")
            value, kinds = state[name], (int, float) if type(own) is float else type(own)
            if not isinstance(value, kinds) or isinstance(value, bool):
                expected = f"it must be of type {type(own).__name__}"
                raise ValueError(f"its {name} is of type {type(value).__name__}: {expected}")
            if isinstance(value, np.ndarray) and (value.shape, value.dtype) != (own.shape, own.dtype):
                raise ValueError(f"its {name} is of another shape or type than this run's")
            least = 1e-30 if name == "scale" else 0
            most = like[counts[name]] - 1 if name in counts else np.finfo("float32").max
            if not (np.all(value >= least) and np.all(value <= most)):
                raise ValueError(f"its {name} is out of its range")
    return {**like, **{name: state[name] for name in changing}}


# safetensors


def _read_safetensors(path):
    """The arrays of a safetensors file, whose format is "pt" (PyTorch's layout), "np" or "pd"."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("it is truncated, or no safetensors")
    if start > LARGEST_HEADER:
        raise ValueError(f"its header is larger than {LARGEST_HEADER >> 20} MiB")
    try:
        header = parse_json(data[8:start].tobytes(), object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"its header can't be read ({error})") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header is no table of weights")
    arrays, ranges = {}, []
    for name, entry in header.items():
        check_name(name)
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"its {name} is of type {printable(str(dtype), 40)}, which no weight is")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
            raise ValueError(f"its {name} has wrong offsets")
        first, last = offsets
        if first > last:
            raise ValueError(f"its {name} has wrong offsets")
        if start + last > len(data):
            raise ValueError(f"it is truncated: {name} ends after the file")
        ranges.append((first, last))
        values = data[start + first : start + last]
        arrays[name] = make_array(shape, np.dtype(SAFETENSORS_DTYPES[dtype]), values)
    ranges.sort()
    if any(last > first for (_, last), (first, _) in zip(ranges, ranges[1:])):
        raise ValueError("its weights overlap")
    return transpose_linears(arrays) if metadata.get("format") == "pt" else arrays


def _unique(pairs):
    """The dict of a JSON object's pairs, of which no two have one name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("its header has a name twice")
    return values


def write_safetensors(path: Path, shapes: dict[str, tuple], arrays: Iterable[np.ndarray]) -> None:
    """Write a safetensors file of format "pt".

    Args:
        path: the file, which is written over.
        shapes: (dtype, shape) of the weights by name.
        arrays: the weights, contiguous, in this order.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": names[str(dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.data)


# PyTorch


def _read_torch(path):
    """The arrays that torch.save wrote to ``path``, without PyTorch."""
    data = map_file(path)
    if data[:4] == b"PK\3\4":
        tensors, storages = _read_torch_zip(path, data)
    elif data[:1] == b"\x80":
        tensors, storages = _read_torch_stream(data)
    else:
        raise ValueError(NO_TORCH)
    if not isinstance(tensors, dict):
        raise ValueError("it holds no weights by name")
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"its {name} is no tensor")
        (dtype, key), offset, shape, strides = tensor
        if key not in storages:
            raise ValueError(f"the values of its {name} are missing")
        values, size = storages[key], dtype.itemsize
        end = offset + sum((length - 1) * stride for length, stride in zip(shape, strides)) + 1
        # A stride of 0 makes many weights of one.
        if tensor.nbytes > len(values) or tensor.nbytes and end * size > len(values):
            raise ValueError(f"its {name} is larger than the storage of its values")
        strides = [size * stride for stride in strides]
        arrays[name] = np.ndarray(shape, dtype, values, size * offset if tensor.nbytes else 0, strides)
    return transpose_linears(arrays)


def _read_torch_zip(path, data):
    """The pickled object and the bytes of its storages by key: a zip of NAME/data.pkl and NAME/data/KEY."""
    with open_regular(path) as file:
        read = file.read

        def read_directory(size=-1):
            if size > LARGEST_HEADER:  # an entry takes ten times as much memory as in the file
                raise ValueError(f"its directory is larger than {LARGEST_HEADER >> 20} MiB")
            return read(size)

        file.read = read_directory
        try:
            entries = zipfile.ZipFile(file).infolist()
        except zipfile.BadZipFile as error:
            raise ValueError(f"it is truncated ({error})") from error
    parts = {}
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        if name != "data.pkl" and not name.startswith("data/"):
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"its {printable(entry.filename, 80)} is compressed")
        # A local header is 30 bytes, then a name and a field of the lengths that it says.
        header = data[max(entry.header_offset, 0) :]
        lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]
        local_name = bytes(header[30 : 30 + lengths[0]])
        start = entry.header_offset + 30 + sum(lengths)
        if header[:4] != b"PK\3\4" or not local_name.endswith(f"/{name}".encode()) or name in parts:
            raise ValueError("it is damaged: its directory says other places than its parts")
        if start + entry.file_size > len(data):
            raise ValueError("it is truncated")
        parts[name] = data[start : start + entry.file_size]
    if "data.pkl" not in parts:
        raise ValueError("it has no data.pkl, which torch.save writes")
    tensors = PickleReader(parts["data.pkl"], len(data)).load()
    return tensors, {name.partition("/")[2]: part for name, part in parts.items()}


def _read_torch_stream(data):
    """The same of a file of PyTorch before 1.6: five pickles, then each storage after its length."""
    reader, storages = PickleReader(data, len(data)), {}
    if any(type(reader.load()) is not int for _ in range(2)):  # a magic number and a version
        raise ValueError(NO_TORCH)
    _, tensors, keys = (reader.load() for _ in range(3))  # the first: the machine's sizes of numbers
    position = reader.position
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in reader.dtypes:
            raise ValueError("it holds a storage that no weight is in")
        start, position = position, position + 8
        position += int.from_bytes(data[start:position], "little") * reader.dtypes[key].itemsize
        if position > len(data):
            raise ValueError("it is truncated")
        storages[key] = data[start + 8 : position]
    return tensors, storages
