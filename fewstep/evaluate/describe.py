"""The description of a protocol in a report: name, hash, settings, and the digests of its files."""

from pathlib import Path

from fewstep import io
from fewstep.assets import ASSETS, asset_path
from fewstep.data.hub import is_dataset
from fewstep.evaluate.conditions import prompts_file
from fewstep.evaluate.models.clip import clip_folder
from fewstep.evaluate.models.features import features_weights
from fewstep.evaluate.protocol import NO_OVERRIDES, ClipScoring, Comparison, PathOverrides, Protocol, is_own_reward
from fewstep.evaluate.references import protocol_of, reference_path, resolve, stored_moments
from fewstep.evaluate.statistics import SUFFIXES, Statistics, load_statistics

LIBRARIES = ("torch", "diffusers", "transformers", "torchmetrics")


def _weights(file: Path | None) -> str | None:
    return io.sha256_of_file(file) if file is not None and file.exists() else None


def _clip_weights(scoring: ClipScoring | None) -> Path | None:
    if scoring is None or scoring.model is None:
        return None
    if scoring.backend == "open_clip":
        return Path(scoring.pretrained) if scoring.pretrained and Path(scoring.pretrained).is_file() else None
    return clip_folder(scoring.model) / "model.safetensors"


def _rewards(protocol: Protocol) -> dict[str, str | None]:
    from fewstep.evaluate.rewards.load import qualified_name, reward_weights

    return {
        name: qualified_name(name) if is_own_reward(name) else _weights(reward_weights(name))
        for name in protocol.rewards
    }


def _clip_words(scoring: ClipScoring | None) -> str | None:
    if scoring is None:
        return None
    prefix = f", after the words {scoring.prefix!r}" if scoring.prefix else ""
    return f"mean of {scoring.scale:g} * " + ("max(cosine, 0)" if scoring.clamp else "cosine") + prefix


def _reference(name: str, c: Comparison, overrides: PathOverrides) -> dict[str, object]:
    path = reference_path(name, c, overrides)
    if path is None:
        return {}
    if path in ASSETS and stored_moments(path, c) is None:
        return {"reference": path, "reference_images": "all images in the package"}
    file = asset_path(path) / "reference.safetensors" if path in ASSETS else Path(path)
    if not file.is_file():
        return {
            "reference": path,
            "reference_images": f"all images of the {'data set' if is_dataset(path) else 'folder'}",
        }
    statistics = load_statistics(file) if file.suffix in SUFFIXES else Statistics(None)
    known = path in ASSETS or "features" in statistics.metadata
    return {
        "reference": path,
        "reference_images": None if statistics.moments is None else statistics.moments.count,
        "reference_sha256": io.sha256_of_file(file),
        # Statistics of other libraries do not name their network.
        "reference_features": "those of this evaluation" if known else "not recorded in the file",
    }


def describe_protocol(
    protocol: Protocol, *, name: str = "custom", batch_size: int = 100, overrides: PathOverrides = NO_OVERRIDES
) -> dict[str, object]:
    """The description of a protocol, equal for scores that may be compared: its name, hash, settings, and digests of its files.

    Settings of all comparisons are under `definition`; those of the first are flat beside it. A reward of the user's own
    has no file to hash, and is there under its qualified name.
    """
    first = protocol.comparisons[0] if protocol.comparisons else None
    prompts = prompts_file(name, protocol.conditions, overrides)
    text = {
        "fashion": "fashion: first caption, class = index % 10",
        "labels": f"labels, {protocol.conditions.draw}",
        "none": "none",
    }
    features = None if first is None else first.features
    return {
        "name": name,
        "hash": protocol.hash(),
        **(
            {"reference": None, "reference_images": None}
            | ({} if first is None else _reference(name, first, overrides))
        ),
        "features": features,
        "features_sha256": None if features is None else _weights(features_weights(features)),
        "covariance": "float64, divided by n - 1",
        "clip": None if protocol.clip is None else protocol.clip.model,
        "clip_sha256": _weights(_clip_weights(protocol.clip)),
        "clip_score": _clip_words(protocol.clip),
        **({"rewards_sha256": _rewards(protocol)} if protocol.rewards else {}),
        "images": protocol.images,
        "seed": protocol.seed,
        "batch_size": batch_size,
        "noise": "one CPU generator per image from (seed, index)",
        "prompts": str(prompts) if prompts else text[protocol.conditions.source],
        "prompts_sha256": _weights(prompts),
        "uint8": protocol.uint8,
        "versions": io.versions(*LIBRARIES),
    } | ({} if name == "custom" else {"definition": protocol.model_dump(mode="json")})


def protocol(
    *,
    reference: str,
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    features: str | None = None,
    clip: str | None = None,
    prompts: Path | str | None = None,
) -> dict[str, object]:
    """`describe_protocol` of the unnamed protocol; arguments as for `evaluate`."""
    sources = resolve(reference, features, clip, prompts)
    return describe_protocol(protocol_of(sources, num_images=num_images, seed=seed), batch_size=batch_size)
