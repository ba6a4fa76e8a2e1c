"""Teachers: the pipeline's own arithmetic, students that start as their teacher, stock pipelines for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file, save_file

from builders.families import build_sd3, build_sdxl
from builders.pipelines import build_sd
from builders.teachers import perturbed
from fewstep.config import LoraConfig
from fewstep.errors import FewstepError
from fewstep.teachers import Denoiser, Teacher, load_teacher
from fewstep.teachers.embeddings.unet import guidance_embedding, shift_at

T = torch.tensor([999, 10])
PROMPTS = ["a bag", "a shoe"]


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sd_epsilon"])
def sd(request: pytest.FixtureRequest) -> Teacher:
    return load_teacher(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module", params=["tiny_ddpm", "tiny_ddpm_grey"])
def pixel(request: pytest.FixtureRequest) -> Teacher:
    return load_teacher(str(request.getfixturevalue(request.param)))


def noise(teacher: Teacher) -> torch.Tensor:
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def test_unknown_class_names_the_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(ValueError, match="a KolorsPipeline; expected one of StableDiffusionPipeline"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", ["fashon", "/no/such/folder", "./nothing/here"])
def test_missing_teacher_names_the_embedded(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="embedded name"):
        load_teacher(name)


def test_a_folder_without_a_pipeline_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index"):
        load_teacher(str(tmp_path))


def test_typo_gets_the_nearest_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'fashion'\?"):
        load_teacher("fasion")


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("tokenizer", "expected a folder tokenizer in it, which its model_index.json names"),
        ("unet/diffusion_pytorch_model.safetensors", r"cannot be loaded \(.*no file named diffusion_pytorch_model"),
        ("text_encoder/model.safetensors", r"cannot be loaded \("),
        ("unet/config.json", r"cannot be loaded \(.*config.json"),
    ],
)
def test_broken_folder_is_one_sentence(broken: str, expected: str, tiny_sd: Path, tmp_path: Path) -> None:
    """A folder or weights that are gone, weights and a config that are cut short."""
    path = shutil.copytree(tiny_sd, tmp_path / "sd") / broken
    if path.is_dir():
        shutil.rmtree(path)
    elif path.parent.name == "unet" and path.suffix == ".safetensors":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=expected) as e:
        load_teacher(str(tmp_path / "sd"))
    assert "\n" not in str(e.value)


def test_missing_weights_are_reported(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers goes on with random ones."""
    path = shutil.copytree(tiny_sd, tmp_path / "sd") / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.bias"], weights["conv_in.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"without 2 weights of its unet; expected all, first conv_in\.weight"):
        load_teacher(str(tmp_path / "sd"))


@pytest.mark.parametrize(
    ("build", "part", "targets"),
    [
        (build_sd, "unet", ["to_q", "conv1"]),
        pytest.param(build_sdxl, "unet", ["to_k", "net.2"], marks=pytest.mark.slow),
        (build_sd3, "transformer", ["to_v"]),
    ],
)
def test_adapters_that_are_in_the_pipeline_are_distilled(
    build: Callable[[Path], Path], part: str, targets: list[str], tmp_path: Path
) -> None:
    """Fused, they are the teacher, of students of either kind; beside the weights they are refused."""
    pipeline: Any = DiffusionPipeline.from_pretrained(build(tmp_path / "plain"))
    pipeline.set_progress_bar_config(disable=True)
    net = getattr(pipeline, part)
    net.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    drawn = pipeline("a bag", **call, generator=torch.Generator().manual_seed(1)).images
    pipeline.save_pretrained(tmp_path / "beside")
    with pytest.raises(ValueError, match=f"saved with adapters in its {part}; .* fuse_lora"):
        load_teacher(str(tmp_path / "beside"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    teacher = load_teacher(str(tmp_path / "fused"))
    again = teacher.pipeline("a bag", **call, generator=torch.Generator().manual_seed(1)).images
    torch.testing.assert_close(again, drawn, rtol=1e-3, atol=1e-3)
    plain: Any = load_teacher(str(tmp_path / "plain")).pipeline
    other = plain("a bag", **call, generator=torch.Generator().manual_seed(1)).images
    assert (other - drawn).abs().max() > 0.05
    x, t, cond = noise(teacher), T, teacher.condition(PROMPTS)
    expected = teacher.denoiser(x, t, cond).x0
    assert torch.equal(teacher.students.new()(x, t, cond).x0, expected)
    teacher.students.adapt(LoraConfig(rank=2))
    assert torch.equal(teacher.students.new()(x, t, cond).x0, expected)


def test_epsilon_with_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero terminal SNR"):
        load_teacher(str(build_sd(tmp_path / "sd", "epsilon", zero_terminal_snr=True)))


def test_v_with_zero_terminal_snr_keeps_it_in_the_student(tmp_path: Path) -> None:
    teacher = load_teacher(str(build_sd(tmp_path / "sd", zero_terminal_snr=True)))
    assert teacher.samplers.renoise(4).alphas_cumprod[-1] == 0


def test_embedded_teacher() -> None:
    teacher = load_teacher("fashion")
    assert (teacher.image_size, teacher.latent_shape, teacher.conditions) == (32, (4, 8, 8), "prompt")
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    assert not teacher.denoiser.net.training


def test_latents_are_the_pipelines(sd: Teacher) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, vae = sd.encode(images), sd.pipeline.vae
    distribution = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, distribution.mean * vae.config.scaling_factor)
    torch.testing.assert_close(posterior.std, distribution.std * vae.config.scaling_factor)
    assert posterior.sample(noise(sd)).shape == (2, *sd.latent_shape)
    latents = noise(sd).requires_grad_()
    decoded = sd.decode(latents)
    assert decoded.shape == images.shape
    decoded.sum().backward()
    assert latents.grad is not None
    with pytest.raises(ValueError, match="images: found size"):
        sd.encode(images[..., :16])


def test_conditions_are_the_pipelines(sd: Teacher) -> None:
    cond = sd.condition(["a bag", "a shoe", "a bag"])["encoder_hidden_states"]
    direct = sd.pipeline.encode_prompt(["a shoe"], "cpu", 1, False)[0]
    torch.testing.assert_close(cond[1:2], direct, rtol=1e-5, atol=1e-5)
    assert torch.equal(cond[0], cond[2])
    assert torch.equal(sd.null_condition(2)["encoder_hidden_states"][1], sd.condition([""])["encoder_hidden_states"][0])
    with pytest.raises(ValueError, match=r"data\.source"):
        sd.condition([3])


def test_embedding_is_the_stock_one(tiny_sd: Path) -> None:
    teacher = load_teacher(str(tiny_sd))
    stock = teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4))
    scales = torch.tensor([1.0, 2.5, 8.5])
    torch.testing.assert_close(guidance_embedding(scales), stock.get_guidance_scale_embedding(scales - 1, 256))


@pytest.mark.parametrize("guidance", [False, True])
def test_student_starts_as_the_teacher(sd: Teacher, guidance: bool) -> None:
    student, cond = sd.students.new(guidance), sd.condition(PROMPTS)
    assert all(p.requires_grad for p in student.parameters())
    assert student.net.training
    expected = sd.denoiser(noise(sd), T, cond)
    for scale in (1.0, 7.5):
        found = student(noise(sd), T, cond, torch.full((2,), scale) if guidance else None)
        torch.testing.assert_close(found.x0, expected.x0)


def test_guidance_scale_goes_where_it_is_embedded(sd: Teacher) -> None:
    cond, scale = sd.condition(PROMPTS), torch.ones(2)
    with pytest.raises(ValueError, match="guidance_scale: found one; expected none"):
        sd.denoiser(noise(sd), T, cond, scale)
    with pytest.raises(ValueError, match="guidance_scale: found none"):
        sd.students.new(True)(noise(sd), T, cond)


def test_fold_is_exact(sd: Teacher) -> None:
    student, cond = perturbed(sd, True), sd.condition(PROMPTS)
    before = {name: p.clone() for name, p in student.named_parameters()}
    live = student(noise(sd), T, cond, torch.full((2,), 3.5)).eps
    folded = Denoiser(
        sd.students.pipeline(student, sd.samplers.renoise(4), 3.5).unet,
        student.call, student.schedule, student.prediction_type,
    )  # fmt: skip
    for scale in (1.0, 9.0):
        found = folded(noise(sd), T, cond, torch.full((2,), scale)).eps
        torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-5)
    other = student(noise(sd), T, cond, torch.full((2,), 1.5)).eps
    assert (other - live).abs().max() > 1e-3
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]), name


def test_fold_of_a_scale_for_each_timestep_is_exact(sd: Teacher) -> None:
    """At its timesteps the folded network is the student told their scales; what the caller says does not matter."""
    student, cond = perturbed(sd, True), sd.condition(PROMPTS)
    scales = {999: 1.5, 874: 3.5, 749: 1.0, 499: 7.0, 249: 2.0, 124: 2.0}
    unet = sd.students.pipeline(student, sd.samplers.renoise(8), scales).unet
    folded = Denoiser(unet, student.call, student.schedule, student.prediction_type)
    for t, scale in scales.items():
        at = torch.full((2,), t)
        live = student(noise(sd), at, cond, torch.full((2,), scale)).eps
        torch.testing.assert_close(folded(noise(sd), at, cond, torch.full((2,), 9.0)).eps, live, rtol=1e-5, atol=1e-5)
        other = student(noise(sd), at, cond, torch.full((2,), scale + 1)).eps
        assert (other - live).abs().max() > 1e-3


def test_more_shifts_than_a_layer_has_inputs_are_refused() -> None:
    layer = torch.nn.Linear(3, 2).double()
    before = layer(torch.eye(3).double())
    shift_at(layer, torch.eye(3), torch.arange(6.0).view(3, 2))
    torch.testing.assert_close(layer(torch.eye(3).double()) - before, torch.arange(6.0).view(3, 2).double())
    dependent = torch.cat([torch.eye(3), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="found 4 of 3 numbers"):
        shift_at(layer, dependent, torch.tensor([[1.0, 0], [0, 1], [1, 1], [5, 5]]))


@pytest.mark.parametrize("guidance", [False, True])
def test_stock_pipeline_draws_the_student(sd: Teacher, guidance: bool) -> None:
    """One step of the stock pipeline is the student's x0 at t = 999, whatever guidance_scale the caller passes."""
    student, cond = perturbed(sd, guidance), sd.condition(["a bag"])
    scale = 2.0 if guidance else None
    pipeline = sd.students.pipeline(student, sd.samplers.renoise(4, timestep_scaling=10.0), scale)
    x = noise(sd)[:1]
    with torch.no_grad():
        x0 = student(x, T[:1], cond, torch.tensor([scale]) if scale else None).x0
    for passed in (1.0, 8.5):
        found = pipeline("a bag", num_inference_steps=1, latents=x, output_type="latent", guidance_scale=passed).images
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_live_guidance_is_the_callers(tiny_sd: Path) -> None:
    teacher = load_teacher(str(tiny_sd))
    student, x = perturbed(teacher, True), noise(teacher)[:1]
    pipeline = teacher.students.pipeline(student, teacher.samplers.renoise(4))
    for scale in (1.5, 4.0):
        with torch.no_grad():
            x0 = student(x, T[:1], teacher.condition(["a bag"]), torch.tensor([scale])).x0
        found = pipeline("a bag", num_inference_steps=1, latents=x, output_type="latent", guidance_scale=scale).images
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_other_schedulers_get_the_plain_pipeline_without_guidance(tiny_sd: Path) -> None:
    from diffusers import DDIMScheduler

    teacher = load_teacher(str(tiny_sd))
    scheduler = DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    pipeline = teacher.students.pipeline(teacher.students.new(), scheduler)
    draw = [
        pipeline("a bag", num_inference_steps=2, guidance_scale=g, latents=noise(teacher)[:1], output_type="np").images
        for g in (1.0, 7.5)
    ]
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert (draw[0] == draw[1]).all()


def test_guidance_without_an_embedding_is_refused(sd: Teacher, pixel: Teacher) -> None:
    for teacher in (sd, pixel):
        with pytest.raises(ValueError, match="guidance_scale: found"):
            teacher.students.pipeline(teacher.students.new(), teacher.samplers.renoise(4), 2.0)


def test_grid(sd: Teacher, pixel: Teacher) -> None:
    for teacher in (sd, pixel):
        scheduler = teacher.samplers.renoise(8)
        grids = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]}
        for steps, grid in grids.items():
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == grid
        with pytest.raises(ValueError):
            scheduler.set_timesteps(9)
        with pytest.raises(ValueError, match="steps: found 7"):
            teacher.samplers.renoise(7)


def test_moved_teacher_gives_full_precision_students(tiny_sd: Path) -> None:
    teacher = load_teacher(str(tiny_sd))
    teacher.condition(PROMPTS)
    teacher.placement.to(torch.device("cpu"), torch.bfloat16)
    assert teacher.condition(PROMPTS)["encoder_hidden_states"].dtype == torch.bfloat16
    student = teacher.students.new(True)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert teacher.denoiser(noise(teacher), T, teacher.condition(PROMPTS)).x0.dtype == torch.float32
    pipeline = teacher.students.pipeline(student, teacher.samplers.renoise(4), 2.0)
    assert pipeline("a bag", num_inference_steps=2).images[0].size == (32, 32)
    assert teacher.pipeline.vae.dtype == torch.bfloat16


def test_pixels(pixel: Teacher) -> None:
    channels = pixel.latent_shape[0]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = pixel.encode(images)
    assert posterior.mean.shape == (2, channels, 16, 16)
    assert not posterior.std.any()
    expected = images if channels == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(pixel.decode(posterior.mean), expected)
    assert pixel.condition([None, None]) == {} == pixel.null_condition(2)
    with pytest.raises(ValueError, match="guidance"):
        pixel.students.new(guidance_embedding=True)
    student = pixel.students.new()
    assert torch.equal(student(images[:, :channels], T, {}).x0, pixel.denoiser(images[:, :channels], T, {}).x0)
    pipeline = pixel.students.pipeline(student, pixel.samplers.renoise(4))
    assert pipeline(num_inference_steps=4).images[0].size == (16, 16)


def test_features_come_from_the_mid_block(sd: Teacher, pixel: Teacher) -> None:
    for teacher in (sd, pixel):
        shapes: list[torch.Size] = []
        module = teacher.denoiser.feature_module()
        handle = module.register_forward_hook(lambda _, __, output, shapes=shapes: shapes.append(output.shape))
        teacher.denoiser(noise(teacher), T, teacher.condition(PROMPTS))
        handle.remove()
        assert shapes[0][0] == 2 and len(shapes[0]) == 4


def test_a_pipeline_in_memory_is_a_teacher(tiny_sd: Path) -> None:
    """The same numbers as its folder's; its parts wait in main memory, and the caller's pipeline keeps them."""
    given: Any = DiffusionPipeline.from_pretrained(tiny_sd, dtype=torch.float64)
    teacher, again = load_teacher(given), load_teacher(str(tiny_sd))
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in teacher.denoiser.parameters())
    x, cond = noise(teacher), teacher.condition(PROMPTS)
    assert torch.equal(teacher.denoiser(x, T, cond).x0, again.denoiser(x, T, again.condition(PROMPTS)).x0)
    teacher.placement.release(teacher.placement.parts)
    assert teacher.pipeline.vae is None is not given.vae and teacher.placement.away["vae"] is given.vae
    teacher.placement.moved[0]()
    assert all(torch.equal(value, cond[key]) for key, value in teacher.condition(PROMPTS).items())
    assert teacher.decode(x).isfinite().all()


def test_unusable_pipelines_in_memory_are_refused(tiny_sd: Path) -> None:
    with pytest.raises(
        FewstepError, match="teacher: found a Linear; expected a folder, a hub id, an embedded name or a pi"
    ):
        load_teacher(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny_sd)
    image: Any = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(FewstepError, match="a StableDiffusionImg2ImgPipeline; expected one of StableDiffusionPipeline"):
        load_teacher(image)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(FewstepError, match="adapters in its unet; expected merged weights"):
        load_teacher(pipeline)
    pipeline.unload_lora_weights()
    pipeline.vae = None
    with pytest.raises(FewstepError, match="a StableDiffusionPipeline without vae"):
        load_teacher(pipeline)
