"""Files of prompts."""

import json
from pathlib import Path

from fewstep.errors import FewstepError, MissingError


def read_prompts(file: Path, key: str = "prompts") -> list[str]:
    """Read the prompts of a .jsonl (a string or {"prompt": string} a line, which may be empty) or of a text, one a line.

    Only a line feed ends a line: other separators of Unicode may be part of a prompt. Blank lines are skipped.

    Raises FewstepError, naming `key`, for a file that is missing, no text, no JSON, or without a prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise MissingError(key, repr(str(file)), "a text file with one prompt a line, or a .jsonl") from None
    except (OSError, UnicodeDecodeError) as e:
        raise FewstepError(key, f"{str(file)!r}, which cannot be read ({e})", "a text file in UTF-8") from None
    stripped = [(number, line.strip(" \t\r")) for number, line in enumerate(lines, 1)]
    if file.suffix == ".jsonl":
        prompts = [_json_prompt(line, f"{key}, {file}, line {number}") for number, line in stripped if line]
    else:
        prompts = [line for _, line in stripped if line]
    if not prompts:
        raise FewstepError(key, f"no prompt in {str(file)!r}", "one prompt a line")
    return prompts


def _json_prompt(line: str, where: str) -> str:
    expected = 'a string or {"prompt": string}'
    try:
        value: object = json.loads(line)
    except ValueError:
        raise FewstepError(where, f"{line[:80]!r}, which is not JSON", expected) from None
    if isinstance(value, dict):
        value = value.get("prompt")
    if not isinstance(value, str):
        raise FewstepError(where, repr(line[:80]), expected)
    return value
