"""Configuration: YAML files and `a.b=c` overrides become frozen pydantic models; a typo is an error.

Each module declares its own configuration, a subclass of `Config`, beside the code that reads it. Nothing in a
configuration is executed or interpolated.
"""

import difflib
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

Depth = Annotated[int, Strict(), Field(ge=0, le=256)]
Layers = Annotated[int, Strict(), Field(ge=1, le=256)]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Finite = Annotated[float, Strict(), Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Strict(), Field(ge=0, lt=1)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]

_LONGEST_VALUE = 100  # characters of one in a message

Problem = tuple[tuple[str | int, ...], str]
"""The key, and what is wrong with it."""


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names each key, what was found and what is allowed."""

    def __init__(self, problems: str | list[Problem], source: str = "") -> None:
        self.problems: list[Problem] = [((), problems)] if isinstance(problems, str) else problems
        lines = [": ".join(filter(None, [".".join(map(str, key)), text])) for key, text in self.problems]
        super().__init__(": ".join(filter(None, [source, "; ".join(lines)])))


class Config(BaseModel):
    """A frozen, keyword-only configuration; an unknown or ill-typed key raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError([problem for entry in error.errors() for problem in self._problems(entry)]) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Build from nested mappings; `source` (a file name, say) opens the text of any `ConfigError`."""
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(error.problems, source) from None

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file, apply overrides like `train.batch_size=64`, and validate.

        Raises `ConfigError` for a missing or malformed file, an override without `=`, an unknown key (with the nearest
        allowed one), and a value of the wrong type or range.
        """
        path = Path(path)
        try:
            values = _parse_yaml(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError("no such file", str(path)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", str(path)) from None
        except ConfigError as error:
            raise ConfigError(error.problems, str(path)) from None
        if not isinstance(values, dict):
            raise ConfigError(f"found {type(values).__name__}; a configuration maps keys to values", str(path))
        for override in overrides:
            _apply(values, override)
        return cls.from_dict(values, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts, lists and scalars, as JSON or YAML hold them."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return YAML that `from_yaml` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)

    @classmethod
    def _problems(cls, entry: Any) -> list[Problem]:
        """One pydantic error -> [(key, what was found and what is allowed)]."""
        key = tuple(entry["loc"])
        inner = entry.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # raised by a nested Config: keep its own keys
            return [(key + inner_key, text) for inner_key, text in inner.problems]
        if isinstance(inner, ValueError):
            return [(key, str(inner))]
        if entry["type"] == "extra_forbidden":
            allowed = list(cls.model_fields)
            near = difflib.get_close_matches(str(key[-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            return [(key, f"unknown key; {hint}")]
        if entry["type"] == "missing":
            return [(key, "missing")]
        return [(key, f"found {_shown(entry['input'])}; {entry['msg'][0].lower()}{entry['msg'][1:]}")]


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 200, 200
_shown = _repr.repr
"""A value in a message: YAML's aliases make small files of values that are endless when written out."""


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that reads 1e-4 as a number (YAML 1.2) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        line = node.start_mark.line + 1
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} (line {line} and below) is no text; put it in quotes")
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is given twice (line {line} and below)")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deep") from None


def _apply(values: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, as in train.batch_size=64")
    try:
        value = _parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(error.problems, f"override {override!r}") from None
    for depth, part in enumerate(parts[:-1], start=1):
        if values.get(part) is None:  # absent, or a part that is switched off
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a value, it has no keys below it")
    values[parts[-1]] = value


def of_kind(value: Any, kinds: Mapping[str, type[Config]], default: str | None = None) -> Any:
    """Build the configuration that the key `kind` of a mapping, else `default`, chooses from `kinds`.

    One that is built already is returned as it is. Raises `ConfigError`, or `ValueError` for what is no mapping.
    """
    for config_class in kinds.values():
        if isinstance(value, config_class):
            return value
    allowed = ", ".join(kinds)
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ValueError(f"found {_shown(value)}; expected a mapping, of kind {allowed}")
    kind = value.get("kind", default)
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError([(("kind",), f"found {_shown(kind)}; allowed: {allowed}")])
    try:
        return kinds[kind](**value)
    except ConfigError as error:
        if "kind" in value:
            raise
        hint = f"without it, that is {kind}; there are: {allowed}"
        raise ConfigError([*error.problems, (("kind",), hint)]) from None


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Keys of nested mappings whose values differ -> what each has: {"a.b": "a.b: 1 there, 2 now"}, in key order."""
    before, after = flat(there), flat(now)
    return {
        key: f"{key}: {_short(before.get(key))} there, {_short(after.get(key))} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one value per dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
