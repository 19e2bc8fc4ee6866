"""Tags: what saved files call a configuration's type, so that renaming a class breaks no file."""

from __future__ import annotations

from typing import Any, ClassVar


class Tagged:
    """Base of configurations of which a field holds one of several types; a saved file names the type by its tag.

    ``class EncoderConfig(Tagged)`` is a base with tags of its own; ``class ViTConfig(EncoderConfig, tag="vit")`` is one
    of its types. A type without a tag cannot be saved: subclasses inherit none.

    Attributes:
      tag: of this type; None where it has none.
      types: the types of the base, by tag.
    """

    tag: ClassVar[str | None] = None
    types: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, tag: str | None = None, **arguments: Any):
        super().__init_subclass__(**arguments)
        cls.tag = tag
        if Tagged in cls.__bases__:
            cls.types = {}
        if tag is None:
            return
        other = cls.types.setdefault(tag, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"the tag {tag!r} of {cls.__qualname__} is that of {other.__qualname__} already")
        cls.types[tag] = cls
