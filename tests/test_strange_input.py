"""Input that nobody would write, by chance: the run ends with 0 or 2, without a traceback, and in time.

STRANGE_CASES=2000 python -m pytest tests/test_strange_input.py tries as many; by default they are 60. What
failed once is an example of its own.
"""

import json
import os
import shutil
from dataclasses import fields

import pytest
from helpers import TINY_GLM, Run, flags
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st

from glm.arguments import DataArguments, GenerationArguments, GLMTrainingArguments, ModelArguments

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("STRANGE_CASES", 60))
RECORD = {"context": "北京大学在北京。", "answer": "北京", "question": "北京大学在哪里?"}


def check(folder, *args):
    """Run the script in ``folder``: it ends with 0 or 2, and in the second case says what is wrong."""
    code, lines = Run(*args, folder=folder).finish(90)
    assert code in (0, 2) and not any("Traceback" in line for line in lines), f"{code}\n{lines[-30:]}"
    if code == 2:
        assert any("finetune_generation.py: error: " in line for line in lines[-3:]), lines[-30:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strange")
    (folder / "data").mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"data/{split}.json").write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    return folder


def cases(share):
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    options = {"deadline": None, "database": None, "phases": (Phase.explicit, Phase.generate)}
    examples = max(int(CASES * share), 1)
    return settings(max_examples=examples, suppress_health_check=checks, derandomize=CASES == 60, **options)


anything = st.text(st.characters(), max_size=20)  # lone surrogates and NUL among them
long_text = st.builds(
    lambda text, times: (text * times)[:100_000], anything, st.sampled_from([1, 1, 3, 50, 5000])
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | long_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=5,
)
record = st.builds(
    lambda texts, others: {**texts, **others},
    st.fixed_dictionaries(dict.fromkeys(RECORD, long_text)),
    st.dictionaries(
        st.sampled_from([*RECORD, "id", "source", "title", "target", "\ufeff", ""]), json_value, max_size=2
    ),
)
plain_record = st.builds(lambda *texts: dict(zip(RECORD, texts)), long_text, long_text, long_text)
line = st.one_of(
    plain_record.map(lambda value: json.dumps(value).encode()),
    plain_record.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    record.map(lambda value: json.dumps(value).encode()),
    json_value.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
)


@cases(0.3)
@given(lines=st.lists(line, max_size=3), split=st.sampled_from(["train", "test"]))
def test_any_records(folder, lines, split):
    (folder / "records.json").write_bytes(b"\n".join(lines))
    args = flags(
        model_name_or_path=TINY_GLM,
        output_dir=folder / "out",
        src_length=40,
        tgt_length=16,
        min_tgt_length=0,
        num_beams=1,
    )
    args.append("--overwrite_output_dir")
    if split == "test":
        check(folder, *args, "--predict_file", folder / "records.json")
    else:
        shutil.rmtree(folder / "task", ignore_errors=True)
        (folder / "task").mkdir()
        shutil.copy(folder / "records.json", folder / "task/train.json")
        check(folder, *args, "--do_train", "--max_steps", 1, "--task_name", folder / "task")


GROUPS = (ModelArguments, DataArguments, GenerationArguments, GLMTrainingArguments)
FLAGS = {field.name: str(field.type) for group in GROUPS for field in fields(group) if field.init}

STRANGE = (
    "|a b|~|..|/|/dev/null|--do_eval|[]|{}|None|null|all|none|no|true|False|-1|0|1|2|１|1,5|1_000|0x10".split(
        "|"
    )
)
STRANGE += [
    "1e400",
    "-1e400",
    "1e-400",
    "9" * 20,
    "nan",
    "inf",
    "-inf",
    "O1",
    "O2",
    "gpu",
    "cpu",
    "xpu:0",
    "gpu:99",
]
STRANGE += ["steps", "epoch", "linear", "stage1"]
strange_value = st.one_of(
    st.sampled_from(STRANGE),
    anything.filter(lambda text: "\0" not in text),
    st.integers().map(str),
    st.floats().map(str),
)


def flag_and_value(any_value):
    """A flag and a value that its type may allow, or, one time in five, any value at all."""

    def value(name):
        kind = FLAGS[name]
        choices = [any_value, strange_value]
        if "bool" in kind:
            choices += [st.booleans()] * 8
        elif "int" in kind or "float" in kind:
            numbers = st.integers(-2, 5) | st.sampled_from([10, 100, 2**31 - 1, 2**31, 2**63, 10**30])
            choices += [numbers, numbers, numbers | st.floats(allow_nan="float" in kind)] * 3
        return st.tuples(st.just(name), st.one_of(choices))

    return st.sampled_from(sorted(FLAGS)).flatmap(value)


def training(folder):
    return {
        "model_name_or_path": str(TINY_GLM),
        "task_name": str(folder / "data"),
        "output_dir": str(folder / "out"),
        "src_length": 40,
        "tgt_length": 16,
        "min_tgt_length": 0,
        "num_beams": 1,
        "max_steps": 1,
        "do_train": True,
        "do_eval": True,
        "overwrite_output_dir": True,
    }


def is_long(name, value):
    """Whether the run would rightly take its time."""
    try:
        if name == "per_device_train_batch_size":  # what is over 4096 is refused
            return 256 < float(value) <= 4096
        return name in ("max_steps", "num_train_epochs") and float(value) > 10
    except (TypeError, ValueError):
        return False


@cases(0.3)
@given(flag=flag_and_value(strange_value))
@example(flag=("save_steps", 2**63))
@example(flag=("gradient_accumulation_steps", 2**31 - 1))
@example(flag=("per_device_train_batch_size", 2**31 - 1))
def test_any_value_of_any_flag(folder, flag):
    name, value = flag
    assume(not is_long(name, value))
    args = {**training(folder), name: value}
    check(folder, *(text for name, value in args.items() for text in (f"--{name}", value)))


@cases(0.2)
@given(flag=flag_and_value(json_value))
@example(flag=("enable_auto_parallel", True))
@example(flag=("eval_accumulation_steps", 0))
@example(flag=("run_name", "\ud800"))
@example(flag=("predict_file", "a\0b"))
@example(flag=("dataloader_num_workers", 2))
def test_any_json_value_of_any_flag(folder, flag):
    name, value = flag
    assume(not is_long(name, value))
    (folder / "arguments.json").write_text(json.dumps({**training(folder), name: value}))
    check(folder, folder / "arguments.json")


FILES = sorted(path.name for path in TINY_GLM.iterdir())


@st.composite
def damages(draw):
    """What is done to a file of the model folder: its name and its new bytes; None takes it away."""
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(["gone", "cut", "changed", "other", "json"]))
    if kind == "json" and name.endswith(".json"):
        content = json.loads((TINY_GLM / name).read_text(encoding="utf-8"))
        key, value = draw(st.sampled_from(sorted(content))), draw(json_value)
        return name, json.dumps({**content, key: value}).encode()
    data = (TINY_GLM / name).read_bytes()
    place = draw(st.integers(0, len(data) - 1))
    if kind == "gone":
        return name, None
    if kind == "cut":
        return name, data[:place]
    if kind == "other":
        return name, draw(st.binary(max_size=100))
    return name, data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place + 8 :]


def config(**changes):
    content = json.loads((TINY_GLM / "config.json").read_text(encoding="utf-8"))
    return "config.json", json.dumps({**content, **changes}).encode()


@cases(0.2)
@given(damage=damages())
@example(damage=config(embedding_dropout_prob=None))
@example(damage=config(num_layers=8336))
@example(damage=config(block_position_encoding=False))
@example(damage=config(num_attention_heads=3))
def test_any_damage_to_a_model_folder(folder, damage):
    model, (name, content) = folder / "model", damage
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(TINY_GLM, model)
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    args = {**training(folder), "model_name_or_path": model, "do_train": False}
    check(folder, *(text for name, value in args.items() for text in (f"--{name}", value)))
