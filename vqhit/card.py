"""The model card: README.md of a published model, with the metadata that the Hugging Face Hub reads from its head."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqhit import __version__
from vqhit.tables import METRICS, evaluation_rows

CARD_FILE = "README.md"
GRID_FILE = "grid.png"
HIT_PAPER = "arxiv:2106.07631"
UNKNOWN_LICENSE = "unknown"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class ModelKind(NamedTuple):
    """What the cards of all models of a class have in common."""

    task: str
    """The Hub's name of it (`pipeline_tag`)."""
    tags: tuple[str, ...]
    what: str
    """One sentence."""
    usage: str
    """Lines that work, with SOURCE for the arguments of `from_pretrained`."""


class Training(NamedTuple):
    """How a model was trained."""

    facts: Mapping[str, str]
    steps_left: int
    """Of its run; 0 if it is done."""
    grid: str | None = None
    """What the picture grid.png shows, if there is one."""
    base_model: str | None = None
    """The repository that it was fine-tuned from."""


def model_card(
    kind: ModelKind,
    name: str,
    summary: Mapping[str, str],
    *,
    branch: str | None = None,
    license: str | None = None,
    training: Training | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Text of the card of the repository `name`: what it is, usage, training, metrics with their protocol, licence.

    `license` is the Hub's identifier (apache-2.0, mit, cc-by-nc-4.0, ...); without one the card says that none is
    stated. `evaluations` are what `vqhit eval` writes. Raises `ValueError` for a licence that is no identifier.
    """
    from huggingface_hub import ModelCardData

    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(f"license: found {license!r}; allowed: the Hub's identifiers, apache-2.0 for example")
    data = ModelCardData(
        library_name="vqhit",
        license=license or UNKNOWN_LICENSE,
        pipeline_tag=kind.task,
        tags=[*kind.tags, HIT_PAPER],
        base_model=training and training.base_model,
        model_name=name,
        eval_results=[found for results in evaluations for found in _eval_results(kind, results)] or None,
    )
    source = f'"{name}"' if branch is None else f'"{name}", revision="{branch}"'
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.partition('/')[2]}",
        f"{kind.what} Made with the library `vqhit` {__version__}, which loads it:",
        f"```python\n{kind.usage.replace('SOURCE', source)}\n```",
        "## Model\n\n" + _list(summary),
    ]
    if training is not None:
        parts.append(_training(training))
    parts.append("## Measured\n\n" + ("\n\n".join(map(_measured, evaluations)) or "Nothing: no evaluation was given."))
    parts.append(
        "## Licence\n\n"
        + (f"`{license}`." if license else "None is stated by who published this model: ask before you use it.")
    )
    return "\n\n".join(parts) + "\n"


def public_name(path: str) -> str:
    """What to call a file or folder in public: the last part of its path; the others are nobody's business."""
    return Path(path).name or "a folder"


def check_evaluation(kind: ModelKind, results: Mapping[str, Any]) -> None:
    """Raise `ValueError` if results are not such as `vqhit eval` writes of a model."""
    try:
        _measured(results)
        if not all(math.isfinite(found.metric_value) for found in _eval_results(kind, results)):
            raise ValueError("a metric is no number")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, AssertionError) as error:
        raise ValueError(f"not an evaluation of a model by `vqhit eval` ({type(error).__name__}: {error})") from None


def _list(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())


def _training(training: Training) -> str:
    parts = ["## Training"]
    if training.steps_left:
        parts.append(f"Not finished: {training.steps_left:,} steps of its run were still to come.")
    parts.append(_list(training.facts))
    if training.grid is not None:
        parts.append(f"![{training.grid}]({GRID_FILE})\n\n*{training.grid}*")
    return "\n\n".join(parts)


def _reference(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The images that were reconstructed, or, of a generator, that its samples were compared with."""
    protocol = results["protocol"]
    found = protocol.get("originals") or protocol["reference"]
    assert isinstance(found, Mapping)
    return found


def _of_data(results: Mapping[str, Any]) -> str:
    reference = _reference(results)
    if "data" not in reference:
        return f"statistics in {public_name(str(reference['statistics']))}"
    split = f", split {reference['split']}" if reference.get("split") else ""
    return f"{_data_name(reference)}{split}"


def _data_name(images: Mapping[str, Any]) -> str:
    """A data set on the Hub by its id, any other by its last part alone."""
    return str(images["data"]) if images.get("on_hub") is True else public_name(str(images["data"]))


def _measured(results: Mapping[str, Any]) -> str:
    """One evaluation: its numbers, and by which protocol."""
    protocol, reference = results["protocol"], _reference(results)
    counted = f"{results['samples']:,} samples against " if "samples" in results else ""
    count = f"{reference['images']:,} images of " if "images" in reference else ""
    rows = [row for row in evaluation_rows(dict(results)) if row["metric"] != "seconds"]
    table = "\n".join(f"| {row['metric']} | {row['value']} |" for row in rows)
    how = {
        "images": "; ".join(str(reference[key]) for key in ("selection", "decoding", "crop") if key in reference),
        "pictures": str(protocol.get("pictures_are", "samples, clamped and rounded to uint8")),
        "compared with": "" if protocol["reference"] == reference else _compared_with(protocol["reference"]),
        "network": ", ".join(f"{name} {value}" for name, value in protocol.get("network", {}).items()),
        **{name: str(protocol[name]) for name in METRICS if name in protocol},
        "remark": str(protocol.get("remark", "")),
        "computed in": f"{protocol['dtype']} on {protocol['device']}" if "dtype" in protocol else protocol["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in protocol["versions"].items()),
    }
    lines = _list({name: value for name, value in how.items() if value})
    return f"{counted}{count}{_of_data(results)}:\n\n| metric | value |\n|---|---|\n{table}\n\n{lines}"


def _compared_with(reference: Mapping[str, Any]) -> str:
    """Another reference set than the images themselves."""
    if "data" in reference:
        return f"{reference.get('images')} images of {_data_name(reference)}"
    made_of = reference.get("made_of_images") or "an unknown number of"
    return f"statistics of {made_of} images, sha256 {reference.get('sha256')}"


def _eval_results(kind: ModelKind, results: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    reference = _reference(results)
    images = results.get("samples", results.get("images"))
    return [
        EvalResult(
            task_type=kind.task,
            dataset_type=str(reference["data"]) if reference.get("on_hub") is True else "custom",
            dataset_name=_of_data(results),
            dataset_split=reference.get("split"),
            metric_type=metric,
            metric_name=f"{METRICS[metric][0]}, {images:,} images",
            metric_value=results[metric],
        )
        for metric in METRICS
        if metric in results
    ]
