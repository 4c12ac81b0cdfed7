"""Experiments: data, models and the commands of ``python -m fsam_optax``.

Nothing of the core imports this. It needs the extras that
``pip install "fsam-optax[experiments]"`` brings, each imported where it is
used.
"""
