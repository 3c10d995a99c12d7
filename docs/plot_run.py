"""Draw the curves of a training run: python docs/plot_run.py RUN_DIR PICTURE.png (needs matplotlib)."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from vqhit.models import VQHiTConfig
from vqhit.recipe import RunConfig
from vqhit.runs import EVALUATIONS, METRICS, read_records

BLUE, ORANGE, GREY = "#2563a8", "#d9730d", "#8a8a8a"
SMOOTHED_RECORDS = 15


def curve(records, name):
    """Steps and values of the records that hold `name`."""
    found = [(record["step"], record[name]) for record in records if name in record]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def draw(axes, records, name, colour, label=None, raw=False):
    """The values, and over them their running mean (of records of single steps)."""
    steps, values = curve(records, name)
    if raw or len(values) < SMOOTHED_RECORDS:
        axes.plot(steps, values, color=colour, label=label, marker=".")
        return
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
    kernel = np.ones(SMOOTHED_RECORDS) / SMOOTHED_RECORDS
    cut = SMOOTHED_RECORDS // 2
    axes.plot(steps[cut:-cut], np.convolve(values, kernel, "valid"), color=colour, label=label)


def tokenizer_panels(config, metrics, evaluations):
    """Six panels of a tokenizer's run."""
    figure, panels = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    psnr, ssim, codes, logits, r1, terms = panels.flat
    draw(psnr, evaluations, "psnr", BLUE, raw=True)
    psnr.set_title("PSNR, dB")
    draw(ssim, evaluations, "ssim", BLUE, raw=True)
    ssim.set_title("SSIM")
    draw(codes, evaluations, "codes_used", BLUE, "codes used", raw=True)
    draw(codes, evaluations, "codebook_perplexity", ORANGE, "perplexity", raw=True)
    codes.set_title(f"codebook of {config.model.quantizer.codebook_size}")
    codes.set_ylim(bottom=0)
    discriminator_panels(logits, r1, metrics, "reconstructions")
    for name, colour in (
        ("reconstruction", BLUE),
        ("perceptual", ORANGE),
        ("adversarial", GREY),
        ("codebook", "#3f8f4f"),
    ):
        draw(terms, metrics, name, colour, name)
    terms.set_title("weighted terms of the loss")
    terms.set_yscale("log")
    for axes in panels.flat:
        axes.axvline(config.loss.discriminator_start_step, color=GREY, linestyle=":", linewidth=1)
    return figure, panels, (codes, logits, terms), "; dotted: D starts"


def generator_panels(_, metrics, evaluations):
    """Four panels of a generator's run."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    losses, logits, distance, r1 = panels.flat
    draw(losses, metrics, "generator", BLUE, "generator (eq. 3)")
    draw(losses, metrics, "discriminator", ORANGE, "discriminator (eq. 2, without R1)")
    losses.set_title("adversarial losses")
    discriminator_panels(logits, r1, metrics, "samples")
    draw(distance, evaluations, "frechet_distance", BLUE, raw=True)
    distance.set_title("Fréchet distance of features (not FID)")
    distance.set_ylim(bottom=0)
    return figure, panels, (losses, logits), ""


def discriminator_panels(logits, r1, metrics, fakes):
    """Logits and R1."""
    draw(logits, metrics, "real_logits", BLUE, "photographs")
    draw(logits, metrics, "fake_logits", ORANGE, fakes)
    logits.set_title("mean logit of the discriminator")
    draw(r1, metrics, "r1", BLUE)
    r1.set_title("R1: mean squared norm of D's gradient")
    r1.set_yscale("log")


def main(run_dir, picture):
    """Read the records of a run and draw them."""
    config = RunConfig.from_yaml(run_dir / "config.yaml")
    metrics, evaluations = (
        read_records(run_dir / name) if (run_dir / name).exists() else [] for name in (METRICS, EVALUATIONS)
    )
    panels_of = tokenizer_panels if isinstance(config.model, VQHiTConfig) else generator_panels
    figure, panels, with_legend, remark = panels_of(config, metrics, evaluations)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in with_legend:
        axes.legend(frameon=False, fontsize="small")
    for axes in panels[1]:
        axes.set_xlabel(f"step of {config.train.batch_size} images{remark}")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
