"""finetune_generation.py over gloo: one process of a launch on CPUs.

Paddle's tensor-parallel layers have no CPU kernels for their collectives. Here, and only here, those are replaced by
PyLayers over paddle.distributed's all_reduce and all_gather, which gloo has.

python -m paddle.distributed.launch --nproc_per_node 2 tests/parallel_worker.py (arguments of finetune_generation.py)
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune_generation  # isort:skip  prepares the CPU before paddle loads

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import tensor_parallel
from paddle.distributed.fleet.utils import hybrid_parallel_util


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


def use_gloo():
    create = paddle.base.core.ProcessGroupGloo.create

    def create_in_turn(store, rank, world_size, group_id):
        time.sleep(0.25 * rank)
        return create(store, rank, world_size, group_id)

    paddle.base.core.ProcessGroupGloo.create = create_in_turn
    for module in (mp_ops, paddle.distributed.collective):
        module._c_identity, module._mp_allreduce, module._c_concat = c_identity, mp_allreduce, c_concat
    for module in (tensor_parallel, hybrid_parallel_util):
        module.broadcast_input_data = lambda hcg, *inputs, **kwargs: (inputs, kwargs)


if __name__ == "__main__":
    use_gloo()
    if os.environ.get("WORKER_HOOK"):  # a test's own addition
        exec(compile(Path(os.environ["WORKER_HOOK"]).read_text(), os.environ["WORKER_HOOK"], "exec"))
    finetune_generation.main()
