"""Speed and memory of a tokenizer beside taming-transformers' VQGAN: the same work by its own modules, in turns."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vqhit.bench import (
    PRECISIONS,
    check_counts,
    check_known,
    count_gflops,
    images_per_s,
    peak_mib,
    protocol,
    ratio_of_speeds,
    seconds_of,
    time_in_turns,
)
from vqhit.export import sample_inputs
from vqhit.models import VQHiT, VQHiTConfig
from vqhit.norms import reestimate_batch_norm
from vqhit.peer import TamingVQGAN
from vqhit.progress import ProgressBar

SUBJECTS = {"decode": ("decode",), "encode": ("encode",), "reconstruct": ("encode", "decode")}
"""What is timed, and which methods it consists of."""
EAGER_TWINS = {"taming compiled": "taming eager", "vqhit compiled": "vqhit optimized"}
"""The eager twins of what is compiled."""


def random_tokenizer(preset: str, device: torch.device) -> VQHiT:
    """A preset with random weights, and batch norm's statistics of them; raises `ValueError` for an unknown name."""
    config = VQHiTConfig.preset(preset)
    torch.manual_seed(0)
    model = VQHiT(config).to(device)
    reestimate_batch_norm(model, [sample_inputs(model, "encoder", 2).to(device)])
    return model.eval()


def bench_tokenizer(
    model: VQHiT,
    subjects: Iterable[str] = tuple(SUBJECTS),
    *,
    name: str,
    precisions: Iterable[str] = ("float32",),
    batch_size: int = 4,
    rounds: int = 5,
    backend: str | None = "inductor",
) -> dict[str, Any]:
    """Images/s, arithmetic and memory of a tokenizer beside taming's VQGAN, on the model's device, in eval mode.

    Contenders are both eager, the model after `optimize_for_inference`, and both compiled by `backend`, the model
    optimized; None leaves these two out. Each round times all of them in turns. Returns a dict for JSON: each subject,
    a dict for each contender and precision, and `protocol`, where the model is called `name`. Of a contender:

    - `relative` is how many times as fast as taming eager it is, and `relative_in_mode` as taming eager or, of what is
      compiled, compiled: medians of the rounds' ratios
    - `tokens_differing`, a share, and `largest_difference`, of images, are to the model eager in that precision; images
      of other weights have none, and tokens that differ make those of reconstruct differ
    - `peak_mib` is `peak_mib` of a call; `compile_s` the seconds of first calls, which compile
    """
    subjects, precisions = list(dict.fromkeys(subjects)), list(dict.fromkeys(precisions))
    check_known("subject", subjects, SUBJECTS)
    check_known("precision", precisions, PRECISIONS)
    check_counts(batch_size=batch_size, rounds=rounds)
    device = model.quant_conv.weight.device
    results: dict[str, Any] = {subject: [] for subject in subjects}
    contenders = 3 if backend is None else 5
    with ProgressBar("bench", len(subjects) * len(precisions) * contenders * (1 + rounds)) as bar:
        for precision in precisions:
            side = _Contest(model, precision, batch_size, backend, on_done=lambda: bar.advance(2 * batch_size))
            for subject in subjects:
                results[subject] += side.measure(subject, rounds)
    more = {
        "model": name,
        "resolution": model.config.image_size,
        "precisions": precisions,
        "mode": "eval, no gradient; weights and inputs in the precision",
        "backend": backend,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "peak": "of torch's allocator, above what was held before the call",
        "at_a_time": "taming: the batch; vqhit: its default, on the CPU one image of 256 px and elsewhere the batch",
        "encoder_compiled": "taming's; vqhit's not on the CPU, where it is slower compiled",
    }
    return results | {"protocol": protocol(device, batch_size, rounds) | more}


class _Contest:
    """All contenders in one precision, and what they are given."""

    def __init__(
        self, model: VQHiT, precision: str, batch_size: int, backend: str | None, on_done: Callable[[], None]
    ) -> None:
        torch.manual_seed(0)
        dtype = PRECISIONS[precision]
        optimized = deepcopy(model).optimize_for_inference().to(dtype)
        model = deepcopy(model).to(dtype).eval()
        theirs = TamingVQGAN(model)
        self.models: dict[str, Any] = {"taming eager": theirs}
        if backend is not None:
            self.models["taming compiled"] = _compiled(deepcopy(theirs), backend)
        self.models |= {"vqhit eager": model, "vqhit optimized": optimized}
        if backend is not None:
            self.models["vqhit compiled"] = _compiled(deepcopy(optimized), backend)
        self.precision, self.batch_size, self.on_done = precision, batch_size, on_done
        self.device = model.quant_conv.weight.device
        images = sample_inputs(model, "encoder", batch_size).to(model.quant_conv.weight)
        tokens = sample_inputs(model, "decoder", batch_size).to(self.device)
        self.given = {"encode": images, "decode": tokens, "reconstruct": images}
        self.first_calls: dict[tuple[str, str], float] = {}
        """Seconds, compiling included, by contender and method."""

    def measure(self, subject: str, rounds: int) -> list[dict[str, Any]]:
        """A dict for each contender."""
        given = self.given[subject]
        runs = {name: partial(getattr(model, subject), given) for name, model in self.models.items()}
        gflops: dict[str, float] = {}
        checked: dict[str, dict[str, Any]] = {}
        expected = runs["vqhit eager"]()
        for name, run in runs.items():
            compile_s = self._compile(name, subject) if name in EAGER_TWINS else None
            if name not in EAGER_TWINS:
                gflops[name] = count_gflops(partial(getattr(self.models[name], subject), given[:1]))
            differences = self._differences(name, run(), expected)
            checked[name] = {"peak_mib": peak_mib(run, self.device), "compile_s": compile_s, **differences}
            self.on_done()
        seconds = time_in_turns(runs, rounds, self.device, self.on_done)
        rows: list[dict[str, Any]] = []
        for name, taken in seconds.items():
            speed, counted = images_per_s(taken, self.batch_size), gflops[EAGER_TWINS.get(name, name)]
            same_mode = "taming compiled" if name in EAGER_TWINS else "taming eager"
            rows.append(
                {
                    "contender": name,
                    "precision": self.precision,
                    **speed,
                    **ratio_of_speeds("relative", taken, seconds["taming eager"]),
                    **ratio_of_speeds("relative_in_mode", taken, seconds[same_mode]),
                    "gflops": counted,
                    "gflops_per_s": counted * speed["images_per_s"],
                    **checked[name],
                }
            )
        return rows

    def _compile(self, name: str, subject: str) -> float | None:
        """Seconds of the first calls of what is compiled; None if nothing is."""
        methods = [
            m for m in SUBJECTS[subject] if self.device.type != "cpu" or (name, m) != ("vqhit compiled", "encode")
        ]
        for method in methods:
            if (name, method) not in self.first_calls:
                run = partial(getattr(self.models[name], method), self.given[method])
                try:
                    self.first_calls[name, method] = seconds_of(run, self.device)
                except RuntimeError as error:
                    from torch._dynamo.exc import TorchDynamoException

                    if not isinstance(error, TorchDynamoException):
                        raise
                    reason = " ".join(str(error).splitlines()[:2])
                    raise ValueError(f"nothing can be compiled here ({reason}); leave it out, --no-compile") from error
        return sum(self.first_calls[name, method] for method in methods) or None

    def _differences(self, name: str, found: Tensor, expected: Tensor) -> dict[str, float | None]:
        none: dict[str, float | None] = {"tokens_differing": None, "largest_difference": None}
        if not found.is_floating_point():
            return none | {"tokens_differing": float((found != expected).double().mean())}
        theirs = self.models[name]
        if isinstance(theirs, TamingVQGAN) and not theirs.same_decoder:
            return none
        return none | {"largest_difference": float((found.clamp(-1, 1).float() - expected.float()).abs().max())}


def _compiled(model: Any, backend: str) -> Any:
    for part in model.compiled_parts:
        part.compile(backend=backend)
    return model
