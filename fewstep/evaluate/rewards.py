"""What people like, as networks predict it: rewards of images, to score with and to train with."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.assets import ASSETS
from fewstep.evaluate.clip_score import Clip, clip_folder, load_clip, load_clip_folder
from fewstep.evaluate.features import Preprocess, model_folder
from fewstep.evaluate.image_reward import ImageRewardNet, linear_stack, load_image_reward
from fewstep.evaluate.protocol import REWARDS, WORDLESS_REWARDS
from fewstep.evaluate.reward_files import (
    AESTHETIC_CLIP,
    IMAGE_REWARD_WORDS,
    PICKSCORE,
    PICKSCORE_PROCESSOR,
    downloaded,
    read_tensors,
)

CLIP_PREPROCESSING = {
    "resample": 3,
    "do_center_crop": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""OpenAI's: the shorter side to the network's, bicubic; the middle; these means and deviations."""


class Reward(nn.Module):
    """A frozen network's opinion of images: higher is better. It moves with `.to(device)`, and computes in float32, or after
    `.double()` in float64.

    Images and prompts of a call go where the network is; gradients go back to the images.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """images [B, 3, H, W] in [0, 1], of any float type, and B prompts -> [B], differentiable in the images.

        Raises ValueError where the numbers differ, or where prompts are None and the reward reads them.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be float [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}")
        base = self.name.partition("@")[0]
        if prompts is None and base not in WORDLESS_REWARDS:
            raise ValueError(f"reward {base!r} needs prompts, and there are none")
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        images = images if images.dtype == torch.float64 else images.float()
        return self.score(images * 255, prompts or ())

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 or float64 [B, 3, H, W] in [0, 255] -> [B]."""


class ClipReward(Reward):
    """scale * cosine of a CLIP's embeddings of image and prompt.

    PickScore (Kirstain et al. 2023) is that of a CLIP-H which learned people's choices, its scale the CLIP's own.
    """

    def __init__(self, name: str, clip: Clip, scale: float) -> None:
        super().__init__(name)
        self.clip, self.scale = clip, scale
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale * (self.clip.see(images) * self.clip.text_embeddings(prompts)).sum(1)


class Aesthetic(Reward):
    """LAION's predictor of the ratings 1 to 10: a stack of linear layers on the unit embedding of CLIP ViT-L/14."""

    def __init__(self, name: str, clip: Clip, head: nn.Sequential) -> None:
        super().__init__(name)
        self.clip, self.head = clip, head
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        result: Tensor = self.head(self.clip.see(images))
        return result.squeeze(1)


class Hps(Reward):
    """Human Preference Score v2 (Wu et al. 2023): the bare cosine of an open_clip ViT-H-14 that learned people's choices."""

    def __init__(self, name: str, model: nn.Module, tokenizer: object, preprocess: Preprocess) -> None:
        super().__init__(name)
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.preprocess.mean.device
        tokens = self.tokenizer(list(prompts)).to(device)  # type: ignore[operator]
        seen = self.model.encode_image(self.preprocess(images.to(device)), normalize=True)  # type: ignore[operator]
        return (seen * self.model.encode_text(tokens, normalize=True)).sum(1)  # type: ignore[operator]


class ImageReward(Reward):
    """ImageReward (Xu et al. 2023): a BLIP that reads the prompt while it looks, its output standardised."""

    def __init__(self, name: str, net: ImageRewardNet, preprocess: Preprocess) -> None:
        super().__init__(name)
        self.net, self.preprocess = net, preprocess
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        result: Tensor = self.net(self.preprocess(images.to(self.preprocess.mean.device)), prompts)
        return result


def load_reward(name: str) -> Reward:
    """A reward by name; @PATH names its folder or file of weights, which is else looked for as `reward_files` says.

    clip@FOLDER: 100 * cosine of `fashion`'s CLIP or of a transformers CLIPModel. pickscore: PickScore v1. aesthetic: LAION's
    improved-aesthetic-predictor. hpsv2, hpsv2.1: HPS, by open_clip. image_reward: ImageReward v1.0.

    Raises ValueError, in one sentence, for an unknown name, and for missing weights: what to download, and where to put it.
    """
    base, _, path = name.partition("@")
    match base:
        case "clip":
            if not path:
                raise ValueError(f"reward 'clip' needs a model: clip@FOLDER, or clip@{next(iter(ASSETS))}")
            return ClipReward(name, load_clip(path), 100.0)
        case "pickscore":
            folder, processor = _pickscore(path)
            clip = load_clip_folder(name, folder, processor)
            return ClipReward(name, clip, float(clip.model.logit_scale.detach().exp()))
        case "aesthetic":
            head = _head(downloaded(base, path))
            return Aesthetic(name, load_clip(str(model_folder(AESTHETIC_CLIP, "reward 'aesthetic':"))), head)
        case "hpsv2" | "hpsv2.1":
            return _hps(name, downloaded(base, path))
        case "image_reward":
            file = downloaded(base, path)
            net = load_image_reward(file, model_folder(IMAGE_REWARD_WORDS, "reward 'image_reward': tokenizer"))
            return ImageReward(name, net, _preprocess(net.side))
    raise ValueError(f"reward {name!r} is none of clip@FOLDER, {', '.join(REWARDS)}")


def reward_weights(name: str) -> Path | None:
    """The file by which two rewards of one name are told apart; ValueError where it is missing."""
    base, _, path = name.partition("@")
    if base in ("clip", "pickscore"):
        folder = _pickscore(path)[0] if base == "pickscore" else clip_folder(path)
        file = folder / "model.safetensors"
        return file if file.exists() else None
    return downloaded(base, path)


def _pickscore(path: str) -> tuple[Path, Path]:
    """The model's folder, and that of its tokenizer and image processor: its authors take those of the CLIP-H they began with."""
    folder = model_folder(path or PICKSCORE, "reward 'pickscore':")
    own = any((folder / f).exists() for f in ("preprocessor_config.json", "processor_config.json"))
    return folder, folder if own else model_folder(PICKSCORE_PROCESSOR, "reward 'pickscore': processor")


def _preprocess(side: int) -> Preprocess:
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return Preprocess({**CLIP_PREPROCESSING, **size})


def _head(file: Path) -> nn.Sequential:
    try:
        return linear_stack(read_tensors(file))
    except (KeyError, ValueError, RuntimeError) as e:
        raise ValueError(f"{file} does not hold a stack of linear layers: {str(e).strip().splitlines()[0]}") from None


HPS_MODEL = "ViT-H-14"


def _hps(name: str, file: Path) -> Hps:
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"reward {name!r} needs the extra: pip install 'fewstep[open_clip]'") from None
    model = open_clip.create_model(HPS_MODEL, pretrained=None)
    try:
        model.load_state_dict(read_tensors(file))
    except RuntimeError as e:
        raise ValueError(f"{file} does not hold the weights of {HPS_MODEL}: {str(e).strip().splitlines()[0]}") from None
    side = model.visual.image_size
    return Hps(name, model, open_clip.get_tokenizer(HPS_MODEL), _preprocess(side if isinstance(side, int) else side[0]))
