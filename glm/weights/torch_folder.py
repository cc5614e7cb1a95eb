"""A model as PyTorch has it: the folder that, beside the published *_glm.py, transformers loads.

It is made from files alone, one weight after the other, so that a model of any size
needs no device and little memory. Weights are written in the type that they were saved
in.
"""

import json

import numpy as np
import paddle.distributed as dist

from glm.outputs.replace import replace_together
from glm.weights.adapters import adapter_weights
from glm.weights.formats import LINEAR, release_pages, write_safetensors
from glm.weights.loading import convert_layout, float32, open_model, saved_dtype

# The classes of the published configuration_glm.py, modeling_glm.py and
# tokenization_glm.py.
AUTO_MAP = {
    "AutoConfig": "configuration_glm.GLMConfig",
    "AutoModel": "modeling_glm.GLMModel",
    "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
}
TOKENIZER_MAP = {"AutoTokenizer": ["tokenization_glm.GLMChineseTokenizer", None]}
CONFIG_KEYS = (
    "attention_dropout_prob",
    "attention_scale",
    "block_position_encoding",
    "checkpoint_num_layers",
    "embedding_dropout_prob",
    "hidden_size",
    "initializer_range",
    "max_sequence_length",
    "model_type",
    "num_attention_heads",
    "num_layers",
    "output_dropout_prob",
    "output_predict",
    "parallel_output",
    "pool_token",
    "relative_encoding",
    "spell_func",
    "spell_length",
    "vocab_size",
)


def export_torch(output_dir, base, config, tokenizer, lora_config=None, adapter=None):
    """Write output_dir/torch/: model.safetensors, config.json and the tokenizer's files.

    The folder is written whole or not at all, by the first process.

    Args:
        base (str): the model to read, a folder or a published name.
        config (GLMConfig): of the base.
        lora_config (LoRAConfig), adapter (str): of the adapter that is merged, and its
            folder, or None.

    Raises:
        InputError: where the base or the adapter can't be read.
    """
    with replace_together(output_dir) as unfinished:
        if dist.get_rank() == 0:
            folder = unfinished / "torch"
            folder.mkdir()
            changes = adapter_weights(adapter, config, lora_config, 0) if lora_config else {}
            path = folder / "model.safetensors"
            dtype = write_weights(path, base, config, changes, lora_config)
            write_config(folder, config, dtype)
            write_tokenizer(folder, tokenizer)


def write_weights(path, base, config, adapter, lora_config):
    """Write the weights of ``base``, with an adapter's arrays merged, by their published names.

    Returns:
        their type as PyTorch calls it, str.
    """
    model, parts, saved_degree = open_model(base, config)
    convert, weights = convert_layout(model, saved_degree), model.state_dict()
    shapes, arrays = {}, parts[0]
    for name, weight in weights.items():
        shape = weight.shape[::-1] if LINEAR.fullmatch(name) else weight.shape
        shapes[name.removeprefix("glm.")] = (arrays[name].dtype, shape)

    def merged_arrays():
        for name in weights:
            array, linear = (convert(name, [part[name] for part in parts]), name.removesuffix(".weight"))
            if f"{linear}.lora_A" in adapter:
                change = adapter[f"{linear}.lora_A"] @ adapter[f"{linear}.lora_B"]
                array = cast(float32(array) + lora_config.scaling * change, array.dtype)
            yield np.ascontiguousarray(array.T if LINEAR.fullmatch(name) else array)
            release_pages(parts[0][name])

    write_safetensors(path, shapes, merged_arrays())
    return saved_dtype(arrays["glm.word_embeddings.weight"])


def cast(array, dtype):
    """Return a float32 array in another type; uint16 stands for bfloat16, rounded to nearest even."""
    if dtype != np.uint16:
        return array.astype(dtype)
    bits = array.view("uint32")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")


def write_config(folder, config, dtype):
    """Write config.json with the published keys."""
    values = {key: getattr(config, key) for key in CONFIG_KEYS if hasattr(config, key)}
    values.update(architectures=["GLMModel"], auto_map=AUTO_MAP, torch_dtype=dtype)
    write_json(folder / "config.json", values)


def write_tokenizer(folder, tokenizer):
    """Write the sentencepiece model, tokenizer_config.json and added_tokens.json."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.update(
        additional_special_tokens=tokenizer.additional_special_tokens,
        auto_map=TOKENIZER_MAP,
        tokenizer_class="GLMChineseTokenizer",
        use_fast=False,
    )
    write_json(path, values)


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
