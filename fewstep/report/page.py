"""`fewstep report`: one HTML page of runs, which loads nothing from elsewhere: scores, curves, samples, protocol."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from fewstep import io
from fewstep._version import __version__
from fewstep.evaluate.report import Row
from fewstep.evaluate.tables import COLUMNS, score_columns
from fewstep.report.chart import Line, chart
from fewstep.report.runs import Run, read_run

SLOTS = 6
"""Colours of the page beside the teacher's."""

SPEED = ("images_per_second", "peak_memory_gib")
NO_CURVE = ("iteration", "images", "warning", "time")


def write_page(paths: Sequence[Path], output: Path, title: str | None = None) -> None:
    """Write the page. Raises FewstepError for a path that is no run."""
    runs = _distinct([read_run(path) for path in paths])
    text = page(runs, title or ", ".join(run.name for run in runs))
    io.write_text(text, output)


def _distinct(runs: list[Run]) -> list[Run]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=f"{i}. {run.name}") for i, run in enumerate(runs, 1)]


def page(runs: Sequence[Run], title: str) -> str:
    """The whole HTML document."""
    sections = [
        ("Scores", _scores(runs)),
        ("Quality against steps", _against_steps(runs)),
        ("Over the training", _over_training(runs)),
        ("Samples", "".join(_samples(run) for run in runs)),
        ("Protocol", _protocols(runs)),
        ("Settings", _settings(runs)),
    ]
    body = "".join(f"<section><h2>{heading}</h2>{text}</section>" for heading, text in sections if text)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body>"
        f"<h1>{escape(title)}</h1>{_warnings(runs)}{body}"
        f"<footer>fewstep {__version__}</footer></body></html>\n"
    )


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def _warnings(runs: Sequence[Run]) -> str:
    found = []
    hashes = {run.protocol.get("hash") for run in runs if run.rows}
    if len(hashes) > 1:
        found.append("These runs were scored by different protocols: their scores must not be compared.")
    for run in runs:
        found += [f"{run.name}, {warning}" for warning in run.warnings[:5]]
        if len(run.warnings) > 5:
            found.append(f"{run.name}: and {len(run.warnings) - 5} warnings more in its log.jsonl")
    return "".join(f'<p class="warning">{escape(w)}</p>' for w in found)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _cell(value: object, digits: int | None = None) -> str:
    return io.cell(value, digits, missing="–")


def _scores(runs: Sequence[Run]) -> str:
    rows = [(run, row) for run in runs for row in run.rows]
    if not rows:
        return ""
    figures = score_columns([dict(row) for _, row in rows])
    head = ["run", "model", "steps", "guidance", "evaluations", *(heading for _, heading, _ in figures), "images"]
    lines = [
        [
            run.name,
            str(row["model"]),
            _cell(row.get("steps")),
            "default" if row.get("guidance_scale") is None else f"{row['guidance_scale']:g}",
            _cell(row.get("network_evaluations")),
            *(_cell(row.get(key), digits) for key, _, digits in figures),
            _cell(row.get("images")),
        ]
        for run, row in rows
    ]
    return _table(head, lines)


def _slot(i: int) -> int:
    return 1 + i % SLOTS


def _legend(lines: Sequence[Line]) -> str:
    """The legend of lines in several charts; those of one name once."""
    seen = {line.name: line for line in lines}
    if len(seen) < 2:
        return ""
    items = []
    for name, line in seen.items():
        style = f"s{line.slot}" + (" dashed" if line.dashed else "")
        mark = f'<svg viewBox="0 0 26 10" aria-hidden="true"><polyline class="{style}" points="1,5 25,5"/></svg>'
        items.append(f"<li>{mark}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _card(heading: str, svg: str) -> str:
    return f'<div class="card"><h3>{escape(heading)}</h3>{svg}</div>' if svg else ""


def _against_steps(runs: Sequence[Run]) -> str:
    keys = [key for key in _score_keys(runs) if key not in ("peak_memory_gib",)]
    cards, legend = [], list[Line]()
    for key, heading in [(k, h) for k, h in _headings(runs) if k in keys]:
        lines = _step_lines(runs, key)
        if any(len(line.points) > 1 for line in lines):
            cards.append(_card(heading, chart(lines, x_label="steps", y_label=heading, x_log2=True)))
            legend += lines
    return _legend(legend) + f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _score_keys(runs: Sequence[Run]) -> list[str]:
    return [key for key, _, _ in score_columns([dict(row) for run in runs for row in run.rows])]


def _headings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    names = {"seconds_per_image": "seconds per image"}
    columns = score_columns([dict(row) for run in runs for row in run.rows])
    return [(key, names.get(key, heading)) for key, heading, _ in columns]


def _one_teacher(runs: Sequence[Run]) -> bool:
    """Whether all runs that scored a teacher found the same of it, but for time and memory, which no two runs share."""
    drop = ("seconds_per_image", "peak_memory_gib")
    found = [[{k: v for k, v in row.items() if k not in drop} for row in run.teachers] for run in runs if run.teachers]
    return all(rows == found[0] for rows in found)


def _step_lines(runs: Sequence[Run], key: str) -> list[Line]:
    lines: list[Line] = []
    one = _one_teacher(runs)
    for i, run in enumerate(runs):
        if points := _points(run.teachers, key):
            name = "teacher" if one else f"{run.name}: teacher"
            if name not in [line.name for line in lines]:
                lines.append(Line(name, points, 0 if one else _slot(i), dashed=True, dots=True))
        for model in dict.fromkeys(str(row["model"]) for row in run.students):
            points = _points([row for row in run.students if str(row["model"]) == model], key)
            if points:
                lines.append(Line(_student_name(runs, run, model), points, _slot(i), dots=True))
    return lines


def _student_name(runs: Sequence[Run], run: Run, model: str) -> str:
    if len(runs) == 1:
        return model
    return run.name if model == "student" else f"{run.name}: {model}"


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    found = [(float(r["steps"]), float(r[key])) for r in rows if r.get("steps") and r.get(key) is not None]
    return sorted(found)


def _over_training(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for record in run.log for key in record if key not in NO_CURVE))
    scores = [key for key in keys if key in COLUMNS and key not in SPEED]
    norms = [key for key in keys if key.endswith("_grad_norm")]
    speed = [key for key in keys if key in SPEED]
    rest = [key for key in keys if key not in {*scores, *norms, *speed}]
    legend: list[Line] = []
    parts = []
    for heading, group in (
        ("Scores on few samples", scores),
        ("Losses and health", rest),
        ("Gradients and speed", norms + speed),
    ):
        cards = []
        for key in group:
            lines, x_label = _log_lines(runs, key), "iteration"
            name = COLUMNS[key][0] if key in COLUMNS and key not in SPEED else key.replace("_", " ")
            if not lines:  # figures of several places, such as loss_by_sub_step
                lines, x_label = _place_lines(runs, key), name.rpartition(" by ")[2]
            cards.append(_card(name, chart(lines, x_label=x_label, y_label=name)))
            legend += lines
        if any(cards):
            parts.append(f'<p>{heading}</p><div class="cards">{"".join(cards)}</div><br>')
    return _legend(legend) + "".join(parts) if parts else ""


def _log_lines(runs: Sequence[Run], key: str) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        points = [
            (float(r["iteration"]), float(r[key]))
            for r in run.log
            if isinstance(r.get(key), int | float) and not isinstance(r[key], bool)
        ]
        if points:
            lines.append(Line(run.name, points, _slot(i), dots=len(points) <= 12))
    return lines


def _place_lines(runs: Sequence[Run], key: str) -> list[Line]:
    """Lines of figures against their places, for each run at its end and, dashed, in the beginning."""
    lines = []
    for i, run in enumerate(runs):
        records = [r for r in run.log if isinstance(r.get(key), Mapping)]
        for record in records[:1] * (len(records) > 1) + records[-1:]:
            last = record is records[-1]
            name = run.name if last else f"{run.name}, iteration {record['iteration']:,}"
            points = sorted((float(place), float(value)) for place, value in record[key].items())
            lines.append(Line(name, points, _slot(i), dashed=not last, dots=len(points) <= 12))
    return lines


def _samples(run: Run) -> str:
    figures = []
    for caption, file in run.pictures:
        data = base64.b64encode(file.read_bytes()).decode()
        words = f"{run.name}. {caption}"
        image = f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'
        figures.append(
            f'<figure class="card"><figcaption>{escape(words)}</figcaption><div class="scroll">{image}</div></figure>'
        )
    return "".join(figures)


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    words = "–" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
    return {prefix.rstrip("."): words}


def _by_run(runs: Sequence[Run], values: Sequence[Mapping[str, str]]) -> str:
    """A row a key, a column a run; one column where all runs agree in everything."""
    keys = list(dict.fromkeys(key for some in values for key in some))
    if not keys:
        return ""
    if all(some == values[0] for some in values):
        return _table(["", "all runs" if len(runs) > 1 else runs[0].name], [[k, values[0][k]] for k in keys], "words")
    rows = [[key, *(some.get(key, "–") for some in values)] for key in keys]
    return _table(["", *(run.name for run in runs)], rows, "words")


def _protocols(runs: Sequence[Run]) -> str:
    scored = [run for run in runs if run.protocol]
    return _by_run(scored, [_flat(run.protocol) for run in scored]) if scored else ""


def _settings(runs: Sequence[Run]) -> str:
    known = [run for run in runs if run.config]
    return _by_run(known, [_flat(run.config) for run in known]) if known else ""
