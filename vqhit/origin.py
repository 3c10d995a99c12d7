"""Where a converted model comes from: kept beside it, and told on the cards of what is made of it."""

import json
from pathlib import Path
from typing import NamedTuple

from vqhit.files import read_json, write_atomic

ORIGIN_FILE = "origin.json"


class Origin(NamedTuple):
    """The checkpoint of another project."""

    project: str
    file: str
    """Its name, without its folder."""
    sha256: str
    weights: str | None = None
    """Which of its weights, where it holds several."""

    @property
    def text(self) -> str:
        """In words."""
        which = f", its `{self.weights}`" if self.weights else ""
        return f"{self.project}'s {self.file}{which} (sha256 {self.sha256})"


def write_origin(folder: Path, origin: Origin) -> None:
    """Keep it in a model's folder."""
    write_atomic(folder / ORIGIN_FILE, (json.dumps(origin._asdict(), indent=2) + "\n").encode())


def read_origin(folder: Path) -> Origin | None:
    """What a model's folder says of it, if anything; raises `ValueError` for a damaged record."""
    path = folder / ORIGIN_FILE
    try:
        return Origin(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path}: damaged") from None
