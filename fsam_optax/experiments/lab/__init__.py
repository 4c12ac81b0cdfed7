"""The laboratory: many small runs at once, over seeds.

One trainer, one search, one store of rows, one paired report. The same seed
gives every arm the same rows, wrong labels, first parameters and batches: what
is left of the difference between two is theirs.
"""
