"""A student's adapters as files for the teacher's own pipeline: diffusers' layout, and kohya's, which ComfyUI reads.

They are loaded by a stranger and compared with the student in memory before they count as written, as pipelines are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from fewstep.export.card import timesteps_text
from fewstep.export.pipeline import (
    LIVE_GUIDANCE,
    TOLERANCES,
    arguments_of,
    compare,
    draw,
    options_of,
    own_copies,
    refuses,
    scale_text,
    timesteps_of,
    tolerance_of,
)
from fewstep.export.verify import ExportError, ask_stranger
from fewstep.io import DTYPES, atomic, torch_dtype
from fewstep.teachers import Denoiser, Teacher
from fewstep.teachers.denoiser import Scale, own_tensors
from fewstep.teachers.lora import NAME, adapters

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

FILE = "pytorch_lora_weights.safetensors"
"""The name by which diffusers finds adapters in a folder."""
KOHYA_FILE = "kohya_lora.safetensors"

ROUNDING = 10
"""How much more than a reloaded pipeline adapters may differ: beside a weight they round otherwise than merged into it."""


@dataclass(frozen=True)
class Update:
    """What a student has beyond its teacher, by names of modules: alpha / rank up @ down, and what is added to biases."""

    rank: int
    alpha: float
    down: dict[str, Tensor]
    up: dict[str, Tensor]
    shift: dict[str, Tensor]

    def diffusers(self, part: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file in diffusers' layout; part: "unet" or "transformer"."""
        tensors = {f"{part}.{name}.lora_A.weight": v for name, v in self.down.items()}
        tensors |= {f"{part}.{name}.lora_B.weight": v for name, v in self.up.items()}
        if self.shift:
            # One switch for all modules; and the bias, too, counts alpha / rank.
            for name, up in self.up.items():
                shift = self.shift.get(name, torch.zeros(up.shape[0]))
                tensors[f"{part}.{name}.lora_B.bias"] = shift * (self.rank / self.alpha)
        settings = {
            "r": self.rank, "lora_alpha": self.alpha, "target_modules": sorted(self.up), "lora_bias": bool(self.shift),
        }  # fmt: skip
        metadata = json.dumps({f"{part}.{key}": value for key, value in settings.items()}, sort_keys=True)
        return _stored(tensors, dtype), {"format": "pt", "lora_adapter_metadata": metadata}

    def kohya(self, part: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a file in kohya's layout, with the names of modules that ComfyUI makes of diffusers' (lora.py there)."""
        tensors: dict[str, Tensor] = {}
        for name, up in self.up.items():
            key = f"lora_{part}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": self.down[name], f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha))
            if name in self.shift:
                tensors[f"{key}.diff_b"] = self.shift[name]
        return _stored(tensors, dtype)


def update_of(teacher: Teacher, student: Denoiser, guidance_scale: Scale | None = None) -> Update:
    """What the student's adapters, and what is folded for export, change of the teacher.

    Raises ValueError where that is more than weights of rank r and biases: a guidance embedding that is left live.
    """
    layers = dict(adapters(student.net))
    down = {name: layer.lora_A[NAME].weight for name, layer in layers.items()}
    up = {name: layer.lora_B[NAME].weight for name, layer in layers.items()}
    first = next(iter(layers.values()))
    before, after = teacher.denoiser.net.state_dict(), teacher.students.fold(student, guidance_scale).state_dict()
    merged = {f"{name}.weight" for name in layers}
    changed = [k for k, v in after.items() if k not in merged and not (k in before and torch.equal(v, before[k]))]
    # What was folded elsewhere is left behind as zeros, and does nothing.
    changed = [name for name in changed if name in before or after[name].any()]
    wrong = [name for name in changed if name not in before or not name.endswith(".bias")]
    if wrong:
        raise ValueError(
            f"the student's {wrong[0]} has no place in a file of adapters: set method.export_guidance_scale, which becomes a "
            "part of the biases"
        )
    shift = {k.removesuffix(".bias"): after[k].float() - before[k].float() for k in changed}
    rank = first.r[NAME]
    for name, value in shift.items():
        if name not in up:  # a bias alone still needs a place: an update of zero
            weight = before[f"{name}.weight"]
            down[name], up[name] = torch.zeros(rank, weight.shape[1]), torch.zeros(len(value), rank)
    return Update(rank, first.lora_alpha[NAME], down, up, shift)


def export_lora(
    teacher: Teacher,
    student: Denoiser,
    scheduler: "SchedulerMixin",
    path: Path,
    *,
    base: str,
    allowed_steps: Sequence[int],
    guidance_scale: Scale | None = None,
    keeps_guidance: bool = False,
    dtype: str = "fp32",
    card: dict[str, Any],
) -> Path:
    """Write a student's adapters in both layouts, with its scheduler and a card, and return `path`.

    base: the teacher's folder or hub id. The other arguments are those of `fewstep.export.export`. The adapters are rounded
    to `dtype`; the comparison with the student in memory, rounded likewise, is in float32.
    Raises ExportError where the two differ, in pixels, timesteps or the number of adapted modules; `path` stays as it was.
    """
    path = path.resolve()
    part = "unet" if "unet" in teacher.pipeline.components else "transformer"
    rounded = _rounded(student, torch_dtype(dtype))
    update = update_of(teacher, rounded, guidance_scale)
    if keeps_guidance:
        pipeline = teacher.students.guided_pipeline(rounded, scheduler)
        passed = plain = None  # what the pipeline's class guides by is what its caller gets
    else:
        pipeline = teacher.students.pipeline(rounded, scheduler, guidance_scale)
        passed, plain = teacher.guidance.scale_to_pass, teacher.guidance.scale_to_pass_with_adapters
    own_copies(pipeline, torch.float32)
    arguments = arguments_of(teacher, card)
    drawn = draw(pipeline, allowed_steps, arguments, options_of(teacher, passed), refuses(scheduler))
    options = options_of(teacher, plain)
    with atomic(path) as partial:
        partial.mkdir()
        tensors, metadata = update.diffusers(part, torch_dtype(dtype))
        save_file(tensors, partial / FILE, metadata=metadata)
        save_file(update.kohya(part, torch_dtype(dtype)), partial / KOHYA_FILE, metadata={"format": "pt"})
        scheduler.save_pretrained(partial / "scheduler")
        code = _code(teacher, type(scheduler).__name__, base, part, arguments, allowed_steps, options)
        guidance = LIVE_GUIDANCE if keeps_guidance else _guidance_text(guidance_scale)
        timesteps = timesteps_text(scheduler, timesteps_of(drawn, allowed_steps))
        (partial / "README.md").write_text(_card(card, update, code, allowed_steps, dtype, guidance, timesteps))
        found = ask_stranger(partial, allowed_steps, arguments, options, adapted=part, merges=not update.shift)
        if (count := int(found["adapted"])) != len(update.up):
            raise ExportError(f"plain diffusers loads {count} of the {len(update.up)} adapted modules")
        tolerance = ROUNDING * tolerance_of(student, teacher.num_train_timesteps - 1, "fp32")
        if teacher.denoiser.net.dtype != torch.float32:
            tolerance = max(tolerance, TOLERANCES["bf16"])  # merging rounds to the base's type
        for prefix in ("", *(() if update.shift else ("merged_",))):
            own = {
                f"{kind}_{n}": found[f"{prefix}{kind}_{n}"] for kind in ("timesteps", "images") for n in allowed_steps
            }
            own["too_many_raised"] = found["too_many_raised"]
            compare(drawn, own, allowed_steps, tolerance, refuses(scheduler))
    return path


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _rounded(student: Denoiser, dtype: torch.dtype) -> Denoiser:
    copied = student.clone().requires_grad_(False).eval()
    for tensor in own_tensors(copied).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return copied


def _code(
    teacher: Teacher,
    scheduler: str,
    base: str,
    part: str,
    arguments: Sequence[Any],
    allowed_steps: Sequence[int],
    options: dict[str, Any],
) -> str:
    """The card's code: adapters into the teacher's pipeline, by its own loader where its class has one, else by peft's."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    kind, dtype = type(teacher.pipeline), str(teacher.denoiser.net.dtype)
    loads = issubclass(kind, LoraBaseMixin)
    given = "" if dtype == "torch.float32" else f", dtype={dtype}"
    inputs = "".join(f"{argument!r}, " for argument in arguments)
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    steps = 4 if 4 in allowed_steps else max(allowed_steps)
    return "\n".join(
        [
            *(["import torch"] if given else []),
            f"from diffusers import DiffusionPipeline, {scheduler}",
            *([] if loads else _PEFT_IMPORTS),
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({base!r}{given})",
            f'pipeline.scheduler = {scheduler}.from_pretrained("scheduler")',
            *([f'pipeline.load_lora_weights(".", weight_name="{FILE}")'] if loads else _by_peft(part)),
            f"image = pipeline({inputs}num_inference_steps={steps}{more}).images[0]",
        ]
    )


_PEFT_IMPORTS = [
    "import json",
    "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict",
    "from safetensors import safe_open",
]


def _by_peft(part: str) -> list[str]:
    return [
        f'with safe_open("{FILE}", "pt") as file:',
        f'    tensors = {{key.removeprefix("{part}."): file.get_tensor(key) for key in file.keys()}}',
        '    settings = json.loads(file.metadata()["lora_adapter_metadata"])',
        f'config = LoraConfig(**{{key.removeprefix("{part}."): value for key, value in settings.items()}})',
        f'inject_adapter_in_model(config, pipeline.{part}, "default")',
        f"set_peft_model_state_dict(pipeline.{part}, tensors)",
    ]


def _guidance_text(guidance_scale: Scale | None) -> str:
    scale = "" if guidance_scale is None else f" {scale_text(guidance_scale).capitalize()} is part of the adapters."
    return f"Guidance: the student needs none.{scale}"


def _card(
    card: dict[str, Any],
    update: Update,
    code: str,
    allowed_steps: Sequence[int],
    dtype: str,
    guidance: str,
    timesteps: str,
) -> str:
    teacher = str(card.get("teacher", "unknown"))
    teacher = Path(teacher).resolve().name if Path(teacher).is_dir() else teacher
    front = {
        "license": card.get("license", "other"),
        "library_name": "diffusers",
        "base_model": teacher,
        "tags": ["diffusers", "lora", "few-step", "distillation", str(card.get("method", "distillation"))],
    }
    merging = (
        "They can be merged (`fuse_lora`)." if not update.shift else "They also shift biases, and so cannot be merged."
    )
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
            f"# Few-step adapters for {teacher}", "",
            "Run in the folder of this card:", "", "```python", code, "```", "",
            f"`num_inference_steps`: {', '.join(map(str, allowed_steps))}. {merging}", "",
            guidance, "",
            f"`{KOHYA_FILE}` has the same adapters in kohya's layout, for ComfyUI.", "",
            f"- Rank {update.rank}, alpha {update.alpha:g}, {len(update.up)} modules, {DTYPES[dtype]}",
            f"- Method: {card.get('method', 'distillation')}", f"- Paper: {card.get('paper')}", "",
            timesteps, "",
        ]
    )  # fmt: skip
