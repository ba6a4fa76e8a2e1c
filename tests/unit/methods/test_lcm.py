"""The latent consistency loss against formulas written out independently, and the scalings its mistakes hide from."""

import math

import pytest
import torch
from pydantic import ValidationError

from builders.consistency import batch_for, config, consistency, nets_for
from fewstep.diffusion.grids import even_grid
from fewstep.methods.base import Batch
from fewstep.methods.consistency.endpoints import boundary_scalings
from fewstep.teachers import load_teacher


def test_boundary_scalings_known_values():
    c_skip, c_out = boundary_scalings(torch.tensor([0, 1, 19, 999]), 10.0)
    assert c_skip[0] == 1 and c_out[0] == 0
    assert c_skip[1].item() == pytest.approx(2.494e-3, rel=1e-3)
    assert c_out[1].item() == pytest.approx(0.99875, rel=1e-5)
    assert c_skip[2].item() == pytest.approx(6.93e-6, rel=1e-3)
    assert c_out[3].item() == pytest.approx(1.0, abs=1e-8)
    assert boundary_scalings(torch.tensor([1]), 1.0)[0].item() == pytest.approx(0.2, rel=1e-6)


def test_solver_grid_starts_at_the_noisiest_and_ends_at_zero():
    t, s, _ = even_grid(50, 1000)
    assert t[:3].tolist() == [19, 39, 59] and t[-1] == 999
    assert s[:3].tolist() == [0, 19, 39] and s[-1] == 979


def reference_loss(teacher, nets, batch, index, noise, guidance, huber_c):
    """The loss of Luo et al. for one sample at a time, in float64 scalars of the schedule and plain arithmetic."""
    unet = teacher.pipeline.unet
    a = teacher.pipeline.scheduler.alphas_cumprod.double()
    kind = teacher.pipeline.scheduler.config.prediction_type

    def x0_eps(output, z, t):
        al, si = math.sqrt(a[t]), math.sqrt(1 - a[t])
        if kind == "epsilon":
            return (z - si * output) / al, output
        return al * z - si * output, al * output + si * z

    def embed(w, dim=256):
        half = dim // 2
        f = torch.exp(-math.log(10000.0) * torch.arange(half).float() / (half - 1))
        x = 1000.0 * w * f
        return torch.cat([x.sin(), x.cos()])[None]

    def student(net, z, t, i):
        cond = {k: v[i : i + 1] for k, v in batch.cond.items()}
        out = net.net(z, torch.tensor([t]), **cond, timestep_cond=embed(float(guidance[i]) - 1)).sample
        x0, _ = x0_eps(out, z, t)
        q = 10.0 * t
        return (0.25 / (q * q + 0.25)) * z + (q / math.sqrt(q * q + 0.25)) * x0

    total = []
    for i in range(batch.size):
        t = 20 * (int(index[i]) + 1) - 1
        s = max(t - 20, 0)
        z = math.sqrt(a[t]) * batch.x0[i : i + 1] + math.sqrt(1 - a[t]) * noise[i : i + 1]
        g = float(guidance[i])
        parts = []
        for source in (batch.cond, batch.uncond):
            cond = {k: v[i : i + 1] for k, v in source.items()}
            parts.append(x0_eps(unet(z, torch.tensor([t]), **cond).sample, z, t))
        x0 = parts[0][0] + (g - 1) * (parts[0][0] - parts[1][0])
        eps = parts[0][1] + (g - 1) * (parts[0][1] - parts[1][1])
        z_s = math.sqrt(a[s]) * x0 + math.sqrt(1 - a[s]) * eps
        d = student(nets["student"], z, t, i) - student(nets["target"], z_s, s, i)
        total.append((d * d).mean() if huber_c is None else ((d * d + huber_c**2).sqrt() - huber_c).mean())
    return torch.stack(total).mean()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_loss_equals_the_formulas(tiny_sd_path, kind, distance):
    teacher = load_teacher(str(tiny_sd_path(kind)))
    method = consistency(config(distance=distance), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    index = torch.tensor([0, 49, 17, 1])
    noise = torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(9))
    guidance = torch.tensor([3.0, 8.0, 4.5, 6.0])
    with torch.no_grad():
        loss = method.loss(nets, batch, index=index, noise=noise, guidance_scale=guidance).losses["consistency"]
        expected = reference_loss(teacher, nets, batch, index, noise, guidance, None if distance == "l2" else 1e-3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_student_starts_as_the_teacher_for_any_guidance(tiny_sd_path):
    teacher = load_teacher(str(tiny_sd_path("v_prediction")))
    batch = batch_for(teacher)
    student = consistency(config(), teacher).roles()["student"].net
    t = torch.tensor([0, 19, 500, 999])
    with torch.no_grad():
        a = teacher.denoiser(batch.x0, t, batch.cond)
        b = student(batch.x0, t, batch.cond, torch.tensor([1.0, 3.0, 8.0, 14.0]))
    assert torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps)


def test_online_target_has_no_extra_network(tiny_sd_path):
    teacher = load_teacher(str(tiny_sd_path("epsilon")))
    roles = consistency(config(target_decay=None), teacher).roles()
    assert list(roles) == ["teacher", "student"]


def test_index_zero_target_is_the_solver_state(tiny_sd_path):
    """At t = 0 the consistency function is the identity, whatever the network says."""
    teacher = load_teacher(str(tiny_sd_path("epsilon")))
    method = consistency(config(), teacher)
    nets, batch = nets_for(method), batch_for(teacher)
    index, noise, g = torch.zeros(4, dtype=torch.long), torch.randn_like(batch.x0), torch.full((4,), 3.0)
    with torch.no_grad():
        first = method.loss(nets, batch, index=index, noise=noise, guidance_scale=g).losses["consistency"]
        for p in nets["target"].parameters():
            p.add_(0.3)
        assert torch.equal(
            method.loss(nets, batch, index=index, noise=noise, guidance_scale=g).losses["consistency"], first
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 7}, r"steps: found 7; expected a divisor of grid.points \(50\)"),
        ({"guidance_range": (5.0, 3.0)}, "range: found"),
        ({"export_guidance_scale": 20.0}, "found 20.0; expected a scale in the trained range"),
        ({"steps": 2, "export_guidance_scale": (5.0, 20.0)}, "found 20.0; expected a scale in the trained range"),
        ({"steps": 4, "export_guidance_scale": (5.0, 4.0)}, "found 2 scales; expected one number or 4"),
        ({"distance": "pseudo_huber", "huber_c": 0.0}, "distance"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_grid_must_divide_the_teachers_timesteps(tiny_sd_path):
    teacher = load_teacher(str(tiny_sd_path("epsilon")))
    with pytest.raises(ValueError, match=r"method\.grid\.points: found 48"):
        consistency(config(solver_steps=48, steps=8), teacher)


def test_unconditional_teacher_has_no_guidance(tiny_ddpm):
    teacher = load_teacher(str(tiny_ddpm))
    with pytest.raises(ValueError, match=r"method\.guidance: "):
        consistency(config(), teacher)
    method = consistency(config(guidance_range=None), teacher)
    nets = {name: role.net for name, role in method.roles().items()}
    x0 = torch.randn(2, *teacher.latent_shape)
    output = method.loss(nets, Batch(2, teacher.condition([None] * 2), {}, torch.device("cpu"), latents=x0))
    assert torch.isfinite(output.losses["consistency"])
