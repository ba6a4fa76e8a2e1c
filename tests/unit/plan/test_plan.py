"""Plans: the trainer's own iterations without values hold and compute what real ones do."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from builders import ROOT
from fewstep.config import merged
from fewstep.plan.eight_bit import EightBitStates
from fewstep.plan.fake_tensors import fake_tensor_fixes, without_values
from fewstep.plan.meter import Meter, bytes_of
from fewstep.plan.weightless import weightless_teacher

PUBLISHED = ROOT / "tests" / "published"


def run(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)


def planned(folder, method, teacher, settings, *words):
    values = {
        "teacher": str(teacher), "output_dir": str(folder / "run"), "data": {"source": "fashion"}, "max_iterations": 10,
        "batch_size": 4,
        "method": {"name": "lcm" if method == "consistency" else method, "optim": {"lr": 1e-4}} | settings,
    }  # fmt: skip
    file = folder / f"{method}_tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    done = run("-m", "fewstep", "plan", "--json", file, *words)
    assert done.returncode == 0, done.stderr
    assert not (folder / "run").exists()
    return json.loads(done.stdout)


# Tensors without values -----------------------------------------------------------------------------------------------


def test_meter_knows_what_is_alive_and_what_a_linear_layer_computes():
    meter = Meter()
    with meter:
        with without_values():
            layer = nn.Linear(256, 512, bias=False)
        weights = meter.alive
        x = torch.zeros(8, 256)
        with meter.watched({"layer": layer}):
            layer(x).sum().backward()
    assert weights == 256 * 512 * 4
    assert layer.weight.grad.shape == (512, 256)
    # Weights, their gradient, x; neither the output nor anything of the backward.
    assert meter.alive == 2 * weights + 8 * 256 * 4
    assert meter.peak > meter.alive
    # One product forward, one for the weights' gradient: x needs none.
    assert dict(meter.flops) == {("start", "layer"): 2 * 8 * 256 * 512, ("start", ""): 2 * 8 * 256 * 512}
    layer.weight.grad = None
    assert meter.alive == weights + 8 * 256 * 4


def test_shared_storages_count_once():
    weight = torch.zeros(10, 10)
    counted = set()
    assert bytes_of(iter([weight, weight.T, weight[0]]), counted) == 400
    assert bytes_of(iter([weight]), counted) == 0


def test_eight_bit_states_are_those_of_bitsandbytes():
    optim = pytest.importorskip("bitsandbytes.optim")
    sizes = ((100,), (64, 63), (64, 64), (70, 90))
    found = []
    for kind in (EightBitStates, optim.AdamW8bit):
        parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = kind(parameters)
        for _ in range(2):
            optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        named = [{k: v for k, v in s.items() if torch.is_tensor(v) and "qmap" not in k} for s in states]
        found.append([{k: (v.dtype, v.numel()) for k, v in s.items()} for s in named])
    assert found[0] == found[1]
    assert found[0][2]["state1"] == (torch.uint8, 4096) and found[0][1]["state1"] == (torch.float32, 4032)


def test_types_are_those_of_autocast_on_cuda():
    x = torch.zeros(2, 8, 4, 4)
    with fake_tensor_fixes(cuda=True), torch.autocast("cpu", torch.bfloat16):
        product = nn.Conv2d(8, 8, 1)(x)
        assert product.dtype == torch.bfloat16
        assert nn.GroupNorm(2, 8)(product).dtype == torch.float32
        assert nn.functional.interpolate(product, scale_factor=2).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.interpolate(nn.Conv2d(8, 8, 1)(x), scale_factor=2).dtype == torch.bfloat16


def test_weights_without_values_change_type_and_are_copied():
    import copy

    with without_values(), fake_tensor_fixes():
        layer = nn.Linear(4, 4)
        layer.table = torch.arange(3)
        copied = copy.deepcopy(layer).to(torch.bfloat16)
    assert copied.weight.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    assert copied(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Teachers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, millions", [("sdxl", 2567.5), ("sd15", 859.5)])
def test_published_sizes(name, millions):
    teacher = weightless_teacher(str(PUBLISHED / name))
    assert sum(p.numel() for p in teacher.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert teacher.image_size == {"sdxl": 1024, "sd15": 512}[name]


def test_a_teacher_out_of_reach_is_reported_in_a_sentence(tmp_path):
    file = tmp_path / "boot_far.yaml"
    values = {
        "teacher": "nobody/nothing", "output_dir": str(tmp_path), "data": {"source": "none"}, "max_iterations": 1,
        "batch_size": 1, "method": {"name": "boot", "optim": {"lr": 1e-4}},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(values))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "fewstep", "plan", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "nobody/nothing" in done.stderr and "weights are not needed" in done.stderr
    assert "Traceback" not in done.stderr


# Plans ----------------------------------------------------------------------------------------------------------------


def test_consistency_costs_six_forwards(tmp_path, tiny_sd):
    settings = {"grid": {"kind": "even", "points": 40}, "steps": 8}
    p = planned(tmp_path, "consistency", tiny_sd, settings, "--processes", "2")
    roles = p["roles"]
    assert (roles["student"]["kind"], roles["teacher"]["kind"], roles["ema"]["kind"]) == ("learnt", "frozen", "average")
    forwards = {name: role["forward"] for name, role in roles.items()}
    assert forwards == pytest.approx({"teacher": 2, "student": 1, "target": 1, "ema": 0}, abs=0.01)
    assert roles["student"]["backward"] == pytest.approx(2, abs=0.02)
    student = roles["student"]
    assert student["gradients"] == student["weights"] == 4 * student["trainable"]
    assert student["optimizer"] == pytest.approx(2 * student["weights"], rel=1e-2)
    assert p["timesteps"]["4"] == [999, 749, 499, 249]
    assert p["resident"] < p["peak"] == max(p["peaks"].values()) + p["buckets"]
    assert p["mixed_precision"] == "bf16"
    assert p["peaks_by_checkpointing"]["true"] < p["peaks_by_checkpointing"]["false"] == p["peak"]
    assert p["fits"] == {"16": True, "24": True, "40": True, "80": True}
    assert p["buckets"] == student["gradients"]  # those of several processes
    # The same plan as text.
    done = run("-m", "fewstep", "plan", tmp_path / "consistency_tiny.yaml", "memory.gradient_checkpointing=true")
    assert done.returncode == 0, done.stderr
    assert "memory.gradient_checkpointing=false: peak" in done.stdout and "student's steps and timesteps" in done.stdout


@pytest.mark.slow
def test_eight_bit_moments_are_a_quarter(tmp_path, tiny_sd):
    """Of a network this small not all of them; and bitsandbytes need not be there."""
    settings = {"steps": 2, "optim": {"lr": 1e-4, "optimizer": "adamw8bit"}}
    student = planned(tmp_path, "boot", tiny_sd, settings)["roles"]["student"]
    assert 0.5 * student["trainable"] * 4 < student["optimizer"] < 0.7 * student["trainable"] * 4


@pytest.mark.slow
def test_lora_roles_share_one_base(tmp_path, tiny_sd):
    settings = {"student_update_every": 1, "adversarial": {"weight": 0.1}}
    full = planned(tmp_path, "dmd2", tiny_sd, settings)
    lora = planned(tmp_path, "dmd2", tiny_sd, settings, "train.student.kind=lora", "train.student.rank=4")
    base = full["roles"]["teacher"]["weights"]
    assert lora["roles"]["teacher"]["weights"] == base
    for role in ("student", "critic", "ema"):
        assert lora["roles"][role]["weights"] < base / 2
        assert full["roles"][role]["weights"] >= base
    assert lora["peak"] < full["peak"]


@pytest.mark.slow
def test_a_teacher_in_main_memory_is_counted_there(tmp_path, tiny_sd):
    """But for its largest layer; and whole in what differentiates through it, which keeps it."""
    settings = {"student_update_every": 1, "adversarial": {"weight": 0.1}}
    here = planned(tmp_path, "dmd2", tiny_sd, settings)
    weights = here["roles"]["teacher"]["weights"]
    away = planned(tmp_path, "dmd2", tiny_sd, settings, "memory.offload_teacher=true")
    assert away["waiting"] == 4 * away["roles"]["teacher"]["parameters"]
    assert away["roles"]["teacher"]["weights"] == weights - away["waiting"] < weights / 50  # buffers stay
    assert here["resident"] - away["resident"] == away["waiting"]
    saved = {phase: size - away["peaks"][phase] for phase, size in here["peaks"].items()}
    assert saved.pop("start") == 0
    assert len(set(saved.values())) == 1 and 0.9 * away["waiting"] < saved["student: forward"] < away["waiting"]
    through = planned(
        tmp_path,
        "dmd2",
        tiny_sd,
        merged(settings, {"adversarial": {"feature_source": "teacher"}}),
        "memory.offload_teacher=true",
    )
    assert through["waiting"] == away["waiting"]
    beside = planned(tmp_path, "dmd2", tiny_sd, merged(settings, {"adversarial": {"feature_source": "teacher"}}))
    assert through["peaks"]["student: backward"] == beside["peaks"]["student: backward"]
    assert through["peaks"]["critic: backward"] < beside["peaks"]["critic: backward"]
    assert (
        planned(tmp_path, "dmd2", tiny_sd, settings, "memory.offload_teacher=true", "--device", "cpu")["waiting"] == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["consistency", "dmd2", "boot"])
def test_the_peak_is_that_of_a_real_run(case):
    """Within 10 %; measured in the allocations of torch's profiler."""
    done = run(ROOT / "benchmarks" / "plan_check.py", "tiny", case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{case}: planned" in done.stdout


@pytest.mark.parametrize(
    ("method", "total"),
    [("consistency", 5.35), pytest.param("mlcm", 5.35, marks=pytest.mark.slow)],
)
def test_adapters_cost_a_forward_and_its_backward_to_the_input(tmp_path, tiny_sd, method, total):
    """LCM-LoRA, and MLCM on shared trajectories, whose states cost nothing after the first iteration.

    In a network this narrow the adapters themselves are 0.1 F a forward; in a wide one the sum is 5.1 F.
    """
    lora = {"guidance": {"range": [3.0, 15.0], "embed": False}, "target": {"kind": "solver", "decay": None}}
    roles = planned(tmp_path, method, tiny_sd, lora, "train.student.kind=lora", "train.student.rank=4")["roles"]
    assert roles["teacher"]["forward"] == pytest.approx(2, abs=0.01)  # with and without the condition
    assert roles["student"]["forward"] == pytest.approx(2.19, abs=0.02)  # and its target
    assert roles["student"]["backward"] < 1.2
    assert sum(role["forward"] + role["backward"] for role in roles.values()) == pytest.approx(total, abs=0.02)
