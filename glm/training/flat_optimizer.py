"""AdamW over a few flat tensors, so that a step on a card launches a few kernels, not some for each weight.

A weight is a view of the flat tensor of its kind. Files of the optimizer's state name each weight, as
those of Paddle's own AdamW do.
"""

from collections.abc import Iterator
from typing import NamedTuple, Optional

import paddle
from paddle import Tensor
from paddle.base.layer_helper import LayerHelper
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear

from glm.device import on_cpu

LINEARS = (paddle.nn.Linear, ColumnParallelLinear, RowParallelLinear)  # with adapters too
ALIGNMENT = 128  # numbers: each weight begins at 256 bytes or more, as memory that it had for itself


class Group(NamedTuple):
    """Weights of one kind.

    Attributes:
        flat: the parameter that the optimizer knows.
        weights: those that lie in it.
        views: where they lie, each of its weight's shape.
        leaves: what gradients come to: the weights, or their copies in half precision.
        padding: zeros that follow each gradient, or None.
        gradient: that of ``flat``. It gets its memory at each step.
        copy: ``flat`` in half precision, of which the leaves are views; None where they are the weights.
    """

    flat: Tensor
    weights: list
    views: list
    leaves: list
    padding: list
    gradient: Tensor
    copy: Optional[Tensor]


def _view(flat: Tensor, begin: int, weight: Tensor) -> Tensor:
    """Return those numbers of ``flat`` that are the ``weight``'s, in its shape and without a copy."""
    return flat._slice(begin, begin + weight.size).reshape(weight.shape)


def _starts(weights: list[Tensor]) -> list[int]:
    """Return where each of the ``weights`` begins in a flat tensor, and where the last one's place ends."""
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + -(-weight.size // ALIGNMENT) * ALIGNMENT)
    return starts


def _make_group(weights: list[Tensor], copy_dtype: Optional[str]) -> Group:
    """Move the ``weights``, of one kind, into a flat parameter; give them copies of a ``copy_dtype``."""
    starts, dtype = _starts(weights), weights[0].dtype
    zero = paddle.nn.initializer.Constant(0.0)
    flat = paddle.create_parameter([starts[-1]], dtype, default_initializer=zero)
    flat.is_distributed, flat.optimize_attr = weights[0].is_distributed, weights[0].optimize_attr
    flat.grad = paddle.zeros([1], dtype)
    gradient = flat._grad_ivar()
    flat.clear_gradient(False)
    gaps = [end - start - weight.size for start, end, weight in zip(starts, starts[1:], weights)]
    padding = [paddle.zeros([gap], copy_dtype or dtype) if gap else None for gap in gaps]
    leaves, copy = weights, None
    with paddle.no_grad():
        views = [_view(flat, start, weight) for start, weight in zip(starts, weights)]
        if copy_dtype:
            copy = paddle.zeros(flat.shape, copy_dtype)
            leaves = [_view(copy, start, weight) for start, weight in zip(starts, weights)]
    for weight, leaf in zip(weights, leaves):
        if copy_dtype:
            leaf.stop_gradient = False
            weight.half_copy = leaf
    return Group(flat, weights, views, leaves, padding, gradient, copy)


class FlatAdamW(paddle.optimizer.AdamW):
    """AdamW whose parameters are flat: it computes what ``optimizer`` would, to the last digit.

    What it leaves to the clipping by the global norm is a sum over other parts. All trained weights
    need a gradient at each step, for one without would decay.

    Args:
        optimizer (AdamW): over a model's weights, new.
        model: the model.
        product_dtype: what linears compute in, if it is not the type of their weights. These get a
            ``half_copy``, made once a step, from which their gradients are taken.

    Attributes:
        weights: those that are trained.
    """

    def __init__(self, optimizer: paddle.optimizer.AdamW, model, product_dtype: Optional[str] = None):
        self.weights = [weight for weight in optimizer._parameter_list if not weight.stop_gradient]
        kinds, decays = {}, optimizer._apply_decay_param_fun
        linears = [layer for layer in model.sublayers() if isinstance(layer, LINEARS)]
        copied = {weight.name for layer in linears for weight in layer.parameters()}
        for weight in self.weights:
            dtype = product_dtype if weight.name in copied else None
            rate = weight.optimize_attr["learning_rate"]  # a factor: LoRA+ has another one for its B
            kind = decays(weight.name), dtype, weight.is_distributed, weight.dtype, rate
            kinds.setdefault(kind, []).append(weight)
        self.groups = [_make_group(weights, dtype) for (_, dtype, *_), weights in kinds.items()]
        decayed = {group.flat.name for group, kind in zip(self.groups, kinds) if kind[0]}
        super().__init__(
            optimizer._learning_rate,
            optimizer._beta1,
            optimizer._beta2,
            optimizer._epsilon,
            parameters=[group.flat for group in self.groups],
            weight_decay=optimizer._weight_decay,
            apply_decay_param_fun=decayed.__contains__,
            grad_clip=optimizer._grad_clip,
            multi_precision=optimizer._multi_precision,
        )
        self.adopt_weights()

    @paddle.no_grad()
    def adopt_weights(self):
        """Make each weight a view of its flat tensor again, where a wrapper has given it other memory."""
        for group in self.groups:
            for weight, view in zip(group.weights, group.views):
                if weight.data_ptr() != view.data_ptr():
                    view.copy_(weight, False)
                    weight.get_tensor()._share_data_with(view.get_tensor())

    @paddle.no_grad()
    def copy_weights(self):
        """Make the copies in half precision anew, of the current weights."""
        for group in self.groups:
            if group.copy is not None:
                paddle.assign(group.flat.astype(group.copy.dtype), group.copy)

    @paddle.no_grad()
    def gather_gradients(self, master: bool):
        """Move the weights' gradients to the flat ones, as float32 if ``master``."""
        for group in self.groups:
            self._gather(group, master)

    @paddle.no_grad()
    def accumulate_gradients(self):
        """Add the copies' gradients to the flat ones, to which another pass would add in half precision."""
        for group in self.groups:
            if group.copy is not None:
                self._gather(group, True)

    def _gather(self, group: Group, master: bool):
        """Move a group's gradients to the flat one, beside what was accumulated before; free them."""
        pieces = []
        for leaf, padding in zip(group.leaves, group.padding):
            pieces.append(leaf._grad_ivar().reshape([-1]))
            if padding is not None:
                pieces.append(padding)
        gradient = paddle.concat(pieces)
        del pieces
        for leaf in group.leaves:
            leaf.clear_gradient(False)
        if (master or group.copy is not None) and gradient.dtype != paddle.float32:
            gradient = gradient.astype("float32")
        accumulated = group.flat._grad_ivar()
        gradient = gradient if accumulated is None else accumulated.add_(gradient)
        # To set .grad would copy it, and wait for the device.
        group.gradient.get_tensor()._share_data_with(gradient.get_tensor())

    def _states(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        """Yield the names, as of a weight, and the tensors that the optimizer has of a group."""
        master = self._master_weights.get(group.flat.name)
        name = group.flat.name if master is None else master.name
        for kind, tensors in self._accumulators.items():
            if name in tensors:
                yield f"{'' if master is None else '_fp32_master_0'}_{kind}_0", tensors[name]

    @paddle.no_grad()
    def state_dict(self) -> dict:
        """Return the state of each weight, as AdamW names it. Its tensors are views."""
        state, masters = {}, {}
        for group in self.groups:
            starts, master = _starts(group.weights), self._master_weights.get(group.flat.name)
            for start, weight in zip(starts, group.weights):
                for ending, tensor in self._states(group):
                    part = tensor if tensor.size == 1 else _view(tensor, start, weight)
                    state[weight.name + ending] = part
                if master is not None:
                    masters[weight.name] = _view(master, start, weight)
                    masters[weight.name].name = f"{weight.name}_fp32_master_0"
        if masters:
            state["master_weights"] = masters
        state["LR_Scheduler"] = self._learning_rate.state_dict()
        return state

    @paddle.no_grad()
    def set_state_dict(self, state: dict):
        """Set the state of each weight to what ``state`` holds, tensors or arrays, as AdamW names it."""
        self.adopt_weights()
        self._learning_rate.set_state_dict(state["LR_Scheduler"])
        self.helper = LayerHelper(type(self).__name__)  # as a step does, where it makes them
        block = paddle.static.default_main_program().global_block()
        self._create_accumulators(block, self._parameter_list)
        masters = state.get("master_weights", {})
        for group in self.groups:
            starts, master = _starts(group.weights), self._master_weights.get(group.flat.name)
            for start, weight in zip(starts, group.weights):
                for ending, tensor in self._states(group):
                    part = tensor if tensor.size == 1 else _view(tensor, start, weight)
                    part.set_value(state[weight.name + ending])
                if master is not None and weight.name in masters:
                    _view(master, start, weight).set_value(masters[weight.name])


def flatten(optimizer: paddle.optimizer.AdamW, model, args) -> paddle.optimizer.AdamW:
    """Return the ``optimizer`` of a run's ``model``, made flat where that saves launches.

    A CPU launches nothing, and to average over processes that share the data takes each gradient.
    """
    if type(optimizer) is not paddle.optimizer.AdamW or on_cpu() or args.dataset_world_size > 1:
        return optimizer
    return FlatAdamW(optimizer, model, args.product_dtype())


def gradients_at_update(setting, trained: float) -> float:
    """Return the bytes of the gradients of ``trained`` weights at the peak of an update.

    Paddle 3 clips in place, and so do fleet's optimizers of several processes in every version. Paddle 2
    alone on one process makes all gradients anew. FlatAdamW copies them, then casts the copy.

    Args:
        setting (glm.training.memory.Setting): of the run.
    """
    size = 4 if setting.master_grad else setting.weight_size
    most = size * (2 if setting.paddle_2 and setting.degree * setting.sharding_degree == 1 else 1)
    if setting.on_cpu or setting.sharding_degree > 1:
        return most * trained
    gathered, size = (2, 4) if setting.half_copies else (setting.weight_size, size)
    before = 4 if setting.half_copies and setting.accumulates else 0  # of the passes before
    return max(most, before + gathered + max(gathered, size)) * trained
