"""The published names, downloaded by PaddleNLP itself, from a loopback server in its own layout."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading

import pytest
from helpers import FAST, MINI, ROOT, TINY_GLM, flags, read_jsonl, run


class Site:
    """A folder and the server of it: what it was asked for, and what it is to cut short."""

    def __init__(self, folder):
        self.folder, self.asked, self.cut = folder, [], None
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args):
                site.asked.append((self.command, os.path.basename(self.path)))

            def copyfile(self, source, output):
                data = source.read()
                if site.cut and self.path.endswith(site.cut):
                    data, self.close_connection = data[: len(data) // 2], True
                output.write(data)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def train(self, home, out, task_name="dureader_qg"):
        """The README's names, in a home of its own. Returns the exit code and the lines of standard error."""
        self.asked.clear()
        hook = ["published", f"http://127.0.0.1:{self.server.server_port}", str(self.folder)]
        env = {**os.environ, "HOME": str(home), "NO_PROXY": "*", "no_proxy": "*", "HOOK": json.dumps(hook)}
        args = flags(
            model_name_or_path="THUDM/glm-large-chinese", task_name=task_name, max_steps=1, output_dir=out
        )
        command = [sys.executable, "tests/hooks.py", *map(str, FAST), "--do_train", "--do_eval", *args]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        return result.returncode, result.stderr.splitlines()


@pytest.fixture
def site(tmp_path):
    models, data = tmp_path / "site/models/community/THUDM", tmp_path / "site/datasets/DuReaderQG"
    data.mkdir(parents=True)
    shutil.copytree(TINY_GLM, models / "glm-large-chinese")
    shutil.copy(TINY_GLM / "cog-pretrain.model", models)
    shutil.copy(TINY_GLM / "model_state.pdparams", models / "glm-large-chinese.pdparams")
    for split in ("train", "dev"):
        lines = (MINI / f"{split}.json").read_text(encoding="utf-8").splitlines(keepends=True)[:4]
        (data / f"{split}.json").write_text("".join(lines), encoding="utf-8")
    site = Site(tmp_path / "site")
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.mark.slow
def test_a_download_the_cache_and_a_server_that_is_gone(site, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    code, lines = site.train(home, out)
    assert code == 0, lines[-5:]
    fetched = {name for command, name in site.asked if command == "GET"}
    assert {"glm-large-chinese.pdparams", "cog-pretrain.model", "train.json", "dev.json"} <= fetched
    assert len(read_jsonl(out / "eval_predictions.jsonl")) == 4
    site.server.shutdown()
    site.server.server_close()
    assert site.train(home, tmp_path / "again")[0] == 0  # what is in the cache needs no server
    assert read_jsonl(tmp_path / "again/eval_predictions.jsonl") == read_jsonl(out / "eval_predictions.jsonl")
    (tmp_path / "new").mkdir()
    code, lines = site.train(tmp_path / "new", tmp_path / "nothing")
    assert (
        code == 2
        and "THUDM/glm-large-chinese: its" in lines[-1]
        and "if its host can be reached" in lines[-1]
    )
    assert not (tmp_path / "nothing").exists() and not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_a_download_cut_short_is_not_taken_for_whole(site, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    for site.cut in ("train.json", "glm-large-chinese.pdparams"):
        code, lines = site.train(home, out)
        assert code == 2 and lines[-1].startswith("finetune_generation.py: error: "), lines[-5:]
        assert not any("Traceback" in line for line in lines) and not out.exists()
    site.cut = None
    code, lines = site.train(home, out)
    assert code == 0 and ("GET", "glm-large-chinese.pdparams") in site.asked, lines[-5:]


def make_reading_comprehension(folder, name):
    """Put the train and dev splits of a dataset where PaddleNLP looks for them, as SQuAD has them."""
    places = {
        "cmrc2018": "cmrc/cmrc2018_{}.json",
        "drcd": "DRCD/DRCD_{}.json",
        "dureader_robust": "dureader_robust-data/{}.json",
    }
    for split in ("train", "dev"):
        records = read_jsonl(MINI / f"{split}.json")[:4]
        paragraphs = [
            {
                "context": record["context"],
                "qas": [
                    {
                        "id": f"{split}-{record['id']}",
                        "question": record["question"],
                        "answers": [{"text": record["answer"], "answer_start": 0}],
                    },
                    {"id": "none", "question": "问？", "answers": []},
                ],
            }
            for record in records
        ]
        spelled = "training" if (name, split) == ("drcd", "train") else split
        path = folder / places[name].format(spelled)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"data": [{"title": "题", "paragraphs": paragraphs}]}), encoding="utf-8")
    if name == "dureader_robust":
        with tarfile.open(folder / "dureader_robust-data.tar.gz", "w:gz") as archive:
            archive.add(path.parent, "dureader_robust-data")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cmrc2018", "drcd", "dureader_robust"])
def test_reading_comprehension_that_paddlenlp_has(site, tmp_path, name):
    make_reading_comprehension(tmp_path / "site/datasets", name)
    (tmp_path / "home").mkdir()
    code, lines = site.train(tmp_path / "home", tmp_path / "out", name)
    assert code == 0, lines[-5:]
    rows, records = read_jsonl(tmp_path / "out/eval_predictions.jsonl"), read_jsonl(MINI / "dev.json")[:4]
    fields = ("context", "answer", "question")
    found = [(row["id"], row["context"], row["answer"], row["reference"]) for row in rows]
    assert found == [(f"dev-{record['id']}", *(record[field] for field in fields)) for record in records]
    assert any("4 of 8 questions have no answer and are left out" in line for line in lines)


def test_safetensors(tmp_path):
    """A folder whose weights are model.safetensors predicts as the one with model_state.pdparams."""
    from paddlenlp.transformers import AutoModelForConditionalGeneration

    folder = tmp_path / "model"
    AutoModelForConditionalGeneration.from_pretrained(str(TINY_GLM)).save_pretrained(
        str(folder), safe_serialization=True
    )
    assert (folder / "model.safetensors").is_file() and not (folder / "model_state.pdparams").exists()
    for name in ("cog-pretrain.model", "tokenizer_config.json"):
        shutil.copy(TINY_GLM / name, folder)
    args = [*FAST, "--do_predict", *flags(task_name=MINI, max_predict_samples=2)]
    for number, model in enumerate((TINY_GLM, folder)):
        run(*args, *flags(model_name_or_path=model, output_dir=tmp_path / str(number)))
    rows = [read_jsonl(tmp_path / f"{number}/test_predictions.jsonl") for number in (0, 1)]
    assert [row["token_ids"] for row in rows[0]] == [row["token_ids"] for row in rows[1]]


def test_a_file_of_another_framework_than_its_name_is_told_apart(tmp_path):
    """model_state.pdparams by the name of PyTorch's file: one line that says which file it is."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_GLM, folder)
    (folder / "model_state.pdparams").rename(folder / "pytorch_model.bin")
    lines = run(
        *FAST,
        "--do_eval",
        *flags(model_name_or_path=folder, task_name=MINI, output_dir=tmp_path / "out"),
        code=2,
    )
    assert "pytorch_model.bin: it is truncated, or no file" in lines[-1] and "Traceback" not in "".join(lines)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "glm"
