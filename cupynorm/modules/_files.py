"""Files of named arrays, .safetensors and .npz: whole or not at all, and never pickled."""

import contextlib
import io
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from cupynorm import _libraries, _rules

Arrays = dict[str, np.ndarray[Any, Any]]
Path = str | os.PathLike[str]
Encode = Callable[[Arrays], bytes]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Decode = Callable[[str, Shapes], tuple[list[str], Arrays]]


def write(path: Path, arrays: Arrays) -> None:
    """Write arrays under their names to a file whose ending says the format.

    The bytes go to a file beside it, which takes its name at the end: a reader meets the old file
    or the new one, never a part.
    """
    encode, _ = _format(path)
    data = encode({name: np.ascontiguousarray(a) for name, a in arrays.items()})
    target = os.path.realpath(path)  # or a link would be replaced by the file
    part = f"{target}.{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash may keep the new name without its bytes
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, part)  # a file kept from others' eyes must stay so
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def read(path: Path, wanted: Shapes) -> tuple[list[str], Arrays]:
    """Names of all arrays in a file, and those of `wanted` that it holds; no others are read.

    Of one of another shape than wanted the values are not read.
    """
    _, decode = _format(path)
    return decode(os.fspath(path), wanted)


def _format(path: Path) -> tuple[Encode, Decode]:
    ending = os.path.splitext(path)[1]
    if ending not in _FORMATS:
        msg = f"{os.fspath(path)!r} does not say its format; end it in {' or '.join(_FORMATS)}"
        raise ValueError(msg)
    return _FORMATS[ending]


def _safetensors() -> Any:
    way_out = "pip install 'cupynorm[safetensors]', or use a .npz file"
    with _libraries.needing("a .safetensors file needs the package safetensors", way_out):
        import safetensors.numpy
    return safetensors


_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def _decode_safetensors(path: str, wanted: Shapes) -> tuple[list[str], Arrays]:
    package, found = _safetensors(), {}
    try:
        with package.safe_open(path, framework="np") as file:
            names = sorted(file.keys())
            for name in wanted.keys() & set(names):
                stored = file.get_slice(name)
                kind, shape = stored.get_dtype(), tuple(stored.get_shape())
                _check_dtype(name, _SAFETENSORS.get(kind, kind), path)
                read = shape == wanted[name]
                found[name] = file.get_tensor(name) if read else _without_values(shape)
    except package.SafetensorError as error:
        msg = (
            f"{path} is not a .safetensors file that can be read ({error}); pass one that save() "
            "or safetensors wrote"
        )
        raise ValueError(msg) from error
    return names, found


def _encode_npz(arrays: Arrays) -> bytes:
    # NumPy would store bfloat16 as nameless pairs of bytes. As float32 every value is exact, and
    # whoever opens the file reads numbers; loading rounds back to the same bits.
    widened: Any = {
        name: a.astype(np.float32) if _rules.dtype_name(a.dtype) == "bfloat16" else a
        for name, a in arrays.items()
    }
    buffer = io.BytesIO()
    np.savez(buffer, **widened)
    return buffer.getvalue()


def _decode_npz(path: str, wanted: Shapes) -> tuple[list[str], Arrays]:
    # numpy.load would take a file that is no archive for a pickle, give raw bytes for an entry that
    # is no array, and reserve what a header claims.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {
                name: _read_npy(archive, entries[name], path, shape)
                for name, shape in wanted.items()
                if name in entries
            }
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError) as error:
        msg = (
            f"{path} is not a .npz file that can be read ({error}); pass one that save() or "
            "numpy.savez wrote"
        )
        raise ValueError(msg) from error
    return sorted(entries), found


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str, wanted: Shape) -> Any:
    """An entry of a .npz file, without its values where its shape is not the one that is wanted."""
    with archive.open(info) as file:
        first = np.lib.format.read_magic(file) == (1, 0)  # the third differs in names of fields
        read_header = getattr(np.lib.format, f"read_array_header_{1 if first else 2}_0")
        shape, _, dtype = read_header(file)
        _check_dtype(info.filename.removesuffix(".npy"), _rules.dtype_name(dtype), path)
        if shape != wanted:
            return _without_values(shape)
        file.seek(0)
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # at the end of which the sum of the bytes is checked
            msg = f"{info.filename} holds more bytes than those of its shape {shape}"
            raise ValueError(msg)
    return array


def _without_values(shape: Any) -> np.ndarray[Any, Any]:
    """An array whose shape is to be told of, and that takes no memory."""
    return np.broadcast_to(np.float32(0), shape)


def _check_dtype(name: str, dtype: str, path: str) -> None:
    if dtype == "bfloat16":
        _rules.numpy_dtype(dtype)  # says that ml_dtypes is missing, where it is
    if dtype not in _rules.ITEMSIZE:
        msg = (
            f"{name} has dtype {dtype} in {path}; "
            f"cast it to one of {', '.join(_rules.ITEMSIZE)} before it is saved"
        )
        raise TypeError(msg)


_FORMATS: dict[str, tuple[Encode, Decode]] = {
    ".safetensors": (lambda arrays: _safetensors().numpy.save(arrays), _decode_safetensors),
    ".npz": (_encode_npz, _decode_npz),
}
