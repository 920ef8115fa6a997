# SPDX-License-Identifier: Apache-2.0
"""The examples: where they come from, what they must look like, how they are split."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsoftmax.training.errors import ProgramError

DIGITS = "digits"
_HELD_OUT = 0.2
_NPZ = (b"PK\3\4", b"PK\5\6")  # how the file begins: a zip file, an empty one
_RENUMBER = ": np.unique(y, return_inverse=True)[1] numbers any labels so"


class Dataset(NamedTuple):
    """Examples split and scaled, ready to train on.

    Attributes:
        source: `"digits"` or the absolute path of the user's file.
        sha256: a fingerprint of the arrays as they were read.
        classes: the number of classes C.
        train_x: `[n, features]` float32, mean 0 and variance 1 by feature.
        train_y: `[n]` int32 in `[0, C)`.
        test_x: the held-out examples, scaled with the statistics of the training ones.
        test_y: their labels.
        mean: `[features]` float32, what was subtracted.
        scale: `[features]` float32, what was divided by.
    """

    source: str
    sha256: str
    classes: int
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    mean: np.ndarray
    scale: np.ndarray


def load(source: str) -> Dataset:
    """Reads, checks, splits and scales the examples of `source`.

    Args:
        source: `"digits"`, or the path of an `.npz` file with the arrays x and y.

    Returns:
        The examples; the split depends on the labels alone, never on the seed.

    Raises:
        ProgramError: naming the file, the array and the first bad row.
    """
    if source == DIGITS:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import

        x, y = map(np.asarray, load_digits(return_X_y=True))
        name = DIGITS
    else:
        name = str(Path(source).resolve())
        x, y = _read_npz(source, ("x", "y"))
    fingerprint = _sha256(x, y)
    x = _check_x(source, x)
    y = _check_y(source, y, len(x))
    train, test = _split(y)
    mean, scale = _statistics(x[train])
    return Dataset(
        source=name,
        sha256=fingerprint,
        classes=int(y.max()) + 1,
        train_x=scaled(x[train], mean, scale),
        train_y=y[train],
        test_x=scaled(x[test], mean, scale),
        test_y=y[test],
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
    )


def load_rows(source: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows to classify: x `[n, features]`, finite, and the labels y `[n]` if the file has them."""
    arrays = _read_npz(source, ("x",), ("y",))
    x = _check_x(source, arrays[0])
    y = arrays[1] if len(arrays) > 1 else None
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "bui"):
        raise ProgramError(
            f"{source}: array 'y' must have shape ({len(x)},) and hold integer labels, one for "
            f"each row of x; got {y.shape}, {y.dtype}"
        )
    return x, y


def _read_npz(
    source: str, needed: Sequence[str], others: Sequence[str] = ()
) -> tuple[np.ndarray, ...]:
    """Arrays of a file, unchecked: those it must hold, and of the others those that are there."""
    try:
        # Opened here so that a missing file and a file of the wrong kind read differently.
        with open(source, "rb") as file:
            if file.read(4) not in _NPZ:
                raise ProgramError(f"{source}: not an npz file (write one with numpy.savez)")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                for name in needed:
                    if name not in arrays.files:
                        raise ProgramError(
                            f"{source}: no array {name!r}; the file must hold "
                            f"{' and '.join(needed)}, it has "
                            f"{', '.join(arrays.files) or 'nothing'}"
                        )
                names = [*needed, *(name for name in others if name in arrays.files)]
                return tuple(_member(source, arrays, name) for name in names)
    except OSError as error:
        raise ProgramError(f"{source}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ProgramError(
            f"{source}: a damaged or truncated npz file; write it again with numpy.savez"
        ) from error


def _member(source: str, arrays: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        array = arrays[name]
    # What numpy and zipfile raise for object arrays, bad headers and truncated contents.
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if "allow_pickle" in str(error):
            remedy = _RENUMBER if name == "y" else ""
            raise ProgramError(
                f"{source}: array {name!r} holds Python objects; save it as a numeric array{remedy}"
            ) from error
        raise ProgramError(f"{source}: array {name!r} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ProgramError(f"{source}: array {name!r} is not a NumPy array")
    return array


def _sha256(x: np.ndarray, y: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in (x, y):
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check_x(source: str, x: np.ndarray) -> np.ndarray:
    """`x` as `[n, features]`, finite."""
    if x.dtype.kind not in "buif":
        raise ProgramError(f"{source}: array 'x' must hold real numbers; got dtype {x.dtype}")
    if x.ndim < 2 or 0 in x.shape:
        raise ProgramError(
            f"{source}: array 'x' must have shape (rows, features), or (rows, ...) which is "
            f"flattened, with neither empty; got {x.shape}"
        )
    x = x.reshape(len(x), -1)
    # Larger numbers than float32 holds would turn infinite on the device.
    bad = ~(np.abs(x.astype(np.float64)) <= np.finfo(np.float32).max).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        values = x[row].astype(np.float64)
        column = int((~(np.abs(values) <= np.finfo(np.float32).max)).argmax())
        raise ProgramError(
            f"{source}: array 'x', row {row}: {x[row, column]} (flattened feature {column}) is "
            "not a finite float32 number"
        )
    return x


def _check_y(source: str, y: np.ndarray, rows: int) -> np.ndarray:
    """`y` as `[rows]` int32 holding every class from 0 on."""
    if y.shape != (rows,):
        raise ProgramError(
            f"{source}: array 'y' must have shape ({rows},), one label for each row of x; "
            f"got {y.shape}"
        )
    if y.dtype.kind not in "bui":
        row, remedy = 0, _RENUMBER
        if y.dtype.kind == "f":
            fractional = ~(np.isfinite(y) & (y == np.round(y)))
            row = int(fractional.argmax())  # 0 if every number is whole
            remedy = _RENUMBER if np.isfinite(y).all() else ""  # NaN is no class
        raise ProgramError(
            f"{source}: array 'y', row {row}: {y[row].item()!r} is not an integer label (dtype "
            f"{y.dtype}); labels are integers from 0 to the number of classes - 1{remedy}"
        )
    if (y < 0).any():
        row = int((y < 0).argmax())
        raise ProgramError(
            f"{source}: array 'y', row {row}: {y[row]} is negative; labels are integers from 0 to "
            f"the number of classes - 1{_RENUMBER}"
        )
    found, first, counts = np.unique(y, return_index=True, return_counts=True)
    gaps = found.astype(np.uint64) != np.arange(len(found), dtype=np.uint64)
    if gaps.any():
        absent = int(gaps.argmax())
        row = int((y > absent).argmax())
        raise ProgramError(
            f"{source}: array 'y', row {row}: {y[row]}, but no row has label {absent}; labels "
            f"use every number from 0 to the number of classes - 1{_RENUMBER}"
        )
    if len(found) < 2:
        raise ProgramError(
            f"{source}: array 'y', row 0: every row has label 0; a classifier needs two classes"
        )
    if (counts < 2).any():
        label = int((counts < 2).argmax())
        raise ProgramError(
            f"{source}: array 'y', row {first[label]}: the only row with label {label}; every "
            "class needs at least two, one to train on and one to hold out"
        )
    return y.astype(np.int32)


def _split(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and the rows held out: about 20 % of every class, at least one."""
    # RandomState because NumPy promises its stream for ever; the split is the same on any
    # version, and belongs to the data rather than to the seed of a run.
    random = np.random.RandomState(0)
    held_out = np.zeros(len(y), bool)
    for label in range(int(y.max()) + 1):
        rows = random.permutation(np.flatnonzero(y == label))
        held_out[rows[: max(1, round(_HELD_OUT * len(rows)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each feature, in float64."""
    mean = x.mean(axis=0, dtype=np.float64)
    deviation = x.std(axis=0, dtype=np.float64)
    # A feature that hardly ever moves (a pixel in the corner) would become a huge outlier on
    # the day it does; one that never moves would be divided by zero or by rounding noise.
    largest = deviation.max()
    floor = np.maximum(1e-6 * np.abs(mean), np.finfo(np.float32).tiny)
    constant = deviation <= floor
    scale = np.where(constant, largest if largest > 0 else 1.0, deviation)
    return mean, scale


def scaled(x: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What the model sees of examples: float32."""
    return ((x - mean) / scale).astype(np.float32)
