"""The configuration of a run, read again from its `config.json` and checked as the command line would."""

import dataclasses
import json
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def read_config(path: str | os.PathLike, kind: type[C]) -> C:
    """Reads what `Workdir` wrote.

    Args:
        path: of a `config.json`.
        kind: the dataclass of the configuration; fields that the file lacks take their defaults.

    Returns:
        The configuration.

    Raises:
        ValueError: the file cannot be read, is no JSON object, has a field that is not `kind`'s, lacks one without a
            default, or has a value of another type.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, expected the fields of a run; restore it")
    unknown = [name for name in found if name not in fields]
    missing = [
        name
        for name, field in fields.items()
        if name not in found and field.default is field.default_factory is dataclasses.MISSING
    ]
    if unknown or missing:
        what = f"a field {unknown[0]!r} that" if unknown else f"no field {missing[0]!r}, which"
        raise ValueError(f"{path} has {what} a run of this kind {'has not' if unknown else 'has'}; restore it")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in found.items():
        try:
            values[name] = _typed(value, hints[name])
        except TypeError:
            shown = str(hints[name]).replace("typing.", "") if typing.get_args(hints[name]) else hints[name].__name__
            raise ValueError(f"{path} has {name} {value!r}, expected {shown}; restore it") from None
    return kind(**values)


def _typed(value: Any, hint: Any) -> Any:
    """The value with lists as tuples where those are meant; TypeError if it is of another type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for each in inner:
            try:
                return _typed(value, each)
            except TypeError:
                continue
        raise TypeError
    if origin is typing.Literal:
        if not any(type(value) is type(known) and value == known for known in inner):
            raise TypeError
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError
        hints = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        if len(hints) != len(value):
            raise TypeError
        return tuple(_typed(each, hint) for each, hint in zip(value, hints, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (hint or type(None)):
        raise TypeError
    return value
