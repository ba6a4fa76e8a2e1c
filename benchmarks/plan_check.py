"""What `fewstep plan` says of memory against what a run of random weights is measured to take.

    python benchmarks/plan_check.py tiny            # a small Stable Diffusion on the CPU
    python benchmarks/plan_check.py sdxl [CASE ...]  # the size of SDXL at 1024 pixels on a GPU, nothing is downloaded

Measured are the bytes that torch's allocator has given out: torch.cuda.max_memory_allocated, or on the CPU the allocations in
torch's profiler. Each case is a process of its own; the plan of one is made while the run of another is measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fewstep.config import merged

ROOT = Path(__file__).parents[1]
OPTIM = {"lr": 1e-6}
CONSISTENCY = {"name": "lcm", "optim": OPTIM, "guidance": {"range": [3.0, 15.0], "export_scale": 8.0}}
DMD2 = {"name": "dmd2", "optim": OPTIM, "student_update_every": 1, "guidance_scale": 8.0, "gan_weight": 5e-3}
LORA = {"train": {"student": {"kind": "lora"}}}
CASES: dict[str, dict[str, Any]] = {
    "consistency_lora_1": {"method": CONSISTENCY, "batch_size": 1, **LORA},
    "consistency_lora_4_checkpointed": {
        "method": CONSISTENCY,
        "batch_size": 4,
        "memory": {"gradient_checkpointing": True},
        **LORA,
    },
    "dmd2_lora_1_checkpointed": {"method": DMD2, "batch_size": 1, "memory": {"gradient_checkpointing": True}, **LORA},
    "consistency_full_1": {
        "method": CONSISTENCY | {"target": {"kind": "solver", "decay": None}},
        "batch_size": 1,
        "memory": {"gradient_checkpointing": True},
    },  # for more than 80 GB
}
DEFAULT_CASES = [name for name in CASES if name != "consistency_full_1"]
TINY_CASES: dict[str, dict[str, Any]] = {
    "consistency": {"method": CONSISTENCY, "batch_size": 8},
    "dmd2": {"method": DMD2, "batch_size": 8},
    "boot": {"method": {"name": "boot", "optim": OPTIM, "steps": 2}, "batch_size": 8},
}


_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 16, "block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 64,
        "transformer_layers_per_block": 1, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "sample_size": 128},
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT | {"projection_dim": 32},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("tiny", "sdxl", "measure"))
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    if args.size == "measure":
        print(json.dumps(measure(*args.cases)))
        return
    known, device = (TINY_CASES, "cpu") if args.size == "tiny" else (CASES, "cuda")
    names = args.cases or (list(TINY_CASES) if args.size == "tiny" else DEFAULT_CASES)
    with tempfile.TemporaryDirectory() as folder:
        teacher = build(Path(folder) / "teacher", args.size)
        files = {name: _config(Path(folder), name, teacher, known[name], device) for name in names}
        plans = {name: _start("-m", "fewstep", "plan", str(file), "--json", "--device", device)
                 for name, file in files.items()}  # fmt: skip
        wrong = False
        for name, file in files.items():
            measured, seconds = _result(_start(str(Path(__file__)), "measure", str(file), device))
            planned, _ = _result(plans[name])
            if measured is None or planned is None:
                wrong = True
                continue
            ratio = planned["peak"] / measured["peak"]
            wrong |= abs(ratio - 1) > 0.1
            print(
                f"{name}: planned {planned['peak'] / 2**30:.3f} GiB, measured {measured['peak'] / 2**30:.3f} GiB, ratio "
                f"{ratio:.3f}; reserved {measured['reserved'] / 2**30:.3f} GiB; run of {measured['iterations']} iterations "
                f"{seconds:.0f} s",
                flush=True,
            )
    sys.exit(wrong)


def _config(folder: Path, name: str, teacher: Path, case: dict[str, Any], device: str) -> Path:
    values = {
        "teacher": str(teacher), "output_dir": str(folder / "run"), "data": {"source": "folder", "path": str(folder)},
        "max_iterations": 10, "train": {"mixed_precision": "bf16" if device == "cuda" else "no", "cpu_threads": 1},
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merged(values, case)))
    return file


def _start(*words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, env=environment)


def _result(process: subprocess.Popen[str]) -> tuple[dict[str, Any] | None, float]:
    start = time.perf_counter()
    out, err = process.communicate()
    if process.returncode:
        print(f"failed: {' '.join(map(str, process.args))}\n{err[-2000:]}", flush=True)
        return None, 0.0
    return json.loads(out.strip().splitlines()[-1]), time.perf_counter() - start


# A run --------------------------------------------------------------------------------------------------------------------


def measure(file: str, device: str) -> dict[str, int]:
    """Peak of a real training's first iterations."""
    import torch

    if device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            iterations = _train(file, device)
        assert profiler.profiler is not None
        held = peak = 0
        events = profiler.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return {"peak": peak, "reserved": peak, "iterations": iterations}
    iterations = _train(file, device)
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "iterations": iterations,
    }


def _train(file: str, device: str) -> int:
    from contextlib import nullcontext

    import torch

    from fewstep.methods.registry import load_run, method_class
    from fewstep.plan.placeholders import PlaceholderSource
    from fewstep.plan.weightless import weightless_teacher
    from fewstep.training.trainer import Trainer

    config = load_run(file)
    teacher = weightless_teacher(config.teacher, lambda: torch.device(device))
    method = method_class(config.method.name)(config.method, teacher)
    trainer = Trainer(config, method, teacher, PlaceholderSource(teacher, config.data, nullcontext))
    iterations = 2
    for trainer.iteration in range(iterations):
        trainer.iterate(method.steps())
    return iterations


# A pipeline's folder without weights --------------------------------------------------------------------------------------


def build(folder: Path, size: str) -> Path:
    """The published configs of SDXL; tiny: with fewer channels, blocks and pixels."""
    shutil.copytree(ROOT / "tests" / "published" / "sdxl", folder)
    if size == "tiny":
        for part, changes in TINY.items():
            file = folder / part / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


if __name__ == "__main__":
    main()
