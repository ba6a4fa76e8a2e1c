"""Scoring: features, Fréchet distance, CLIP score, and the evaluation of a pipeline."""

from fewstep.evaluate.clip_score import ClipScore, load_clip
from fewstep.evaluate.earlier import MEASURED_ANEW, Earlier, earlier_rows, fingerprints
from fewstep.evaluate.features import ImageFeatures, load_features
from fewstep.evaluate.frechet import FrechetDistance, Moments, frechet_distance, load_moments, save_moments
from fewstep.evaluate.generate import sample
from fewstep.evaluate.protocol import Protocol, load_protocol
from fewstep.evaluate.reference import Given
from fewstep.evaluate.report import (
    describe_protocol,
    format_table,
    grid,
    protocol,
    recommended_guidance_scale,
    write_report,
)
from fewstep.evaluate.rewards import Reward, load_reward
from fewstep.evaluate.run import evaluate, evaluate_images, evaluate_protocol, first_images

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
