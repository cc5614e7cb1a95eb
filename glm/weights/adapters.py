"""Adapters (arXiv 2106.09685): found, made, read, split over processes, merged."""

import functools
import os
import re
from pathlib import Path

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers.conversion_utils import split_or_merge_func

from glm.errors import InputError, as_input_error
from glm.weights.formats import find_forms, read_arrays
from glm.weights.loading import fill, load, without_weights

LORA_WEIGHTS = "lora_model_state.pdparams"  # as PaddleNLP calls the file
LORA_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the linears of a layer


def is_split_adapter(name):
    """Whether tensor parallelism splits the adapter weight ``name``.

    It splits B where the linear's outputs are split, and A where its inputs are.
    """
    return ("query_key_value" in name or "h_to_4h" in name) == name.endswith("lora_B")


class LoRA(LoRAModel):
    """PaddleNLP's LoRAModel with adapters that are the same on one process and split over several."""

    # PaddleNLP splits query_key_value's outputs as one process has them, [all q | all k
    # | all v], where the model's parts have them head by head, and on one process it
    # knows no split at all. An adapter trained under tensor parallelism would be
    # another one on a single process.
    def _get_tensor_parallel_mappings(self, config, is_split=True):
        degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
        action = split_or_merge_func(is_split, degree, rank, config.num_attention_heads)
        return {
            name: functools.partial(
                action, is_column=name.endswith("lora_B"), is_old_qkv="query_key_value" in name
            )
            for name in self.state_dict()
            if ".lora_" in name and is_split_adapter(name)
        }

    def get_tensor_parallel_convert_actions(self, config, names, is_split):
        """Return, as a model does, functions by the names of the weights that processes split."""
        return self._get_tensor_parallel_convert_actions(names, is_split, config=config)

    def read_checkpoint(self, checkpoint):
        """Return what weights.fill needs of a checkpoint, where every layout has one file."""
        return [read_arrays(Path(checkpoint, LORA_WEIGHTS))], 1

    def state_dict(self, *args, **kwargs):
        """Return the weights by the names that files have, without this wrapper's prefix."""
        return self.model.state_dict(*args, **kwargs)


def prepare(arguments, name, dtype, degree):
    """Find out whether the run has an adapter, and which model it belongs to.

    ``arguments.lora`` becomes True where ``name`` is the folder of an adapter.

    Args:
        arguments: what holds --lora, --lora_rank and the other flags of adapters.
        name (str): --model_name_or_path, a model or the folder of an adapter.
        dtype (str): of the base's weights. degree (int): of tensor parallelism.

    Returns:
        the name of the model to load, str; the adapter's folder, str, or None for a new
        one; its LoRAConfig, or None where the run has no adapter.

    Raises:
        InputError: where the flags contradict the adapter, or there is none for them.
    """
    if Path(name, "lora_config.json").is_file() and not find_forms(name):
        arguments.lora, folder = True, name
        config = load(LoRAConfig, name, "lora_config.json")
        check_flags(arguments, folder, config)
        base = arguments.lora_base or config.base_model_name_or_path
    elif arguments.lora_base:
        raise InputError(
            f"--lora_base is for an adapter, and --model_name_or_path {name} is none: leave it out"
        )
    elif not arguments.lora:
        if arguments.merge_lora:
            raise InputError(
                f"--merge_lora: there is no adapter in --model_name_or_path {name}, and no --lora True"
            )
        return name, None, None
    else:
        base, folder = name, None
        config = new_lora_config(
            arguments.lora_rank, arguments.lora_alpha, arguments.lora_target_modules, arguments.rslora
        )
    # An absolute path is found from any working directory.
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.dtype, config.tensor_parallel_degree, config.merge_weights = (dtype, degree, False)
    return base, folder, config


def check_flags(arguments, folder, config):
    """Raise InputError where a flag that was given differs from the adapter in ``folder``."""
    modules = arguments.lora_target_modules
    given = {
        "lora_rank": (arguments.lora_rank, config.r),
        "lora_alpha": (arguments.lora_alpha, config.lora_alpha),
        "lora_target_modules": (modules and target_modules(modules), config.target_modules),
        "rslora": (arguments.rslora or None, config.rslora),
    }
    for flag, (value, saved) in given.items():
        if value is not None and value != saved:
            raise InputError(f"--{flag}: the adapter in {folder} has {saved}: leave it out")


def new_lora_config(rank=None, alpha=None, modules=None, rslora=False):
    """Return the LoRAConfig of a new adapter."""
    rank = rank or 8
    return LoRAConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules(modules), rslora=rslora
    )


def target_modules(modules=None):
    """Return the patterns of the linears beside which an adapter stands, list[str]."""
    return [rf".*\.{module}" for module in LORA_MODULES if module in (modules or LORA_MODULES)]


def adapter_shapes(config, lora_config):
    """Return the shapes of an adapter's weights on one process, by name.

    A is [inputs, rank], B is [rank, outputs].
    """
    width, shapes = config.hidden_size, {}
    linears = {
        "attention.query_key_value": (width, 3 * width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (width, 4 * width),
        "mlp.dense_4h_to_h": (4 * width, width),
    }
    for number in range(config.num_layers):
        for linear, (inputs, outputs) in linears.items():
            name = f"glm.transformer.layers.{number}.{linear}"
            if any(re.fullmatch(target, name) for target in lora_config.target_modules):
                shapes[f"{name}.lora_A"] = [inputs, lora_config.r]
                shapes[f"{name}.lora_B"] = [lora_config.r, outputs]
    return shapes


def adapter_weights(folder, config, lora_config, seed):
    """Return an adapter's weights on one process, numpy by name, read from ``folder`` or new.

    A new adapter changes nothing yet and is the same on every layout: A is uniform within
    1 / sqrt(inputs), which is Kaiming's with a slope of sqrt(5), and B is 0.

    Args:
        folder (str): of the adapter, or None. config (GLMConfig): of the base. seed
        (int): of a new one.

    Raises:
        InputError: where the file can't be read or doesn't fit the base.
    """
    shapes = adapter_shapes(config, lora_config)
    if folder is None:
        weights = {}
        for number, (name, shape) in enumerate(shapes.items()):
            bound = shape[0] ** -0.5 if name.endswith("lora_A") else 0.0
            values = np.random.default_rng([seed, number]).uniform(-bound, bound, shape)
            weights[name] = values.astype("float32")
        return weights
    path = Path(folder, LORA_WEIGHTS)
    with as_input_error(f"{path} can't be loaded", "give the folder of a whole adapter"):
        weights = read_arrays(path)
        found = {name: list(weight.shape) for name, weight in weights.items()}
    for name in sorted({*shapes, *found}):
        if found.get(name) != shapes.get(name):
            raise InputError(
                f"the adapter in {folder} is of another base: its {name} is "
                f"{found.get(name, 'missing')}, where {shapes.get(name, 'none')} would fit: "
                "give its own base by --lora_base"
            )
    return weights


def add_lora(model, lora_config, weights):
    """Freeze ``model`` and put an adapter with ``weights`` beside its linears. Returns the LoRA."""
    with without_weights():  # LoRALinear draws a weight before it takes the layer's
        lora = LoRA(model, lora_config)
    fill(lora, [weights], 1)
    return lora


def merge_lora(lora):
    """Add the adapters to the weights beside them, in float32, and remove them. Returns the GLM."""
    for layer in lora.model.sublayers():
        if hasattr(layer, "lora_A"):
            lora_a, lora_b = (layer.lora_A.astype("float32"), layer.lora_B.astype("float32"))
            merged = layer.weight.astype("float32") + paddle.matmul(lora_a, lora_b) * layer.scaling
            layer.weight.set_value(merged.astype(layer.weight.dtype))
            layer.merged = True  # the layer's forward then is a plain linear's
            del layer.lora_A, layer.lora_B
    return lora.model
