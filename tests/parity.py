"""Golden numbers of the official HiT-GAN, and the rule that makes its weights."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np

from vqhit.hit import HiTConfig
from vqhit.models import HiTGeneratorConfig

FIXTURES = Path(__file__).parent / "fixtures" / "hit_gan"

TINY64 = HiTGeneratorConfig(
    latent_dim=16,
    backbone=HiTConfig(widths=(32, 32, 16, 8), depths=(2, 1, 1, 1), heads=(4, 2, 2, 2), block_sizes=(4, 4)),
)


def _load_rule() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hit_gan_rule", FIXTURES / "rule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rule = _load_rule()


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as arrays:
        return dict(arrays)


def generator_variables(config_name: str, attention: str = "multi_query", norm: str = "batch") -> dict[str, np.ndarray]:
    """Every variable of an official generator, valued by the rule."""
    return {
        name: rule.value(name, shape, kind, rule.g_gain(name))
        for name, shape, kind in rule.generator_specs(config_name, attention, norm)
    }
