"""What Python 3.10, the system's interpreter of JetPack 6, lacks."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
    from typing import Self

    import tomllib
else:
    import enum

    import tomli as tomllib
    from typing_extensions import Self

    class StrEnum(str, enum.Enum):
        """An enumeration whose members are strings and print as such."""

        __str__ = str.__str__


__all__ = ["Self", "StrEnum", "tomllib"]
