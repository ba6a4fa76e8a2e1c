"""Diagnostics of distribution matching: figures for the log, and warnings."""

from collections.abc import Mapping, Sequence

import torch

from fewstep.diffusion.shapes import Numbers, Samples, Scalar


def sample_figures(x: Samples, real: Samples, fake: Samples) -> dict[str, Scalar]:
    """Figures of the student's samples x beside the teacher's and the critic's x0 from the same, noised.

    Each is one number:
        dm_norm: root mean square of the matching gradient before it is normalised;
        student_to_teacher, student_to_critic: mean absolute distance of x; the second is the fake score's error;
        *_mean, *_std; *_detail, the root mean square of differences between neighbours; *_diversity, the mean standard
        deviation over the batch.
    """
    figures = {
        "dm_norm": (fake - real).square().mean().sqrt(),
        "student_to_teacher": (x - real).abs().mean(),
        "student_to_critic": (x - fake).abs().mean(),
    }
    for name, v in (("student", x), ("teacher", real)):
        figures[f"{name}_mean"], figures[f"{name}_std"] = v.mean(), v.std()
        figures[f"{name}_detail"] = v.diff(dim=-1).square().mean().sqrt()
        figures[f"{name}_diversity"] = v.std(0, correction=0).mean()
    return {name: figure.detach().float() for name, figure in figures.items()}


@torch.no_grad()
def prompt_distances(x: Samples, real: Samples, raw: Sequence[object]) -> dict[str, Scalar]:
    """student_ and teacher_prompt_distance: root mean square distance of samples to the next of the same prompt in `raw`,
    mean over those that have one; nothing where no prompt comes twice.
    """
    last: dict[object, int] = {}
    pairs = []
    for i, prompt in enumerate(raw):
        if prompt in last:
            pairs.append((last[prompt], i))
        last[prompt] = i
    if not pairs:
        return {}
    a, b = torch.tensor(pairs, device=x.device).unbind(1)
    distances = {"student": x[a] - x[b], "teacher": real[a] - real[b]}
    return {
        f"{name}_prompt_distance": v.float().square().flatten(1).mean(1).sqrt().mean() for name, v in distances.items()
    }


@torch.no_grad()
def accuracies(real: Numbers, fake: Numbers) -> dict[str, Scalar]:
    """Share of logits on the right side: real ones above 0, fake ones below."""
    return {"real_accuracy": (real > 0).float().mean(), "fake_accuracy": (fake < 0).float().mean()}


def alarms(figures: Mapping[str, float]) -> list[str]:
    """Warnings about figures outside their healthy range, each with the key to change."""
    said = []
    if {"student_std", "teacher_std"} <= figures.keys():
        ratio = figures["student_std"] / max(figures["teacher_std"], 1e-12)
        if not 0.5 < ratio < 2:
            said.append(
                f"student_std: found {ratio:.2g} times teacher_std; expected 0.5 to 2. The student's samples leave the data: "
                "lower method.optim.lr or raise method.student_update_every"
            )
        ratio = figures["student_diversity"] / max(figures["teacher_diversity"], 1e-12)
        if ratio < 0.5:
            said.append(
                f"student_diversity: found {ratio:.2g} times teacher_diversity; expected at least 0.5. The student collapses: "
                "lower method.adversarial.weight or method.optim.lr"
            )
        of_one_prompt = figures.get("student_prompt_distance", 1.0) / max(
            figures.get("teacher_prompt_distance", 1.0), 1e-12
        )
        if of_one_prompt < 0.5 <= ratio:
            said.append(
                f"student_prompt_distance: found {of_one_prompt:.2g} times teacher_prompt_distance; expected at least 0.5. The "
                "student collapses for each prompt: lower method.adversarial.weight or method.optim.lr"
            )
        ratio = figures["student_to_critic"] / max(figures["student_to_teacher"], 1e-12)
        if ratio > 1.5:
            said.append(
                f"student_to_critic: found {ratio:.2g} times student_to_teacher; expected at most 1.5. The critic is behind the "
                "student: raise method.student_update_every or method.critic_optim.lr"
            )
    if min(figures.get("real_accuracy", 0.0), figures.get("fake_accuracy", 0.0)) > 0.98:
        said.append(
            "real_accuracy, fake_accuracy: found above 0.98; expected less. The discriminator's gradients are small: lower "
            "method.adversarial.critic_weight, or set method.adversarial.r1_weight"
        )
    return said
