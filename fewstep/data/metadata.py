"""Captions and labels of image folders."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fewstep.errors import FewstepError, MissingError


def class_labels(names: list[str], num_labels: int, path: Path) -> list[int]:
    """Each name's place among the sorted names. Raises ValueError unless there are num_labels of them."""
    classes = sorted(set(names))
    if len(classes) != num_labels:
        raise FewstepError("data.num_labels", num_labels, f"{len(classes)}, the folders with images in {path}")
    number = {name: i for i, name in enumerate(classes)}
    return [number[n] for n in names]


METADATA = ("metadata.jsonl", "metadata.csv")


def find_metadata(folder: Path) -> Path | None:
    """The captions of an image folder, if there are any.

    Raises ValueError for two such files, and for one that lies deeper: its captions would silently go unread.
    """
    here = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(here) > 1:
        raise FewstepError("data.path", f"both {' and '.join(METADATA)} in {folder}", "one of them")
    deeper = next((f for name in METADATA for f in sorted(folder.rglob(name))), None)
    if not here and deeper:
        raise FewstepError(
            "data.path", f"captions in {deeper}", f"captions in {folder} itself", f"Set data.path to {deeper.parent}"
        )
    return here[0] if here else None


def read_metadata(metadata: Path) -> tuple[list[Path], list[str]]:
    """Images and captions of a metadata.jsonl or metadata.csv: file_name and text, which is "" where it is missing."""
    files, captions, names = [], [], set[str]()
    for line, row in _csv(metadata) if metadata.suffix == ".csv" else _jsonl(metadata):
        where = f"{metadata}, line {line}"
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise FewstepError(
                where, ", ".join(row), "file_name" if "file_name" not in row else "a file_name that is text"
            )
        file = metadata.parent / name
        if not file.is_file():
            raise MissingError(where, f"image {file}, which does not exist", "a file in the folder")
        files.append(file)
        captions.append(str(row.get("text") or ""))
        names |= row.keys()
    if others := sorted(names - {"file_name"}) if "text" not in names else []:
        raise FewstepError(str(metadata), ", ".join(others), "text, which holds the captions", "Rename one")
    return files, captions


def _jsonl(metadata: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(_text(metadata).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise FewstepError(f"{metadata}, line {number}", repr(line[:80]), "a JSON object with file_name and text")
        yield number, row


def _csv(metadata: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    rows = csv.DictReader(io.StringIO(_text(metadata), newline=""), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error(f"not {len(rows.fieldnames or [])} columns (a text with a comma needs quotes)")
            yield rows.line_num, row
    except csv.Error as e:
        raise FewstepError(f"{metadata}, line {rows.line_num}", e, "CSV") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FewstepError("data.path", f"{path}, which cannot be read ({e})", "text in UTF-8") from None
