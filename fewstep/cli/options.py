"""Shared by commands: loading a pipeline, and options of sampling."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fewstep.assets import ASSETS, asset_path
from fewstep.errors import FewstepError, MissingError
from fewstep.io import torch_dtype

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The group of commands to which each adds its parser."""

CONFIG_HELP = "a recipe, see `fewstep recipes`, or a YAML file"
PIPELINE_HELP = f"folder or hub id of a diffusers pipeline, or an embedded one: {', '.join(ASSETS)}"


def one_progress_bar() -> None:
    """Leaves that of the images, of all that would show one."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def load_pipeline(name: str, dtype: str, device: "torch.device") -> "DiffusionPipeline":
    """A pipeline on its device. Raises FewstepError for one that cannot be loaded."""
    from diffusers import DiffusionPipeline

    one_progress_bar()
    path = str(asset_path(name) / "pipeline") if name in ASSETS else name
    try:
        return DiffusionPipeline.from_pretrained(path, dtype=torch_dtype(dtype)).to(device)
    # A broken folder ends in any of these, according to what is broken.
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as e:
        if name not in ASSETS and not Path(name).exists():
            hint = f"`hf download {name}` puts a pipeline of the Hub into its cache" if name.count("/") == 1 else None
            raise MissingError(
                "pipeline", repr(name), "a local folder, or one on the Hub or in its cache", hint
            ) from None
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise FewstepError(
            "pipeline", f"{name!r}, which cannot be loaded ({reason})", "a pipeline of diffusers"
        ) from None


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that counts something."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text}; expected whole numbers of {least} or more")
        return int(text)

    return count


def check_output(path: Path) -> None:
    """Raise OSError or FewstepError, before the work is done, for a result that cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise FewstepError("--output", f"{path}, a folder", "a file")


def guidance(args: argparse.Namespace) -> float | None:
    from fewstep.evaluate import recommended_guidance_scale

    given: float | None = args.guidance_scale
    return recommended_guidance_scale(args.pipeline) if given is None else given


def add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="default: what the embedded pipeline recommends, otherwise the pipeline's own default",
    )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="noise of image i is fixed by (seed, i) (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("fp64", "fp32", "fp16", "bf16"),
        default="fp32",
        help="of the pipeline; scoring is in fp32, or all in fp64, where no digit depends on the batch size (default: fp32)",
    )
