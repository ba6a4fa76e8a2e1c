"""Opening a teacher: an embedded name, a pipeline folder or a hub id."""

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fewstep.assets import ASSETS, asset_path
from fewstep.teachers.base import Teacher

FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "DiTPipeline": ("dit", "DiT"),
    "PixArtAlphaPipeline": ("pixart", "PixArt"),
    "PixArtSigmaPipeline": ("pixart", "PixArt"),
    "StableDiffusion3Pipeline": ("flow", "StableDiffusion3"),
    "FluxPipeline": ("flow", "Flux"),
    "SanaPipeline": ("sana", "Sana"),
    "DDPMPipeline": ("ddpm", "Pixel"),
    "DDIMPipeline": ("ddpm", "Pixel"),
    "ConsistencyModelPipeline": ("edm", "Edm"),
}
"""Class of a pipeline -> module here, loaded when needed, and the Teacher in it."""

NETWORKS = ("unet", "transformer")
"""What pipelines call their denoising network."""


def load_teacher(name_or_path: str) -> Teacher:
    """The teacher in a pipeline folder, at a hub id ("owner/name"), or embedded in the package, in float32 and frozen.

    Raises FileNotFoundError where there is no such pipeline, and ValueError where its class is not supported or its files
    are broken or missing. Weights are read from safetensors only, and no code that comes with them is run.
    """
    from diffusers import DiffusionPipeline

    source = locate(name_or_path)
    with quiet():
        try:
            index = DiffusionPipeline.load_config(source)
            kind = index["_class_name"]
        except (OSError, KeyError, TypeError) as error:
            raise FileNotFoundError(_missing(name_or_path)) from error
        if kind not in FAMILIES:
            raise ValueError(f"the teacher {name_or_path} is a {kind}; supported: {', '.join(FAMILIES)}")
        # Images are scored and compared, not shown: a checker that blackens some of them would spoil both.
        extra = {"safety_checker": None, "requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
        _check_parts(source, index, skipped=extra)
        try:
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **extra)
        except Exception as error:  # diffusers, transformers and safetensors each raise what they like for broken files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"the teacher {name_or_path} cannot be loaded: {reason}") from error
    _check_weights(source, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    module, name = FAMILIES[kind]
    family: type[Teacher] = getattr(import_module(f"fewstep.teachers.families.{module}"), name)
    teacher = family(pipeline)  # type: ignore[call-arg]

    def reload(names: Sequence[str]) -> dict[str, Any]:
        # What is given is not loaded: only the wanted parts are.
        present = {key: part for key, part in pipeline.components.items() if key not in names}
        with quiet():
            fresh = DiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, **(extra | present)
            )
        return {name: fresh.components[name] for name in names}

    teacher.placement.reload = reload
    return teacher


def locate(name_or_path: str) -> str:
    """The folder or hub id that diffusers opens. Raises FileNotFoundError for what can be neither."""
    if name_or_path in ASSETS:
        return str(asset_path(name_or_path) / "pipeline")
    if Path(name_or_path).is_dir():
        return name_or_path
    # A hub id is owner/name; everything else can only have been meant as a folder or an embedded name.
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise FileNotFoundError(_missing(name_or_path))
    return name_or_path


def _check_parts(source: str, index: Mapping[str, Any], skipped: Container[str]) -> None:
    """ValueError where a local folder lacks a part: for a missing tokenizer, transformers makes an empty one in silence."""
    parts = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]]
    missing = [name for name in parts if name not in skipped and not (Path(source) / name).is_dir()]
    if Path(source).is_dir() and missing:
        raise ValueError(
            f"the teacher {source} lacks the folder {', '.join(missing)}, which its model_index.json names"
        )


def _check_weights(source: str, pipeline: Any) -> None:
    """ValueError where a local folder has not all weights of the denoising network: diffusers leaves random ones, and warns.

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
    if any(".lora_" in key for key in found):
        raise ValueError(
            f"the teacher {source} was saved with adapters in its {name}: load it as you did, call fuse_lora() and "
            "unload_lora_weights(), and save it again"
        )
    if lacking:
        raise ValueError(f"the teacher {source} lacks {len(lacking)} weights of its {name}, first {lacking[0]}")


def _missing(name_or_path: str) -> str:
    close = difflib.get_close_matches(name_or_path, ASSETS, n=1)
    return (
        f"no teacher {name_or_path!r}: not a folder with a model_index.json, not a reachable hub id, "
        f"not an embedded name ({', '.join(ASSETS)})" + (f"; did you mean {close[0]!r}?" if close else "")
    )


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
