"""Adapters: made, read, split, merged."""

import functools
import glob
import os
import re

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers.conversion_utils import split_or_merge_func

from glm.errors import InputError
from glm.weights import cast_weights, load, read_arrays

LORA_WEIGHTS = "lora_model_state.pdparams"  # as PaddleNLP calls the file
LORA_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the linears of a layer


def is_split_adapter(name):
    """Whether tensor parallelism splits this weight of an adapter: B where outputs are split, A where inputs are."""
    return ("query_key_value" in name or "h_to_4h" in name) == name.endswith("lora_B")


class LoRA(LoRAModel):
    """PaddleNLP's low-rank adapters (arXiv 2106.09685), which are the same on one process and split over several."""

    # Its own split cuts query_key_value's output where one process has it, [all q | all k | all v], but the model's
    # parts have it by heads: an adapter trained with tensor parallelism would be another one on a single process, where
    # it knows no split at all.
    def _get_tensor_parallel_mappings(self, config, is_split=True):
        action = split_or_merge_func(
            is_split, config.tensor_parallel_degree, config.tensor_parallel_rank, config.num_attention_heads
        )
        return {
            name: functools.partial(
                action, is_column=name.endswith("lora_B"), is_old_qkv="query_key_value" in name
            )
            for name in self.state_dict()
            if ".lora_" in name and is_split_adapter(name)
        }

    def get_tensor_parallel_convert_actions(self, config, names, is_split):
        """As the models have it: functions by the names of the weights that are split over processes."""
        return self._get_tensor_parallel_convert_actions(names, is_split, config=config)

    def read_checkpoint(self, checkpoint):
        """This process's weights in a checkpoint, numpy by name: one file on every layout."""
        return self.split(read_arrays(os.path.join(checkpoint, LORA_WEIGHTS)))

    def state_dict(self, *args, **kwargs):
        """By the names that its files have, not by those below this wrapper."""
        return self.model.state_dict(*args, **kwargs)

    def split(self, weights):
        """This process's part of an adapter's ``weights``, both numpy by name."""
        return (
            self._convert_tensor_parallel(dict(weights))
            if self.lora_config.tensor_parallel_degree > 1
            else weights
        )


def find_base(lora_args, name):
    """The folder of the adapter that ``name`` is, or None, and the name of the model to load."""
    if os.path.isfile(os.path.join(name, "lora_config.json")) and not glob.glob(
        os.path.join(glob.escape(name), "model_state*")
    ):
        lora_args.lora = True
        return name, lora_args.lora_base or load(LoRAConfig, name, "lora_config.json").base_model_name_or_path
    if lora_args.lora_base:
        raise InputError(
            f"--lora_base is for an adapter, and --model_name_or_path {name} is none: leave it out"
        )
    if lora_args.merge_lora and not lora_args.lora:
        raise InputError(
            f"--merge_lora: there is no adapter in --model_name_or_path {name}, and no --lora True"
        )
    return None, name


def new_lora_config(rank=None, alpha=None, modules=None, rslora=False):
    """The LoRAConfig of a new adapter."""
    rank = rank or 8
    return LoRAConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules(modules), rslora=rslora
    )


def target_modules(modules=None):
    """The patterns of the linears beside which an adapter stands, list[str]."""
    return [rf".*\.{module}" for module in LORA_MODULES if module in (modules or LORA_MODULES)]


def make_lora_config(lora_args, adapter, base, dtype, degree):
    """The LoRAConfig of the folder ``adapter``, or of a new one where it is None."""
    modules = lora_args.lora_target_modules
    if adapter is None:
        config = new_lora_config(lora_args.lora_rank, lora_args.lora_alpha, modules, lora_args.rslora)
    else:
        config = load(LoRAConfig, adapter, "lora_config.json")
        for name, given, own in (
            ("lora_rank", lora_args.lora_rank, config.r),
            ("lora_alpha", lora_args.lora_alpha, config.lora_alpha),
            ("lora_target_modules", modules and target_modules(modules), config.target_modules),
            ("rslora", lora_args.rslora or None, config.rslora),
        ):
            if given is not None and given != own:
                raise InputError(f"--{name}: the adapter in {adapter} has {own}: leave it out")
    # A folder is found from anywhere.
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.dtype, config.tensor_parallel_degree, config.merge_weights = dtype, degree, False
    return config


def adapter_shapes(config, lora_config):
    """The shapes of an adapter's weights on one process, by name: A [inputs, rank] and B [rank, outputs]."""
    width, shapes = config.hidden_size, {}
    linears = {
        "attention.query_key_value": (width, 3 * width), "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (width, 4 * width), "mlp.dense_4h_to_h": (4 * width, width),
    }  # fmt: skip
    for number in range(config.num_layers):
        for linear, (inputs, outputs) in linears.items():
            name = f"glm.transformer.layers.{number}.{linear}"
            if any(re.fullmatch(target, name) for target in lora_config.target_modules):
                shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = (
                    [inputs, lora_config.r],
                    [lora_config.r, outputs],
                )
    return shapes


def new_adapter(config, lora_config, seed):
    """Weights of an adapter that changes nothing yet, numpy by name, the same on every layout.

    A is uniform within 1 / sqrt(inputs), which is Kaiming's with a slope of sqrt(5), and B is 0.
    """
    weights = {}
    for number, (name, shape) in enumerate(adapter_shapes(config, lora_config).items()):
        most = shape[0] ** -0.5 if name.endswith("lora_A") else 0.0
        weights[name] = np.random.default_rng([seed, number]).uniform(-most, most, shape).astype("float32")
    return weights


def read_adapter(folder, config, lora_config):
    """The weights of the adapter in ``folder``, numpy by name. Raises InputError where they don't fit the base."""
    path = os.path.join(folder, LORA_WEIGHTS)
    try:
        weights = paddle.load(path, return_numpy=True)
        found = {name: list(weight.shape) for name, weight in weights.items()}
    except Exception as error:  # paddle.load raises many kinds
        raise InputError(
            f"{path} can't be loaded ({str(error)[:200]}): give the folder of a whole adapter"
        ) from error
    shapes = adapter_shapes(config, lora_config)
    for name in sorted({*shapes, *found}):
        if found.get(name) != shapes.get(name):
            raise InputError(
                f"the adapter in {folder} is of another base: its {name} is {found.get(name, 'missing')}, where "
                f"{shapes.get(name, 'none')} would fit: give its own base by --lora_base"
            )
    return weights


def add_lora(model, lora_config, weights):
    """Freeze ``model`` and put an adapter with ``weights`` beside its linears. Returns the LoRA."""
    lora = LoRA(model, lora_config)
    lora.set_state_dict(cast_weights(lora.split(weights), model))
    return lora


def merge_lora(lora):
    """Add the adapters to the weights they stand beside, in float32, and take them away. Returns the GLM."""
    for layer in lora.model.sublayers():
        if hasattr(layer, "lora_A"):
            change = (
                paddle.matmul(layer.lora_A.astype("float32"), layer.lora_B.astype("float32")) * layer.scaling
            )
            layer.weight.set_value((layer.weight.astype("float32") + change).astype(layer.weight.dtype))
            layer.merged = True  # its forward then is that of the plain layer
            del layer.lora_A, layer.lora_B
    return lora.model
