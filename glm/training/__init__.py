"""Training: the Trainer and its callbacks, the order of batches, the memory that it takes."""
