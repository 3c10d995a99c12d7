"""Image tokenizers and generators built on HiT (Zhao et al., NeurIPS 2021).

The public names load on first use, so that `import vqhit` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vqhit.config import ConfigError as ConfigError
    from vqhit.images import ImageError as ImageError
    from vqhit.models import HiTGenerator as HiTGenerator
    from vqhit.models import HiTGeneratorConfig as HiTGeneratorConfig
    from vqhit.quantizer import Quantized as Quantized
    from vqhit.tokenizer import VQHiT as VQHiT
    from vqhit.tokenizer import VQHiTConfig as VQHiTConfig
    from vqhit.tokenizer import VQHiTOutput as VQHiTOutput

_MODULES = {
    "ConfigError": "vqhit.config",
    "HiTGenerator": "vqhit.models",
    "HiTGeneratorConfig": "vqhit.models",
    "ImageError": "vqhit.images",
    "Quantized": "vqhit.quantizer",
    "VQHiT": "vqhit.tokenizer",
    "VQHiTConfig": "vqhit.tokenizer",
    "VQHiTOutput": "vqhit.tokenizer",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vqhit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
