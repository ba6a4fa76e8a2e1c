"""A student's adapters as files for the teacher's own pipeline: diffusers' layout, and kohya's, which ComfyUI reads.

They are loaded in a process without fewstep and compared with the student in memory before they count as written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.export.card import Call, Card, dtype_words, filled, front_matter, teacher_name
from fewstep.export.guidance_text import LIVE_GUIDANCE, adapter_guidance
from fewstep.export.pipeline import Opened, check_settings, open_student, with_scale
from fewstep.export.verify import TOLERANCES, ExportError, Sampled, run_isolated, tolerance_of
from fewstep.io import DTYPES, atomic, torch_dtype
from fewstep.teachers import Denoiser, Teacher
from fewstep.teachers.denoiser import Scale, own_tensors
from fewstep.teachers.lora import NAME, adapters
from fewstep.teachers.students import UNGUIDED, StudentGuidance

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

FILE = "pytorch_lora_weights.safetensors"
"""The name by which diffusers finds adapters in a folder."""
KOHYA_FILE = "kohya_lora.safetensors"

ROUNDING = 10
"""Tolerance of adapters in units of a pipeline's: beside a weight they round otherwise than merged into it."""


@dataclass(frozen=True)
class Update:
    """The difference between a student and its teacher, by names of modules: alpha / rank up @ down, and shifts of biases."""

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
    """The changes of the teacher by the student's adapters and by what is folded for export.

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
        raise FewstepError(
            "lora",
            f"{wrong[0]}, which changed",
            "changes of adapted weights and of biases only",
            "Set method.guidance.export_scale, which becomes a part of the biases",
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
    guidance: StudentGuidance = UNGUIDED,
    dtype: str = "fp32",
    card: Card,
) -> Path:
    """Write a student's adapters in both layouts, with its scheduler and a card, and return `path`.

    base: the teacher's folder or hub id. The other arguments are those of `fewstep.export.pipeline.export`. The adapters
    are rounded to `dtype`; the comparison with the student in memory, rounded likewise, is in float32.
    Raises ExportError where the two differ, in pixels, timesteps or the number of adapted modules; `path` stays as it was.
    """
    check_settings(dtype, allowed_steps)
    path = path.resolve()
    part = "unet" if "unet" in teacher.pipeline.components else "transformer"
    rounded = _rounded(student, torch_dtype(dtype))
    update = update_of(teacher, rounded, guidance.scale)
    opened = open_student(
        teacher, rounded, scheduler, allowed_steps=allowed_steps, guidance=guidance, dtype=torch.float32, card=card,
    )  # fmt: skip
    # What the pipeline's class guides by, where guidance is kept, is what its caller gets.
    call = with_scale(
        opened.call, teacher, None if guidance.by_caller else teacher.guidance.scale_to_pass_with_adapters
    )
    words = LIVE_GUIDANCE if guidance.by_caller else adapter_guidance(guidance.scale)
    with atomic(path) as partial:
        partial.mkdir()
        tensors, metadata = update.diffusers(part, torch_dtype(dtype))
        save_file(tensors, partial / FILE, metadata=metadata)
        save_file(update.kohya(part, torch_dtype(dtype)), partial / KOHYA_FILE, metadata={"format": "pt"})
        scheduler.save_pretrained(partial / "scheduler")
        code = code_text(teacher, type(scheduler).__name__, base, part, call)
        text = card_text(card, update, code, call, dtype=dtype, guidance=words, timesteps=opened.timesteps_text)
        (partial / "README.md").write_text(text, encoding="utf-8")
        found = run_isolated(partial, call, adapted=part, merges=not update.shift)
        _check(opened, found, update, _tolerance(teacher, student))
    return path


def _tolerance(teacher: Teacher, student: Denoiser) -> float:
    tolerance = ROUNDING * tolerance_of(student, teacher.num_train_timesteps - 1, "fp32")
    if teacher.denoiser.net.dtype != torch.float32:
        tolerance = max(tolerance, TOLERANCES["bf16"])  # merging rounds to the base's type
    return tolerance


def _check(opened: Opened, found: Sampled, update: Update, tolerance: float) -> None:
    """Compare samples beside the base's weights, and merged into them where they can be."""
    if (count := int(found["adapted"])) != len(update.up):
        raise ExportError(
            "lora", f"{count} modules with adapters in plain diffusers", f"{len(update.up)}, as were trained"
        )
    for prefix in ("", *(() if update.shift else ("merged_",))):
        kinds, steps = ("timesteps", "images"), opened.call.steps
        reloaded = {f"{kind}_{n}": found[f"{prefix}{kind}_{n}"] for kind in kinds for n in steps}
        opened.check(reloaded | {"too_many_raised": found["too_many_raised"]}, tolerance)


def _stored(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _rounded(student: Denoiser, dtype: torch.dtype) -> Denoiser:
    copied = student.clone().requires_grad_(False).eval()
    for tensor in own_tensors(copied).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return copied


def code_text(teacher: Teacher, scheduler: str, base: str, part: str, call: Call) -> str:
    """The card's code: adapters into the teacher's pipeline, by its own loader where its class has one, otherwise by peft's."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    dtype = str(teacher.denoiser.net.dtype).removeprefix("torch.")
    return filled(
        "lora_code" if issubclass(type(teacher.pipeline), LoraBaseMixin) else "lora_code_peft",
        **dtype_words(None if dtype == "float32" else dtype),
        scheduler=scheduler,
        base=repr(base),
        file=FILE,
        part=part,
        call=call.text(),
    )


def card_text(card: Card, update: Update, code: str, call: Call, *, dtype: str, guidance: str, timesteps: str) -> str:
    """The text of README.md of adapters."""
    teacher, method = teacher_name(card), card.get("method", "distillation")
    front = {
        "license": card.get("license", "other"),
        "library_name": "diffusers",
        "base_model": teacher,
        "tags": ["diffusers", "lora", "few-step", "distillation", str(method)],
    }
    merging = (
        "They can be merged (`fuse_lora`)." if not update.shift else "They also shift biases, and so cannot be merged."
    )
    text = filled(
        "lora",
        front=front_matter(front),
        teacher=teacher,
        code=code,
        counts=", ".join(map(str, call.steps)),
        merging=merging,
        guidance=guidance,
        kohya=KOHYA_FILE,
        rank=update.rank,
        alpha=f"{update.alpha:g}",
        modules=len(update.up),
        weights=DTYPES[dtype],
        method=method,
        paper=card.get("paper"),
        timesteps=timesteps,
    )
    return text + "\n"
