"""`fewstep cache`: prompts and images of a config, encoded ahead of training."""

import argparse
from typing import Any

from fewstep.config import RunConfig, Strict, load_config


class AnyMethod(Strict, extra="allow"):
    """The one key of the methods' that prompts stand in; the others are the training's to check."""

    negative_prompt: str = ""


def cache(args: argparse.Namespace) -> None:
    config = load_config(RunConfig[AnyMethod], ["--config", args.config, *args.overrides])
    if config.data.cache is None:
        raise ValueError("data.cache is null; set it in the config, or as data.cache=FOLDER behind it")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from fewstep.data.encoding_cache import Cache
    from fewstep.data.sources import load_source
    from fewstep.data.validate import readable
    from fewstep.teachers import load_teacher

    accelerator = Accelerator()
    teacher = load_teacher(config.teacher)
    source = load_source(config.data, teacher.image_size)
    if teacher.conditions == "prompt" != source.conditions:
        raise ValueError(
            f"data.source: {config.data.source} gives {source.conditions}s, and the teacher wants {teacher.conditions}s"
        )
    images = source.has_images and args.only != "prompts"
    if images:
        source = readable(
            source, config.data.on_error, accelerator.process_index, accelerator.num_processes, gather_object
        )
    found = Cache(config.data.cache, teacher)
    teacher.placement.release(() if images else teacher.placement.image_parts)
    teacher.placement.to(accelerator.device, torch.float32)
    found.fill(
        source, teacher, [teacher.negative(config.method.negative_prompt)], images, config.batch_size, accelerator.process_index,
        accelerator.num_processes, accelerator.wait_for_everyone,
    )  # fmt: skip
    if accelerator.is_main_process:
        print(f"encoded: {config.data.cache}")
    accelerator.end_training()


def add_cache(commands: Any) -> None:
    c = commands.add_parser(
        "cache", help="encode prompts and images of a config ahead of training; goes on where it was stopped"
    )
    c.add_argument("config", metavar="CONFIG", help="config of the training, with data.cache")
    c.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys that differ from the file")
    c.add_argument("--only", choices=("prompts",), help="for methods that see no images (default: images, too)")
    c.set_defaults(run=cache)
