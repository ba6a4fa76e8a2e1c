"""Rewards of images: against the models' own calls and, for ImageReward, numbers of its library; gradients; what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rewards import small_rewards
from torch import Tensor

from fewstep.cli import main
from fewstep.evaluate import load_clip, load_reward
from fewstep.evaluate.reward_files import DOWNLOADS, PICKSCORE, PICKSCORE_PROCESSOR
from fewstep.fashion import load_embedded

PROMPTS = ["a bag", "", "a very long prompt of words that never ends " * 9]


def tiny_images() -> Tensor:
    """uint8 [3, 3, 32, 32]."""
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3), dtype=np.uint8)).permute(
        0, 3, 1, 2
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for $FEWSTEP_DATA in which every reward finds a small network where it looks for the real one."""
    root = tmp_path_factory.mktemp("data")
    small_rewards(root)
    return root


@pytest.fixture
def found(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_DATA", str(data))
    return data / "models"


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Ten real images, one of a class."""
    return torch.from_numpy(load_embedded()[0])[::200].contiguous()


def test_image_reward_is_that_of_its_library(found: Path) -> None:
    """Of image-reward 1.5's own network beside transformers 4.36, given the same weights; rows are images, columns prompts."""
    theirs = [
        [-0.7674941420555115, -0.6227942109107971, -0.5045087337493896],
        [-1.0874983072280884, -1.1428886651992798, -0.8031644225120544],
        [-1.3544472455978394, -1.1884804964065552, -1.2395268678665161],
    ]
    reward, pixels = load_reward("image_reward"), tiny_images() / 255
    ours = torch.stack([reward(pixels, [prompt] * 3) for prompt in PROMPTS], 1)
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-5)


def test_pickscore_is_the_models_own_logit(found: Path, images: Tensor) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    prompts = ["a photo of a bag"] * 5 + ["a photo of a dress"] * 5
    model, tokenizer = (
        CLIPModel.from_pretrained(found / PICKSCORE),
        CLIPTokenizer.from_pretrained(found / PICKSCORE_PROCESSOR),
    )
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        wanted = model(pixel_values=images.float() / 127.5 - 1, **tokens).logits_per_image.diagonal()
    torch.testing.assert_close(load_reward("pickscore")(images / 255, prompts), wanted, rtol=1e-4, atol=1e-4)


def test_the_aesthetic_score_is_linear_in_the_unit_embedding(found: Path, images: Tensor) -> None:
    state = torch.load(found / DOWNLOADS["aesthetic"].file, weights_only=True)
    x = load_clip("fashion").image_embeddings(images)
    for i in (0, 2, 3):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    got = load_reward("aesthetic")(images / 255, None)
    torch.testing.assert_close(got, x[:, 0], rtol=1e-4, atol=1e-5)
    assert got.std() > 0


def test_hps_is_open_clips_cosine(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip: Any = pytest.importorskip("open_clip")
    from PIL import Image

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "fewstep-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "fewstep-hps.json")
    monkeypatch.setattr("fewstep.evaluate.rewards.HPS_MODEL", "fewstep-hps")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("fewstep-hps")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    pixels = torch.stack([preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images[:3]])
    model.eval()
    with torch.no_grad():
        seen, read = model.encode_image(pixels), model.encode_text(open_clip.get_tokenizer("fewstep-hps")(PROMPTS))
    wanted = torch.nn.functional.cosine_similarity(seen, read)
    got = load_reward(f"hpsv2.1@{tmp_path / 'hps.pt'}")(images[:3] / 255, PROMPTS)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not hold the weights of fewstep-hps"):
        load_reward(f"hpsv2@{tmp_path / 'other.pt'}")


@pytest.mark.parametrize("name", ["clip@fashion", "pickscore", "aesthetic", "image_reward"])
def test_a_reward_rises_along_its_gradient(name: str, found: Path, images: Tensor) -> None:
    reward = load_reward(name)
    prompts = [f"a photo of a {word}" for word in ("bag", "dress", "coat")]
    x = (0.2 + 0.6 * images[:3].double() / 255).requires_grad_()
    before = reward(x, prompts)
    assert before.shape == (3,) and before.dtype == torch.float32
    (gradient,) = torch.autograd.grad(before.sum(), x)
    assert gradient.dtype == x.dtype and not any(p.requires_grad for p in reward.parameters())
    # The change over a small step is the gradient's, image by image: what is drawn of one is of no account to another.
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(3, 1, 1, 1)
    with torch.no_grad():
        change = (reward(x + step, prompts) - reward(x - step, prompts)) / 2
    torch.testing.assert_close(change, (gradient * step).sum((1, 2, 3)).float(), rtol=0.05, atol=1e-4)
    assert (change > 0).all()


def test_the_reward_of_a_clip_is_its_score(images: Tensor) -> None:
    from fewstep.evaluate import ClipScore

    prompts = ["a photo of a bag"] * 10
    wanted = 100 * ClipScore(load_clip("fashion")).cosines(images, prompts)
    torch.testing.assert_close(load_reward("clip@fashion")(images / 255, prompts), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["clip@fashion", "pickscore", "aesthetic", "image_reward"])
def test_a_reward_does_not_depend_on_the_batch_size(name: str, found: Path, images: Tensor) -> None:
    """To 1e-9 in float64; float32 rounds otherwise in batches of another size."""
    prompts = [PROMPTS[i % 3] for i in range(10)]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        reward = load_reward(name).to(dtype)
        with torch.no_grad():
            one, four, all_ = (
                torch.cat([reward(images[i : i + n] / 255, prompts[i : i + n]) for i in range(0, 10, n)])
                for n in (1, 4, 64)
            )
        assert one.dtype == dtype and one.std() > 0
        torch.testing.assert_close(four, one, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(all_, one, rtol=tolerance, atol=tolerance)


def test_rewards_stand_in_the_report_with_their_weights(
    found: Path, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder, output, words = tmp_path / "images", tmp_path / "e.json", tmp_path / "p.jsonl"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    prompts = ["a bag", "", "x, y", "a dress 👗"]
    words.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    settings: dict[str, Any] = {
        "about": "a test",
        "images": 10,
        "conditions": {"source": "prompts", "file": str(words)},
        "rewards": ["aesthetic"],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    call = [
        "evaluate",
        str(folder),
        "--protocol",
        str(tmp_path / "p.yaml"),
        "--output",
        str(output),
        "--batch-size",
        "4",
    ]
    main([*call, "--reward", "image_reward"])
    report = json.loads(output.read_text())
    assert report["protocol"]["name"] == "p, changed: rewards"
    assert {len(digest) for digest in report["protocol"]["rewards_sha256"].values()} == {64}
    (row,) = report["results"]
    shown = [prompts[i % 4] for i in range(10)]
    for name in ("aesthetic", "image_reward"):
        wanted = float(load_reward(name)(images / 255, shown).double().mean())
        assert row[name] == pytest.approx(wanted, rel=1e-4)
    assert "| ImageReward |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing would be scored"):
        main([*call, "--reward", "none"])
    with pytest.raises(SystemExit, match="--reward: found nice; allowed: pickscore, aesthetic"):
        main([*call, "--reward", "nice"])
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**settings, "conditions": {"source": "none"}}))
    main(call)
    with pytest.raises(SystemExit, match="reward 'image_reward' needs prompts, and there are none"):
        main([*call, "--reward", "image_reward"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickscore", "`hf download yuvalkirstain/PickScore_v1` puts it there"),
        ("aesthetic", r"needs sac\+logos\+ava1-l14-linearMSE\.pth of github\.com/christophschuhmann/.* aesthetic@FILE"),
        ("hpsv2", "needs HPS_v2_compressed.pt: `hf download xswu/HPSv2 HPS_v2_compressed.pt`"),
        ("hpsv2.1", r"needs HPS_v2\.1_compressed\.pt: .* put it into .*/models"),
        ("image_reward", r"needs ImageReward\.pt: `hf download THUDM/ImageReward ImageReward\.pt`"),
        ("image_reward@nowhere.pt", "nowhere.pt is not a file"),
        ("clip", "reward 'clip' needs a model"),
        ("nice", "reward 'nice' is none of clip@FOLDER, pickscore, aesthetic, hpsv2, hpsv2.1, image_reward"),
    ],
)
def test_missing_weights_are_told_in_a_sentence(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("FEWSTEP_DATA", "TORCH_HOME", "HF_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(ValueError, match=words) as told:
        load_reward(name)
    assert len(str(told.value).splitlines()) == 1
    if name in DOWNLOADS:
        with pytest.raises(SystemExit, match=words):
            main(["evaluate", "fashion", "--reward", name, "--output", str(tmp_path / "e.json")])


def test_what_is_no_reward_is_told(tmp_path: Path, found: Path, images: Tensor) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no weights")
    for name in ("aesthetic", "image_reward"):
        with pytest.raises(ValueError, match=r"broken\.pt.*cannot be read as weights"):
            load_reward(f"{name}@{broken}")
    torch.save({"layers.0.weight": torch.ones(1, 1)}, broken)
    with pytest.raises(ValueError, match="does not hold a stack of linear layers"):
        load_reward(f"aesthetic@{broken}")
    with pytest.raises(ValueError, match="do not hold ImageReward's weights"):
        load_reward(f"image_reward@{broken}")
    reward = load_reward("clip@fashion")
    with pytest.raises(ValueError, match=r"images must be float .* in \[0, 1\], got torch.uint8"):
        reward(images, ["a"] * 10)
    with pytest.raises(ValueError, match="10 images but 1 prompts"):
        reward(images / 255, ["a"])
