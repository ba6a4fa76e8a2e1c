"""Human-preference reward models, to score with and to train with."""

import importlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.assets import ASSETS
from fewstep.errors import FewstepError, MissingError
from fewstep.evaluate.models.clip import Clip, clip_folder, load_clip, load_clip_folder
from fewstep.evaluate.models.features import Preprocess, load_preprocess, model_folder
from fewstep.evaluate.protocol import REWARDS, WORDLESS_REWARDS, is_own_reward
from fewstep.evaluate.rewards.files import (
    AESTHETIC_CLIP,
    IMAGE_REWARD_WORDS,
    MPS_CLIP,
    PICKSCORE,
    PICKSCORE_PROCESSOR,
    downloaded,
    not_weights,
    read_tensors,
)
from fewstep.evaluate.rewards.image_reward import ImageRewardNet, load_image_reward, load_linear_stack
from fewstep.evaluate.rewards.mps import MpsNet, load_mps

if TYPE_CHECKING:
    from open_clip import CLIP

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

    white = 255.0
    """Largest value of the images that `score` is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """images [B, 3, H, W] in [0, 1], of any float type, and B prompts -> [B], differentiable in the images.

        Raises ValueError where the numbers differ, or where prompts are None and the reward reads them.
        """
        return self.score(self.checked(images, prompts) * self.white, prompts or ())

    def checked(self, images: Tensor, prompts: Sequence[str] | None) -> Tensor:
        """The images, in float32 or float64."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise FewstepError("images", f"{images.dtype} {list(images.shape)}", "float [B, 3, H, W] in [0, 1]")
        base = self.name.partition("@")[0]
        if prompts is None and base not in WORDLESS_REWARDS and not is_own_reward(base):
            raise FewstepError(f"reward {base!r}", "no prompts", "a prompt for each image")
        if prompts is not None and len(prompts) != len(images):
            raise FewstepError("prompts", f"{len(prompts)} for {len(images)} images", "as many as images")
        return images if images.dtype == torch.float64 else images.float()

    def try_out(self, images: Tensor, prompts: Sequence[str] | None) -> None:
        """Check a reward before training. Raises ValueError where it gives no gradient to such images and prompts."""
        self.checked(images, prompts)

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 or float64 [B, 3, H, W] in [0, white], and prompts, none where there are none -> [B]."""


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

    def __init__(
        self, name: str, model: "CLIP", tokenizer: "Callable[[list[str]], Tensor]", preprocess: Preprocess
    ) -> None:
        super().__init__(name)
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.preprocess.mean.device
        tokens = self.tokenizer(list(prompts)).to(device)
        seen = self.model.encode_image(self.preprocess(images.to(device)), normalize=True)
        return (seen * self.model.encode_text(tokens, normalize=True)).sum(1)


class Reader(Reward):
    """A network of prompts and preprocessed images.

    ImageReward (Xu et al. 2023): a BLIP, its output standardised. Multi-dimensional Preference Score (Zhang et al. 2024),
    overall: a CLIP-H whose image tokens attend to the prompt's words.
    """

    def __init__(self, name: str, net: ImageRewardNet | MpsNet, preprocess: Preprocess) -> None:
        super().__init__(name)
        self.net, self.preprocess = net, preprocess
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        result: Tensor = self.net(self.preprocess(images.to(self.preprocess.mean.device)), prompts)
        return result


NO_GRADIENT = ("a result without a gradient", "one that is differentiable in the images")


class OwnReward(Reward):
    """The user's: a function of images [B, 3, H, W] in [0, 1] and prompts, or None, to [B]. A module is frozen, and moves along.

    What it gives is checked at every call. Its images are where they are in training: on the device of the run.
    """

    white = 1.0

    def wrong(self, found: str, expected: str) -> FewstepError:
        return FewstepError(f"reward {self.name!r}", found, expected)

    def __init__(self, name: str, function: Callable[..., object]) -> None:
        super().__init__(name)
        self.function = function
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        result = self.function(images, prompts or None)
        if not isinstance(result, Tensor):
            raise self.wrong(f"a result of type {type(result).__name__}", "a tensor")
        if result.shape != images.shape[:1] or not result.is_floating_point():
            found = f"a result {result.dtype} {list(result.shape)}"
            raise self.wrong(found, f"floats [{len(images)}], one for each image")
        if images.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise self.wrong(*NO_GRADIENT)
        return result.to(images.dtype)

    def try_out(self, images: Tensor, prompts: Sequence[str] | None) -> None:
        images = images.detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
            result = self(images, prompts)
            (gradient,) = torch.autograd.grad(result.sum(), images, allow_unused=True)
        if gradient is None:
            raise self.wrong(*NO_GRADIENT)


def own_function(name: str) -> Callable[..., object]:
    """The callable that package.module:callable names; ValueError, in one sentence, where there is none."""
    (module, _, attribute), key = name.partition(":"), f"reward {name!r}"
    try:
        found = importlib.import_module(module)
    except Exception as e:  # whatever the module does while it is imported
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        hint = "Is its folder in PYTHONPATH?" if isinstance(e, ModuleNotFoundError) else None
        raise FewstepError(
            key, f"{module}, which cannot be imported ({reason})", "package.module:callable", hint
        ) from None
    try:
        function: Callable[..., object] = getattr(found, attribute)
    except AttributeError:
        where = f"{found.__name__} ({found.__file__})"
        raise FewstepError(key, f"no {attribute!r} in {where}", "a callable of that name") from None
    if not callable(function):
        raise FewstepError(key, f"{attribute} of type {type(function).__name__}", "a callable")
    return function


def load_reward(name: str) -> Reward:
    """A reward by name; @PATH names its folder or file of weights, which is otherwise looked for as `reward_files` says.

    clip@FOLDER: 100 * cosine of `fashion`'s CLIP or of a transformers CLIPModel. pickscore: PickScore v1. aesthetic: LAION's
    improved-aesthetic-predictor. hpsv2, hpsv2.1: HPS, by open_clip. image_reward: ImageReward v1.0. mps: MPS, overall.
    package.module:callable: the user's own, see `OwnReward`.

    Raises ValueError, in one sentence, for an unknown name, and for missing weights: what to download, and where to put it.
    """
    if is_own_reward(name):
        return OwnReward(name, own_function(name))
    base, _, path = name.partition("@")
    match base:
        case "clip":
            if not path:
                raise FewstepError("reward 'clip'", "no model", f"clip@FOLDER or clip@{next(iter(ASSETS))}")
            return ClipReward(name, load_clip(path), 100.0)
        case "pickscore":
            folder, processor = _pickscore(path)
            clip = load_clip_folder(name, folder, processor)
            return ClipReward(name, clip, float(clip.model.logit_scale.detach().exp()))
        case "aesthetic":
            head = load_linear_stack(downloaded(base, path))
            return Aesthetic(name, load_clip(str(model_folder(AESTHETIC_CLIP, "reward 'aesthetic':"))), head)
        case "hpsv2" | "hpsv2.1":
            return _hps(name, downloaded(base, path))
        case "image_reward":
            file = downloaded(base, path)
            net = load_image_reward(file, model_folder(IMAGE_REWARD_WORDS, "reward 'image_reward': tokenizer"))
            return Reader(name, net, _preprocess(net.side))
        case "mps":
            file = downloaded(base, path)
            clip_of_mps = model_folder(MPS_CLIP, "reward 'mps': config, tokenizer and processor of")
            return Reader(name, load_mps(file, clip_of_mps), load_preprocess(clip_of_mps))
    raise FewstepError("reward", repr(name), f"clip@FOLDER, {', '.join(REWARDS)}, or package.module:callable")


def load_training_reward(name: str, device: torch.device, side: int, with_prompts: bool) -> Reward:
    """A reward on its device, tried out on two images of `side` pixels; ValueError, in one sentence, where it cannot teach."""
    reward = load_reward(name).to(device)
    images = torch.linspace(0, 1, 6 * side * side, device=device).view(2, 3, side, side)
    reward.try_out(images, ["a", "b"] if with_prompts else None)
    return reward


def qualified_name(name: str) -> str:
    """module.name of what an own reward's name leads to, or of its class."""
    function = own_function(name)
    of: Any = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return f"{of.__module__}.{of.__qualname__}"


def reward_weights(name: str) -> Path | None:
    """The file that identifies a reward, None for the user's own; ValueError where it is missing."""
    if is_own_reward(name):
        own_function(name)
        return None
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


HPS_MODEL = "ViT-H-14"


def _hps(name: str, file: Path) -> Hps:
    try:
        import open_clip
    except ImportError:
        raise MissingError(
            f"reward {name!r}", "no open_clip", "its package", "pip install 'fewstep[open_clip]'"
        ) from None
    model = open_clip.create_model(HPS_MODEL, pretrained=None)
    try:
        model.load_state_dict(read_tensors(file))
    except RuntimeError as e:
        raise not_weights(file, e, f"the weights of {HPS_MODEL}") from None
    side = model.visual.image_size
    return Hps(name, model, open_clip.get_tokenizer(HPS_MODEL), _preprocess(side if isinstance(side, int) else side[0]))
