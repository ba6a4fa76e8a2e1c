"""Opening a teacher: an embedded name, a pipeline folder, a hub id, or a pipeline in memory."""

import difflib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from fewstep.assets import ASSETS, asset_path
from fewstep.errors import FewstepError, MissingError
from fewstep.teachers.base import Teacher
from fewstep.teachers.placement import NETWORKS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "DiTPipeline": ("dit", "DiT"),
    "PixArtAlphaPipeline": ("pixart", "PixArt"),
    "PixArtSigmaPipeline": ("pixart", "PixArt"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "SanaPipeline": ("sana", "Sana"),
    "DDPMPipeline": ("ddpm", "Pixel"),
    "DDIMPipeline": ("ddpm", "Pixel"),
    "ConsistencyModelPipeline": ("edm", "Edm"),
}
"""Class of a pipeline -> module of `families`, loaded when needed, and the Teacher in it."""


def load_teacher(source: "str | DiffusionPipeline") -> Teacher:
    """The teacher in a pipeline folder, at a hub id ("owner/name"), embedded in the package, or in memory; frozen, in float32.

    Weights on disk are read from safetensors only, and no code that comes with them is run. A pipeline in memory is not
    copied: its networks are converted to float32, frozen, and moved as training needs it.

    Raises MissingError where there is no such pipeline, and FewstepError where its class is not supported or its parts are
    broken or missing.
    """
    return _from_files(source) if isinstance(source, str) else _from_memory(source)


def teacher_of(pipeline: "DiffusionPipeline") -> Teacher:
    """The teacher of a pipeline of a supported class, which it takes over unchanged."""
    pipeline.set_progress_bar_config(disable=True)
    module, name = FAMILIES[type(pipeline).__name__]
    family = vars(import_module(f"fewstep.teachers.families.{module}"))[name]
    teacher = family(pipeline)
    assert isinstance(teacher, Teacher)
    return teacher


def check_family(kind: str, source: str) -> None:
    """Raises FewstepError for the name of a pipeline class that is not supported."""
    if kind not in FAMILIES:
        raise FewstepError("teacher", f"{source}, which is a {kind}", f"one of {', '.join(FAMILIES)}")


def left_out(kind: str) -> dict[str, object]:
    """Arguments of a pipeline's class for parts that are not needed."""
    # Images are scored and compared, not shown: a checker that blackens some of them would spoil both.
    return {"safety_checker": None, "requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}


def _from_files(name_or_path: str) -> Teacher:
    from diffusers import DiffusionPipeline

    source = locate(name_or_path)
    with quiet():
        try:
            index = DiffusionPipeline.load_config(source)
            kind = index["_class_name"]
        except (OSError, KeyError, TypeError) as error:
            raise _missing(name_or_path) from error
        check_family(kind, name_or_path)
        extra = left_out(kind)
        _check_parts(source, index, skipped=extra)
        try:
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **extra)
        except Exception as error:  # diffusers, transformers and safetensors each raise what they like for broken files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FewstepError(
                "teacher", f"{name_or_path}, which cannot be loaded ({reason})", "a pipeline of diffusers"
            ) from error
    _check_weights(source, pipeline)
    teacher = teacher_of(pipeline)

    def reload(names: Sequence[str]) -> dict[str, nn.Module]:
        # Parts that are passed are not loaded.
        present = {key: part for key, part in pipeline.components.items() if key not in names}
        with quiet():
            fresh = DiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, **(extra | present)
            )
        return {name: fresh.components[name] for name in names}

    teacher.placement.reload = reload
    return teacher


def _from_memory(pipeline: "DiffusionPipeline") -> Teacher:
    """The teacher of a pipeline in memory. Nothing can load its parts again: those that are released wait in main memory."""
    from diffusers import DiffusionPipeline

    kind = type(pipeline).__name__
    if not isinstance(pipeline, DiffusionPipeline):
        raise FewstepError("teacher", f"a {kind}", "a folder, a hub id, an embedded name or a pipeline of diffusers")
    check_family(kind, "a pipeline in memory")
    _check_in_memory(pipeline)
    try:
        # A pipeline of its own around the same networks: the caller's keeps its parts when some are released.
        own = type(pipeline).from_pipe(pipeline, dtype=torch.float32, **left_out(kind))
    except Exception as error:  # such as quantized networks, which cannot be converted
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FewstepError(
            "teacher", f"a {kind} that cannot be converted to float32 ({reason})", "one that can"
        ) from error
    return teacher_of(own)


def _check_in_memory(pipeline: "DiffusionPipeline") -> None:
    """FewstepError where parts are missing, adapters are loaded, or hooks move the networks."""
    parts = pipeline.components
    kind, name = type(pipeline).__name__, next(name for name in NETWORKS if name in parts)
    encoders = [key for key in parts if key.startswith("text_encoder")]
    missing = [key for key in (name, "vae", "scheduler") if key in parts and parts[key] is None]
    missing += ["text_encoder"] if encoders and all(parts[key] is None for key in encoders) else []
    if missing:
        raise FewstepError("teacher", f"a {kind} without {', '.join(missing)}", "a complete pipeline")
    _check_no_adapters(parts[name].state_dict(), f"a {kind} with adapters in its {name}")
    modules = [part for part in parts.values() if isinstance(part, nn.Module)]
    if vars(pipeline).get("hf_device_map") or any("_hf_hook" in vars(m) for part in modules for m in part.modules()):
        raise FewstepError(
            "teacher", f"a {kind} whose networks are offloaded or spread over devices", "one without hooks",
            "Call its remove_all_hooks() or reset_device_map() first",
        )  # fmt: skip


def locate(name_or_path: str) -> str:
    """The folder or hub id that diffusers opens. Raises MissingError for what can be neither."""
    if name_or_path in ASSETS:
        return str(asset_path(name_or_path) / "pipeline")
    if Path(name_or_path).is_dir():
        return name_or_path
    # A hub id is owner/name; everything else can only have been meant as a folder or an embedded name.
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise _missing(name_or_path)
    return name_or_path


def _check_parts(source: str, index: Mapping[str, object], skipped: Container[str]) -> None:
    """FewstepError where a local folder lacks a part: for a missing tokenizer, transformers makes an empty one in silence."""
    parts = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]]
    missing = [name for name in parts if name not in skipped and not (Path(source) / name).is_dir()]
    if Path(source).is_dir() and missing:
        raise FewstepError("teacher", source, f"a folder {', '.join(missing)} in it, which its model_index.json names")


def _check_weights(source: str, pipeline: "DiffusionPipeline") -> None:
    """FewstepError where a local folder has not all weights of the denoising network: diffusers leaves random ones, and warns.

    So it does for a pipeline that was saved with adapters in it, whose scale its files do not hold.
    """
    name = next(name for name in NETWORKS if name in pipeline.components)
    files = sorted((Path(source) / name).glob("*.safetensors"))
    if not files:  # at a hub id
        return
    found: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    lacking = [key for key in pipeline.components[name].state_dict() if key not in found]
    _check_no_adapters(found, f"{source}, saved with adapters in its {name}")
    if lacking:
        raise FewstepError(
            "teacher", f"{source} without {len(lacking)} weights of its {name}", f"all, first {lacking[0]}"
        )


def _check_no_adapters(keys: Iterable[str], found: str) -> None:
    if any(".lora_" in key for key in keys):
        raise FewstepError(
            "teacher",
            found,
            "merged weights",
            "Call fuse_lora() and unload_lora_weights(), and save it again if it is a folder",
        )


def _missing(name_or_path: str) -> MissingError:
    close = difflib.get_close_matches(name_or_path, ASSETS, n=1)
    return MissingError(
        "teacher", repr(name_or_path),
        f"a folder with a model_index.json, a reachable hub id or an embedded name ({', '.join(ASSETS)})",
        f"Did you mean {close[0]!r}?" if close else None,
    )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars while a pipeline is loaded or saved."""
    import diffusers.utils.logging
    import transformers.utils.logging

    modules = [m for m in (diffusers.utils.logging, transformers.utils.logging) if m.is_progress_bar_enabled()]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in modules:
            module.enable_progress_bar()
