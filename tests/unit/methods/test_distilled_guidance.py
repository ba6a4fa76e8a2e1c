"""Exported guidance: a scale for each step; and a student that keeps guidance, not guided in training, exported to be."""

import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError

from builders.consistency import batch_for, config, consistency, nets_for
from builders.families import build_dit
from fewstep.export.pipeline import export
from fewstep.teachers import load_teacher
from fewstep.teachers.students import StudentGuidance

KEPT = {
    "solver_steps": 40, "steps": 2, "endpoint": "phase", "phases": 2, "sampling": "jump", "guidance_range": None,
    "keep_guidance": True, "target_decay": None,
}  # fmt: skip


def test_exported_to_be_guided(tiny_sd, tmp_path):
    teacher = load_teacher(str(tiny_sd))
    method = consistency(config(**KEPT), teacher)
    assert method.student_guidance.by_caller
    student = nets_for(method)["student"]
    export(
        teacher, student, method.scheduler(), tmp_path / "student", allowed_steps=method.allowed_steps(),
        guidance=method.student_guidance,
        card={"method": "consistency", "paper": "", "teacher": "tiny", "data": "none", "prompt": "a bag"},
    )  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.time_cond_proj_dim is None
    rows: list[int] = []
    pipeline.unet.register_forward_hook(lambda net, args, out: rows.append(len(args[0])))

    def drawn(**options):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a coat", num_inference_steps=2, generator=generator, output_type="pt", **options).images

    plain, guided = drawn(guidance_scale=1.0), drawn(guidance_scale=4.0)
    assert rows == [1, 1, 2, 2]
    assert not torch.allclose(plain, guided, atol=1e-4)
    assert not torch.allclose(drawn(guidance_scale=4.0, negative_prompt="a shirt"), guided, atol=1e-4)
    assert "negative_prompt" in (tmp_path / "student" / "README.md").read_text()


def test_a_share_of_conditions_is_null(tiny_sd):
    teacher = load_teacher(str(tiny_sd))
    method, batch = consistency(config(**KEPT, null_share=0.5), teacher), batch_for(teacher)
    torch.manual_seed(0)
    found = torch.stack(
        [method.stages[0].parts.states.draw._conditions(batch)["encoder_hidden_states"] for _ in range(200)]
    )
    null = (found == batch.uncond["encoder_hidden_states"]).flatten(2).all(2)
    own = (found == batch.cond["encoder_hidden_states"]).flatten(2).all(2)
    assert (null | own).all()
    assert null[:, [0, 1, 3]].float().mean().item() == pytest.approx(0.5, abs=0.06)  # the third prompt is the empty one


def test_impossible(tiny_ddpm):
    with pytest.raises(ValidationError, match=r"null_share: .* Set guidance to null"):
        config(**KEPT | {"guidance_range": (1.0, 2.0)})
    teacher = load_teacher(str(tiny_ddpm))
    with pytest.raises(ValueError, match=r"method\.null_share"):
        consistency(config(**KEPT), teacher)


def test_a_scale_for_each_step_is_exported(tiny_sd, tmp_path):
    """The export compares stock diffusers, in a process without fewstep, with the student in memory at every count."""
    teacher = load_teacher(str(tiny_sd))
    scales = (4.0, 3.0, 5.0, 6.0)
    method = consistency(config(solver_steps=40, steps=4, export_guidance_scale=scales), teacher)
    assert method.student_guidance.scale == {999: 4.0, 749: 3.0, 499: 5.0, 249: 6.0}
    student = nets_for(method)["student"]
    torch.nn.init.normal_(student.net.time_embedding.cond_proj.weight, std=0.5)

    def drawn(scale):
        folder = export(
            teacher, student, method.scheduler(), tmp_path / "student", allowed_steps=method.allowed_steps(),
            guidance=StudentGuidance(scale),
            card={"method": "consistency", "paper": "", "teacher": "tiny", "data": "none", "prompt": "a"},
        )  # fmt: skip
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        options = {"output_type": "pt", "guidance_scale": 9.0}
        return [pipeline("a", num_inference_steps=n, generator=torch.manual_seed(0), **options).images for n in (1, 4)]

    own = drawn(method.student_guidance.scale)
    assert "a scale of 4 at timestep 999, 3 at timestep 749" in (tmp_path / "student" / "README.md").read_text()
    first = drawn(4.0)
    torch.testing.assert_close(own[0], first[0], rtol=0, atol=1e-4)  # of one step, all is the first scale
    assert (own[1] - first[1]).abs().max() > 1e-3


def test_a_scale_for_each_step_needs_a_unet_with_guidance_input(tmp_path):
    teacher = load_teacher(str(build_dit(tmp_path)))
    with pytest.raises(ValueError, match=r"found a scale for each step; .* Stable Diffusion and SDXL"):
        consistency(config(steps=2, export_guidance_scale=(3.0, 4.0)), teacher)
