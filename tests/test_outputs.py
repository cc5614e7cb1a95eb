"""What stands in output_dir is of one model, also after a kill, and nothing of the model before it."""

import json
import shutil
import signal
import sys
from types import SimpleNamespace

import paddle
import pytest
from helpers import TINY_GLM, TRAIN, flags, run, small_data
from paddlenlp.transformers import GLMForConditionalGeneration

from glm.errors import InputError
from glm.outputs import checkpoints
from glm.outputs import folder as outputs
from glm.outputs.checkpoints import CHECKPOINT_DONE
from glm.outputs.folder import MODEL, RESULTS, RUN, UNFINISHED, finishing, move_into_place

NO_TRAINING = [*TRAIN, *flags(do_train=False)]
WEIGHTS = outputs.WHOLE_MODEL + outputs.ADAPTER


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_who_may_write_into_a_folder(tmp_path):
    """Results may go where other files are; a run that writes over another does not go on with it."""
    (tmp_path / "thesis.txt").write_text("mine")
    args = SimpleNamespace(output_dir=str(tmp_path), global_batch_size=24)
    args.do_train = args.overwrite_output_dir = False
    outputs.check_output_dir(args, None)
    args.do_train = True
    with pytest.raises(InputError, match="nothing of a run"):
        outputs.check_output_dir(args, None)
    args.overwrite_output_dir, args.resume_from_checkpoint, args.tensor_parallel_degree = True, None, 1
    outputs.check_output_dir(args, None)
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in (
        "model_state.pdparams",
        "optimizer.pdopt",
        "scheduler.pdparams",
        "trainer_state.json",
        CHECKPOINT_DONE,
    ):
        (checkpoint / name).touch()
    assert checkpoints.find_last_checkpoint(args, lora=False) is None
    args.overwrite_output_dir = False
    assert checkpoints.find_last_checkpoint(args, lora=False) == str(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "lora_model_state.pdparams"])
def test_a_model_of_any_form_is_not_written_over(tmp_path, name):
    (tmp_path / name).touch()
    args = SimpleNamespace(output_dir=str(tmp_path), do_train=True, overwrite_output_dir=False)
    with pytest.raises(InputError, match="holds a model and no checkpoint to resume from"):
        outputs.check_output_dir(args, None)


def test_a_link_to_nowhere_is_nothing_of_a_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    args = SimpleNamespace(output_dir=str(tmp_path), do_train=True, overwrite_output_dir=False)
    with pytest.raises(InputError, match="holds link and nothing of a run"):
        outputs.check_output_dir(args, None)


OLD = {"model.safetensors": "old", "eval_results.json": "{}", "config.json": "old", "notes.txt": "mine"}
NEW = {"model_state.pdparams": "new", "config.json": "new", "train_results.json": "{}"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_what_is_replaced_goes_in_the_same_move(tmp_path):
    write(tmp_path, OLD)
    with finishing(tmp_path, (*MODEL, *RESULTS)) as folder:
        write(folder, NEW)
        assert read(tmp_path) == OLD
    assert read(tmp_path) == {**NEW, "notes.txt": "mine"} and not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize("event", ["os.rename", "os.remove", "shutil.rmtree"])
@pytest.mark.parametrize("call", range(1, 6))
def test_a_run_that_is_killed_leaves_the_old_or_the_new(tmp_path, event, call):
    """Before it has said what it replaces the old; afterwards the next command completes the new."""

    calls = []

    def watch(name, args):
        if name == event and calls is not None and str(tmp_path) in str(args[0]):
            calls.append(args)
            if len(calls) == call:
                raise KeyboardInterrupt

    write(tmp_path, OLD)
    sys.addaudithook(watch)
    try:
        with finishing(tmp_path, (*MODEL, *RESULTS)) as folder:
            write(folder, NEW)
    except KeyboardInterrupt:
        pass
    calls = None  # a hook stays
    begun = (tmp_path / UNFINISHED / outputs.REPLACED).exists()
    move_into_place(tmp_path)
    move_into_place(tmp_path)  # again, which does nothing
    expected = {**NEW, "notes.txt": "mine"}
    assert read(tmp_path) in ([expected] if begun else [OLD, expected])


def saved_as(form, folder):
    """A model in ``folder``: other weights than those of the fixture, in one of its forms."""
    shutil.copytree(TINY_GLM, folder)
    if form == "float16":
        weights = paddle.load(str(folder / "model_state.pdparams"), return_numpy=True)
        halves = {name: value.astype("float16") for name, value in weights.items()}
        paddle.save(halves, str(folder / "model_state.pdparams"))
        return
    options = {
        "whole": {},
        "shards": {"max_shard_size": "300KB"},
        "safetensors": {"safe_serialization": True},
        "safetensors shards": {"safe_serialization": True, "max_shard_size": "300KB"},
    }
    (folder / "model_state.pdparams").unlink()
    model = GLMForConditionalGeneration.from_pretrained(str(TINY_GLM))
    model.save_pretrained(str(folder), **options[form])


def loss(folder):
    return json.loads((folder / "eval_results.json").read_text())["eval_loss"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, data):
    """The folder of an adapter that changes much."""
    folder = tmp_path_factory.mktemp("adapter")
    args = ["--lora", "True", *flags(output_dir=folder, task_name=data, max_steps=4, learning_rate=0.1)]
    run(*TRAIN, *args)
    return folder


FORMS = ["whole", "shards", "safetensors", "safetensors shards", "float16", "adapter"]
QUICK = [("safetensors", "whole"), ("whole", "adapter"), ("adapter", "merged")]
PAIRS = [
    pytest.param(form, written, marks=[] if (form, written) in QUICK else pytest.mark.slow)
    for form in FORMS
    for written in ("whole", "adapter", "merged")
]


@pytest.mark.parametrize("form, written", PAIRS)
def test_what_is_read_back_is_what_was_written(tmp_path, data, adapter, form, written):
    model = tmp_path / "model"
    if form == "adapter":
        shutil.copytree(adapter, model)
    else:
        saved_as(form, model)
    for name in ("eval_results.json", "eval_predictions.jsonl", "test_results.json", "notes.txt"):
        (model / name).write_text("{}")
    common = ["--overwrite_output_dir", *flags(output_dir=model, task_name=data, save_strategy="no")]
    if written == "merged":
        run(*NO_TRAINING, *common, "--do_eval", "--merge_lora", "True", "--model_name_or_path", adapter)
    else:
        base = model if written == "whole" and form != "adapter" else TINY_GLM
        lora = str(written == "adapter")
        args = ["--do_eval", "--lora", lora, *flags(model_name_or_path=base, max_steps=2)]
        run(*TRAIN, *common, *args)
    found = {path.name for path in outputs.find(model, WEIGHTS)}
    expected = {"lora_config.json", "lora_model_state.pdparams"}
    assert found == (expected if written == "adapter" else {"model_state.pdparams"})
    assert "notes.txt" in names(model) and "test_results.json" not in names(model)
    args = flags(model_name_or_path=model, task_name=data, output_dir=tmp_path / "again")
    run(*NO_TRAINING, *args, "--do_eval")
    assert loss(tmp_path / "again") == pytest.approx(loss(model), abs=1e-5)


def test_results_are_of_the_model_beside_them(tmp_path, data):
    """Those of the model before go; those of the model at hand stay when nothing is left to train."""
    args = [*TRAIN, *flags(output_dir=tmp_path, task_name=data, max_steps=2, save_steps=2)]
    run(*args, "--do_eval")
    names_kept = [name for name in RESULTS if name not in ("trainer_state.json", "torch")]
    kept = [name for name in names_kept if (tmp_path / name).exists()]
    results = {name: (tmp_path / name).read_bytes() for name in kept}
    assert {"eval_results.json", "eval_predictions.jsonl", "train_results.json"} <= results.keys()
    lines = run(*args)
    assert any("nothing is left to train" in line for line in lines)
    for name, content in results.items():
        assert (tmp_path / name).read_bytes() == content
    run(*args, "--overwrite_output_dir", "--max_steps", 1)
    assert not {"eval_results.json", "eval_predictions.jsonl"} & names(tmp_path)
    everything = json.loads((tmp_path / "all_results.json").read_text())
    assert everything == json.loads((tmp_path / "train_results.json").read_text())
    assert json.loads((tmp_path / RUN).read_text())["model"] == 1


def test_results_beside_another_model_are_told(tmp_path, data):
    shutil.copytree(TINY_GLM, tmp_path / "other")
    args = [*NO_TRAINING, *flags(task_name=data, max_eval_samples=1)]
    beside = f"the results in {tmp_path}/other will be of {TINY_GLM}, not of the model that lies there"
    assert any(beside in line for line in run(*args, "--do_eval", "--output_dir", tmp_path / "other"))


def test_an_adapter_does_not_replace_its_base(tmp_path, data):
    shutil.copytree(TINY_GLM, tmp_path / "base")
    args = flags(model_name_or_path=tmp_path / "base", output_dir=tmp_path / "base", task_name=data)
    lines = run(*TRAIN, *args, "--lora", "True", "--overwrite_output_dir", "--max_steps", 1, code=2)
    assert "holds the model that the adapter belongs to" in lines[-1]


def test_a_kill_between_the_moves_is_made_good_by_whoever_reads(tmp_path, data):
    """The model is read whole where only its config had been moved, by another command."""
    out = tmp_path / "out"
    args = [*TRAIN, *flags(task_name=data, max_steps=2, save_strategy="no")]
    run(*args, "--output_dir", out, "--do_eval")
    before = loss(out)
    hook = ["fault_at_file", "SIGKILL", "os.rename", f"*/{UNFINISHED}/*", 3]
    flags_again = ["--overwrite_output_dir", "--learning_rate", 0.01, "--output_dir", out]
    run(*args, *flags_again, hook=hook, code=-signal.SIGKILL)
    evaluation = [*NO_TRAINING, "--do_eval", *flags(task_name=data, model_name_or_path=out)]
    run(*evaluation, "--output_dir", tmp_path / "one")
    assert not (out / UNFINISHED / outputs.REPLACED).exists() and not (out / "eval_results.json").exists()
    run(*args, *flags_again, "--do_eval")
    assert loss(tmp_path / "one") == pytest.approx(loss(out), abs=1e-5) != pytest.approx(before, abs=1e-3)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "file.tmp").symlink_to("/dev/full")  # every write: no space left on device
    with pytest.raises(OSError, match="No space left"):
        outputs.write_whole(tmp_path / "file", "after")
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "before"
    outputs.write_whole(tmp_path / "file", "after")
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "after"
