"""The order of batches: one for any layout of processes, with records of like length together."""

import numpy as np
from paddle.io import DistributedBatchSampler


class GroupedBatchSampler(DistributedBatchSampler):
    """One order of batches for any layout of processes.

    It depends on the seed, the epoch and the global batch alone. The global batches of an
    epoch are cut into batches of ``batch_size``, which are dealt to the replicas in turn. The
    last global batch is filled up with records of the epoch's beginning.

    Args:
        dataset: features.
        batch_size: records of one process in one pass.
        num_replicas: processes that share the data.
        rank: of this one among them.
        global_batch_size: records of one step, over all processes and passes.
        shuffle: a new order each epoch; else from long to short records.
        group_by_length: put records of like length into the same global batch, and order the batches
            at random.
        seed: of the order.
        steps_ahead: how far the Trainer's count of steps is ahead of the records'.
    """

    def __init__(
        self,
        dataset: list[dict],
        batch_size: int,
        num_replicas: int,
        rank: int,
        global_batch_size: int,
        shuffle: bool = False,
        group_by_length: bool = False,
        seed: int = 0,
        steps_ahead: int = 0,
    ):
        layout = {"num_replicas": num_replicas, "rank": rank}
        super().__init__(dataset, batch_size, shuffle=shuffle, **layout)
        self.global_batch_size = global_batch_size
        self.group_by_length = group_by_length
        self.seed, self.steps_ahead = seed, steps_ahead
        self.lengths = np.array([len(feature["input_ids"]) for feature in dataset])
        self.target_lengths = np.array([len(feature["labels"]) for feature in dataset])

    def global_batches(self) -> np.ndarray:
        """Return the record numbers of the Trainer's epoch, int64 [batches, global_batch_size]."""
        steps = -(-len(self.lengths) // self.global_batch_size)
        epoch, skipped = divmod(self.epoch * steps - self.steps_ahead, steps)
        batches = self.order(max(epoch, 0))
        if skipped:  # the Trainer's epochs begin within those of the records
            batches = np.concatenate([batches[skipped:], self.order(epoch + 1)[:skipped]])
        return batches

    def order(self, epoch: int) -> np.ndarray:
        """Return the record numbers of an epoch of the records, int64 [batches, global_batch_size]."""
        rng = np.random.default_rng([self.seed, epoch])
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
