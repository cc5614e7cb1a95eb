"""A model folder of a stranger: one line, nothing of its own carried out; and folders as people have them."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import TINY_GLM, generation_arguments, lora_config, pretrained_in, random_glm
from paddlenlp.transformers import GLMChineseTokenizer, GLMTokenizer

from glm.decoding.decoder import beam_search
from glm.errors import InputError
from glm.weights import pretrained as module
from glm.weights.adapters import LoRA, add_lora
from glm.weights.loading import load_model
from glm.weights.pieces import find_fields
from glm.weights.pretrained import PUBLISHED_TOKENS, check_lengths, read_tokenizer
from glm.weights.shapes import matches, weight_shapes

PIECES = 1200  # of tiny-glm's sentencepiece model
IDS = {token: PIECES + number for number, token in enumerate(PUBLISHED_TOKENS)}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY_GLM, tmp_path / "model"))


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory):
    """The folder of an adapter, written as training does it."""
    path = tmp_path_factory.mktemp("adapter")
    pretrained = pretrained_in(TINY_GLM, lora=True)
    lora = add_lora(load_model(pretrained), pretrained, seed=1)
    lora.save_pretrained(str(path))
    pretrained.tokenizer.save_pretrained(str(path))
    return path


def write(folder, name, values):
    text = values if isinstance(values, (str, bytes)) else json.dumps(values)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def change(folder, name, **values):
    """Change keys of a JSON file."""
    path = folder / name
    write(folder, name, {**(json.loads(path.read_text()) if path.exists() else {}), **values})


DEEP = "[" * 100_000
CONFIG, MAP, TOKENIZER, ADDED = (
    "config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
REFUSED = [
    (CONFIG, {"num_layers": 10**30}, "'num_layers' is out of its range"),
    (CONFIG, {"num_layers": 9999}, "they lack"),
    (CONFIG, {"num_layers": "4"}, "'num_layers' is a str"),
    (CONFIG, {"num_layers": True}, "'num_layers' is a bool"),
    (CONFIG, {"hidden_size": -1}, "'hidden_size' is out of its range"),
    (CONFIG, {"hidden_size": 1 << 20}, "its glm."),
    (CONFIG, {"vocab_size": 1 << 30}, "its glm."),
    (CONFIG, {"max_sequence_length": 1.5}, "'max_sequence_length' is a float"),
    (CONFIG, {"num_attention_heads": 3}, "no multiple"),
    (CONFIG, {"num_attention_heads": 0}, "out of its range"),
    (CONFIG, {"attention_dropout_prob": float("nan")}, "out of its range"),
    (CONFIG, {"attention_scale": 1e308}, "out of its range"),
    (CONFIG, {"layernorm_epsilon": []}, "'layernorm_epsilon' is a list"),
    (CONFIG, {"block_position_encoding": False}, "block_position_encoding"),
    (CONFIG, {"relative_encoding": True}, "relative_encoding"),
    (CONFIG, {"pool_token": {}}, "'pool_token' is a dict"),
    (CONFIG, {"save_pretrained": "x"}, "'save_pretrained' is no setting"),
    (CONFIG, {"__class__": "x"}, "'__class__' is no setting"),
    (CONFIG, {"architectures": ["os.system"]}, "is no GLM, but a os.system"),
    (CONFIG, {"architectures": 5}, "'architectures' is a int"),
    (CONFIG, {"architectures": [None]}, "is no GLM, but a None"),
    (CONFIG, {"model_type": "bert"}, "is no GLM, but a bert"),
    (CONFIG, DEEP, "nested too deeply"),
    (CONFIG, "[]", "it is a list"),
    (CONFIG, b"\xff\xfe", "config.json can't be loaded"),
    (CONFIG, '{"num_layers": ' + "9" * 5000 + "}", "config.json can't be loaded"),
    (MAP, {"tokenizer_config_file": "/tmp/x"}, "is no special token"),
    (MAP, {"save_pretrained": "x"}, "is no special token"),
    (MAP, {"cls_token": 5}, "'cls_token' is a int"),
    (MAP, {"cls_token": {"content": 5}}, "'content' is a int"),
    (MAP, {"cls_token": {}}, "is no text of a token"),
    (MAP, {"cls_token": "x" * 200}, "and the model was trained with [CLS]"),  # it is a token, but another
    *((MAP, {"cls_token": value}, "is no text of a token") for value in ("x" * 201, "", {"content": ""})),
    (MAP, {"additional_special_tokens": ["x" * 201]}, "is no text of a token"),
    (TOKENIZER, {"mask_token": {"content": "x" * 201}}, "is no text of a token"),
    (ADDED, {"x" * 201: PIECES}, "is no text of a token"),
    (MAP, {"pad_token": "<|other|>"}, "copy added_tokens.json"),
    *((MAP, {"eos_token": token}, "trained with <|endoftext|>") for token in ("[SEP]", {"content": "[CLS]"})),
    (TOKENIZER, {"cls_token": "[sMASK]"}, "its cls_token is [sMASK], and the model"),
    (MAP, {"additional_special_tokens": [5]}, "is no text of a token"),
    (MAP, {"additional_special_tokens": [f"t{n}" for n in range(5000)]}, "tokens beside its pieces"),
    (MAP, {"additional_special_tokens": [*PUBLISHED_TOKENS[6:]]}, "gives <|startofpiece|> the id 1204"),
    (MAP, DEEP, "nested too deeply"),
    (TOKENIZER, {"tokenizer_class": "os"}, "tokenizer_class is os"),
    (TOKENIZER, {"tokenizer_class": "GLMGPT2Tokenizer"}, "is an English GLM"),
    (TOKENIZER, {"tokenize": "x"}, "'tokenize' is no setting"),
    (TOKENIZER, {"cls_token": ["x"]}, "'cls_token' is a list"),
    (TOKENIZER, {"model_max_length": -5}, "out of its range"),
    (TOKENIZER, {"padding_side": "up"}, "Padding side"),
    (TOKENIZER, "null", "it is a NoneType"),
    (ADDED, {"[NEW]": 10**9}, "added_tokens.json gives"),
    (ADDED, {"[NEW]": "x"}, "no table of ids"),
    (ADDED, {"[gMASK]": PIECES + 3}, "added_tokens.json gives"),
    (ADDED, {f"t{n}": PIECES + n for n in range(5000)}, "tokens beside its pieces"),
    (ADDED, dict(list(IDS.items())[:4][::-1]) | {"[X]": PIECES + 4}, "copy added_tokens.json"),
]


@pytest.mark.parametrize("name, values, expected", REFUSED)
def test_what_a_file_may_not_say(folder, name, values, expected):
    if isinstance(values, dict) and name != ADDED:
        change(folder, name, **values)
    else:
        write(folder, name, values)
    with pytest.raises(InputError) as caught:
        pretrained_in(folder)
    assert expected in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name", [CONFIG, TOKENIZER, MAP, ADDED, "cog-pretrain.model", "model_state.pdparams"]
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop", "empty", "proc"])
def test_what_is_no_file_is_refused_at_once(folder, name, kind):
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "proc": "/proc/self/mounts"}[kind])
    with pytest.raises(InputError) as caught:
        pretrained_in(folder)
    # A regular file of no size: others of its kind, which a library would read, never end.
    assert "it is empty" in str(caught.value) or kind != "proc" or name.endswith(".json")


def test_keys_that_cost_or_name_paths_are_left_out(folder, tmp_path):
    """And nothing but plain files of its own folder is written."""
    others = {"num_labels": 10**9, "quantization_config": 5, "attribute_map": {"a": "a"}, "dtype": "object"}
    change(folder, CONFIG, **others, tensor_parallel_degree=7, _auto_class="x", configuration_files=[5])
    paths = {"model_file": "/etc/passwd", "init_args": ["/etc/passwd"], "chat_template": "{{ x }}", "self": 5}
    change(folder, TOKENIZER, **paths)
    write(folder, "chat_template.json", DEEP)
    pretrained = pretrained_in(folder)
    assert load_model(pretrained).config.num_labels == 2
    (tmp_path / "saved").mkdir()
    pretrained.tokenizer.save_pretrained(str(tmp_path / "saved"))
    saved = (tmp_path / "saved/tokenizer_config.json").read_text()
    assert "passwd" not in saved and "chat_template" not in saved
    assert (tmp_path / "saved/cog-pretrain.model").read_bytes() == (
        folder / "cog-pretrain.model"
    ).read_bytes()


def published(folder):
    """The JSON files that THUDM's folders on Hugging Face have."""
    change(folder, CONFIG, architectures=["GLMModel"], auto_map={"AutoConfig": "x"}, torch_dtype="float16")
    special = {"cls_token": "[CLS]", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special["additional_special_tokens"] = ["<|startofpiece|>", "<|endofpiece|>", "[gMASK]", "[sMASK]"]
    change(folder, TOKENIZER, **special, auto_map={"AutoTokenizer": ["x", None]}, use_fast=False)
    change(folder, TOKENIZER, model_max_length=int(1e30), name_or_path="THUDM/glm-large-chinese")
    write(folder, ADDED, IDS)
    write(folder, "tokenization_glm.py", "raise SystemExit")


def saved_again(folder):
    GLMTokenizer.from_pretrained(str(TINY_GLM)).save_pretrained(str(folder))


def tokens_as_objects(folder):
    write(folder, MAP, {"mask_token": {"content": "[MASK]", "lstrip": True, "special": True}})


@pytest.mark.parametrize("make", [published, saved_again, tokens_as_objects, lambda folder: None])
def test_a_tokenizer_is_what_paddlenlp_makes_of_the_folder(folder, make):
    expected = GLMTokenizer.from_pretrained(str(TINY_GLM))
    make(folder)
    tokenizer = pretrained_in(folder).tokenizer
    text = "答案：北京，上下文：北京 [MASK] 大学 <|startofpiece|> 在北京。[gMASK]"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in IDS} == IDS
    assert len(tokenizer) == len(expected) == PIECES + 10


def test_published_files_without_added_tokens_are_refused(folder):
    published(folder)
    (folder / ADDED).unlink()
    with pytest.raises(InputError, match="copy added_tokens.json"):
        pretrained_in(folder)


@pytest.mark.parametrize("taken, refused", [(1, False), (57, False), (58, True), (200, True)])
def test_a_tokenizer_of_fewer_pieces_is_of_another_model(folder, taken, refused):
    """The special tokens come behind the pieces: with fewer they have the ids of others.

    The model has 1216 = 19 * 64 rows for 1210 tokens, so that 1153 are the fewest that it can be of.
    """
    path = folder / "cog-pretrain.model"
    data, places = path.read_bytes(), [0]
    while data[places[-1]] == 0x0A:  # protobuf's first field, of a length under 128: a piece
        places.append(places[-1] + 2 + data[places[-1] + 1])
    assert len(places) == PIECES + 1
    path.write_bytes(data[: places[-1 - taken]] + data[places[-1] :])
    with pytest.raises(InputError, match="are not of one model: copy") if refused else nullcontext():
        pretrained_in(folder)
    if refused:  # a folder that says its ids may have any size
        tokens = {token: index - taken for token, index in IDS.items()}
        write(folder, ADDED, tokens)
        assert len(pretrained_in(folder).tokenizer) == PIECES - taken + 10


@pytest.mark.parametrize("vocab_size, tokens", [(50048, 50010), (50176, 50010), (51200, 50010), (1210, 1210)])
def test_a_vocabulary_may_be_padded(folder, monkeypatch, vocab_size, tokens):
    """As those that are published, and as those trained on several cards, to multiples of 128 a card."""
    made = pretrained_in(folder).tokenizer
    monkeypatch.setattr(module, "make_tokenizer", lambda *args: (made, {}))
    monkeypatch.setattr(GLMChineseTokenizer, "__len__", lambda tokenizer: tokens)
    assert read_tokenizer(str(folder), SimpleNamespace(vocab_size=vocab_size))


def test_a_piece_that_is_no_text_is_refused(folder):
    """sentencepiece takes it, and the first answer that has it would end the run."""
    path = folder / "cog-pretrain.model"
    piece = GLMTokenizer.from_pretrained(str(TINY_GLM)).sp_model.IdToPiece(900).encode()
    data = path.read_bytes()
    assert data.count(field := b"\x0a" + bytes([len(piece)]) + piece) == 1  # of protobuf, by its length
    path.write_bytes(data.replace(field, field[:2] + b"\xff" * len(piece)))
    with pytest.raises(InputError, match="its tokenizer can't be loaded .*utf-8.*: copy it from the model"):
        pretrained_in(folder)


@pytest.mark.parametrize("joined, expected", [(False, "utf-8"), (True, "a character as more than 200 bytes")])
def test_a_table_of_characters_that_is_no_text_is_refused(folder, joined, expected):
    """sentencepiece's file says what a character is written as, so that "：" becomes ":"."""
    path = folder / "cog-pretrain.model"
    before, colon, after = path.read_bytes().rpartition(b"\0:\0")
    if joined:  # what stands behind it, too
        path.write_bytes(before + colon[:2] + b"," + after[:1000].replace(b"\0", b",") + after[1000:])
    else:
        path.write_bytes(before + b"\0\xff\0" + after)
    with pytest.raises(InputError, match=f"its tokenizer can't be loaded .*{expected}"):
        pretrained_in(folder)


def test_fields_of_protobuf():
    message = b"\x08\x96\x01\x12\2hi\x1d1234\x21" + bytes(8) + b"\x12\0\x1a\1x"
    assert [*find_fields(message, (2,))] == [b"hi", b""]
    assert [*find_fields(message, (3, 4))] == [b"x"]
    for damaged in (b"\x08", b"\x08" + b"\x80" * 10 + b"\1", b"\x80"):
        with pytest.raises(ValueError, match="it is damaged"):
            list(find_fields(damaged, (2,)))


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_a_config_without_its_kind_is_a_glms(folder, key):
    values = json.loads((folder / CONFIG).read_text())
    del values[key]
    write(folder, CONFIG, values)
    assert pretrained_in(folder).config.hidden_size == 128


def test_a_folder_that_is_being_replaced_is_left_alone(folder):
    (folder / ".unfinished").mkdir()
    write(folder, ".unfinished/.replaced", ["config.json"])
    with pytest.raises(InputError, match=f"--output_dir {folder}, which finishes that"):
        pretrained_in(folder)
    assert (folder / "config.json").exists()


def test_shapes_are_those_of_the_model():
    model = random_glm()
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    assert weight_shapes(model.config) == expected


ADAPTERS = [
    ({"r": 0}, "'r' is out of its range"),
    ({"r": 10**12}, "'r' is out of its range"),
    ({"r": 2.5}, "'r' is a float"),
    ({"r": 3}, "is of another base"),
    ({"lora_alpha": float("nan")}, "'lora_alpha' is out of its range"),
    ({"lora_dropout": 5}, "'lora_dropout' is out of its range"),
    ({"target_modules": None}, "'target_modules' is no list"),
    ({"target_modules": [5]}, "'target_modules' is no list"),
    ({"target_modules": ["x"] * 100_000}, "'target_modules' is no list"),
    ({"target_modules": ["(([a-z._0-9])+)+$X"]}, "which names no linears"),
    ({"target_modules": [".*.*.*X"]}, "which names no linears"),
    ({"target_modules": ["x"]}, "no linears of a GLM"),
    ({"trainable_modules": ["("]}, "'trainable_modules' is set"),
    ({"pissa": True}, "'pissa' is set"),
    ({"to_dict": "x"}, "'to_dict' is no setting"),
    ({"base_model_name_or_path": 5}, "'base_model_name_or_path' is a int"),
    ({"base_model_name_or_path": None}, "give it by --lora_base"),
    ({"base_model_name_or_path": "a\0b"}, "there is no such folder"),
    ({"base_model_name_or_path": "http://127.0.0.1:9/x"}, "there is no such folder"),
]


@pytest.mark.parametrize("values, expected", ADAPTERS)
def test_what_an_adapters_file_may_not_say(trained_adapter, tmp_path, values, expected):
    folder = Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))
    change(folder, "lora_config.json", **values)
    with pytest.raises(InputError) as caught:
        pretrained_in(folder)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "target", [r".*\.dense", ".*dense.*", ".*query_key_value.*", r".*\.attention\.dense", ".*", "dense"]
)
def test_targets_match_as_regular_expressions_do(target):
    """But by operations on strings, which end."""
    import re

    for linear in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        name = f"glm.transformer.layers.0.{linear}"
        assert matches(target, name) == bool(re.fullmatch(target, name))


def test_an_adapter_knows_its_base(trained_adapter, tmp_path):
    """Its fingerprint lies beside it: another base is refused, an adapter without one is taken."""
    assert pretrained_in(trained_adapter).adapter.folder == str(trained_adapter)
    other = Path(shutil.copytree(TINY_GLM, tmp_path / "other"))
    weights = paddle.load(str(other / "model_state.pdparams"), return_numpy=True)
    weights["glm.transformer.final_layernorm.bias"] = weights["glm.transformer.final_layernorm.bias"] + 0.1
    paddle.save(weights, str(other / "model_state.pdparams"))
    with pytest.raises(InputError, match="trained beside other weights"):
        pretrained_in(trained_adapter, lora_base=str(other))
    folder = Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))
    for content in ({"weights": 5}, "[]"):
        write(folder, "lora_base.json", content)
        with pytest.raises(InputError, match="lora_base.json can't be read"):
            pretrained_in(folder)
    (folder / "lora_base.json").unlink()  # as older versions write it
    assert isinstance(pretrained_in(folder, lora_base=str(other)).adapter.weights, dict)


def test_the_fingerprint_of_an_adapter_is_its_bases_too(trained_adapter, tmp_path):
    base = Path(shutil.copytree(TINY_GLM, tmp_path / "base"))
    adapter = Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))
    (adapter / "lora_base.json").unlink()

    def fingerprint():
        return pretrained_in(adapter, lora_base=str(base)).fingerprint

    def change(folder, file, name):
        state = paddle.load(str(folder / file), return_numpy=True)
        paddle.save({**state, name: state[name] + 0.1}, str(folder / file))

    found = [fingerprint(), fingerprint()]
    change(base, "model_state.pdparams", "glm.transformer.final_layernorm.bias")
    found.append(fingerprint())
    change(adapter, "lora_model_state.pdparams", "glm.transformer.layers.0.attention.dense.lora_A")
    found.append(fingerprint())
    assert found[0] == found[1] and len({*found}) == 3


def test_no_flag_is_changed(trained_adapter):
    from glm.arguments import ModelArguments
    from glm.weights.pretrained import find_pretrained

    arguments = ModelArguments(model_name_or_path=str(trained_adapter))
    before = vars(arguments).copy()
    pretrained = find_pretrained(arguments)
    assert vars(arguments) == before
    assert isinstance(add_lora(load_model(pretrained), pretrained, seed=0), LoRA)


@pytest.mark.parametrize("select_topk", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_what_is_no_number_predicts_nothing(value, select_topk):
    model = random_glm()
    weight = model.glm.transformer.layers[1].attention.dense.weight
    array = weight.numpy()
    array[0, 0] = value
    weight.set_value(array)
    ids, generation = paddle.to_tensor([[3, 4, 5]]), generation_arguments(select_topk=select_topk)
    with pytest.raises(InputError, match="are no numbers"):
        beam_search(model, ids, np.array([3]), generation, 1, 2)


def test_an_adapters_settings_are_not_shared(trained_adapter):
    """add_lora leaves the LoRAConfig of the Pretrained as it was read."""
    pretrained = pretrained_in(trained_adapter)
    before = pretrained.adapter.config.to_dict()
    add_lora(load_model(pretrained), pretrained, seed=0)
    assert pretrained.adapter.config.to_dict() == before
    assert before["r"] == 8 and lora_config().r == 2


@pytest.mark.parametrize("degree, fits", [(1, True), (2, True), (4, False), (8, False)])
def test_what_processes_are_to_split_has_to_be_divided(degree, fits):
    """The heads, 4 of them, and the vocabulary of 1210."""
    config = SimpleNamespace(num_attention_heads=4, vocab_size=1210, max_sequence_length=100)
    pretrained = SimpleNamespace(config=config, base="model")
    try:
        check_lengths(pretrained, 50, generation_arguments(), degree)
    except InputError as error:
        assert not fits and f"--tensor_parallel_degree {degree} does not divide the 4 attention heads" in str(
            error
        )
    else:
        assert fits
