"""Beam search: the decoder, which finds the candidates for the beams' next tokens."""

import functools
from typing import Optional

import numpy as np
import paddle
from numpy import ndarray
from paddle import Tensor
from paddle.distributed.collective import Group
from paddlenlp.transformers import GLMForConditionalGeneration

from glm.arguments import GenerationArguments
from glm.decoding.beams import Beams
from glm.decoding.cache import decode_one_token, prefill
from glm.decoding.candidates import (
    Candidates,
    draw_tokens,
    drawn_candidates,
    likeliest_tokens,
    without_banned,
)
from glm.device import supports_cuda_graphs, upload
from glm.errors import InputError
from glm.graphs import CapturedStep, all_gather

GROWTH = 16  # steps by which a cache grows: slots not written yet are attended over too, masked
SPARE = 14  # candidates beyond those that are needed, in place of banned ones


class Decoder:
    """Feed the beams' tokens to the model, and find the candidates for the next ones.

    On a device that captures CUDA graphs, a step there is one copy of token ids to the device, one
    launch and one copy of candidates from it; before a draw, noise is made there. The cache has slots
    for all steps at once, and finished examples stay until a quarter is left, for each change of a
    tensor's size is a new capture, which takes as long as a step that is launched operator by
    operator. On a CPU the cache grows, and finished examples leave at once.
    """

    def __init__(
        self,
        model: GLMForConditionalGeneration,
        input_ids: Tensor,
        source_length: ndarray,
        start_token_id: int,
        generation: GenerationArguments,
        group: Optional[Group] = None,
    ):
        """Prefill the cache. The arguments are those of ``beam_search``."""
        self.model, self.start_token_id = model, start_token_id
        self.generation, self.group = generation, group
        self.cache = prefill(model, input_ids, source_length, generation.num_beams)
        self.examples = np.arange(len(source_length))  # those in the cache
        self.captured = supports_cuda_graphs()
        parts = 1 if group is None else group.nranks
        self.vocab_size = model.glm.word_embeddings.weight.shape[0] * parts
        self.capacity = 0  # steps that the cache has slots left for

    def next_candidates(self, beams: Beams) -> Candidates:
        """Take one step of the running ``beams``. Raises InputError where the model is no usable one."""
        # 1. Feed the last token of each beam, and which beam of the step before it goes on from.
        rows = self._feed(beams)
        # 2. Run the model, and 3. choose the candidates of the running examples.
        if self.generation.select_topk:
            logits, table = self.step()
            banned = beams.banned()  # while the device is at work
            candidates = self._likeliest(logits, table, rows, banned)
        else:
            candidates = drawn_candidates(self.step(), rows)
        if np.isnan(candidates.log_probabilities).any():
            raise InputError(
                "the model's probabilities are no numbers: its weights hold NaN or infinity, or overflow in "
                "float16: give other weights, or --bf16 in place of --fp16"
            )
        return candidates

    def _feed(self, beams):
        """Copy the inputs of a step to the device. Returns the cache's rows of the running examples."""
        num_beams = self.generation.num_beams
        rows = np.searchsorted(self.examples, beams.example)
        origins = rows[:, None] * num_beams + beams.parents
        most = len(self.examples) // 4 if self.captured else len(self.examples) - 1
        if not self.capacity or len(rows) <= most:
            self._compact(origins, beams)
            rows = np.arange(len(rows))
            origins = np.arange(origins.size).reshape(origins.shape)
        self.capacity -= 1
        inputs = self.filler_inputs.copy()
        inputs[0, rows] = beams.tokens[:, :, beams.step - 1] if beams.step else self.start_token_id
        inputs[1, rows] = origins
        if not self.generation.select_topk:
            row, beam, token = beams.banned().T
            bans = (rows[row] * num_beams + beam) * self.noise.shape[1] + token
            inputs[2:].reshape(-1)[: len(bans)] = bans
            paddle.assign(paddle.uniform(self.noise.shape, min=1e-20, max=1.0), self.noise)
        upload(inputs, self.inputs)
        return rows

    def _compact(self, origins, beams):
        """Leave in the cache the running examples alone, with slots for more steps."""
        if not self.capacity:
            steps_left = self.generation.tgt_length - beams.step
            self.capacity = steps_left if self.captured else min(GROWTH, steps_left)
        self.step = None  # a graph holds memory
        self.cache.compact(origins, beams.step, self.capacity)
        self.examples = beams.example
        # For an example that has finished: any token, after the beam itself.
        numbers = np.arange(origins.size).reshape(origins.shape)
        self.filler_inputs = np.stack([np.zeros_like(numbers), numbers])
        self.noise = None
        if not self.generation.select_topk:
            self.noise = paddle.empty([origins.size, self.vocab_size], "float32")
            # Room for the bans of each beam: the end token, and each of its tokens.
            most = self.generation.tgt_length if self.generation.no_repeat_ngram_size else 1
            no_bans = np.full([most, *origins.shape], self.noise.size)
            self.filler_inputs = np.concatenate([self.filler_inputs, no_bans])
        self.inputs = paddle.to_tensor(self.filler_inputs)
        step = _step, self.model, self.cache, self.inputs, self.noise, self.generation, self.group
        self.step = CapturedStep(functools.partial(*step))

    def _likeliest(self, logits, table, rows, banned):
        count = 2 * self.generation.num_beams
        candidates = self._without_banned(table, rows, banned)
        if len(banned) > SPARE and np.isfinite(candidates.sort_keys).sum(-1).min() < count:
            beam = banned[:, 0] * self.generation.num_beams + banned[:, 1]
            most = np.bincount(beam).max()  # bans of one beam
            table = likeliest_tokens(logits, count + int(most), self.group)
            candidates = self._without_banned(table, rows, banned)
        return candidates

    def _without_banned(self, table, rows, banned):
        table = table.numpy().reshape([2, *self.inputs.shape[1:], -1])
        return without_banned(table[:, rows], banned)


def _step(model, cache, inputs, noise, generation, group):
    """Return the logits of the next token and its likeliest ones, or what is drawn by ``noise``."""
    logits = decode_one_token(model, cache, inputs[0], inputs[1])
    if noise is None:
        return logits, likeliest_tokens(logits, 2 * generation.num_beams + SPARE, group)
    if group is not None:  # the filters need complete rows
        logits = all_gather(logits, group)
    table = draw_tokens(logits, noise, inputs[2:].reshape([-1]), 2 * generation.num_beams, generation)
    return table.reshape([3, *inputs.shape[1:], -1])


@paddle.no_grad()
def beam_search(
    model: GLMForConditionalGeneration,
    input_ids: Tensor,
    source_length: ndarray,
    generation: GenerationArguments,
    start_token_id: int,
    end_token_id: int,
    group: Optional[Group] = None,
) -> list[list[tuple[list[int], float]]]:
    """Generate targets of each source, by the rules of THUDM/GLM.

    Args:
        model: In eval mode.
        input_ids: int64 [B, S], sources of ``data.encode_source``, padded on the right.
        source_length: int64 [B].
        generation: The rules.
        start_token_id: The first token of a target.
        end_token_id: The last one.
        group: Of tensor parallelism.

    Returns:
        Of each source its num_return_sequences best hypotheses, the best first: token ids without
        start and end token, and the score. That is the sum of the natural logarithms of the
        probabilities, the end token's included, over length ** length_penalty.
    """
    decoder = Decoder(model, input_ids, source_length, start_token_id, generation, group)
    beams = Beams(len(source_length), generation, end_token_id)
    while len(beams.example):
        beams.advance(decoder.next_candidates(beams))
    return beams.results
