"""Pickles, honest and hostile, written here byte by byte, or by the standard library's pickler."""

import collections
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest

from glm.weights.formats import read_arrays, read_file
from glm.weights.pickles import DTYPES, PickleReader

SECONDS, MEGABYTES = 30, 64  # on a machine that is busy; what is bounded here was without end


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    if abs(value) < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x10" + value.to_bytes(16, "little")


def named(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def dtype(name, order="<", *parts):
    state = b"(K\x03" + text(order) + b"".join(parts or [b"N"] * 3) + number(-1) * 2 + b"K\x00tb"
    return call(named("numpy", "dtype"), text(name), b"\x89", b"\x88") + state


def shape(*sizes):
    return b"(" + b"".join(size if isinstance(size, bytes) else number(size) for size in sizes) + b"t"


NDARRAY, DTYPE, ENCODE = named("numpy", "ndarray"), named("numpy", "dtype"), named("_codecs", "encode")
MADE = call(named("numpy.core.multiarray", "_reconstruct"), NDARRAY, b"K\0\x85", b"C\1b")
BUFFER = named("numpy._core.numeric", "_frombuffer")
SCALAR = named("numpy.core.multiarray", "scalar")
EIGHT = b"C\x08" + bytes(8)


def array(sizes=None, kind=None, fortran=b"\x89", data=EIGHT):
    sizes, kind = shape(2) if sizes is None else sizes, dtype("f4") if kind is None else kind
    return MADE + b"(K\x01" + sizes + kind + fortran + data + b"tb"


def weight(value):
    return b"\x80\x03}" + text("w") + value + b"s."


def holding_twice(levels, container):
    """A dict or a tuple that holds the next twice, so many deep: 2 ** levels values."""
    twice = {"dict": b"}X\1\0\0\0ah%csX\1\0\0\0bh%csq%c", "tuple": b"h%ch%c\x86q%c"}[container]
    return b"}q\0" + b"".join(twice % (level, level, level + 1) for level in range(levels))


OF_BYTES = (b"\x96", b"\x8e", b"\x8d")  # eight bytes of length, then the data
HOSTILE = {
    # what would run, import, or make objects of bytes
    **{
        f"{module}.{name}": (
            b"\x80\x02" + call(named(module, name), text("x")) + b".",
            f"it holds {module}.{name}",
        )
        for module, name in [
            *[("posix", "system"), ("builtins", "getattr"), ("builtins", "eval"), ("numpy", "load")],
            *[
                ("numpy", "memmap"),
                ("numpy", "os.system"),
                ("numpy.f2py.__main__", "ndarray"),
                ("torch", "load"),
            ],
            *[
                ("numpy.core.multiarray", "fromfile"),
                ("numpy_evil", "ndarray"),
                ("copyreg", "_reconstructor"),
            ],
            *[
                ("_codecs", "decode"),
                ("collections", "OrderedDict.__init__"),
                ("builtins", "tuple.__class__"),
            ],
        ]
    },
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it holds os.system"),
    "its name in the memo": (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\0h\1\x93.", "it holds os.system"),
    "no text": (b"\x80\x04]\x8c\x06system\x93.", "no text"),
    "escapes in a name": (b"\x80\x02cos\nsys\x1b[31mtem\n.", r"it holds os.sys\\x1b\[31mtem"),
    "long name": (b"\x80\x02cos\n" + b"n" * 10**6 + b"\n.", "it is truncated"),
    **{
        f"operation {code[:1]!r}": (b"\x80\x02" + code, "has an operation")
        for code in [
            *[b"\x82\1.", b"\x83\1\0.", b"\x84\1\0\0\0.", b"P0\n.", b"(ios\nsystem\n.", b"Vabc", b"S'a'\n."],
            *[
                b"I1\n.",
                b"F1\n.",
                b"L1L\n.",
                b"g0\n.",
                b"p0\n.",
                b"\x8b\xff\xff\xff\x7f",
                b"\x8f.",
                b"2.",
                b"0.",
                b"1.",
            ],
        ]
    },
    "new object": (b"\x80\x02" + DTYPE + b"(" + text("f4") + b"t\x81.", "an operation"),
    "new object with names": (b"\x80\x04" + DTYPE + b")}\x92.", "an operation"),
    "object": (b"\x80\x02(" + DTYPE + text("f4") + b"o.", "an operation"),
    "call of an array": (weight(call(array(), b"K\1")), "damaged"),
    "call of a dtype": (weight(call(dtype("f4"), b"K\1")), "damaged"),
    "call of the class": (weight(call(NDARRAY, shape(1), text("O"), EIGHT)), "damaged"),
    "call without a tuple": (weight(DTYPE + b"]R"), "damaged"),
    "state of a function": (weight(DTYPE + b"}" + text("__code__") + b"Nsb"), "that has none"),
    "attributes of an array": (weight(MADE + b"N}" + text("__class__") + b"Ns\x86b"), "too short"),
    "state of a class": (weight(named("torch", "FloatStorage") + b"}b"), "damaged"),
    "class as a value": (weight(NDARRAY), "no array, no number and no text"),
    "dtype as a value": (weight(dtype("f4")), "no array, no number and no text"),
    # types
    **{
        f"dtype {name}": (weight(array(kind=dtype(name))), "no weight is")
        for name in [
            "O",
            "O8",
            "V8",
            "S0",
            "U9",
            "M8[s]",
            "c16",
            ">f4",
            "<f4",
            "f4,f4",
            "(2,3)f4",
            "2f4",
            "object",
            "",
        ]
    },
    "dtype as bytes": (weight(array(kind=call(DTYPE, EIGHT))), "no weight is"),
    "big-endian": (weight(array(kind=dtype("f4", ">"))), "no weight is"),
    "structured dtype": (
        weight(array(kind=dtype("f4", "<", b"N", text("a") + b"\x85", b"}"))),
        "no weight is",
    ),
    "subarray dtype": (
        weight(array(kind=dtype("f4", "<", text("f4") + b"\x85", b"N", b"N"))),
        "no weight is",
    ),
    "short state of a dtype": (weight(call(DTYPE, text("f4")) + b")b"), "too short"),
    "scalar of objects": (weight(call(SCALAR, dtype("O"), EIGHT)), "no weight is"),
    "scalar of two": (weight(call(SCALAR, dtype("f4"), EIGHT)), "differs"),
    # shapes
    "negative": (weight(array(shape(-1))), "wrong shape"),
    "two negative": (weight(array(shape(-1, -2))), "wrong shape"),
    "product of 2 ** 64 + 2": (weight(array(shape(2, (1 << 63) + 1))), "wrong shape"),
    "product that overflows": (weight(array(shape(1 << 33, 1 << 33))), "differs"),
    "zero and huge": (weight(array(shape(0, 1 << 62, 1 << 62), data=b"C\0")), "damaged|too"),
    "float": (weight(array(shape(b"G" + struct.pack(">d", 2)))), "wrong shape"),
    "bool": (weight(array(shape(b"\x88", 2))), "wrong shape"),
    "text": (weight(array(text("ab"))), "wrong shape"),
    "nested": (weight(array(shape(shape(2)))), "wrong shape"),
    "none": (weight(array(b"N")), "wrong shape"),
    "100 axes": (weight(array(shape(*[1] * 99, 2))), "wrong shape"),
    "other size": (weight(array(shape(3))), "differs"),
    "text as data": (weight(array(data=text("abcdefgh"))), "no bytes"),
    "list as data": (weight(array(data=b"]")), "no bytes"),
    "array as data": (weight(array(data=array())), "no bytes"),
    "no contents": (weight(MADE), "no array"),
    "buffer that is short": (weight(call(BUFFER, EIGHT, dtype("f4"), shape(1 << 40), text("C"))), "differs"),
    # names
    "number as a name": (b"\x80\x02}K\1K\2s.", "of type int"),
    "tuple as a name": (b"\x80\x02})K\1s.", "of type tuple"),
    "bytes as a name": (b"\x80\x03}C\1aNs.", "of type memoryview"),
    "deep tuple as a name": (b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.", "of type tuple"),
    "escapes as a name": (b"\x80\x02}" + text("\x1b[2J\nglm: done") + b"Ns.", r"'\\x1b\[2J glm: done'"),
    "name of 1 MB": (b"\x80\x02}" + text("n" * 10**6) + b"Ns.", "which no weight has"),
    "name that is no UTF-8": (b"\x80\x02}X\1\0\0\0\xffNs.", "damaged"),
    # lengths and places
    **{
        f"{code!r} of {size}": (b"\x80\x05" + code + struct.pack("<Q", size) + b".", "it is truncated")
        for code in (*OF_BYTES, b"\x95")
        for size in (100, 12 << 30, (1 << 64) - 1)
    },
    "bytes of 4 GB": (b"\x80\x03B\xff\xff\xff\xff.", "it is truncated"),
    "frame of 2 ** 62": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.", "it is truncated"),
    "place in the memo": (b"\x80\x02}r\xff\xff\xff\xff.", "the memo"),
    "place without a value": (b"\x80\x02j\xff\xff\xff\xff.", "damaged"),
    "nothing to take": (b"\x80\x02.", "damaged"),
    "no mark": (b"\x80\x02e.", "damaged"),
    "no end": (b"\x80\x02}", "it is truncated"),
    "another protocol": (b"\x80\x06}.", "protocol"),
    "no dict": (b"\x80\x02].", "no weights by name"),
    "items of a list": (b"\x80\x02]" + text("a") + b"Ns.", "no dict"),
    "appended to a dict": (b"\x80\x02}Na.", "no list"),
    # small files that would grow
    "list in itself": (weight(b"]q\0h\0a"), "too deeply"),
    "dict in itself": (b"\x80\x02}q\0" + text("a") + b"h\0s.", "too deeply"),
    "lists 100,000 deep": (weight(b"]" * 100_000 + b"a" * 99_999), "too deeply"),
    "tuples 100,000 deep": (weight(b")" + b"\x85" * 100_000), "too deeply"),
    "dict twice": (b"\x80\x02" + holding_twice(30, "dict") + b".", "too deeply"),
    "tuple twice": (b"\x80\x02" + holding_twice(30, "tuple") + b".", "too deeply"),
    "wide, not deep": (
        b"\x80\x02]q\0(" + b"N" * 2000 + b"e]q\1(" + b"h\0" * 2000 + b"e](" + b"h\1" * 2000 + b"e.",
        "too deeply",
    ),
    "three million values": (weight(b"](" + b"N" * 3_000_000 + b"e"), "operations"),
    "number of 2,000 bits": (weight(b"\x8a\xff" + b"\x7f" * 255), "no number"),
    "text encoded again and again": (
        b"\x80\x02" + text("A" * 10**6) + b"q\0" + (ENCODE + b"(h\0" + text("latin1") + b"tR") * 900,
        "larger than the file",
    ),
    "text that doubles": (
        b"\x80\x03" + text("AAAA") + b"q\0" + (ENCODE + b"(h\0" + text("hex") + b"tRq\0") * 40,
        "it encodes",
    ),
    # A tuple in the memo that each use would copy: operations without end, though they are few.
    **{
        f"long tuple as {use}": (
            b"\x80\x02(" + start + b"N" * 9000 + b"tq\0" + again * 3 + b".",
            "a tuple in it has 900\\d values",
        )
        for use, start, again in [
            ("the state of a dtype", b"K\3" + text("<") + b"N", dtype("f4") + b"h\0b"),
            ("the state of an array", b"K\3NN", MADE + b"h\0b"),
            ("arguments", b"", named("numpy.core.multiarray", "_reconstruct") + b"h\0R"),
            ("a call's values", b"", named("builtins", "tuple") + b"h\0R"),
            ("a storage", text("storage") + named("torch", "FloatStorage") + text("0"), b"h\0Q"),
        ]
    },
    "one array a thousand times": (
        b"\x80\x03}("
        + text("w")
        + array(shape(25000), data=b"B" + struct.pack("<I", 10**5) + bytes(10**5))
        + b"q\0"
        + b"".join(text(f"w{index}") + b"h\0" for index in range(1000))
        + b"u.",
        "larger than the file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path, case):
    """One ValueError of one printable line, in time, in memory, and without an import."""
    data, message = HOSTILE[case]
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(data)
    modules, start = set(sys.modules), time.monotonic()
    if message not in ("too deeply", "operations", "of type tuple"):  # many values, and tracing is slow
        tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            read_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith("model_state.pdparams: ") and line.isprintable() and len(line) < 400
    assert set(sys.modules) == modules
    assert time.monotonic() - start < SECONDS and peak < MEGABYTES << 20


ARRAYS = {
    "f4": np.arange(6, dtype="float32").reshape(2, 3),
    "f2": np.arange(6, dtype="float16").reshape(3, 2),
    "u2": np.arange(4, dtype="uint16"),
    "f8": np.array(2.5),
    "i8": np.array([[-1, 1 << 40]]),
    "i4": np.zeros((0, 3), "int32"),
    "b1": np.array([True, False]),
    "fortran": np.arange(6, dtype="float32").reshape(2, 3).T,
    "large": np.arange(100_000, dtype="float32"),  # in no frame
}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_numpy_pickles_is_read(tmp_path, protocol, optimized):
    """Arrays of every type, and what an optimizer's state has beside them."""
    arrays = {name: value for name, value in ARRAYS.items() if protocol > 2 or value.size}
    state = {
        "LR_Scheduler": {"last_epoch": 3, "last_lr": 1e-5},
        "master_weights": {"w": ("name", ARRAYS["f4"])},
    }
    others = {"scalar": np.float32(2.5), "list": [1, -2.5, None, True, "字", 1 << 40], "pair": (0.9, 0.95)}
    data = pickle.dumps(collections.OrderedDict({**arrays, **state, **others}), protocol)
    path = tmp_path / "optimizer.pdopt"
    path.write_bytes(pickletools.optimize(data) if optimized else data)
    found = read_arrays(path)
    assert {name: found.pop(name) for name in others} == others
    assert found.pop("LR_Scheduler") == state["LR_Scheduler"]
    check_equal(found.pop("master_weights"), {"w": ARRAYS["f4"]})
    check_equal(found, arrays)


def test_an_array_stays_in_the_file(tmp_path):
    """One of 5 GB, of which the file system holds the ends."""
    count, path = 5 << 28, tmp_path / "model_state.pdparams"
    start, _, end = weight(array(shape(count), data=b"#")).partition(b"#")
    with open(path, "wb") as file:
        file.write(start.replace(b"\x80\x03", b"\x80\x04") + b"\x8e" + struct.pack("<Q", 4 * count))
        file.seek(4 * count - 4, 1)
        file.write(struct.pack("<f", 2.5) + end)
    tracemalloc.start()
    try:
        found = read_file(path)["w"]
        assert found.shape == (count,) and found[0] == 0 and found[-1] == 2.5
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_pickles_of_one_file_share_their_operations():
    """A file of PyTorch before 1.6 has five."""
    data = (b"N" * 300_000 + b".") * 2
    reader = PickleReader(memoryview(data), len(data))
    assert reader.load() is None
    with pytest.raises(ValueError, match="more than 524288 operations"):
        reader.load()


def test_every_type_of_the_table_is_numbers():
    assert all(kind.kind in "fiub" and kind.isnative for kind in DTYPES.values())
