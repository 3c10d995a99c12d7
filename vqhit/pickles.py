"""Tensors out of the pickled checkpoints of others: nothing of such a file is called or imported."""

import pickletools
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # torch knows some of Python 2's names
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_LEGACY_PICKLES = 4  # magic number, version, sizes of numbers, and the object
_INTO = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
"""What fills the object below its operands."""
_DEEPEST = 1000
_MARK = -1
_ENDLESS = {"builtins.bytearray"}  # of any length, by one number
_ALONE = threading.Lock()  # what torch allows, it allows in the whole process


class _Inert:
    """What every foreign class or function of a file becomes: made or called with anything, an empty dictionary."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()  # torch's reader lets these be filled, as a foreign class of dictionaries is


def read_state_dict(path: Path, key: str, *, bare: bool = False) -> dict[str, Tensor]:
    """Return the state dict under `key` of a file of `torch.save`; with `bare`, also one that is the whole file.

    Read are zip archives, each record checked by its CRC, and the format before torch 1.6, which has none. torch's
    weights-only reader does it; to what it does not allow, inert stand-ins are given, so that callbacks, options and
    optimizers beside the weights do no harm. Lists and sets of a class of their own, and anything of `os` and `sys`, it
    refuses. Other threads should load nothing meanwhile. Raises `ValueError` for what is not such a file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a file of torch.save")
    try:
        content = _read(path)
    except Exception as error:  # a damaged or crafted file may raise anything
        raise ValueError(f"{path}: not a file of torch.save, damaged, or unsafe ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its content is {_kind(content)}; expected a dictionary with {key!r}")
    items = dict(dict.items(content))  # not the instance's own `items`, which a file can set
    if bare and key not in items and items and all(isinstance(value, Tensor) for value in items.values()):
        return _tensors(path, items)
    if not isinstance(state := items.get(key), dict):
        there = ", ".join(repr(name) for name in items if isinstance(name, str))
        raise ValueError(f"{path}: no state dict under {key!r}; there is: {there[:200] or 'nothing'}")
    return _tensors(path, dict(dict.items(state)))


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        names = _checked_zip(path) if is_zip else _checked_pickles(file, _LEGACY_PICKLES)
    if names & _ENDLESS:
        raise ValueError(f"it calls {', '.join(sorted(names & _ENDLESS))}")
    with _ALONE, warnings.catch_warnings(), _nothing_allowed():
        warnings.simplefilter("ignore")
        if is_zip:  # without those that torch allows
            names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(str(path), map_location="cpu", weights_only=True)


@contextmanager
def _nothing_allowed() -> Iterator[None]:
    """Set aside what the process allows, as importing `torch.distributed.tensor` does: it would be called."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _checked_zip(path: Path) -> set[str]:
    """Check an archive's records and its pickle, and return the names of classes and functions in it.

    torch compresses no record, and itself does not compare the CRC; where `set_crc32_options(False)` left it out, all
    are 0.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {record.filename} is compressed")
        if any(record.CRC for record in records) and (damaged := archive.testzip()):
            raise ValueError(f"record {damaged} has another CRC")
    return _checked_pickles(BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")), 1)


def _checked_pickles(file: IO[bytes], count: int) -> set[str]:
    """Go through pickles without building anything; returns the names in them, also as they were in Python 2.

    Raises `ValueError` for what is nested so deep that building it would end the process.
    """
    names: set[str] = set()
    for _ in range(count):
        depths: list[int] = []
        memo: dict[Any, int] = {}
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                module, name = str(argument).split(" ", 1)
                now = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names |= {f"{module}.{name}", ".".join(now)}
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = depths[-1]
                continue
            if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                depths.append(memo.get(argument, 0))
                continue
            taken = list(_taken(opcode, depths))
            if opcode.name in _INTO and taken:
                depth = max([taken[-1], *(1 + each for each in taken[:-1])])
            else:
                depth = max((1 + each for each in taken), default=0)
            if depth > _DEEPEST:
                raise ValueError("nested too deep")
            depths += [_MARK if kind is pickletools.markobject else depth for kind in opcode.stack_after]
    return names


def _taken(opcode: pickletools.OpcodeInfo, depths: list[int]) -> Iterator[int]:
    """Take from the stack what an opcode does, its last operand first."""
    for kind in reversed(opcode.stack_before):
        if kind is pickletools.stackslice:
            while (depth := depths.pop()) != _MARK:
                yield depth
        elif kind is not pickletools.markobject:
            yield depths.pop()


def _tensors(path: Path, state: dict[Any, Any]) -> dict[str, Tensor]:
    if not state:
        raise ValueError(f"{path}: its state dict is empty")
    found = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: a key of its state dict is no text, but {_kind(name)}")
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{path}: {name} is no tensor, but {_kind(tensor)}")
        tensor = Tensor.detach(tensor)  # without the attributes that a file can set
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {name} is sparse, quantized, or larger than its data")
        found[name] = tensor
    return found


def _kind(value: Any) -> str:
    return "a foreign class" if value is _Inert else f"of class {type(value).__name__}"


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to load the file all the same."""
    paragraphs = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n\n")
    known = [text.strip() for text in paragraphs if not text.startswith(("Weights only load failed", "Check the"))]
    return (known[0].split("\n")[0] if known else "")[:300] or type(error).__name__
