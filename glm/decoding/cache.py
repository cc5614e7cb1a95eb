"""The cache of keys and values: sources enter it at once, targets one token at a time."""

import numpy as np
import paddle
import paddle.nn.functional as F

from glm.device import captures, on_cpu
from glm.modeling import MASKED, additive_mask, attend, forward, laid_out_by_head, split_heads


class Cache:
    """Keep the keys and values of a batch, and which of them each beam sees.

    A: examples; K: beams; H: heads; D: a head's size. A layer's tensor has rows of D
    numbers, in three parts. In the first two, each head of an example has a row for
    every slot:

        | keys [A, H, slots] | values [A, H, slots] | queries [A, H, K] |

        slots:  | source | step 0: K beams | step 1: K beams | ... | room for more steps |

    So one scatter puts the output of query_key_value in its place. The source is stored
    once per example, not once per beam. A beam's slot of a step is written once and
    never moves: when beams branch, only the mask changes, which says what each beam
    descends from.

    Between two calls of ``arrange`` all tensors change in place: a captured CUDA graph
    knows them by their addresses.

    Attributes:
        layers: of each layer (tensor [rows, D], keys, values, queries). The last three
            are views, [1, A, H, slots, D] twice and [1, A, H, K, D].
        mask: 0 where a beam sees a slot, else MASKED, [A, 1, K, slots].
        indices: int64, what a step adds ``increments`` to. Its parts are views:
            new_rows: the rows of the output of query_key_value, [A * K * 3 * H];
            new_slots: the beams' slots of this step in the flat mask, [A * K];
            position_ids: the two positions of the examples' tokens, [A, 2, 1].
    """

    def __init__(self, model, source_length, length, num_beams):
        """Take no keys and values yet.

        Args:
            source_length: numpy int64 [A], of the ``length`` (int) slots that a source has.
        """
        attention = model.glm.transformer.layers[0].attention
        self.layers, self.num_beams = [], num_beams
        self.num_heads, self.head_size = attention.num_attention_heads, attention.attention_head_size
        self.by_head = laid_out_by_head(attention)
        self.dtype = model.glm.word_embeddings.weight.dtype
        self.gmask_position = source_length - 2
        lengths = paddle.to_tensor(source_length).unsqueeze(1)
        visible = (paddle.arange(length) < lengths).astype("float32")
        self.source_mask = additive_mask(visible, self.dtype)[:, None, None, :]  # [A, 1, 1, S]
        self.mask = self.source_mask.tile([1, 1, num_beams, 1])

    def arrange(self, origins, step, room):
        """Keep some beams and the slots that they see, and add slots for more steps.

        Args:
            origins: numpy int64 [A', K], the beams to go on with: row by row their numbers
                among the A * K of now, all of one example.
            step (int): tokens that every beam has had. room (int): steps to come.
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
        room = room * self.num_beams
        if captures():  # cuBLAS takes slower kernels for other numbers
            room += -(used + room) % 8
        hidden = paddle.full([len(examples), self.num_beams, room], MASKED, self.dtype)
        mask = paddle.concat([paddle.take_along_axis(mask, index, axis=2), hidden], axis=2)
        self.mask = mask.unsqueeze(1)
        self._copy_layers(examples, slots, room)
        self.gmask_position = self.gmask_position[examples]
        self._place_indices(used, step)

    def _copy_layers(self, examples, slots, room):
        """Copy the ``slots`` (numpy [A', used]) of ``examples`` into new tensors with ``room``."""
        _, num_rows, num_heads, old_slots, head_size = self.layers[0][1].shape
        shape = [1, len(examples), num_heads, slots.shape[1] + room, head_size]
        query_shape = [1, len(examples), num_heads, self.num_beams, head_size]
        kind, example, head = np.ogrid[:2, : len(examples), :num_heads]
        first = ((kind * num_rows + examples[example]) * num_heads + head) * old_slots
        rows = first[..., None] + slots[:, None]  # [2, A', H, used]
        # What is not written yet is masked, and may be a copy of anything: of row 0.
        rows = np.pad(rows, [(0, 0), (0, 0), (0, 0), (0, room)]).reshape(-1)
        middle, end = len(rows) // 2, len(rows)
        rows = paddle.to_tensor(np.pad(rows, (0, np.prod(query_shape[:-1]))))
        for number, (layer, *_) in enumerate(self.layers):
            layer = F.embedding(rows, layer)  # copies whole rows fast
            keys, values = layer[:middle].reshape(shape), layer[middle:end].reshape(shape)
            self.layers[number] = layer, keys, values, layer[end:].reshape(query_shape)

    def _place_indices(self, used, step):
        """Make ``indices`` of the step before the next, whose slots begin at ``used``."""
        _, num_rows, num_heads, slots, _ = self.layers[0][1].shape
        num_beams, num_values = self.num_beams, num_rows * num_heads * slots
        example, beam, head = np.ogrid[:num_rows, :num_beams, :num_heads]
        row = example * num_heads + head
        key = row * slots + used - num_beams + beam
        query = 2 * num_values + row * num_beams + beam
        kinds = [query, key, key + num_values]
        new_rows = np.stack(kinds, axis=3 if self.by_head else 2).reshape(-1)
        new_slots = np.arange(num_rows * num_beams) * slots + used - num_beams
        new_slots += np.tile(np.arange(num_beams), num_rows)
        position_ids = np.stack([self.gmask_position, np.full(num_rows, step)], axis=1)
        moves = np.where(new_rows < 2 * num_values, num_beams, 0)
        increments = [moves, np.full_like(new_slots, num_beams), np.tile([0, 1], num_rows)]
        self.increments = paddle.to_tensor(np.concatenate(increments))
        indices = [new_rows, new_slots, position_ids.reshape(-1)]
        self.indices = paddle.to_tensor(np.concatenate(indices))
        first, last = len(new_rows), len(new_rows) + len(new_slots)
        self.new_rows, self.new_slots = self.indices[:first], self.indices[first:last]
        self.position_ids = self.indices[last:].reshape([num_rows, 2, 1])
        self.visible = paddle.zeros([len(new_slots), 1], self.dtype)

    def open_slots(self, origins):
        """Go on from ``origins``, and let each beam see the slot of its next token.

        Args:
            origins: int64 [A, K], the beams of the step before, by their numbers.
        """
        self.indices.add_(self.increments)
        rows = self.mask.reshape([-1, self.mask.shape[-1]])
        rows = rows.index_select(origins.reshape([-1]))
        paddle.assign(rows.reshape(self.mask.shape), self.mask)
        self.mask.reshape([-1, 1]).scatter_(self.new_slots, self.visible)


def prefill(model, input_ids, source_length, num_beams):
    """Run the sources once and keep their keys and values.

    Args:
        input_ids: int64 [B, S], sources padded on the right.
        source_length: numpy int64 [B]. num_beams (int): of each source.

    Returns:
        Cache, to be arranged before the first token.
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
    forward(model, input_ids, position_ids, core_attention)
    return cache


def decode_one_token(model, cache, token_ids, origins):
    """Feed one token to every beam, and keep its keys and values.

    The beams of an example are K queries on one shared cache.

    Args:
        token_ids: int64 [A, K], the beams' last tokens.
        origins: int64 [A, K], the beams of the step before that they go on from, by their
            numbers among the A * K.

    Returns:
        logits of the next token, [A * K, V].
    """
    cache.open_slots(origins)
    mask = cache.mask.tile([1, cache.num_heads, 1, 1]) if on_cpu() else cache.mask

    def core_attention(number, attention, projected):
        layer, keys, values, query = cache.layers[number]
        layer.scatter_(cache.new_rows, projected.reshape([-1, cache.head_size]))
        return attend(query, keys, values, mask)

    hidden_states = forward(model, token_ids, cache.position_ids, core_attention)
    # As one matrix, for Paddle would read the weight once for each example.
    rows = hidden_states.reshape([-1, hidden_states.shape[-1]])
    return paddle.matmul(rows, model.glm.word_embeddings.weight, transpose_y=True)
