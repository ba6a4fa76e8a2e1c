"""Rewards of images: against the models' own calls and, for ImageReward, numbers of its library; gradients; what is missing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor

from builders.rewards import small_rewards
from fewstep.cli.main import main
from fewstep.data.fashion import load_embedded
from fewstep.evaluate import load_clip, load_reward
from fewstep.evaluate.rewards.files import DOWNLOADS, MPS_CLIP, PICKSCORE, PICKSCORE_PROCESSOR
from fewstep.evaluate.rewards.load import load_training_reward, qualified_name
from fewstep.evaluate.rewards.mps import CONDITION, THRESHOLD

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
    monkeypatch.setattr("fewstep.evaluate.rewards.load.HPS_MODEL", "fewstep-hps")
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
    with pytest.raises(ValueError, match=r"found .*other\.pt \(.*; expected the weights of fewstep-hps"):
        load_reward(f"hpsv2@{tmp_path / 'other.pt'}")


def mps_of_one(
    state: dict[str, Tensor], clip: Any, words: Tensor, end: int, condition: Tensor, pixels: Tensor
) -> Tensor:
    """MPS of one image and prompt, token by token and head by head; words and condition are hidden states [n, D]."""
    words, condition = (
        words @ state["model.text_projection.weight"].T,
        condition @ state["model.text_projection.weight"].T,
    )
    nearest = torch.stack([max(word @ other for other in condition) for word in words])
    seen = [i for i in range(len(words)) if nearest[i] / nearest.max() > THRESHOLD]
    assert seen
    x = clip.vision_model(pixel_values=pixels[None]).last_hidden_state[0] @ state["model.visual_projection.weight"].T

    def gated(h: Tensor) -> Tensor:
        value, gate = h.chunk(2, -1)
        return value * gate * torch.sigmoid(gate)

    def softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([torch.softmax(k @ token / math.sqrt(16), 0) @ v for token in q])

    def turned(h: Tensor, frequencies: Tensor) -> Tensor:
        """Pair (j, j + 8) of the token at position p as a complex number, turned by p times its frequency."""
        angles = torch.arange(len(h))[:, None] * frequencies
        pairs = torch.complex(h[:, :8], h[:, 8:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], 1)

    for i in range(2):
        w = {k.removeprefix(f"cross_model.layers.{i}.0.fn."): v for k, v in state.items()}
        n = F.layer_norm(x, x.shape[-1:], w["norm.weight"])
        k, v = (words[seen] @ w["to_kv.weight"].T).split(16, 1)
        heads = [softmaxed(q, k, v) for q in (n @ w["to_q.weight"].T).split(16, 1)]
        x = x + torch.cat(heads, 1) @ w["to_out.weight"].T + gated(n @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.removeprefix(f"cross_model.layers.{i}.1.fn."): v for k, v in state.items()}
        n = F.layer_norm(x, x.shape[-1:], w["norm.weight"])
        q, k, v, ff = (n @ w["fused_attn_ff_proj.weight"].T).split([64, 16, 16, 512], 1)
        f = w["rotary_emb.inv_freq"]
        heads = [softmaxed(turned(h, f), turned(k, f), v) for h in q.split(16, 1)]
        x = x + torch.cat(heads, 1) @ w["attn_out.weight"].T + gated(ff) @ w["ff_out.1.weight"].T
    cosine = x[0] @ words[end] / x[0].norm() / words[end].norm()
    return state["model.logit_scale"].exp() * cosine


def test_mps_is_its_formula(found: Path, images: Tensor) -> None:
    """Of every image and prompt by itself, in float64."""
    from transformers import CLIPModel, CLIPTokenizer

    state = {key: value.double() for key, value in load_file(found / DOWNLOADS["mps"].file).items()}
    clip = CLIPModel.from_pretrained(found / PICKSCORE).double()  # the same weights
    tokenizer = CLIPTokenizer.from_pretrained(found / MPS_CLIP)
    prompts = ["a photo of a coat", "a coat", "", "a very long prompt of words that never ends " * 9]
    reward = load_reward("mps").double()
    assert reward.net.read(prompts, torch.device("cpu"))[2].sum(1).tolist() == [6, 3, 16, 16]  # words not masked
    with torch.no_grad():
        ids = tokenizer([*prompts, CONDITION], padding="max_length", truncation=True, max_length=16).input_ids
        *texts, condition = clip.text_model(input_ids=torch.tensor(ids)).last_hidden_state
        ends = [one.index(tokenizer.eos_token_id) for one in ids]
        pixels = images[:2].double() / 127.5 - 1
        wanted = [
            [mps_of_one(state, clip, t, e, condition, p) for t, e in zip(texts, ends, strict=False)] for p in pixels
        ]
        got = torch.stack([reward(images[:2].double() / 255, [p] * 2) for p in prompts], 1)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert got.std(0).min() > 1e-3 and got.std(1).min() > 1e-3


class Whole(torch.nn.Module):
    """What a pickled module is like."""


def test_mps_takes_tensors_alone(found: Path, tmp_path: Path, images: Tensor) -> None:
    file, state = tmp_path / "mps.pt", load_file(found / DOWNLOADS["mps"].file)
    torch.save(Whole(), file)
    with pytest.raises(ValueError, match=r"mps\.pt, which cannot be read as tensors alone; .*\.state_dict\(\)") as told:
        load_reward(f"mps@{file}")
    assert len(str(told.value).splitlines()) == 1
    torch.save(state, file)
    prompts = ["a bag"] * 2
    assert torch.equal(
        load_reward(f"mps@{file}")(images[:2] / 255, prompts), load_reward("mps")(images[:2] / 255, prompts)
    )
    for lost in ("cross_model.layers.0.0.fn.to_q.weight", "model.logit_scale"):
        torch.save({key: value for key, value in state.items() if key != lost}, file)
        with pytest.raises(ValueError, match=r"mps\.pt \(.*; expected the weights of MPS"):
            load_reward(f"mps@{file}")


OWN = """
import torch

SIZE = 3

def dark(images, prompts):
    assert prompts is None or len(prompts) == len(images)
    return 1 - images.mean((1, 2, 3))

def wide(images, prompts):
    return images.mean((2, 3))

def deaf(images, prompts):
    return images.detach().mean((1, 2, 3))

def aside(images, prompts):
    return images.detach().mean((1, 2, 3)) * torch.ones(1, requires_grad=True)

def number(images, prompts):
    return 1.0

class Learnt(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, images, prompts):
        return images.mean((2, 3)) @ self.weight

learnt = Learnt()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Python's path with packages `fewstep_own` and, which cannot be imported, `fewstep_broken`."""
    (tmp_path / "fewstep_own").mkdir()
    (tmp_path / "fewstep_own" / "rewards.py").write_text(OWN)
    (tmp_path / "fewstep_broken.py").write_text("raise RuntimeError('no\\nway')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_reward_of_ones_own(own: Path, images: Tensor) -> None:
    x = (images[:3].double() / 255).requires_grad_()
    for prompts in (None, PROMPTS):
        reward = load_training_reward("fewstep_own.rewards:dark", torch.device("cpu"), 8, prompts is not None)
        got = reward(x, prompts)
        assert torch.equal(got, 1 - x.mean((1, 2, 3)))
        assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.full_like(x, -1 / x[0].numel()))
    net = load_training_reward("fewstep_own.rewards:learnt", torch.device("cpu"), 8, True).double()
    torch.testing.assert_close(net(x, PROMPTS), x.mean((2, 3)).sum(1))  # the module moved along
    assert not any(p.requires_grad for p in net.parameters())
    assert qualified_name("fewstep_own.rewards:learnt") == "fewstep_own.rewards.Learnt"


def test_trying_a_reward_draws_nothing(own: Path) -> None:
    before = torch.random.get_rng_state()
    load_training_reward("fewstep_own.rewards:dark", torch.device("cpu"), 8, False)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fewstep_nowhere:dark",
            r"fewstep_nowhere, which cannot be imported \(ModuleNotFoundError: .*Is its folder in PYTHONPATH\?",
        ),
        ("fewstep_broken:dark", r"fewstep_broken, which cannot be imported \(RuntimeError: no way\); expected"),
        ("fewstep_own.rewards:light", r"no 'light' in fewstep_own\.rewards \(.*rewards\.py\)"),
        ("fewstep_own.rewards:SIZE", "found SIZE of type int; expected a callable"),
        ("fewstep_own.rewards:wide", r"a result torch\.float32 \[2, 3\]; expected floats \[2\], one for each image"),
        ("fewstep_own.rewards:number", "a result of type float; expected a tensor"),
        ("fewstep_own.rewards:deaf", "a result without a gradient"),
        ("fewstep_own.rewards:aside", "a result without a gradient"),
    ],
)
def test_a_wrong_reward_of_ones_own_is_reported_before_training(name: str, words: str, own: Path) -> None:
    with pytest.raises(ValueError, match=words) as told:
        load_training_reward(name, torch.device("cpu"), 8, True)
    assert str(told.value).startswith(f"reward {name!r}") and len(str(told.value).splitlines()) == 1


def test_a_reward_of_ones_own_stands_in_the_report(
    own: Path, images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    folder, output = tmp_path / "images", tmp_path / "e.json"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    settings = {
        "about": "a test",
        "images": 10,
        "conditions": {"source": "none"},
        "rewards": ["fewstep_own.rewards:dark"],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    call = ["evaluate", str(folder), "--protocol", str(tmp_path / "p.yaml"), "--output", str(output)]
    main([*call, "--reward", "fewstep_own.rewards:learnt"])
    assert "| fewstep_own.rewards:dark |" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["protocol"]["rewards_sha256"] == {
        "fewstep_own.rewards:dark": "fewstep_own.rewards.dark",
        "fewstep_own.rewards:learnt": "fewstep_own.rewards.Learnt",
    }
    (row,) = report["results"]
    assert row["fewstep_own.rewards:dark"] == pytest.approx(1 - float(images.double().mean()) / 255, rel=1e-5)
    assert row["fewstep_own.rewards:learnt"] == pytest.approx(float(images.double().mean()) / 85, rel=1e-5)
    with pytest.raises(SystemExit, match="no 'light' in"):
        main([*call, "--reward", "fewstep_own.rewards:light"])


@pytest.mark.parametrize("name", ["clip@fashion", "pickscore", "aesthetic", "image_reward", "mps"])
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


@pytest.mark.parametrize("name", ["clip@fashion", "pickscore", "aesthetic", "image_reward", "mps"])
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
    with pytest.raises(SystemExit, match="expected at least one score"):
        main([*call, "--reward", "none"])
    with pytest.raises(SystemExit, match="--reward: found nice; expected pickscore, aesthetic"):
        main([*call, "--reward", "nice"])
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**settings, "conditions": {"source": "none"}}))
    main(call)
    with pytest.raises(SystemExit, match="reward 'image_reward': found no prompts"):
        main([*call, "--reward", "image_reward"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickscore", "`hf download yuvalkirstain/PickScore_v1` puts it there"),
        (
            "aesthetic",
            r"found no sac\+logos\+ava1-l14-linearMSE\.pth; expected it of github\.com/christophschuhmann/.* aesthetic@FILE",
        ),
        ("hpsv2", r"found no HPS_v2_compressed\.pt; expected it\. `hf download xswu/HPSv2 HPS_v2_compressed.pt`"),
        ("hpsv2.1", r"found no HPS_v2\.1_compressed\.pt; .* put it into .*/models"),
        ("image_reward", r"found no ImageReward\.pt; expected it\. `hf download THUDM/ImageReward ImageReward\.pt`"),
        (
            "mps",
            r"found no MPS_overall_checkpoint\.safetensors; expected it \(github\.com/Kwai-Kolors/MPS .*save_file\(.* mps@FILE",
        ),
        ("image_reward@nowhere.pt", "found nowhere.pt; expected a file"),
        ("clip", "reward 'clip': found no model"),
        (
            "nice",
            "reward: found 'nice'; expected clip@FOLDER, pickscore, aesthetic, hpsv2, hpsv2.1, image_reward, mps, or package",
        ),
    ],
)
def test_missing_weights_are_reported_in_a_sentence(
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


def test_what_is_no_reward_is_reported(tmp_path: Path, found: Path, images: Tensor) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no weights")
    for name in ("aesthetic", "image_reward"):
        with pytest.raises(ValueError, match=r"broken\.pt, which cannot be read .*; expected a file of weights"):
            load_reward(f"{name}@{broken}")
    torch.save({"layers.0.weight": torch.ones(1, 1)}, broken)
    with pytest.raises(ValueError, match="expected weights of a stack of linear layers"):
        load_reward(f"aesthetic@{broken}")
    with pytest.raises(ValueError, match="expected weights of ImageReward"):
        load_reward(f"image_reward@{broken}")
    reward = load_reward("clip@fashion")
    with pytest.raises(ValueError, match=r"images: found torch.uint8 .*; expected float"):
        reward(images, ["a"] * 10)
    with pytest.raises(ValueError, match="prompts: found 1 for 10 images"):
        reward(images / 255, ["a"])
