"""The report's page: what of a run stands in it, that it loads nothing from elsewhere, and its charts."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fewstep.cli.main import main
from fewstep.evaluate import grid, write_report
from fewstep.report.chart import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, TOP, WIDTH, Line, chart, number
from fewstep.report.runs import read_run


def row(model: str, steps: int, fid: float, **more: Any) -> dict[str, Any]:
    return {
        "model": model, "steps": steps, "guidance_scale": None, "fid": fid, "clip_score": 70.0 + steps, "images": 10,
        "seconds_per_image": 0.01 * steps, "network_evaluations": float(steps), **more,
    }  # fmt: skip


def make_run(folder: Path, fid: float = 1.0, protocol: str = "aaaa", teacher: float = 5.0) -> Path:
    (folder / "samples").mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"iteration": i, "loss": 1 / i, "student_grad_norm": 0.5} for i in range(1, 6)]
    lines += [
        {"iteration": 4, "fid": 3.0, "clip_score": 70.0, "images": 10},
        {"iteration": 5, "warning": "it <collapsed>"},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 6, "lo')
    (folder / "config.yaml").write_text("teacher: fashion\nmethod: {steps: 4}\n")
    rows = [row("student", n, fid / n, fid_patch=2.0) for n in (1, 2, 4)] + [
        row("teacher", n, teacher / n) for n in (1, 50)
    ]
    write_report(folder / "evaluation.json", {"name": "tiny <a>", "hash": protocol, "images": 10}, rows)
    picture = grid([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    for name in ("5.png", "10.png", "comparison.png"):
        picture.save(folder / "samples" / name)
    return folder


class Page(HTMLParser):
    """Every tag in its place, and whatever an attribute or the style would load."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = re.findall(r"url\(|@import", text)
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href", "srcset") and not str(v).startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_of_two_runs_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", fid=0.5)]
    main(["report", *map(str, runs), "--output", str(tmp_path / "out" / "report.html"), "--title", "A & B"])
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == [] and "script" not in page.tags
    assert page.tags.count("img") == 4  # of each run the comparison and the last grid
    assert "<h1>A &amp; B</h1>" in text and "tiny &lt;a&gt;" in text and "tiny <a>" not in text
    for heading in ("Scores", "Quality against steps", "Over the training", "Samples", "Protocol", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    # FID, FID patch, CLIP score and time against steps; FID, CLIP score, loss and gradient norm over the training.
    assert len(re.findall('<div class="card"><h3>', text)) == 8
    assert "it &lt;collapsed&gt;" in text and "must not be compared" not in text
    assert "At iteration 10" in text and "At iteration 5" not in text
    # One teacher for both, and a value of each run in the table and in a point's words.
    assert text.count("<title>teacher, steps 50: 0.1</title>") == 1 and "<title>two, steps 4: 0.125</title>" in text
    assert "<td>0.12</td>" in text and "all runs" in text


def test_figures_of_places_are_drawn_against_them(tmp_path: Path) -> None:
    """At the end, and dashed in the beginning; a run of one line has no beginning."""
    for name, count in (("long", 3), ("short", 1)):
        (tmp_path / name).mkdir()
        lines = [{"iteration": i, "loss_by_place": {"10": 4.0 / i, "2": 8.0}} for i in range(1, count + 1)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["report", str(tmp_path / "long"), str(tmp_path / "short"), "--output", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h3>loss by place</h3>" in text and 'aria-label="loss by place against place"' in text
    assert re.findall(r"<title>(.*?: .*?)</title>", text) == [
        "long, iteration 1, place 2: 8", "long, iteration 1, place 10: 4", "long, place 2: 8", "long, place 10: 1.333",
        "short, place 2: 8", "short, place 10: 4",
    ]  # fmt: skip
    assert "<li>" in text and text.count("dashed") >= 3


def test_runs_of_other_protocols_are_distinguished(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", protocol="bbbb", teacher=4.0)]
    main(["report", *map(str, runs), "--output", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "scored by different protocols: their scores must not be compared" in text
    assert (
        "<title>one: teacher, steps 50: 0.1</title>" in text and "<title>two: teacher, steps 50: 0.08</title>" in text
    )


def test_a_run_without_scores_and_a_report_without_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    write_report(tmp_path / "scores.json", {"hash": "aaaa"}, [row("mine", 1, 2.0), row("mine", 2, 1.0)])
    (run / "evaluation.json").unlink()
    main(["report", str(run), str(tmp_path / "scores.json"), "--output", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<title>scores: mine, steps 2: 1</title>" in text and "<h3>loss</h3>" in text
    assert read_run(run).rows == [] and len(read_run(run).log) == 7


def test_what_is_no_run_is_reported_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected the folder of a run"):
        main(["report", str(tmp_path)])
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(SystemExit, match="found no list of results"):
        main(["report", str(tmp_path / "x.json")])
    (tmp_path / "x.json").write_text('{"results": [{"fid": 1}]}')
    with pytest.raises(SystemExit, match="a result without a model"):
        main(["report", str(tmp_path / "x.json")])


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = [e for e in ElementTree.fromstring(svg).iter("polyline")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in e.attrib["points"].split())] for e in lines]


def test_a_chart_keeps_order_and_bounds_and_spaces_powers_of_two_evenly() -> None:
    line = Line("a", [(1, 8.0), (2, 4.0), (4, 2.0), (8, 1.0)], 1, dots=True)
    (drawn,) = points(chart([line], x_label="steps", y_label="FID", x_log2=True))
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    gaps = [b - a for a, b in pairwise(xs)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)
    assert ys == sorted(ys)  # FID falls: down the picture
    assert min(xs) >= LEFT and max(xs) <= WIDTH - RIGHT and min(ys) >= TOP and max(ys) <= HEIGHT - BOTTOM


def test_a_chart_of_a_wide_range_is_logarithmic_and_others_are_not() -> None:
    wide = chart([Line("a", [(0, 1.0), (1, 100.0), (2, 10000.0)], 1)], x_label="x", y_label="y")
    (drawn,) = points(wide)
    assert drawn[1][1] == pytest.approx((drawn[0][1] + drawn[2][1]) / 2, abs=0.2)
    ticks = [e.text for e in ElementTree.fromstring(wide).iter("text") if e.attrib["class"] == "y"]
    assert {"1", "100", "10,000"} <= set(ticks)
    (straight,) = points(chart([Line("a", [(0, -1.0), (1, 0.0), (2, 1.0)], 1)], x_label="x", y_label="y"))
    assert straight[1][1] == pytest.approx((straight[0][1] + straight[2][1]) / 2, abs=0.2)


def test_charts_of_odd_data_are_drawn_or_left_out() -> None:
    assert chart([Line("a", [(1, float("nan"))], 1)], x_label="x", y_label="y") == ""
    assert chart([], x_label="x", y_label="y") == ""
    single = chart([Line("a < b", [(3, 0.0)], 1)], x_label="x", y_label="y")
    circles = list(ElementTree.fromstring(single).iter("circle"))
    assert len(circles) == 1 and LEFT < float(circles[0].attrib["cx"]) < WIDTH
    (flat,) = points(chart([Line("a", [(0, 5.0), (1, 5.0)], 1)], x_label="x", y_label="y"))
    assert flat[0][1] == flat[1][1]
    (long,) = points(chart([Line("a", [(i, 1.0) for i in range(10 * POINTS)], 1)], x_label="x", y_label="y"))
    assert len(long) == POINTS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (8.0, "8"), (0.0123456, "0.01235"), (1200.4, "1,200"), (1.5e-7, "1.5e-07"), (-2.5, "-2.5")],
)
def test_numbers_in_words(value: float, text: str) -> None:
    assert number(value) == text
