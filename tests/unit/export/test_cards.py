"""The texts of cards are those of cards.json, byte for byte: hubs, users and update_card read them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from fewstep.export import card
from fewstep.export.card import Call, render, scores_text, timesteps_text
from fewstep.export.guidance_text import adapter_guidance, pipeline_guidance, scale_text
from fewstep.export.lora import Update, card_text, code_text

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "cards.json").read_text(encoding="utf-8"))
VERSIONS = {"fewstep": "0.1.0", "torch": "2.0"}
LCM: Any = type("LCMScheduler", (), {"config": {"original_inference_steps": 8}})()
EULER: Any = type("EulerScheduler", (), {"config": {}})()
ROWS: list[dict[str, Any]] = [
    {"model": "student", "steps": 4, "guidance_scale": 2.0, "fid": 3.14159, "clip_score": None, "images": 500},
    {"model": "teacher", "steps": 25, "guidance_scale": None, "fid": 1.0, "images": 500},
]


class Loads(LoraBaseMixin):
    """A pipeline with a loader of adapters."""


def teacher(kind: type, dtype: torch.dtype) -> Any:
    return SimpleNamespace(pipeline=kind(), denoiser=SimpleNamespace(net=SimpleNamespace(dtype=dtype)))


def update(names: str, shift: bool, rank: int, alpha: float) -> Update:
    modules = {name: torch.zeros(1) for name in names}
    return Update(rank, alpha, modules, modules, {"a": torch.zeros(1)} if shift else {})


def test_card_of_a_pipeline() -> None:
    settings = {
        "method": "dmd2", "paper": "arXiv 1", "teacher": "fashion", "data": "fashion, 60,000 images", "license": "mit",
        "prompt": "a bag", "scores": ROWS, "versions": VERSIONS, "training_time": "3 h", "iterations": 10, "nothing": None,
    }  # fmt: skip
    call = Call((1, 2, 4), ['it\'s a "bag"'])
    timesteps = timesteps_text(LCM, {1: [999], 2: [999, 499.5]})
    text = render(settings, call, guidance="Guidance: none.", dtype="fp32", timesteps=timesteps)
    assert text == EXPECTED["pipeline"]


def test_card_of_a_pipeline_of_labels() -> None:
    call = Call((8, 2), [], {"class_labels": [0], "guidance_scale": 1.0})
    timesteps = timesteps_text(EULER, {8: [1.0, 0.123456789]})
    text = render(
        {"versions": VERSIONS}, call, guidance="Guidance: g", dtype="bf16", timesteps=timesteps, refuses=False
    )
    assert text == EXPECTED["pipeline of labels"]


def test_scores() -> None:
    assert scores_text(ROWS, {"name": "coco", "images": 500}) == EXPECTED["scores"]


def test_cards_of_adapters() -> None:
    call = Call((1, 2, 4), ["a bag"], {"guidance_scale": 1.0})
    code = code_text(teacher(Loads, torch.float32), "LCMScheduler", "base/model", "unet", call)
    settings = {"method": "lcm", "paper": "arXiv 2", "teacher": "some/teacher", "license": "mit"}
    text = card_text(
        settings, update("ab", False, 4, 8.0), code, call, dtype="fp16", guidance=adapter_guidance(2.0),
        timesteps=timesteps_text(LCM, {1: [999]}),
    )  # fmt: skip
    assert text == EXPECTED["adapters"]


def test_card_of_adapters_that_peft_loads() -> None:
    call = Call((3,), [], {"class_labels": [0]})
    code = code_text(teacher(object, torch.bfloat16), "EulerScheduler", "base/model", "transformer", call)
    text = card_text(
        {}, update("", True, 2, 1.5), code, call, dtype="bf16", guidance=adapter_guidance(None),
        timesteps=timesteps_text(EULER, {3: [1, 2, 3]}),
    )  # fmt: skip
    assert text == EXPECTED["adapters by peft"]


@pytest.mark.parametrize("scale", [2.0, {999: 3.0, 499: 1.5}])
def test_guidance_scales_in_words(scale: Any) -> None:
    assert scale_text(scale) == EXPECTED[f"scale {scale}"]


def test_paragraphs_on_guidance() -> None:
    def student(width: int | None) -> Any:
        return SimpleNamespace(net=SimpleNamespace(config={"time_cond_proj_dim": width}))

    found = [
        pipeline_guidance(student(width), scale, "FluxPipeline", passes)
        for width in (None, 8)
        for scale in (None, 2.0)
        for passes in (False, True)
    ]
    assert found == EXPECTED["guidance"]


def test_templates_are_complete() -> None:
    names = {path.stem for path in (Path(card.__file__).parent / "templates").glob("*.md")}
    assert names == {"pipeline", "pipeline_code", "lora", "lora_code", "lora_code_peft"}
