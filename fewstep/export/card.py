"""The model card of an exported folder: front matter, the exact call, details and scores. Its text is in templates/."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import yaml

from fewstep import io
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

BEGIN, END = "<!-- scores -->", "<!-- /scores -->"
COLUMNS = ("model", "steps", "guidance_scale", "fid", "clip_score", "images")
KNOWN = ("method", "paper", "teacher", "data", "license", "prompt", "scores", "versions")

Card = Mapping[str, object]
"""method, paper, teacher, data, license, prompt, scores (rows), versions; every other entry becomes a detail."""
Scored = Mapping[str, object]
"""A row of evaluation.json."""


@dataclass(frozen=True)
class Call:
    """The call of an exported pipeline, beside its step count.

    Attributes:
        steps: counts that were trained.
        arguments: by position: a prompt, or nothing.
        options: by name: a label, and the guidance scale that its class needs.
    """

    steps: Sequence[int]
    arguments: Sequence[object] = ()
    options: Mapping[str, object] | None = None

    def text(self) -> str:
        """The arguments of the card's example, as Python."""
        steps = 4 if 4 in self.steps else max(self.steps)
        inputs = "".join(f"{argument!r}, " for argument in self.arguments)
        options = "".join(f", {key}={value!r}" for key, value in (self.options or {}).items())
        return f"{inputs}num_inference_steps={steps}{options}"


def filled(template: str, **values: object) -> str:
    """The content of templates/<template>.md with its $names replaced, without the last line feed."""
    text = (Path(__file__).parent / "templates" / f"{template}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values).removesuffix("\n")


def render(card: Card, call: Call, *, guidance: str, dtype: str, timesteps: str, refuses: bool = True) -> str:
    """The text of README.md of a pipeline.

    refuses: whether more steps than the largest count raise. guidance: one paragraph. timesteps: of `timesteps_text`.
    """
    method, teacher = card.get("method", "distillation"), teacher_name(card)
    text_to_image = bool(call.arguments) and isinstance(call.arguments[0], str)
    front = {
        "license": card.get("license", "other"),
        "library_name": "diffusers",
        "base_model": teacher,
        "pipeline_tag": "text-to-image" if text_to_image else "unconditional-image-generation",
        "tags": ["diffusers", "few-step", "distillation", str(method)],
    }
    details = {"Method": method, "Paper": card.get("paper"), "Teacher": teacher, "Data": card.get("data")}
    details |= {key.replace("_", " "): value for key, value in card.items() if key not in KNOWN}
    versions, rows = card.get("versions", io.versions()), card.get("scores") or []
    assert isinstance(versions, Mapping) and isinstance(rows, Sequence)
    text = filled(
        "pipeline",
        front=front_matter(front),
        teacher=teacher,
        options="as here" if call.options else "no other option",
        code=filled("pipeline_code", call=call.text(), **dtype_words(None if dtype == "fp32" else io.DTYPES[dtype])),
        counts=", ".join(str(n) for n in call.steps),
        others=(
            f"more than {max(call.steps)} raise an error" if refuses else "others run without an error and draw badly"
        ),
        guidance=guidance,
        details="\n".join(f"- {key}: {value}" for key, value in details.items() if value is not None),
        weights=io.DTYPES[dtype],
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        timesteps=timesteps,
        scores=scores_text(rows),
    )
    return text + "\n"


def teacher_name(card: Card) -> str:
    """The teacher as the card's reader knows it: of a folder on this machine, the last part."""
    teacher = str(card.get("teacher", "unknown"))
    return Path(teacher).resolve().name if Path(teacher).is_dir() else teacher


def front_matter(values: Mapping[str, object]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False).strip()


def dtype_words(torch_name: str | None) -> dict[str, str]:
    """`torch` and `dtype` of the code templates; None, for float32, needs neither."""
    if torch_name is None:
        return {"torch": "", "dtype": ""}
    return {"torch": "import torch\n", "dtype": f", dtype=torch.{torch_name}"}


def timesteps_text(scheduler: "SchedulerMixin", run: Mapping[int, Sequence[float]]) -> str:
    """A Markdown table of the timesteps that the stock scheduler ran, by step count, under the source of its grid."""
    original = scheduler.config.get("original_inference_steps")
    grid = "" if original is None else f" with `original_inference_steps` {original}"
    rows = [f"| {count} | {', '.join(f'{t:.6g}' for t in timesteps)} |" for count, timesteps in run.items()]
    head = [f"`{type(scheduler).__name__}`{grid} runs", "", "| `num_inference_steps` | timesteps |", "| --- | --- |"]
    return "\n".join([*head, *rows])


def scores_text(rows: Sequence[Scored], protocol: Mapping[str, object] | None = None) -> str:
    """A Markdown table of the rows of evaluation.json between two marks, by which `update_card` finds it again."""
    if not rows:
        return f"{BEGIN}\nNot scored yet.\n{END}"
    columns = [c for c in COLUMNS if any(row.get(c) is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(io.cell(row.get(c), missing="") for c in columns) + " |" for row in rows]
    if protocol:
        lines += ["", "Protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()) + "."]
    return "\n".join([BEGIN, *lines, END])


def update_card(path: Path, scores: Sequence[Scored], protocol: Mapping[str, object] | None = None) -> None:
    """Rewrite the scores in the card of the pipeline at `path`. Raises FewstepError for a card without their marks."""
    readme = path / "README.md"
    head, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise FewstepError(str(readme), "no place for scores", f"a card with {BEGIN} ... {END}")
    io.write_text(head + scores_text(scores, protocol) + tail, readme)
