"""The log, scores, pictures and settings of a run, as `fewstep report` reads them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from fewstep import io
from fewstep.errors import FewstepError
from fewstep.evaluate.report import Row


@dataclass(frozen=True)
class Run:
    """The content of a run's folder, or of one report of scores."""

    name: str
    log: Sequence[Row]
    warnings: Sequence[str]
    protocol: Row
    rows: Sequence[Row]
    pictures: Sequence[tuple[str, Path]]
    config: Row

    @property
    def students(self) -> list[Row]:
        return [row for row in self.rows if row["model"] != "teacher"]

    @property
    def teachers(self) -> list[Row]:
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
        raise FewstepError(
            "RUN", repr(str(path)), "the folder of a run (log.jsonl, evaluation.json, samples/) or a report of scores"
        )
    config: object = {}
    if (path / "config.yaml").is_file():
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise FewstepError(str(path / "config.yaml"), f"a file that cannot be read ({e})", "YAML") from None
    rows = _rows(report, path / "evaluation.json") if report else []
    name = path.resolve().name
    return Run(
        name, log, warnings, report.get("protocol", {}), rows, pictures, config if isinstance(config, dict) else {}
    )


def _json(file: Path) -> Row:
    try:
        found = io.read_json(file)
    except (OSError, ValueError) as e:
        raise FewstepError(str(file), f"a file that cannot be read ({e})", "a report of scores") from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), list):
        raise FewstepError(str(file), "no list of results", "a report of scores")
    return found


def _rows(report: Row, file: Path) -> list[Row]:
    rows: list[Row] = report["results"]
    if not all(isinstance(row, dict) and "model" in row for row in rows):
        raise FewstepError(str(file), "a result without a model", "a report of scores")
    return rows


def _log(file: Path) -> tuple[list[Row], list[str]]:
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
    found = [("After training, teacher and student from the same initial noise", folder / "comparison.png")]
    during = sorted((f for f in folder.glob("*.png") if f.stem.isdigit()), key=lambda f: int(f.stem))
    found += [(f"At iteration {int(f.stem):,}", f) for f in during[-1:]]
    return [(caption, file) for caption, file in found if file.is_file()]
