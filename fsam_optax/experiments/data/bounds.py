"""Whether what is read fits into memory, looked at before it is."""

import os

from fsam_optax.experiments.data.images import DataError


def check_memory(needed: int, what: str, remedy: str) -> None:
  """Raises a DataError where so many bytes are not free.

  Args:
    needed: number of bytes.
    what: takes them, such as ``"the arrays of 'my.npz'"``.
    remedy: the last sentence of the error.
  """
  left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if needed > left:
    raise DataError(
      f"must fit into memory, {left / 2**30:,.1f} GiB, got {what}, "
      f"{needed / 2**30:,.1f} GiB. {remedy}"
    )
