"""The order of batches: one for any layout of processes, with records of like length together."""

import numpy as np
from paddle.io import DistributedBatchSampler


class GroupedBatchSampler(DistributedBatchSampler):
    """One order of batches for any layout of processes.

    It depends on the seed, the epoch and the global batch alone. The global batches of an
    epoch are cut into batches of ``batch_size``, which are dealt to the replicas in turn. The
    last global batch is filled up with records of the epoch's beginning.

    Args:
        dataset: features. batch_size (int): of one process in one pass.
        global_batch_size (int): records of one step, over all processes and passes.
        shuffle (bool): a new order each epoch; else from long to short records.
        group_by_length (bool): put records of like length into the same global batch,
            and order the batches at random.
    """

    def __init__(
        self, dataset, batch_size, num_replicas, rank, global_batch_size, shuffle, group_by_length, seed
    ):
        layout = {"num_replicas": num_replicas, "rank": rank}
        super().__init__(dataset, batch_size, shuffle=shuffle, **layout)
        self.global_batch_size = global_batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.lengths = np.array([len(feature["input_ids"]) for feature in dataset])
        self.target_lengths = np.array([len(feature["labels"]) for feature in dataset])

    def global_batches(self):
        """Returns the record numbers of an epoch, int64 [batches, global_batch_size]."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            order = rng.permutation(len(self.lengths))
        else:
            order = np.argsort(-self.lengths, kind="stable")
        count = -(-len(order) // self.global_batch_size)
        # Repeats from the beginning.
        order = np.resize(order, count * self.global_batch_size)
        if not (self.shuffle and self.group_by_length):
            return order.reshape([count, self.global_batch_size])
        # Sorted within chunks of 50 batches: enough to choose from.
        chunk = 50 * self.global_batch_size
        for start in range(0, len(order), chunk):
            part = order[start : start + chunk]
            order[start : start + chunk] = part[np.argsort(-self.lengths[part], kind="stable")]
        return rng.permutation(order.reshape([count, self.global_batch_size]))

    def __iter__(self):
        batches = self.global_batches()
        # Of each global batch of the epoch that begins.
        self.target_tokens = self.target_lengths[batches].sum(1)
        self.tokens = self.lengths[batches].sum(1)
        batches = batches.reshape([-1, self.batch_size])
        return iter(batches[self.local_rank :: self.nranks].tolist())

    def __len__(self):
        steps = -(-len(self.lengths) // self.global_batch_size)
        return steps * self.global_batch_size // (self.batch_size * self.nranks)
