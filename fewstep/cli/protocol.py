"""The options that choose a protocol of scores."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.errors import FewstepError, MissingError

if TYPE_CHECKING:
    from fewstep.evaluate import PathOverrides, Protocol


def add_protocol(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol", metavar="NAME|FILE", help="a named protocol (fewstep/evaluate/protocols) or a YAML file of one"
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="[COMPARISON=]PATH",
        help="fashion, a .npz or .safetensors of statistics, a folder of images, or owner/name[:split] of a data set in the "
        "hub's cache; with --protocol, where its own lie (default: fashion, or the protocol's)",
    )
    parser.add_argument(
        "--features",
        metavar="NAME",
        help="what FID is measured in: fashion, inception, inception-clean, efficientnet-lite0, module:function, or the folder "
        "or cached hub id of a transformers image model",
    )
    parser.add_argument("--clip", metavar="FOLDER", help="transformers CLIPModel of the CLIP score, or none")
    parser.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="mean reward of the images, one more for each time: pickscore, aesthetic, hpsv2, hpsv2.1, image_reward, mps, or "
        "your own as package.module:callable; none switches off the protocol's",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line, or .jsonl; taken in order and repeated"
    )
    parser.add_argument(
        "--teacher-statistics",
        metavar="FILE",
        help="statistics of a teacher's images (fewstep reference PIPELINE --steps N), for fid_to_teacher",
    )


def protocol_of(args: argparse.Namespace, num_images: int | None) -> "tuple[str, Protocol, PathOverrides]":
    """What the options of `add_protocol` ask for."""
    return asked(
        args.protocol, num_images, args.seed, references=args.reference or [], features=args.features, clip=args.clip,
        prompts=args.prompts, teacher_statistics=args.teacher_statistics, rewards=args.reward,
    )  # fmt: skip


def asked(
    named: str | None,
    num_images: int | None,
    seed: int | None,
    *,
    references: Sequence[str] = (),
    features: str | None = None,
    clip: str | None = None,
    prompts: Path | None = None,
    teacher_statistics: str | None = None,
    rewards: Sequence[str] | None = None,
) -> "tuple[str, Protocol, PathOverrides]":
    """A named protocol, whose name then lists its changes, or for None the unnamed one; None changes nothing."""
    from fewstep.evaluate import PathOverrides, load_protocol
    from fewstep.evaluate import references as reference

    given_references = dict(_named(item) for item in references)
    if named is None:
        if len(given_references) > 1 or set(given_references) - {""}:
            raise FewstepError("--reference", "COMPARISON=PATH", "PATH, without a --protocol that has that comparison")
        sources = reference.resolve(given_references.get("", "fashion"), features, clip, prompts)
        protocol = reference.protocol_of(sources, num_images=num_images or 2000, seed=seed or 0)
        protocol = _with_rewards(protocol, rewards or ())
        return _with_teacher("custom", protocol, PathOverrides({}), teacher_statistics)
    name, protocol = load_protocol(named)
    overrides = PathOverrides(given_references, prompts, folder=name)
    if features is not None:
        raise FewstepError(
            "--features",
            features,
            f"nothing with protocol {name}, which has its own",
            "Copy its YAML file and change them there",
        )
    unknown = set(given_references) - {c.name for c in protocol.comparisons}
    if unknown:
        raise FewstepError("--reference", ", ".join(map(repr, sorted(unknown))), f"a comparison of protocol {name}")
    if prompts is not None and not prompts.is_file():
        raise MissingError("--prompts", repr(str(prompts)), "a file")
    changes: dict[str, object] = {}
    if num_images is not None and num_images != protocol.images:
        changes["images"] = num_images
    if seed is not None and seed != protocol.seed:
        changes["seed"] = seed
    settings = protocol.model_dump(mode="json")
    if clip == "none":
        changes["clip"] = None
    elif clip is not None and protocol.clip is not None and protocol.clip.model is None:
        changes["clip"] = {**settings["clip"], "model": clip}
    elif clip is not None:
        raise FewstepError("--clip", clip, f"none, as the CLIP of protocol {name} is fixed")
    if rewards is not None:
        protocol, before = _with_rewards(protocol, rewards), protocol
        settings = protocol.model_dump(mode="json")
        if protocol.rewards != before.rewards:
            changes["rewards"] = protocol.rewards
    if changes:
        protocol = type(protocol).model_validate({**settings, **changes})
        name = f"{name}, changed: {', '.join(changes)}"
    return _with_teacher(name, protocol, overrides, teacher_statistics)


def _with_rewards(protocol: "Protocol", names: Sequence[str]) -> "Protocol":
    """More rewards than the protocol has; none switches all off."""
    from fewstep.evaluate.protocol import REWARDS, is_own_reward

    if unknown := [name for name in names if name not in (*REWARDS, "none") and not is_own_reward(name)]:
        raise FewstepError("--reward", ", ".join(unknown), f"{', '.join(REWARDS)}, package.module:callable, none")
    if "none" in names:
        if len(names) > 1:
            raise FewstepError("--reward", "none beside others", "none alone")
        return protocol.model_copy(update={"rewards": ()})
    return protocol.model_copy(update={"rewards": tuple(dict.fromkeys((*protocol.rewards, *names)))})


def _with_teacher(
    name: str, protocol: "Protocol", overrides: "PathOverrides", teacher_statistics: str | None
) -> "tuple[str, Protocol, PathOverrides]":
    if teacher_statistics is None:
        return name, protocol, overrides
    if not protocol.comparisons:
        raise FewstepError("--teacher-statistics", "a file", "nothing with a protocol without features")
    from fewstep.evaluate import PathOverrides

    first = protocol.model_dump(mode="json")["comparisons"][0]
    added = {**first, "name": "to_teacher", "metrics": ["fid"], "reference": teacher_statistics}
    settings = protocol.model_dump(mode="json")
    settings["comparisons"] = [*settings["comparisons"], added]
    references: Mapping[str, str] = {**overrides.references, "to_teacher": teacher_statistics}
    label = name if name == "custom" else f"{name} and fid_to_teacher"
    return (
        label,
        type(protocol).model_validate(settings),
        PathOverrides(references, overrides.prompts, overrides.folder),
    )


def _named(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    return (name, path) if equals and name.isidentifier() and not Path(item).exists() else ("", item)
