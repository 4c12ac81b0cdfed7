"""A user's own data: four arrays in an .npz."""

import io
import math
from typing import NamedTuple, Optional
import warnings
import zipfile

import numpy as np

from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import entry
from fsam_optax.experiments.data import labels as labels_lib
from fsam_optax.experiments.data.images import DataError
from fsam_optax.experiments.data.images import Images

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_REMEDY = "Write it with np.savez(path, x_train=..., y_train=..., ...)"
_LARGEST_READ = 2**20
_LARGEST_HEADER = 2**14
_CHUNK = 2**18


def load(path: str, image_size: Optional[int] = None) -> Images:
  """Reads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  Args:
    path: what :func:`numpy.savez` wrote. Inputs are real numbers of shape
      ``[n, features]``, ``[n, height, width]`` or ``[n, height, width,
      channels]``. Images of shape ``[n, 1 or 3, height, width]`` are turned so
      that their channels come last, unless the width, too, is 1 or 3. For the
      labels see :func:`fsam_optax.experiments.data.labels.read`. Nothing is
      unpickled, and nothing is read before its size is known to fit.
    image_size: side in pixels to scale images to; None to leave them.

  Returns:
    The images, on the scale that they had: in uint8 where they were so, in
    float64 where they had more than float32 holds, and else in float32.

  Raises:
    DataError: if the file cannot be read or an array is not as above.
  """
  arrays = _read_arrays(path)
  x_train, x_test = arrays["x_train"], arrays["x_test"]
  for name in ("x_train", "x_test"):
    _check_inputs(name, arrays[name])
  if x_train.shape[1:] != x_test.shape[1:]:
    raise DataError(
      "`x_test` must have rows of the shape of those of `x_train`, "
      f"{list(x_train.shape[1:])}, got {list(x_test.shape[1:])}"
    )
  kinds = [x.dtype for x in (x_train, x_test)]
  if kinds[0] != kinds[1] and not all(
    np.issubdtype(kind, np.floating) for kind in kinds
  ):
    raise DataError(
      "`x_test` must have the dtype of `x_train`, for their scales to agree, "
      f"got {kinds[1]} and {kinds[0]}"
    )
  y_train, y_test, classes, notes = labels_lib.read(
    arrays["y_train"], arrays["y_test"], len(x_train), len(x_test)
  )
  x_train, x_test = (_converted(name, arrays[name]) for name in _ARRAYS[::2])
  if np.ptp(x_train) == 0:
    raise DataError(
      "`x_train` must not be constant: it is divided by its standard "
      f"deviation. Got {x_train.flat[0]:g} throughout"
    )
  if _is_channels_first(x_train.shape):
    x_train, x_test = (
      np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in (x_train, x_test)
    )
    notes += (
      f"the images of {printable(path)} have their channels first, and are "
      f"read as {' x '.join(map(str, x_train.shape[1:]))}, channels last",
    )
  found = Images(
    printable(path), x_train, y_train, x_test, y_test, classes, notes=notes
  )
  return found.resized(image_size)


class _File(io.FileIO):
  """A file that hands out a MiB at a time, whatever sizes are written in it."""

  def read(self, size: Optional[int] = -1, /) -> bytes:
    whole = size is None or size < 0
    if size is not None and size > _LARGEST_READ:
      raise zipfile.BadZipFile("its directory is larger than a MiB")
    content = super().read(_LARGEST_READ + 1 if whole else size) or b""
    if len(content) > _LARGEST_READ:
      raise zipfile.BadZipFile("its directory is larger than a MiB")
    return content


class _Array(NamedTuple):
  """What is known of an array before it is read.

  Attributes:
    member: of the archive.
    shape: of the array.
    is_fortran: whether its first axis is that of neighbors.
    dtype: of the array.
    start: where in the member its numbers begin.
  """

  member: zipfile.ZipInfo
  shape: tuple[int, ...]
  is_fortran: bool
  dtype: np.dtype
  start: int

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def _read_arrays(path: str) -> dict[str, np.ndarray]:
  bounds.size_of(path, _REMEDY)
  try:
    with _File(path) as file:
      if (start := file.read(6))[:4] != b"PK\x03\x04":
        is_array = start == np.lib.format.MAGIC_PREFIX
        raise ValueError(
          "it is one array, an .npy" if is_array else "it is no zip file"
        )
      with zipfile.ZipFile(file) as archive:
        found = {
          name: _describe(archive, name, member)
          for name, member in _members(archive).items()
        }
        _check_memory(found, path)
        return {name: _read(archive, array) for name, array in found.items()}
  except DataError:
    raise
  # zipfile, its four decompressors and the parser of a header have a dozen ways
  # to say that a file is damaged; none of them is this program's mistake.
  except Exception as error:
    raise DataError(
      f"must be an archive of arrays, got {path!r}, which cannot be read as "
      f"one ({bounds.reason(error)}). {_REMEDY}"
    ) from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
  """The four members by the name of their array."""
  found: dict[str, list[zipfile.ZipInfo]] = {name: [] for name in _ARRAYS}
  for member in archive.infolist():
    name = member.filename.removesuffix(".npy")
    if name in found:
      found[name].append(member)
  if missing := [name for name in _ARRAYS if not found[name]]:
    raise DataError(
      f"must hold the arrays {', '.join(_ARRAYS)}, got none named "
      f"{', '.join(missing)}. {_REMEDY}"
    )
  for name, members in found.items():
    if len(members) > 1:
      raise DataError(
        f"must hold one array `{name}`, got {len(members)} of that name. "
        f"{_REMEDY}"
      )
  return {name: members[0] for name, members in found.items()}


def _describe(
  archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo
) -> _Array:
  with archive.open(member) as stream:
    head = io.BytesIO(stream.read(_LARGEST_HEADER))
  version = np.lib.format.read_magic(head)
  if version not in ((1, 0), (2, 0)):  # The third is for fields with names.
    raise ValueError(f"`{name}` has the version {version}")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # What Python 2 wrote is fine.
    shape, is_fortran, dtype = (
      np.lib.format.read_array_header_1_0(head)
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0(head)
    )
  array = _Array(member, shape, is_fortran, dtype, head.tell())
  if dtype.hasobject:
    remedy = "astype(str)" if name[0] == "y" else "astype(np.float32)"
    raise DataError(
      f"`{name}` must be an array of numbers, got one of Python's objects, "
      "which cannot be read without unpickling it. Convert it, as with "
      f"{remedy}, and save again"
    )
  if dtype.kind == "V":
    raise DataError(
      f"`{name}` must be an array of numbers, got the dtype {dtype}. Convert "
      "it to a numeric dtype and save again"
    )
  held = member.file_size - array.start
  if any(n < 0 for n in shape) or array.bytes != held:
    raise DataError(
      f"`{name}` must hold what its header says, {list(shape)} of {dtype}, "
      f"{array.bytes:,} bytes, got {held:,}: it is damaged. {_REMEDY}"
    )
  return array


def _check_memory(arrays: dict[str, _Array], path: str) -> None:
  needed = 0
  for array in arrays.values():
    needed += array.bytes
    if array.dtype != np.uint8:
      needed += math.prod(array.shape) * 8  # Its copy in a floating dtype.
  bounds.check_memory(
    needed,
    f"the arrays of {path!r}",
    "Save fewer rows, or a smaller dtype such as uint8",
  )


def _read(archive: zipfile.ZipFile, array: _Array) -> np.ndarray:
  if not array.bytes:
    return np.empty(array.shape, array.dtype)
  content = np.empty(array.bytes, np.uint8)
  with archive.open(array.member) as stream:
    stream.read(array.start)
    at = 0
    while at < array.bytes:
      chunk = stream.read(min(_CHUNK, array.bytes - at))
      if not chunk:
        raise EOFError(f"{array.member.filename} ends early")
      content[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
      at += len(chunk)
    stream.read(1)  # At its end the checksum is compared.
  order = "F" if array.is_fortran else "C"
  return content.view(array.dtype).reshape(array.shape, order=order)


def _check_inputs(name: str, x: np.ndarray) -> None:
  if x.dtype.kind not in "iuf":
    raise DataError(
      f"`{name}` must be of an integer or floating dtype, got {x.dtype}. "
      "Convert it, as with astype(np.float32)"
    )
  if x.ndim not in (2, 3, 4) or x.size == 0:
    raise DataError(
      f"`{name}` must have the shape [n, features], [n, height, width] or [n, "
      f"height, width, channels] and not be empty, got {list(x.shape)}"
    )


def _converted(name: str, x: np.ndarray) -> np.ndarray:
  """The inputs in a dtype that holds them, with an axis of channels."""
  x = x[..., None] if x.ndim == 3 else x
  if x.dtype == np.uint8:
    return x
  with np.errstate(over="ignore"):
    narrow = x.astype(np.float32)
  if bad := int(np.sum(~np.isfinite(narrow))):
    raise DataError(
      f"`{name}` must be finite in float32, got {bad} values that are not. "
      "Remove or replace them"
    )
  is_held = np.array_equal(narrow, x)
  return narrow if is_held else x.astype(np.float64)


def _is_channels_first(shape: tuple[int, ...]) -> bool:
  """Whether images are ``[n, channels, height, width]``."""
  if len(shape) != 4:
    return False
  first, last = shape[1], shape[3]
  if first in (1, 3) and last not in (1, 3):
    return True
  if first in (1, 3) or (first < 5 and last > 4):
    raise DataError(
      "`x_train` must have the shape [n, height, width, channels], got "
      f"{list(shape)}, whose channels may be first or last. Put them last with "
      "x.transpose(0, 2, 3, 1), or hand over [n, height, width] or [n, "
      "features]"
    )
  return False


ENTRY = entry.DataSet(
  name="npz",
  about="an .npz with x_train, y_train, x_test and y_test",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  recognizes=lambda path: path.lower().endswith(".npz"),
)
