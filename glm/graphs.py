"""A step captured in CUDA graphs, and the collectives between them."""

import ctypes
import functools
from typing import Callable

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.device.cuda.graphs import CUDAGraph
from paddle.distributed.collective import Group
from paddle.framework import _current_expected_place
from paddlenlp.utils.log import logger

from glm.device import on_cpu, supports_cuda_graphs
from glm.errors import paddle_reason

_capturing = None  # the CapturedStep whose function is being captured
_failed = False  # whether a capture has failed: none is tried again


class CapturedStep:
    """Capture a function in CUDA graphs at its first call, and replay them at each call.

    The function has no arguments. It reads tensors that are changed in place between the calls, and
    returns tensors that every call writes anew. Within it nothing may be copied to the device or
    read from it. A collective ends one graph, and the next begins behind it: Paddle's own process
    groups do not let themselves be captured everywhere. Where the device captures nothing, or fails
    to, the function is called as it is.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.parts = None  # graphs' replays, and the collectives between them, as functions
        self.graph = None  # the one that is being captured

    def __call__(self):
        """Return what the function returns."""
        global _failed
        if not supports_cuda_graphs() or _failed:
            return self.function()
        if self.parts is None:
            try:
                self._capture()
            except (MemoryError, OSError, RuntimeError, ValueError) as error:  # those that Paddle raises
                _failed, self.parts = True, None
                logger.warning(f"going on without CUDA graphs, more slowly: {paddle_reason(error)}")
                return self.function()
        for part in self.parts:
            part()
        return self.outputs

    def _capture(self):
        global _capturing
        self.parts, _capturing = [], self
        try:
            self._begin()
            self.outputs = self.function()
            self._end()
        finally:
            _capturing = None
            if self.graph is not None:  # or all that follows would be captured too
                _abandon(self.graph)
                self.graph = None

    def _begin(self):
        # Without a place Paddle takes the first card, whichever is in use. There is no public name
        # for the place in use.
        graph = CUDAGraph(_current_expected_place())
        graph.capture_begin()
        self.graph = graph

    def _end(self):
        self.graph.capture_end()
        self.parts.append(self.graph.replay)
        self.graph = None

    def between_graphs(self, function: Callable) -> None:
        """End a graph, and have ``function`` called behind it at each replay."""
        self._end()
        self.parts.append(function)
        self._begin()


def _abandon(graph):
    """End the capture of a graph that is of no use."""
    try:
        graph.capture_end()
    except (OSError, RuntimeError, ValueError):
        # CUDA had invalidated the capture, and has ended it. Paddle still takes itself to be
        # capturing, and its next operator would abort: let it end a capture of nothing.
        stream = ctypes.c_void_p(paddle.device.cuda.current_stream().cuda_stream)
        ctypes.CDLL("libcuda.so.1").cuStreamBeginCapture_v2(stream, 1)  # of this thread
        graph.capture_end()


def _collective(function, *args, **kwargs):
    """Call ``function`` now, or in a capture at each replay."""
    if _capturing is None:
        function(*args, **kwargs)
    else:
        _capturing.between_graphs(functools.partial(function, *args, **kwargs))


def all_reduce(tensor: Tensor, group: Group, op: int = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor over the processes of ``group``, in place."""
    # In the stream of the operators, so that no stream waits for another.
    _collective(dist.stream.all_reduce, tensor, op, group, use_calc_stream=not on_cpu())


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """Return the parts of all processes of ``group``, side by side in the last dimension."""
    parts = [paddle.empty_like(tensor) for _ in range(group.nranks)]
    _collective(dist.all_gather, parts, tensor, group)
    return paddle.concat(parts, axis=-1)
