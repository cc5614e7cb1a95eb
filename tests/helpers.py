"""What several test files need: the fixtures' folders, the command line, small random models."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import hooks
import numpy as np
import paddle
import parallel_worker
from paddlenlp.peft import LoRAConfig
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration
from paddlenlp.utils.log import logger

import finetune_generation
from data import DataCollator, build_features
from glm.arguments import LORA_MODULES, GenerationArguments, GLMTrainingArguments, ModelArguments
from glm.decoding.decoder import beam_search
from glm.outputs.checkpoints import read_run
from glm.outputs.folder import RunFolder
from glm.weights import adapters as lora
from glm.weights.pretrained import find_pretrained
from utils import GLMTrainer

ROOT = Path(__file__).resolve().parent.parent
TINY_GLM = ROOT / "tests/fixtures/tiny-glm"
MINI = ROOT / "tests/fixtures/dureader_qg_mini"
PORTS = 15_000, 32_000  # below those that Linux gives to connections
os.environ["PORT_RANGE"] = f"{PORTS[0]}:{PORTS[1]}"  # of Paddle's launcher


def flags(**values):
    """The command line of arguments by their names, list of str."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


FAST = flags(
    src_length=160,
    tgt_length=24,
    min_tgt_length=0,
    num_beams=3,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=2,
    length_penalty=1.0,
)
COMMON = flags(
    src_length=160,
    tgt_length=20,
    min_tgt_length=2,
    num_beams=3,
    learning_rate=1e-3,
    label_smoothing=0.1,
    per_device_eval_batch_size=3,
    max_steps=6,
    logging_steps=1,
    seed=7,
    recompute=True,
    do_train=True,
    do_eval=True,
)


def small_data(folder, train=12, dev=5, test=3):
    for split, size in (("train", train), ("dev", dev), ("test", test)):
        lines = (MINI / f"{split}.json").read_text(encoding="utf-8").splitlines(keepends=True)[:size]
        (folder / f"{split}.json").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["helpers"])


def run_script(args, log, folder, environment, streams):
    """The script, in a process that was just forked; standard error goes to the file ``log``."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in any other process of the script
    signal.alarm(300)  # for a test that fails and forgets it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate([*streams, log]):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
    sys.argv = ["finetune_generation.py", *args]
    if "PADDLE_TRAINER_ID" in environment:
        parallel_worker.main()
    hooks.install()
    finetune_generation.main()


class Run:
    """finetune_generation.py in a process that is forked from one which has imported it: in 0.1 s, not 4."""

    def __init__(
        self, *args, hook=("nothing",), folder=ROOT, streams=(os.devnull, os.devnull), **environment
    ):
        self.log = tempfile.NamedTemporaryFile()
        environment = {**os.environ, "HOOK": json.dumps(hook), **environment}
        args = list(map(str, args)), self.log.name, folder, environment, streams
        self.process = FORK.Process(target=run_script, args=args)
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT}/tests"):  # for the server
            self.process.start()

    def lines(self):
        """What the run has written to standard error, list of str."""
        return Path(self.log.name).read_text(encoding="utf-8", errors="replace").splitlines()

    def wait_for(self, text):
        while not any(text in line for line in self.lines()):
            assert self.process.is_alive(), self.lines()
            time.sleep(0.01)

    def finish(self, seconds=240):
        """Wait for its end. Returns its exit code, negative for a signal, and its lines of standard error."""
        self.process.join(seconds)
        code = self.process.exitcode
        with contextlib.suppress(ProcessLookupError):  # what it has started, too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        assert code is not None, f"it did not end within {seconds} s"
        return code, self.lines()


def run(*args, code=0, **options):
    """Run the script to its end, with that exit ``code``. Returns the lines of its standard error."""
    found, lines = Run(*args, **options).finish()
    assert found == code, "\n".join(lines[-40:])
    return lines


def pipe(lines, *args):
    """Answer the file ``lines`` as a pipe. Returns the rows of standard output."""
    with tempfile.NamedTemporaryFile() as output:
        run(*args, "--predict_file", "-", streams=(lines, output.name))
        return read_jsonl(Path(output.name))


def main(monkeypatch, capsys, *args):
    """Run the script in this process. Returns its exit code and the lines of its standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = threading.excepthook
    log_handlers = logger.logger.handlers[:]
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", ["finetune_generation.py", *map(str, args)])
    try:
        finetune_generation.main()
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        assert logger.logger.handlers == log_handlers
    return code, capsys.readouterr().err.strip().splitlines()


def free_port():
    """A port that nobody listens on, and that the system gives to no connection before it is used."""
    while True:
        port = random.SystemRandom().randint(*PORTS)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def run_processes(commands, timeout=240, **environment):
    """Run commands side by side, each in a session of its own so that none of their processes survives them.

    Returns their exit codes and what they wrote.
    """
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    options.update(cwd=ROOT, env={**os.environ, **environment})
    started = [subprocess.Popen(list(map(str, command)), **options) for command in commands]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in started], outputs


def launcher(processes, log_dir):
    """The start of a command that runs the script on several CPU processes."""
    launch = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", processes]
    return [*launch, "--log_dir", log_dir, "tests/parallel_worker.py"]


def run_parallel(processes, *args, code=0, hook=("nothing",), machines=()):
    """Run the script on several CPU processes to its end, as Paddle's launcher would start them.

    Each is on a machine of its own where ``machines`` gives the folders that they start in.

    Returns the lines of their standard error.
    """
    endpoints = [f"127.0.0.1:{free_port()}" for _ in range(processes)]
    common = {
        "PADDLE_MASTER": f"127.0.0.1:{free_port()}",
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_TRAINERS_NUM": str(processes),
        "PADDLE_LOCAL_SIZE": "1" if machines else str(processes),
        "PADDLE_DISTRI_BACKEND": "gloo",
    }
    runs = []
    for rank, endpoint in enumerate(endpoints):
        own = {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_RANK_IN_NODE": "0" if machines else str(rank),
            "PADDLE_CURRENT_ENDPOINT": endpoint,
        }
        folder = machines[rank] if machines else ROOT
        runs.append(Run(*args, hook=hook, folder=folder, **common, **own))
    results = [run.finish() for run in runs]
    lines = [line for _, lines in results for line in lines]
    codes = [found for found, _ in results]
    assert codes == [code] * processes, f"{codes}\n" + "\n".join(lines[-60:])
    return lines


def outcome(folder, name="model_state.pdparams"):
    """Losses of the steps, generated ids of the dev records, merged weights of the file ``name``."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    predictions = [row["token_ids"] for row in read_jsonl(folder / "eval_predictions.jsonl")]
    return losses, predictions, dict(paddle.load(str(folder / name), return_numpy=True))


def tiny_glm(folder, **changes):
    """A copy of tiny-glm with another config, its weights drawn anew where the shapes change."""
    config = {**json.loads((TINY_GLM / "config.json").read_text()), **changes}
    paddle.seed(1)
    GLMForConditionalGeneration(GLMConfig(**config)).save_pretrained(str(folder))
    for name in ("cog-pretrain.model", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY_GLM / name).read_bytes())
    return folder


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def random_glm(seed=0, vocab_size=24, num_layers=2, hidden_size=32, heads=4, spread=0.35, dropout=0.0):
    """A GLM whose weights are wide enough that its predictions are far from uniform."""
    paddle.seed(seed)
    config = GLMConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        max_sequence_length=64,
        initializer_range=spread,
        embedding_dropout_prob=dropout,
        attention_dropout_prob=dropout,
        output_dropout_prob=dropout,
        output_predict=True,
    )
    model = GLMForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # constants by default, which would hide a mix-up
            parameter.set_value(parameter + paddle.normal(std=0.2, shape=parameter.shape))
    model.eval()
    return model


class FakeTokenizer:
    sop_token_id, eop_token_id = 1, 2


def plain_log_probabilities(model, source_ids, token_ids):
    """Log-probabilities of the next token after ``token_ids``, float64 [V], by PaddleNLP's own forward."""
    features = build_features(FakeTokenizer, source_ids, [*token_ids, 0])
    batch = DataCollator(0)([{**features, "index": 0}])
    logits = model(
        input_ids=paddle.to_tensor(batch["input_ids"]),
        position_ids=paddle.to_tensor(batch["position_ids"]),
        attention_mask=paddle.to_tensor(batch["attention_mask"].astype("float32")),
        return_dict=True,
    ).logits.numpy()[0, len(source_ids) + len(token_ids)]
    return log_softmax(logits)


def log_softmax(logits):
    logits = np.asarray(logits, dtype="float64")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def generation_arguments(**changes):
    defaults = {
        "tgt_length": 8,
        "min_tgt_length": 0,
        "num_beams": 3,
        "length_penalty": 0.7,
        "no_repeat_ngram_size": 0,
    }
    return GenerationArguments(**{**defaults, **changes})


def best_hypotheses(*args, **kwargs):
    """The best (token ids, score) of each source."""
    return [hypotheses[0] for hypotheses in beam_search(*args, **kwargs)]


def reference_loss(hidden_states, weight, labels, label_smoothing):
    """Losses [N] and their sum's gradients, written out in float64 from DESIGN's formula."""
    log_p = log_softmax(hidden_states @ weight.T)
    vocab_size = log_p.shape[-1]
    target = np.full(log_p.shape, label_smoothing / vocab_size)
    target[np.arange(len(labels)), labels] += 1 - label_smoothing
    grad_logits = np.exp(log_p) - target
    return -(target * log_p).sum(-1), grad_logits @ weight, grad_logits.T @ hidden_states


def make_trainer(tmp_path, model, **changes):
    args = GLMTrainingArguments(output_dir=str(tmp_path), device="cpu", **{"report_to": ["none"], **changes})
    return GLMTrainer(model=model, args=args, generation=generation_arguments())


def make_batch():
    rng = np.random.default_rng(3)
    features = [
        build_features(
            FakeTokenizer, rng.integers(3, 24, [length]).tolist(), [*rng.integers(3, 24, [size]), 2]
        )
        for length, size in ((9, 4), (5, 7), (12, 1))
    ]
    return features, DataCollator(0)([{**feature, "index": i} for i, feature in enumerate(features)])


def lora_config(modules=LORA_MODULES, **changes):
    targets = [rf".*\.{module}" for module in modules]
    return LoRAConfig(**{"r": 2, "lora_alpha": 6, "dtype": "float32", "target_modules": targets, **changes})


def folder_arguments(folder, **changes):
    """What a RunFolder takes of a run's arguments, in a run that trains into ``folder``."""
    values = {
        "output_dir": str(folder),
        "do_train": True,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": None,
        "ignore_load_lr_and_optim": False,
        "tensor_parallel_degree": 1,
        "tensor_parallel_rank": -1,
        "global_batch_size": 24,
        "world_size": 1,
        "evaluation_strategy": "no",
        "save_strategy": "steps",
        "save_on_each_node": False,
        "should_save": True,
    }
    return SimpleNamespace(**{**values, **changes})


def run_folder(folder, **changes):
    """A RunFolder that knows whose it is, as open_run_folder makes it, without a lock."""
    made = RunFolder(folder_arguments(folder, **changes))
    made.run = read_run(folder)
    return made


def last_checkpoint(folder):
    """The path of the checkpoint that the plain command goes on from, or None."""
    checkpoint = run_folder(folder)._find_last(())
    return checkpoint and str(checkpoint)


def add_lora(model, config=None, weights=None):
    """The model with an adapter, by default a new one."""
    adapter = lora.Adapter(None, config or lora_config(), weights)
    return lora.add_lora(model, SimpleNamespace(adapter=adapter, base_fingerprint=None), seed=0)


def pretrained_in(folder, **arguments):
    """What the script makes of --model_name_or_path and other flags of the model."""
    return find_pretrained(ModelArguments(model_name_or_path=str(folder), **arguments))


# What the tests of faults train with.
TRAIN = flags(
    model_name_or_path=TINY_GLM,
    task_name=MINI,
    src_length=160,
    tgt_length=24,
    min_tgt_length=0,
    num_beams=2,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    logging_steps=1,
    do_train=True,
)


def repeats_ngram(tokens, n):
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)] if n else []
    return len(ngrams) != len(set(ngrams))
