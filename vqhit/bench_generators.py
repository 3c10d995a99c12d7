"""Speed of the paper's generators, side by side: its numbers beside ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vqhit.bench import check_counts, count_gflops, images_per_s, protocol, time_in_turns
from vqhit.hit import HiTConfig
from vqhit.models import HiTGenerator, HiTGeneratorConfig
from vqhit.progress import ProgressBar


class Published(NamedTuple):
    """What the paper says of a generator."""

    table: str
    millions: float
    """Parameters."""
    images_per_s: float | None
    """On one V100; None where it says out of memory."""


def _of(preset: str, **changes: Any) -> HiTGeneratorConfig:
    config = HiTGeneratorConfig.preset(preset)
    backbone = HiTConfig(**{**config.backbone.to_dict(), **changes})
    return HiTGeneratorConfig(latent_dim=config.latent_dim, backbone=backbone)


def paper_generators() -> dict[str, tuple[HiTGeneratorConfig, Published]]:
    """The generators of Table 4, and the variants of hit-l-128 of Tables 5 and 6; names say what is not the default.

    In Table 5 one number of images/s stands for the blocked, interleaved and unbalanced rows together.
    """
    unblocked: tuple[None, ...] = (None,) * 4
    return {
        "hit-s-256": (_of("hit-s-256"), Published("4", 38.01, 86.64)),
        "hit-b-256": (_of("hit-b-256"), Published("4", 46.22, 52.09)),
        "hit-l-256": (_of("hit-l-256"), Published("4", 97.46, 20.67)),
        "hit-l-128": (_of("hit-l-128"), Published("5, 6", 67.60, 75.33)),
        "INR": (_of("hit-l-128", block_sizes=(), cross_attention=False), Published("5", 42.68, 110.39)),
        "cross-attention only": (_of("hit-l-128", block_sizes=()), Published("5, 6", 61.55, 82.67)),
        "full attention": (_of("hit-l-128", attention="full", block_sizes=unblocked), Published("5", 67.60, None)),
        "axial attention": (_of("hit-l-128", attention="axial", block_sizes=unblocked), Published("5", 67.60, 74.21)),
        "blocked attention": (_of("hit-l-128", attention="blocked"), Published("5", 67.60, 75.54)),
        "interleaved attention": (_of("hit-l-128", attention="interleaved"), Published("5", 67.60, 75.54)),
        "multi-axis, unbalanced": (_of("hit-l-128", block_sizes=(8, 8, 8, 8)), Published("5", 67.60, 75.54)),
        "attention in 1 stage": (_of("hit-l-128", block_sizes=(4,)), Published("6", 66.01, 80.88)),
        "attention in 2 stages": (_of("hit-l-128", block_sizes=(4, 4)), Published("6", 67.19, 80.22)),
        "attention in 3 stages": (_of("hit-l-128", block_sizes=(4, 4, 8)), Published("6", 67.52, 78.06)),
    }


def bench_generators(*, device: torch.device, batch_size: int = 4, rounds: int = 5) -> dict[str, Any]:
    """Images/s of the paper's generators with random weights: eager, float32, eval mode, TF32 as torch has it.

    Each round times one run of every model, in turns. Returns a dict for JSON: `generators`, a dict each, and
    `protocol`. `relative` is to hit-b-256 or hit-l-128, by resolution, and so is `paper_relative`.
    """
    check_counts(batch_size=batch_size, rounds=rounds)
    chosen = paper_generators()
    torch.manual_seed(0)
    models = {name: HiTGenerator(config).eval().to(device) for name, (config, _) in chosen.items()}
    with ProgressBar("bench", len(models) * rounds) as bar:
        seconds = time_in_turns(
            {name: _forward(model, batch_size) for name, model in models.items()},
            rounds,
            device,
            on_done=lambda: bar.advance(2 * batch_size),
        )
    rows: list[dict[str, Any]] = []
    for name, (config, published) in chosen.items():
        rows.append(
            {
                "name": name,
                "resolution": config.image_size,
                "parameters_millions": round(sum(p.numel() for p in models[name].parameters()) / 1e6, 2),
                "gflops": round(gflops(config), 2),
                **images_per_s(seconds[name], batch_size),
                "paper_table": published.table,
                "paper_parameters_millions": published.millions,
                "paper_images_per_s": published.images_per_s,
            }
        )
    for row in rows:
        base = next(other for other in rows if other["name"] == _BASES[row["resolution"]])
        row["relative"] = row["images_per_s"] / base["images_per_s"]
        paper = row["paper_images_per_s"]
        row["paper_relative"] = None if paper is None else paper / base["paper_images_per_s"]
    more = {
        "mode": "eager, eval, float32, random weights",
        "paper": "one V100; batch size and precision not stated",
    }
    return {"generators": rows, "protocol": protocol(device, batch_size, rounds) | more}


_BASES = {256: "hit-b-256", 128: "hit-l-128"}


def _forward(model: HiTGenerator, batch_size: int) -> Callable[[], None]:
    z = torch.randn(batch_size, model.latent_dim).to(next(model.parameters()))

    @torch.no_grad()
    def run() -> None:
        model(z)

    return run


def gflops(config: HiTGeneratorConfig) -> float:
    """Counted arithmetic of one image in GFLOPs, two per multiply-add: matrix products, attention's included."""
    with torch.device("meta"):
        model = HiTGenerator(config).eval()
        return count_gflops(lambda: model(torch.empty(1, config.latent_dim)))
