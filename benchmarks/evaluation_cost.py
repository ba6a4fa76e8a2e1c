"""What scoring costs, in pairs that are taken in turn in one process; a ratio's median counts, not a time.

    python benchmarks/evaluation_cost.py frechet [--dimensions 2048] [--images N] [--features NAME] [--rounds 5]
        The Fréchet distance of two Gaussians against torchmetrics' and torch-fidelity's, on the same moments of N images each
        (default: twice as many as dimensions). With --features, such as efficientnet-lite0, real features in place of random
        numbers: of the first N of the 2,000 images in the package against all of them.
    python benchmarks/evaluation_cost.py pass [--images 200] [--steps 1] [--rounds 10] [--device cpu]
        `fewstep evaluate fashion` by FID, from the first noise to the distance, against the pipeline's bare calls and the bare
        forwards of the feature network on as many images.
    python benchmarks/evaluation_cost.py memory [--images 2000 50000] [--dimensions 2048]
        The most memory that a process had resident after features and distance of so many images, a fresh process for each.

`--clock cpu` counts the process's own time on all its threads, for a machine that others use too; the default is the wall's.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("frechet", "pass", "memory", "resident"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--features")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    {"frechet": frechet, "pass": whole_pass, "memory": memory, "resident": resident}[args.what](args)


def frechet(args: argparse.Namespace) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    from fewstep.evaluate.metrics.frechet import frechet_distance
    from fewstep.evaluate.statistics import moments

    if args.features:
        real = _real(args.features)
        a, b = moments(real[: (args.images or [1000])[0]]), moments(real)
    else:
        d = args.dimensions
        n = (args.images or [2 * d])[0]
        scales = (torch.arange(d) + 1.0) ** -0.5  # as Inception's spectrum falls
        a, b = (moments(torch.randn(n, d) * scales + shift) for shift in (0.0, 0.05))
    arrays = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    contestants: dict[str, Callable[[], float]] = {
        "fewstep": lambda: frechet_distance(a, b),
        "torchmetrics": lambda: float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)),
        "torch-fidelity": lambda: float(fid_statistics_to_metric(*arrays, verbose=False)[KEY_METRIC_FID]),
    }
    values = {name: f() for name, f in contestants.items()}  # which warms up too
    seconds = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, f in contestants.items():
            seconds[name].append(_seconds(f, args.clock))
    for name, times in seconds.items():
        ratios = [t / own for t, own in zip(times, seconds["fewstep"], strict=True)]
        print(
            f"{name:>14}: {statistics.median(times):.2f} s, {statistics.median(ratios):.2f} times fewstep's (min "
            f"{min(ratios):.2f}, max {max(ratios):.2f}); distance {values[name]:.10g}"
        )


def _real(name: str) -> torch.Tensor:
    """Features [2000, D] of the images in the package."""
    from fewstep.data.fashion import load_embedded
    from fewstep.evaluate import load_features

    features = load_features(name)
    return torch.cat([features(part) for part in torch.from_numpy(load_embedded()[0].copy()).split(50)])


def whole_pass(args: argparse.Namespace) -> None:
    from diffusers import DiffusionPipeline
    from tqdm import tqdm

    from fewstep.assets import asset_path
    from fewstep.evaluate import PathOverrides, recommended_guidance_scale, sample
    from fewstep.evaluate.conditions import load_conditions
    from fewstep.evaluate.generate import batches
    from fewstep.evaluate.references import protocol_of, resolve
    from fewstep.evaluate.rows import RowRunner
    from fewstep.evaluate.scores import ScoringModels

    n, size, device = (args.images or [200])[0], args.batch_size, torch.device(args.device)
    scale = recommended_guidance_scale("fashion")
    pipeline = DiffusionPipeline.from_pretrained(asset_path("fashion") / "pipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    protocol = protocol_of(resolve("fashion", clip="none"), num_images=n, seed=0)
    what = load_conditions(protocol, "prompt", None)
    instruments = ScoringModels("custom", protocol, PathOverrides({}), 32, device)
    first = sample(pipeline, what.conditions[:1], [0], steps=args.steps, seed=0, guidance_scale=scale)
    run = RowRunner(
        pipeline, protocol, what, instruments, instruments.measure(first.to(device), None), name="fashion",
        batch_size=size, guidance_scale=scale, accelerator=None, keep=None,
    )  # fmt: skip
    network = instruments.comparators[0].network

    def bare() -> None:
        generator = torch.Generator().manual_seed(0)
        for part in batches(n, size):
            prompts = [what.conditions[i] for i in part]
            drawn = pipeline(
                prompts, num_inference_steps=args.steps, guidance_scale=scale, generator=generator, output_type="np"
            ).images
            images = (torch.from_numpy(drawn).permute(0, 3, 1, 2) * 255).round().to(torch.uint8)
            network(images.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def scored() -> None:
        run.row(args.steps, tqdm(disable=True))

    bare(), scored()
    pairs = [(_seconds(bare, args.clock), _seconds(scored, args.clock)) for _ in range(args.rounds)]
    ratios = [b / a for a, b in pairs]
    floor, spent = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{n} images, {args.steps} step(s), batch {size}, {args.device}, {torch.get_num_threads()} threads: bare {floor:.2f} s, "
        f"scored {spent:.2f} s, ratio median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}) "
        f"over {args.rounds} rounds"
    )


def memory(args: argparse.Namespace) -> None:
    for n in args.images or (2_000, 50_000):
        call = [sys.executable, __file__, "resident", "--images", str(n), "--dimensions", str(args.dimensions)]
        print(subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip())


def resident(args: argparse.Namespace) -> None:
    """Images of noise, their first pixels for features: what is held grows with neither network nor pipeline."""
    from torch import nn

    from fewstep.evaluate import FrechetDistance, ImageFeatures, Moments
    from fewstep.evaluate.rows import peak_memory

    (n,), d = args.images, args.dimensions
    side = int((d / 3) ** 0.5) + 1
    features = ImageFeatures("pixels", lambda x: {"features": x.flatten(1)[:, :d].float() / 255}, nn.Identity())
    metric = FrechetDistance(features, Moments(torch.full((d,), 0.5).double(), torch.eye(d).double() / 12, None))
    g = torch.Generator().manual_seed(0)
    for start in range(0, n, 100):
        metric.update(torch.randint(0, 256, (min(100, n - start), 3, side, side), dtype=torch.uint8, generator=g))
    value = float(metric.compute())
    print(f"{n} images, {d} dimensions: distance {value:.4f}, {peak_memory(torch.device('cpu')):.3f} GiB at most")


def _seconds(f: Callable[[], object], clock: str) -> float:
    start = CLOCKS[clock]()
    f()
    return CLOCKS[clock]() - start


if __name__ == "__main__":
    main()
