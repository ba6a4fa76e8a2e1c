import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fewstep.config import DataConfig
from fewstep.data import InMemory, Listed, Source, Stream, fashion, load_source, memory_source, read_prompts
from fewstep.data.images import IMAGE_SUFFIXES
from fewstep.data.parquet import LazyColumn, Parquet
from fewstep.data.validate import check_images


def save(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def encoded(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 12), colour).save(buffer, "PNG")
    return buffer.getvalue()


def source(kind: str, size: int = 8, **settings: Any) -> Source:
    return load_source(DataConfig(source=kind, **settings), size)  # type: ignore[arg-type]


def order(length: int, batch_size: int, batches: int, rank: int = 0, world: int = 1, seed: int = 0) -> list[int]:
    stream = Stream(Listed(range(length), "label"), batch_size, seed, rank, world)
    return [i for _ in range(batches) for i in next(stream).indices]


def test_every_epoch_is_a_permutation() -> None:
    seen = order(10, 4, 5)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert seen == order(10, 4, 5) and seen != order(10, 4, 5, seed=1)


def test_order_is_independent_of_the_batch_size() -> None:
    assert order(13, 8, 4) == order(13, 1, 32)


def test_ranks_partition_the_global_order() -> None:
    ranks = [order(13, 3, 6, rank, 2) for rank in range(2)]
    shared = [i for step in range(6) for rank in ranks for i in rank[3 * step : 3 * step + 3]]
    assert shared == order(13, 3, 12)
    with pytest.raises(ValueError, match="rank: found 2; expected 0 to 1"):
        order(13, 3, 1, 2, 2)


def test_exact_resume() -> None:
    labels = Listed(range(7), "label")
    whole, first, second = (Stream(labels, 3, seed=5, rank=1, world_size=2) for _ in range(3))
    expected = [next(whole) for _ in range(9)]
    got = [next(first) for _ in range(4)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + [next(second) for _ in range(5)] == expected
    with pytest.raises(ValueError, match="resume: found seed 6 of the data; expected 5"):
        Stream(labels, 3, seed=6).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="found length 8 of the data; expected 7"):
        Stream(Listed(range(8), "label"), 3, seed=5).load_state_dict(first.state_dict())


def test_limit_is_the_same_draw() -> None:
    few, more = (source("labels", num_labels=100, limit=n) for n in (5, 9))
    values = [s.get(range(len(s))).conditions for s in (few, more)]
    assert len(few) == 5 and values[1][:5] == values[0] != sorted(values[0])
    assert few.get([3]).indices == [3]
    assert len(source("labels", num_labels=3, limit=5)) == 3


def test_fashion() -> None:
    data = source("fashion", 32)
    assert (data.has_images, data.conditions, len(data)) == (
        True,
        "prompt",
        60_000 if fashion.DEBIAN_FOLDER.exists() else 2000,
    )
    raw = data.get([0, 1, 9])
    assert raw.images is not None and raw.images.shape == (3, 3, 32, 32) and raw.images.dtype == torch.float32
    assert raw.images.min() == -1 and raw.images.max() <= 1
    assert raw.conditions == data.get([0, 1, 9]).conditions and raw.indices == [0, 1, 9]


def test_embedded_fashion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "missing")
    captions, labels = source("fashion", 16), source("fashion", 16, num_labels=10)
    assert len(captions) == 2000 and captions.get([3]).images.shape == (1, 3, 16, 16)  # type: ignore[union-attr]
    assert labels.conditions == "label"
    for i, label in enumerate(labels.get(range(20)).conditions):
        assert captions.get([i]).conditions == [fashion.caption(label, i % len(fashion.TEMPLATES))]
    with pytest.raises(ValueError, match="num_labels: found 7"):
        source("fashion", num_labels=7)


def test_crop_and_resize(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20] = 255, (255, 0, 51)
    Image.fromarray(wide).save(tmp_path / "a.png")
    images = source("folder", 5, path=tmp_path).get([0]).images
    assert images is not None and images.shape == (1, 3, 5, 5)
    # The middle square alone is seen, and values map 0 ... 255 to -1 ... 1.
    assert torch.allclose(images, torch.tensor([1, -1, -0.6]).view(1, 3, 1, 1).expand(1, 3, 5, 5), atol=1e-6)


def test_other_modes(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        Image.new(mode, (6, 6)).save(tmp_path / f"{mode}.tif")
    assert source("folder", path=tmp_path).get(range(4)).images.shape == (4, 3, 8, 8)  # type: ignore[union-attr]


def test_folder_of_classes(tmp_path: Path) -> None:
    for name in ("dog/1.jpg", "big_cat/1.png", "big_cat/2.PNG"):
        save(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("not an image")
    assert source("folder", path=tmp_path).get(range(3)).conditions == ["big cat", "big cat", "dog"]
    labels = source("folder", path=tmp_path, num_labels=2)
    assert labels.conditions == "label" and labels.get(range(3)).conditions == [0, 0, 1]
    with pytest.raises(ValueError, match=r"num_labels: found 3; expected 2, the folders"):
        source("folder", path=tmp_path, num_labels=3)


def test_flat_folder_has_empty_prompts(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    data = source("folder", path=tmp_path)
    assert data.conditions == "prompt" and data.get([0]).conditions == [""]


def test_folder_with_metadata(tmp_path: Path) -> None:
    for name in ("a/1.png", "2.png", "unlisted.png"):
        save(tmp_path / name)
    lines = [{"file_name": "a/1.png", "text": "a cat"}, {"file_name": "2.png"}]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)) + "\n")
    data = source("folder", path=tmp_path)
    assert len(data) == 2 and data.get([0, 1]).conditions == ["a cat", ""]


def test_folder_with_csv_metadata(tmp_path: Path) -> None:
    for name in ("a/1.png", "2.png", "unlisted.png"):
        save(tmp_path / name)
    # As spreadsheets write it: a byte order mark, carriage returns, quotes, a line break within a field.
    (tmp_path / "metadata.csv").write_bytes(
        '\ufefffile_name,text,other\r\na/1.png,"ein ""schöner"" Hund,\nin Rot",x\r\n2.png,,y\r\n'.encode()
    )
    data = source("folder", path=tmp_path)
    assert data.get([0, 1]).conditions == ['ein "schöner" Hund,\nin Rot', ""] and len(data) == 2


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.jsonl", '{"file_name": "gone.png"}', "line 1: found image .*gone.png, which does not exist"),
        ("metadata.jsonl", '\n{"text": "a cat"}', "line 2: found text; expected file_name"),
        ("metadata.jsonl", '{"file_name": 1}', "line 1: found file_name; expected a file_name that is text"),
        (
            "metadata.jsonl",
            '["1.png"]',
            r"""line 1: found '\["1.png"\]'; expected a JSON object with file_name and text""",
        ),
        ("metadata.jsonl", '{"file_name": "1.png"', "line 1: found .*; expected a JSON object"),
        ("metadata.jsonl", '{"file_name": "1.png", "caption": "a cat"}', "found caption; expected text"),
        ("metadata.jsonl", "", "data.path: found no image in .*metadata.jsonl"),
        ("metadata.csv", "file_name,text\ngone.png,x\n", "line 2: found image .*gone.png, which does not exist"),
        ("metadata.csv", "image,text\n1.png,x\n", "line 2: found image, text; expected file_name"),
        ("metadata.csv", "file_name,text\n1.png,a cat, red\n", "line 2: found not 2 columns"),
        ("metadata.csv", "file_name,text\n1.png\n", "line 2: found not 2 columns"),
        ("metadata.csv", 'file_name,text\n1.png,"a cat\n', "metadata.csv, line .: found unexpected end of data"),
        ("metadata.csv", "file_name,caption\n1.png,a cat\n", "found caption; expected text"),
        (
            "metadata.csv",
            "file_name,text\n1.png,\xff\n",
            "data.path: found .*metadata.csv, which cannot be read .*; expected text in UTF-8",
        ),
    ],
)
def test_bad_metadata(name: str, text: str, expected: str, tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=expected):
        source("folder", path=tmp_path)


def test_captions_do_not_go_unread(tmp_path: Path) -> None:
    save(tmp_path / "train/1.png")
    (tmp_path / "train/metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    with pytest.raises(ValueError, match=r"found captions in .*train/metadata\.csv; .*\. Set data.path to .*train"):
        source("folder", path=tmp_path)
    assert source("folder", path=tmp_path / "train").get([0]).conditions == ["a cat"]
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "1.png", "text": "a dog"}')
    with pytest.raises(ValueError, match=r"found both metadata\.jsonl and metadata\.csv in"):
        source("folder", path=tmp_path / "train")


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: found no image in"):
        source("folder", path=tmp_path)
    for kind in ("folder", "parquet", "prompts"):
        with pytest.raises(ValueError, match=r"data\.path: .*gone"):
            source(kind, path=tmp_path / "gone")


@pytest.mark.parametrize("whole", [False, True])
def test_broken_image(tmp_path: Path, whole: bool) -> None:
    save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "bad.jpg")
    content = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(b"" if whole else content[: len(content) // 2])
    stream = Stream(source("folder", path=tmp_path), 2, 0)
    with pytest.raises(ValueError, match=r"image .*bad\.jpg: found a file that cannot be read"):
        next(stream)
    assert stream.position == 0


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  ein schöner Hund \n", encoding="utf-8")
    data = source("prompts", path=path)
    assert not data.has_images and data.get([1, 0]) == (None, ["ein schöner Hund", "a cat"], [1, 0])
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"data\.path: found no prompt in .*prompts.txt"):
        source("prompts", path=path)


def test_prompts_with_commas_quotes_unicode_and_nothing_in_them(tmp_path: Path) -> None:
    prompts = ['a red, "fast" car', "", "ein Zug fährt — 電車", "one\u2028prompt", "two\nlines", " spaces "]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps({"prompt": p, "id": 1}, ensure_ascii=False) for p in prompts)
    )
    assert read_prompts(tmp_path / "q.jsonl") == prompts
    (tmp_path / "p.txt").write_text('a red, "fast" car\r\n\nein Zug fährt — 電車\none\u2028prompt\n', encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [prompts[0], prompts[2], prompts[3]]
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"line 2: found .*; expected a string or"):
        read_prompts(tmp_path / "bad.jsonl")


def test_training_reads_prompts_as_scoring_does(tmp_path: Path) -> None:
    """A .jsonl is read as JSON, not as lines, and a separator of Unicode does not end a prompt."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n"a\u2028dog"\n')
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\na\u2028dog\n", encoding="utf-8")
    for name in ("p.jsonl", "p.txt"):
        assert source("prompts", path=tmp_path / name).get([0, 1]).conditions == ["a cat", "a\u2028dog"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_scoring_reads_the_images_that_training_reads(tmp_path: Path, suffix: str) -> None:
    from fewstep.evaluate.real_images import count_images, real_images

    save(tmp_path / f"1{suffix}", size=(8, 8))
    save(tmp_path / f"2{suffix.upper()}", size=(8, 8))
    assert len(source("folder", path=tmp_path)) == count_images(str(tmp_path)) == 2
    assert [image.shape for image in real_images(str(tmp_path))] == [(3, 8, 8)] * 2


class Table:
    """A small `datasets.Dataset`: rows by number, columns by name."""

    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.opened = 0

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        self.opened += 1
        return {name: column[key] for name, column in self.columns.items()}


def test_objects_in_memory(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    picture = Image.new("RGB", (12, 8), (255, 0, 0))
    config = DataConfig(source="none")
    images: list[Any] = [picture, tmp_path / "1.png", str(tmp_path / "1.png"), encoded((0, 255, 0))]
    items = [{"image": image, "text": f"image {i}"} for i, image in enumerate(images)]
    for data in (items, Table(image=images, text=[f"image {i}" for i in range(4)])):
        found = memory_source(data, config, 8)
        assert isinstance(found, InMemory) and found.has_images and found.conditions == "prompt" and len(found) == 4
        raw = found.get([3, 0])
        assert raw.conditions == ["image 3", "image 0"] and raw.indices == [3, 0]
        assert raw.images is not None and raw.images[:, :, 0, 0].tolist() == [[-1, 1, -1], [1, -1, -1]]
        assert len({found.image_key(i) for i in range(4)}) == 3, "a path is a path, as text too"
        assert memory_source(data, DataConfig(source="none", limit=2), 8).get([0]).images is not None


def test_captions_of_a_table_are_read_without_its_images() -> None:
    table = Table(image=[None, None], text=["a", None])
    found = memory_source(table, DataConfig(source="none"), 8)
    opened = table.opened
    assert found.conditions_at([1, 0]) == ["", "a"] and table.opened == opened


def test_prompts_and_labels_in_memory() -> None:
    prompts = memory_source(["a cat", "a dog"], DataConfig(source="none"), 8)
    assert prompts.conditions_at([1]) == ["a dog"] and not prompts.has_images
    labelled = memory_source(
        [{"label": 1, "text": "a"}, {"label": 3, "text": "b"}], DataConfig(source="labels", num_labels=3), 8
    )
    assert labelled.conditions == "label" and labelled.conditions_at([0]) == [1]
    with pytest.raises(ValueError, match="found label 3 in item 1; expected a whole number from 0 on, below 3"):
        labelled.get([1])
    for data, expected in (
        ([], "an empty collection"),
        ([{"caption": "a"}], "items of caption"),
        ([3], "items of int"),
    ):
        with pytest.raises(ValueError, match=f"data: found {expected}"):
            memory_source(data, DataConfig(source="none"), 8)  # type: ignore[arg-type]


def test_labels_and_none() -> None:
    labels, none = source("labels", num_labels=3), source("none")
    assert (labels.conditions, labels.get(range(3)).conditions) == ("label", [0, 1, 2])
    assert (none.conditions, none.get([0]).conditions, none.has_images) == ("none", [None], False)
    assert next(Stream(none, 4, 0)).conditions == [None] * 4


@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path: Path, struct: bool) -> None:
    cells: list[Any] = [encoded((255, 0, 0)), encoded((0, 255, 0)), b"broken"]
    cells = [{"bytes": c, "path": None} for c in cells] if struct else cells
    table = pa.table({"image": cells, "text": ["red", None, "x"], "label": [0, 4, 1], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = source("parquet", path=tmp_path / "a.parquet")
    raw = data.get([1, 0])
    assert data.has_images and raw.conditions == ["", "red"]
    assert raw.images is not None and raw.images[:, :, 0, 0].tolist() == [[-1, 1, -1], [1, -1, -1]]
    assert source("parquet", path=tmp_path, num_labels=5).get([1]).conditions == [4]
    with pytest.raises(ValueError, match=r"image .*a\.parquet, row 2: found a file that cannot be read"):
        data.get([2])
    with pytest.raises(ValueError, match=r"found label 4 in row 1 of .*; expected 0 to 3"):
        source("parquet", path=tmp_path, num_labels=4)


def test_parquet_with_image_files(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "1.png"}]}), tmp_path / "a.parquet")
    data = source("parquet", path=tmp_path / "a.parquet")
    assert data.conditions == "none" and data.get([0]).images.shape == (1, 3, 8, 8)  # type: ignore[union-attr]


def test_parquet_without_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a cat"]}), tmp_path / "a.parquet")
    data = source("parquet", path=tmp_path)
    assert not data.has_images and data.get([0]) == (None, ["a cat"], [0])
    with pytest.raises(ValueError, match="cache_latents: found prompts without images"):
        source("parquet", path=tmp_path, cache_latents=True)
    pq.write_table(pa.table({"caption": ["a cat"]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"columns caption in .*; expected rows, and any of the columns image, text, label"
    ):
        source("parquet", path=tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"which cannot be read .*; expected parquet"):
        source("parquet", path=tmp_path)


def test_a_large_parquet_is_read_by_row_group(tmp_path: Path) -> None:
    """Whatever is held of it, every row is the same; with room for nothing, one row group is in memory at a time."""
    colours = [(8 * i, 0, 255 - 8 * i) for i in range(25)]
    for name, rows in (("a", range(11)), ("b", range(11, 25))):
        table = pa.table({"image": [encoded(colours[i]) for i in rows], "text": [str(i) for i in rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    order = np.random.default_rng(0).permutation(25).tolist()
    data = source("parquet", path=tmp_path)
    files = sorted(tmp_path.iterdir())
    tight, roomy = LazyColumn(files, "image", 0), LazyColumn(files, "image", 10**6)
    for i in order:
        assert tight[i] == roomy[i] == encoded(colours[i])
        assert len(tight.held) == 1
    assert len(data) == len(tight) == 25 and len(roomy.held) == len(roomy.groups) == 3 + 4
    raw = data.get(order)
    assert raw.images is not None and raw.conditions == [str(i) for i in order]
    expected = torch.tensor([colours[i] for i in order]) / 127.5 - 1
    torch.testing.assert_close(raw.images[:, :, 0, 0], expected)


def test_parquet_files_that_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded((1, 2, 3))], "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"img": [encoded((1, 2, 3))], "text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"found columns img, text in .*b\.parquet; expected image"):
        source("parquet", path=tmp_path)


def test_parquet_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [encoded((1, 2, 3))] * 9}), path)
    data = source("parquet", path=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"a\.parquet, which cannot be read"):
        data.get([0])


# Broken images ----------------------------------------------------------------------------------------------------------


def broken_images(folder: Path) -> list[str]:
    """Six images in the formats that matter, of which the names of three broken ones are returned; and one with a trailer."""
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.png", "f.jpg"):
        picture.save(folder / name)
    for name in ("b.jpg", "c.webp"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "e.png").write_text("not an image")
    with (folder / "f.jpg").open("ab") as f:
        f.write(b"a trailer, as some cameras write it")
    return ["b.jpg", "c.webp", "e.png"]


def test_broken_images_are_reported_before_training(tmp_path: Path) -> None:
    broken_images(tmp_path / "x")
    whole = source("folder", size=32, path=tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"3 of 6 images that cannot be read, such as: .*b\.jpg.*c\.webp.*e\.png.*on_error=skip"
    ):
        check_images(whole, "fail")


def test_broken_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken_images(tmp_path / "x")
    whole = source("folder", size=32, path=tmp_path / "x")
    left = check_images(whole, "skip")
    assert "warning: data.path: found 3 of 6 images that cannot be read" in capsys.readouterr().out
    assert [left.image_key(i).split()[0] for i in range(len(left))] == ["a.png", "d.bmp", "f.jpg"]
    images = left.get(range(3)).images
    assert images is not None and images.shape == (3, 3, 32, 32)
    # As many as will be there when each of two processes has looked at its half.
    halves = [whole.broken(range(r, 6, 2)) for r in range(2)]
    assert [sorted(h) for h in halves] == [[2, 4], [1]]
    part = check_images(whole, "skip", 1, 2, lambda mine: mine + list(halves[0].items()))
    assert [part.image_key(i) for i in range(3)] == [left.image_key(i) for i in range(3)]


def test_whole_images_leave_the_source_as_it_is(tmp_path: Path) -> None:
    broken = broken_images(tmp_path / "x")
    for name in broken:
        (tmp_path / "x" / name).unlink()
    whole = source("folder", size=32, path=tmp_path / "x")
    assert check_images(whole, "fail") is whole
    assert check_images(source("fashion", size=32), "fail").has_images


def test_broken_cells_of_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = broken_images(tmp_path / "x")
    files = sorted((tmp_path / "x").iterdir())
    pq.write_table(pa.table({"image": [f.read_bytes() for f in files]}), tmp_path / "data.parquet")
    whole = source("parquet", size=32, path=tmp_path / "data.parquet", limit=6)
    found = whole.broken(range(6))
    rows = sorted(int(problem.split("row ")[1].split(":")[0]) for problem in found.values())
    assert rows == [i for i, f in enumerate(files) if f.name in names]
    monkeypatch.setattr(Parquet, "HELD_BYTES", 10)
    assert whole.broken(range(6)) == {} and whole.broken(range(6), thorough=True).keys() == found.keys()


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"1 of 1 images that cannot be read.*; expected at least one"):
        check_images(source("folder", size=32, path=tmp_path), "skip")
