"""The model card of an exported pipeline: what it is, the exact call, and its scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep import io

BEGIN, END = "<!-- scores -->", "<!-- /scores -->"
COLUMNS = ("model", "steps", "guidance_scale", "fid", "clip_score", "images")
KNOWN = ("method", "paper", "teacher", "data", "license", "prompt", "scores", "versions")


def render(
    card: Mapping[str, Any],
    *,
    allowed_steps: Sequence[int],
    guidance: str,
    arguments: Sequence[Any],
    dtype: str,
    timesteps: str,
    options: Mapping[str, Any] | None = None,
    refuses: bool = True,
) -> str:
    """The text of README.md.

    card: method, paper, teacher, data, license, scores (rows), versions; every other entry becomes a detail.
    refuses: whether more steps than the largest count raise.
    arguments, options: what the pipeline's call is given beside num_inference_steps. guidance: one paragraph.
    timesteps: what `timesteps_text` says.
    """
    method, teacher = card.get("method", "distillation"), str(card.get("teacher", "unknown"))
    if Path(teacher).is_dir():
        teacher = Path(teacher).resolve().name  # where it lies on this machine concerns no reader
    tag = "text-to-image" if arguments and isinstance(arguments[0], str) else "unconditional-image-generation"
    front = {
        "license": card.get("license", "other"),
        "library_name": "diffusers",
        "base_model": teacher,
        "pipeline_tag": tag,
        "tags": ["diffusers", "few-step", "distillation", str(method)],
    }
    details = {"Method": method, "Paper": card.get("paper"), "Teacher": teacher, "Data": card.get("data")}
    details |= {key.replace("_", " "): value for key, value in card.items() if key not in KNOWN}
    counts, most = ", ".join(str(n) for n in allowed_steps), max(allowed_steps)
    others = f"more than {most} raise an error" if refuses else "others run without an error and draw badly"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# Few-step student of {teacher}",
            "",
            f"Run in the folder of this card, with plain diffusers and {'no other option' if not options else 'as here'}:",
            "",
            "```python",
            call_text(arguments, allowed_steps, dtype, options),
            "```",
            "",
            f"`num_inference_steps`: {counts}. The student was trained for these counts; {others}. Each step is one "
            "evaluation of the network.",
            "",
            guidance,
            "",
            *[f"- {key}: {value}" for key, value in details.items() if value is not None],
            f"- Weights: {io.DTYPES[dtype]}",
            f"- Versions: {', '.join(f'{name} {number}' for name, number in card.get('versions', io.versions()).items())}",
            "",
            timesteps,
            "",
            "## Scores",
            "",
            scores_text(card.get("scores") or []),
            "",
        ]
    )


def call_text(
    arguments: Sequence[Any], allowed_steps: Sequence[int], dtype: str, options: Mapping[str, Any] | None = None
) -> str:
    """The card's code: loads "." and calls it with a step count and, where its class cannot do without, options."""
    lines = ["from diffusers import DiffusionPipeline"]
    given = ""
    if dtype != "fp32":
        lines.insert(0, "import torch")
        given = f", dtype=torch.{io.DTYPES[dtype]}"
    steps = 4 if 4 in allowed_steps else max(allowed_steps)
    inputs = "".join(f"{argument!r}, " for argument in arguments)
    more = "".join(f", {key}={value!r}" for key, value in (options or {}).items())
    return "\n".join(
        [
            *lines,
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("."{given})',
            f"image = pipeline({inputs}num_inference_steps={steps}{more}).images[0]",
        ]
    )


def timesteps_text(scheduler: Any, run: Mapping[int, Sequence[float]]) -> str:
    """A Markdown table of the timesteps that the stock scheduler ran, by step count, under what its grid comes from."""
    own = scheduler.config.get("original_inference_steps")
    grid = "" if own is None else f" with `original_inference_steps` {own}"
    rows = [f"| {count} | {', '.join(f'{t:.6g}' for t in told)} |" for count, told in run.items()]
    return "\n".join(
        [
            f"`{type(scheduler).__name__}`{grid} runs",
            "",
            "| `num_inference_steps` | timesteps |",
            "| --- | --- |",
            *rows,
        ]
    )


def scores_text(rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any] | None = None) -> str:
    """A Markdown table of the rows of evaluation.json between two marks, by which `update_card` finds it again."""
    if not rows:
        return f"{BEGIN}\nNot scored yet.\n{END}"
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    if protocol:
        lines += ["", "Protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()) + "."]
    return "\n".join([BEGIN, *lines, END])


def update_card(path: Path, scores: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any] | None = None) -> None:
    """Rewrite the scores in the card of the pipeline at `path`. Raises ValueError for a card without their marks."""
    readme = path / "README.md"
    head, begin, rest = readme.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme} has no {BEGIN} ... {END} in which to write scores")
    io.write_text(head + scores_text(scores, protocol) + tail, readme)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
