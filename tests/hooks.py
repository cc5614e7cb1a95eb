"""What a test does inside the processes of a run: a fault at a chosen moment, or a look at what they compute.

HOOK='["fault", "SIGTERM", "training_step", 3, 0]' tests/parallel_worker.py ...: the name of a function below
and its arguments, as JSON. ``helpers.Run`` and ``helpers.run_parallel`` take the same as ``hook``.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
import paddle
import paddle.distributed as dist
import requests
from paddlenlp.datasets.cmrc2018 import CMRC2018
from paddlenlp.datasets.drcd import DRCD
from paddlenlp.datasets.dureader_qg import DuReaderQG
from paddlenlp.datasets.dureader_robust import DuReaderRobust
from paddlenlp.transformers.glm.configuration import GLM_PRETRAINED_INIT_CONFIGURATION

import finetune_generation
import utils
from data import DataCollator
from glm.errors import Fault
from glm.modeling import LabelSmoothedLoss
from glm.training.saving import SaveCheckpoints

METHODS = {
    "train": utils.GLMTrainer,
    "training_step": utils.GLMTrainer,
    "prediction_step": utils.GLMTrainer,
    "on_save": SaveCheckpoints,  # the files of a checkpoint are written, its mark is not
    "__call__": DataCollator,
}


def install():
    """Do what the variable HOOK says, if there is one."""
    name, *arguments = json.loads(os.environ.get("HOOK", '["nothing"]'))
    globals()[name](*arguments)


def nothing():
    pass


def act(action):
    print("FAULT AT", time.time(), file=sys.stderr, flush=True)
    if action.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[action])
    elif action == "sleep":
        time.sleep(60)
    elif action == "full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "Fault":
        raise Fault("no more of this")
    elif action != "nothing":
        raise AssertionError(action)


def fault(action, method, call=1, rank=0):
    """Act when process ``rank`` calls the ``method`` for the ``call``-th time."""
    owner, calls = METHODS[method], []
    original = getattr(owner, method)

    def replaced(self, *args, **kwargs):
        calls.append(method)
        if len(calls) == call and dist.get_rank() == rank:
            act(action)
        return original(self, *args, **kwargs)

    setattr(owner, method, replaced)


def two_signals_in_a_backward_pass():
    """Have the second backward pass of the loss interrupted by SIGTERM, twice."""
    backward, calls = LabelSmoothedLoss.backward, []

    def interrupted(context, *gradients):
        calls.append(context)
        if len(calls) == 2:
            act("SIGTERM")
            act("SIGTERM")
        return backward(context, *gradients)

    LabelSmoothedLoss.backward = staticmethod(interrupted)


def fault_at_file(action, event, pattern, call=1):
    """Act when a file of that pattern is opened ("open") or moved ("os.rename") for the ``call``-th time."""
    calls = []

    def watch(name, args):
        if name == event and isinstance(args[0], (str, os.PathLike)):
            if fnmatch.fnmatch(os.fspath(args[0]), pattern):
                calls.append(args[0])
                if len(calls) == call:
                    act(action)

    sys.addaudithook(watch)


def compare_hidden_states():
    """Print how far the last hidden states of the first two processes are apart, at each loss."""
    compute_loss = utils.GLMTrainer.compute_loss

    def checked(self, model, inputs):
        seen, parts = [], []
        keep = self.model.register_forward_post_hook(lambda *args: seen.append(args[2].detach()))
        loss = compute_loss(self, model, inputs)
        keep.remove()
        dist.all_gather(parts, seen[0])
        print("LARGEST DIFFERENCE", float((parts[0] - parts[1]).abs().max()), file=sys.stderr)
        return loss

    utils.GLMTrainer.compute_loss = checked


def print_hypotheses():
    """Print what each process generates."""
    beam_search = utils.beam_search

    def printing(*args, **kwargs):
        hypotheses = beam_search(*args, **kwargs)
        print("GENERATED", hypotheses, file=sys.stderr)
        return hypotheses

    utils.beam_search = printing


def split_loss(folder):
    """Write losses and gradients of half a vocabulary to ``folder``, from the arrays there, and end."""
    dist.init_parallel_env()
    group, rank = dist.new_group([0, 1]), dist.get_rank()
    data = np.load(f"{folder}/in.npz")
    hidden = paddle.to_tensor(data["hidden"], stop_gradient=False)
    weight = paddle.to_tensor(np.split(data["weight"], 2)[rank], stop_gradient=False)
    losses = LabelSmoothedLoss.apply(hidden, weight, paddle.to_tensor(data["labels"]), 0.1, group)
    losses.sum().backward()
    arrays = {"losses": losses, "hidden": hidden.grad, "weight": weight.grad}
    np.savez(f"{folder}/out{rank}.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    sys.exit(0)


def strangers():
    """Let strangers come first to the port where the processes of a run meet, and stay."""
    create_server = socket.create_server

    def watched(address, **kwargs):
        listener = create_server(address, **kwargs)
        said = [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, b"x", bytes(36), b"\x80\x04N."] * 25
        first = [socket.create_connection(listener.getsockname()) for _ in said[:60]]
        for stranger, text in zip(first, said):
            stranger.sendall(text)
        kept.extend(first)

        def come():
            with contextlib.suppress(OSError):  # the port is closed once all have met
                for text in said * 9:
                    kept.append(socket.create_connection(listener.getsockname(), timeout=1))
                    kept[-1].sendall(text)

        threading.Thread(target=come, daemon=True).start()
        print("STRANGERS", len(said), file=sys.stderr)
        return listener

    kept, socket.create_server = [], watched


def published(server, folder):
    """Ask the loopback ``server`` of ``folder``, which has a tiny model, for what PaddleNLP downloads.

    Its checksums of data and, for PaddleNLP 2, its config take the place of the built-in ones.
    """
    hosts = ("https://bj.bcebos.com/paddlenlp", "https://paddlenlp.bj.bcebos.com")

    def here(url):
        for host in hosts:
            url = url.replace(host, server)
        return url

    def send(self, request, **kwargs):
        request.url, self.trust_env = here(request.url), False
        return requests_send(self, request, **{**kwargs, "proxies": {}})

    def httpx_send(self, request, **kwargs):
        request.url = httpx.URL(here(str(request.url)))
        return client_send(self, request, **kwargs)

    # Whichever of its two HTTP libraries asks.
    requests_send, requests.Session.send = requests.Session.send, send
    client_send, httpx.Client.send = httpx.Client.send, httpx_send
    for split, meta in DuReaderQG.SPLITS.items():
        data = Path(folder, f"datasets/DuReaderQG/{split}.json").read_bytes()
        DuReaderQG.SPLITS[split] = meta._replace(md5=hashlib.md5(data).hexdigest())
    for builder in (CMRC2018, DRCD, DuReaderRobust):
        builder.SPLITS = {split: meta._replace(md5=None) for split, meta in builder.SPLITS.items()}
    DuReaderRobust.MD5 = None  # of the archive
    config = Path(folder, "models/community/THUDM/glm-large-chinese/config.json").read_text()
    GLM_PRETRAINED_INIT_CONFIGURATION["THUDM/glm-large-chinese"].update(json.loads(config))


if __name__ == "__main__":
    install()
    finetune_generation.main()
