"""How many steps of DPM-Solver++ the stored trajectories need: samples and states against those of a fine solver.

    python benchmarks/solver_steps.py [--images 800] [--guidance-scale 1.35]

For 4 (the fine one), 2 and 1 steps from milestone to milestone of `fashion`, with halving timesteps below the last milestone, and
for 2 with even ones there: the number of steps, FID of the samples in the embedded classifier's features, and the root mean
square difference of the samples from the fine ones.
"""

import argparse
from pathlib import Path

import torch

from fewstep.assets import asset_path
from fewstep.data.fashion import caption
from fewstep.diffusion.grids import milestone_timesteps, trailing_timesteps
from fewstep.evaluate.metrics.frechet import FrechetDistance
from fewstep.evaluate.models.features import load_features
from fewstep.evaluate.statistics import load_statistics
from fewstep.methods.trajectories import TrajectorySettings, solve
from fewstep.teachers import load_teacher

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--guidance-scale", type=float, default=1.35)
    args = parser.parse_args()
    teacher, features = load_teacher("fashion"), load_features("fashion")
    reference = load_statistics(Path(asset_path("fashion")) / "reference.safetensors").moments
    assert reference is not None
    total = teacher.num_train_timesteps
    milestones = trailing_timesteps(8, total)
    grids = {f"{n}": milestone_timesteps(milestones, n, total) for n in (4, 2, 1)}
    grids["2, even to the end"] = trailing_timesteps(16, total)[:-1]
    noise = torch.randn(args.images, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    prompts = [caption(i % 10) for i in range(args.images)]
    scales = (args.guidance_scale, args.guidance_scale)
    fine = None
    for name, times in grids.items():
        settings = TrajectorySettings(args.images, BATCH, times, (), "dpm", scales)
        fid, parts = FrechetDistance(features, reference), []
        with torch.no_grad():
            for i in range(0, args.images, BATCH):
                x, cond = noise[i : i + BATCH], teacher.condition(prompts[i : i + BATCH])
                scale = torch.full((len(x),), args.guidance_scale)
                parts.append(solve(teacher, x, cond, teacher.null_condition(len(x)), scale, settings)[:, -1])
                fid.update((teacher.decode(parts[-1]) / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8))
        samples = torch.cat(parts)
        fine = samples if fine is None else fine
        off = (samples - fine).square().mean().sqrt()
        print(f"{name}: {len(times)} steps, FID {float(fid.compute()):.4f}, off by {off:.4f}", flush=True)


if __name__ == "__main__":
    main()
