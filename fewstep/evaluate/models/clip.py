"""CLIP score: how well images fit their prompts (Hessel et al. 2021, without the paper's factor 2.5)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Metric

from fewstep.assets import ASSETS, asset_path
from fewstep.errors import FewstepError, MissingError
from fewstep.evaluate.models.features import Preprocess, load_preprocess, model_folder
from fewstep.evaluate.models.view import apply_view
from fewstep.evaluate.protocol import ClipScoring

if TYPE_CHECKING:
    from open_clip import CLIP
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.modeling_outputs import BaseModelOutputWithPooling


def _embedding(output: "Tensor | BaseModelOutputWithPooling") -> Tensor:
    # transformers 4 returns the projected embedding, transformers 5 an output that holds it as its pooled output.
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(embedding if embedding.dtype == torch.float64 else embedding.float(), dim=-1)


class ClipModule(nn.Module):
    """A CLIP with its tokenizer and preprocessing: unit embeddings [B, D] of images and texts, in float32, or its own float64."""

    name: str

    @abstractmethod
    def image_embeddings(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, D]."""

    @abstractmethod
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """B texts -> [B, D]; a long text loses its last words, never the end token at which CLIP reads it."""


class Clip(ClipModule):
    """A transformers CLIPModel."""

    def __init__(self, name: str, model: "CLIPModel", tokenizer: "CLIPTokenizer", preprocess: Preprocess) -> None:
        super().__init__()
        self.name, self.model, self.tokenizer, self.preprocess = name, model, tokenizer, preprocess
        self.eval().requires_grad_(False)

    def see(self, images: Tensor) -> Tensor:
        """uint8 or float [B, 3, H, W] in [0, 255] -> [B, D], with the gradient to the images."""
        pixels = self.preprocess(images.to(self.preprocess.mean.device))
        return _embedding(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        return self.see(images)

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.preprocess.mean.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _embedding(features)


class OpenClip(ClipModule):
    """A model of open_clip with its own tokenizer and, image by image, its own preprocessing of PIL images."""

    def __init__(
        self,
        name: str,
        model: "CLIP",
        tokenizer: "Callable[[list[str]], Tensor]",
        preprocess: "Callable[[Image.Image], Tensor]",
    ) -> None:
        super().__init__()
        self.name, self.model, self.tokenizer, self.preprocess = name, model, tokenizer, preprocess
        self.register_buffer("anchor", torch.zeros(()), persistent=False)
        self.eval().requires_grad_(False)

    anchor: Tensor

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images.cpu()]
        pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.anchor)
        return _embedding(self.model.encode_image(pixels))

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        return _embedding(self.model.encode_text(self.tokenizer(list(texts)).to(self.anchor.device)))


def clip_folder(name: str) -> Path:
    """An asset's CLIP, or the folder of that name."""
    return asset_path(name) / "clip" if name in ASSETS else model_folder(name, "clip")


def load_clip(name: str) -> Clip:
    """`fashion`, or the folder or cached hub id of a transformers CLIPModel with tokenizer and image processor."""
    folder = clip_folder(name)
    return load_clip_folder(name, folder, folder)


def load_clip_folder(name: str, folder: Path, processor: Path) -> Clip:
    """The CLIPModel of a folder, with the tokenizer and the image processor of a folder that may be another."""
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(processor, local_files_only=True)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise FewstepError("clip", f"{name!r}, which cannot be loaded ({reason})", "a transformers CLIPModel") from None
    return Clip(name, model, tokenizer, load_preprocess(processor))


def load_open_clip(name: str, pretrained: str | None) -> OpenClip:
    """A model of open_clip by its name and its tag or file of weights; ValueError, in one sentence, for what is not there."""
    try:
        import open_clip
    except ImportError:
        raise MissingError("clip.backend", "open_clip", "its package", "pip install 'fewstep[open_clip]'") from None
    if pretrained is None:  # open_clip would warn and score with random ones
        raise FewstepError("clip.pretrained", "null", f"weights of {name!r}")
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained, weights_only=True)
    except Exception as e:  # its reasons: an unknown name or tag, no network, a broken file
        reason = str(e).strip().splitlines()[0].rstrip(".")
        source = open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", "").rstrip("/")
        where = f"`hf download {source}` puts them into the hub's cache" if source.count("/") == 1 else None
        found = f"{name!r} with weights {pretrained!r}, which cannot be loaded by open_clip ({reason})"
        raise FewstepError("clip", found, "a model of open_clip and a tag or file of its weights", where) from None
    return OpenClip(f"{name}, {pretrained}", model, open_clip.get_tokenizer(name), preprocess)


def load_scoring(scoring: ClipScoring) -> ClipModule:
    """The model of a protocol's CLIP score; ValueError where the protocol leaves the choice open."""
    if scoring.model is None:
        raise FewstepError("clip", "no model in the protocol", "one", "Choose it with --clip FOLDER, or --clip none")
    if scoring.backend == "open_clip":
        return load_open_clip(scoring.model, scoring.pretrained)
    return load_clip(scoring.model)


class ClipScore(Metric):
    """Mean over pairs of scale * cosine, by default 100 * max(cosine, 0); sums over the processes of torch.distributed."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    count: Tensor
    sum: Tensor

    def __init__(self, clip: ClipModule, scoring: ClipScoring | None = None, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.clip, self.scoring = clip, scoring or ClipScoring(model=clip.name)
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str] = ()) -> None:
        """uint8 images [B, 3, H, W] and their B prompts; or the cosines [B] of both, where they are known."""
        cosines = (self.cosines(images, prompts) if images.dtype == torch.uint8 else images).double()
        if cosines.ndim != 1:
            raise FewstepError("images", f"{images.dtype} {list(images.shape)}", "uint8 [B, 3, H, W]")
        if not cosines.isfinite().all():
            raise FewstepError(
                "clip", "a score that is not finite", "finite scores", "Check the images and the model's weights"
            )
        self.sum += (self.scoring.scale * (cosines.clamp(min=0) if self.scoring.clamp else cosines)).sum()
        self.count += len(cosines)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines [B]; the score's state is unchanged."""
        if len(images) != len(prompts):
            raise FewstepError("prompts", f"{len(prompts)} for {len(images)} images", "as many as images")
        texts = [self.scoring.prefix + prompt for prompt in prompts]
        seen = self.clip.image_embeddings(apply_view(images, self.scoring.view))
        return (seen * self.clip.text_embeddings(texts)).sum(1)

    def compute(self) -> Tensor:
        return self.sum / self.count
