"""The published names, downloaded by PaddleNLP itself, from a loopback server in the layout in which it publishes."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import FAST, MINI, ROOT, TINY_GLM, read_jsonl, run

# A tiny model in place of the large one: its bytes, the checksums of its data and, in 2.8.1, its built-in config. What
# PaddleNLP asks its two hosts for goes to the loopback, whichever of its two HTTP libraries asks.
RUNNER = """
import hashlib, json, os, sys
import httpx, requests
sys.path.insert(0, ".")
HOSTS = ("https://bj.bcebos.com/paddlenlp", "https://paddlenlp.bj.bcebos.com")

def here(url):
    for host in HOSTS:
        url = url.replace(host, os.environ["SERVER"])
    return url

def send(self, request, **kwargs):
    request.url, self.trust_env = here(request.url), False
    return requests_send(self, request, **{**kwargs, "proxies": {}})

def httpx_send(self, request, **kwargs):
    request.url = httpx.URL(here(str(request.url)))
    return client_send(self, request, **kwargs)

requests_send, requests.Session.send = requests.Session.send, send
client_send, httpx.Client.send = httpx.Client.send, httpx_send
from paddlenlp.datasets.dureader_qg import DuReaderQG
from paddlenlp.transformers.glm import configuration
for split, meta in DuReaderQG.SPLITS.items():
    with open(os.path.join(os.environ["SITE"], f"datasets/DuReaderQG/{split}.json"), "rb") as file:
        DuReaderQG.SPLITS[split] = meta._replace(md5=hashlib.md5(file.read()).hexdigest())
with open(os.path.join(os.environ["SITE"], "models/community/THUDM/glm-large-chinese/config.json")) as file:
    configuration.GLM_PRETRAINED_INIT_CONFIGURATION["THUDM/glm-large-chinese"].update(json.load(file))
import finetune_generation
finetune_generation.main()
"""


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

    def train(self, home, out):
        """The README's names, in a home of its own. Returns the exit code and the lines of standard error."""
        self.asked.clear()
        env = {**os.environ, "HOME": str(home), "SITE": str(self.folder), "NO_PROXY": "*", "no_proxy": "*",
               "SERVER": f"http://127.0.0.1:{self.server.server_port}"}  # fmt: skip
        flags = ["--model_name_or_path", "THUDM/glm-large-chinese", "--task_name", "dureader_qg", "--do_train",
                 "--do_eval", "--max_steps", 1, "--output_dir", out, *FAST]  # fmt: skip
        command = [sys.executable, "-c", RUNNER, *map(str, flags)]
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
    flags = ["--task_name", MINI, "--do_predict", "--max_predict_samples", 2, *FAST]
    for number, model in enumerate((TINY_GLM, folder)):
        run("--model_name_or_path", model, *flags, "--output_dir", tmp_path / str(number))
    rows = [read_jsonl(tmp_path / f"{number}/test_predictions.jsonl") for number in (0, 1)]
    assert [row["token_ids"] for row in rows[0]] == [row["token_ids"] for row in rows[1]]


def test_a_checkpoint_of_pytorch_is_told_apart(tmp_path):
    """Without model_state.pdparams: one line that says which file is wanted."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_GLM, folder)
    (folder / "model_state.pdparams").rename(folder / "pytorch_model.bin")
    result = run("--model_name_or_path", folder, "--task_name", MINI, "--do_eval", *FAST, "--output_dir",
                 tmp_path / "out", check=False)  # fmt: skip
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "model_state.pdparams" in line and "Traceback" not in result.stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "glm"
