"""`fewstep cache`: prompts and images of a config, encoded ahead of training."""

import argparse

from fewstep.cli.options import CONFIG_HELP, Commands
from fewstep.errors import FewstepError
from fewstep.methods.registry import load_run


def cache(args: argparse.Namespace) -> None:
    config = load_run(args.config, args.overrides)
    if config.data.cache is None:
        raise FewstepError("data.cache", "null", "a folder", "Set it in the config, or as data.cache=FOLDER after it")
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    from fewstep.data import load_source
    from fewstep.data.encoding_cache import EncodingCache
    from fewstep.data.validate import check_images
    from fewstep.teachers import load_teacher

    accelerator = Accelerator()
    teacher = load_teacher(config.teacher)
    source = load_source(config.data, teacher.image_size)
    if teacher.conditions == "prompt" != source.conditions:
        raise FewstepError(
            "data.source",
            f"{config.data.source}, which has {source.conditions}s",
            f"a source with {teacher.conditions}s",
        )
    images = source.has_images and args.only != "prompts"
    if images:
        source = check_images(
            source, config.data.on_error, accelerator.process_index, accelerator.num_processes, gather_object
        )
    found = EncodingCache(config.data.cache, teacher)
    teacher.placement.release(() if images else teacher.placement.image_parts)
    teacher.placement.to(accelerator.device, torch.float32)
    negative = [teacher.negative(prompt) for prompt in config.method.negative_prompts]
    found.fill(
        source, teacher, negative, images, config.batch_size, accelerator.process_index,
        accelerator.num_processes, accelerator.wait_for_everyone,
    )  # fmt: skip
    if accelerator.is_main_process:
        print(f"encoded: {config.data.cache}")
    accelerator.end_training()


def add_cache(commands: Commands) -> None:
    c = commands.add_parser(
        "cache", help="encode prompts and images of a config ahead of training; resumes where it stopped"
    )
    c.add_argument("config", metavar="RECIPE|FILE", help=CONFIG_HELP)
    c.add_argument("overrides", nargs="*", metavar="key.path=value", help="keys that differ from the file")
    c.add_argument("--only", choices=("prompts",), help="for methods that see no images (default: images, too)")
    c.set_defaults(run=cache)
