"""A model as PyTorch has it: the folder that, beside the published *_glm.py, transformers loads.

It is made from files alone, one weight after the other, so that a model of any size needs no device and
little memory. Weights are written in the type that they were saved in.
"""

import numpy as np

from glm.files import dump_json, read_json
from glm.outputs.folder import RunFolder
from glm.outputs.layout import TORCH
from glm.processes import is_first_of_run
from glm.weights.adapters import merged_arrays
from glm.weights.formats import LINEAR, write_safetensors
from glm.weights.loading import saved_dtype
from glm.weights.pretrained import CONFIG_KEYS
from glm.weights.shapes import weight_shapes

# The classes of the published configuration_glm.py, modeling_glm.py and tokenization_glm.py.
AUTO_MAP = {
    "AutoConfig": "configuration_glm.GLMConfig",
    "AutoModel": "modeling_glm.GLMModel",
    "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_glm.GLMChineseTokenizer", None]}
# PaddleNLP's keys that the published config.json has not.
NOT_PUBLISHED = ("layernorm_epsilon", "use_scaled_init_for_output_weights")


def export_torch(run_folder: RunFolder, pretrained):
    """Write output_dir/torch/: model.safetensors, config.json and the tokenizer's files.

    The folder of a Pretrained, its adapter merged, is written completely or not at all, by the first process.

    Raises:
        InputError: where the model can't be read.
    """
    with run_folder.replacing() as staging:
        if is_first_of_run():
            folder = staging / TORCH
            folder.mkdir()
            dtype = write_weights(folder / "model.safetensors", pretrained)
            write_config(folder, pretrained.config, dtype)
            write_tokenizer(folder, pretrained.tokenizer)


def write_weights(path, pretrained) -> str:
    """Write the weights of a Pretrained, its adapter's merged, by their published names.

    Returns:
        Their type as PyTorch calls it.
    """
    (part, *_), shapes = pretrained.arrays, {}
    for name, shape in weight_shapes(pretrained.config).items():
        shape = shape[::-1] if LINEAR.fullmatch(name) else shape
        shapes[name.removeprefix("glm.")] = (part[name].dtype, shape)
    merged = merged_arrays(pretrained)
    arrays = (np.ascontiguousarray(array.T if LINEAR.fullmatch(name) else array) for name, array in merged)
    write_safetensors(path, shapes, arrays)
    return saved_dtype(part["glm.word_embeddings.weight"])


def write_config(folder, config, dtype: str):
    """Write config.json with the published keys."""
    values = {key: getattr(config, key) for key in CONFIG_KEYS if key not in NOT_PUBLISHED}
    values.update(model_type="glm", architectures=["GLMModel"], auto_map=AUTO_MAP, torch_dtype=dtype)
    write_json(folder / "config.json", values)


def write_tokenizer(folder, tokenizer):
    """Write the sentencepiece model, tokenizer_config.json and added_tokens.json."""
    tokenizer.save_pretrained(str(folder))
    values = read_json(folder / "tokenizer_config.json")
    values.update(
        additional_special_tokens=tokenizer.additional_special_tokens,
        auto_map=TOKENIZER_MAP,
        tokenizer_class="GLMChineseTokenizer",
        use_fast=False,
    )
    write_json(folder / "tokenizer_config.json", values)


def write_json(path, values: dict):
    """Write ``values`` as a JSON file that people read."""
    path.write_text(dump_json(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
