"""The one atomic write, digests, number types, and errors about a user's input."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from fewstep import io
from fewstep.errors import FewstepError, MissingError

DEAD = 2**22 + 1
"""A process number that Linux does not give."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, content: str) -> None:
    with io.atomic(path) as partial:
        partial.mkdir()
        for name in "abc":
            (partial / name).write_text(content)


def test_a_file_replaces_another(tmp_path):
    path = tmp_path / "new" / "x.json"
    for value in ({"a": 1}, {"a": [2]}):
        io.write_json(value, path)
        assert io.read_json(path) == value
    assert names(path.parent) == ["x.json"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_replaces_another(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(io, "_exchange", lambda a, b: False)
    for content in ("old", "new"):
        write_folder(tmp_path / "x", content)
        assert {(tmp_path / "x" / name).read_text() for name in "abc"} == {content}
    assert names(tmp_path) == ["x"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    write_folder(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt), io.atomic(tmp_path / "x") as partial:
        partial.mkdir()
        (partial / "a").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["x"] and (tmp_path / "x" / "a").read_text() == "old"


def test_leftovers_of_dead_processes_are_pruned_and_what_they_replaced_is_restored(tmp_path):
    token = f"{io._host()}-{DEAD}-0a1b2c3d"
    live = io.partial_path(tmp_path / "x", f"{io._host()}-{os.getppid()}-0a1b2c3d")
    live.write_text("of a process that still writes")
    io.partial_path(tmp_path / "x", token).mkdir()
    (tmp_path / f".x.{token}{io.REPLACED}").mkdir()
    (tmp_path / f".x.{token}{io.REPLACED}" / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), io.atomic(tmp_path / "x"):
        raise ZeroDivisionError
    assert names(tmp_path) == [live.name, "x"] and (tmp_path / "x" / "a").read_text() == "old"
    io.prune(tmp_path)
    assert names(tmp_path) == ["x"]


def test_prune_restores_a_folder_whose_successor_never_came(tmp_path):
    for name in ("x.y", "z"):
        (tmp_path / f".{name}.host-1-0a{io.REPLACED}").mkdir()
    (tmp_path / "z").mkdir()
    io.prune(tmp_path)
    assert names(tmp_path) == ["x.y", "z"]


def test_several_processes_write_one_folder_under_a_token(tmp_path):
    io.partial_path(tmp_path / "4", "ranks").mkdir()
    (io.partial_path(tmp_path / "4", "ranks") / "rng_1").write_text("of another rank")
    with io.atomic(tmp_path / "4", "ranks") as partial:
        (partial / "rng_0").write_text("")
    assert names(tmp_path / "4") == ["rng_0", "rng_1"]


def _write_often(folder: Path, content: str) -> None:
    for _ in range(20):
        io.write_json({"content": content * 1000}, folder / "x.json")
        write_folder(folder / "y" / content, content)


def test_processes_do_not_collide(tmp_path):
    processes = [get_context("fork").Process(target=_write_often, args=(tmp_path, c)) for c in "pqr"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(io.read_json(tmp_path / "x.json")["content"])) == 1
    assert names(tmp_path) == ["x.json", "y"] and names(tmp_path / "y") == ["p", "q", "r"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_leaves_a_whole_folder(tmp_path, exchanges):
    code = (
        "import sys; from pathlib import Path; from fewstep import io\n"
        f"if not {exchanges}: io._exchange = lambda a, b: False\n"
        "for i in range(10**6):\n"
        "    with io.atomic(Path(sys.argv[1]) / 'x') as partial:\n"
        "        partial.mkdir(); [(partial / n).write_text(str(i)) for n in 'abc']\n"
    )
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        deadline = time.monotonic() + 30
        while not (tmp_path / "x").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        io.prune(tmp_path)
        assert names(tmp_path) == ["x"]
        assert len({(tmp_path / "x" / name).read_text() for name in "abc"}) == 1


def test_digests(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert io.sha256("abc") == io.sha256(b"abc") == io.sha256_of_file(tmp_path / "x")
    assert io.sha256("abc", 12) == hashlib.sha256(b"abc").hexdigest()[:12] == "ba7816bf8f01"
    assert io.blake2b("abc", 8) == hashlib.blake2b(b"abc", digest_size=8).digest()
    assert io.blake2b_of_parts(["ab", "c"], 16) != io.blake2b_of_parts(["a", "bc"], 16)


def test_number_types_have_one_table():
    assert {name: io.torch_dtype(name) for name in io.DTYPES} == {
        "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64,
    }  # fmt: skip


def test_versions_name_the_package_first():
    assert list(io.versions()) == ["fewstep", "torch", "diffusers", "transformers"]
    assert list(io.versions("torch")) == ["fewstep", "torch"]


def test_errors_say_what_was_found_and_what_was_expected():
    error = FewstepError("data.path", "'x'", "a folder", "Create it")
    assert str(error) == "data.path: found 'x'; expected a folder. Create it"
    assert (error.key, error.found, error.expected, error.hint) == ("data.path", "'x'", "a folder", "Create it")
    assert str(FewstepError("steps", "", "at least one")) == "steps: expected at least one"
    assert str(error.under("train")) == "train.data.path: found 'x'; expected a folder. Create it"
    missing = MissingError("teacher", "'x'", "a folder")
    assert isinstance(missing, ValueError) and isinstance(missing, FileNotFoundError)
    copied = pickle.loads(pickle.dumps(missing))
    assert type(copied) is MissingError and str(copied) == str(missing) == "teacher: found 'x'; expected a folder"
