"""What `fewstep report` reads of a run: its log, scores, pictures and settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Run:
    """What stands in a run's folder, or in one report of scores."""

    name: str
    log: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    protocol: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[tuple[str, Path]]
    config: Mapping[str, Any]

    @property
    def students(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["model"] != "teacher"]

    @property
    def teachers(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["model"] == "teacher"]


def read_run(path: Path) -> Run:
    """A run's folder (log.jsonl, evaluation.json, samples/, config.yaml: what there is of them), or an evaluation.json.

    Raises ValueError for a path that has none of them, and for one that cannot be read.
    """
    if path.is_file():
        report = _json(path)
        return Run(path.stem, [], [], report.get("protocol", {}), _rows(report, path), [], {})
    log, warnings = _log(path / "log.jsonl")
    report = _json(path / "evaluation.json") if (path / "evaluation.json").is_file() else {}
    pictures = _pictures(path / "samples")
    if not (log or report or pictures):
        raise ValueError(
            f"{path} is neither the folder of a run (log.jsonl, evaluation.json, samples/) nor a report of scores"
        )
    config: Any = {}
    if (path / "config.yaml").is_file():
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ValueError(f"{path / 'config.yaml'} cannot be read: {e}") from None
    rows = _rows(report, path / "evaluation.json") if report else []
    name = path.resolve().name
    return Run(
        name, log, warnings, report.get("protocol", {}), rows, pictures, config if isinstance(config, dict) else {}
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{file} cannot be read as a report of scores: {e}") from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), list):
        raise ValueError(f"{file} is not a report of scores: it has no list of results")
    return found


def _rows(report: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = report["results"]
    if not all(isinstance(row, dict) and "model" in row for row in rows):
        raise ValueError(f"{file} is not a report of scores: a result without a model")
    return rows


def _log(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not file.is_file():
        return [], []
    records, warnings = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a run that was killed in the middle of a line
        if isinstance(record, dict) and "iteration" in record:
            if "warning" in record:
                warnings.append(f"iteration {record['iteration']:,}: {record['warning']}")
            records.append(record)
    return records, warnings


def _pictures(folder: Path) -> list[tuple[str, Path]]:
    """The comparison after training, and the last grid during it."""
    found = [("After training, teacher and student from the same noises", folder / "comparison.png")]
    during = sorted((f for f in folder.glob("*.png") if f.stem.isdigit()), key=lambda f: int(f.stem))
    found += [(f"At iteration {int(f.stem):,}", f) for f in during[-1:]]
    return [(caption, file) for caption, file in found if file.is_file()]
