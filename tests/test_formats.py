"""Weights in files of every framework, which are written here byte by byte, and handed on to PyTorch."""

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from helpers import FAST, MINI, ROOT, TINY_GLM, pretrained_in, random_glm, read_jsonl, run, run_folder
from paddlenlp.transformers import AutoConfig, GLMConfig
from test_lora import lora_config, random_adapter
from test_pickles import call, named, number, shape, text
from test_weights import bfloat16_bits

from glm.errors import InputError
from glm.outputs.layout import EXPORTED
from glm.weights import adapters as lora
from glm.weights import formats
from glm.weights import loading as weights
from glm.weights import torch_folder as export

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage"}
TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def pickled(arrays):
    """The dict of tensors as torch.save pickles it, in protocol 2; the storages are called 0, 1, ..."""
    result = b"\x80\x02}("
    for key, (name, array) in enumerate(arrays.items()):
        storage = text("storage") + b"ctorch\n" + STORAGES[str(array.dtype)].encode() + b"\n"
        storage += text(str(key)) + text("cpu") + number(array.size)
        shape = b"(" + b"".join(map(number, array.shape)) + b"t"
        strides = [stride // array.itemsize for stride in array.strides]
        strides = b"(" + b"".join(map(number, strides)) + b"t"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + number(0)
        result += text(name) + tensor + shape + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    return result + b"u."


def write_torch_zip(path, arrays, pickle=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle or pickled(arrays))
        for key, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())


def write_torch_stream(path, arrays):
    """As PyTorch wrote before 1.6."""
    keys = b"\x80\x02](" + b"".join(text(str(key)) for key in range(len(arrays))) + b"e."
    with open(path, "wb") as file:
        file.write((b"\x80\x02" + number(1) + b".") * 2 + b"\x80\x02}." + pickled(arrays) + keys)
        for array in arrays.values():
            file.write(struct.pack("<q", array.size) + array.tobytes())


def write_safetensors(path, arrays, metadata):
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        dtype = TYPES[str(array.dtype)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(b"".join(array.tobytes() for array in arrays.values()))


def write_shards(write, folder, name, arrays):
    """Two files by the names that transformers and PaddleNLP give them, and their index."""
    stem, suffix = name.split(".")
    names, weight_map = sorted(arrays), {}
    for index in (0, 1):
        file = f"{stem}-0000{index + 1}-of-00002.{suffix}"
        part = {name: arrays[name] for name in names[index::2]}
        write(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_pt(path, arrays):
    write_safetensors(path, arrays, {"format": "pt"})


def write_np(path, arrays):
    write_safetensors(path, arrays, {"format": "np"})


def as_torch(arrays):
    """In PyTorch's layout, by the names of a GLMModel."""
    return {
        name.removeprefix("glm."): np.ascontiguousarray(array.T) if is_linear(name) else array
        for name, array in arrays.items()
    }


def is_linear(name):
    linears = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return name.endswith("weight") and name.split(".")[-2] in linears


WRITERS = {
    "bin": lambda d, a: write_torch_zip(d / "pytorch_model.bin", as_torch(a)),
    "old bin": lambda d, a: write_torch_stream(d / "pytorch_model.bin", as_torch(a)),
    "bin shards": lambda d, a: write_shards(write_torch_zip, d, "pytorch_model.bin", as_torch(a)),
    "pt": lambda d, a: write_pt(d / "model.safetensors", as_torch(a)),
    "pt shards": lambda d, a: write_shards(write_pt, d, "model.safetensors", as_torch(a)),
    "np": lambda d, a: write_np(d / "model.safetensors", a),
    "no format": lambda d, a: write_safetensors(d / "model.safetensors", a, None),
    "np shards": lambda d, a: write_shards(write_np, d, "model.safetensors", a),
    "pdparams": lambda d, a: paddle.save(a, str(d / "model_state.pdparams")),
    "pdparams shards": lambda d, a: write_shards(
        lambda path, part: paddle.save(part, str(path)), d, "model_state.pdparams", a
    ),
}
TINY = formats.read_file(TINY_GLM / "model_state.pdparams")
CAST = {
    "float32": lambda array: array,
    "float16": lambda array: array.astype("float16"),
    "bfloat16": bfloat16_bits,
}


def folder_of(path, form, arrays=TINY):
    """A folder with tiny-glm's config and tokenizer, and ``arrays`` in a form of WRITERS."""
    path.mkdir()
    for name in ("config.json", "tokenizer_config.json", "cog-pretrain.model"):
        shutil.copy(TINY_GLM / name, path)
    WRITERS[form](path, arrays)
    return path


@pytest.mark.parametrize("dtype", CAST)
@pytest.mark.parametrize("form", WRITERS)
def test_every_form_is_read_as_it_is(tmp_path, form, dtype):
    expected = {name: CAST[dtype](array) for name, array in TINY.items()}
    folder = folder_of(tmp_path / "model", form, expected)
    (found,) = pretrained_in(folder).arrays
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("form", ["bin", "pt shards", "pdparams"])
def test_a_model_of_every_form_holds_the_same(tmp_path, form):
    folder = folder_of(tmp_path / "model", form)
    model = weights.load_model(pretrained_in(folder))
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), TINY[name])


def test_predictions_of_a_published_folder(tmp_path):
    folder = folder_of(tmp_path / "model", "bin shards")
    flags = ["--task_name", MINI, "--do_predict", "--max_predict_samples", 2, *FAST]
    for index, model in enumerate((TINY_GLM, folder)):
        run("--model_name_or_path", model, *flags, "--output_dir", tmp_path / str(index))
    rows = [read_jsonl(tmp_path / f"{index}/test_predictions.jsonl") for index in (0, 1)]
    assert [row["token_ids"] for row in rows[0]] == [row["token_ids"] for row in rows[1]]


def test_the_first_form_wins(tmp_path):
    """Paddle's file before the others, a whole file before shards, whatever their age."""
    folder = folder_of(tmp_path / "model", "pdparams shards")
    other = {name: array + 1 for name, array in TINY.items()}
    for form in ("bin", "pt", "bin shards", "pt shards"):
        WRITERS[form](folder, other)
    names = [form[0].name for form in formats.find_forms(folder)]
    assert names == [
        "model_state.pdparams.index.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    WRITERS["pdparams"](folder, TINY)
    assert pretrained_in(folder).files == [folder / "model_state.pdparams"]


def first_name(arrays):
    return sorted(arrays)[0]


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


NORM = "glm.transformer.final_layernorm.bias"


def spoil(folder, kind):
    """Make of a folder with pytorch_model.bin one that can't be read. Returns what the message says."""
    path = folder / "pytorch_model.bin"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
        return "it is truncated"
    if kind == "empty":
        path.write_bytes(b"")
        return "pytorch_model.bin: it is empty"
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        return "is a Git LFS pointer"
    if kind == "none":
        path.unlink()
        return "it has no model_state.pdparams, model.safetensors or pytorch_model.bin"
    if kind == "code":
        code = b"cposix\nsystem\n(" + text(f"touch {folder / 'ran'}") + b"tR."
        write_torch_zip(path, {}, pickle=code)
        return "it holds posix.system, which is no array"
    if kind == "lacks":
        write_torch_zip(path, as_torch(without(TINY, NORM)))
        return f"they lack 1 of the model's weights, the first is {NORM}"
    if kind == "more":
        write_torch_zip(path, as_torch({**TINY, "glm.head.weight": TINY[NORM]}))
        return "they hold 1 that the model has not, the first is glm.head.weight"
    if kind == "shape":
        write_torch_zip(path, as_torch({**TINY, NORM: TINY[NORM][:5]}))
        return f"its {NORM} is [5], where this run has [128]"
    arrays = as_torch(TINY)
    pickle = pickled(arrays).replace(number(arrays[first_name(arrays)].size), number(2**30), 1)
    write_torch_zip(path, dict.fromkeys(arrays, np.zeros(1, "float32")), pickle=pickle)
    return "its arrays are larger than the file"


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "pointer", "none", "code", "lacks", "more", "shape", "outside"]
)
def test_what_is_no_model_is_refused_in_a_line(tmp_path, kind):
    folder = folder_of(tmp_path / "model", "bin")
    expected = spoil(folder, kind)
    with pytest.raises(InputError) as caught:
        weights.load_model(pretrained_in(folder))
    assert expected in str(caught.value) and f"--model_name_or_path {folder}" in str(caught.value)
    assert not (folder / "ran").exists()


def test_code_in_a_file_of_paddle_does_not_run(tmp_path):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(b"\x80\x02cposix\nsystem\n(" + text(f"touch {tmp_path / 'ran'}") + b"tR.")
    with pytest.raises(ValueError, match="holds posix.system, which is no array"):
        formats.read_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_protocol_of_paddle_is_read(tmp_path, protocol):
    paddle.save(TINY, str(tmp_path / "model_state.pdparams"), protocol=protocol)
    found = formats.read_file(tmp_path / "model_state.pdparams")
    assert all((found[name] == array).all() for name, array in TINY.items())


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = folder_of(tmp_path / "model", "pt shards")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors"):
        formats.read_file(folder / "model.safetensors.index.json")


class Process:
    """A GLM as one of several tensor-parallel processes sees its layout."""

    def __init__(self, model, degree, rank):
        self.config = copy.deepcopy(model.config)
        self.config.tensor_parallel_degree, self.config.tensor_parallel_rank = degree, rank
        self.state_dict = model.state_dict
        self.get_tensor_parallel_convert_actions = model.get_tensor_parallel_convert_actions


@pytest.mark.parametrize("degree", [2, 4])
def test_parts_are_those_of_paddlenlp(degree):
    """Of every weight, and from two processes to four and back."""
    model, rng = random_glm(), np.random.default_rng(0)
    processes = [Process(model, degree, rank) for rank in range(degree)]
    names = list(model.state_dict())
    for name, weight in model.state_dict().items():
        whole = rng.standard_normal(weight.shape).astype("float32")
        parts = [weights.convert_layout(process.config, 1)(name, [whole]) for process in processes]
        for process, part in zip(processes, parts):
            actions = process.get_tensor_parallel_convert_actions(process.config, names, True)
            expected = actions[name](whole) if name in actions else whole
            np.testing.assert_array_equal(part, expected)
        np.testing.assert_array_equal(weights.convert_layout(model.config, degree)(name, parts), whole)
        for rank in range(6 - degree):
            other = weights.convert_layout(Process(model, 6 - degree, rank).config, degree)(name, parts)
            expected = weights.convert_layout(Process(model, 6 - degree, rank).config, 1)(name, [whole])
            np.testing.assert_array_equal(other, expected)


MEASURE = """
import sys
sys.path.insert(0, ".")
import paddle
from glm.weights.loading import load_model
from glm.weights.pretrained import Pretrained, read_config
paddle.set_device("cpu")
paddle.normal = paddle.uniform = None
folder = sys.argv[1]
model = load_model(Pretrained(folder, folder, folder, read_config(folder, folder), None))
sizes = [weight.numel().item() * 4 for weight in model.parameters()]
peak = paddle.base.core.host_memory_stat_peak_value("Allocated", 0)
print(peak, sum(sizes), max(sizes))
"""


@pytest.mark.parametrize("form", ["bin", "np"])
def test_beside_the_model_there_is_one_weight_in_memory(tmp_path, form):
    """By Paddle's allocator, in a process of its own; and no weight is drawn at random."""
    model = random_glm(vocab_size=4000, hidden_size=128, num_layers=4)
    folder = tmp_path / "model"
    model.save_pretrained(str(folder))
    arrays = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for path in folder.glob("model*"):
        path.unlink()
    WRITERS[form](folder, arrays)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr[-2000:]
    peak, size, largest = map(int, result.stdout.split()[-3:])
    assert size <= peak <= size + largest


def read_export(folder):
    return formats.read_file(folder / "torch/model.safetensors")


@pytest.mark.parametrize("dtype", CAST)
@pytest.mark.parametrize("form", ["pdparams", "bin"])
def test_to_pytorch_and_back_is_bit_equal(tmp_path, form, dtype):
    expected = {name: CAST[dtype](array) for name, array in TINY.items()}
    folder = folder_of(tmp_path / "model", form, expected)
    config = AutoConfig.from_pretrained(str(folder))
    export.export_torch(run_folder(tmp_path), pretrained_in(folder))
    names = {path.name for path in (tmp_path / "torch").iterdir()}
    assert (
        names
        == {*EXPORTED}
        == {
            "added_tokens.json",
            "cog-pretrain.model",
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer_config.json",
        }
    )
    written = json.loads((tmp_path / "torch/config.json").read_text())
    assert written["torch_dtype"] == dtype and written["architectures"] == ["GLMModel"]
    again = AutoConfig.from_pretrained(str(tmp_path / "torch"))
    assert isinstance(again, GLMConfig)
    assert (again.hidden_size, again.num_layers) == (config.hidden_size, config.num_layers)
    found = {f"glm.{name}": array for name, array in read_export(tmp_path).items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    size = int.from_bytes((tmp_path / "torch/model.safetensors").read_bytes()[:8], "little")
    assert size % 8 == 0  # the values are aligned


@pytest.mark.parametrize("dtype", [*CAST, "float64"])
@pytest.mark.parametrize(
    "name", ["transformer.position_embeddings.weight", "transformer.final_layernorm.bias"]
)
def test_a_weight_that_is_no_number_is_neither_loaded_nor_exported(tmp_path, name, dtype):
    """Also where no record of a run would meet it, as the last position's. In float32 1e300 is none."""
    cast = {**CAST, "float64": lambda array: np.where(np.isfinite(array), array, 1e300)}[dtype]
    changed = {key: array.copy() for key, array in TINY.items()}
    changed[f"glm.{name}"].reshape(-1)[-1] = np.inf if name.endswith("bias") else np.nan
    folder = folder_of(tmp_path / "model", "pdparams", {key: cast(x) for key, x in changed.items()})
    pretrained = pretrained_in(folder)
    with pytest.raises(InputError, match=f"weights can't be loaded .its glm.{name} holds NaN or infinity"):
        weights.load_model(pretrained)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=f"its weights can't be written .its glm.{name} holds NaN or infinity"
    ):
        export.export_torch(run_folder(tmp_path / "out"), pretrained)
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_that_is_no_number_is_refused(tmp_path):
    pretrained, config = pretrained_in(TINY_GLM), lora_config()
    adapter = random_adapter(weights.load_model(pretrained), config)
    adapter["glm.transformer.layers.0.mlp.dense_4h_to_h.lora_B"][0, 0] = np.nan
    paddle.save(
        {name: paddle.to_tensor(x) for name, x in adapter.items()}, f"{tmp_path}/lora_model_state.pdparams"
    )
    with pytest.raises(InputError, match="dense_4h_to_h.lora_B holds NaN or infinity"):
        lora.read_adapter_weights(str(tmp_path), pretrained.config, config)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_into_what_is_handed_on(tmp_path, rslora):
    pretrained = pretrained_in(TINY_GLM)
    model = weights.load_model(pretrained)
    config = lora_config(rslora=rslora)
    pretrained.adapter = lora.Adapter("adapter", config, random_adapter(model, config))
    export.export_torch(run_folder(tmp_path), pretrained)
    merged = lora.merge_lora(lora.add_lora(model, pretrained, seed=0)).state_dict()
    found = {f"glm.{name}": array for name, array in read_export(tmp_path).items()}
    linear = "glm.transformer.layers.0.attention.dense"
    a, b = (pretrained.adapter.weights[f"{linear}.lora_{matrix}"].astype("float64") for matrix in "AB")
    scaling = 6 / 2**0.5 if rslora else 6 / 2
    expected = TINY[f"{linear}.weight"] + scaling * a @ b
    np.testing.assert_allclose(found[f"{linear}.weight"], expected, atol=1e-5)
    for name, weight in merged.items():
        np.testing.assert_allclose(found[name], weight.numpy(), atol=1e-5)
        assert (found[name] == TINY[name]).all() == (not is_linear(name)), name


def test_an_export_that_fails_leaves_the_one_before_it(tmp_path, monkeypatch):
    export.export_torch(run_folder(tmp_path), pretrained_in(TINY_GLM))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "torch").iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tokenizer", fail)
    with pytest.raises(OSError):
        export.export_torch(run_folder(tmp_path), pretrained_in(TINY_GLM))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "torch").iterdir()}
    assert after == before and [path.name for path in tmp_path.iterdir()] == ["torch"]


def test_the_script_hands_on_what_it_trained(tmp_path):
    """A whole model, an adapter, that adapter's folder alone: read again, all predict what was evaluated."""
    common = ["--task_name", MINI, *FAST, "--max_eval_samples", 3]
    train = ["--do_train", "--do_eval", "--max_train_samples", 8, "--max_steps", 2]
    for name, flags in (("whole", []), ("adapter", ["--lora", "True"])):
        out = tmp_path / name
        model = ["--model_name_or_path", TINY_GLM, "--export_torch", "True", *flags]
        run(*model, *common, *train, "--output_dir", out)
        alone = tmp_path / f"{name} alone"
        run("--model_name_or_path", out, "--export_torch", "True", "--output_dir", alone)
        assert [path.name for path in alone.iterdir()] == ["torch"]
        first, second = read_export(out), read_export(alone)
        assert all((first[key] == second[key]).all() for key in first)
        again = tmp_path / f"{name} again"
        run("--model_name_or_path", out / "torch", *common, "--do_eval", "--output_dir", again)
        rows = [read_jsonl(path / "eval_predictions.jsonl") for path in (out, again)]
        assert [row["token_ids"] for row in rows[0]] == [row["token_ids"] for row in rows[1]]


# Files of a stranger; their pickles are in test_pickles.py


FLOATS, EIGHT = named("torch", "FloatStorage"), np.arange(8, dtype="float32")


def tensor(sizes=(2,), strides=(1,), offset=0, key="0", kind=FLOATS, identity=None):
    """A tensor of PyTorch, of a storage of eight values."""
    identity = identity or b"(" + text("storage") + kind + text(key) + text("cpu") + number(8) + b"tQ"
    axes = [axis if isinstance(axis, bytes) else shape(*axis) for axis in (sizes, strides)]
    return call(named("torch._utils", "_rebuild_tensor_v2"), identity, number(offset), *axes, b"\x89", b"N")


def torch_file(path, form, value):
    """Write a file of PyTorch with ``value`` as "w", and its storage "0" of 0..7."""
    data = b"\x80\x02}" + text("w") + value + b"s."
    if form == "zip":
        return write_torch_zip(path, {"w": EIGHT}, pickle=data)
    keys = b"\x80\x02](" + text("0") + b"e."
    start = (b"\x80\x02" + number(1) + b".") * 2 + b"\x80\x02}."
    path.write_bytes(start + data + keys + struct.pack("<q", 8) + EIGHT.tobytes())


HOSTILE_TENSORS = {
    "stride of 0": (tensor((1 << 40,), (0,)), "larger than"),
    "a small stride of 0": (tensor((9,), (0,)), "larger than the storage"),
    "overlapping": (tensor((4, 4), (1, 1)), "larger than the storage"),
    "two strides of 0": (tensor((1 << 33, 1 << 33), (0, 0)), "larger than"),
    "offset": (tensor(offset=7), "larger than the storage"),
    "huge offset": (tensor(offset=1 << 62), "larger than the storage"),
    "offset of 2 ** 64": (tensor(offset=1 << 64), "has no storage"),
    "negative offset": (tensor(offset=-1), "has no storage"),
    "negative stride": (tensor(strides=(-1,), offset=7), "wrong strides"),
    "stride that wraps": (tensor((5,), (1 << 62,)), "larger than the storage"),
    "stride of a float": (tensor(strides=(b"G" + bytes(8),)), "wrong strides"),
    "fewer strides": (tensor((2, 2), (1,)), "wrong strides"),
    "no strides": (tensor(strides=b"N"), "wrong strides"),
    "negative shape": (tensor((-1,)), "wrong shape"),
    "shape of text": (tensor(text("ab")), "wrong shape"),
    "100 axes": (tensor((1,) * 100, (1,) * 100), "wrong shape"),
    "key of another file": (tensor(key="../data.pkl"), "missing|no weight is in"),
    "objects": (tensor(kind=text("O")), "of a type that no weight is"),
    "a dtype by its name": (tensor(kind=call(named("numpy", "dtype"), text("O"))), "no weight is"),
    "whole numbers": (tensor(kind=named("torch", "LongStorage")), "it holds torch.LongStorage"),
    "identity of text": (tensor(identity=text("storage") + b"Q"), "damaged"),
    "short identity": (tensor(identity=b"(tQ"), "too short"),
    "identity by name": (tensor(identity=b"P0\n"), "an operation"),
    "two types": (b"(" + tensor() + tensor(kind=named("torch", "HalfStorage")) + b"t", "of two types"),
    "parameter of text": (
        call(named("torch._utils", "_rebuild_parameter"), text("x")),
        "w is no tensor|no weight is in",
    ),
    "no arguments": (call(named("torch._utils", "_rebuild_tensor_v2")), "damaged"),
    "call of a type": (call(named("torch", "FloatStorage"), number(1 << 30)), "damaged"),
    "a dict": (b"}", "w is no tensor|no weight is in"),
}


def refused(path, message):
    """Check that ``path`` is refused in one printable line, in little time and memory."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            formats.read_file(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path.name}: ") and line.isprintable() and len(line) < 400
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_hostile_tensors(tmp_path, case, form):
    value, message = HOSTILE_TENSORS[case]
    torch_file(tmp_path / "pytorch_model.bin", form, value)
    refused(tmp_path / "pytorch_model.bin", message)


@pytest.mark.parametrize("form", ["zip", "stream"])
@pytest.mark.parametrize(
    "sizes, strides, offset", [((2, 4), (4, 1), 0), ((4, 2), (1, 4), 0), ((2,), (3,), 2), ((3, 2), (1, 1), 1)]
)
def test_views_of_a_storage(tmp_path, form, sizes, strides, offset):
    """Tensors that share one: the whole, transposed, every third value, overlapping windows."""
    torch_file(tmp_path / "pytorch_model.bin", form, tensor(sizes, strides, offset))
    found = formats.read_file(tmp_path / "pytorch_model.bin")["w"]
    values = np.arange(8, dtype="float32")[offset:]
    expected = np.lib.stride_tricks.as_strided(values, sizes, [4 * stride for stride in strides])
    np.testing.assert_array_equal(found, expected)


def zip_of(path, *entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)


GOOD = b"\x80\x02}" + text("w") + tensor() + b"s."
PICKLE, VALUES = ("archive/data.pkl", GOOD), ("archive/data/0", bytes(32))


def change(path, old, new):
    """Replace the last ``old``, which is in the zip's directory."""
    start, _, end = path.read_bytes().rpartition(old)
    path.write_bytes(start + new + end)


@pytest.mark.parametrize(
    "entries, message",
    [
        ([VALUES], "no data.pkl"),
        ([PICKLE], "missing"),
        ([PICKLE, ("other/data.pkl", GOOD), VALUES], "damaged"),
        ([("archive/sub/data.pkl", GOOD), VALUES], "no data.pkl"),
        ([PICKLE, ("archive/data/../data/0", bytes(32))], "missing"),
    ],
)
def test_hostile_zip_entries(tmp_path, entries, message):
    zip_of(tmp_path / "pytorch_model.bin", *entries)
    refused(tmp_path / "pytorch_model.bin", message)


def test_hostile_zips(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    zip_of(path, ("archive/data.pkl", GOOD + bytes(10**8)), VALUES, compression=zipfile.ZIP_DEFLATED)
    refused(path, "its archive/data.pkl is compressed")
    size, end = struct.pack("<I", 32), struct.pack("<I", 1 << 30)
    for old, new, message in (
        (size + size, end + end, "truncated"),  # larger than the file
        (size + size, size + end, "compressed"),  # of two sizes
        (b"PK\1\2", b"PK\1\3", "truncated"),
        (b"PK\5\6", b"PK\5\7", "truncated"),
    ):
        zip_of(path, PICKLE, VALUES)
        change(path, old, new)
        refused(path, message)
    for place in (0, 1, 1 << 31, (1 << 32) - 2):  # of an entry, by the directory
        zip_of(path, PICKLE, VALUES)
        offset = struct.pack("<I", 30 + len("".join(PICKLE[:1])) + len(GOOD))
        change(path, offset + b"archive/data/0", struct.pack("<I", place) + b"archive/data/0")
        refused(path, "damaged")


def test_hostile_streams(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch_file(path, "stream", tensor())
    good = path.read_bytes()
    stored = good[-40:]
    for count in (9, 1 << 40, -1, -(1 << 63)):
        path.write_bytes(good[:-40] + struct.pack("<q", count) + stored[8:])
        refused(path, "truncated")
    keys = b"\x80\x02](" + text("0") + b"e."
    for other in (text("1"), b"K\1", b"]", b"N"):
        path.write_bytes(good.replace(keys, b"\x80\x02](" + other + b"e."))
        refused(path, "a storage that no weight is in")
    path.write_bytes(good.replace(keys, b"\x80\x02}."))
    refused(path, "missing")
    for part in (good[:1], good[:40], good[:-41], b"\x80\x02}.", b"\x93NUMPY", b"{}"):
        path.write_bytes(part)
        refused(path, "truncated")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE_HEADERS = {
    **{
        f"{key} {value}": ({"w": {**ENTRY, key: value}}, message)
        for key, message, values in [
            ("data_offsets", "wrong offsets|truncated|differs", [[-8, 0], [8, 0], [0, 1 << 62], [0, 12]]),
            ("data_offsets", "wrong offsets", [[0], [0, 4, 8], ["0", "8"], [0.0, 8.0], [False, 8]]),
            ("data_offsets", "wrong offsets", [None, 8, "08", [float("nan"), 8], [0, 1 << 64]]),
            (
                "shape",
                "wrong shape|differs",
                [[-2], [-1, -2], [1 << 40, 1 << 40], [0, 2], [], "2", None, [2.0], [[2]]],
            ),
            (
                "shape",
                "wrong shape|differs",
                [[True, 2], [1] * 99 + [2], [float("nan")], [(1 << 63) + 1, 2], 2],
            ),
            ("dtype", "no weight is", ["X9", "f4", "O", "\x1b[2J", "x" * 10**6, None, 5, "BOOL", "I64"]),
            ("dtype", "no weight is", [[], {}]),
        ]
        for value in values
    },
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "overlap"),
    "all of the same": (dict.fromkeys(["a", "b", "c"], ENTRY), "overlap"),
    "a name twice": (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {}}', "twice"),
    "a name with escapes": ({"\x1b[2J": ENTRY}, "no weight has"),
    "a name of 1 MB": ({"n" * 10**6: ENTRY}, "no weight has"),
    "an entry that is none": ({"w": None}, "no table"),
    "an entry without a shape": ({"w": {"dtype": "F32"}}, "wrong offsets"),
    "a list": (b"[]", "no table"),
    "a number": (b"5", "no table"),
    "metadata": (b'{"__metadata__": []}', "no table"),
    "brackets": (b"[" * 100_000, "too deeply"),
    "dicts": (b'{"a":' * 100_000, "too deeply"),
    "no JSON": (b"\0" * 16, "can't be read"),
    "no UTF-8": (b'{"\xff": 1}', "can't be read"),
    "nothing": (b"", "can't be read"),
    "larger than 16 MiB": (b" " * (17 << 20) + b"{}", "larger than 16 MiB"),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers(tmp_path, case):
    header, message = HOSTILE_HEADERS[case]
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
    refused(path, message)


@pytest.mark.parametrize("length", [1 << 20, 1 << 40, 1 << 63, (1 << 64) - 8, (1 << 64) - 1])
def test_a_header_longer_than_its_file(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + json.dumps({"w": ENTRY}).encode() + bytes(8))
    refused(path, "truncated")


@pytest.mark.parametrize(
    "weight_map, message",
    [
        *[(None, "no weight_map"), ([], "no weight_map"), ("x", "no weight_map")],
        *[({"w": name}, "no plain name") for name in ("../w.bin", "/dev/zero", "a/w.bin", "", ".", "..")],
        *[({"w": name}, "no plain name") for name in (5, None, ["w.bin"], "a\0", "../\x1b[2J" + "x" * 10**5)],
        ({"w": "model.safetensors.index.json"}, "which is an index itself"),
        ({"w": "gone.safetensors"}, "gone.safetensors: No such file"),
        ({"w": "pipe.safetensors"}, "pipe.safetensors: it is no regular file"),
        ({"w": "device.bin"}, "device.bin: it is no regular file"),
        ({"w": "folder.pdparams"}, "folder.pdparams: it is no regular file"),
        ({"w\x1b[2J": "w.safetensors"}, "no weight has"),
        ({"other": "w.safetensors"}, "other is not in w.safetensors"),
    ],
)
def test_hostile_indexes(tmp_path, weight_map, message):
    write_safetensors(tmp_path / "w.safetensors", {"w": TINY[NORM]}, None)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.bin").symlink_to("/dev/zero")
    (tmp_path / "folder.pdparams").mkdir()
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    refused(path, message)


@pytest.mark.parametrize("name", ["model_state.pdparams", "model.safetensors", "pytorch_model.bin", "a.json"])
def test_what_is_no_regular_file(tmp_path, name):
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / name)
        refused(tmp_path / name, "it is no regular file")
        (tmp_path / name).rename(tmp_path / f"not {len(list(tmp_path.iterdir()))}")


def test_the_index_says_which_shard_a_weight_is_in(tmp_path):
    """Another shard, which is read later, holds an old copy of it."""
    folder = folder_of(tmp_path / "model", "np shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = min(name for name, file in index.items() if file.startswith("model-00001"))
    second = folder / "model-00002-of-00002.safetensors"
    others = {key: np.array(array) for key, array in formats.read_file(second).items()}
    write_safetensors(second, {**others, name: TINY[name] + 1}, {"format": "np"})
    found = formats.read_file(folder / "model.safetensors.index.json")
    assert found.keys() == TINY.keys()
    np.testing.assert_array_equal(found[name], TINY[name])


def grad_scaler(scale, count):
    """A GradScaler as on a card; on a CPU a new one is switched off."""
    scaler = paddle.amp.GradScaler.__new__(paddle.amp.GradScaler)
    scaler._enable, scaler._scale, scaler._incr_count = True, paddle.to_tensor([scale]), count
    scaler._incr_ratio, scaler._decr_ratio, scaler._decr_count = 2.0, 0.5, 0
    scaler._incr_every_n_steps, scaler._decr_every_n_nan_or_inf = 1000, 2
    scaler._use_dynamic_loss_scaling = True
    return scaler


def test_the_state_of_a_loss_scaler_and_of_a_schedule(tmp_path):
    """They are read as paddle.load reads them, and a run goes on with them."""
    path, saved, scaler = tmp_path / "scaler.pdparams", grad_scaler(4096.0, 7), grad_scaler(1.0, 0)
    paddle.save(saved.state_dict(), str(path))
    state = formats.read_state(path, scaler.state_dict())
    assert state == paddle.load(str(path), return_numpy=True) == saved.state_dict()
    scaler.load_state_dict(state)
    assert scaler.state_dict() == saved.state_dict() and scaler.state_dict()["scale"] == 4096
    assert formats.read_state(path, {}) == {}  # of a run without loss scaling

    path = tmp_path / "scheduler.pdparams"
    schedules = [paddle.optimizer.lr.LambdaDecay(0.1, lambda step: 0.5**step) for _ in range(2)]
    schedules[0].step(3)
    paddle.save(schedules[0].state_dict(), str(path))
    schedules[1].set_state_dict(formats.read_state(path, schedules[1].state_dict()))
    assert schedules[1].state_dict() == schedules[0].state_dict() == {"last_epoch": 3, "last_lr": 0.0125}


@pytest.mark.parametrize(
    "state, message",
    [
        ({"last_lr": 0.1}, "it has no last_epoch"),
        ({"last_epoch": "3", "last_lr": 0.1}, "its last_epoch is of type str: it must be of type int"),
        ({"last_epoch": True, "last_lr": 0.1}, "of type bool"),
        ({"last_epoch": 3.5, "last_lr": 0.1}, "of type float"),
        ({"last_epoch": -1, "last_lr": 0.1}, "its last_epoch is out of its range"),
        ({"last_epoch": 3, "last_lr": float("nan")}, "its last_lr is out of its range"),
        ({"last_epoch": 3, "last_lr": float("inf")}, "its last_lr is out of its range"),
        ({"last_epoch": 3, "last_lr": [0.1]}, "of type list"),
        ({"last_epoch": 3, "last_lr": None}, "of type NoneType"),
        ({"last_epoch": 3, "last_lr": np.zeros(2)}, "of type ndarray"),
        ({"last_epoch": 10**30, "last_lr": 0.1}, "no number"),
        ([], "no weights by name"),
    ],
)
def test_hostile_states(tmp_path, state, message):
    path = tmp_path / "scheduler.pdparams"
    path.write_bytes(pickle.dumps(state, 4))
    with pytest.raises(ValueError, match=f"scheduler.pdparams: .*{message}"):
        formats.read_state(path, {"last_epoch": 0, "last_lr": 1e-5})


@pytest.mark.parametrize(
    "name, value, message",
    [
        *(("scale", np.array([value], "float32"), "range") for value in (0, -1, np.nan, np.inf)),
        ("scale", np.ones(2, "float32"), "another shape"),
        ("scale", np.ones(1, "float64"), "another shape or type"),
        *(("incr_count", value, "range") for value in (-1, 1000)),
        *(("decr_count", value, "range") for value in (-1, 2)),
    ],
)
def test_hostile_states_of_a_loss_scaler(tmp_path, name, value, message):
    """A scale of 0 would make each gradient NaN, and a count that is past its end would never lower it."""
    path, own = tmp_path / "scaler.pdparams", grad_scaler(1.0, 0).state_dict()
    paddle.save({**own, "scale": np.full(1, 8, "float32"), "incr_ratio": 0.0, name: value}, str(path))
    with pytest.raises(ValueError, match=f"its {name} is .*{message}"):
        formats.read_state(path, own)
    paddle.save({**own, "incr_ratio": 0.0}, str(path))
    assert formats.read_state(path, own) == own  # settings are this run's


def test_a_state_that_would_run(tmp_path):
    path = tmp_path / "scheduler.pdparams"
    path.write_bytes(b"\x80\x02" + call(named("posix", "system"), text(f"touch {tmp_path}/ran")) + b".")
    with pytest.raises(ValueError, match="holds posix.system"):
        formats.read_state(path, {"last_epoch": 0})
    assert not (tmp_path / "ran").exists()
