"""What several test modules need: the fixtures' folders, their tokenizer, and small random models."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import GLMConfig, GLMForConditionalGeneration, GLMTokenizer

from data import DataCollator, build_features
from glm.arguments import GenerationArguments
from glm.device import use_device, use_the_whole_cpu
from glm.generation import beam_search

use_device("cpu")
use_the_whole_cpu()

ROOT = Path(__file__).resolve().parent.parent
TINY_GLM = ROOT / "tests/fixtures/tiny-glm"
MINI = ROOT / "tests/fixtures/dureader_qg_mini"


@pytest.fixture(scope="session")
def tokenizer():
    return GLMTokenizer.from_pretrained(str(TINY_GLM))


def random_glm(seed=0, vocab_size=24, num_layers=2, hidden_size=32, heads=4, spread=0.35):
    """A GLM whose weights are wide enough that its predictions are far from uniform."""
    paddle.seed(seed)
    config = GLMConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        max_sequence_length=64,
        initializer_range=spread,
        embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
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
