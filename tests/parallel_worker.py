"""finetune_generation.py over gloo: one process of a launch on CPUs.

Paddle's tensor-parallel layers have no CPU kernels for their collectives. Here, and only here,
those are replaced by PyLayers over paddle.distributed's all_reduce and all_gather, which gloo has.

python -m paddle.distributed.launch --nproc_per_node 2 tests/parallel_worker.py ARGUMENTS
"""

import os
import socket
import sys
from multiprocessing.connection import Client, Listener
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hooks
import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed.fleet.layers.mpu import mp_ops

import finetune_generation
from glm import arguments


class Identity(PyLayer):
    """Forward nothing, backward the sum."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad


class AllReduce(PyLayer):
    """Forward the sum, backward nothing."""

    @staticmethod
    def forward(ctx, tensor, group):
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


def c_identity(tensor, group=None, **_):
    return Identity.apply(tensor, group)


def mp_allreduce(tensor, op=None, group=None, **_):
    return AllReduce.apply(tensor, group)


def c_concat(tensor, group=None):
    parts = []
    dist.all_gather(parts, tensor, group)
    return paddle.concat(parts, axis=-1)


class Hub:
    """A process group in gloo's place, whose processes are now and then refused each other's connections.

    The first process sums or collects what the others send, and sends them the result.
    """

    def __init__(self, store, rank, world_size, group_id):
        self.peers, self.own_rank, self.world_size = [], rank, world_size
        if rank == 0:
            listener = Listener(("127.0.0.1", 0), backlog=world_size)
            store.set(f"hub {group_id}", str(listener.address[1]))
            peers = [listener.accept() for _ in range(world_size - 1)]
            self.peers = [peer for _, peer in sorted((peer.recv(), peer) for peer in peers)]
        else:
            store.wait(f"hub {group_id}")
            self.peers = [Client(("127.0.0.1", int(store.get(f"hub {group_id}"))))]
            self.peers[0].send(rank)
        for peer in self.peers:  # or a message of two packets would wait for an acknowledgement
            with socket.socket(fileno=os.dup(peer.fileno())) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def exchange(self, value, combine):
        """Give every process ``combine`` of all processes' values, a list in their order."""
        if self.own_rank == 0:
            result = combine([value, *(peer.recv() for peer in self.peers)])
            for peer in self.peers:
                peer.send(result)
            return result
        self.peers[0].send(value)
        return self.peers[0].recv()

    def rank(self):
        return self.own_rank

    def size(self):
        return self.world_size

    def name(self):
        return "GLOO"

    def all_reduce(self, tensor, op, sync_op=True):
        combine = {core.ReduceOp.SUM: sum, core.ReduceOp.MAX: lambda values: np.max(values, axis=0)}[op]
        tensor.set_value(np.asarray(self.exchange(tensor.numpy(), combine), dtype=tensor.numpy().dtype))
        return Done()

    def reduce(self, tensor, destination, op, sync_op=True):
        return self.all_reduce(tensor, op)  # what the others hold afterwards is not said

    def all_gather(self, output, tensor, sync_op=True):
        for part, value in zip(output, self.exchange(tensor.numpy(), list)):
            part.set_value(value)
        return Done()

    def gather(self, tensor, output, destination, *_):
        parts = self.exchange(tensor.numpy(), list)
        if self.own_rank == destination:
            for part, value in zip(output, parts):
                part.set_value(value)
        return Done()

    def broadcast(self, tensor, source, sync_op=True):
        tensor.set_value(self.exchange(tensor.numpy(), lambda values: values[source]))
        return Done()

    def barrier(self, *_, **__):
        self.exchange(None, len)
        return Done()


class Done:
    def wait(self, *_):
        return True

    def is_completed(self):
        return True


def use_gloo():
    # What a process that was forked had read of its environment before.
    dist.parallel._global_parallel_env = dist.ParallelEnv()
    # Plain data parallelism averages gradients in C++, which wants a group of Paddle's own.
    if dist.get_world_size() > 2 or "--tensor_parallel_degree" in sys.argv:
        core.ProcessGroupGloo.create = Hub
    for module in (mp_ops, paddle.distributed.collective):
        module._c_identity, module._mp_allreduce, module._c_concat = c_identity, mp_allreduce, c_concat
    arguments.supports_tensor_parallelism = lambda: True


def main():
    use_gloo()
    hooks.install()
    finetune_generation.main()
    # The run is over and what it wrote is closed. Now and then a gloo thread aborts on the way out,
    # when another process has left before.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
