"""Many small runs at once, over seeds: ``compare``, ``tune`` and their trainer.

The same seed gives every optimizer the same rows, wrong labels, first
parameters and batches: what is left of the difference between two is theirs.
"""
