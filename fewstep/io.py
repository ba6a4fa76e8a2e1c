"""Files: the one atomic write, JSON, digests, cells of tables, number types, versions of libraries. Imports no torch.

Everything that fewstep writes goes through `atomic`: a file or folder is written under a temporary name beside its place and
then takes its name. A process that is killed at any moment leaves the old content or the new one, whole, and perhaps a
leftover whose name ends in `PARTIAL`.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep._version import __version__

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
"""End of the name of what is being written, or was when its process was killed."""
REPLACED = ".replaced"
"""End of the name of an old folder in the moment before it is deleted, on file systems that cannot exchange two folders."""

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
"""Number types by their names in configs and options, and torch's names of them."""


# Atomic writes --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path, token: str | None = None) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; it takes the place of `path` only if the block ends without an exception.

    The block creates it, as a file or as a folder. The folders above `path` are created where they are missing.

    Args:
        path: file or folder to write. What is there now is replaced, whole.
        token: of several processes that write one folder together, the same name for all (`partial_path` gives the
            folder); None, the default, is a name of one's own, so that any number of processes may write to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _prune_dead(path)
    partial = partial_path(path, token or _token())
    try:
        yield partial
        _replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def partial_path(path: Path, token: str) -> Path:
    """The temporary name of `path` under a token; hidden, and with a suffix that no reader of data looks for."""
    return path.with_name(f".{path.name}.{token}{PARTIAL}")


def prune(folder: Path) -> None:
    """Delete what interrupted writes left in a folder, and restore what they replaced; not while another process writes."""
    for old in folder.glob(f".*{REPLACED}"):
        path = old.with_name(_target(old.name, REPLACED))
        if path.exists():
            remove(old)
        else:
            old.rename(path)
    for partial in [*folder.glob(f"*{PARTIAL}")]:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())[:32]


def _token() -> str:
    return f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _target(name: str, suffix: str) -> str:
    """The name of what a leftover was to become."""
    return name.removesuffix(suffix)[1:].rpartition(".")[0]


def _prune_dead(path: Path) -> None:
    """Delete or restore the leftovers of `path` whose process ran on this machine and runs no more."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_host())}-(\d+)-\w+({PARTIAL}|{REPLACED})")
    for entry in list(path.parent.iterdir()):
        if (match := pattern.fullmatch(entry.name)) and not _alive(int(match[1])):
            if match[2] == REPLACED and not path.exists():
                with suppress(OSError):  # another process was quicker
                    entry.rename(path)
            else:
                remove(entry)


def _alive(process: int) -> bool:
    if os.name == "nt":  # where a signal would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _replace(new: Path, path: Path) -> None:
    """Give `new` the name `path`; an old folder of that name is exchanged in one operation where the system can."""
    if not path.is_dir():
        os.replace(new, path)
    elif _exchange(new, path):
        remove(new)
    else:
        old = path.with_name(f".{path.name}.{_token()}{REPLACED}")
        path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
        remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one operation; False where the system or the file system cannot."""
    names = (os.fsencode(a), os.fsencode(b))
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
            return bool(library.renameat2(here, names[0], here, names[1], exchange) == 0)
        if sys.platform == "darwin":
            return bool(library.renamex_np(*names, 2) == 0)  # RENAME_SWAP of sys/stdio.h
    except (OSError, AttributeError, TypeError):
        pass
    return False


# JSON -----------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises OSError and ValueError as `open` and `json` do."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(value: object, path: Path, indent: int | None = 2) -> None:
    """Write JSON, whole or not at all."""
    write_text(json.dumps(value, indent=indent) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


# Digests --------------------------------------------------------------------------------------------------------------


def sha256(content: bytes | str, digits: int = 64) -> str:
    """The first hexadecimal digits of the SHA-256 of bytes, or of a text in UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:digits]


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def blake2b(content: bytes | str, size: int) -> bytes:
    """The BLAKE2b digest of `size` bytes, of bytes or of a text in UTF-8."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=size).digest()


def blake2b_of_parts(parts: Iterable[str], size: int) -> str:
    """Hexadecimal BLAKE2b of texts in order, each behind its length: no two lists have one digest for their boundaries."""
    whole = hashlib.blake2b(digest_size=size)
    for part in parts:
        content = part.encode()
        whole.update(len(content).to_bytes(8, "big") + content)
    return whole.hexdigest()


# Text of a value -----------------------------------------------------------------------------------------------------


def cell(value: object, digits: int | None = None, missing: str = "-") -> str:
    """A value in a table: a float with `digits` decimals, or with 4 significant digits; `missing` for None."""
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    return str(value)


# Number types and versions --------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> "torch.dtype":
    """The number type of a name of `DTYPES`."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def versions(*libraries: str) -> dict[str, str]:
    """The versions of fewstep and of installed libraries, by default those that a pipeline's folder depends on."""
    return {"fewstep": __version__} | {
        name: version(name) for name in libraries or ("torch", "diffusers", "transformers")
    }
