"""The devices of the tests, and the fixtures that several files use."""

import pytest
from helpers import TINY_GLM
from paddlenlp.transformers import GLMTokenizer

from glm.device import use_device, use_the_whole_cpu

use_device("cpu")


use_the_whole_cpu()


@pytest.fixture(scope="session")
def tokenizer():
    return GLMTokenizer.from_pretrained(str(TINY_GLM))
