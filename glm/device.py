"""The device in use and what it can do; a CPU made fast."""

import contextlib
import ctypes
import functools
import os
import re
import resource
from pathlib import Path
from typing import Optional

import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.device.cuda.graphs import CUDAGraph, is_cuda_graph_supported
from paddle.framework import _current_expected_place
from paddlenlp.utils.log import logger

from glm.errors import Fault, InputError, is_out_of_memory, paddle_reason

# The compute capabilities that PyPI's wheel of 2.6.2 has code for, which it can't be asked.
PADDLE_2_ARCHS = (61, 70, 75, 80, 86)


def use_device(name=""):
    """Make ``name`` the device in use, or the CPU where Paddle can use no GPU.

    Args:
        name (str): gpu, gpu:N, cpu, xpu or npu; "" takes a GPU if there is one, else the CPU.

    Returns:
        the device in use, str.

    Raises:
        InputError: where there is no card N, Paddle has no code for it, or CUDA's libraries are missing.
    """
    # paddle.set_device("gpu") without a GPU ends the process with nothing to catch.
    cards = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if not name or (name.startswith("gpu") and not cards):
        name = "gpu" if cards else "cpu"
        if not cards:
            logger.warning("Paddle can use no GPU here: running on the CPU")
    if name.startswith("gpu:") and name[4:] not in map(str, range(cards)):
        raise InputError(f"--device is {name}: the {cards} cards here are gpu:0 to gpu:{cards - 1}")
    if name.startswith("gpu"):
        check_card(int(name[4:] or os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]))
    paddle.set_device(name)
    if name.startswith("gpu"):
        check_libraries()
    # Each tensor-parallel process of a GPU would sum the position embeddings' gradients
    # in another order, and their copies would drift apart.
    with contextlib.suppress(ValueError):  # builds without GPU code have no such flag
        paddle.set_flags({"FLAGS_embedding_deterministic": 1})
    return name


def check_card(card):
    """Raise InputError where the installed Paddle has no machine code for the GPU number ``card``.

    Code runs on cards of the same major compute capability whose minor one is not lower
    (CUDA's rule). Paddle 3 says what it has code for. It may also hold PTX, which the
    driver compiles for newer cards at their first kernel, so that those get a warning.
    """
    major, minor = paddle.device.cuda.get_device_capability(card)
    compiled = paddle.version.cuda_archs() if hasattr(paddle.version, "cuda_archs") else PADDLE_2_ARCHS
    compiled = [divmod(int(arch), 10) for arch in compiled]
    if not compiled or any(major == arch[0] and minor >= arch[1] for arch in compiled):
        return
    stack = "requirements.txt"
    if (major, minor) > divmod(PADDLE_2_ARCHS[-1], 10):
        stack = "requirements-paddle3.txt and the GPU wheel of your CUDA version that it names"
    text = (
        f"Paddle {paddle.__version__} has no code for a card of compute capability {major}.{minor}: "
        f"install {stack}"
    )
    if (major, minor) > max(compiled) and hasattr(paddle.version, "cuda_archs"):
        logger.warning(text + ", if this run fails at its first kernel")
    else:
        raise InputError(text)


def check_libraries():
    """Raise InputError where a library is missing that this run will need on its GPU.

    Paddle 2's wheel brings none of them, and opens each at the first operator that needs it: the last
    ones long after the weights are loaded. So an operator of each is tried.
    """

    def multiply():
        paddle.matmul(paddle.zeros([8, 8]), paddle.zeros([8, 8]))

    def capture():
        graph = CUDAGraph(_current_expected_place())
        graph.capture_begin()
        graph.capture_end()

    operators = {"cuDNN": lambda: F.softmax(paddle.zeros([1, 4096])), "cuBLAS": multiply}
    if is_cuda_graph_supported():
        operators["cuBLASLt or cuSOLVER"] = capture
    if dist.get_world_size() > 1:
        operators["NCCL"] = paddle.base.core.nccl_version
    for library, operator in operators.items():
        try:
            operator()
        except (MemoryError, OSError, RuntimeError, ValueError) as error:  # those that Paddle raises
            if is_out_of_memory(error):
                raise Fault(
                    f"out of memory on {paddle.get_device()} before the model is loaded: other processes "
                    "hold it, wait for them or take another card by --device gpu:N"
                ) from error
            raise InputError(
                f"{library} can't be used ({paddle_reason(error)}): install the libraries of CUDA for which "
                f"Paddle {paddle.__version__} is made, and make them found by LD_LIBRARY_PATH, as README's "
                "section Install says, or give --device cpu"
            ) from error


def on_cpu():
    """Return whether the device in use is the CPU."""
    return paddle.get_device() == "cpu"


# The compute capability from which on NVIDIA's cards compute in a type and gain by it. Those of 5.3
# to 6.2 know float16, but most compute in it more slowly than in float32.
LEAST_CAPABILITY = {"float16": (7, 0), "bfloat16": (8, 0)}


def supports_dtype(name):
    """Return whether the device in use computes in ``name``, float16 or bfloat16, and gains by it."""
    kind = paddle.get_device().split(":")[0]
    if kind == "gpu":
        return paddle.device.cuda.get_device_capability() >= LEAST_CAPABILITY[name]
    return kind != "cpu" and getattr(paddle.amp, f"is_{name}_supported")()


def why_unsupported(name):
    """Return the end of a sentence on what the device in use lacks for a type, str."""
    if not paddle.get_device().startswith("gpu"):
        return "needs a GPU"
    least, (major, minor) = LEAST_CAPABILITY[name], paddle.device.cuda.get_device_capability()
    return f"needs a card of compute capability {least[0]}.{least[1]}, and this one has {major}.{minor}"


def supports_tensor_parallelism():
    """Return whether fleet's layers compute in parts here: gloo lacks their collectives."""
    return not on_cpu()


def supports_cuda_graphs() -> bool:
    """Return whether the device in use captures CUDA graphs."""
    return paddle.get_device().startswith("gpu") and is_cuda_graph_supported()


@functools.cache
def supports_fused_linear() -> bool:
    """Return whether the device in use adds a linear's bias, and sums its gradient, within the product."""
    version = str(paddle.version.cuda()).split(".")  # "False" where Paddle is built without CUDA
    gpu = paddle.get_device().startswith("gpu") and version[0].isdigit()
    return gpu and [int(number) for number in version[:2]] >= [11, 6]


def upload(array, tensor):
    """Copy a numpy array into a tensor of its shape and type, in place."""
    # What set_value does within its checks, which take ten times as long.
    tensor.get_tensor().set(array, _current_expected_place())


def use_the_whole_cpu():
    """Let Paddle use the whole of a CPU. Must be called before the first product.

    Paddle starts with one thread, and its MKL takes a slow path on processors that are not Intel's. glibc
    returns each large tensor to the system, and the page faults of the next one take longer than many an
    operator. A thread count that the user set stays. Processes of one launch divide the cores.
    """
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    libc = ctypes.CDLL(None)
    # Beside a GPU the memory in which a checkpoint was read had better be returned.
    if on_cpu() and hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there for the next ones
    # Importing paddle sets OMP_NUM_THREADS to 1 in os.environ. /proc has what the user gave.
    environment = b""
    with contextlib.suppress(OSError):
        environment = b"\0" + Path("/proc/self/environ").read_bytes()
    if b"\0OMP_NUM_THREADS=" in environment:
        return
    # OMP_NUM_THREADS would make paddle print a warning at import; this call does not.
    paddle.base.core.set_num_threads(max(1, usable_cores() // int(os.environ.get("PADDLE_LOCAL_SIZE", 1))))


def usable_cores() -> int:
    """Return how many cores this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [text.split() for text in _read_cgroups("cpu", "cpu.max")]  # "200000 100000" or "max 100000"
    old_names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")  # of version 1, which has -1 for no limit
    quotas += zip(*(_read_cgroups("cpu", name) for name in old_names))
    for quota, period in quotas:
        if quota.strip().isdecimal():
            cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def free_memory() -> Optional[int]:
    """Return the bytes that are free on a CPU, or that a GPU has in all; None of another device.

    On a CPU less is free where the process's container has a limit, or the process (``ulimit -v``).
    """
    kind, _, number = paddle.get_device().partition(":")
    if kind == "gpu":
        return paddle.device.cuda.get_device_properties(int(number)).total_memory
    if kind != "cpu":
        return None
    sizes = []
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        sizes.append(int(available[1]) * 1024)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            sizes.append(max(limit - used, 0))
    names = {
        "memory.max": ("memory.current", "inactive_file"),
        "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),  # of version 1
    }
    for limit_name, (usage_name, cache_name) in names.items():
        files = (_read_cgroups("memory", name) for name in (limit_name, usage_name, "memory.stat"))
        for limit, usage, stat in zip(*files):
            if limit.strip().isdecimal():
                # What of the files' cache is not in use is given back when memory is wanted.
                cache = re.search(rf"^{cache_name} (\d+)", stat, re.MULTILINE)
                used = int(usage) - int(cache[1] if cache else 0)
                sizes.append(max(int(limit) - used, 0))
    return min(sizes, default=None)


def memory_peak(reset: bool = False) -> int:
    """Return the bytes of this process's live tensors at their peak, by Paddle's allocator.

    The peak is that since the process began, or since the last ``reset``, which Paddle 2.6.2 can't do.
    """
    core, (kind, _, number) = paddle.base.core, paddle.get_device().partition(":")
    kind, device = "host" if kind == "cpu" else "device", int(number or 0)
    if reset and hasattr(core, f"{kind}_memory_stat_reset_peak_value"):
        getattr(core, f"{kind}_memory_stat_reset_peak_value")("Allocated", device)
    return getattr(core, f"{kind}_memory_stat_peak_value")("Allocated", device)


def _read_cgroups(controller: str, name: str) -> list[str]:
    """Return the texts of the file ``name`` of this process's control groups: its own and those above.

    In version 2 of control groups one folder has all controllers, in version 1 each its own.
    """
    texts = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = Path("/sys/fs/cgroup", controller if controllers else "")
            folder = root / path.lstrip("/")  # in a container the path may be the host's
            for place in (folder, *list(folder.parents)[: len(folder.parts) - len(root.parts)]):
                with contextlib.suppress(OSError):
                    texts.append((place / name).read_text())
    return texts
