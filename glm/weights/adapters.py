"""Adapters (arXiv 2106.09685): found, made, read, split over processes, merged."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np
import paddle
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration
from paddlenlp.transformers.conversion_utils import split_or_merge_func

from glm.arguments import LORA_MODULES
from glm.device import on_cpu
from glm.errors import InputError, as_input_error
from glm.files import get_typed, read_json, take_known, write_atomically
from glm.processes import is_first_of_run, tensor_parallel_part
from glm.weights.formats import Arrays, find_forms, read_arrays
from glm.weights.loading import (
    LORA_WEIGHTS,
    cast,
    check_array,
    check_finite,
    converted_arrays,
    fill,
    make_model,
    saved_dtype,
    to_float32,
    without_weights,
)
from glm.weights.shapes import adapter_shapes, get_split, matches, weight_shapes

LORA_CONFIG = "lora_config.json"  # as PaddleNLP calls the file
LORA_BASE = "lora_base.json"  # beside it: the fingerprint of the base's weights
MOST_TARGETS = 64

# The keys of a lora_config.json that change what the adapter is: type, least, most.
LORA_KEYS = {
    "r": (int, 1, 1 << 20),
    "lora_alpha": (float, 1e-30, 1e30),
    "lora_dropout": (float, 0, 1),
    "lora_plus_scale": (float, 1e-30, 1e30),
    "rslora": (bool,),
    "target_modules": ((list, str),),
    "base_model_name_or_path": (str,),
}
# Other kinds of adapters, by the keys that are set in their files.
OTHER_KINDS = (
    *("trainable_modules", "trainable_bias", "enable_lora_list", "do_qat", "pissa"),
    *("loraga", "use_mora", "lora_use_mixer"),
)


@dataclasses.dataclass
class Adapter:
    """An adapter that a run begins with.

    Attributes:
        folder: where it lies, or None of a new one.
        config: its LoRAConfig.
        weights: numpy by name, those of one process, or None of a new one.
    """

    folder: Optional[str]
    config: LoRAConfig
    weights: Optional[Arrays] = None


class LoRA(LoRAModel):
    """PaddleNLP's LoRAModel with adapters that are the same on one process and split over several."""

    base_fingerprint = None  # of the base's weights, which is saved beside the adapter

    # PaddleNLP splits query_key_value's outputs as one process has them, [all q | all k | all v], where the
    # model's parts have them head by head, and on one process it knows no split at all. An adapter trained
    # under tensor parallelism would be another one on a single process.
    def _get_tensor_parallel_mappings(self, config, is_split=True):
        degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
        action = split_or_merge_func(is_split, degree, rank, config.num_attention_heads)
        splits = {name: get_split(name) for name in self.state_dict() if ".lora_" in name}
        return {
            name: functools.partial(action, is_column=split[0] == -1, is_old_qkv=split[1])
            for name, split in splits.items()
            if split
        }

    def state_dict(self, *args, **kwargs):
        """Return the weights by the names that files have, without this wrapper's prefix."""
        return self.model.state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the adapter, as PaddleNLP does, and the fingerprint of its base."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.base_fingerprint and kwargs.get("is_main_process", is_first_of_run()):
            text = json.dumps({"weights": self.base_fingerprint})
            write_atomically(Path(save_directory, LORA_BASE), text)


def resolve_adapter(arguments) -> tuple[str, Optional[Adapter]]:
    """Find out whether the run has an adapter, and which model it belongs to.

    Args:
        arguments (ModelArguments): the flags of the model and of its adapter.

    Returns:
        The model to load; the adapter, whose weights are still to be read, or None.

    Raises:
        InputError: where the flags contradict the adapter, or there is none for them.
    """
    name = arguments.model_name_or_path
    if os.path.lexists(Path(name, LORA_CONFIG)) and not find_forms(name):
        with as_input_error(f"{name}/{LORA_CONFIG} can't be loaded", "give the folder of an adapter"):
            config = read_lora_config(name)
        check_flags(arguments, config)
        adapter, base = Adapter(name, config), arguments.lora_base or config.base_model_name_or_path
        if not base:
            raise InputError(f"{name}/{LORA_CONFIG} does not name the adapter's base: give it by --lora_base")
    elif arguments.lora_base:
        raise InputError(
            f"--lora_base is for an adapter, and --model_name_or_path {name} is none: leave it out"
        )
    elif not arguments.lora:
        if arguments.merge_lora:
            raise InputError(
                f"--merge_lora: there is no adapter in --model_name_or_path {name}, and no --lora True"
            )
        return name, None
    else:
        flags = arguments.lora_rank, arguments.lora_alpha, arguments.lora_target_modules, arguments.rslora
        base, config = name, new_lora_config(*flags)
        adapter = Adapter(None, config)
    # An absolute path is found from any working directory.
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    return base, adapter


def read_lora_config(folder: str) -> LoRAConfig:
    """Return the LoRAConfig of the adapter in ``folder``.

    Raises:
        ValueError: where a value is none that an adapter here can have. OSError: where it can't be read.
    """
    values = read_json(Path(folder, LORA_CONFIG))
    known = take_known(values, LORA_KEYS, LoRAConfig)
    others = [key for key in OTHER_KINDS if values.get(key)]
    if others:
        raise ValueError(f"{others[0]!r} is set, which the adapters here have not")
    targets = known.get("target_modules", [])
    targets = known["target_modules"] = [targets] if isinstance(targets, str) else targets
    if not 0 < len(targets) <= MOST_TARGETS or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"'target_modules' is no list of one to {MOST_TARGETS} names")
    for target in targets:
        matches(target, "")
    return LoRAConfig(**known)


def check_flags(arguments, config: LoRAConfig):
    """Raise InputError where a flag that was given differs from the adapter's ``config``."""
    modules = arguments.lora_target_modules
    given = {
        "lora_rank": (arguments.lora_rank, config.r),
        "lora_alpha": (arguments.lora_alpha, config.lora_alpha),
        "lora_target_modules": (modules and target_modules(modules), config.target_modules),
        "rslora": (arguments.rslora or None, config.rslora),
    }
    for flag, (value, saved) in given.items():
        if value is not None and value != saved:
            folder = arguments.model_name_or_path
            raise InputError(f"--{flag}: the adapter in {folder} has {saved}: leave it out")


def new_lora_config(
    rank: Optional[int] = None,
    alpha: Optional[float] = None,
    modules: Optional[list[str]] = None,
    rslora: bool = False,
) -> LoRAConfig:
    """Return the LoRAConfig of a new adapter."""
    rank = rank or 8
    return LoRAConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=target_modules(modules), rslora=rslora
    )


def target_modules(modules: Optional[list[str]] = None) -> list[str]:
    """Return the patterns of the linears beside which an adapter stands."""
    return [rf".*\.{module}" for module in LORA_MODULES if module in (modules or LORA_MODULES)]


def read_adapter_weights(folder: str, config: GLMConfig, lora_config: LoRAConfig) -> Arrays:
    """Return the weights of the adapter in ``folder``, beside a base of ``config``, those of one process.

    Raises:
        InputError: where the file can't be read or doesn't fit the base.
    """
    shapes, path = adapter_shapes(config, lora_config), Path(folder, LORA_WEIGHTS)
    with as_input_error(f"{path} can't be loaded", "give the folder of a complete adapter"):
        if not shapes:
            raise ValueError(f"its target_modules are no linears of a GLM: {', '.join(LORA_MODULES)}")
        weights = read_arrays(path)
        found = {name: list(weight.shape) for name, weight in weights.items()}
        for name in sorted({*shapes, *found}):
            if found.get(name) != shapes.get(name):
                raise InputError(
                    f"the adapter in {folder} is of another base: its {name} is "
                    f"{found.get(name, 'missing')}, where {shapes.get(name, 'none')} would fit: "
                    "give its own base by --lora_base"
                )
        for name, shape in shapes.items():
            check_array(name, weights[name], shape)
            check_finite(name, weights[name])
    return weights


def new_adapter_weights(config: GLMConfig, lora_config: LoRAConfig, seed: int) -> Arrays:
    """Return the weights of a new adapter, which changes nothing yet and is the same on every layout.

    A is uniform within 1 / sqrt(inputs), which is Kaiming's with a slope of sqrt(5), and B is 0.
    """
    weights = {}
    for number, (name, shape) in enumerate(adapter_shapes(config, lora_config).items()):
        bound = shape[0] ** -0.5 if name.endswith("lora_A") else 0.0
        values = np.random.default_rng([seed, number]).uniform(-bound, bound, shape)
        weights[name] = values.astype("float32")
    return weights


def check_base(folder: str, base: str, fingerprint: Optional[str]):
    """Raise InputError where the adapter in ``folder`` was trained beside other weights than the base's.

    Adapters of older versions, and those of published names, have no fingerprint and pass.
    """
    path = Path(folder, LORA_BASE)
    if not os.path.lexists(path):
        return
    with as_input_error(f"{path} can't be read", "remove it if the adapter's base is the right one"):
        expected = get_typed(read_json(path), "weights", str)
    if None not in (expected, fingerprint) and expected != fingerprint:
        raise InputError(
            f"the adapter in {folder} was trained beside other weights than those in its base {base}, which "
            f"have changed since or are another model's: give its own base by --lora_base, or remove {path} "
            "if they are the same in another file"
        )


def add_lora(model: GLMForConditionalGeneration, pretrained, seed: int) -> LoRA:
    """Freeze ``model`` and put the adapter of a Pretrained beside its linears, a new one by ``seed``."""
    adapter, (_, degree) = pretrained.adapter, tensor_parallel_part(model.config)
    config = dataclasses.replace(
        adapter.config, dtype=model.config.dtype, tensor_parallel_degree=degree, merge_weights=False
    )
    weights = adapter.weights or new_adapter_weights(model.config, config, seed)
    # They are small: cast here, for a card would launch some kernels for each.
    weights = {name: cast(to_float32(weight), config.dtype) for name, weight in weights.items()}
    with without_weights():  # LoRALinear draws a weight before it takes the layer's
        lora = LoRA(model, config)
    lora.base_fingerprint = pretrained.base_fingerprint
    fill(lora, [weights], 1)
    return lora


def merged_arrays(pretrained, dtype: Optional[str] = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights of a Pretrained for one process, its adapter's merged, one after the other.

    They are made from the files alone. A model in int8 is merged so.

    Args:
        pretrained (Pretrained): the model.
        dtype: of the arrays; by default that of the files.

    Raises:
        InputError: where a sum is no number of its type.
    """
    parts, adapter, changes = pretrained.arrays, pretrained.adapter, {}
    if adapter:
        changes = adapter.weights or new_adapter_weights(pretrained.config, adapter.config, seed=0)
    arrays = converted_arrays(pretrained.config, parts, len(parts), weight_shapes(pretrained.config))
    advice = "give other weights, or have another type: --bf16 True, or none of --fp16 and --bf16"
    with as_input_error(f"{pretrained.location}: its weights can't be written", advice, ValueError):
        for name, of_file in arrays:
            array, linear, saved = of_file, name.removesuffix(".weight"), dtype or saved_dtype(of_file)
            if saved != saved_dtype(array):
                array = cast(to_float32(array), saved)
            if f"{linear}.lora_A" in changes:
                a, b = (to_float32(changes[f"{linear}.lora_{matrix}"]) for matrix in "AB")
                array = cast(to_float32(array) + adapter.config.scaling * (a @ b), saved)
            if array is not of_file:
                check_finite(name, array)
            yield name, array


def save_merged(folder: Path, pretrained, dtype: str):
    """Write a Pretrained with its adapter in the weights of its files, as a model of the type ``dtype``."""
    if is_first_of_run():
        weights = {name: np.array(array) for name, array in merged_arrays(pretrained, dtype)}
        paddle.save(weights, str(folder / "model_state.pdparams"))
        model = make_model(pretrained.config, dtype)
        model.config.architectures = [type(model).__name__]  # as PaddleNLP's save_pretrained writes it
        for part in (model.config, model.generation_config, pretrained.tokenizer):
            part.save_pretrained(str(folder))


def merge_lora(lora: LoRA) -> GLMForConditionalGeneration:
    """Add the adapters to the weights beside them, in float32, and remove them. Returns the GLM."""
    for layer in lora.model.sublayers():
        if hasattr(layer, "lora_A"):
            lora_a, lora_b = (layer.lora_A.astype("float32"), layer.lora_B.astype("float32"))
            merged = layer.weight.astype("float32") + paddle.matmul(lora_a, lora_b) * layer.scaling
            layer.weight.set_value(merged.astype(layer.weight.dtype))
            layer.merged = True  # the layer's forward then is a plain linear's
            del layer.lora_A, layer.lora_B
    return lora.model


def merge_for_decoding(model: LoRA, pretrained):
    """Merge the adapter of ``model``, made of a Pretrained: decoding then takes fewer products.

    On a card they take a third of the time of a token. A CPU gains little, and int8 can't be merged into.
    """
    if pretrained.adapter and not (pretrained.quantized or on_cpu()):
        merge_lora(model)
