"""The folder of a run: its configuration, which tells runs apart, its records as lines of JSON, and its lock."""

import json
import math
from pathlib import Path
from typing import Any

from vqhit.config import Config, ConfigError, differences
from vqhit.files import InUseError, lock, write_atomic

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SKIPPED = "skipped.jsonl"


class RunFolder:
    """config.yaml (resolved), begun_with.json, *.jsonl, *.index, grids/*.png, checkpoints/ and, at the end, model/."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.index = self.path / "images.index"
        self.eval_index = self.path / "eval.index"
        self.begun_with = self.path / "begun_with.json"

    def lock(self) -> None:
        """Claim the folder until this process ends; raises `ConfigError` naming one that has it (see `files.lock`)."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.path / ".lock")
        except InUseError as holder:
            raise ConfigError(f"run_dir {self.path} is in use by {holder}; choose another run_dir") from None

    def exists(self) -> bool:
        """Whether there is a run to continue."""
        return any(self.checkpoints.glob("step_?????????"))

    def check(self, config: Config, changeable: set[str]) -> None:
        """Check that the run that is already there, if any, is this one; keys in `changeable` may differ.

        Raises `ConfigError` naming the others that do.
        """
        path = self.path / "config.yaml"
        if self.exists():
            if not path.exists():
                raise ConfigError(f"{path}: missing; the manifest.json of each checkpoint has it under `config`")
            try:
                there = type(config).from_yaml(path)
            except ConfigError as error:
                raise ConfigError(f"{error}: damaged, or of another version; put the run's own back") from None
            changed = differences(there.to_dict(), config.to_dict())
            names = [key for key in changed if key not in changeable]
            if names:
                names.sort(key=lambda key: key != "model.kind")  # which explains all others
                found = ", ".join(changed[key] for key in names[:3])
                raise ConfigError(f"run_dir {self.path} holds another run ({found}); choose another run_dir")

    def start(self, config: Config, step: int, index: bytes | None = None) -> list[str]:
        """Write the resolved configuration, and the list of an image folder, for a run to be continued from `step`.

        Records after `step`, whose steps will be trained again, are dropped. Returns what `skipped.jsonl` still names.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.yaml", config.to_yaml().encode())
        if not step:
            self.begun_with.unlink(missing_ok=True)  # of a start that came to nothing
        if index is None:
            self.index.unlink(missing_ok=True)  # of an image folder that is one no longer
        else:
            write_atomic(self.index, index)
        for path in (self.path / name for name in (METRICS, EVALUATIONS, SKIPPED)):
            if path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                write_atomic(path, "".join(line + "\n" for line in kept).encode())
        skipped = self.path / SKIPPED
        return [record["skipped"] for record in read_records(skipped)] if skipped.exists() else []

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a file of records."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, one dict a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _step_of(line: str) -> float:
    """Step of a record; infinite for one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
