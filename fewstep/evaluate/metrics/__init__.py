"""Distances and scores of sets of features.

`frechet` and `distances` are functions of tensors in float64; `accumulate` has metrics whose sums add up over batches and
processes.
"""
