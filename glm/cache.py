"""The cache of keys and values: sources enter it at once, targets one token at a time."""

import numpy as np
import paddle
import paddle.nn.functional as F

from glm.device import on_cpu
from glm.modeling import MASKED, additive_mask, attend, forward, laid_out_by_head, split_heads

GROWTH = 16  # steps by which a cache grows: slots not written yet are attended over too, masked


class Cache:
    """Keep the keys and values of a batch, and which of them each beam sees.

    A: examples; K: beams; H: heads; D: a head's size. A layer's tensor has rows of D numbers, in
    three parts. In the first two, each head of an example has a row for every slot:

        | keys [A, H, slots] | values [A, H, slots] | queries [A, H, K] |

        slots:  | source | step 0: K beams | step 1: K beams | ... | room for more steps |

    So one scatter puts the output of query_key_value in its place. The source is stored
    once per example, not once per beam. A beam's slot of a step is written once and
    never moves: when beams branch, only the mask changes, which says what each beam
    descends from.

    Attributes:
        layers: of each layer (tensor [rows, D], keys, values, queries). The last three are views,
            [1, A, H, slots, D] twice and [1, A, H, K, D].
        mask: 0 where a beam sees a slot, else MASKED, [A, K, slots], in the weights' type.
        used (int): slots that are written.
        new_rows: the rows to which the output of query_key_value goes, int64 [A * K * 3 * H].
    """

    def __init__(self, model, visible, num_beams, tgt_length):
        """Take no keys and values yet: ``visible`` is 1 where a source has a token, [A, S]."""
        attention = model.glm.transformer.layers[0].attention
        self.layers, self.num_beams, self.steps_left = [], num_beams, tgt_length
        self.num_heads, self.head_size = attention.num_attention_heads, attention.attention_head_size
        self.by_head = laid_out_by_head(attention)
        self.dtype = model.glm.word_embeddings.weight.dtype
        self.used = visible.shape[1]
        self.mask = additive_mask(visible, self.dtype).unsqueeze(1).tile([1, num_beams, 1])
        # Of the K slots of a step a beam sees its own.
        self.step_mask = additive_mask(paddle.eye(num_beams), self.dtype)  # [K, K]

    def open_slots(self):
        """Let each beam see the slot to which its next token is about to be written."""
        if self.used == self.mask.shape[2]:
            room = min(GROWTH, self.steps_left) * self.num_beams
            self.arrange(np.arange(len(self.mask)), room)
            self.steps_left -= GROWTH
        self.mask[:, :, self.used : self.used + self.num_beams] = self.step_mask
        self.used += self.num_beams
        self.new_rows = self.new_rows + self.row_steps

    def arrange(self, examples, room):
        """Keep some examples and the slots that their beams see, and add room for more.

        Args:
            examples: numpy int64 [A'], which of the examples in ``layers`` to keep. The mask is
                theirs already. room (int): slots.
        """
        visible = (self.mask == 0).any(axis=1).numpy()  # [A', slots]
        self.used = visible.sum(axis=1).max()
        # The visible slots first: where an example has fewer than another, hidden ones
        # fill up.
        slots = np.argsort(~visible, axis=1, kind="stable")[:, : self.used]  # [A', used]
        index = paddle.to_tensor(slots).unsqueeze(1).tile([1, self.num_beams, 1])
        mask = paddle.take_along_axis(self.mask, index, axis=2)
        hidden = paddle.full([len(examples), self.num_beams, room], MASKED, self.dtype)
        self.mask = paddle.concat([mask, hidden], axis=2)
        self._copy_layers(examples, slots, room)
        self._locate_new_rows()

    def _copy_layers(self, examples, slots, room):
        """Copy the ``slots`` (numpy [A', used]) of ``examples`` into new tensors with ``room``."""
        _, num_rows, num_heads, old_slots, head_size = self.layers[0][1].shape
        shape = [1, len(examples), num_heads, self.used + room, head_size]
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

    def _locate_new_rows(self):
        """Compute ``new_rows`` of the step before the next, and by how much a step moves them."""
        _, num_rows, num_heads, slots, _ = self.layers[0][1].shape
        num_values = num_rows * num_heads * slots  # rows of values, and as many of keys
        example, beam, head = np.ogrid[:num_rows, : self.num_beams, :num_heads]
        row = example * num_heads + head
        key = row * slots + self.used - self.num_beams + beam
        query = 2 * num_values + row * self.num_beams + beam
        kinds = [query, key, key + num_values]
        rows = np.stack(kinds, axis=3 if self.by_head else 2).reshape(-1)
        self.new_rows = paddle.to_tensor(rows)
        self.row_steps = paddle.to_tensor(np.where(rows < 2 * num_values, self.num_beams, 0))

    def follow(self, origins):
        """Go on with other beams: row by row their numbers among the A * K of now, numpy [A', K]."""
        num_rows, num_beams, slots = self.mask.shape
        beams = paddle.to_tensor(origins.reshape(-1))
        mask = self.mask.reshape([-1, slots]).index_select(beams)
        self.mask = mask.reshape([-1, num_beams, slots])
        if len(origins) < num_rows:  # finished examples leave the batch
            self.arrange(origins[:, 0] // num_beams, slots - self.used)


def prefill(model, input_ids, source_length, num_beams, tgt_length):
    """Run the sources once and keep their keys and values.

    Args:
        input_ids: int64 [B, S], sources padded on the right.
        source_length: numpy int64 [B].
        num_beams (int): beams of each source. tgt_length (int): tokens that each may generate.

    Returns:
        Cache.
    """
    length = input_ids.shape[1]
    positions = paddle.arange(length)
    visible = (positions < paddle.to_tensor(source_length).unsqueeze(1)).astype("float32")  # [B, S]
    cache, mask = Cache(model, visible, num_beams, tgt_length), None
    if source_length.min() < length:
        mask = additive_mask(visible, cache.dtype)[:, None, None, :]  # [B, 1, 1, S]
        if on_cpu():  # which is slow at broadcasting: once here, not in every layer
            mask = mask.tile([1, cache.num_heads, length, 1])

    def core_attention(number, attention, projected):
        heads = split_heads(attention, projected)  # [3, B, H, S, D]
        query, keys, values = heads[:1], heads[1:2], heads[2:]
        cache.layers.append((heads[1:].reshape([-1, cache.head_size]), keys, values))
        return attend(query, keys, values, mask)

    position_ids = paddle.stack([positions, paddle.zeros_like(positions)]).unsqueeze(0)
    forward(model, input_ids, position_ids, core_attention)
    return cache


def decode_one_token(model, cache, token_ids, position_ids):
    """Feed one token to every beam, and keep its keys and values.

    The beams of an example are K queries on one shared cache.

    Args:
        token_ids: int64 [A, K], the beams' last tokens.
        position_ids: int64 [A, 2], the two positions of an example's tokens.

    Returns:
        logits of the next token, [A, K, V].
    """
    cache.open_slots()
    mask = cache.mask.unsqueeze(1)  # [A, 1, K, slots]
    if on_cpu():
        mask = mask.tile([1, cache.num_heads, 1, 1])

    def core_attention(number, attention, projected):
        layer, keys, values, query = cache.layers[number]
        layer.scatter_(cache.new_rows, projected.reshape([-1, cache.head_size]))
        return attend(query, keys, values, mask)

    hidden_states = forward(model, token_ids, position_ids.unsqueeze(-1), core_attention)
    # As one matrix, for Paddle would read the weight once for each example.
    rows = hidden_states.reshape([-1, hidden_states.shape[-1]])
    logits = paddle.matmul(rows, model.glm.word_embeddings.weight, transpose_y=True)
    return logits.reshape([*token_ids.shape, -1])
