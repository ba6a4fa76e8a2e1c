"""Data sets of the hub that lie on this machine: in its cache as huggingface_hub lays it out, or under $FEWSTEP_DATA."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.cli.main import main
from fewstep.config import DataConfig
from fewstep.data import load_source
from fewstep.data.fashion import load_embedded
from fewstep.data.hub import dataset_files, is_dataset
from fewstep.evaluate import load_features, load_moments
from fewstep.evaluate.real_images import count_images, real_images
from fewstep.evaluate.references import collect, resolve

Add = Callable[[str, Mapping[str, bytes]], Path]


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Eight real images, uint8 [8, 3, 32, 32]."""
    return torch.from_numpy(load_embedded()[0])[::250].contiguous()


def png(image: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def parquet(images: Tensor) -> bytes:
    """As Hugging Face's tools write images with classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(images)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": list(range(len(images)))}), file)
    return file.getvalue()


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Puts a data set into an empty cache: blobs, a snapshot of links to them, and the branch that names it."""
    cache = tmp_path / "cache"
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{variable}", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)

    def made(name: str, files: Mapping[str, bytes]) -> Path:
        repository, commit = cache / f"datasets--{name.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        for part in ("blobs", "refs", f"snapshots/{commit}"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        for path, content in files.items():
            blob, link = (
                repository / "blobs" / hashlib.sha256(content).hexdigest(),
                repository / "snapshots" / commit / path,
            )
            blob.write_bytes(content)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (len(Path(path).parts) + 1), "blobs", blob.name))
        return repository / "snapshots" / commit

    return made


@pytest.fixture
def shards(images: Tensor) -> dict[str, bytes]:
    """Six images for training in three files, two for tests, and a picture of the data set."""
    train = {f"data/train-{i:05d}-of-00003.parquet": parquet(images[2 * i : 2 * i + 2]) for i in range(3)}
    return {**train, "data/test-00000-of-00001.parquet": parquet(images[6:]), "README.md": b"# x", "x.png": b"no image"}


def test_all_files_of_a_split_are_its_images(add: Add, shards: dict[str, bytes], images: Tensor) -> None:
    add("somebody/clothes", shards)
    for split, wanted in (("train", images[:6]), ("test", images[6:])):
        source = f"somebody/clothes:{split}"
        assert torch.equal(torch.stack(list(real_images(source))), wanted) and count_images(source) == len(wanted)
    with pytest.raises(ValueError, match=r"expected a split, one of test, train, as somebody/clothes:test$"):
        list(real_images("somebody/clothes"))
    with pytest.raises(ValueError, match=r"found '.*:validation'; expected a split, one of test, train"):
        list(real_images("somebody/clothes:validation"))


def test_statistics_and_scores_of_a_data_set(
    add: Add, shards: dict[str, bytes], images: Tensor, tmp_path: Path
) -> None:
    add("somebody/clothes", shards)
    output, scores = tmp_path / "stats.npz", tmp_path / "e.json"
    main(["reference", "somebody/clothes:train", "--output", str(output)])
    made, wanted = load_moments(output), collect(images[:6], load_features("fashion")).moments
    assert made.count == 6 and wanted is not None
    assert torch.equal(made.mean, wanted.mean) and torch.equal(made.covariance, wanted.covariance)
    call = ["evaluate", str(tmp_path / "drawn"), "--num-images", "6", "--features", "fashion", "--output", str(scores)]
    (tmp_path / "drawn").mkdir()
    for i, image in enumerate(images[:6]):
        (tmp_path / "drawn" / f"{i}.png").write_bytes(png(image))
    main([*call, "--reference", "somebody/clothes:train"])
    report = json.loads(scores.read_text())
    assert report["results"][0]["fid"] == pytest.approx(0, abs=1e-4)
    assert report["protocol"]["reference"] == "somebody/clothes:train"
    assert report["protocol"]["reference_images"] == "all images of the data set"
    main([*call, "--reference", "somebody/clothes:test"])
    assert json.loads(scores.read_text())["results"][0]["fid"] > 1


def test_a_protocol_may_name_a_data_set(add: Add, shards: dict[str, bytes], tmp_path: Path) -> None:
    import yaml

    snapshot = add("somebody/clothes", shards)
    c = {"features": "fashion", "reference": "somebody/clothes:test", "metrics": ["fid", "precision_recall"]}
    settings: dict[str, Any] = {
        "about": "a test",
        "images": 2,
        "conditions": {"source": "none"},
        "comparisons": [{**c, "nearest_k": 1}],
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
    call = ["evaluate", str(snapshot / "data" / "test-00000-of-00001.parquet"), "--protocol", str(tmp_path / "p.yaml")]
    main([*call, "--output", str(tmp_path / "e.json")])
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert row["fid"] == pytest.approx(0, abs=1e-4) and row["precision"] == row["recall"] == 1
    with pytest.raises(SystemExit, match="reference: found 'nobody/nothing'; expected a path, or a data set"):
        main([*call, "--reference", "nobody/nothing", "--output", str(tmp_path / "e.json")])


def test_folders_before_a_split_tell_configurations_apart(add: Add, images: Tensor) -> None:
    one, two = parquet(images[:3]), parquet(images[3:7])
    add("a/b", {"plain_text/train-00000-of-00001-0123456789abcdef.parquet": one})
    assert count_images("a/b") == count_images("a/b:train") == count_images("a/b:plain_text/train") == 3
    add("a/c", {"big/train-00000-of-00001.parquet": one, "small/train-00000-of-00001.parquet": two})
    assert count_images("a/c:small/train") == 4
    with pytest.raises(ValueError, match="expected a split, one of big/train, small/train, as a/c:big/train"):
        count_images("a/c:train")
    add("a/d", {"default/train/0000.parquet": one, "default/train/0001.parquet": two})
    assert count_images("a/d") == count_images("a/d:train") == 7
    add("a/e", {"test.parquet": one, "train.parquet": two})
    assert torch.equal(torch.stack(list(real_images("a/e:test"))), images[:3])


def test_folders_of_images(add: Add, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{'train' if i < 5 else 'test'}/bag/{i}.png": png(image) for i, image in enumerate(images)}
    add("a/split", files)
    assert torch.equal(torch.stack(list(real_images("a/split:test"))), images[5:])
    with pytest.raises(ValueError, match="expected a split, one of test, train"):
        count_images("a/split")
    add("a/whole", {f"bags/{i}.png": png(image) for i, image in enumerate(images)})
    assert torch.equal(torch.stack(list(real_images("a/whole"))), images)
    with pytest.raises(ValueError, match=r"expected a/whole\. The data set has no splits"):
        count_images("a/whole:train")
    add("a/words", {"README.md": b"# words"})
    with pytest.raises(ValueError, match="images: found none in"):
        list(real_images("a/words"))
    # What lies under $FEWSTEP_DATA/datasets, or as it stands, comes first.
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path))
    own = tmp_path / "datasets" / "a" / "whole"
    own.mkdir(parents=True)
    (own / "1.png").write_bytes(png(images[0]))
    assert count_images("a/whole") == 1 and dataset_files("a/whole", "x") == (own, [])
    (tmp_path / "b" / "c" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_dataset("b/c") and dataset_files("b/c:train", "x") == (Path("b/c/train"), [])


def test_what_is_not_here_or_not_whole_is_reported_with_the_command_that_downloads_it(
    add: Add, shards: dict[str, bytes], tmp_path: Path
) -> None:
    wanted = (
        r"found 'nobody/nothing(:train)?'; expected a path, or a data set in the hub's cache\. "
        "`hf download --repo-type dataset "
    )
    with pytest.raises(SystemExit, match=f"{wanted}nobody/nothing` puts it there") as told:
        main(["reference", "nobody/nothing:train", "--output", str(tmp_path / "x.npz")])
    assert len(str(told.value).splitlines()) == 1
    for call in (resolve, lambda name: resolve(name, "fashion")):
        with pytest.raises(ValueError, match=f"^reference: {wanted}"):
            call("nobody/nothing")
    add("somebody/clothes", {name: content for name, content in shards.items() if "train-00001" not in name})
    with pytest.raises(
        ValueError, match=r"found 2 files of .*; expected 3\. `hf download --repo-type dataset somebody/cl"
    ):
        count_images("somebody/clothes:train")
    assert count_images("somebody/clothes:test") == 2
    for name in ("nothing", "a/b/c", "./a/b", "/a/b", "a/b.npz", str(tmp_path)):
        assert not is_dataset(name)
    with pytest.raises(ValueError, match="features: found none for"):
        resolve("somebody/clothes:test")


def test_a_training_reads_them(add: Add, shards: dict[str, bytes], images: Tensor) -> None:
    add("somebody/clothes", shards)
    source = load_source(DataConfig(source="parquet", path=Path("somebody/clothes:train"), num_labels=2), 32)
    raw = source.get([5, 0])
    assert len(source) == 6 and raw.conditions == [1, 0] and raw.images is not None
    torch.testing.assert_close((raw.images + 1) * 127.5, images[[5, 0]].float())
    assert source.image_key(2).startswith("data/train-00001-of-00003.parquet ") and source.image_key(2).endswith(" 0")
    add("a/whole", {f"ankle_boot/{i}.png": png(image) for i, image in enumerate(images)})
    folder = load_source(DataConfig(source="folder", path=Path("a/whole")), 32)
    assert len(folder) == 8 and folder.conditions_at([0]) == ["ankle boot"]
    with pytest.raises(ValueError, match=r"data\.path: found 'somebody/clothes'; expected a split"):
        load_source(DataConfig(source="parquet", path=Path("somebody/clothes")), 32)
    with pytest.raises(ValueError, match=r"data\.path: found 'nobody/nothing'; expected a path, or a data set"):
        load_source(DataConfig(source="folder", path=Path("nobody/nothing")), 32)
