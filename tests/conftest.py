"""The devices of the tests, and the fixtures that several files use."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from helpers import TINY_GLM
from paddlenlp.transformers import GLMTokenizer

from glm.device import use_device, use_the_whole_cpu

use_device("cpu")


use_the_whole_cpu()

# Tests that were started in the background ignore some of them, and a run that is forked here would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tokenizer():
    return GLMTokenizer.from_pretrained(str(TINY_GLM))


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory):
    """The published sentencepiece model: GLM_CHINESE_TOKENIZER's, or that of an installed sat package."""
    path, folder = os.environ.get("GLM_CHINESE_TOKENIZER"), tmp_path_factory.mktemp("tokenizer")
    spec = importlib.util.find_spec("sat")
    if not path and spec is not None:
        path = Path(spec.origin).parent / "tokenization/embed_assets/chinese_sentencepiece/cog-pretrain.model"
    if not path or not Path(path).is_file():
        pytest.skip(
            "no cog-pretrain.model: set GLM_CHINESE_TOKENIZER to it, or pip install SwissArmyTransformer"
        )
    (folder / "cog-pretrain.model").write_bytes(Path(path).read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GLMChineseTokenizer"}')
    return GLMTokenizer.from_pretrained(str(folder))
