"""What the loop promises: exact resume, frozen roles, equal batches, two processes, bad input that loses nothing."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from builders import ROOT
from builders.trainer import assert_equal, environment, make, weights
from fewstep import io
from fewstep.config import CheckpointConfig
from fewstep.methods.base import StepOutput
from fewstep.methods.consistency.loss import Consistency
from fewstep.training import checkpoint as ckpt
from fewstep.training.optim import lr_factor
from fewstep.training.updates import NonFiniteError


@pytest.fixture(scope="module")
def teacher_path(tiny_sd_path):
    return tiny_sd_path("v_prediction")


@pytest.fixture(scope="module")
def whole_run(teacher_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(teacher_path, folder)
    before = {k: v.clone() for k, v in trainer.roles["teacher"].net.state_dict().items()}
    start = {k: v.clone() for k, v in trainer.roles["student"].net.state_dict().items()}
    assert trainer.fit()
    return folder, trainer, before, start


def test_learnt_roles_change_and_frozen_ones_do_not(whole_run):
    _, trainer, before, start = whole_run
    assert_equal(trainer.roles["teacher"].net.state_dict(), before)
    now = trainer.roles["student"].net.state_dict()
    assert all(not torch.equal(now[k], v) for k, v in start.items())


def test_followers_average_what_they_follow(whole_run):
    folder, *_ = whole_run
    w = weights(folder, 6)
    key = "net.conv_in.weight"
    assert not torch.equal(w[f"target.{key}"], w[f"student.{key}"])
    assert not torch.equal(w[f"ema.{key}"], w[f"target.{key}"])


def test_log_has_losses_and_speed(whole_run):
    folder, *_ = whole_run
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert all(line["consistency"] > 0 and line["images_per_second"] > 0 for line in lines)


def test_resume_is_exact(whole_run, teacher_path, tmp_path):
    folder, *_ = whole_run
    trainer = make(teacher_path, tmp_path, max_iterations=6)
    trainer.resume(str(folder / "checkpoints" / "3"))
    assert trainer.iteration == 3
    trainer.fit()
    assert_equal(weights(tmp_path, 6), weights(folder, 6))


def test_no_pickles_in_a_checkpoint(whole_run):
    folder, *_ = whole_run
    names = {p.suffix for p in (folder / "checkpoints" / "6").iterdir()}
    assert names == {".safetensors", ".json"}


def test_cached_latents_train_too(teacher_path, tmp_path):
    trainer = make(
        teacher_path, tmp_path, max_iterations=2, data={"source": "fashion", "limit": 16, "cache_latents": True}
    )
    assert trainer.fit()
    assert trainer.batches.latents is not None
    held = trainer.batches.latents([3, 15])
    encoded = trainer.teacher.encode(trainer.batches.stream.source.get([3, 15]).images)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(held, encoded, strict=True))


class Recorder:
    """Wraps a method's loss to average the gradient-free quantities: conditions and clean latents in the order seen."""

    def __init__(self, trainer):
        self.seen, loss = [], trainer.method.loss
        trainer.method.steps = lambda: (type(step)(step.role, self.loss, step.every),)
        step = Consistency.steps(trainer.method)[0]
        self.inner = loss

    def loss(self, nets, batch, carry):
        self.seen.append(batch.cond["encoder_hidden_states"])
        return self.inner(nets, batch, carry, **fixed_for(batch))


def fixed_for(batch):
    """index, noise and guidance that depend on the sample alone, so that micro-batches draw what the whole batch draws."""
    code = batch.x0.flatten(1).sum(1)
    index = (code.abs() * 1000).long() % 40
    noise = torch.sin(batch.x0 * 50) * 1.4
    return {"index": index, "noise": noise, "guidance_scale": 1 + (code.abs() % 2)}


def test_one_batch_of_eight_equals_eight_of_one(teacher_path, tmp_path):
    """Accumulated gradients of micro-batches are those of the whole batch (VAE noise set to zero by the mode)."""
    results = []
    for name, size, accumulate in (("a", 8, 1), ("b", 1, 8)):
        trainer = make(
            teacher_path,
            tmp_path / name,
            batch_size=size,
            train={"accumulate": accumulate},
            max_iterations=2,
            checkpoint={"every": 2},
        )
        encode = trainer.teacher.encode
        trainer.teacher.encode = lambda images, encode=encode: (p := encode(images))._replace(
            std=torch.zeros_like(p.std)
        )
        recorder = Recorder(trainer)
        trainer.fit()
        results.append((torch.cat(recorder.seen), weights(tmp_path / name, 2, ("student",))))
    assert torch.equal(results[0][0], results[1][0])
    for key, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], value, atol=2e-4, rtol=1e-3)


def test_non_finite_updates_are_skipped_then_end_the_run(teacher_path, tmp_path):
    trainer = make(teacher_path, tmp_path, train={"max_nonfinite": 2}, max_iterations=20, checkpoint={"every": 1})
    trainer.config = trainer.config.model_copy(update={"max_iterations": 1})
    trainer.fit()
    before = {k: v.clone() for k, v in trainer.roles["student"].net.state_dict().items()}
    trainer.config = trainer.config.model_copy(
        update={"max_iterations": 20, "checkpoint": CheckpointConfig(every=1000)}
    )
    loss = trainer.method.loss
    trainer.method.steps = lambda: (type(Consistency.steps(trainer.method)[0])("student", broken),)

    def broken(nets, batch, carry):
        return StepOutput({"consistency": loss(nets, batch).losses["consistency"] * float("nan")})

    with pytest.raises(NonFiniteError, match=r"3 updates in a row.*checkpoints/1"):
        trainer.fit()
    assert_equal(trainer.roles["student"].net.state_dict(), before)


def test_source_without_images_is_refused(teacher_path, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a coat\n")
    with pytest.raises(ValueError, match=r"data\.source: found prompts, which has no images"):
        make(teacher_path, tmp_path / "run", data={"source": "prompts", "path": str(prompts)})


def test_full_disk_keeps_the_last_checkpoint(teacher_path, tmp_path, monkeypatch):
    trainer = make(teacher_path, tmp_path, max_iterations=3)
    trainer.fit()
    trainer.iteration = 4

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "save_module", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    monkeypatch.undo()
    make(teacher_path, tmp_path).resume("latest")


def test_start_from_an_earlier_run(whole_run, teacher_path, tmp_path):
    folder, *_ = whole_run
    trainer = make(teacher_path, tmp_path, train={"init_from": str(folder / "checkpoints" / "6")})
    earlier = load_file(folder / "checkpoints" / "6" / "student.safetensors")
    for role in ("student", "target", "ema"):
        assert_equal(trainer.roles[role].net.state_dict(), earlier)
    assert trainer.iteration == 0
    with pytest.raises(
        FileNotFoundError,
        match=r"train.init_from: .*nowhere without weights of .*; expected one of student\.safetensors",
    ):
        make(teacher_path, tmp_path, train={"init_from": str(tmp_path / "nowhere")})
    unguided = {"guidance_range": None}
    with pytest.raises(
        ValueError, match=r"train.init_from: .*where 1 weights differ, first .*cond_proj.* weights of the student"
    ):
        make(teacher_path, tmp_path, train={"init_from": str(folder / "checkpoints" / "6")}, method=unguided)


def test_resume_without_a_checkpoint_says_so(teacher_path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        make(teacher_path, tmp_path).resume("latest")


def test_learning_rate_schedule():
    assert lr_factor(1, 110, 10) == pytest.approx(0.1) and lr_factor(10, 110, 10) == 1
    assert lr_factor(60, 110, 10) == pytest.approx(0.5) and lr_factor(110, 110, 10) == pytest.approx(0, abs=1e-12)
    assert lr_factor(60, 110, 10, "constant") == 1
    # As teachers are trained: one update more at the top.
    assert lr_factor(11, 110, 10, full_updates=1) == 1 and lr_factor(61, 110, 10, full_updates=1) == pytest.approx(0.5)


def test_interrupted_write_is_not_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    with io.atomic(folder / "1") as partial:
        partial.mkdir()
        io.write_json({}, partial / "state.json")
    io.partial_path(folder / "2", "ranks").mkdir()
    assert ckpt.find(folder, "latest").name == "1"
    ckpt.prune(folder, 1)
    assert [p.name for p in folder.iterdir()] == ["1"]


def test_scores_and_pictures_do_not_move_the_training(whole_run, teacher_path, tmp_path):
    folder, *_ = whole_run
    score = {"every": 3, "steps": 1, "num_images": 8}
    trainer = make(teacher_path, tmp_path, score=score, log={"samples_every": 3})
    trainer.fit()
    assert_equal(weights(tmp_path, 6), weights(folder, 6))
    scored = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "fid" in line]
    assert [line["iteration"] for line in scored] == [3, 6] and all(line["fid"] > 0 for line in scored)
    assert trainer.progress.best["fid"] == min(line["fid"] for line in scored)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["3.png", "6.png"]
    if trainer.progress.best["iteration"] == 3:
        exported = {k: v.clone() for k, v in trainer.exported_weights().state_dict().items()}
        assert_equal(exported, load_file(tmp_path / "checkpoints" / "3" / "ema.safetensors"))


def test_training_ends_when_the_score_gets_no_better(teacher_path, tmp_path):
    """Weights that no longer change draw the same samples: two scores are not better than the first, and that is enough."""
    changes = {
        "score": {"every": 1, "steps": 1, "num_images": 8, "patience": 2, "clip": "none"}, "train": {"ema_decay": 0.0},
        "method": {"optim": {"lr": 1e-30}}, "checkpoint": {"every": 2},
    }  # fmt: skip
    trainer = make(teacher_path, tmp_path, **changes)
    assert trainer.fit()
    assert trainer.iteration == 3 and trainer.progress.best["iteration"] == 1
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    fids = [line["fid"] for line in log if "fid" in line]
    assert len(fids) == 3 and len(set(fids)) == 1
    (warning,) = [line["warning"] for line in log if "warning" in line]
    assert "of iteration 1, for 2 scores; training ends here" in warning
    again = make(teacher_path, tmp_path, **changes)
    again.resume(str(tmp_path / "checkpoints" / "2"))
    assert again.fit() and again.iteration == 3 and again.progress.stopping.state() == trainer.progress.stopping.state()


# The user's own commands ------------------------------------------------------------------------------------------------


def command(teacher_path, folder, processes=1, *overrides):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--num_machines", "1"]
    return [
        *launch, "train/consistency.py", "--config", "configs/fashion/lcm.yaml", f"teacher={teacher_path}",
        f"output_dir={folder}", "data.limit=32", "batch_size=4", "max_iterations=6", "checkpoint.every=3",
        "log.samples_every=0", "evaluate=null", "log.every=1", "train.cpu_threads=1", "method.steps=1", *overrides,
    ]  # fmt: skip


def test_two_processes_agree_and_resume_exactly(teacher_path, tmp_path):
    runs = {}
    for name, overrides in (
        ("whole", ()),
        ("rest", (f"checkpoint.resume={tmp_path / 'whole' / 'checkpoints' / '3'}",)),
    ):
        done = subprocess.run(
            command(teacher_path, tmp_path / name, 2, *overrides),
            cwd=ROOT, env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = weights(tmp_path / name, ckpt.find(tmp_path / name / "checkpoints", "latest").name)
    state = io.read_json(tmp_path / "whole" / "checkpoints" / "6" / "state.json")
    assert state["num_processes"] == 2, "the launch silently used one process"
    assert_equal(runs["whole"], runs["rest"])


def start_training(teacher_path, folder, *overrides):
    """The trainer in a process of its own, already some iterations on its way."""
    arguments = command(teacher_path, folder, 1, "max_iterations=100000", *overrides)
    process = subprocess.Popen(
        [sys.executable, *arguments[arguments.index("train/consistency.py") :]], cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, deadline = folder / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.exists(), "training did not start"
    return process


def test_sigterm_writes_a_checkpoint_and_stops(teacher_path, tmp_path):
    process = start_training(teacher_path, tmp_path, "checkpoint.every=100000")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    assert "go on with checkpoint.resume=latest" in out
    assert ckpt.find(tmp_path / "checkpoints", "latest").exists()


def test_kill_amid_checkpoints_leaves_the_last_one_whole(teacher_path, tmp_path):
    """A checkpoint every iteration, and a kill -9 while one is being written."""
    process = start_training(teacher_path, tmp_path, "checkpoint.every=1")
    folder, deadline = tmp_path / "checkpoints", time.monotonic() + 60
    while not list(folder.glob(f"*{io.PARTIAL}")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    last = ckpt.find(folder, "latest")
    trainer = make(teacher_path, tmp_path, data={"source": "fashion", "limit": 32}, max_iterations=100000)
    trainer.resume("latest")
    assert trainer.iteration == int(last.name) > 0


def test_missing_teacher_is_one_sentence(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "train/consistency.py", "--config", "configs/fashion/trajectory.yaml", "teacher=./nowhere",
            f"output_dir={tmp_path}",
        ],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr and "nowhere" in done.stderr
