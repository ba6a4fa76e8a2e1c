"""The small trained pipelines that come with the package."""

from pathlib import Path

ASSETS = ("fashion",)


def asset_path(name: str) -> Path:
    if name not in ASSETS:
        raise ValueError(f"no asset {name!r}; known: {', '.join(ASSETS)}")
    return Path(__file__).parent / name
