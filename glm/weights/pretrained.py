"""A model to start from: a folder or a published name, found and checked once, before anything heavy.

What a folder's files say is not trusted. Of each JSON file the known keys are taken, by their types and
ranges, and the config and the tokenizer are made of them; no file sets an attribute, names a class or a
path. The weights are mapped, and compared with the config before they take memory.
"""

import dataclasses
import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np
from paddlenlp.transformers import (
    GLMChineseTokenizer,
    GLMConfig,
    GLMForConditionalGeneration,
    GLMTokenizer,
    PretrainedTokenizer,
)
from paddlenlp.transformers.tokenizer_utils_base import AddedToken
from paddlenlp.utils.log import logger

from glm.errors import InputError, as_input_error, printable
from glm.files import check_text, open_regular, read_json, take_known
from glm.outputs.layout import WEIGHTS, find
from glm.outputs.replace import check_complete
from glm.templates import DEFAULTS as TEMPLATES
from glm.templates import get_templates
from glm.weights.adapters import Adapter, check_base, read_adapter_weights, resolve_adapter
from glm.weights.formats import check_pointer, find_forms, read_file
from glm.weights.loading import check_weights
from glm.weights.pieces import check_pieces

SAMPLES, SAMPLE_SIZE = 256, 1 << 16  # of a file of weights: how many parts are read, and their bytes
ADVICE = (
    "a published model's name, if its host can be reached, or a folder with config.json, "
    "weights (model_state.pdparams, model.safetensors or pytorch_model.bin) and the tokenizer"
)

# The keys of a config.json that make a GLM: type, least, most. All others are left out.
CONFIG_KEYS = {
    "num_layers": (int, 1, 10_000),
    "hidden_size": (int, 1, 1 << 20),
    "num_attention_heads": (int, 1, 1 << 20),
    "vocab_size": (int, 1, 1 << 30),
    "max_sequence_length": (int, 1, 1 << 30),
    "embedding_dropout_prob": (float, 0, 1),
    "attention_dropout_prob": (float, 0, 1),
    "output_dropout_prob": (float, 0, 1),
    "layernorm_epsilon": (float, 0, 1),
    "initializer_range": (float, 0, 1),
    "attention_scale": (float, 1e-6, 1e6),
    "checkpoint_num_layers": (int, 0, 10_000),
    "block_position_encoding": (bool,),
    "output_predict": (bool,),
    "parallel_output": (bool,),
    "relative_encoding": (bool,),
    "use_scaled_init_for_output_weights": (bool,),
    "pool_token": (str,),
    "spell_func": (str,),
    "spell_length": (int, 0, 1 << 30),
}

TOKENIZER_CLASS = "GLMChineseTokenizer"
SENTENCEPIECE = GLMChineseTokenizer.resource_files_names["model_file"]
LARGEST_SENTENCEPIECE = 1 << 26  # bytes: the published one has a million
MOST_TOKENS = 1000  # beside the pieces: the published tokenizer has ten
LONGEST_TOKEN = 200  # characters: each takes a dict of the tokenizer's
TOKEN_KEYS = {
    **dict.fromkeys(GLMChineseTokenizer.SPECIAL_TOKENS_ATTRIBUTES[:7], ((str, dict),)),
    "additional_special_tokens": (list,),
}
TOKENIZER_KEYS = {
    **TOKEN_KEYS,
    "model_max_length": ((int, float), 1, 1e300),
    "padding_side": (str,),
    "truncation_side": (str,),
    **dict.fromkeys(TEMPLATES, (str,)),
}
# The published tokens beside the pieces: the first one's id is the number of pieces.
PUBLISHED_TOKENS = (
    *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
    *("<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
)


@dataclasses.dataclass
class Pretrained:
    """A GLM to start from. ``find_pretrained`` makes it.

    Attributes:
        name: --model_name_or_path: a model, or the folder of an adapter.
        base: the model whose weights are read, a folder or a published name.
        location: what a message calls it.
        config: of the base.
        tokenizer: of the model ``name``.
        adapter: that the run begins with, or None.
        quantized: whether its linears are loaded in int8.
    """

    name: str
    base: str
    location: str
    config: GLMConfig
    tokenizer: PretrainedTokenizer
    adapter: Optional[Adapter] = None
    quantized: bool = False

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights: one, or one of each tensor-parallel process that wrote them."""
        if not Path(self.base).is_dir():
            # The one way to PaddleNLP's cache of published models. PyTorch's files are read here, not
            # converted.
            file, *_ = GLMForConditionalGeneration._resolve_model_file_path(
                self.base, convert_from_torch=True
            )
            return [Path(file)]
        forms = find_forms(self.base)
        if not forms:
            raise ValueError(
                "it has no model_state.pdparams, model.safetensors or pytorch_model.bin, nor shards of one"
            )
        for form in forms[1:]:
            logger.train(f"{self.base} holds {form[0].name} too: {forms[0][0].name} is read")
        return forms[0]

    @cached_property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """The weights by the model's names, mapped to the ``files``, one dict a file.

        Raises:
            InputError: where they can't be read, or are not exactly the model's.
        """
        with self.reading_weights():
            parts = []
            for path in self.files:
                part = read_file(path)  # of a GLMModel, its names lack the prefix
                parts.append({f"glm.{name.removeprefix('glm.')}": array for name, array in part.items()})
            check_weights(self.config, parts)
        return parts

    def reading_weights(self):
        """Return a context that turns what is wrong with the weights into an InputError."""
        advice = "give the complete files of one model" if Path(self.base).is_dir() else f"give {ADVICE}"
        return as_input_error(f"{self.location}: its weights can't be loaded", advice)

    @cached_property
    def base_fingerprint(self) -> Optional[str]:
        """The fingerprint of the base's weights, which an adapter keeps; None of a published name."""
        with self.reading_weights():
            return compute_fingerprint([self.base])

    @cached_property
    def fingerprint(self) -> Optional[str]:
        """The fingerprint of all weights that the run begins with; None of a published name."""
        if self.adapter is None or self.adapter.folder is None:
            return self.base_fingerprint
        with self.reading_weights():
            return compute_fingerprint([self.adapter.folder, self.base])

    def trained_in(self, folder) -> "Pretrained":
        """Return this model with the weights, or the adapter, that training has written into ``folder``."""
        if self.adapter is None:
            return dataclasses.replace(self, base=str(folder))
        weights = read_adapter_weights(str(folder), self.config, self.adapter.config)
        adapter = dataclasses.replace(self.adapter, folder=str(folder), weights=weights)
        return dataclasses.replace(self, adapter=adapter)


def find_pretrained(arguments) -> Pretrained:
    """Find the model that a run begins with, and check all that can be wrong with it.

    Of a published name the weights are read when they are needed: they may have to be downloaded.

    Args:
        arguments (ModelArguments): the flags of the model and of its adapter.

    Raises:
        InputError: where there is no such model, where a file of it is not as it has to be, or where the
            flags contradict its adapter.
    """
    name = arguments.model_name_or_path
    check_complete(name)
    base, adapter = resolve_adapter(arguments)
    location, advice = f"--model_name_or_path {name}", f"give {ADVICE}"
    if base != name:
        check_complete(base)
        location, advice = f"{location}: its base {base}", f"give by --lora_base {ADVICE}"
    with as_input_error(f"{location}: its config.json can't be loaded", advice):
        config = read_config(base, location)
    quantized = arguments.weight_quantize_algo is not None
    pretrained = Pretrained(name, base, location, config, read_tokenizer(name, config), adapter, quantized)
    if Path(base).is_dir():
        pretrained.arrays  # noqa: B018 what is wrong with them is an InputError here
    if adapter and adapter.folder:
        adapter.weights = read_adapter_weights(adapter.folder, config, adapter.config)
        check_base(adapter.folder, base, pretrained.base_fingerprint)
    return pretrained


def check_trainable(pretrained: Pretrained):
    """Raise InputError where the model is one that can't be trained."""
    if pretrained.quantized and pretrained.adapter is None:
        raise InputError(
            "--weight_quantize_algo: weights in int8 can't be trained, but an adapter beside them can: add "
            "--lora True, or leave --weight_quantize_algo out"
        )


def read_config(name: str, location: str) -> GLMConfig:
    """Return the config of a folder or a published name. Raises InputError or ValueError."""
    if not os.path.isdir(name):
        if name not in GLMConfig.pretrained_init_configuration:
            raise ValueError("there is no such folder, and PaddleNLP publishes no GLM of this name")
        return GLMConfig.from_pretrained(name)
    values = read_json(Path(name, "config.json"))
    kinds = take_known(values, {"model_type": (str,), "architectures": (list,)})
    model_type, classes = kinds.get("model_type", "glm"), kinds.get("architectures", [])
    others = [kind for kind in classes if not str(kind).startswith("GLM")]
    if model_type != "glm" or others:
        kind = printable(str(others[0] if model_type == "glm" else model_type), 80)
        raise InputError(f"{location} is no GLM, but a {kind}: give one such as THUDM/glm-large-chinese")
    known = take_known(values, {**CONFIG_KEYS, "num_hidden_layers": (int, 1, 10_000)}, GLMConfig)
    layers = known.pop("num_hidden_layers", None)  # another name of the same
    config = GLMConfig(**{**({"num_layers": layers} if layers else {}), **known})
    if config.block_position_encoding is not True or config.relative_encoding:
        raise ValueError("block_position_encoding has to be true, and relative_encoding false")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return config


def check_lengths(pretrained: Pretrained, src_length: int, generation, degree: int):
    """Raise InputError where the model is none for these lengths, beams and processes.

    Args:
        pretrained: the model.
        src_length: most tokens of a source.
        generation (GenerationArguments): of beam search.
        degree: of tensor parallelism.
    """
    config, base = pretrained.config, pretrained.base
    if config.num_attention_heads % degree or config.vocab_size % degree:
        raise InputError(
            f"--tensor_parallel_degree {degree} does not divide the {config.num_attention_heads} attention "
            f"heads and {config.vocab_size} vocabulary entries of {base}: give one that does"
        )
    if src_length + generation.tgt_length > config.max_sequence_length:
        raise InputError(
            f"--src_length {src_length} + --tgt_length {generation.tgt_length} is over the "
            f"{config.max_sequence_length} positions of {base}: lower one of them"
        )
    if generation.num_beams > config.vocab_size:
        raise InputError(
            f"--num_beams {generation.num_beams} is over the {config.vocab_size} entries of the "
            "vocabulary: lower it"
        )


def read_tokenizer(name: str, config: GLMConfig) -> PretrainedTokenizer:
    """Return the tokenizer of a folder or a published name.

    Raises:
        InputError: where a file of it is missing or not as it has to be, where it is an English one, or
            where its ids are not those that the model was trained with.
    """
    where = f"--model_name_or_path {name}"
    if not os.path.isdir(name):
        with as_input_error(f"{where}: its tokenizer can't be loaded", f"give {ADVICE}"):
            tokenizer, own_ids = GLMTokenizer.from_pretrained(name), {}
            check_tokenizer_class(type(tokenizer).__name__, where)
    else:
        tokenizer, own_ids = make_tokenizer(Path(name), config, where)
    # A vocabulary is padded to a multiple of a power of two; else added_tokens.json has to say the ids.
    size, most = len(tokenizer), config.vocab_size
    if size > most or (not own_ids and most - size >= most & -most):
        raise InputError(
            f"{where}: its tokenizer has {size} entries, its model {most}: they are not of one model: copy "
            f"{SENTENCEPIECE} and added_tokens.json from the model that this one was made from"
        )
    pieces = tokenizer.vocab_size
    published_ids = {token: pieces + number for number, token in enumerate(PUBLISHED_TOKENS)}
    for role, token in (("cls_token", "[CLS]"), ("eos_token", "<|endoftext|>")):
        if getattr(tokenizer, role) != token:
            raise InputError(
                f"{where}: its {role} is {getattr(tokenizer, role)}, and the model was trained with {token}: "
                "copy tokenizer_config.json and special_tokens_map.json from the model that it was made from"
            )
    for token, expected in {tokenizer.pad_token: None, **published_ids, **own_ids}.items():
        index = tokenizer.convert_tokens_to_ids(token)
        if index >= pieces and index != expected:
            raise InputError(
                f"{where}: its tokenizer gives {token} the id {index}, which is not what the model was "
                "trained with: copy added_tokens.json from the model that this one was made from"
            )
    return tokenizer


def check_tokenizer_class(class_name: str, where: str):
    """Raise InputError where a tokenizer's class is an English one, ValueError where it is unknown."""
    if class_name in ("GLMGPT2Tokenizer", "GLMBertTokenizer"):
        raise InputError(
            f"{where} is an English GLM, whose {class_name} knows no Chinese: give a Chinese one, such as "
            "THUDM/glm-large-chinese"
        )
    if class_name != TOKENIZER_CLASS:
        raise ValueError(f"tokenizer_class is {class_name}: it must be {TOKENIZER_CLASS}")


def make_tokenizer(folder: Path, config: GLMConfig, where: str):
    """Make the tokenizer of a folder, as its class's from_pretrained does, of keys that are known.

    PaddleNLP's sets every key of special_tokens_map.json as an attribute, and takes paths from others.

    Returns:
        The tokenizer; the ids that the folder's own files give, dict.
    """
    advice = "copy it from the model that this one was made from"

    def read(file):
        if not os.path.lexists(folder / file):
            return {}
        with as_input_error(f"{where}: its tokenizer can't be loaded: {file}", advice):
            return read_json(folder / file)

    for file in ("tokenizer_config.json", SENTENCEPIECE):
        if not os.path.lexists(folder / file):
            raise InputError(f"{where}: its tokenizer can't be loaded: {file} is missing: {advice}")
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    values, special_tokens, added_tokens = map(read, files)
    with as_input_error(f"{where}: its tokenizer can't be loaded", advice):
        check_tokenizer_class(str(values.get("tokenizer_class")), where)
        settings = take_known(values, TOKENIZER_KEYS, GLMChineseTokenizer)
        if unknown := special_tokens.keys() - TOKEN_KEYS.keys():
            raise ValueError(f"{min(unknown)!r} in special_tokens_map.json is no special token")
        settings.update(take_known(special_tokens, TOKEN_KEYS))
        for key in settings.keys() & TOKEN_KEYS.keys():
            settings[key] = as_token(settings[key], key)
        for token, index in added_tokens.items():
            if type(index) is not int or index < 0:
                raise ValueError("added_tokens.json is no table of ids by token")
            as_token(token, "added_tokens.json")
        count = len(added_tokens) + len(settings.get("additional_special_tokens", ()))
        if count > min(MOST_TOKENS, config.vocab_size):
            raise ValueError(f"it has {count} tokens beside its pieces")
        path = folder / SENTENCEPIECE
        check_pointer(path)
        if path.stat().st_size > LARGEST_SENTENCEPIECE:
            raise ValueError(f"{path.name} is larger than {LARGEST_SENTENCEPIECE >> 20} MiB")
        tokenizer = GLMChineseTokenizer(model_file=str(path), **settings)
        check_pieces(tokenizer.sp_model)
        for token, index in sorted(added_tokens.items(), key=lambda item: item[1]):
            if index != len(tokenizer):
                raise ValueError(f"added_tokens.json gives {token!r} the id {index}, not {len(tokenizer)}")
            tokenizer.add_tokens(token, special_tokens=token in tokenizer.all_special_tokens)
        tokenizer.sanitize_special_tokens()
        get_templates(tokenizer)  # which are checked
    return tokenizer, added_tokens


def as_token(value, key: str):
    """Return a special token of a JSON file as the tokenizer takes it: text, an AddedToken or a list."""
    if isinstance(value, list):
        return [as_token(item, key) for item in value]
    if isinstance(value, dict):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), (bool,))
        value = AddedToken(**take_known(value, {"content": (str,), **flags}))
    text = getattr(value, "content", value)
    if not (isinstance(text, str) and 0 < len(check_text(text, key)) <= LONGEST_TOKEN):
        raise ValueError(f"{key!r} is no text of a token")
    return value


def compute_fingerprint(folders: list[str]) -> Optional[str]:
    """Return BLAKE2b of the files of weights in ``folders``, or None where one of them is no folder.

    Of a large file it takes SAMPLES parts that lie evenly in it: a model's training changes all.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        paths = find(folder, WEIGHTS)
        if not paths:
            return None
        for path in paths:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(b"%d " % size)
                for start in range(0, size, max(size // SAMPLES, SAMPLE_SIZE)):
                    file.seek(start)
                    digest.update(file.read(SAMPLE_SIZE))
    return digest.hexdigest()
