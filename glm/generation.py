"""Cached decoding and beam search."""

from collections import Counter, defaultdict

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F

from glm.device import on_cpu
from glm.modeling import MASKED, additive_mask, attend, forward, laid_out_by_head, log_sum_exp, split_heads

GROWTH = 16  # tokens by which the room in a cache grows: what is not written yet is attended over too, under the mask


class Cache:
    """Keys and values of a batch, and what of them each beam sees. A: examples; K: beams; H: heads; D: a head's size.

    The source's part is stored once per example, for all its beams. Behind it every beam has a slot for every step,
    written once and never moved: when beams branch, only the mask changes, which says what a beam descends from.

    Attributes:
        layers (list): of each layer one tensor [rows, D], and its parts: keys and values, both [1, A, H, slots, D], and
            the queries of the tokens at hand, [1, A, H, K, D].
        mask: 0 where a beam sees a slot, else MASKED, [A, K, slots], in the type of the weights.
        used (int): the slots that are written.
        new_rows: where in a layer the rows of query_key_value's output belong, int64 [A * K * 3 * H].
    """

    def __init__(self, model, seen, num_beams, tgt_length):
        attention = model.glm.transformer.layers[0].attention
        self.layers, self.num_beams, self.rest = [], num_beams, tgt_length
        self.num_heads, self.head_size = attention.num_attention_heads, attention.attention_head_size
        self.by_head = laid_out_by_head(attention)
        self.dtype = model.glm.word_embeddings.weight.dtype
        self.used = seen.shape[1]
        self.mask = additive_mask(seen, self.dtype).unsqueeze(1).tile([1, num_beams, 1])
        # A beam sees its own slot of a step, and none of the other beams'.
        self.own = additive_mask(paddle.eye(num_beams), self.dtype)  # [K, K]

    def open_slots(self):
        """Let each beam see the slot that its next token is about to be written to."""
        if self.used == self.mask.shape[2]:
            self.arrange(np.arange(len(self.mask)), min(GROWTH, self.rest) * self.num_beams)
            self.rest -= GROWTH
        self.mask[:, :, self.used : self.used + self.num_beams] = self.own
        self.used += self.num_beams
        self.new_rows = self.new_rows + self.moves

    def arrange(self, examples, room):
        """Keep of ``examples`` (numpy int64 [A'], those of the layers) the slots that a beam sees, and add ``room``."""
        num_beams, (_, num_rows, _, slots, _) = self.num_beams, self.layers[0][1].shape
        seen = (self.mask == 0).any(axis=1).numpy()  # [A', slots]
        self.used = seen.sum(1).max()
        # [A', used], the seen ones first: where an example has fewer, unseen ones fill up.
        kept = np.argsort(~seen, axis=1, kind="stable")[:, : self.used]
        mask = paddle.take_along_axis(
            self.mask, paddle.to_tensor(kept).unsqueeze(1).tile([1, num_beams, 1]), axis=2
        )
        self.mask = paddle.concat(
            [mask, paddle.full([len(examples), num_beams, room], MASKED, self.dtype)], axis=2
        )
        # The same slots of every head, as numbers of a layer's rows: whole rows are copied fast.
        kind, head = np.ogrid[:2, : self.num_heads]
        old = ((kind * num_rows + examples[:, None, None]) * self.num_heads + head) * slots  # [A', 2, H]
        rows = old.swapaxes(0, 1)[..., None] + kept[:, None]
        rows = np.pad(rows, [(0, 0)] * 3 + [(0, room)]).reshape(
            -1
        )  # what is not written yet may hold anything
        queries, slots = len(rows), self.used + room
        rows = paddle.to_tensor(np.pad(rows, (0, len(examples) * self.num_heads * num_beams)))
        shape = [len(examples), self.num_heads, slots, self.head_size]
        for number, (layer, *_) in enumerate(self.layers):
            layer = F.embedding(rows, layer)
            keys_values = layer[:queries].reshape([2, *shape])  # a view, as the others
            query = layer[queries:].reshape([1, *shape[:2], num_beams, self.head_size])
            self.layers[number] = (layer, keys_values[:1], keys_values[1:], query)

        example, beam, head = np.ogrid[: len(examples), :num_beams, : self.num_heads]
        key = (example * self.num_heads + head) * slots + self.used - num_beams + beam
        query = queries + (example * self.num_heads + head) * num_beams + beam
        rows = np.stack([query, key, key + queries // 2], axis=3 if self.by_head else 2).reshape(-1)
        self.new_rows = paddle.to_tensor(rows)
        self.moves = paddle.to_tensor(np.where(rows < queries, num_beams, 0))  # from one token to the next

    def follow(self, origins):
        """Go on with other beams: ``origins`` numpy int64 [A', K], their numbers among the A * K of now, row by row."""
        num_rows, num_beams, slots = self.mask.shape
        beams = paddle.to_tensor(origins.reshape(-1))
        self.mask = self.mask.reshape([-1, slots]).index_select(beams).reshape([-1, num_beams, slots])
        if len(origins) < num_rows:  # finished examples leave the batch
            self.arrange(origins[:, 0] // num_beams, slots - self.used)


def prefill(model, input_ids, source_length, num_beams, tgt_length):
    """Run the sources once and keep their keys and values.

    Args:
        input_ids: int64 [B, S], sources padded on the right. source_length: numpy int64 [B].
        num_beams, tgt_length (int): of each source's beams, and of the tokens that each may generate.

    Returns:
        Cache.
    """
    length = input_ids.shape[1]
    positions = paddle.arange(length)
    seen = (positions < paddle.to_tensor(source_length).unsqueeze(1)).astype("float32")  # [B, S]
    cache, mask = Cache(model, seen, num_beams, tgt_length), None
    if source_length.min() < length:
        mask = additive_mask(seen, cache.dtype)[:, None, None, :]  # [B, 1, 1, S]
        # Whole on a CPU, and once for all layers, for Paddle is slow at broadcasting there.
        if on_cpu():
            mask = mask.tile([1, cache.num_heads, length, 1])

    def core(number, attention, projected):
        heads = split_heads(attention, projected)  # [3, B, H, S, D]
        query, keys, values = heads[:1], heads[1:2], heads[2:]
        cache.layers.append((heads[1:].reshape([-1, cache.head_size]), keys, values))
        return attend(query, keys, values, mask)

    forward(model, input_ids, paddle.stack([positions, paddle.zeros_like(positions)]).unsqueeze(0), core)
    return cache


def decode_one_token(model, cache, token_ids, position_ids):
    """Feed one token to every beam: its keys and values enter the cache, its logits come out.

    The beams of an example are so many queries on one shared cache, which is why the source is stored once.

    Args:
        token_ids: int64 [A, K], the beams' last tokens. position_ids: int64 [A, 2], theirs.

    Returns:
        logits of the next token, [A, K, V].
    """
    cache.open_slots()
    mask = cache.mask.unsqueeze(1)  # [A, 1, K, slots]
    if on_cpu():
        mask = mask.tile([1, cache.num_heads, 1, 1])

    def core(number, attention, projected):
        layer, keys, values, query = cache.layers[number]
        layer.scatter_(cache.new_rows, projected.reshape([-1, cache.head_size]))  # and so in the views
        return attend(query, keys, values, mask)

    hidden_states = forward(model, token_ids, position_ids.unsqueeze(-1), core)
    rows = hidden_states.reshape(
        [-1, hidden_states.shape[-1]]
    )  # or Paddle would read the weight once an example
    logits = paddle.matmul(rows, model.glm.word_embeddings.weight, transpose_y=True)
    return logits.reshape([*token_ids.shape, -1])


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
        numpy float64 [3, B, K, M], where M is about ``count``, of every process: sort keys (the largest are chosen),
        log-probabilities, token ids. Where a beam has fewer possible tokens, the rest are -inf, -inf and some valid id.
        The keys are the log-probabilities; for a draw, those plus Gumbel noise, since the n largest of the sums are a
        draw of n without replacement in proportion to the probabilities (arXiv 1903.06059).
    """
    if logits.dtype != paddle.float32:
        logits = logits.astype("float32")
    if group is not None and not select_topk:
        logits, group = _all_gather(logits, group), None
    part = logits.shape[-1]
    first = 0 if group is None else group.rank * part  # token of this part
    if select_topk:  # enough that ``count`` are left when the banned ones are taken out
        count += max(Counter((row, beam) for row, beam, _ in banned).values(), default=0)
    keys, token_ids = paddle.topk(logits, min(count, part) if select_topk else 1)
    likeliest = paddle.take_along_axis(F.softmax(logits), token_ids[..., :1], axis=-1)
    _, whole = log_sum_exp(keys[..., :1], likeliest, group)  # [B, K, 1]
    chosen = keys
    if not select_topk:
        minus_infinity = paddle.full([1], -float("inf"))
        if banned:
            logits[tuple(paddle.to_tensor(index) for index in np.array(banned, dtype="int64").T)] = -float(
                "inf"
            )
        gumbel = -paddle.log(-paddle.log(paddle.uniform(logits.shape, min=1e-20, max=1.0)))
        noisy = paddle.where(
            logits >= _lowest_logit_to_draw(logits, top_k, top_p), logits + gumbel, minus_infinity
        )
        keys, token_ids = paddle.topk(noisy, min(count, part))
        impossible = keys == -float(
            "inf"
        )  # filtered or banned; on a GPU topk gives such an entry any number for an id
        token_ids = paddle.where(impossible, paddle.zeros_like(token_ids), token_ids)
        chosen = paddle.where(impossible, minus_infinity, paddle.take_along_axis(logits, token_ids, axis=-1))
    table = paddle.stack(
        [column.astype("float64") for column in (keys - whole, chosen - whole, token_ids + first)]
    )
    # One copy from the device a step, of this small table.
    table = (table if group is None else _all_gather(table, group)).numpy()
    for row, beam, token in banned if select_topk else []:
        table[:2, row, beam, table[2, row, beam] == token] = -np.inf
    return table


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

    def __init__(self, batch_size, generation, end_token_id):
        self.generation, self.end_token_id = generation, end_token_id
        num_beams, tgt_length = generation.num_beams, generation.tgt_length
        self.step = 0  # tokens generated so far
        self.example = np.arange(batch_size)  # [A], which of the batch each row is
        self.tokens = np.zeros([batch_size, num_beams, tgt_length], dtype="int64")
        self.sums = np.full([batch_size, num_beams], -np.inf)  # of log-probabilities
        self.sums[:, 0] = 0  # all beams start alike: only the first may branch
        # [A, K, T * K], the past of each beam: in step t beam k of an example takes the slot t * K + k
        self.past = np.zeros([batch_size, num_beams, tgt_length * num_beams], dtype=bool)
        self.finished_tokens = np.zeros_like(self.tokens)
        self.finished_lengths = np.zeros([batch_size, num_beams], dtype="int64")
        self.finished_scores = np.full([batch_size, num_beams], -np.inf)
        # For each example: the last n - 1 tokens -> slots in which such a sequence ended, in whatever beam.
        self.seen = [defaultdict(list) for _ in range(batch_size)]
        self.results = [None] * batch_size

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
            bans += [(row, beam, tokens[slot // num_beams]) for slot in slots if self.past[row, beam, slot]]
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
            numpy int64 [A', K], the beams that the running ones go on from, by their numbers among the A * K of now;
            the results of the A - A' other examples are ready.
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
        self._finish(
            self.tokens[row, parents[:, :num_beams]], np.full_like(scores, step, dtype="int64"), scores
        )
        # "Worst no worse than the best running sum": of all candidates and over the length before this step, as THUDM
        # has it, so that one beam is greedy search.
        worst = self.finished_scores[:, -1]
        done = worst >= sums[:, 0] / max(step, 1) ** penalty

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

        beam = np.arange(num_beams)
        self.past[:, beam, step * num_beams + beam] = True
        self.sums, self.tokens, self.past = sums, self.tokens[row, parents], self.past[row, parents]
        self.tokens[:, :, step] = token_ids
        self.step += 1
        if self.step == self.generation.tgt_length:
            self._finish(*self._running(~done))
            done[:] = True
        return (row * num_beams + parents)[self._drop(done)]

    def _running(self, rows):
        """The running beams of ``rows`` (bool [A]) as hypotheses with their own scores."""
        scores = (
            np.where(rows[:, None], self.sums, -np.inf) / max(self.step, 1) ** self.generation.length_penalty
        )
        return self.tokens, np.full(scores.shape, self.step), scores

    def _drop(self, done):
        """Take the best hypotheses of the rows that are ``done`` (bool [A]). Returns the other rows, int [A']."""
        for row in np.nonzero(done)[0]:
            count = max((self.finished_scores[row] > -np.inf).sum(), 1)
            self.results[self.example[row]] = [
                (self.finished_tokens[row, rank, : self.finished_lengths[row, rank]].tolist(),
                 float(self.finished_scores[row, rank]))
                for rank in range(min(count, self.generation.num_return_sequences))
            ]  # fmt: skip
        rows = np.nonzero(~done)[0]
        if done.any():
            for name in ("example", "tokens", "sums", "past"):
                setattr(self, name, getattr(self, name)[rows])
            for name in ("finished_tokens", "finished_lengths", "finished_scores"):
                setattr(self, name, getattr(self, name)[rows])
        return rows


@paddle.no_grad()
def beam_search(model, input_ids, source_length, generation, start_token_id, end_token_id, group=None):
    """Generate targets of each source, by the rules of THUDM/GLM.

    Args:
        model: GLMForConditionalGeneration in eval mode.
        input_ids: int64 [B, S], sources as ``data.encode_source`` gives them, padded on the right.
        source_length: numpy int64 [B]. generation: GenerationArguments. group: of tensor parallelism.

    Returns:
        list, one per source, of its num_return_sequences best hypotheses, the best first: lists of (token ids without
        start and end token, score). The score is the sum of the natural logarithms of the probabilities, the end
        token's included, over length ** length_penalty.
    """
    num_beams = generation.num_beams
    draw = (generation.select_topk, generation.top_k, generation.top_p)
    cache = prefill(model, input_ids, source_length, num_beams, generation.tgt_length)
    beams = Beams(len(source_length), generation, end_token_id)
    token_ids = paddle.full([len(source_length), num_beams], start_token_id, dtype="int64")
    while True:
        position_ids = np.stack(
            [source_length[beams.example] - 2, np.full(len(beams.example), beams.step + 1)], axis=1
        )
        logits = decode_one_token(model, cache, token_ids, paddle.to_tensor(position_ids))
        candidates = next_token_candidates(logits, beams.banned(), 2 * num_beams, *draw, group=group)
        origins = beams.advance(candidates)
        if not len(origins):
            return beams.results
        cache.follow(origins)
        token_ids = paddle.to_tensor(beams.tokens[:, :, beams.step - 1])
