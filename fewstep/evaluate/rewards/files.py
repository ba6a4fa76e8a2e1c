"""Paths of the weights of image rewards: named by the caller, under $FEWSTEP_DATA, or where their libraries put them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.data.hub import DATA
from fewstep.errors import FewstepError, MissingError


@dataclass(frozen=True)
class Download:
    """A file that a reward needs. hub: the repository of huggingface.co that has it; source: where else it comes from."""

    file: str
    hub: str | None = None
    source: str = ""
    cache: str | None = None
    """Folder into which the reward's own library downloads it."""


PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MPS_CLIP = PICKSCORE_PROCESSOR
MPS_CONVERSION = (
    "github.com/Kwai-Kolors/MPS publishes MPS_overall_checkpoint.pth, a pickled module, which in a checkout of it with "
    "its requirements, if you trust it, `safetensors.torch.save_file(torch.load('MPS_overall_checkpoint.pth', "
    "weights_only=False).state_dict(), 'MPS_overall_checkpoint.safetensors')` turns into tensors"
)
AESTHETIC_CLIP, IMAGE_REWARD_WORDS = "openai/clip-vit-large-patch14", "google-bert/bert-base-uncased"
DOWNLOADS = {
    "aesthetic": Download(
        "sac+logos+ava1-l14-linearMSE.pth", source="of github.com/christophschuhmann/improved-aesthetic-predictor"
    ),
    "hpsv2": Download("HPS_v2_compressed.pt", hub="xswu/HPSv2", cache="~/.cache/hpsv2"),
    "hpsv2.1": Download("HPS_v2.1_compressed.pt", hub="xswu/HPSv2", cache="~/.cache/hpsv2"),
    "image_reward": Download("ImageReward.pt", hub="THUDM/ImageReward", cache="~/.cache/ImageReward"),
    "mps": Download("MPS_overall_checkpoint.safetensors", source=f"({MPS_CONVERSION})"),
}


def downloaded(reward: str, given: str | None) -> Path:
    """The file of weights of a reward; ValueError, in one sentence, says what to download and where to put it."""
    d = DOWNLOADS[reward]
    if given:
        if (file := Path(given).expanduser()).is_file():
            return file
        raise MissingError(f"reward {reward!r}", given, "a file")
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [checkpoints] + ([Path(d.cache).expanduser()] if d.cache else [])
    if root := os.environ.get(DATA):
        folders.insert(0, Path(root) / "models")
    for folder in folders:
        if (folder / d.file).is_file():
            return folder / d.file
    if d.hub:
        from huggingface_hub import try_to_load_from_cache

        if isinstance(found := try_to_load_from_cache(d.hub, d.file), str):
            return Path(found)
    how = f"`hf download {d.hub} {d.file}` puts it into the hub's cache" if d.hub else f"put it into {checkpoints}"
    where = f"{root}/models" if root else f"models/ under the folder that ${DATA} names"
    raise MissingError(
        f"reward {reward!r}",
        f"no {d.file}",
        f"it{f' {d.source}' if d.source else ''}",
        f"{how}; or put it into {where}, or name its path as {reward}@FILE",
    )


def not_weights(file: Path, error: Exception, expected: str) -> FewstepError:
    """The error about a file that holds other weights."""
    return FewstepError("reward", f"{file} ({str(error).strip().splitlines()[0]})", expected)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A state dict of a .safetensors, or of another file without unpickling anything else; ValueError where there is none."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        raise FewstepError(
            "reward", f"{file}, which cannot be read ({str(e).strip().splitlines()[0]})", "a file of weights"
        ) from None
    if not isinstance(state, dict):
        raise FewstepError("reward", f"a {type(state).__name__} in {file}", "weights by name")
    return dict(state.get("state_dict", state))


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
