"""The command `fewstep`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli.main import main


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Options that score against the embedded images, with the asset's classifier and CLIP."""
    import torch

    from fewstep.data.fashion import load_embedded
    from fewstep.evaluate import load_features, save_moments
    from fewstep.evaluate.statistics import moments

    images = torch.from_numpy(load_embedded()[0])[::10].contiguous()
    save_moments(moments(load_features("fashion")(images)), tmp_path / "real.safetensors")
    (tmp_path / "prompts.txt").write_text("a photo of a bag\na photo of a dress\n")
    paths = ["--reference", str(tmp_path / "real.safetensors"), "--prompts", str(tmp_path / "prompts.txt")]
    return [*paths, "--features", "fashion", "--clip", "fashion"]


def test_evaluate_writes_a_report(sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "evaluation.json"
    main(["evaluate", "fashion", *sources, "--steps", "1", "--num-images", "8", "--output", str(output)])
    report = json.loads(output.read_text())
    (row,) = report["results"]
    assert row["model"] == report["protocol"]["pipeline"] == "fashion"
    assert (row["steps"], row["images"], row["network_evaluations"]) == (1, 8, 2)
    assert "| fashion |" in capsys.readouterr().out


def test_sample_writes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    output = tmp_path / "x.png"
    prompts = ["a photo of a bag", "a photo of a dress"]
    main(["sample", "fashion", "--prompt", *prompts, "--num-images", "3", "--steps", "1", "--output", str(output)])
    assert Image.open(output).size == (3 * 34 - 2, 2 * 34 - 2)


def test_a_wrong_name_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="reference: found 'coco'; expected fashion, a path"):
        main(["evaluate", "fashion", "--reference", "coco", "--features", "fashion"])
    with pytest.raises(SystemExit, match=r"pipeline: found '.*nowhere'; expected a local folder"):
        main(
            ["sample", str(tmp_path / "nowhere"), "--prompt", "x", "--steps", "1", "--output", str(tmp_path / "x.png")]
        )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sample", "--steps", "0"], "argument --steps: found 0; expected whole numbers of 1 or more"),
        (["sample", "--steps", "1", "--num-images", "-2"], "argument --num-images: found -2; expected "),
        (["evaluate", "--steps", "1", "x"], "argument --steps: found x; expected whole numbers of 1 or more"),
        (["evaluate", "--num-images", "1"], "argument --num-images: found 1; expected whole numbers of 2 or more"),
        (["evaluate", "--batch-size", "0"], "argument --batch-size: found 0; expected "),
    ],
)
def test_counts_are_checked(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([words[0], "fashion", *words[1:], "--output", "x.png"])
    assert expected in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_reported_first(tmp_path: Path) -> None:
    """No pipeline is loaded before: the one that is named does not exist."""
    (tmp_path / "file").write_text("")
    for output, expected in (
        (tmp_path / "file" / "x.png", "File exists"),
        (tmp_path, "a folder; expected a file"),
        (tmp_path / "x.xyz", r"expected an image file, such as .*x\.png"),
    ):
        with pytest.raises(SystemExit, match=f"^fewstep sample: .*{expected}"):
            main(["sample", "nowhere", "--prompt", "x", "--steps", "1", "--output", str(output)])
    with pytest.raises(SystemExit, match=r"^fewstep evaluate: .*File exists"):
        main(["evaluate", "nowhere", "--output", str(tmp_path / "file" / "x.json")])


def test_help_loads_no_torch() -> None:
    code = """
import sys
from fewstep.cli.main import main
try:
    main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_keys_stand_before_or_after_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong key is answered as a key, which shows that it was read as one."""
    recipe = "configs/fashion/trajectory.yaml"
    for words in (["batch_sise=2", "--json"], ["--json", "batch_sise=2"]):
        with pytest.raises(SystemExit, match="batch_sise: unknown key"):
            main(["plan", recipe, *words])
    with pytest.raises(SystemExit, match="2"):
        main(["plan", recipe, "--jason", "x"])
    assert "unrecognized arguments: --jason" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a", "b", "batch_sise=2", "--output", "x.json"])
