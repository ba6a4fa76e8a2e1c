"""The options that choose a protocol of scores."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Options:
    """What a command line says of a protocol; None = nothing.

    Attributes:
        protocol: name or file of a protocol; None = the unnamed one.
        references: [COMPARISON=]PATH.
        rewards: more rewards than the protocol's; "none" = no reward.
    """

    protocol: str | None
    num_images: int | None
    seed: int | None
    references: Sequence[str] = ()
    features: str | None = None
    clip: str | None = None
    prompts: Path | None = None
    teacher_statistics: str | None = None
    rewards: Sequence[str] | None = None


def protocol_of(args: argparse.Namespace, num_images: int | None) -> "tuple[str, Protocol, PathOverrides]":
    """The protocol of the options of `add_protocol`."""
    return asked(
        Options(
            args.protocol, num_images, args.seed, args.reference or (), args.features, args.clip, args.prompts,
            args.teacher_statistics, args.reward,
        )
    )  # fmt: skip


def asked(options: Options) -> "tuple[str, Protocol, PathOverrides]":
    """A named protocol, whose name then lists its changes, or the unnamed one."""
    references = dict(_named(item) for item in options.references)
    name, protocol, overrides = (_unnamed if options.protocol is None else _changed)(options, references)
    return _with_teacher(name, protocol, overrides, options.teacher_statistics)


def _unnamed(options: Options, references: Mapping[str, str]) -> "tuple[str, Protocol, PathOverrides]":
    from fewstep.evaluate import PathOverrides
    from fewstep.evaluate import references as reference

    if len(references) > 1 or set(references) - {""}:
        raise FewstepError("--reference", "COMPARISON=PATH", "PATH, without a --protocol that has that comparison")
    sources = reference.resolve(references.get("", "fashion"), options.features, options.clip, options.prompts)
    protocol = reference.protocol_of(sources, num_images=options.num_images or 2000, seed=options.seed or 0)
    return "custom", _with_rewards(protocol, options.rewards or ()), PathOverrides({})


def _changed(options: Options, references: Mapping[str, str]) -> "tuple[str, Protocol, PathOverrides]":
    from fewstep.evaluate import PathOverrides, load_protocol

    assert options.protocol is not None  # the caller asks for a named one
    name, protocol = load_protocol(options.protocol)
    if options.features is not None:
        raise FewstepError(
            "--features",
            options.features,
            f"nothing with protocol {name}, which has its own",
            "Copy its YAML file and change them there",
        )
    if unknown := set(references) - {c.name for c in protocol.comparisons}:
        raise FewstepError("--reference", ", ".join(map(repr, sorted(unknown))), f"a comparison of protocol {name}")
    if options.prompts is not None and not options.prompts.is_file():
        raise MissingError("--prompts", repr(str(options.prompts)), "a file")
    overrides = PathOverrides(references, options.prompts, folder=name)
    if changes := _changes(options, name, protocol):
        protocol = type(protocol).model_validate({**protocol.model_dump(mode="json"), **changes})
        name = f"{name}, changed: {', '.join(changes)}"
    return name, protocol, overrides


def _changes(options: Options, name: str, protocol: "Protocol") -> dict[str, object]:
    """The keys of a named protocol that the options change."""
    changes: dict[str, object] = {}
    if options.num_images is not None and options.num_images != protocol.images:
        changes["images"] = options.num_images
    if options.seed is not None and options.seed != protocol.seed:
        changes["seed"] = options.seed
    if options.clip == "none":
        changes["clip"] = None
    elif options.clip is not None and protocol.clip is not None and protocol.clip.model is None:
        changes["clip"] = {**protocol.clip.model_dump(mode="json"), "model": options.clip}
    elif options.clip is not None:
        raise FewstepError("--clip", options.clip, f"none, as the CLIP of protocol {name} is fixed")
    rewards = protocol.rewards if options.rewards is None else _with_rewards(protocol, options.rewards).rewards
    if rewards != protocol.rewards:
        changes["rewards"] = rewards
    return changes


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
