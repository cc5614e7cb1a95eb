"""Pickles of arrays, read without running them.

A pickle is a program, and the standard library's reader calls whatever it names. This reader knows the
operations that Paddle, numpy and PyTorch write, in protocols 2 to 5. It imports nothing: a name is looked
up in a fixed table of functions of this room. It makes numbers, strings, lists, tuples, dicts, and arrays
that stay in the file.

A small file can't take much memory or time: lengths are checked against the file's size before a byte is
allocated, and operations, levels and the bytes of all arrays together are bounded.
"""

import math
import pickle
import struct
from typing import Any, NamedTuple

import numpy as np

from glm.errors import printable

MOST_OPERATIONS = 1 << 19  # an array takes about forty
MOST_LEVELS = 8  # of dicts in dicts; an optimizer's state has three
MOST_ARGUMENTS = 64  # of a call, or parts of a state: each use copies them
MOST_SHARED = 4  # times the file's size: arrays may share their bytes, as tied weights do

# numpy has no bfloat16: its bits are uint16.
DTYPES = {name: np.dtype(name) for name in "f2 f4 f8 u1 u2 u4 u8 i1 i2 i4 i8 b1".split()}
STORAGES = {"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "u2"}

OPERATIONS = [bytes([number]) for number in range(256)]
CONSTANTS = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_TUPLE: tuple,
}
INTEGERS = {pickle.BININT: (4, True), pickle.BININT1: (1, False), pickle.BININT2: (2, False)}
# What follows stands after its length, of so many bytes.
TEXTS = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}
BYTES = {pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8, pickle.BYTEARRAY8: 8}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
PUTS = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
GETS = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}


class Storage(NamedTuple):
    """The values of one or several of PyTorch's tensors."""

    dtype: np.dtype
    key: str


class Tensor(NamedTuple):
    """A tensor as PyTorch pickles it: a view of a storage."""

    storage: Storage
    offset: int  # in values, as the strides
    shape: tuple
    strides: tuple

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


class _Array:
    """Stands for a numpy array, whose values come after it has been named."""

    def __init__(self, values=None):
        self.values = values


def check_name(name: Any) -> str:
    """Return ``name`` if it can be a weight's, else raise ValueError: it is printed, and is a dict's key."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 500:
        shown = f"'{printable(name, 80)}'" if isinstance(name, str) else f"of type {type(name).__name__}"
        raise ValueError(f"a name in it is {shown}, which no weight has")
    return name


def count_values(shape: Any) -> int:
    """Return how many values an array of ``shape`` has. Raises ValueError where it is no shape."""
    if not isinstance(shape, (tuple, list)) or len(shape) > 32 or not all(map(is_size, shape)):
        raise ValueError("an array in it has a wrong shape")
    return math.prod(shape)


def is_size(number: Any) -> bool:
    """Return whether ``number`` can be a length, an offset or a stride."""
    return type(number) is int and 0 <= number < 1 << 63  # a bool is none


def make_array(shape: Any, dtype: np.dtype, data: Any, order: str = "C") -> np.ndarray:
    """Return the array of ``shape`` whose values are all of ``data``, which is not copied.

    Raises:
        ValueError: where they are fewer or more, or ``data`` is no bytes.
    """
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, memoryview)):
        raise ValueError("an array in it has no bytes, or no type")
    if count_values(shape) * dtype.itemsize != len(data):
        raise ValueError("the shape of an array in it differs from the number of its values")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


# What a pickle may call. A wrong number of arguments is a TypeError, which the reader turns.


def _array_of_buffer(data, dtype, shape, order):
    return _Array(make_array(shape, dtype, data, "F" if order == "F" else "C"))


def _scalar(dtype, data):
    return make_array((), dtype, data).item()


def _dtype(name, *_):
    if not isinstance(name, str) or name not in DTYPES:
        shown = printable(name, 40) if isinstance(name, str) else "no text"
        raise ValueError(f"an array in it is of type {shown}, which no weight is")
    return DTYPES[name]


def _tuple(values):
    if type(values) is not tuple:
        raise ValueError("it is damaged: it has no tuple where one is needed")
    if len(values) > MOST_ARGUMENTS:
        raise ValueError(f"a tuple in it has {len(values)} values, which no array's description has")
    return values


def _tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, Storage) or not is_size(offset):
        raise ValueError("a tensor in it has no storage")
    count_values(shape)
    if not isinstance(strides, tuple) or len(strides) != len(shape) or not all(map(is_size, strides)):
        raise ValueError("a tensor in it has wrong strides")
    return Tensor(storage, offset, shape, strides)


CORES = ("core", "_core")  # before and since numpy 2
NDARRAY = object()  # the class, which is an argument alone
KNOWN = {
    ("builtins", "tuple"): _tuple,
    ("__builtin__", "tuple"): _tuple,  # its name in protocol 2
    ("collections", "OrderedDict"): lambda: {},
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): DTYPES[dtype] for name, dtype in STORAGES.items()},
    # numpy's own arguments say nothing.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in CORES},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in CORES},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of_buffer for core in CORES},
}


class PickleReader:
    """Reads pickles of arrays, one after the other, from the bytes of a file.

    Args:
        data: of the pickles. file_size (int): of the file that has them and the arrays.

    Attributes:
        position (int): where the next pickle begins. dtypes (dict): of PyTorch's storages, by key.
    """

    def __init__(self, data: memoryview, file_size: int):
        self.data, self.position, self.dtypes = data, 0, {}
        self.most_bytes = MOST_SHARED * file_size
        self.encoded = self.visits = self.nbytes = 0
        self.operations = iter(range(MOST_OPERATIONS))  # of all pickles together

    def load(self) -> Any:
        """Return the value of the pickle at ``position``: dicts, lists, numbers, text, arrays, Tensors.

        Raises:
            ValueError: where it is truncated, or holds anything else.
        """
        try:
            return self._plain(self._run())
        except (IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
            raise ValueError("it is damaged, or holds something else than arrays") from error

    def _take(self, size):
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError("it is truncated")
        return self.data[start : self.position]

    def _integer(self, size, signed=False):
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self):
        """The text up to a line break, as a module and the name in it are written."""
        line, end, _ = bytes(self.data[self.position : self.position + 256]).partition(b"\n")
        if not end:
            raise ValueError("it is truncated")
        return str(self._take(len(line) + 1)[:-1], "utf-8")

    def _run(self):
        """Carry out the pickle's operations. Returns what is left at its end, unchecked."""
        stack, marks, memo = [], [], {}

        def pop_items():
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for _ in self.operations:
            operation = OPERATIONS[self._take(1)[0]]
            if operation in CONSTANTS:
                stack.append(CONSTANTS[operation]())
            elif operation in INTEGERS:
                stack.append(self._integer(*INTEGERS[operation]))
            elif operation in TEXTS:
                stack.append(str(self._take(self._integer(TEXTS[operation])), "utf-8"))
            elif operation in BYTES:
                stack.append(self._take(self._integer(BYTES[operation])))
            elif operation in GETS:
                stack.append(memo[self._integer(GETS[operation])])
            elif operation in PUTS:
                place = self._integer(PUTS[operation])
                if place > len(self.data):
                    raise ValueError("a place in the memo is larger than the file")
                memo[place] = stack[-1]
            elif operation == pickle.MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif operation == pickle.MARK:
                marks.append(len(stack))
            elif operation in TUPLES:
                stack[-TUPLES[operation] :] = [tuple(stack[-TUPLES[operation] :])]
            elif operation == pickle.TUPLE:
                stack.append(tuple(pop_items()))
            elif operation in (pickle.APPEND, pickle.APPENDS):
                items = [stack.pop()] if operation == pickle.APPEND else pop_items()
                if type(stack[-1]) is not list:
                    raise ValueError("it appends to a value that is no list")
                stack[-1].extend(items)
            elif operation in (pickle.SETITEM, pickle.SETITEMS):
                items = pop_items() if operation == pickle.SETITEMS else [stack.pop(), stack.pop()][::-1]
                if type(stack[-1]) is not dict:
                    raise ValueError("it sets an item of a value that is no dict")
                stack[-1].update((check_name(name), value) for name, value in zip(items[::2], items[1::2]))
            elif operation == pickle.BINFLOAT:
                stack.append(struct.unpack(">d", self._take(8))[0])
            elif operation == pickle.LONG1:
                stack.append(self._integer(self._integer(1), signed=True))
            elif operation == pickle.GLOBAL:
                stack.append(self._find(self._line(), self._line()))
            elif operation == pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(self._find(module, name))
            elif operation == pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                stack.append(function(*_tuple(arguments)))  # no value is callable but those of KNOWN
            elif operation == pickle.BUILD:
                state = stack.pop()
                _set_state(stack[-1], state)
            elif operation == pickle.BINPERSID:
                stack.append(self._storage(stack.pop()))
            elif operation == pickle.PROTO:
                if not 2 <= self._integer(1) <= 5:
                    raise ValueError("it is of a protocol that no file of weights has")
            elif operation == pickle.FRAME:
                if self._integer(8) > len(self.data) - self.position:
                    raise ValueError("it is truncated")
            elif operation == pickle.STOP:
                return stack.pop()
            else:
                raise ValueError(f"it has an operation, {operation!r}, that no file of weights has")
        raise ValueError(f"it has more than {MOST_OPERATIONS} operations, which no file of weights has")

    def _find(self, module, name):
        """What a name in the file stands for."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name in it is no text")
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in KNOWN:
            raise ValueError(f"it holds {printable(f'{module}.{name}', 80)}, which is no array")
        return KNOWN[module, name]

    def _encode(self, text, encoding):
        """The bytes of an array, which protocol 2 writes as text."""
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("it encodes a value that is no array")
        self.encoded += len(text)  # a text can be referred to again and again
        if self.encoded > len(self.data):
            raise ValueError("its arrays are larger than the file")
        return text.encode("latin1")

    def _storage(self, identity):
        kind, dtype, key, *_ = _items(identity, 5)
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("a storage in it is of a type that no weight is")
        if self.dtypes.setdefault(check_name(key), dtype) != dtype:
            raise ValueError("a storage in it is of two types")
        return Storage(dtype, key)

    def _plain(self, value, level=0):
        """Return ``value`` with the arrays themselves in it. Raises ValueError for what is no value."""
        self.visits += 1  # a dict can hold another twice, which holds another twice, ...
        if level > MOST_LEVELS or self.visits > MOST_OPERATIONS:
            raise ValueError("it is nested too deeply")
        if type(value) is dict:
            return {name: self._plain(part, level + 1) for name, part in value.items()}
        if type(value) is tuple and len(value) == 2 and isinstance(value[1], _Array):
            value = value[1]  # Paddle's name of a tensor and its values
        if type(value) in (list, tuple):
            return type(value)(self._plain(part, level + 1) for part in value)
        if isinstance(value, _Array):
            value = value.values
        if isinstance(value, (np.ndarray, Tensor)):
            self.nbytes += value.nbytes
            if self.nbytes > self.most_bytes:
                raise ValueError("its arrays are larger than the file")
            return value
        # The magic number of PyTorch, which stands alone, has 77 bits.
        number = type(value) is int and (level == 0 or abs(value) < 1 << 63)
        if number or value is None or type(value) in (bool, float, str):
            return value
        raise ValueError("it holds a value that is no array, no number and no text")


def _items(values, least):
    """Return a tuple that has as many values as ``least``, or more."""
    if len(_tuple(values)) < least:
        raise ValueError("it is damaged: a tuple in it is too short")
    return values


def _set_state(target, state):
    """Give what a pickle has made its contents."""
    if isinstance(target, _Array):
        _, shape, dtype, fortran, data, *_ = _items(state, 5)
        target.values = make_array(shape, dtype, data, "F" if fortran is True else "C")
    elif isinstance(target, np.dtype):
        _, byte_order, *parts = _items(state, 5)
        if byte_order not in ("<", "|") or any(part is not None for part in parts[:3]):
            raise ValueError("an array in it is of a type that no weight is")
    elif type(target) is not dict:  # PyTorch's OrderedDict has its _metadata there
        raise ValueError("it sets the state of a value that has none")
