"""Beam search: the candidates for the next tokens, and the beams."""

import functools
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

from glm.cache import decode_one_token, prefill
from glm.modeling import log_sum_exp


class Candidates(NamedTuple):
    """Hold the likely next tokens of every beam, numpy [A, K, M].

    A beam with fewer than M possible tokens has keys and log-probabilities of -inf, with
    some valid token id.
    """

    keys: np.ndarray  # float64: those with the largest keys are chosen
    log_probabilities: np.ndarray  # float64
    token_ids: np.ndarray  # int64


def best_candidates(logits, banned, count, group=None):
    """Return the ``count`` or more likeliest next tokens of every beam, as Candidates.

    With tensor parallelism each process has a part of the logits. The best of each part
    are gathered, a few numbers a beam, and ``Beams.advance`` merges them.

    Args:
        logits: [A, K, V], or this process's part of V.
        banned: list of (row, beam, token) that are impossible. The other tokens' probabilities
            are not normalised again.
        group: of tensor parallelism.
    """
    logits = logits.astype("float32")
    part_size = logits.shape[-1]
    # Enough that ``count`` are left without the banned ones.
    count += max(Counter((row, beam) for row, beam, _ in banned).values(), default=0)
    best, token_ids = paddle.topk(logits, min(count, part_size))
    log_probabilities = best - _whole_log_sum_exp(logits, best, token_ids, group)
    if group is not None:
        token_ids = token_ids + group.rank * part_size
    log_probabilities, token_ids = _to_host(log_probabilities, token_ids, group=group)
    for row, beam, token in banned:
        log_probabilities[row, beam, token_ids[row, beam] == token] = -np.inf
    return Candidates(log_probabilities, log_probabilities, token_ids)


def drawn_candidates(logits, banned, count, top_k=0, top_p=0.0, group=None):
    """Return ``count`` next tokens of every beam, drawn without replacement, as Candidates.

    A key is a log-probability plus Gumbel noise: the n largest are a draw of n without
    replacement in proportion to the probabilities (Kool et al., arXiv 1903.06059).

    With tensor parallelism the parts of the logits are gathered, for the filters need
    them all.

    Args:
        logits, banned, group: as in ``best_candidates``.
        top_k, top_p: see GenerationArguments. A token that they leave out is impossible.
    """
    logits = logits.astype("float32")
    if group is not None:
        logits = _all_gather(logits, group)
    whole = _whole_log_sum_exp(logits, *paddle.topk(logits, 1), None)
    if banned:
        index = tuple(paddle.to_tensor(column) for column in np.array(banned, dtype="int64").T)
        logits[index] = -float("inf")
    minus_infinity = paddle.full([1], -float("inf"))
    gumbel = -paddle.log(-paddle.log(paddle.uniform(logits.shape, min=1e-20, max=1.0)))
    possible = logits >= _lowest_logit_to_draw(logits, top_k, top_p)
    noisy = paddle.where(possible, logits + gumbel, minus_infinity)
    keys, token_ids = paddle.topk(noisy, min(count, logits.shape[-1]))
    # On a GPU topk gives an entry of -inf any number for an index.
    impossible = keys == -float("inf")
    token_ids = paddle.where(impossible, paddle.zeros_like(token_ids), token_ids)
    chosen = paddle.take_along_axis(logits, token_ids, axis=-1)
    chosen = paddle.where(impossible, minus_infinity, chosen)
    return Candidates(*_to_host(keys - whole, chosen - whole, token_ids))


def _whole_log_sum_exp(logits, best, token_ids, group):
    """Return the log-sum-exp of the whole rows, [A, K, 1], given their largest logits."""
    likeliest = paddle.take_along_axis(F.softmax(logits), token_ids[..., :1], axis=-1)
    return log_sum_exp(best[..., :1], likeliest, group)[1]


def _all_gather(tensor, group):
    """Return the parts of all processes, side by side in the last dimension."""
    parts = []
    dist.all_gather(parts, tensor, group)
    return paddle.concat(parts, axis=-1)


def _to_host(*columns, group=None):
    """Return numpy float64 arrays of the ``columns``, and an int64 one of the last, token ids.

    They are one tensor on the way, so that one copy leaves the device: float64 holds any id.
    """
    table = paddle.stack([column.astype("float64") for column in columns])
    *numbers, token_ids = (table if group is None else _all_gather(table, group)).numpy()
    return *numbers, token_ids.astype("int64")


def _lowest_logit_to_draw(logits, top_k, top_p):
    """Return the lowest logit of each row that top_k and top_p leave, [A, K, 1], ties included."""
    lowest = paddle.full([*logits.shape[:-1], 1], -float("inf"))
    if 0 < top_k < logits.shape[-1]:
        lowest = paddle.topk(logits, top_k)[0][..., -1:]
    if 0 < top_p < 1:
        ordered = paddle.where(logits >= lowest, logits, paddle.full([1], -float("inf")))
        ordered = paddle.sort(ordered, descending=True)
        probabilities = F.softmax(ordered)
        likelier = paddle.cumsum(probabilities, axis=-1) - probabilities  # held by likelier tokens
        kept = paddle.where(likelier < top_p, ordered, paddle.full([1], float("inf")))
        lowest = kept.min(-1, keepdim=True)
    return lowest


class Beams:
    """Run beam search by the rules of THUDM/GLM, in numpy on the host.

    A: examples that are not done; K: beams; T: tgt_length.

    Attributes:
        step (int): tokens generated so far.
        example: int64 [A], which example of the batch each row is.
        tokens: int64 [A, K, T], of the running beams.
        sums: float64 [A, K], their log-probabilities; -inf where there is no beam.
        past: bool [A, K, T * K], the slots that each beam descends from. In step t beam k of an
            example takes slot t * K + k.
        finished_tokens, finished_lengths, finished_scores: [A, K, T], [A, K], [A, K], the best
            finished hypotheses, the best first; scores of -inf where there are fewer.
        results: list of an example's hypotheses each, or None while it is running.
    """

    def __init__(self, batch_size, generation, end_token_id):
        self.generation, self.end_token_id = generation, end_token_id
        num_beams, tgt_length = generation.num_beams, generation.tgt_length
        self.step = 0
        self.example = np.arange(batch_size)
        self.tokens = np.zeros([batch_size, num_beams, tgt_length], dtype="int64")
        self.sums = np.full([batch_size, num_beams], -np.inf)
        self.sums[:, 0] = 0  # all beams start alike: only the first may branch
        self.past = np.zeros([batch_size, num_beams, tgt_length * num_beams], dtype=bool)
        self.finished_tokens = np.zeros_like(self.tokens)
        self.finished_lengths = np.zeros([batch_size, num_beams], dtype="int64")
        self.finished_scores = np.full([batch_size, num_beams], -np.inf)
        # Of each example: the last n - 1 tokens -> slots in which a beam ended in them.
        self.seen = [defaultdict(list) for _ in range(batch_size)]
        self.results = [None] * batch_size

    def banned(self):
        """List the impossible next tokens, (row, beam, token), once a step.

        They are the end token before min_tgt_length, and what would repeat an n-gram.
        The time is proportional to the bans and to the n-grams that other beams of the
        example share.
        """
        bans, n, step = [], self.generation.no_repeat_ngram_size, self.step
        num_rows, num_beams = self.sums.shape
        if step < self.generation.min_tgt_length:
            bans = [(*beam, self.end_token_id) for beam in np.ndindex(num_rows, num_beams)]
        if not 0 < n <= step + 1:
            return bans
        for row, beam in zip(*np.nonzero(self.sums > -np.inf)):
            tokens = self.tokens[row, beam]
            slots = self.seen[self.example[row]][tuple(tokens[step - n + 1 : step])]
            # A slot of step s holds token s - 1, and token s is what followed it.
            for slot in slots:
                if self.past[row, beam, slot]:
                    bans.append((row, beam, tokens[slot // num_beams]))
            slots.append(step * num_beams + beam)
        return bans

    def advance(self, candidates):
        """Take one step with ``candidates`` (Candidates).

        Returns:
            numpy int64 [A', K], the beams that the running ones go on from, as numbers
            among the A * K before this step. The other A - A' examples are done.
        """
        num_rows, num_beams, count = candidates[0].shape
        step, penalty = self.step, self.generation.length_penalty
        keys, log_probabilities, token_ids = (x.reshape([num_rows, -1]) for x in candidates)
        sums = np.repeat(self.sums, count, axis=1)
        keys, sums = keys + sums, log_probabilities + sums
        row = np.arange(num_rows)[:, None]
        # The 2 * num_beams to go on with, best first: by their key if drawn, then by
        # their sum.
        drawn = np.argsort(-keys, axis=1, kind="stable")[:, : 2 * num_beams]
        drawn = drawn[row, np.argsort(-sums[row, drawn], axis=1, kind="stable")]
        sums, token_ids, parents = sums[row, drawn], token_ids[row, drawn], drawn // count
        ends = token_ids == self.end_token_id
        # An end token among the first num_beams finishes its hypothesis; a later one is
        # dropped.
        scores = np.where(ends, sums, -np.inf)[:, :num_beams] / max(step, 1) ** penalty
        lengths = np.full_like(scores, step, dtype="int64")
        self._finish(self.tokens[row, parents[:, :num_beams]], lengths, scores)
        # Compared with the best of all candidates over the length before this step, as in
        # THUDM/GLM, so that one beam is greedy search.
        done = self.finished_scores[:, -1] >= sums[:, 0] / max(step, 1) ** penalty

        sums = np.where(ends, -np.inf, sums)
        live = np.argsort(ends, axis=1, kind="stable")[:, :num_beams]  # the first others
        sums, token_ids, parents = sums[row, live], token_ids[row, live], parents[row, live]
        if sums.shape[1] < num_beams:  # a vocabulary smaller than the beam
            pad = [(0, 0), (0, num_beams - sums.shape[1])]
            sums = np.pad(sums, pad, constant_values=-np.inf)
            token_ids, parents = np.pad(token_ids, pad), np.pad(parents, pad)
        stuck = (sums == -np.inf).all(axis=1)  # every continuation is banned
        if stuck.any():  # where nothing has finished either, take what is running
            self._finish_running(stuck & (self.finished_scores == -np.inf).all(axis=1))
        done |= stuck

        beam = np.arange(num_beams)
        self.past[:, beam, step * num_beams + beam] = True
        self.sums, self.tokens, self.past = sums, self.tokens[row, parents], self.past[row, parents]
        self.tokens[:, :, step] = token_ids
        self.step += 1
        if self.step == self.generation.tgt_length:
            self._finish_running(~done)
            done[:] = True
        running = np.nonzero(~done)[0]
        if done.any():
            self._take_results(np.nonzero(done)[0])
            self._keep(running)
        return (row * num_beams + parents)[running]

    def _finish(self, tokens, lengths, scores):
        """Add hypotheses [A, M, T], [A, M], [A, M] to the finished ones, and keep the K best."""
        scores = np.concatenate([self.finished_scores, scores], axis=1)
        lengths = np.concatenate([self.finished_lengths, lengths], axis=1)
        tokens = np.concatenate([self.finished_tokens, tokens], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.sums.shape[1]]
        row = np.arange(len(scores))[:, None]
        self.finished_scores, self.finished_lengths = scores[row, best], lengths[row, best]
        self.finished_tokens = tokens[row, best]

    def _finish_running(self, chosen):
        """Add the running beams of the ``chosen`` rows (bool [A]), with their own scores."""
        penalty = self.generation.length_penalty
        scores = np.where(chosen[:, None], self.sums, -np.inf) / max(self.step, 1) ** penalty
        self._finish(self.tokens, np.full(scores.shape, self.step), scores)

    def _take_results(self, rows):
        """Note the best hypotheses of the ``rows`` (int64 [N])."""
        for row in rows:
            count = max((self.finished_scores[row] > -np.inf).sum(), 1)
            self.results[self.example[row]] = [
                (self.finished_tokens[row, rank, :length].tolist(), score)
                for rank, (length, score) in enumerate(
                    zip(self.finished_lengths[row], self.finished_scores[row].tolist())
                )
            ][: min(count, self.generation.num_return_sequences)]

    def _keep(self, rows):
        """Go on with the ``rows`` (int64 [A'])."""
        self.example, self.tokens = self.example[rows], self.tokens[rows]
        self.sums, self.past = self.sums[rows], self.past[rows]
        self.finished_tokens = self.finished_tokens[rows]
        self.finished_lengths = self.finished_lengths[rows]
        self.finished_scores = self.finished_scores[rows]


@paddle.no_grad()
def beam_search(model, input_ids, source_length, generation, start_token_id, end_token_id, group=None):
    """Generate targets of each source, by the rules of THUDM/GLM.

    Args:
        model: GLMForConditionalGeneration in eval mode.
        input_ids: int64 [B, S], sources of ``data.encode_source``, padded on the right.
        source_length: numpy int64 [B]. generation: GenerationArguments.
        group: of tensor parallelism.

    Returns:
        list, of each source its num_return_sequences best hypotheses, the best first: a list of
        (token ids without start and end token, score). A score is the sum of the natural
        logarithms of the probabilities, the end token's included, over length ** length_penalty.
    """
    num_beams = generation.num_beams
    candidates = best_candidates
    if not generation.select_topk:
        filters = {"top_k": generation.top_k, "top_p": generation.top_p}
        candidates = functools.partial(drawn_candidates, **filters)
    cache = prefill(model, input_ids, source_length, num_beams, generation.tgt_length)
    beams = Beams(len(source_length), generation, end_token_id)
    token_ids = paddle.full([len(source_length), num_beams], start_token_id, dtype="int64")
    while True:
        first = source_length[beams.example] - 2  # the position of [gMASK]
        position_ids = np.stack([first, np.full_like(first, beams.step + 1)], axis=1)
        logits = decode_one_token(model, cache, token_ids, paddle.to_tensor(position_ids))
        origins = beams.advance(candidates(logits, beams.banned(), 2 * num_beams, group=group))
        if not len(origins):
            return beams.results
        cache.follow(origins)
        token_ids = paddle.to_tensor(beams.tokens[:, :, beams.step - 1])
