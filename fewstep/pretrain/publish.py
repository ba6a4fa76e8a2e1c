"""Copy a finished run into an asset folder and write its data card."""

import shutil
import sys
from pathlib import Path

from fewstep import io

FOLDERS = ("pipeline", "clip", "classifier")
FILES = ("reference.safetensors", "images.parquet", "asset.json", "samples.png")

CARD = """# fashion

A small text-to-image Stable Diffusion pipeline (32x32 pixels, ten classes of garments), with the
classifier and CLIP it is measured by. `asset.json` holds the recommended guidance scale and every figure.

## Source and licence

Trained on the 60,000 training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist)
(Zalando SE, MIT licence), zero-padded from 28x28 to 32x32, three equal channels. `images.parquet` holds
2,000 of them, 200 per class, under the same licence. The weights are trained from scratch on these images.

## How it was made

    apt-get install dataset-fashion-mnist
    python train/teacher.py --config configs/teachers/fashion.yaml
    python -m fewstep.pretrain.publish runs/teachers/fashion fewstep/assets/fashion
    fewstep evaluate fashion --steps 1 2 3 4 6 8 50 --name teacher \\
        --output fewstep/assets/fashion/evaluation.json
    python -m fewstep.pretrain.publish runs/teachers/fashion fewstep/assets/fashion

The last line once more, for this card.

{note}

| path | made by | content |
|---|---|---|
| `classifier/` | `fewstep/pretrain/classifier.py` | FID features: its pooled output |
| `clip/` | `fewstep/pretrain/clip.py` | CLIPModel, tokenizer of the caption words, image processor |
| `pipeline/` | `autoencoder.py`, `denoiser.py` | VAE to 8x8x4, UNet, text tower of `clip/` |
| `reference.safetensors` | `reference.py` | mean and covariance of the features of all training images |
| `images.parquet` | `reference.py` | real training images with label and caption |
| `evaluation.json` | `fewstep evaluate` | scores of the teacher, which runs take (`evaluate.teacher_from`) |
| `samples.png` | `measure.py` | one row per class, then test images above their VAE reconstructions |

![samples](samples.png)

## Figures

FID is measured in the classifier's features against all training images; it compares only within this asset.

{figures}

## Checksums (sha256)

| file | bytes | sha256 |
|---|---|---|
{checksums}
"""


def flat(figures: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in figures.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name} / ") if isinstance(value, dict) else [(name, value)]
    return rows


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file of the asset but its card, by path."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    return {str(f.relative_to(folder)): io.sha256_of_file(f) for f in files}


def write_card(folder: Path) -> None:
    """An optional `note` in asset.json says where the weights differ from what the command gives."""
    asset = io.read_json(folder / "asset.json")
    figures = [f"| {name} | {value} |" for name, value in flat(asset["figures"])]
    sums = [f"| {f} | {(folder / f).stat().st_size} | `{s}` |" for f, s in checksums(folder).items()]
    table = "\n".join(["| figure | value |", "|---|---|", *figures])
    text = CARD.format(note=asset.get("note", ""), figures=table, checksums="\n".join(sums))
    io.write_text(text, folder / "README.md")


def publish(run_folder: Path, asset_folder: Path) -> None:
    """Replace parts of the asset by those that the run has finished."""
    asset_folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        if (run_folder / name).exists():
            shutil.rmtree(asset_folder / name, ignore_errors=True)
            shutil.copytree(run_folder / name, asset_folder / name)
    for name in FILES:
        if (run_folder / name).exists():
            shutil.copy2(run_folder / name, asset_folder / name)
    for file in asset_folder.rglob("*"):
        if file.is_file():
            # safetensors writes for the owner alone; an installed package is read by everybody.
            file.chmod(0o644)
    if (asset_folder / "asset.json").exists():
        write_card(asset_folder)


if __name__ == "__main__":
    publish(Path(sys.argv[1]), Path(sys.argv[2]))
