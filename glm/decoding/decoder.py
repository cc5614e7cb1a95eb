"""Beam search: the beams, and the decoder that finds the candidates for their next tokens."""

import functools
from collections import defaultdict

import numpy as np
import paddle

from glm.decoding.cache import decode_one_token, prefill
from glm.decoding.candidates import drawn_candidates, likeliest_tokens, without_banned
from glm.device import Replayed, all_gather, captures, upload

GROWTH = 16  # steps by which a cache grows: slots not written yet are attended over too, masked
SPARE = 14  # candidates beyond those that are needed, in place of banned ones


class Beams:
    """Run beam search by the rules of THUDM/GLM, in numpy on the host.

    A: examples that are not done; K: beams; T: tgt_length.

    Attributes:
        step (int): tokens generated so far.
        example: int64 [A], which example of the batch each row is.
        parents: int64 [A, K], which beam of the step before each beam goes on from.
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
        self.parents = np.tile(np.arange(num_beams), (batch_size, 1))
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
        """Return the impossible next tokens, int64 [N, 3] of rows, beams and tokens, once a step.

        They are the end token before min_tgt_length, and what would repeat an n-gram.
        The time is proportional to the bans and to the n-grams that other beams of the
        example share.
        """
        bans, n, step = [], self.generation.no_repeat_ngram_size, self.step
        num_rows, num_beams = self.sums.shape
        if step < self.generation.min_tgt_length:
            bans = [(*beam, self.end_token_id) for beam in np.ndindex(num_rows, num_beams)]
        if 0 < n <= step + 1:
            bans += self._repeated_ngrams(n)
        return np.array(bans, dtype="int64").reshape([-1, 3])

    def _repeated_ngrams(self, n):
        """List the tokens that would repeat an n-gram, (row, beam, token), and note the last ones."""
        repeats, step, num_beams = [], self.step, self.sums.shape[1]
        for row, beam in zip(*np.nonzero(self.sums > -np.inf)):
            tokens = self.tokens[row, beam]
            slots = self.seen[self.example[row]][tuple(tokens[step - n + 1 : step])]
            # A slot of step s holds token s - 1, and token s is what followed it.
            for slot in slots:
                if self.past[row, beam, slot]:
                    repeats.append((row, beam, tokens[slot // num_beams]))
            slots.append(step * num_beams + beam)
        return repeats

    def advance(self, candidates):
        """Take one step with ``candidates`` (Candidates). Examples that are done leave."""
        num_rows, num_beams, count = candidates[0].shape
        step, penalty = self.step, self.generation.length_penalty
        sums = (candidates.log_probabilities + self.sums[:, :, None]).reshape([num_rows, -1])
        keys = (candidates.keys + self.sums[:, :, None]).reshape([num_rows, -1])
        token_ids = candidates.token_ids.reshape([num_rows, -1])
        row = np.arange(num_rows)[:, None]
        # The 2 * num_beams to go on with, best first: by their key if drawn, then by
        # their sum.
        drawn = np.argsort(-keys, axis=1, kind="stable")[:, : 2 * num_beams]
        drawn = drawn[row, np.argsort(-sums[row, drawn], axis=1, kind="stable")]
        sums, token_ids, parents = sums[row, drawn], token_ids[row, drawn], drawn // count
        ends = token_ids == self.end_token_id
        # An end token among the first num_beams finishes its hypothesis; a later one is
        # dropped.
        if ends[:, :num_beams].any():
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
        self.tokens[:, :, step], self.parents = token_ids, parents
        self.step += 1
        if self.step == self.generation.tgt_length:
            self._finish_running(~done)
            done[:] = True
        if done.any():
            self._take_results(np.nonzero(done)[0])
            self._keep(np.nonzero(~done)[0])

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
        self.example, self.parents = self.example[rows], self.parents[rows]
        self.tokens = self.tokens[rows]
        self.sums, self.past = self.sums[rows], self.past[rows]
        self.finished_tokens = self.finished_tokens[rows]
        self.finished_lengths = self.finished_lengths[rows]
        self.finished_scores = self.finished_scores[rows]


class Decoder:
    """Feed the beams' tokens to the model, and find the candidates for the next ones.

    On a device that captures CUDA graphs, a step there is one copy of token ids to the
    device, one launch and one copy of candidates from it. Room is made for all steps at
    once, and finished examples stay until a quarter is left, for each change of a tensor's
    size is a new capture, which takes as long as a step that is launched operator by
    operator. On a CPU the cache grows, and finished examples leave at once.

    Args:
        model: GLMForConditionalGeneration in eval mode.
        input_ids: int64 [B, S]. source_length: numpy int64 [B].
        start_token_id (int): the first token of a target.
        generation: GenerationArguments. group: of tensor parallelism.
    """

    def __init__(self, model, input_ids, source_length, start_token_id, generation, group=None):
        self.model, self.start_token_id = model, start_token_id
        self.generation, self.group = generation, group
        self.cache = prefill(model, input_ids, source_length, generation.num_beams)
        self.examples = np.arange(len(source_length))  # those in the cache
        self.captured = captures()
        self.room = 0  # steps that the cache has slots for

    def next_candidates(self, beams):
        """Take one step. Returns the Candidates of the running ``beams`` (Beams)."""
        generation, num_beams = self.generation, self.generation.num_beams
        rows = np.searchsorted(self.examples, beams.example)  # of the running examples
        origins = rows[:, None] * num_beams + beams.parents
        most = len(self.examples) // 4 if self.captured else len(self.examples) - 1
        if not self.room or len(rows) <= most:
            self._arrange(origins, beams)
            rows = np.arange(len(rows))
            origins = np.arange(origins.size).reshape(origins.shape)
        self.room -= 1
        inputs = self.idle_inputs.copy()
        inputs[0, rows] = beams.tokens[:, :, beams.step - 1] if beams.step else self.start_token_id
        inputs[1, rows] = origins
        upload(inputs, self.inputs)
        logits, table = self.step()
        banned = beams.banned()  # while the device is at work
        count = 2 * num_beams
        if not generation.select_topk:
            logits = logits.reshape([len(self.examples), num_beams, -1])
            if len(rows) < len(logits):
                logits = logits.index_select(paddle.to_tensor(rows))
            if self.group is not None:  # the filters need whole rows
                logits = all_gather(logits, self.group)
            filters = generation.temperature, generation.top_k, generation.top_p
            return drawn_candidates(logits, banned, count, *filters)
        candidates = self._without_banned(table, rows, banned)
        if len(banned) > SPARE and np.isfinite(candidates.keys).sum(-1).min() < count:
            most = np.bincount(banned[:, 0] * num_beams + banned[:, 1]).max()  # of a beam
            table = likeliest_tokens(logits, count + int(most), self.group)
            candidates = self._without_banned(table, rows, banned)
        return candidates

    def _without_banned(self, table, rows, banned):
        table = table.numpy().reshape([2, *self.inputs.shape[1:], -1])
        return without_banned(table[:, rows], banned)

    def _arrange(self, origins, beams):
        """Give the cache room, and those examples alone that are running."""
        if not self.room:
            steps_left = self.generation.tgt_length - beams.step
            self.room = steps_left if self.captured else min(GROWTH, steps_left)
        self.step = None  # a graph holds memory
        self.cache.arrange(origins, beams.step, self.room)
        self.examples = beams.example
        # Of finished examples: any token, after the beam itself.
        self.idle_inputs = np.stack([np.zeros_like(origins), np.arange(origins.size).reshape(origins.shape)])
        self.inputs = paddle.to_tensor(self.idle_inputs)
        count = 2 * self.generation.num_beams + SPARE if self.generation.select_topk else None
        step = functools.partial(_step, self.model, self.cache, self.inputs, count, self.group)
        self.step = Replayed(step)


def _step(model, cache, inputs, count, group):
    """Return the logits of the next token, and its ``count`` likeliest unless that is None."""
    logits = decode_one_token(model, cache, inputs[0], inputs[1])
    return logits, None if count is None else likeliest_tokens(logits, count, group)


@paddle.no_grad()
def beam_search(model, input_ids, source_length, generation, start_token_id, end_token_id, group=None):
    """Generate targets of each source, by the rules of THUDM/GLM.

    Args:
        model: GLMForConditionalGeneration in eval mode.
        input_ids: int64 [B, S], sources of ``data.encode_source``, padded on the right.
        source_length: numpy int64 [B]. generation: GenerationArguments.
        group: of tensor parallelism.

    Returns:
        list, of each source its num_return_sequences best hypotheses, the best first: a list
        of (token ids without start and end token, score). A score is the sum of the natural
        logarithms of the probabilities, the end token's included, over length ** length_penalty.
    """
    decoder = Decoder(model, input_ids, source_length, start_token_id, generation, group)
    beams = Beams(len(source_length), generation, end_token_id)
    while len(beams.example):
        beams.advance(decoder.next_candidates(beams))
    return beams.results
