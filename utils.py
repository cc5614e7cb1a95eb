"""What the run calls: the loss, cached decoding, beam search, the metrics and GLMTrainer."""

import zlib  # noqa: F401  isort:skip  Before anything can load libpaddle, whose zlib symbols would shadow the system's.

import contextlib
import ctypes
import functools
import glob
import json
import os
import shutil
import signal
import sys
import time
import unicodedata
import warnings
from collections import defaultdict

import numpy as np


def use_the_whole_cpu():
    """Let Paddle use the whole of a CPU. Must run before paddle loads.

    Paddle starts with one thread, its MKL takes a slow path on processors that are not Intel's, and glibc returns each
    large tensor to the system, so that the next one costs page faults again: more than many an operator itself. A
    thread count that the user set stays; processes of one launch share the cores.
    """
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and stay there for the next ones
    if "OMP_NUM_THREADS" in os.environ:
        return
    import paddle

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # By this call, not by OMP_NUM_THREADS, whose use makes paddle print a warning at import.
    paddle.base.core.set_num_threads(max(1, cores // int(os.environ.get("PADDLE_LOCAL_SIZE", 1))))


# The first is said again in our own words, the second is of no use to a user.
warnings.filterwarnings("ignore", message="You are using GPU version Paddle|Setuptools is replacing distutils")
use_the_whole_cpu()

import paddle  # noqa: E402
import paddle.distributed as dist  # noqa: E402
import paddle.nn.functional as F  # noqa: E402
from paddle.autograd import PyLayer  # noqa: E402
from paddle.distributed import fleet  # noqa: E402
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker  # noqa: E402
from paddlenlp.metrics import BLEU  # noqa: E402
from paddlenlp.trainer import Trainer  # noqa: E402
from paddlenlp.trainer.trainer_callback import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
)
from paddlenlp.trainer.trainer_utils import IntervalStrategy, SchedulerType, TrainOutput  # noqa: E402
from paddlenlp.utils.log import logger  # noqa: E402
from rouge import Rouge  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import GroupedBatchSampler, InputError, build_dataset, decode_target  # noqa: E402

NEVER = 2**62  # a step that is never reached
MASKED = -65504.0  # what is added to the attention score of a hidden position: float16's lowest


# ------------------------------------------------------------------------------------------------------------ loss


def _log_sum_exp(logits, probabilities, group):
    """Of the whole rows, of which each process of ``group`` holds a part: what it is here, and of all, float32 [...].

    From what is at hand: the likeliest token's log p is its logit less the log-sum-exp, and its p is at least 1 / V, so
    that nothing underflows.
    """
    local = whole = logits - paddle.log(probabilities)
    if group is not None:
        largest = local.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        total = paddle.exp(local - largest)
        dist.all_reduce(total, group=group)
        whole = largest + paddle.log(total)
    return local, whole


class LabelSmoothedLoss(PyLayer):
    """Head and label-smoothed cross entropy in one, so that only one [N, V] table ever exists.

    Per target: (1 - e) * (-log p[label]) + e * mean over the vocabulary of (-log p), after Szegedy et al.
    (arXiv 1512.00567), in float32. Its gradient by the logits is p - (1 - e) * onehot(label) - e / V.

    With tensor parallelism each process holds a part of the vocabulary; only vectors [N] and the hidden states'
    gradient are reduced over the group.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, label_smoothing, group=None):
        """Args: hidden_states [N, C], weight [V / processes, C], labels int64 [N]. Returns the losses, float32 [N]."""
        logits = paddle.matmul(hidden_states, weight, transpose_y=True)  # [N, V / processes]
        ctx.dtype, ctx.group = logits.dtype, group
        logits = logits.astype("float32")
        part = logits.shape[1]
        labels = labels - (0 if group is None else group.rank * part)
        here = ((labels >= 0) & (labels < part)).astype("float32")  # whether the label is in this part
        label_index = paddle.arange(labels.shape[0]) * part + labels.clip(0, part - 1)  # in the flat table
        sums = paddle.stack([logits.reshape([-1]).gather(label_index) * here, logits.sum(-1)])
        largest = logits.max(-1)
        probabilities = F.softmax_(logits)
        local, log_sum_exp = _log_sum_exp(largest, probabilities.max(-1), group)
        ctx.vocab_size = part
        if group is not None:
            dist.all_reduce(sums, group=group)
            ctx.vocab_size *= group.nranks
        ctx.label_share, ctx.smooth_share = (1 - label_smoothing) * here, label_smoothing / ctx.vocab_size
        ctx.save_for_backward(hidden_states, weight, probabilities, label_index, paddle.exp(local - log_sum_exp))
        return log_sum_exp - (1 - label_smoothing) * sums[0] - ctx.smooth_share * sums[1]

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight, table, label_index, part_share = ctx.saved_tensor()
        if ctx.group is not None:  # from probabilities within this part to those within the vocabulary
            table.multiply_(part_share.unsqueeze(-1))
        table.subtract_(paddle.full([1], ctx.smooth_share))
        flat = table.reshape([-1])
        flat.scatter_(label_index, flat.gather(label_index) - ctx.label_share)
        table = flat.reshape(table.shape).multiply_(grad.unsqueeze(-1)).astype(ctx.dtype)
        grad_hidden_states = paddle.matmul(table, weight.astype(ctx.dtype)).astype(hidden_states.dtype)
        grad_weight = paddle.matmul(table, hidden_states.astype(ctx.dtype), transpose_x=True)
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_states, group=ctx.group)
        return grad_hidden_states, grad_weight.astype(weight.dtype)


# ------------------------------------------------------------------------------------------------- cached decoding


def _attend(query, keys, values, mask, drop=None):
    """Scaled dot-product attention, all [B, H, length, D].

    Args:
        mask: 0 or MASKED, [B, H or 1, queries, keys], or None where every key is visible.
        drop: dropout of the attention weights.
    """
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, keys, transpose_y=True)
    if mask is not None:
        scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    weights = F.softmax(scores)
    return paddle.matmul(weights if drop is None else drop(weights), values)


@functools.lru_cache(maxsize=16)
def _transposed_rows(shape, order):
    """Where the rows of [*shape, D] come from when its dimensions but the last change places, and their new shape."""
    index = np.arange(np.prod(shape)).reshape(shape).transpose(order)
    return paddle.to_tensor(index.reshape(-1)), list(index.shape)


def _transpose_rows(inputs, order):
    """``inputs.transpose([*order, last])``: all but the last dimension change places."""
    if not inputs.place.is_cpu_place():
        return inputs.transpose([*order, len(order)])
    # The same from a gather, which copies rows whole, takes Paddle a tenth of the time on a CPU, and its gradient too.
    *shape, width = inputs.shape
    index, new_shape = _transposed_rows(tuple(shape), tuple(order))
    return inputs.reshape([-1, width]).gather(index).reshape([*new_shape, width])


def _self_attention(attention, hidden_states, attend):
    """A layer's attention on [B, Q, C], with its core given: ``attend(query, key, value)``, all [B, H, Q, D]."""
    batch_size, length, _ = hidden_states.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size
    projected = attention.query_key_value(hidden_states)  # [B, Q, 3 * H * D]
    if attention.config.tensor_parallel_degree > 1:  # laid out head by head, [q k v] [q k v] ...
        projected = _transpose_rows(projected.reshape([batch_size, length, heads, 3, head_size]), [3, 0, 2, 1])
    else:  # [all q | all k | all v]
        projected = _transpose_rows(projected.reshape([batch_size, length, 3, heads, head_size]), [2, 0, 3, 1])
    context = attend(*paddle.unbind(projected))  # [B, H, Q, D]
    return attention.dense(_transpose_rows(context, [0, 2, 1]).reshape([batch_size, length, heads * head_size]))


def _dropout(dropout, state, inputs):
    """Drop by the generator ``state`` of tensor parallelism, or the one there is without it."""
    tracker = get_rng_state_tracker()
    with tracker.rng_state(state) if state in tracker.states_ else contextlib.nullcontext():
        return dropout(inputs)


def _linear(layer, inputs):
    """``inputs @ weight + bias``, with the bias as a product, for then its gradient is one.

    Paddle's gradient of a bias, a sum over rows, takes a CPU as long as those of the inputs and the weight together.
    """
    ones = paddle.ones([*inputs.shape[:-1], 1], inputs.dtype)
    return paddle.matmul(inputs, layer.weight) + paddle.matmul(ones, layer.bias.unsqueeze(0))


def prepare_for_training(model):
    """Change how PaddleNLP's layers compute, not what: the mask they are given is then 0 and MASKED, and added.

    PaddleNLP multiplies the scores by a mask and adds another, made of it in every layer: three more passes over its
    largest tensors, which it keeps for the backward pass.
    """

    def forward(attention, hidden_states, mask, cache=None):
        def attend(query, key, value):
            drop = functools.partial(_dropout, attention.attention_dropout, "local_seed")
            return _attend(query, key, value, mask, drop)

        return _dropout(attention.output_dropout, "global_seed", _self_attention(attention, hidden_states, attend))

    for layer in model.glm.transformer.layers:
        layer.attention.forward = functools.partial(forward, layer.attention)
    # With tensor parallelism PaddleNLP draws this dropout from the generator that differs between the processes, as it
    # must for the split heads alone. Here they drop the same embeddings, and what follows is the same on all of them.
    dropout = model.glm.transformer.embedding_dropout
    dropout.forward = functools.partial(_dropout, dropout.forward, "embedding_seed")
    if model.glm.word_embeddings.weight.place.is_cpu_place():
        for layer in model.sublayers():
            if isinstance(layer, paddle.nn.Linear):
                layer.forward = functools.partial(_linear, layer)


def _forward(model, input_ids, position_ids, attend):
    """GLM's layers with their attention given: ``attend(layer number, query, key, value)``, all [B, H, Q, D].

    PaddleNLP's own forward caches hidden states and projects the whole prefix to keys and values at every step.

    Args:
        input_ids int64 [B, Q], position_ids int64 [B, 2, Q].

    Returns:
        hidden states after the last layer norm, [B, Q, C].
    """
    glm, stack = model.glm, model.glm.transformer
    hidden_states = (
        glm.word_embeddings(input_ids)
        + stack.position_embeddings(position_ids[:, 0])
        + stack.block_position_embeddings(position_ids[:, 1])
    )  # [B, Q, C]
    for number, layer in enumerate(stack.layers):
        attend_here = functools.partial(attend, number)
        hidden_states = hidden_states + _self_attention(
            layer.attention, layer.input_layernorm(hidden_states), attend_here
        )
        hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    return stack.final_layernorm(hidden_states)


def _additive_mask(model, visible, num_queries):
    """bool numpy [B, 1 or queries, keys] to a tensor [B, H, queries, keys]: 0 where visible, else MASKED.

    Whole, and once for all layers, for Paddle is slow at broadcasting on a CPU.
    """
    dtype = model.glm.word_embeddings.weight.dtype
    mask = paddle.to_tensor(np.where(visible, 0.0, MASKED), dtype=dtype).unsqueeze(1)
    heads = model.glm.transformer.layers[0].attention.num_attention_heads
    return mask.tile([1, heads, num_queries // mask.shape[2], 1])


def prefill(model, input_ids, source_length, num_slots):
    """Run the sources once and keep their keys and values.

    Args:
        input_ids: int64 [B, S], sources padded on the right. source_length: numpy int64 [B].
        num_slots (int): room for generated tokens, tgt_length * num_beams.

    Returns:
        list: the cache, of each layer keys and values, [B, H, S + num_slots, D], allocated here once. The source's part
        is stored once per example, for all its beams. Behind it every beam has a slot for every step, written once and
        never moved: when beams branch, only the mask changes that says what a beam descends from.
    """
    batch_size, length = input_ids.shape
    position_ids = paddle.stack([paddle.arange(length), paddle.zeros([length], "int64")]).unsqueeze(0)
    visible = np.arange(length) < source_length[:, None, None]  # [B, 1, S]
    mask = None if visible.all() else _additive_mask(model, visible, length)
    cache = []

    def attend(_, query, key, value):
        shape = [batch_size, key.shape[1], length + num_slots, key.shape[3]]
        cache.append((paddle.zeros(shape, key.dtype), paddle.zeros(shape, key.dtype)))
        cache[-1][0][:, :, :length], cache[-1][1][:, :, :length] = key, value
        return _attend(query, key, value, mask)

    _forward(model, input_ids, position_ids.tile([batch_size, 1, 1]), attend)
    return cache


def decode_one_token(model, cache, token_ids, position_ids, slot, visible):
    """Feed one token to every beam: its keys and values enter the cache, its logits come out.

    The beams of an example are so many queries on one shared cache, which is why the source is stored once.

    Args:
        token_ids: int64 [B, K], the beams' last tokens. position_ids: int64 [B, 2], theirs.
        slot (int): where in the cache the beams write, slot to slot + K - 1.
        visible: numpy bool [B, K, S + num_slots], what each beam sees of it.

    Returns:
        logits of the next token, [B, K, V].
    """
    num_beams = token_ids.shape[1]
    mask = _additive_mask(model, visible, num_beams)

    def attend(number, query, key, value):
        keys, values = cache[number]
        keys[:, :, slot : slot + num_beams], values[:, :, slot : slot + num_beams] = key, value
        return _attend(query, keys, values, mask)

    hidden_states = _forward(model, token_ids, position_ids.unsqueeze(-1).tile([1, 1, num_beams]), attend)
    return paddle.matmul(hidden_states, model.glm.word_embeddings.weight, transpose_y=True)


# ----------------------------------------------------------------------------------------------------- beam search


def next_token_candidates(logits, banned, count, select_topk=True, top_k=0, top_p=0.0, group=None):
    """The ``count`` best, or drawn, next tokens of every beam.

    With tensor parallelism each process has a part of the logits. The best are chosen in each part and only those are
    gathered, a few numbers a beam; ``Beams.advance`` merges them. For a draw, whose filters need the whole row, the
    parts are gathered, of this one position.

    Args:
        logits: [B, K, V], or a part of V. banned: list of (example, beam, token) that are impossible; probabilities are
            not normalised again without them.
        select_topk, top_k, top_p: see finetune_generation.GenerationArguments. group: of tensor parallelism.

    Returns:
        numpy float64 [3, B, K, min(count, V), or that of every process]: sort keys (the largest are chosen),
        log-probabilities, token ids. The keys are the log-probabilities; for a draw, those plus Gumbel noise, since the
        n largest of the sums are a draw of n without replacement in proportion to the probabilities (arXiv 1903.06059).
    """
    logits = logits.astype("float32")
    if group is not None and not select_topk:
        logits, group = _all_gather(logits, group), None
    part = logits.shape[-1]
    first = 0 if group is None else group.rank * part  # token of this part
    minus_infinity = paddle.full([1], -float("inf"))
    _, log_sum_exp = _log_sum_exp(logits.max(-1), F.softmax(logits).max(-1), group)  # [B, K]
    banned = [(row, beam, token - first) for row, beam, token in banned if first <= token < first + part]
    if banned:
        logits[tuple(paddle.to_tensor(index) for index in np.array(banned, dtype="int64").T)] = -float("inf")
    if select_topk:
        keys, token_ids = paddle.topk(logits, min(count, part))
        chosen = keys
    else:
        gumbel = -paddle.log(-paddle.log(paddle.uniform(logits.shape, min=1e-20, max=1.0)))
        noisy = paddle.where(logits >= _lowest_logit_to_draw(logits, top_k, top_p), logits + gumbel, minus_infinity)
        keys, token_ids = paddle.topk(noisy, min(count, part))
        chosen = paddle.take_along_axis(logits, token_ids, axis=-1)
    log_sum_exp = log_sum_exp.unsqueeze(-1)
    table = paddle.stack(
        [column.astype("float64") for column in (keys - log_sum_exp, chosen - log_sum_exp, token_ids + first)]
    )
    # One copy from the device a step, of this small table.
    return (table if group is None else _all_gather(table, group)).numpy()


def _all_gather(tensor, group):
    """The parts of all processes, side by side in the last dimension."""
    parts = []
    dist.all_gather(parts, tensor, group)
    return paddle.concat(parts, axis=-1)


def _lowest_logit_to_draw(logits, top_k, top_p):
    """The least logit that top_k and top_p leave in each row, [B, K, 1]; ties with it stay in."""
    lowest = paddle.full([*logits.shape[:-1], 1], -float("inf"))
    if 0 < top_k < logits.shape[-1]:
        lowest = paddle.topk(logits, top_k)[0][..., -1:]
    if 0 < top_p < 1:
        ordered = paddle.where(logits >= lowest, logits, paddle.full([1], -float("inf")))
        ordered = paddle.sort(ordered, descending=True)
        probabilities = F.softmax(ordered)
        before = paddle.cumsum(probabilities, axis=-1) - probabilities  # held by likelier tokens
        lowest = paddle.where(before < top_p, ordered, paddle.full([1], float("inf"))).min(-1, keepdim=True)
    return lowest


class Beams:
    """Running and finished hypotheses of a batch, in numpy on the host, by the rules of THUDM/GLM's beam search.

    A: examples not done yet; K: beams; T: tgt_length.
    """

    def __init__(self, source_length, length, generation, end_token_id):
        self.generation, self.end_token_id = generation, end_token_id
        batch_size, num_beams, tgt_length = len(source_length), generation.num_beams, generation.tgt_length
        self.step = 0  # tokens generated so far
        self.example = np.arange(batch_size)  # [A], which of the batch each row is
        self.tokens = np.zeros([batch_size, num_beams, tgt_length], dtype="int64")
        self.sums = np.full([batch_size, num_beams], -np.inf)  # of log-probabilities
        self.sums[:, 0] = 0  # all beams start alike: only the first may branch
        self.source_slots = length
        # [A, K, S + T * K], what a beam sees of the cache: its source and the slots of its own past
        self.visible = np.zeros([batch_size, num_beams, length + tgt_length * num_beams], dtype=bool)
        self.visible[:, :, :length] = np.arange(length) < np.asarray(source_length)[:, None, None]
        self.finished_tokens = np.zeros_like(self.tokens)
        self.finished_lengths = np.zeros([batch_size, num_beams], dtype="int64")
        self.finished_scores = np.full([batch_size, num_beams], -np.inf)
        # For each example: the last n - 1 tokens -> slots in which such a sequence ended, in whatever beam.
        self.seen = [defaultdict(list) for _ in range(batch_size)]
        self.results = [None] * batch_size

    def open_slots(self):
        """Let each beam see the slot that its last token is about to be written to.

        Returns:
            the first of these slots, and ``visible``.
        """
        num_beams = self.sums.shape[1]
        slot = self.source_slots + self.step * num_beams
        self.visible[:, np.arange(num_beams), slot + np.arange(num_beams)] = True
        return slot, self.visible

    def banned(self):
        """The impossible next tokens, list of (row, beam, token): the end before min_tgt_length, repeated n-grams.

        The time is proportional to the bans and to what other beams of the example have said alike.
        """
        bans, n, step = [], self.generation.no_repeat_ngram_size, self.step
        num_rows, num_beams = self.sums.shape
        if step < self.generation.min_tgt_length:
            bans += [(row, beam, self.end_token_id) for row in range(num_rows) for beam in range(num_beams)]
        if not 0 < n <= step + 1:
            return bans
        for row, beam in zip(*np.nonzero(self.sums > -np.inf)):
            tokens = self.tokens[row, beam]
            slots = self.seen[self.example[row]][tuple(tokens[step - n + 1 : step])]
            # A slot of step s holds token s - 1, so what followed it is token s.
            visible = self.visible[row, beam, self.source_slots :]
            bans += [(row, beam, tokens[slot // num_beams]) for slot in slots if visible[slot]]
            slots.append(step * num_beams + beam)
        return bans

    def _finish(self, tokens, lengths, scores):
        """Add hypotheses [A, M, T], [A, M], [A, M] to the finished ones, and keep the num_beams best."""
        scores = np.concatenate([self.finished_scores, scores], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.sums.shape[1]]
        row = np.arange(len(scores))[:, None]
        self.finished_scores = scores[row, best]
        self.finished_lengths = np.concatenate([self.finished_lengths, lengths], axis=1)[row, best]
        self.finished_tokens = np.concatenate([self.finished_tokens, tokens], axis=1)[row, best]

    def advance(self, candidates):
        """Take one step with the ``candidates`` of ``next_token_candidates``, [3, A, K, M].

        Returns:
            numpy int64 [A'], the rows still running; the others' results are ready.
        """
        num_rows, num_beams, count = candidates.shape[1:]
        step, penalty = self.step, self.generation.length_penalty
        keys, log_probabilities, token_ids = candidates.reshape([3, num_rows, -1])
        sums = np.repeat(self.sums, count, axis=1)
        keys, sums = keys + sums, log_probabilities + sums
        row = np.arange(num_rows)[:, None]
        # The 2 * num_beams to go on with, best first: by their key if drawn, then by their sum.
        drawn = np.argsort(-keys, axis=1, kind="stable")[:, : 2 * num_beams]
        drawn = drawn[row, np.argsort(-sums[row, drawn], axis=1, kind="stable")]
        sums, token_ids, parents = sums[row, drawn], token_ids[row, drawn].astype("int64"), drawn // count
        ends = token_ids == self.end_token_id
        # An end token among the first num_beams finishes its hypothesis; a later one is dropped.
        scores = np.where(ends, sums, -np.inf)[:, :num_beams] / max(step, 1) ** penalty
        self._finish(self.tokens[row, parents[:, :num_beams]], np.full_like(scores, step, dtype="int64"), scores)
        # "Worst no worse than the best running sum": of all candidates and over the length before this step, as THUDM
        # has it, so that one beam is greedy search.
        worst = self.finished_scores[:, -1]
        done = (worst > -np.inf) & (worst >= sums[:, 0] / max(step, 1) ** penalty)

        sums = np.where(ends, -np.inf, sums)
        live = np.argsort(ends, axis=1, kind="stable")[:, :num_beams]  # the first that are no end tokens
        sums, token_ids, parents = sums[row, live], token_ids[row, live], parents[row, live]
        if sums.shape[1] < num_beams:  # a vocabulary smaller than the beam
            pad = [(0, 0), (0, num_beams - sums.shape[1])]
            sums = np.pad(sums, pad, constant_values=-np.inf)
            token_ids, parents = np.pad(token_ids, pad), np.pad(parents, pad)
        stuck = (sums == -np.inf).all(axis=1)  # every continuation is banned
        if stuck.any():  # where nothing has finished either, what there is must do
            self._finish(*self._running(stuck & (self.finished_scores == -np.inf).all(axis=1)))
        done |= stuck

        self.sums, self.tokens, self.visible = sums, self.tokens[row, parents], self.visible[row, parents]
        self.tokens[:, :, step] = token_ids
        self.step += 1
        if self.step == self.generation.tgt_length:
            self._finish(*self._running(~done))
            done[:] = True
        return self._drop(done)

    def _running(self, rows):
        """The running beams of ``rows`` (bool [A]) as hypotheses with their own scores."""
        scores = np.where(rows[:, None], self.sums, -np.inf) / max(self.step, 1) ** self.generation.length_penalty
        return self.tokens, np.full(scores.shape, self.step), scores

    def _drop(self, done):
        for row in np.nonzero(done)[0]:
            length = self.finished_lengths[row, 0]
            tokens = self.finished_tokens[row, 0, :length].tolist()
            self.results[self.example[row]] = (tokens, float(self.finished_scores[row, 0]))
        rows = np.nonzero(~done)[0]
        if done.any():
            for name in ("example", "tokens", "sums", "visible"):
                setattr(self, name, getattr(self, name)[rows])
            for name in ("finished_tokens", "finished_lengths", "finished_scores"):
                setattr(self, name, getattr(self, name)[rows])
        return rows


@paddle.no_grad()
def beam_search(model, input_ids, source_length, generation, start_token_id, end_token_id, group=None):
    """Generate one target per source, by the rules of THUDM/GLM.

    Args:
        model: GLMForConditionalGeneration in eval mode.
        input_ids: int64 [B, S], sources as ``data.encode_source`` gives them, padded on the right.
        source_length: numpy int64 [B]. generation: GenerationArguments. group: of tensor parallelism.

    Returns:
        list of (token ids without start and end token, score), one per source; the score is the sum of the natural
        logarithms of the probabilities, the end token's included, over length ** length_penalty.
    """
    num_beams, length = generation.num_beams, input_ids.shape[1]
    cache = prefill(model, input_ids, source_length, generation.tgt_length * num_beams)
    beams = Beams(source_length, length, generation, end_token_id)
    token_ids = paddle.full([len(source_length), num_beams], start_token_id, dtype="int64")
    while len(beams.example):
        position_ids = np.stack([source_length[beams.example] - 2, np.full(len(beams.example), beams.step + 1)], axis=1)
        slot, visible = beams.open_slots()
        logits = decode_one_token(model, cache, token_ids, paddle.to_tensor(position_ids), slot, visible)
        draw = (generation.select_topk, generation.top_k, generation.top_p)
        candidates = next_token_candidates(logits, beams.banned(), 2 * num_beams, *draw, group=group)
        num_rows = len(beams.example)
        rows = beams.advance(candidates)
        if 0 < len(rows) < num_rows:  # finished examples leave the batch
            rows = paddle.to_tensor(rows)
            cache = [(keys.index_select(rows), values.index_select(rows)) for keys, values in cache]
        token_ids = paddle.to_tensor(beams.tokens[:, :, beams.step - 1])
    return beams.results


def prediction_row(tokenizer, record, token_ids, score):
    """What a predictions file holds of a record, dict."""
    return {
        "id": record["id"], "context": record["context"], "answer": record["answer"], "reference": record["question"],
        "prediction": decode_target(tokenizer, token_ids), "score": score, "token_ids": token_ids,
    }  # fmt: skip


def predict_lines(model, tokenizer, records, src_length, generation, output):
    """Answer each of ``records`` as it comes by a JSON line in the text stream ``output``."""
    model.eval()
    for record in records:
        (features,) = build_dataset(tokenizer, [record], src_length, generation.tgt_length)
        source_ids = features["input_ids"][: features["source_length"]]
        ((token_ids, score),) = beam_search(
            model, paddle.to_tensor(source_ids[None]), np.array([len(source_ids)]), generation,
            tokenizer.sop_token_id, tokenizer.eop_token_id,
        )  # fmt: skip
        row = prediction_row(tokenizer, record, token_ids, score)
        print(json.dumps(row, ensure_ascii=False), file=output, flush=True)


# --------------------------------------------------------------------------------------------------------- metrics


def _characters(text):
    """The characters that count: none of the white space, and width and form as the tokenizer's NFKC leaves them."""
    return [character for character in unicodedata.normalize("NFKC", text) if not character.isspace()]


def compute_metrics(predictions, references):
    """ROUGE-1, ROUGE-2, ROUGE-L (F1, mean over the records) and corpus BLEU-4, over characters, each 0..1.

    Args: two lists of str of the same length. An empty prediction or reference scores 0.
    """
    rouge, bleu = Rouge(exclusive=False), BLEU(n_size=4)
    totals = {"rouge1": 0.0, "rouge2": 0.0, "rougel": 0.0}
    for prediction, reference in zip(predictions, references):
        prediction, reference = _characters(prediction), _characters(reference)
        bleu.add_inst(prediction, [reference])
        if prediction and reference:
            # The package finds the common subsequence by recursion, one level a character.
            sys.setrecursionlimit(max(sys.getrecursionlimit(), len(prediction) + len(reference) + 1000))
            # It splits sentences at "." and words at spaces: numbers in place of characters have neither.
            texts = (" ".join(str(ord(character)) for character in text) for text in (prediction, reference))
            scores = rouge.get_scores(*texts)[0]
            for name, key in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougel", "rouge-l")):
                totals[name] += scores[key]["f"]
    metrics = {name: total / len(predictions) for name, total in totals.items()}
    # Without a single generated character BLEU's brevity penalty has no value, and its limit is 0.
    metrics["bleu4"] = bleu.score() if bleu.bp_c else 0.0
    return metrics


# --------------------------------------------------------------------------------------------------------- trainer


class Fault(BaseException):  # as KeyboardInterrupt: a signal must pass what catches every Exception while loading
    """What ended a run and was no mistake of the user's, told in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


CHECKPOINT_DONE = ".checkpoint_done"  # the last file of a checkpoint to be written


def last_whole_checkpoint(folder):
    """The path of the checkpoint in ``folder`` that was last written to its end, or None."""
    whole = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*[0-9]")):
        try:
            whole[path] = os.path.getmtime(os.path.join(path, CHECKPOINT_DONE))
        except FileNotFoundError:
            advice = "if it is another script's, give it by --resume_from_checkpoint"
            logger.warning(f"skipping {path}, which was not written to its end; {advice}")
    # By time, not by number, for an older run that --overwrite_output_dir wrote over may have come further.
    return max(whole, key=whole.get, default=None)


@contextlib.contextmanager
def _loading(checkpoint):
    """Tell a damaged checkpoint from a bug: what PaddleNLP raises in the block is an InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{checkpoint} can't be loaded ({str(error)[:200]}): remove it to go on from the checkpoint before it"
        ) from error


class TrainingProgress(TrainerCallback):
    """A bar with loss and samples/s on a terminal; elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        disable = args.disable_tqdm or not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", disable=disable)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            learning_rate = f"learning rate {logs['learning_rate']:.3g}"
            logger.train(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {learning_rate}, {rate}"
            )
        else:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class SeedEachStep(TrainerCallback):
    """Each step draws from generators that are seeded by --seed and its number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        seed = int(np.random.default_rng([args.seed, state.global_step, args.dataset_rank]).integers(2**40)) * 1024
        tracker = get_rng_state_tracker()
        tracker.reset()
        # Alike on all processes of tensor parallelism, but for the last, which drops in heads that are split over them.
        tracker.add("embedding_seed", seed + 1)
        tracker.add("global_seed", seed + 2)
        tracker.add("local_seed", seed + 3 + max(args.tensor_parallel_rank, 0))
        paddle.seed(seed)


class GLMTrainer(Trainer):
    """PaddleNLP's Trainer with the label-smoothed loss, the decaying schedule and evaluation by beam search.

    Args (beside the Trainer's):
        generation (GenerationArguments): how evaluation generates.
        label_smoothing (float): e of LabelSmoothedLoss.
        lr_decay_ratio (float): the share of the peak rate that a linear schedule ends at.
    """

    def __init__(self, *args, generation, label_smoothing, lr_decay_ratio, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation, self.label_smoothing, self.lr_decay_ratio = generation, label_smoothing, lr_decay_ratio
        # Through any wrapper, the model then returns hidden states; the head is applied to target positions alone.
        self.model.glm.output_predict = False
        prepare_for_training(self.model)
        self.tensor_parallel_group = None
        if self.args.tensor_parallel_degree > 1:
            self.tensor_parallel_group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        for callback in (ProgressCallback, PrinterCallback):
            self.pop_callback(callback)
        self.add_callback(TrainingProgress)
        self.add_callback(SeedEachStep)
        self.stop_signal = None  # that training is to end by
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    # training

    def _target_losses(self, model, inputs):
        """Label-smoothed losses of the batch's N targets, float32 [N]."""
        mask = (1 - inputs["attention_mask"].astype("float32")) * MASKED  # [B, 1, L, L]
        if self.args.device == "cpu":  # which is slow at broadcasting
            mask = mask.tile([1, self.model.glm.transformer.layers[0].attention.num_attention_heads, 1, 1])
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask)
        hidden_states = outputs[0]  # [B, L, C]
        hidden_states = hidden_states.reshape([-1, hidden_states.shape[-1]]).gather(inputs["target_positions"])
        weight = self.model.glm.word_embeddings.weight
        group = self.tensor_parallel_group
        return LabelSmoothedLoss.apply(hidden_states, weight, inputs["labels"], self.label_smoothing, group)

    def compute_loss(self, model, inputs, return_outputs=False):
        """The mean over the batch's target tokens, the end token included.

        In training the batch is the global one: this process's share of the sum, times the processes and passes that
        gradients are averaged over afterwards, over the number of its target tokens, which every process knows.
        """
        losses = self._target_losses(model, inputs)
        share = 1 / len(losses)
        if self.is_in_train:
            target_tokens = self.train_sampler.target_tokens
            tokens = int(target_tokens[self.state.global_step % len(target_tokens)])
            share = self.args.dataset_world_size * self.args.gradient_accumulation_steps / tokens
        loss = losses.sum() * share
        return (loss, losses) if return_outputs else loss

    def training_step(self, model, inputs):
        """The Trainer's; the first step whose loss is no number is noted on the device, where nothing waits for it."""
        loss = super().training_step(model, inputs)
        step = paddle.where(paddle.isfinite(loss), NEVER, self.state.global_step + 1).reshape([])
        self.first_bad_step = paddle.minimum(self.first_bad_step, step)
        return loss

    def train(self, resume_from_checkpoint=None, **kwargs):
        """The Trainer's, ended by SIGINT or SIGTERM within a step, with a checkpoint of it.

        A run that had come to its end is only loaded, for the Trainer would go one step further.
        """
        first_step = 0
        if resume_from_checkpoint:
            with _loading(resume_from_checkpoint):
                state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            first_step = state.global_step
            steps_an_epoch = len(self._get_train_sampler()) // self.args.gradient_accumulation_steps
            last_step = self.args.max_steps if self.args.max_steps > 0 else steps_an_epoch * self.args.num_train_epochs
            if first_step >= int(last_step):
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(best or resume_from_checkpoint)
                self.state = state
                return TrainOutput(first_step, None, {})
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        # The Trainer divides what it summed up since it resumed by the steps of the whole run.
        output.metrics["train_loss"] *= output.global_step / (output.global_step - first_step)
        return output

    def _on_signal(self, number, _):
        # Several processes would have to agree on a step to save; a second signal is urgent; evaluation takes long.
        if self.args.world_size > 1 or self.stop_signal is not None or not self.model.training:
            self._stop(number)
        self.stop_signal = number

    def _stop(self, number):
        name = signal.Signals(number).name
        raise Fault(f"stopped by {name} at step {self.state.global_step}: {self._where_to_resume()}", 128 + number)

    def _where_to_resume(self):
        checkpoint = last_whole_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "there is no checkpoint to resume from"
        without = " without --overwrite_output_dir" if self.args.overwrite_output_dir else ""
        return f"the same command{without} goes on from {checkpoint}"

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The Trainer's, at the end of each step; before it logs, evaluates or saves, see that training is sound."""
        control = self.control
        if self.stop_signal is not None:
            control.should_evaluate, control.should_save = False, self.args.save_strategy != IntervalStrategy.NO
        if control.should_log or control.should_evaluate or control.should_save:
            step = self.first_bad_step.item()
            advice = "lower --learning_rate, or look at the data of that step"
            if step != NEVER:
                raise Fault(f"the loss is not finite at step {step}: {advice}; {self._where_to_resume()}")
            if control.should_save and not all(paddle.isfinite(p).all().item() for p in self.model.parameters()):
                step = self.state.global_step
                raise Fault(f"the weights are not finite after step {step}: {advice}; {self._where_to_resume()}")
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop_signal is not None:
            self._stop(self.stop_signal)

    def _save_checkpoint(self, model, metrics=None):
        """The Trainer's, with a last file that says that all the others are whole."""
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        done = os.path.join(folder, CHECKPOINT_DONE)
        with contextlib.suppress(FileNotFoundError):
            os.remove(done)
        try:
            super()._save_checkpoint(model, metrics)
            # All processes have written theirs by now, for the last thing they do is to exchange random states.
            if self.args.local_rank in (-1, 0):
                open(done, "w").close()
                super()._rotate_checkpoints(use_mtime=True, output_dir=self.args.output_dir)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Fault(f"{folder} can't be written: {error.strerror or error}; {self._where_to_resume()}") from error

    def _rotate_checkpoints(self, *args, **kwargs):
        """Not where the Trainer calls it: before the new checkpoint is whole, and never on a single process."""

    def create_scheduler(self, num_training_steps):
        """linear: from 0 up to learning_rate, then straight down to lr_decay_ratio of it at the last step."""
        if self.args.lr_scheduler_type != SchedulerType.LINEAR or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps)
        warmup = self.args.warmup_steps or int(self.args.warmup_ratio * num_training_steps)
        decay = max(num_training_steps - 1 - warmup, 1)  # steps from the peak to the last one

        def factor(step):
            if step < warmup:
                return step / warmup
            return 1 - (1 - self.lr_decay_ratio) * min((step - warmup) / decay, 1)

        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(self.args.learning_rate, factor)
        return self.lr_scheduler

    def _get_train_sampler(self):
        args = self.args
        replicas, accumulation = args.dataset_world_size, args.gradient_accumulation_steps
        batch_size = args.per_device_train_batch_size
        self.train_sampler = GroupedBatchSampler(
            self.train_dataset, batch_size, replicas, args.dataset_rank, batch_size * replicas * accumulation,
            shuffle=True, group_by_length=args.group_by_length, seed=args.seed,
        )  # fmt: skip
        return self.train_sampler

    def _load_from_checkpoint(self, resume_from_checkpoint=None):
        with _loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        """Nothing to load: see SeedEachStep. The Trainer's own fails where the GPU build runs on a CPU."""

    # evaluation

    def _get_eval_sampler(self, eval_dataset):
        """From long to short, so that a batch has little padding."""
        args, batch_size = self.args, self.args.per_device_eval_batch_size
        return GroupedBatchSampler(
            eval_dataset, batch_size, args.dataset_world_size, args.dataset_rank, batch_size * args.dataset_world_size,
            shuffle=False, group_by_length=True, seed=args.seed,
        )  # fmt: skip

    def prediction_step(self, model, inputs, prediction_loss_only=None, ignore_keys=None):
        """Beam search and loss of one batch; ``evaluation_loop`` takes them from ``self.outputs``."""
        inputs = self._prepare_inputs(inputs)
        source_length = inputs["source_length"].numpy()
        input_ids = inputs["input_ids"][:, : source_length.max()]
        start_token_id, end_token_id = self.tokenizer.sop_token_id, self.tokenizer.eop_token_id
        with paddle.no_grad(), self.autocast_smart_context_manager():
            hypotheses = beam_search(
                model, input_ids, source_length, self.generation, start_token_id, end_token_id,
                group=self.tensor_parallel_group,
            )  # fmt: skip
            losses = self._target_losses(model, inputs).numpy() if len(inputs["labels"]) else np.zeros(0)
        # The targets of a record stand side by side in the flattened batch, records in order.
        rows = inputs["target_positions"].numpy() // inputs["input_ids"].shape[1]
        for row, (index, (token_ids, score)) in enumerate(zip(inputs["index"].tolist(), hypotheses)):
            self.outputs[index] = {"token_ids": token_ids, "score": score, "losses": losses[rows == row]}
        self.generated_tokens += sum(len(token_ids) for token_ids, _ in hypotheses)
        self.bar.update(len(hypotheses))
        self.bar.set_postfix_str(f"{self.generated_tokens / (time.time() - self.start):.1f} tokens/s")
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, then the metrics and ``{eval,test}_predictions.jsonl``, in the input's order."""
        self.outputs = {}  # by the record's number: batches may repeat a record
        self.generated_tokens, self.start = 0, time.time()
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        records = len(dataloader.dataset) // self.args.dataset_world_size
        with tqdm(total=records, desc=metric_key_prefix, unit="record", leave=False, disable=disable) as self.bar:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        if self.args.world_size > 1:
            parts = []
            dist.all_gather_object(parts, self.outputs)
            self.outputs = {index: result for part in parts for index, result in part.items()}
        seconds = time.time() - self.start
        generated_tokens = sum(len(result["token_ids"]) for result in self.outputs.values())

        rows = []
        for index, result in sorted(self.outputs.items()):
            record = dataloader.dataset[index]["record"]
            rows.append(prediction_row(self.tokenizer, record, result["token_ids"], result["score"]))
        metrics = {"samples": len(rows), "tokens_per_second": round(generated_tokens / seconds, 2)}
        scored = [row for row in rows if row["reference"] is not None]
        if scored:
            metrics["loss"] = float(np.concatenate([result["losses"] for result in self.outputs.values()]).mean())
            metrics.update(compute_metrics(*([row[key] for row in scored] for key in ("prediction", "reference"))))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.is_world_process_zero():
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.eval(f"{metric_key_prefix} at step {self.state.global_step}: {numbers}")
        if self.args.should_save:
            self._write_predictions(rows, os.path.join(self.args.output_dir, f"{metric_key_prefix}_predictions.jsonl"))
        return output

    def _write_predictions(self, rows, path):
        """Whole or not at all."""
        os.makedirs(self.args.output_dir, exist_ok=True)
        temporary = path + ".tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
