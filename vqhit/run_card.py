"""What a published model tells of its run: facts for the card, and the settings, without where it ran."""

import yaml

from vqhit.card import public_name
from vqhit.hub import RUN_CONFIG_FILE
from vqhit.objective import LossConfig
from vqhit.recipe import RunConfig

_NAMED = ("data.path", "eval.path", "eval.feature_weights", "loss.perceptual_weights")
"""Paths of which the last part stays, so that the settings remain complete."""
_UNSET = ("eval.inception",)
_LEFT_OUT = ("run_dir", "device", "log")
_TERMS = ("reconstruction", "perceptual", "adversarial", "codebook", "r1", "consistency")


def public_settings(config: RunConfig, begun_with: str | None) -> str:
    """A run's settings as YAML that `vqhit train` reads once `run_dir` and the paths are given.

    `begun_with` is the id on the Hub, with its commit, of what it began with, if that is there.
    """
    values = {**config.to_dict(), "init_from": begun_with}
    for key in _LEFT_OUT:
        del values[key]
    for key in (*_NAMED, *_UNSET):
        *above, last = key.split(".")
        section = values
        for name in above:
            section = section.get(name) or {}
        if section.get(last) is not None:
            section[last] = public_name(section[last]) if key in _NAMED else None
    head = "# The settings of the run; of its paths, only the last part. `run_dir` and the data are for you to name.\n"
    if config.init_from is not None and begun_with is None:
        head += "# It began with a model that has no public name: `init_from` is for you to name too.\n"
    return head + yaml.safe_dump(values, sort_keys=False)


def training_facts(config: RunConfig, step: int, begun_with: str | None) -> dict[str, str]:
    """How a model was trained, in a few lines for its card; `begun_with` is the model that it was fine-tuned from."""
    data, train, optimizer, loss = config.data, config.train, config.optimizer, config.loss
    split = f", split {data.split}" if data.split else ""
    crops = f"random crops of {data.crop_proportion[0]:.0%} to {data.crop_proportion[1]:.0%} of the short side"
    unused = [] if config.trains_discriminator else ["r1", "consistency"]
    unused += ["codebook"] if config.freeze_tokens else []
    terms = {name: getattr(loss, name, 0.0) for name in _TERMS if name not in unused}
    facts = {
        "Data": f"{public_name(data.path)}{split}; {crops}{', flipped at random' if data.flip else ''}",
        "Steps": f"{step:,} of {train.batch_size} images ({step * train.batch_size:,} crops)",
        "Loss weights": ", ".join(f"{name} {weight:g}" for name, weight in terms.items() if weight),
        "Optimizer": f"Adam ({optimizer.beta1:g}, {optimizer.beta2:g}), learning rate {optimizer.learning_rate:g}, "
        f"{optimizer.schedule}",
        "Weights": f"moving average, decay {config.ema.decay:g}" if config.ema.decay else "of the last step",
        "Precision": train.precision,
        "Seed": str(config.seed),
    }
    if isinstance(loss, LossConfig) and loss.perceptual:
        facts["Perceptual network"] = loss.perceptual_network
    if begun_with is not None:
        stayed = ", whose encoder and codebook stayed as they were" if config.freeze_tokens else ""
        facts["Begun with"] = begun_with + stayed
    return {**facts, "All settings": f"[{RUN_CONFIG_FILE}]({RUN_CONFIG_FILE})"}
