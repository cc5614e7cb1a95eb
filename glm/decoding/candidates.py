"""Candidates for the next token of every beam: the likeliest ones, or a draw."""

from typing import NamedTuple, Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from numpy import ndarray
from paddle import Tensor
from paddle.distributed.collective import Group

from glm.arguments import GenerationArguments
from glm.graphs import all_gather
from glm.modeling import log_sum_exp


class Candidates(NamedTuple):
    """Hold the likely next tokens of every beam, numpy [A, K, M].

    A beam with fewer than M possible tokens has keys and log-probabilities of -inf, with some valid token id.
    """

    sort_keys: ndarray  # float64: those with the largest keys are chosen
    log_probabilities: ndarray  # float64
    token_ids: ndarray  # int64


def likeliest_tokens(logits: Tensor, count: int, group: Optional[Group] = None) -> Tensor:
    """Find the ``count`` likeliest next tokens of every beam.

    With tensor parallelism each process has a part of the logits. The likeliest of each part are
    gathered, a few numbers a beam, and ``Beams.advance`` merges them.

    Args:
        logits: [N, V], or this process's part of V.
        count: At least what ``Beams.advance`` chooses.
        group: Of tensor parallelism.

    Returns:
        float64 [2, N, M], log-probabilities and token ids. One tensor, so that one copy leaves the
        device: float64 holds any id.
    """
    logits = logits.astype("float32")
    part_size = logits.shape[-1]
    largest, token_ids = paddle.topk(logits, min(count, part_size))
    log_probabilities = largest - _log_sum_exp(logits, largest, token_ids, group)
    if group is not None:
        token_ids = token_ids + group.rank * part_size
    table = _stack(log_probabilities, token_ids)
    return table if group is None else all_gather(table, group)


def without_banned(table: ndarray, banned: ndarray) -> Candidates:
    """Return the Candidates that ``likeliest_tokens`` gave, without the banned tokens.

    The other tokens' probabilities are not normalised again.

    Args:
        table: float64 [2, A, K, M].
        banned: int64 [N, 3], each a row, a beam and a token that is impossible there.
    """
    log_probabilities, token_ids = table[0], table[1].astype("int64")
    row, beam, token = banned.T
    ban, column = np.nonzero(token_ids[row, beam] == token[:, None])
    log_probabilities[row[ban], beam[ban], column] = -np.inf
    return Candidates(log_probabilities, log_probabilities, token_ids)


def draw_tokens(
    logits: Tensor, noise: Tensor, bans: Tensor, count: int, generation: GenerationArguments
) -> Tensor:
    """Draw ``count`` next tokens of every beam, without replacement.

    A key is a log-probability plus Gumbel noise: the n largest are a draw of n without replacement
    in proportion to the probabilities (Kool et al., arXiv 1903.06059).

    Args:
        logits: [N, V].
        noise: float32 [N, V], uniform in (0, 1).
        bans: int64 [any number], the impossible tokens, by their numbers among the N * V; that number
            itself bans nothing.
        count: Of each beam.
        generation: Its temperature divides the logits that are drawn by; the log-probabilities, and so the
            scores, stay the model's. A token that its top_k and top_p then leave out is impossible.

    Returns:
        float64 [3, N, M], keys, log-probabilities and token ids: one tensor, see ``likeliest_tokens``.
    """
    logits = logits.astype("float32")
    # Every device has paddle.scale, other than a division.
    tempered = paddle.scale(logits, 1 / generation.temperature)
    log_sum, tempered_log_sum = (_log_sum_exp(x, *paddle.topk(x, 1)) for x in (logits, tempered))
    minus_infinity = paddle.full([1], -float("inf"))
    numbers = paddle.concat([tempered.reshape([-1]), minus_infinity])  # one more, for what bans nothing
    numbers = paddle.scatter(numbers, bans, minus_infinity.expand(bans.shape))
    tempered = numbers[:-1].reshape(logits.shape)
    gumbel = -paddle.log(-paddle.log(noise))
    possible = tempered >= _lowest_logit_to_draw(tempered, generation.top_k, generation.top_p)
    noisy = paddle.where(possible, tempered + gumbel, minus_infinity)
    keys, token_ids = paddle.topk(noisy, min(count, logits.shape[-1]))
    # On a GPU topk gives an entry of -inf any number for an index.
    impossible = keys == -float("inf")
    token_ids = paddle.where(impossible, paddle.zeros_like(token_ids), token_ids)
    chosen = paddle.take_along_axis(logits, token_ids, axis=-1)
    chosen = paddle.where(impossible, minus_infinity, chosen)
    return _stack(keys - tempered_log_sum, chosen - log_sum, token_ids)


def drawn_candidates(table: Tensor, rows: ndarray) -> Candidates:
    """Return the Candidates of some rows of what ``draw_tokens`` gave, as [3, A, K, M]."""
    keys, log_probabilities, token_ids = table.numpy()[:, rows]
    return Candidates(keys, log_probabilities, token_ids.astype("int64"))


def _log_sum_exp(logits, largest, token_ids, group=None):
    """Return the log-sum-exp over the vocabulary, [..., 1], given the largest logits, in order."""
    likeliest = paddle.take_along_axis(F.softmax(logits), token_ids[..., :1], axis=-1)
    return log_sum_exp(largest[..., :1], likeliest, group)[1]


def _stack(*columns):
    return paddle.stack([column.astype("float64") for column in columns])


def _lowest_logit_to_draw(logits, top_k, top_p):
    """Return the lowest logit of each row that top_k and top_p leave, [N, 1], with ties."""
    lowest = paddle.full([*logits.shape[:-1], 1], -float("inf"))
    if 0 < top_k < logits.shape[-1]:
        lowest = paddle.topk(logits, top_k)[0][..., -1:]
    if 0 < top_p < 1:
        ordered = paddle.where(logits >= lowest, logits, paddle.full([1], -float("inf")))
        # In a CUDA graph sort would need memory of its own, where there is one row.
        ordered = paddle.topk(ordered, ordered.shape[-1])[0]
        probabilities = F.softmax(ordered)
        likelier = paddle.cumsum(probabilities, axis=-1) - probabilities  # held by likelier tokens
        kept = paddle.where(likelier < top_p, ordered, paddle.full([1], float("inf")))
        lowest = kept.min(-1, keepdim=True)
    return lowest
