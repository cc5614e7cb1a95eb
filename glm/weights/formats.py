"""Files of weights: Paddle's, safetensors and PyTorch's.

Arrays are mapped: they stay in the file until they are used. A folder may hold several
forms. The first of FORMS that is there is read, so that Paddle's own files, which
training writes, come before those that were downloaded, and a whole file before its
shards.

All readers return numpy arrays by name, in Paddle's layout: PyTorch keeps a linear's
weight as [outputs, inputs], Paddle as [inputs, outputs]. numpy has no bfloat16, whose
bits are uint16.
"""

import json
import mmap
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMS = (
    "model_state.pdparams",
    "model_state.pdparams.index.json",
    "model_state.tp*.pdparams",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LINEAR = re.compile(r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.weight")
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
TORCH_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "uint16",
}


def find_forms(folder):
    """Return the files of each form of weights that a folder holds, list of list of Path.

    The first form is the one to read.
    """
    found = [sorted(Path(folder).glob(form)) for form in FORMS]
    return [paths for paths in found if paths]


def map_file(path):
    """Return the bytes of a file, memoryview, without reading it.

    Raises:
        ValueError: as check_pointer.
    """
    check_pointer(path)
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def check_pointer(path):
    """Raise ValueError where a file is empty, or the pointer that Git LFS leaves in its place."""
    with open(path, "rb") as file:
        start = file.read(24)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the file: fetch it by `git lfs pull`")


def release_pages(array):
    """Take the pages of the file that ``array`` is mapped to out of this process's memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    file = array.obj if isinstance(array, memoryview) else array
    if isinstance(file, mmap.mmap):
        file.madvise(mmap.MADV_DONTNEED)


def read_file(path):
    """Return the arrays of one file of weights, or of all shards that an index names.

    Raises:
        ValueError: where a file is missing, torn or of another kind.
    """
    path = Path(path)
    readers = {".json": read_shards, ".pdparams": read_arrays, ".safetensors": read_safetensors}
    try:
        return readers.get(path.suffix, read_torch)(path)
    except Exception as error:  # of pickle, zipfile, json and numpy
        text = "it is torn" if isinstance(error, EOFError) else error
        raise ValueError(f"{path.name}: {text}") from error


def read_shards(index):
    """Return the arrays of the files that the index names, which lie beside it."""
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    arrays = {}
    for file in sorted(set(names.values())):
        arrays.update(read_file(index.with_name(file)))
    missing = sorted(names.keys() - arrays.keys())
    if missing:
        raise ValueError(f"{missing[0]} is not in {names[missing[0]]}")
    return arrays


def turn_linears(arrays):
    """Return PyTorch's arrays with the linears' weights transposed, as views."""
    return {name: array.T if LINEAR.fullmatch(name) else array for name, array in arrays.items()}


# Paddle


class _PickledFile:
    """A file that pickle reads from without copying it."""

    def __init__(self, path):
        self.data, self.position = map_file(path), 0

    def read(self, size):
        start, self.position = self.position, self.position + size
        part = self.data[start : self.position]
        return part if size > 4096 else bytes(part)  # pickle wants bytes of all but arrays

    def readline(self):
        return self.read(self.data.obj.find(b"\n", self.position) + 1 - self.position)


class _MappedArray:
    """Stands for a numpy array that is unpickled. Its values stay in the file."""

    def __init__(self, *_):
        """Take the arguments of numpy's own constructor, which say nothing."""

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype)
        self.array = array.reshape(shape, order="F" if fortran else "C")


class _ArrayReader(pickle._Unpickler):  # the public one, in C, copies all it reads
    """Unpickles arrays and numbers, and refuses everything else, which could be code that runs."""

    def find_class(self, module, name):
        if module.startswith("numpy") and name == "_reconstruct":
            return _MappedArray
        known = {"builtins.tuple", "collections.OrderedDict", "_codecs.encode"}
        if f"{module}.{name}" not in known:
            if not module.startswith("numpy") or name not in ("ndarray", "dtype", "scalar"):
                raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def read_arrays(path):
    """Return the dict that paddle.save wrote to ``path``, with arrays in place of tensors.

    paddle.load reads all of a file, and one of eight tensor-parallel processes needs an
    eighth of it.
    """

    def unwrap(value):
        if isinstance(value, dict):
            return {name: unwrap(part) for name, part in value.items()}
        if isinstance(value, tuple) and len(value) == 2:  # Paddle's name of an array
            value = value[1]
        return value.array if isinstance(value, _MappedArray) else value

    arrays = unwrap(_ArrayReader(_PickledFile(path)).load())
    arrays.pop("StructuredToParameterName@@", None)  # Paddle's table of its own names
    return arrays


# safetensors


def read_safetensors(path):
    """Return the arrays of a safetensors file, whose format is "pt" (PyTorch's layout), "np" or "pd"."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("it is torn, or no safetensors")
    header = json.loads(data[8:start].tobytes())
    metadata, arrays = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"its {name} is of type {entry['dtype']}, which no weight is")
        first, last = entry["data_offsets"]
        if start + last > len(data):
            raise ValueError(f"it is torn: {name} ends after the file")
        values = data[start + first : start + last]
        array = np.frombuffer(values, SAFETENSORS_DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return turn_linears(arrays) if metadata.get("format") == "pt" else arrays


def write_safetensors(path, shapes, arrays):
    """Write a safetensors file of format "pt".

    Args:
        shapes (dict): (dtype, shape) of the weights by name. arrays: yields them,
        contiguous, in this order.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + np.dtype(dtype).itemsize * int(np.prod(shape))
        header[name] = {"dtype": names[str(dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.data)


# PyTorch


class _TorchTensor(NamedTuple):
    """A tensor as PyTorch pickles it."""

    storage: tuple  # dtype, key, number of values
    offset: int  # in values, as the strides
    shape: tuple
    strides: tuple


class _TorchReader(pickle.Unpickler):
    """Unpickles dicts of tensors and refuses everything else, which could be code that runs."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _TorchTensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor of weights")

    def persistent_load(self, storage):
        _, dtype, key, _, count = storage[:5]
        return dtype, key, count


def read_torch(path):
    """Return the arrays that torch.save wrote to ``path``, without PyTorch."""
    data = map_file(path)
    if zipfile.is_zipfile(path):
        tensors, storages = _read_torch_zip(path, data)
    elif data[:2].tobytes() == b"\x80\x02":
        tensors, storages = _read_torch_stream(path, data)
    else:
        raise ValueError("it is torn, or no file that torch.save writes")
    if not isinstance(tensors, dict):
        raise ValueError("it holds no weights by name")
    arrays = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, _TorchTensor):
            raise ValueError(f"its {name} is no tensor")
        (dtype, key, _), offset, shape, strides = tensor
        size = np.dtype(dtype).itemsize
        strides = [size * stride for stride in strides]
        # This constructor raises a ValueError where the array would reach out of its
        # bytes.
        arrays[name] = np.ndarray(shape, dtype, storages[key], size * offset, strides)
    return turn_linears(arrays)


def _read_torch_zip(path, data):
    """Return the pickled object and the bytes of its storages by key: a zip of data.pkl and data/KEY."""
    storages, tensors = {}, None
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("/data.pkl"):
                with archive.open(entry) as file:
                    tensors = _TorchReader(file).load()
            elif "/data/" in entry.filename:
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its {entry.filename} is compressed")
                # A local header is 30 bytes, then a name and a field of the lengths
                # that it says.
                lengths = np.frombuffer(data, "<u2", 2, entry.header_offset + 26)
                start = entry.header_offset + 30 + int(lengths.sum())
                storages[entry.filename.rpartition("/")[2]] = data[start : start + entry.file_size]
    return tensors, storages


def _read_torch_stream(path, data):
    """Return the same of a file of PyTorch before 1.6: five pickles, then each storage after its length."""
    storages = {}
    with open(path, "rb") as file:
        for _ in range(3):  # a magic number, a version, the machine's sizes of numbers
            _TorchReader(file).load()
        reader = _TorchReader(file)
        tensors = reader.load()
        sizes = {
            tensor.storage[1]: np.dtype(tensor.storage[0]).itemsize
            for tensor in tensors.values()
            if isinstance(tensor, _TorchTensor)
        }
        position = None
        for key in _TorchReader(file).load():
            position = (file.tell() if position is None else position) + 8
            count = int.from_bytes(data[position - 8 : position], "little")
            storages[key] = data[position : position + count * sizes[key]]
            position += count * sizes[key]
    return tensors, storages
