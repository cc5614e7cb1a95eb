"""What stands in output_dir is of one model, also after a kill, and nothing of the model before it."""

import json
import os
import shutil
import signal
import sys
import unicodedata
from types import SimpleNamespace

import paddle
import pytest
from helpers import TINY_GLM, TRAIN, flags, folder_arguments, run, run_folder, small_data
from paddlenlp.transformers import GLMForConditionalGeneration

from glm.errors import Fault, InputError
from glm.files import dump_json
from glm.outputs import layout, lock, replace
from glm.outputs.folder import open_run_folder
from glm.outputs.layout import LOCK, MODEL, REPLACED, RESULTS, RUN, UNFINISHED, find
from glm.outputs.replace import check_complete, finish_interrupted_replace, replace_together
from glm.outputs.results import write_results

NO_TRAINING = [*TRAIN, *flags(do_train=False)]
WEIGHTS = layout.WHOLE_MODEL + layout.ADAPTER


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_who_may_write_into_a_folder(tmp_path):
    """Results may go where other files are; a run that writes over another does not go on with it."""
    (tmp_path / "thesis.txt").write_text("mine")
    run_folder(tmp_path, do_train=False).check_contents(None)
    with pytest.raises(InputError, match="nothing of a run"):
        run_folder(tmp_path).check_contents(None)
    run_folder(tmp_path, overwrite_output_dir=True).check_contents(None)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "lora_model_state.pdparams"])
def test_a_model_of_any_form_is_not_written_over(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="holds a model and no checkpoint to resume from"):
        run_folder(tmp_path).check_contents(None)


def test_a_link_to_nowhere_is_nothing_of_a_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds link and nothing of a run"):
        run_folder(tmp_path).check_contents(None)


OLD = {"model.safetensors": "old", "eval_results.json": "{}", "config.json": "old", "notes.txt": "mine"}
NEW = {"model_state.pdparams": "new", "config.json": "new", "train_results.json": "{}"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_what_is_replaced_goes_in_the_same_move(tmp_path, monkeypatch):
    """No process goes on before all is in place."""
    met = []
    monkeypatch.setattr(replace, "barrier", lambda: met.append(read(tmp_path)))
    write(tmp_path, OLD)
    with replace_together(tmp_path, (*MODEL, *RESULTS)) as folder:
        write(folder, NEW)
        assert read(tmp_path) == OLD
    assert read(tmp_path) == met[-1] == {**NEW, "notes.txt": "mine"}
    assert not (tmp_path / UNFINISHED).exists()


MODEL_FILES = [
    *("model_state.pdparams", "model_state.tp07.pdparams", "model_state-00001-of-00002.pdparams"),
    *("model_state.tp00_shard01.pdparams", "model_state.tp01-00001-of-00002.pdparams"),
    *("model_state.pdparams.index.json", "model_state.pdparams.index.tp00.json", "model.safetensors"),
    *("model.tp00.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00003.bin", "pytorch_model.bin.index.json"),
    *("lora_config.json", "lora_base.json", "lora_model_state.pdparams", "lora_model_state.tp01.pdparams"),
    *("config.json", "added_tokens.json", "special_tokens_map.json", "eval_results.json"),
]
USERS_FILES = [
    *("model_state_step3.pdparams", "model_state.old.pdparams", "model_backup.safetensors", "models.txt"),
    *("model_state.tp00_old.pdparams", "model-1.safetensors", "pytorch_model_old.bin", "my.index.json"),
    *("model_old.index.json", "lora_model_state_old.pdparams", "lora_model_state", "lora_config.json.bak"),
]


def test_the_users_copies_of_a_model_stay(tmp_path):
    """What PaddleNLP or PyTorch would call a model goes where another takes its place, and nothing else."""
    write(tmp_path, dict.fromkeys((*MODEL_FILES, *USERS_FILES), "old"))
    with replace_together(tmp_path, (*MODEL, *RESULTS)) as folder:
        write(folder, {"model_state.pdparams": "new"})
    assert read(tmp_path) == {"model_state.pdparams": "new", **dict.fromkeys(USERS_FILES, "old")}


def test_nothing_of_the_users_in_torch_goes(tmp_path):
    """The published *_glm.py stay where it is written again, or goes; what else is there is refused."""
    torch, export = tmp_path / "torch", {"model.safetensors": "old", "config.json": "old"}
    torch.mkdir()
    write(torch, {**export, "cog-pretrain.model": "old", "modeling_glm.py": "mine"})
    folder = run_folder(tmp_path, overwrite_output_dir=True)
    folder.check_contents(None)
    with folder.replacing() as staging:
        (staging / "torch").mkdir()
        write(staging / "torch", {"model.safetensors": "new"})
    assert read(torch) == {"model.safetensors": "new", "modeling_glm.py": "mine"}
    with folder.replacing((*MODEL, *RESULTS), folder.new_run):
        pass
    assert read(torch) == {"modeling_glm.py": "mine"}
    for name in ("notes", "config.json"):
        (torch / name).mkdir()
        write(torch / name, {"keep.txt": "mine"})
        with pytest.raises(InputError, match=f"torch holds {name}, which no export writes: move it away"):
            folder.check_contents(None)
        run_folder(tmp_path, do_train=False).check_contents(None, replaces=False)
        with pytest.raises(OSError), replace_together(tmp_path) as staging:  # put there meanwhile
            (staging / "torch").mkdir()
        assert read(torch / name) == {"keep.txt": "mine"}
        (torch / name / "keep.txt").unlink()
        (torch / name).rmdir()
    shutil.rmtree(torch)
    torch.write_text("mine")
    with pytest.raises(InputError, match="torch is no folder: move it away"):
        folder.check_contents(None)


def test_a_file_does_not_replace_a_folder(tmp_path):
    """Of whatever a run writes; an evaluation writes no model."""
    for name in ("config.json", "model_state.pdparams", "tokenizer_config.json", "cog-pretrain.model"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"keep.txt": "mine"})
        with pytest.raises(InputError, match=f"{name} is no file: move it away"):
            run_folder(tmp_path, overwrite_output_dir=True).check_contents(None)
        run_folder(tmp_path, do_train=False).check_contents(None, replaces=False)
        with pytest.raises(OSError), replace_together(tmp_path) as folder:  # made meanwhile
            write(folder, {name: "new"})
        assert read(tmp_path / name) == {"keep.txt": "mine"}
        shutil.rmtree(tmp_path / name)


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
        with replace_together(tmp_path, (*MODEL, *RESULTS)) as folder:
            write(folder, NEW)
    except KeyboardInterrupt:
        pass
    calls = None  # a hook stays
    begun = (tmp_path / UNFINISHED / REPLACED).exists()
    finish_interrupted_replace(tmp_path)
    finish_interrupted_replace(tmp_path)  # again, which does nothing
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


# Each form once, and what is written over it.
PAIRS = [
    ("safetensors", "whole"),
    ("whole", "adapter"),
    ("adapter", "merged"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in [("shards", "merged"), ("safetensors shards", "adapter"), ("float16", "whole")]
    ),
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
    found = {path.name for path in find(model, WEIGHTS)}
    expected = {"lora_base.json", "lora_config.json", "lora_model_state.pdparams"}
    assert found == (expected if written == "adapter" else {"model_state.pdparams"})
    assert "notes.txt" in names(model) and "test_results.json" not in names(model)
    args = flags(model_name_or_path=model, task_name=data, output_dir=tmp_path / "again")
    run(*NO_TRAINING, *args, "--do_eval")
    assert loss(tmp_path / "again") == pytest.approx(loss(model), abs=1e-5)


def test_results_are_of_the_model_beside_them(tmp_path, data):
    """Those of the model before go; those of the current model stay when nothing is left to train."""
    args = [*TRAIN, *flags(output_dir=tmp_path, task_name=data, max_steps=2, save_steps=2)]
    run(*args, "--do_eval")
    written = {*layout.WRITTEN, *RESULTS, RUN, layout.ARGUMENTS, "runs"}  # nothing else has to make way
    assert {name for name in names(tmp_path) if not name.startswith("checkpoint-")} <= written
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


@pytest.mark.parametrize("before", [b"[" * 100_000, b'{"a": ' * 3, b"\xff", b"[]", {"a": [[0] * 2**21]}, {}])
def test_results_are_added_to_those_that_are_there(tmp_path, before):
    """Of a stranger's, which are too large once they are indented or no results at all, nothing stays."""
    if isinstance(before, dict):
        others = {"text": "x", "n" * 101: 1, **{f"z{number}": number for number in range(2000)}}
        before = json.dumps({**before, "eval_loss": 1.5, "train_loss": 2.5, **others}).encode()
        kept = {"train_loss": 2.5, **{f"z{number}": number for number in range(997)}}
    else:
        kept = {}
    (tmp_path / "all_results.json").write_bytes(before)
    with run_folder(tmp_path).replacing() as staging:
        write_results(staging, "eval", {"eval_loss": 0.5})
    found = json.loads((tmp_path / "all_results.json").read_text())
    assert found == {"eval_loss": 0.5, **kept}


def test_what_cannot_be_seen_is_escaped():
    """What a terminal obeys or turns round, and where a reader ends a line; a Chinese text stays as it is."""
    characters = [chr(number) for number in range(1 << 17) if not 0xD800 <= number < 0xE000]
    text = dump_json({"context": "".join(characters)}, ensure_ascii=False)
    assert json.loads(text) == {"context": "".join(characters)} and len(text.splitlines()) == 1
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    for character in {*text} - {*"\xad\u180e\ufffe"}:  # a hyphen, a vowel's place, and no character
        obeyed = unicodedata.category(character) in ("Cc", "Zl", "Zp")
        turned = unicodedata.bidirectional(character) in turning and character < "\uffff"
        assert not obeyed and not turned, ascii(character)
    assert dump_json("\u3000北京“大学”，Ａ", ensure_ascii=False) == '"\u3000北京“大学”，Ａ"'


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


def models(name, base, adapter=True):
    return SimpleNamespace(name=str(name), base=str(base), adapter=adapter)


def test_a_run_does_not_take_its_own_model_away(tmp_path, monkeypatch):
    """One in a checkpoint that training may move aside or remove, or an adapter's base in torch/."""
    out, other = tmp_path / "out", tmp_path / "other"
    for path in (out / "checkpoint-3/merged", out / "torch", out / "checkpoints-4", other / "checkpoint-3"):
        path.mkdir(parents=True)
    (out / "checkpoint-6").symlink_to(other / "checkpoint-3")
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    folder, evaluation = run_folder(out), run_folder(out, do_train=False)
    for path in ("out/checkpoint-3", "link/checkpoint-3/merged", "out/checkpoint-6", other / "checkpoint-3"):
        for pair in ((path, path), (path, TINY_GLM), (TINY_GLM, path)):
            with pytest.raises(InputError, match="lies in .*out/checkpoint-[36], which training into"):
                folder.check_models(models(*pair), writes_model=True)
            evaluation.check_models(models(*pair), writes_model=False)
    for path in (TINY_GLM, "THUDM/glm-large-chinese", out, out / "checkpoints-4"):
        folder.check_models(models(path, path, adapter=False), writes_model=True)
    for changes in ({"writes_model": True}, {"writes_model": False, "exports": True}):
        with pytest.raises(InputError, match="holds the model that the adapter belongs to"):
            evaluation.check_models(models(other, "link/torch"), **changes)
    evaluation.check_models(models(other, out), writes_model=False, exports=True)


def test_a_kill_between_the_moves_is_made_good_by_who_writes_there(tmp_path, data):
    """Whoever only reads the model is told what finishes the moves; then it is read complete."""
    out = tmp_path / "out"
    args = [*TRAIN, *flags(task_name=data, max_steps=2, save_strategy="no")]
    run(*args, "--output_dir", out, "--do_eval")
    before = loss(out)
    hook = ["fault_at_file", "SIGKILL", "os.rename", f"*/{UNFINISHED}/*", 3]
    flags_again = ["--overwrite_output_dir", "--learning_rate", 0.01, "--output_dir", out]
    run(*args, *flags_again, hook=hook, code=-signal.SIGKILL)
    evaluation = [*NO_TRAINING, "--do_eval", *flags(task_name=data, model_name_or_path=out)]
    line = run(*evaluation, "--output_dir", tmp_path / "one", code=2)[-1]
    assert f"or any other with --output_dir {out}, which finishes that" in line
    assert (out / UNFINISHED / REPLACED).exists()
    run(*evaluation, "--output_dir", out)
    assert not (out / UNFINISHED).exists() or not (out / UNFINISHED / REPLACED).exists()
    after = loss(out)
    run(*args, *flags_again, "--do_eval")
    assert after == pytest.approx(loss(out), abs=1e-5) != pytest.approx(before, abs=1e-3)


# Of a stranger.


def opened(folder):
    """Open and leave ``folder`` as a run's output_dir. Returns what it says of its run."""
    with open_run_folder(folder_arguments(folder, do_train=False)) as made:
        return made.run


LISTS = [
    *("{", "5", '{"a": 1}', "[1, 2]", '["a\\u0000b"]', "[" * 100_000, b"\xff", '["."]', '[".."]', '[""]'),
    *(
        '["notes.txt"]',
        '["../victim"]',
        '["checkpoint-3"]',
        '[".lock"]',
        '["model_state.pdparams", "../victim"]',
    ),
]


@pytest.mark.parametrize("text", LISTS, ids=lambda text: repr(text)[:20])
def test_a_list_of_moves_is_checked_before_any_is_made(tmp_path, text):
    victim, out = tmp_path / "victim", tmp_path / "out"
    (out / UNFINISHED).mkdir(parents=True)
    victim.mkdir()
    write(out, OLD)
    write(out / UNFINISHED, NEW)
    (out / UNFINISHED / REPLACED).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        InputError, match=f"--output_dir {out} can't be used, its {UNFINISHED} can't be moved"
    ):
        opened(out)
    assert read(out) == OLD and victim.is_dir()
    with pytest.raises(InputError, match=f"or any other with --output_dir {out}"):
        check_complete(out)


def test_links_are_replaced_and_not_written_through(tmp_path):
    """The names that a run writes to lead to files and folders of the user's."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "file").write_text("mine")
    (victim / REPLACED).write_text('["config.json"]')
    out.mkdir()
    for name in (RUN, f"{RUN}.tmp", "eval_results.json", "config.json", "eval_predictions.jsonl.tmp"):
        (out / name).symlink_to(victim / "file")
    for name in (UNFINISHED, "torch"):
        (out / name).symlink_to(victim)
    finish_interrupted_replace(out)  # there is nothing to finish: a link is none of a run's
    folder = run_folder(tmp_path / "none", output_dir=str(out))
    with folder.replacing((*MODEL, *RESULTS), folder.new_run) as staging:
        (staging / "torch").mkdir()
        (staging / "torch/model.safetensors").write_text("new")
    folder.begin_run()
    assert read(victim) == {"file": "mine", REPLACED: '["config.json"]'}
    assert not any(path.is_symlink() for path in (out / RUN, out / "torch", out / "eval_results.json"))
    assert (out / "torch/model.safetensors").read_text() == "new"


LOCKS = {
    "link": lambda path, victim: path.symlink_to(victim),
    "link to nowhere": lambda path, victim: path.symlink_to(victim.parent / "new"),
    "hard link": lambda path, victim: os.link(victim, path),
    "folder": lambda path, victim: path.mkdir(),
    "pipe": lambda path, victim: os.mkfifo(path),
    "device": lambda path, victim: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", LOCKS.values(), ids=LOCKS.keys())
def test_a_lock_that_is_no_file_is_a_line(tmp_path, make):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / LOCK, tmp_path / "victim")
    with pytest.raises(InputError, match=r"can't be used, its lock|holds a .lock that no run wrote"):
        opened(tmp_path / "out")
    assert names(tmp_path) == {"out", "victim"} and (tmp_path / "victim").read_text() == "mine"


RUNS = [
    *(
        "[]",
        "5",
        "null",
        "",
        "[" * 100_000,
        "{}",
        '{"id": [1]}',
        '{"id": ""}',
        '{"id": "x", "parent": 5}',
        b"\xff",
    ),
    *('{"id": "x", "parent": [1]}', '{"id": "x", "parent": ["y", "z"]}', '{"id": "x", "model": []}'),
]


@pytest.mark.parametrize("text", RUNS, ids=lambda text: repr(text)[:30])
def test_a_run_of_another_shape_is_a_line(tmp_path, text):
    (tmp_path / RUN).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"{tmp_path}/{RUN} can't be read"):
        opened(tmp_path)
    assert names(tmp_path) == {RUN}


@pytest.mark.parametrize("error", [OSError("no room"), InputError("x"), Fault("stopped by SIGTERM")])
def test_what_was_staged_goes_where_it_is_not_completed(tmp_path, error):
    with pytest.raises(type(error)), replace_together(tmp_path) as staging:
        (staging / "model_state.pdparams").write_bytes(b"x" * 99)
        raise error
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """By the run before, which ends between the opening and the locking: a third run would get it too."""
    path, lockf, calls = tmp_path / LOCK, lock.fcntl.lockf, []

    def ending(file, flags):
        calls.append(file)
        if len(calls) == 1:
            path.unlink()
        lockf(file, flags)

    monkeypatch.setattr(lock.fcntl, "lockf", ending)
    file, problem = lock.take_lock(path)
    assert problem is None and len(calls) == 2
    assert os.path.samestat(os.fstat(file.fileno()), path.stat())


def test_what_is_in_a_files_place_is_a_line(tmp_path):
    for name in ("arguments.json", "eval_results.json", "eval_predictions.jsonl.tmp", "trainer_state.json"):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=f"{tmp_path}/{name} is no file: move it away"):
            run_folder(tmp_path, overwrite_output_dir=True).check_contents(None)
        (tmp_path / name).rmdir()
    (tmp_path / "runs").symlink_to(tmp_path)
    with pytest.raises(InputError, match="runs is a link: remove it"):
        run_folder(tmp_path, overwrite_output_dir=True).check_contents(None)


def test_what_is_mounted_in_a_files_place_is_a_line(tmp_path, monkeypatch):
    """Such as a file by docker's -v: a rename would fail, after the work."""
    assert {b"/", b"/proc"} <= {path for path in replace.mount_points() if os.path.ismount(path)}
    out, mounts = tmp_path / "out dir", tmp_path / "mountinfo"
    (out / "torch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setattr(replace, "MOUNTS", mounts)
    for name in (
        "config.json",
        "model_state.pdparams",
        "eval_predictions.jsonl",
        "torch/config.json",
        "torch",
    ):
        path = f"{out}/{name}".replace(" ", "\\040")
        mounts.write_text(f"36 35 98:0 /a {path} rw - ext4 /dev/root rw\n1 2 0:1 / / rw - tmpfs x rw\n")
        for place in (out, tmp_path / "link"):
            folder = run_folder(place, overwrite_output_dir=True)
            if name != "torch":  # there is no such file
                folder.check_contents(None)
                (out / name).write_text("mine")
            with pytest.raises(InputError, match=f"{name[:5]}.* is mounted, and can't be replaced: move it"):
                folder.check_contents(None)
            if name != "torch":
                (out / name).unlink()


@pytest.mark.parametrize("name", ["", "torch"])
def test_a_folder_that_may_not_be_read_is_a_line(tmp_path, monkeypatch, name):
    (tmp_path / "torch").mkdir()

    listdir = os.listdir

    def refuse(path):
        if os.fspath(path) == str(tmp_path / name):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # root may read all
    with pytest.raises(InputError, match=f"--output_dir {tmp_path} can't be read .*: give another one"):
        run_folder(tmp_path).check_contents(None)


def test_another_users_file_in_a_folder_for_all_is_a_line(tmp_path, monkeypatch):
    folder = run_folder(tmp_path, overwrite_output_dir=True)
    (tmp_path / "config.json").write_text("mine")
    monkeypatch.setattr(replace.os, "geteuid", lambda: 4242)
    folder.check_contents(None)  # who may write to the folder may replace it
    tmp_path.chmod(0o1777)
    with pytest.raises(InputError, match="config.json is another user's: move it away"):
        folder.check_contents(None)
    monkeypatch.setattr(replace.os, "geteuid", lambda: tmp_path.stat().st_uid)
    folder.check_contents(None)


def test_output_dir_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    (tmp_path / "disk" / RUN).write_text(
        '{"id": "x", "parent": null, "model": 3, "base": "y", "settings": {}}'
    )
    assert opened(tmp_path / "out") == ("x", 3, None) and not (tmp_path / "out" / LOCK).exists()
