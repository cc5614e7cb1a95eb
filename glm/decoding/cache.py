"""The cache of keys and values: sources enter it at once, targets one token at a time."""

import numpy as np
import paddle
import paddle.nn.functional as F
from numpy import ndarray
from paddle import Tensor
from paddlenlp.transformers import GLMForConditionalGeneration

from glm.device import on_cpu, supports_cuda_graphs
from glm.linears import compute_without_gradient
from glm.modeling import MASKED, additive_mask, attend, forward, qkv_per_head, split_heads


class Cache:
    """Keep the keys and values of a batch, and which of them each beam sees.

    A: examples; K: beams; H: heads; D: a head's size. A layer's tensor has rows of D numbers, in three parts.
    In the first two, each head of an example has a row for every slot:

        | keys [A, H, slots] | values [A, H, slots] | queries [A, H, K] |

        slots:  | source | step 0: K beams | step 1: K beams | ... | room for more steps |

    So one scatter puts the output of query_key_value in its place. The source is stored once per
    example, not once per beam. A beam's slot of a step is written once and never moves: when beams
    branch, only the mask changes, which says what each beam descends from.

    Between two calls of ``compact`` all tensors change in place: a captured CUDA graph knows them by
    their addresses.

    Attributes:
        layers: Of each layer (tensor [rows, D], keys, values, queries). The last three are views,
            [1, A, H, slots, D] twice and [1, A, H, K, D].
        mask: 0 where a beam sees a slot, else MASKED, [A, 1, K, slots].
        indices: int64, what a step adds ``increments`` to. Its parts are views:
        new_rows: The addresses of what query_key_value gives, rows of a layer's tensor, [A * K * 3 * H];
        new_slots: Those of the beams' slots of this step in the flat mask, [A * K];
        position_ids: The two positions of the examples' tokens, [A, 2, 1].
    """

    def __init__(
        self, model: GLMForConditionalGeneration, source_length: ndarray, length: int, num_beams: int
    ):
        """Take no keys and values yet.

        Args:
            model: The GLM.
            source_length: int64 [A], of the ``length`` slots that a source has.
            length: The longest source's.
            num_beams: Of each source.
        """
        attention = model.glm.transformer.layers[0].attention
        self.layers, self.num_beams = [], num_beams
        self.num_heads, self.head_size = attention.num_attention_heads, attention.attention_head_size
        self.qkv_per_head = qkv_per_head(attention)
        self.dtype = model.glm.word_embeddings.weight.dtype
        self.gmask_position = source_length - 2
        lengths = paddle.to_tensor(source_length).unsqueeze(1)
        visible = (paddle.arange(length) < lengths).astype("float32")
        self.source_mask = additive_mask(visible, self.dtype)[:, None, None, :]  # [A, 1, 1, S]
        self.mask = self.source_mask.tile([1, 1, num_beams, 1])

    def compact(self, origins: ndarray, step: int, capacity: int) -> None:
        """Keep some beams and the slots that they see, and add slots for more steps.

        Args:
            origins: int64 [A', K], the beams to go on with: row by row their numbers among the A * K
                of now, all of one example.
            step: Tokens that every beam has had.
            capacity: Steps to come.
        """
        examples = origins[:, 0] // self.num_beams
        rows = self.mask.reshape([-1, self.mask.shape[-1]])
        mask = rows.index_select(paddle.to_tensor(origins.reshape(-1)))
        mask = mask.reshape([len(origins), self.num_beams, -1])
        visible = (mask == 0).any(axis=1).numpy()  # [A', slots]
        used = visible.sum(axis=1).max()
        # The visible slots first: where an example has fewer than another, hidden ones fill up.
        slots = np.argsort(~visible, axis=1, kind="stable")[:, :used]  # [A', used]
        index = paddle.to_tensor(slots).unsqueeze(1).tile([1, self.num_beams, 1])
        new = capacity * self.num_beams
        if supports_cuda_graphs():  # cuBLAS takes slower kernels for other numbers
            new += -(used + new) % 8
        hidden = paddle.full([len(examples), self.num_beams, new], MASKED, self.dtype)
        mask = paddle.concat([paddle.take_along_axis(mask, index, axis=2), hidden], axis=2)
        self.mask = mask.unsqueeze(1)
        self._copy_layers(examples, slots, new)
        self.gmask_position = self.gmask_position[examples]
        self._place_indices(used, step)

    def _copy_layers(self, examples, slots, new):
        """Copy the ``slots`` (numpy [A', used]) of ``examples`` into tensors with ``new`` slots more."""
        _, num_rows, num_heads, old_slots, head_size = self.layers[0][1].shape
        shape = [1, len(examples), num_heads, slots.shape[1] + new, head_size]
        query_shape = [1, len(examples), num_heads, self.num_beams, head_size]
        kind, example, head = np.ogrid[:2, : len(examples), :num_heads]
        first = ((kind * num_rows + examples[example]) * num_heads + head) * old_slots
        rows = first[..., None] + slots[:, None]  # [2, A', H, used]
        # What is not written yet is masked, and may be a copy of anything: of row 0.
        rows = np.pad(rows, [(0, 0), (0, 0), (0, 0), (0, new)]).reshape(-1)
        middle, end = len(rows) // 2, len(rows)
        rows = paddle.to_tensor(np.pad(rows, (0, np.prod(query_shape[:-1]))))
        for number, (layer, *_) in enumerate(self.layers):
            layer = F.embedding(rows, layer)  # copies whole rows fast
            keys, values = layer[:middle].reshape(shape), layer[middle:end].reshape(shape)
            self.layers[number] = layer, keys, values, layer[end:].reshape(query_shape)

    def _place_indices(self, used, step):
        """Make ``indices`` of the step before the next one, whose slots begin at ``used``.

        The address of a key is (example * H + head) * slots + slot. Its value stands as many rows behind it
        as there are keys, and behind all values the query, in row (example * H + head) * K + beam of theirs.

        One example of one head and two beams, a source of 3 tokens, capacity for 2 steps: of 7 slots
        keys have the addresses 0 to 6, values 7 to 13, queries 14 and 15. The first step takes slots
        3 and 4, and its new_rows are, of the first beam's query, key and value, then of the second's:

            14 3 10    15 4 11

        Those of the second step are 14 5 12 and 15 6 13. What this makes is 14 1 8 and 15 2 9, for
        ``advance`` adds 2 to keys and values before each step. In the mask, a row of 7 for each beam,
        new_slots go from 1 and 9 to 3 and 11, then to 5 and 13.
        """
        _, num_rows, num_heads, slots, _ = self.layers[0][1].shape
        num_beams, num_keys = self.num_beams, num_rows * num_heads * slots
        example, beam, head = np.ogrid[:num_rows, :num_beams, :num_heads]
        row = example * num_heads + head
        key_address = row * slots + used - num_beams + beam
        query_address = 2 * num_keys + row * num_beams + beam
        addresses = [query_address, key_address, key_address + num_keys]
        new_rows = np.stack(addresses, axis=3 if self.qkv_per_head else 2).reshape(-1)
        new_slots = np.arange(num_rows * num_beams) * slots + used - num_beams
        new_slots += np.tile(np.arange(num_beams), num_rows)
        position_ids = np.stack([self.gmask_position, np.full(num_rows, step)], axis=1)
        row_increments = np.where(new_rows < 2 * num_keys, num_beams, 0)
        increments = [row_increments, np.full_like(new_slots, num_beams), np.tile([0, 1], num_rows)]
        self.increments = paddle.to_tensor(np.concatenate(increments))
        indices = [new_rows, new_slots, position_ids.reshape(-1)]
        self.indices = paddle.to_tensor(np.concatenate(indices))
        first, last = len(new_rows), len(new_rows) + len(new_slots)
        self.new_rows, self.new_slots = self.indices[:first], self.indices[first:last]
        self.position_ids = self.indices[last:].reshape([num_rows, 2, 1])
        self.visible = paddle.zeros([len(new_slots), 1], self.dtype)

    def advance(self, origins: Tensor) -> None:
        """Go on from ``origins``, and let each beam see the slot of its next token.

        Args:
            origins: int64 [A, K], the beams of the step before, by their numbers.
        """
        self.indices.add_(self.increments)
        rows = self.mask.reshape([-1, self.mask.shape[-1]])
        rows = rows.index_select(origins.reshape([-1]))
        paddle.assign(rows.reshape(self.mask.shape), self.mask)
        self.mask.reshape([-1, 1]).scatter_(self.new_slots, self.visible)


def prefill(
    model: GLMForConditionalGeneration, input_ids: Tensor, source_length: ndarray, num_beams: int
) -> Cache:
    """Run the sources once and keep their keys and values.

    Args:
        model: The GLM.
        input_ids: int64 [B, S], sources padded on the right.
        source_length: int64 [B].
        num_beams: Of each source.

    Returns:
        A Cache, to be compacted before the first token.
    """
    length = input_ids.shape[1]
    cache = Cache(model, source_length, length, num_beams)
    mask = cache.source_mask if source_length.min() < length else None
    if mask is not None and on_cpu():  # which is slow at broadcasting: once for all layers
        mask = mask.tile([1, cache.num_heads, length, 1])

    def core_attention(number, attention, projected):
        heads = split_heads(attention, projected)  # [3, B, H, S, D]
        # On a card this copies, for the heads are a transposed view there. Views of the copy
        # are kept: views of the heads would keep those, and the queries, beside it.
        layer = heads[1:].reshape([-1, cache.head_size])
        keys_values = layer.reshape([2, *heads.shape[1:]])
        keys, values = keys_values[:1], keys_values[1:]
        cache.layers.append((layer, keys, values))
        return attend(heads[:1], keys, values, mask)

    positions = paddle.arange(length)
    position_ids = paddle.stack([positions, paddle.zeros_like(positions)]).unsqueeze(0)
    forward(model, input_ids, position_ids, core_attention, compute_without_gradient)
    return cache


def decode_one_token(
    model: GLMForConditionalGeneration, cache: Cache, token_ids: Tensor, origins: Tensor
) -> Tensor:
    """Feed one token to every beam, and keep its keys and values.

    The beams of an example are K queries on one shared cache.

    Args:
        model: The GLM.
        cache: Of ``prefill``.
        token_ids: int64 [A, K], the beams' last tokens.
        origins: int64 [A, K], the beams of the step before that they go on from, by their numbers
            among the A * K.

    Returns:
        Logits of the next token, [A * K, V].
    """
    cache.advance(origins)
    mask = cache.mask.tile([1, cache.num_heads, 1, 1]) if on_cpu() else cache.mask

    def core_attention(number, attention, projected):
        layer, keys, values, query = cache.layers[number]
        layer.scatter_(cache.new_rows, projected.reshape([-1, cache.head_size]))
        return attend(query, keys, values, mask)

    hidden_states = forward(model, token_ids, cache.position_ids, core_attention, compute_without_gradient)
    # As one matrix, for Paddle would read the weight once for each example.
    rows = hidden_states.reshape([-1, hidden_states.shape[-1]])
    return paddle.matmul(rows, model.glm.word_embeddings.weight, transpose_y=True)
