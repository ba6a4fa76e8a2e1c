"""Error of sampling with re-noising by the teacher's solver alone, without any student.

    python benchmarks/solver_drift.py [--timestep 124] [--images 2000] [--times 3] [--guidance-scale 1.25]

Latents of real images are noised to a timestep and solved back to clean data by the teacher's guided ODE, again and again. An
exact ODE would keep their distribution but for the teacher's own error. Printed after each time: FID in the embedded
classifier's features against all training images, and the latents' standard deviation.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fewstep.assets import asset_path
from fewstep.data.fashion import caption, load_embedded
from fewstep.diffusion.grids import milestone_timesteps
from fewstep.diffusion.prediction import add_noise
from fewstep.evaluate.metrics.frechet import FrechetDistance
from fewstep.evaluate.models.features import load_features
from fewstep.evaluate.statistics import load_statistics
from fewstep.methods.trajectories import Solver, TrajectorySettings, solve
from fewstep.teachers import load_teacher

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timestep", type=int, default=124)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.25)
    args = parser.parse_args()
    teacher, features = load_teacher("fashion"), load_features("fashion")
    reference = load_statistics(Path(asset_path("fashion")) / "reference.safetensors").moments
    assert reference is not None
    images, labels = load_embedded()
    pixels = torch.from_numpy(images[: args.images]).float() / 127.5 - 1
    prompts = [caption(int(label)) for label in labels[: args.images]]

    def score(latents: Tensor) -> str:
        fid = FrechetDistance(features, reference)
        for x0 in latents.split(BATCH):
            fid.update((teacher.decode(x0) / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8))
        return f"FID {float(fid.compute()):.4f}, deviation {latents.std():.4f}"

    with torch.no_grad():
        real = torch.cat([teacher.encode(part).mean for part in pixels.split(BATCH)])
        print(f"reconstructions: {score(real)}")
        for name, solver, times in _solvers(args.timestep, teacher.num_train_timesteps):
            scales = (args.guidance_scale, args.guidance_scale)
            settings = TrajectorySettings(len(real), BATCH, times, (), solver, scales)
            x0, generator = real, torch.Generator().manual_seed(0)
            for k in range(args.times):
                noise = torch.randn(real.shape, generator=generator)
                parts = []
                for i in range(0, len(real), BATCH):
                    rows = slice(i, i + BATCH)
                    t = torch.full((len(x0[rows]),), args.timestep)
                    x_t, cond = add_noise(teacher.schedule, x0[rows], noise[rows], t), teacher.condition(prompts[rows])
                    uncond, scale = teacher.null_condition(len(x_t)), torch.full((len(x_t),), args.guidance_scale)
                    parts.append(solve(teacher, x_t, cond, uncond, scale, settings)[:, -1])
                x0 = torch.cat(parts)
                print(f"{name}, {len(times)} steps, after {k + 1}: {score(x0)}", flush=True)


def _solvers(timestep: int, total: int) -> list[tuple[str, Solver, tuple[float, ...]]]:
    def even(n: int) -> tuple[float, ...]:
        return tuple((torch.linspace(timestep + 1, 0, n + 1).round().long() - 1)[:-1].tolist())

    halving = milestone_timesteps((timestep,), 1, total)
    return [("DDIM, even", "ddim", even(4)), ("DPM-Solver++, halving timesteps", "dpm", halving)]


if __name__ == "__main__":
    main()
