"""Configurations of several parts whose settings have one flat set of names, those of the flags."""

from dataclasses import asdict, fields, is_dataclass
from typing import Any, Dict, Type, TypeVar

__all__ = ['FlatConfig', 'as_lists']

_Config = TypeVar('_Config', bound='FlatConfig')


class FlatConfig:
    """Base of dataclasses whose fields are settings, or dataclasses of settings; all fields have defaults."""

    def to_dict(self) -> Dict[str, Any]:
        """All settings by the names of the flags, as plain values."""
        flat: Dict[str, Any] = {}
        for name, value in asdict(self).items():  # type: ignore[call-overload]  # subclasses are dataclasses
            flat.update(value if is_dataclass(getattr(self, name)) else {name: value})
        return flat

    @classmethod
    def from_dict(cls: Type[_Config], settings: Dict[str, Any]) -> _Config:
        """Create a configuration from settings by the names of the flags; missing ones have their default.

        Raises:
            ValueError: A name is unknown.
        """
        left, parts = dict(settings), {}
        for name, default in vars(cls()).items():
            if is_dataclass(default) and not isinstance(default, type):
                names = [f.name for f in fields(default) if f.name in left]
                parts[name] = type(default)(**{n: left.pop(n) for n in names})
            elif name in left:
                parts[name] = left.pop(name)
        if left:
            raise ValueError(f'unknown settings: {", ".join(sorted(left))}.')
        return cls(**parts)


def as_lists(value: Any) -> Any:
    """The same value with lists for tuples, because a YAML file has lists only."""
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items()}
    return [as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
