"""Scoring: features, Fréchet distance, CLIP score, and the evaluation of a pipeline."""

from fewstep.evaluate.generate import sample
from fewstep.evaluate.metrics.frechet import FrechetDistance, Moments, frechet_distance, load_moments, save_moments
from fewstep.evaluate.models.clip import ClipScore, load_clip
from fewstep.evaluate.models.features import ImageFeatures, load_features
from fewstep.evaluate.protocol import Protocol, load_protocol
from fewstep.evaluate.references import Given
from fewstep.evaluate.reuse import MEASURED_ANEW, Earlier, earlier_rows, fingerprints
from fewstep.evaluate.rewards.load import Reward, load_reward
from fewstep.evaluate.run import evaluate, evaluate_images, evaluate_protocol, first_images
from fewstep.evaluate.tables import (
    describe_protocol,
    format_table,
    grid,
    protocol,
    recommended_guidance_scale,
    write_report,
)

__all__ = [
    "MEASURED_ANEW",
    "ClipScore",
    "Earlier",
    "FrechetDistance",
    "Given",
    "ImageFeatures",
    "Moments",
    "Protocol",
    "Reward",
    "describe_protocol",
    "earlier_rows",
    "evaluate",
    "evaluate_images",
    "evaluate_protocol",
    "fingerprints",
    "first_images",
    "format_table",
    "frechet_distance",
    "grid",
    "load_clip",
    "load_features",
    "load_moments",
    "load_protocol",
    "load_reward",
    "protocol",
    "recommended_guidance_scale",
    "sample",
    "save_moments",
    "write_report",
]
