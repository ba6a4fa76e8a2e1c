"""Evaluation: how good images are, by a named protocol, the same on any number of processes.

A *protocol* (YAML, `protocols/`) says what must be equal before two scores may be compared: images, seed, conditions,
features, views, references. `evaluate_protocol` samples a diffusers pipeline at several step counts and returns one row of
scores and costs for each; `evaluate_images` scores a folder of images.

    protocol, describe      settings, their hash, and the description in a report
    conditions, real_images, references, statistics     what images show and what they are compared with
    generate                images out of any pipeline, by (seed, index) alone
    comparators, scores     loaded networks, and the scores of one row
    rows, run               one row; all rows
    resume, reuse           finished batches of an interrupted evaluation; rows of an earlier report
    report, tables, grid    evaluation.json, Markdown, a picture
    compare                 two pipelines, image by image
    models/ metrics/ rewards/   networks, distances, preference models

Evaluation imports `teachers`, `data`, `config` and what lies below; training, reports, plans and the command line may import
this package. Methods take rewards from `rewards` through the trainer.
"""

from fewstep.assets import recommended_guidance_scale
from fewstep.evaluate.describe import describe_protocol, protocol
from fewstep.evaluate.generate import sample
from fewstep.evaluate.grid import grid
from fewstep.evaluate.metrics.frechet import FrechetDistance, frechet_distance
from fewstep.evaluate.models.clip import ClipScore, load_clip
from fewstep.evaluate.models.features import ImageFeatures, load_features
from fewstep.evaluate.protocol import PathOverrides, Protocol, load_protocol
from fewstep.evaluate.report import Row, write_report
from fewstep.evaluate.reuse import REMEASURED, EarlierScores, earlier_rows, fingerprints
from fewstep.evaluate.rewards.load import Reward, load_reward
from fewstep.evaluate.run import evaluate, evaluate_images, evaluate_protocol, first_images
from fewstep.evaluate.statistics import Moments, load_moments, save_moments
from fewstep.evaluate.tables import format_table

__all__ = [
    "REMEASURED",
    "ClipScore",
    "EarlierScores",
    "FrechetDistance",
    "ImageFeatures",
    "Moments",
    "PathOverrides",
    "Protocol",
    "Reward",
    "Row",
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
