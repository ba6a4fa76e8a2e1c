"""`fewstep.distill`: settings from arguments, pipelines and samples in memory, errors, callbacks."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import fewstep
from fewstep.cli.main import main
from fewstep.errors import FewstepError, MissingError
from fewstep.training.callbacks import Callback

QUICK = {
    "max_iterations": 2, "batch_size": 2, "train": {"cpu_threads": 1, "mixed_precision": "no"}, "log": {"every": 1},
}  # fmt: skip
OWN = Path(__file__).parents[2] / "examples" / "own_method.py"


class Heard(Callback):
    """Keeps the names of what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_log(self, record: Mapping[str, object]) -> None:
        self.calls.append(f"log {record['iteration']}")

    def on_checkpoint(self, folder: Path, iteration: int) -> None:
        self.calls.append(f"checkpoint {iteration}")

    def on_end(self, run: fewstep.Run) -> None:
        self.calls.append(f"end {run.iteration}")


def test_prompts_in_memory_and_callbacks(tiny_sd: Path, tmp_path: Path) -> None:
    heard = Heard()
    run = fewstep.distill(
        str(tiny_sd), "boot", ["a coat", "a bag"], output_dir=tmp_path / "run", steps=2, n_sub=4, callbacks=[heard],
        evaluate={"steps": [2], "teacher_steps": [2], "num_images": 2, "batch_size": 2}, **QUICK,
    )  # fmt: skip
    assert run.folder == tmp_path / "run" and run.iteration == 2
    assert {row["model"] for row in run.scores} == {"student", "teacher"}
    image = run.pipeline("a coat", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(torch.as_tensor(image)).all()
    assert heard.calls == ["log 1", "log 2", "checkpoint 2", "end 2"]
    assert "source: memory" in (run.folder / "config.yaml").read_text()
    written = (run.folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(run.folder / "pipeline")
    main(["export", str(run.folder)])
    assert (run.folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == written
    with pytest.raises(SystemExit, match=r"fewstep export: run: found .*, which has no checkpoint"):
        shutil.rmtree(run.folder / "checkpoints")
        main(["export", str(run.folder)])


def test_images_in_memory(tiny_sd: Path, tmp_path: Path) -> None:
    items = [{"image": Image.new("RGB", (40, 32), color), "text": color} for color in ("red", "green", "blue")]
    run = fewstep.distill(str(tiny_sd), "lcm", items, output_dir=tmp_path, steps=4, grid={"points": 8}, **QUICK)
    assert (run.folder / "pipeline" / "model_index.json").is_file() and not run.scores


def test_a_pipeline_in_memory(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    run = fewstep.distill(
        pipeline, "boot", ["a coat", "a bag"], output_dir=tmp_path / "run", steps=2, n_sub=4, **QUICK
    )  # fmt: skip
    assert run.pipeline("a coat", num_inference_steps=2).images
    assert f"teacher: {tiny_sd}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_method_of_ones_own_trains_resumes_and_exports(tiny_sd: Path, tmp_path: Path) -> None:
    name = f"{OWN}:OneStep"
    whole = fewstep.distill(
        str(tiny_sd),
        name,
        ["a coat", "a bag"],
        output_dir=tmp_path / "a",
        teacher_steps=2,
        checkpoint={"every": 1},
        **QUICK,
    )
    resumed = fewstep.distill(
        str(tiny_sd), name, ["a coat", "a bag"], output_dir=tmp_path / "b", teacher_steps=2,
        checkpoint={"resume": str(tmp_path / "a" / "checkpoints" / "1")}, **QUICK,
    )  # fmt: skip
    first, second = (list(run.pipeline.unet.parameters()) for run in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stpes": 4}, r"^stpes: found an unknown setting; .* did you mean 'steps'\?"),
        ({"batch_sise": 4}, r"did you mean 'batch_size'\?"),
        ({"ema_decay": 0.9}, r"did you mean train=\{'ema_decay': \.\.\.\}\?"),
        (
            {"train": {"ema_dekay": 0.9}},
            r"distill: 1 problem\n  train\.ema_dekay: unknown key; did you mean 'ema_decay'\?",
        ),
        ({"steps": "four"}, r"method\.steps: found text 'four'; expected"),
        ({"method": "bot"}, r"method\.name: found 'bot'; .* did you mean 'boot'\?"),
        ({"data": "./nothing.txt"}, r"data: found '\./nothing\.txt', which does not exist"),
        ({"recipe": "fashion/bot"}, r"recipe: found 'fashion/bot'; .* Did you mean fashion/boot"),
        ({"teacher": "./nowhere"}, r"teacher.*nowhere"),
    ],
)
def test_messages(arguments: dict[str, object], expected: str, tmp_path: Path) -> None:
    values = {"teacher": "fashion", "method": "boot", "output_dir": tmp_path} | arguments
    with pytest.raises(FewstepError, match=expected):
        fewstep.distill(**values)


def test_a_stopped_run_has_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="stopped at iteration 3"):
        fewstep.Run(tmp_path, 3, finished=False).pipeline  # noqa: B018
