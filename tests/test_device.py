"""What glm/device.py says of a device, against a machine that is made up: no test has a GPU."""

import ctypes
import os
import subprocess
import sys
import types

import paddle
import pytest
from helpers import ROOT

from glm import device
from glm.errors import Fault, InputError


@pytest.fixture
def cards(monkeypatch):
    """Pretend that Paddle has two GPUs. Returns what it was told."""
    told = []
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(paddle, "set_device", lambda name: told.append(name))
    monkeypatch.setattr(paddle, "set_flags", lambda flags: told.append(flags))
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda card: (8, 0))
    monkeypatch.setattr(device, "check_libraries", lambda: told.append("libraries"))
    return told


@pytest.mark.parametrize(
    "archs, capability, outcome",
    [
        (None, (6, 1), None),
        (None, (8, 0), None),
        (None, (8, 9), None),  # Ada runs what is compiled for 8.6
        (None, (7, 2), None),
        (None, (6, 0), "requirements.txt"),
        (None, (9, 0), "requirements-paddle3.txt and the GPU wheel"),
        (None, (12, 0), "requirements-paddle3.txt and the GPU wheel"),
        ([80, 86, 90, 100], (9, 0), None),
        ([80, 86, 90, 100], (10, 3), None),
        ([80, 86, 90, 100], (7, 5), "requirements.txt"),
        ([80, 86, 90], (12, 0), "warning"),  # it may hold PTX
        ([], (9, 0), None),
    ],
)
def test_a_card_that_paddle_has_no_code_for(monkeypatch, archs, capability, outcome):
    warnings = []
    monkeypatch.delattr(paddle.version, "cuda_archs", raising=False)
    if archs is not None:
        monkeypatch.setattr(paddle.version, "cuda_archs", lambda: archs, raising=False)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda card: capability)
    monkeypatch.setattr(device.logger, "warning", warnings.append)
    if outcome in (None, "warning"):
        device.check_card(0)
        assert len(warnings) == (outcome == "warning")
        return
    with pytest.raises(InputError) as error:
        device.check_card(0)
    number = ".".join(map(str, capability))
    assert f"has no code for a card of compute capability {number}: install {outcome}" in str(error.value)


@pytest.mark.parametrize("name, used", [("", "gpu"), ("gpu", "gpu"), ("gpu:1", "gpu:1"), ("cpu", "cpu")])
def test_the_device_that_is_used(cards, name, used):
    assert device.use_device(name) == used
    libraries = ["libraries"] if used != "cpu" else []  # a CPU has none
    assert cards == [used, *libraries, {"FLAGS_embedding_deterministic": 1}]


NO_LIBRARY = """

--------------------------------------
C++ Traceback (most recent call last):
--------------------------------------
----------------------
Error Message Summary:
----------------------
PreconditionNotMetError: The third-party dynamic library (libname.so) is not configured correctly.
  - Windows: set PATH by `set PATH=XXX; (at ../dynamic_loader.cc:304)"""


@pytest.mark.parametrize("missing", [None, "cuDNN", "cuBLAS", "cuBLASLt or cuSOLVER", "NCCL"])
def test_a_library_of_cuda_that_is_missing(monkeypatch, missing):
    """Each is tried by one operator, and what does not work is said in a line."""
    tried = []

    def operator(library):
        def call(*args):
            tried.append(library)
            if library == missing:
                raise RuntimeError(NO_LIBRARY)

        return call

    graph = types.SimpleNamespace(capture_begin=operator("cuBLASLt or cuSOLVER"), capture_end=lambda: None)
    monkeypatch.setattr(device, "CUDAGraph", lambda place: graph)
    monkeypatch.setattr(device, "is_cuda_graph_supported", lambda: True)
    monkeypatch.setattr(device.F, "softmax", operator("cuDNN"))
    monkeypatch.setattr(paddle, "matmul", operator("cuBLAS"))
    monkeypatch.setattr(paddle.base.core, "nccl_version", operator("NCCL"), raising=False)
    monkeypatch.setattr(device.dist, "get_world_size", lambda: 2)
    everything = ["cuDNN", "cuBLAS", "cuBLASLt or cuSOLVER", "NCCL"]
    if missing is None:
        device.check_libraries()
        assert tried == everything
        monkeypatch.setattr(device.dist, "get_world_size", lambda: 1)
        device.check_libraries()
        assert tried[4:] == everything[:3]  # one process gathers nothing
        return
    with pytest.raises(InputError) as error:
        device.check_libraries()
    assert f"{missing} can't be used" in str(error.value) and "(libname.so)" in str(error.value)
    assert "README" in str(error.value) and "Windows" not in str(error.value) and tried[-1] == missing


def test_a_card_whose_memory_others_hold(monkeypatch):
    def out_of_memory(*args):
        raise MemoryError("ResourceExhaustedError: out of memory")

    monkeypatch.setattr(paddle, "matmul", out_of_memory)
    with pytest.raises(Fault, match="out of memory on cpu before the model is loaded: other processes"):
        device.check_libraries()


@pytest.mark.parametrize("name", ["gpu:2", "gpu:-1", "gpu:x", "gpu:"])
def test_a_card_that_is_not_there(cards, name):
    with pytest.raises(InputError, match=f"--device is {name}: the 2 cards here are gpu:0 to gpu:1"):
        device.use_device(name)
    assert cards == []


def test_no_card(monkeypatch):
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    assert [device.use_device(name) for name in ("", "gpu", "gpu:1", "cpu")] == ["cpu"] * 4
    assert device.on_cpu() and not device.supports_dtype("float16") and not device.supports_dtype("bfloat16")


@pytest.mark.parametrize("capability", [(5, 3), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0)])
def test_types_by_compute_capability(monkeypatch, capability):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *device: capability)
    assert not device.on_cpu()
    assert (device.supports_dtype("float16"), device.supports_dtype("bfloat16")) == (
        capability >= (7, 0),
        capability >= (8, 0),
    )


@pytest.mark.parametrize("cpu", [True, False])
def test_the_allocator_is_left_alone_beside_a_gpu(monkeypatch, cpu):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, parameter, value):
            calls.append((parameter, value))

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(device, "on_cpu", lambda: cpu)
    monkeypatch.setattr(paddle.base.core, "set_num_threads", lambda count: None)
    device.use_the_whole_cpu()
    assert calls == ([(-4, 0), (-1, -1)] if cpu else [])


@pytest.mark.parametrize("given, threads", [(None, [6, 3, 1, 1]), (1, [])])
def test_threads(given, threads):
    """The cores, shared by the processes of a launch; importing paddle has set OMP_NUM_THREADS by then."""
    code = (
        "import os, paddle\nfrom glm import device\nassert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "os.sched_getaffinity = lambda process: range(6)\n"
        "paddle.base.core.set_num_threads = lambda count: print('threads', count)\n"
        "for processes in (1, 2, 4, 9):\n"
        "    os.environ['PADDLE_LOCAL_SIZE'] = str(processes)\n    device.use_the_whole_cpu()\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env.update({"OMP_NUM_THREADS": str(given)} if given else {})
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
    assert [int(line[8:]) for line in output.splitlines() if line.startswith("threads ")] == threads


def test_nothing_happens_at_import():
    """Environment, signals, threads and allocator are as they were, in whatever order one imports."""
    code = (
        "import os, signal, sys, threading, warnings, ctypes, paddle, rouge, tqdm.contrib.logging\n"
        "import paddlenlp.trainer, paddlenlp.transformers, paddlenlp.metrics\n"
        "calls = []\nctypes.CDLL = paddle.base.core.set_num_threads = calls.append\n"
        "paddle.set_flags = paddle.set_device = calls.append\n"
        "state = lambda: (dict(os.environ), [*map(signal.getsignal, (2, 13, 15))], threading.excepthook,\n"
        "                 warnings.filters[:], sys.getrecursionlimit(), paddle.get_device())\n"
        "before = state()\nfor name in sys.argv[1:]: __import__(name)\n"
        "assert state() == before and not calls, (before, state(), calls)\n"
    )
    names = [
        "finetune_generation",
        "utils",
        "data",
        *(f"glm.{path.stem}" for path in sorted(ROOT.glob("glm/[a-z]*.py"))),
    ]
    for order in (names, names[::-1]):
        subprocess.run(
            [sys.executable, "-c", code, *order], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."}
        )
