"""Room 1: rows become batches. Knows datasets, PIL, numpy and tensors; knows no model and no accelerate."""
