"""safetensors files: mapped into memory and read in place, inspected by their headers, written.

A file has 8 bytes with the length of the header (little-endian), the header (JSON), and the data of
all tensors without gaps. The NumPy loader of the library fails on float8; here, `ml_dtypes` has the
types that NumPy lacks.
"""

import errno
import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from engram_jax.errors import InputError
from engram_jax.files import atomic_write, is_irregular, read_regular
from engram_jax.formats.json_config import MOST_BYTES

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        **{"BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16},
        **{"U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64},
        **{"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": ml_dtypes.bfloat16},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
        **{"F8_E8M0": ml_dtypes.float8_e8m0fnu},
    }.items()
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_OTHERS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # bits; not read here
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | _OTHERS
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 25_000_000  # bytes; a tensor needs about 150
_MAX_DIMENSIONS = 8
_ALIGNMENT = 64  # bytes; JAX on a CPU uses aligned arrays without a copy


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description in the header of its file.

    Attributes:
        dtype: name of the type, such as "F8_E4M3".
        shape: its shape.
        file: path of the file.
        start: byte of the file where its data begins.
        stop: byte of the file after its data.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Parts:
    """A tensor to write that is not in memory as a whole.

    Attributes:
        dtype: its type.
        shape: its shape.
        parts: arrays whose concatenation is the tensor.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of one file, or of all files of an index.

    Attributes:
        infos: descriptions by name.
        metadata: text that the headers contain.
    """

    infos: dict[str, TensorInfo]
    metadata: dict[str, str]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Tensors":
        """Reads the headers of a file, or of a folder with an index or `model.safetensors`.

        It does not read data. Files are mapped by the first `view`.

        Raises:
            InputError: a file is missing or not a valid safetensors file, or the index does not
                match the files.
        """
        path = Path(path)
        if path.is_dir():
            path = path / (INDEX if (path / INDEX).exists() else SINGLE)
        if path.suffix != ".json":
            return cls(*read_header(path))
        infos: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        files = _read_index(path)
        for name in sorted(set(files.values())):
            of_file, text = read_header(path.parent / name)
            infos |= {key: of_file[key] for key in of_file if files.get(key) == name}
            metadata |= text
        if missing := sorted(set(files) - set(infos)):
            raise InputError(
                f"{path} lists {missing[0]} in {files[missing[0]]}, which does not contain it; "
                "download both again."
            )
        return cls(infos, metadata)

    def require(self, name: str, shape: tuple[int, ...], *dtypes: str) -> TensorInfo:
        """The description of a tensor that must have this shape and one of these types.

        Raises:
            InputError: it is missing, or has another shape or type.
        """
        if name not in self.infos:
            raise InputError(f"The checkpoint has no tensor {name}; it is of another format.")
        info = self.infos[name]
        if info.shape != shape or info.dtype not in dtypes:
            raise InputError(
                f"Tensor {name} in {info.file} is {info.dtype} {list(info.shape)}, expected "
                f"{' or '.join(dtypes)} {list(shape)}; it does not fit its configuration."
            )
        return info

    def view(self, name: str, *, random: bool = False) -> np.ndarray:
        """A tensor as a read-only array on the mapped bytes of its file.

        Args:
            name: name of the tensor.
            random: it will be read at random rows, so the system should not read ahead.

        Raises:
            InputError: it has a type of which this project reads no tensors, or its file is gone
                or shorter than before.
        """
        info = self.infos[name]
        if info.dtype not in DTYPES:
            raise InputError(f"Tensor {name!r} in {info.file} is {info.dtype}, which is not read.")
        if info.file not in self._maps:
            with _invalid(info.file), info.file.open("rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped, count = self._maps[info.file], math.prod(info.shape)
        if len(mapped) < info.stop:
            raise InputError(
                f"{info.file} was truncated while it was read; export or download it again."
            )
        if random and info.stop > info.start and hasattr(mmap, "MADV_RANDOM"):
            page = info.start - info.start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_RANDOM, page, info.stop - page)
        flat = np.frombuffer(mapped, DTYPES[info.dtype], count, min(info.start, len(mapped) - 1))
        return flat.reshape(info.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The descriptions of a file's tensors, by name, and its metadata. It does not read data.

    Raises:
        InputError: the file is missing, or its header is invalid or does not fit its size.
    """
    with _invalid(path):
        if is_irregular(path):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"it has {size:,} bytes, and its header would have {length:,}")
            text = file.read(length)
        if text[:1] != b"{":
            raise ValueError("its header is not an object")
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats)
        metadata = _text_only(header.pop("__metadata__", {}))
        infos = {name: _describe(name, entry, path, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != end:
                raise ValueError(
                    f"tensor {name[:60]!r} begins at byte {info.start:,}, expected {end:,}"
                )
            end = info.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, and the file has {size:,}")
    return infos, metadata


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray | Parts],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, atomically. Equal arguments give equal bytes.

    The header is padded so that the data begins at a multiple of 64 bytes. Tensors of larger
    elements come first, so that all are aligned to their elements.
    """
    sources = {
        name: tensor if isinstance(tensor, Parts) else Parts(tensor.dtype, tensor.shape, [tensor])
        for name, tensor in tensors.items()
    }
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))}
    start = 0
    for name in order:
        dtype, shape = sources[name].dtype, sources[name].shape
        stop = start + math.prod(shape) * dtype.itemsize
        offsets = [start, stop]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            before = file.tell()
            for part in sources[name].parts:
                file.write(np.ascontiguousarray(part, sources[name].dtype).view(np.uint8).data)
            offsets = header[name]["data_offsets"]
            if file.tell() - before != offsets[1] - offsets[0]:
                raise ValueError(f"the parts of {name} do not have the announced shape")


def _read_index(path: Path) -> dict[str, str]:
    """The name of the file of every tensor, from an index."""
    with _invalid(path):
        files = _text_only(json.loads(read_regular(path, MOST_BYTES))["weight_map"])
        for name in files.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names a file {name[:60]!r}")
    return files


def _describe(name: str, entry: Any, path: Path, begin: int) -> TensorInfo:
    """Checks a tensor's entry in a header whose data begins at byte `begin`."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    name = repr(name[:60])
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name} has the unknown type {str(dtype)[:60]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has no shape or range, or too many dimensions")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"tensor {name} has the shape {shape} and the range {offsets}")
    start, stop = offsets
    if 8 * (stop - start) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name} is {dtype} {shape} in {stop - start:,} bytes")
    return TensorInfo(dtype, tuple(shape), path, begin + start, begin + stop)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = (Counter(name for name, _ in pairs) - Counter(list(found))).items()
        raise ValueError(f"{twice[:60]!r} occurs twice")
    return found


def _text_only(entries: Any) -> dict[str, str]:
    if not isinstance(entries, dict) or any(not isinstance(v, str) for v in entries.values()):
        raise ValueError(f"{str(entries)[:60]} is not an object of texts")
    return entries


@contextmanager
def _invalid(path: Path) -> Iterator[None]:
    """Gives errors of reading a header as one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"Cannot read {path} ({error.strerror}); give a safetensors file, or the folder of a "
            "checkpoint."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is not a valid safetensors file or index ({what}); export or download it "
            "again."
        ) from error
