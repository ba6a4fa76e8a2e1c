"""Assets: the small trained pipelines that come with the package, with their scorers, images and figures.

`fashion/` holds a Stable Diffusion pipeline on Fashion-MNIST, the CLIP and the classifier that score it, FID's statistics,
2,000 images and asset.json. Imports nothing of the package but `io` and `errors`; everything may import it.
"""

from pathlib import Path

from fewstep import io
from fewstep.errors import FewstepError

ASSETS = ("fashion",)


def asset_path(name: str) -> Path:
    if name not in ASSETS:
        raise FewstepError("asset", repr(name), f"one of {', '.join(ASSETS)}")
    return Path(__file__).parent / name


def recommended_guidance_scale(teacher: str) -> float | None:
    """The guidance scale that an asset recommends for its teacher; None for any other pipeline."""
    if teacher not in ASSETS:
        return None
    scale: float = io.read_json(asset_path(teacher) / "asset.json")["guidance_scale"]
    return scale
