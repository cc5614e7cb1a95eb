"""Cached decoding and beam search."""

from collections import defaultdict

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

from modeling import MASKED, attend, forward, log_sum_exp


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

    def core(_, query, key, value):
        shape = [batch_size, key.shape[1], length + num_slots, key.shape[3]]
        cache.append((paddle.zeros(shape, key.dtype), paddle.zeros(shape, key.dtype)))
        cache[-1][0][:, :, :length], cache[-1][1][:, :, :length] = key, value
        return attend(query, key, value, mask)

    forward(model, input_ids, position_ids.tile([batch_size, 1, 1]), core)
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

    def core(number, query, key, value):
        keys, values = cache[number]
        keys[:, :, slot : slot + num_beams], values[:, :, slot : slot + num_beams] = key, value
        return attend(query, keys, values, mask)

    hidden_states = forward(model, token_ids, position_ids.unsqueeze(-1).tile([1, 1, num_beams]), core)
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
        log-probabilities, token ids. Where a beam has fewer possible tokens, the rest are -inf, -inf and some valid id.
        The keys are the log-probabilities; for a draw, those plus Gumbel noise, since the
        n largest of the sums are a draw of n without replacement in proportion to the probabilities (arXiv 1903.06059).
    """
    logits = logits.astype("float32")
    if group is not None and not select_topk:
        logits, group = _all_gather(logits, group), None
    part = logits.shape[-1]
    first = 0 if group is None else group.rank * part  # token of this part
    minus_infinity = paddle.full([1], -float("inf"))
    _, whole = log_sum_exp(logits.max(-1), F.softmax(logits).max(-1), group)  # [B, K]
    banned = [(row, beam, token - first) for row, beam, token in banned if first <= token < first + part]
    if banned:
        logits[tuple(paddle.to_tensor(index) for index in np.array(banned, dtype="int64").T)] = -float("inf")
    scores = logits
    if not select_topk:
        gumbel = -paddle.log(-paddle.log(paddle.uniform(logits.shape, min=1e-20, max=1.0)))
        scores = paddle.where(logits >= _lowest_logit_to_draw(logits, top_k, top_p), logits + gumbel, minus_infinity)
    keys, token_ids = paddle.topk(scores, min(count, part))
    impossible = keys == -float("inf")  # banned or filtered; on a GPU topk gives such an entry any number for an id
    token_ids = paddle.where(impossible, paddle.zeros_like(token_ids), token_ids)
    chosen = keys if select_topk else paddle.take_along_axis(logits, token_ids, axis=-1)
    chosen = paddle.where(impossible, minus_infinity, chosen)
    whole = whole.unsqueeze(-1)
    table = paddle.stack([column.astype("float64") for column in (keys - whole, chosen - whole, token_ids + first)])
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
