"""Which class of a model each folder of a data set holds: decided by its name, never by its place.

A folder's name is looked up in these tables, and the first that knows it decides:

    a classes file of the user's, `--classes-file`
    the model's labels
    for a model of ImageNet's classes the WordNet ids and every synonym

in all of them letter by letter, and then without regard to case, spaces, hyphens and underscores. A name
that none knows, or that means two classes, is refused. The folders' order counts only where the user says so
(`ClassOrder.SORTED`), and then there must be as many folders as classes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError
from mgg_edge.learn.imagenet import imagenet_labels, imagenet_names
from mgg_edge.learn.images import find_images

__all__ = ["ClassFolders", "ClassOrder", "Naming", "match_classes", "open_class_folders"]

# Classes by name, and how a name is spelled there.
_Table: TypeAlias = tuple[Callable[[str], str], Mapping[str, set[int]]]
MAX_NAMED = 3
_UNNAMED = re.compile(r"class \d+")


class ClassOrder(StrEnum):
    """How folders become classes."""

    NAMES = "names"
    SORTED = "sorted"


@dataclass(frozen=True)
class Naming:
    """What a model's classes are called, and how folders are matched to them.

    Attributes:
        labels: one name a class, in the order of the logits.
        classes_file: names of the user's own, see `read_classes_file`.
        order: by name, or the sorted folders as classes 0, 1, …
    """

    labels: tuple[str, ...]
    classes_file: Path | None = None
    order: ClassOrder = ClassOrder.NAMES


@dataclass(frozen=True)
class ClassFolders:
    """The pictures of a directory, by class.

    Attributes:
        directory: where they lie.
        labels: of all classes of the model, in the order of the logits.
        folders: class of each folder by its name, in the order of the names.
        paths: pictures of each class that has any, sorted.
    """

    directory: Path
    labels: tuple[str, ...]
    folders: Mapping[str, int]
    paths: Mapping[int, tuple[Path, ...]]

    @property
    def absent(self) -> int:
        """Number of the model's classes that have no folder."""
        return len(self.labels) - len(self.paths)

    @property
    def facts(self) -> dict[str, str]:
        """The mapping, as reports show it."""
        return {name: f"{index} {self.labels[index]}" for name, index in self.folders.items()}


def open_class_folders(directory: Path, naming: Naming) -> ClassFolders:
    """Pictures of a directory with one folder a class.

    Raises:
        UsageError: no such directory, no picture in a folder, or folders that are no classes of the model.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(directory):
        if path.parent != directory:
            found[path.relative_to(directory).parts[0]].append(path)
    if not found:
        raise UsageError(f"{directory}: expected one folder of images a class, found images alone")
    folders = match_classes(found, naming, str(directory))
    paths: dict[int, list[Path]] = defaultdict(list)
    for name, index in folders.items():
        paths[index] += found[name]
    return ClassFolders(
        directory, naming.labels, folders, {index: tuple(sorted(paths[index])) for index in sorted(paths)}
    )


def match_classes(folders: Iterable[str], naming: Naming, where: str) -> dict[str, int]:
    """The class of each folder, by its name.

    Args:
        folders: their names.
        naming: what the classes are called.
        where: what the folders are of, for the message.

    Raises:
        UsageError: a name that is no class or two; or, in sorted order, another number of folders than of classes.
    """
    names, count = sorted(folders), len(naming.labels)
    if naming.order is ClassOrder.SORTED:
        if len(names) != count:
            raise UsageError(
                f"{where}: expected {count} folders to take as classes in their sorted order, found {len(names)}; "
                "name the folders as the classes instead"
            )
        return {name: index for index, name in enumerate(names)}
    as_written = list(_tables(naming))
    tables = [*((_written, table) for table in as_written), *((_plain, _plainly(table)) for table in as_written)]
    found = {name: _look_up(name, tables, where) for name in names}
    if unknown := [name for name, index in found.items() if index is None]:
        raise UsageError(_refusal(unknown, naming.labels, tables, where))
    return {name: index for name, index in found.items() if index is not None}


def _tables(naming: Naming) -> Iterable[dict[str, set[int]]]:
    if naming.classes_file is not None:
        yield _read_classes_file(naming.classes_file, naming.labels)
    yield _index((label,) for label in naming.labels)
    if naming.labels == imagenet_labels():
        yield _index(imagenet_names())


def _index(names: Iterable[Sequence[str]]) -> dict[str, set[int]]:
    """Classes by name; a name may mean several."""
    table: dict[str, set[int]] = defaultdict(set)
    for index, synonyms in enumerate(names):
        for name in synonyms:
            table[name].add(index)
    return dict(table)


def _plainly(table: Mapping[str, set[int]]) -> dict[str, set[int]]:
    plain: dict[str, set[int]] = defaultdict(set)
    for name, classes in table.items():
        plain[_plain(name)] |= classes
    return dict(plain)


def _written(name: str) -> str:
    return name


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _look_up(name: str, tables: Sequence[_Table], where: str) -> int | None:
    found = (table.get(spelled(name)) for spelled, table in tables)
    classes = next((each for each in found if each is not None), set())
    if len(classes) > 1:
        several = ", ".join(map(str, sorted(classes)))
        raise UsageError(
            f"{where}: the folder '{name}' may be any of the classes {several}; name it otherwise, by a WordNet id "
            "where there is one, or say it with --classes-file"
        )
    return next(iter(classes), None)


def _refusal(unknown: Sequence[str], labels: Sequence[str], tables: Sequence[_Table], where: str) -> str:
    known = {_plain(name): name for _, table in reversed(tables) for name in table}
    near = [
        match for name in unknown for match in difflib.get_close_matches(_plain(name), known, n=MAX_NAMED, cutoff=0.6)
    ]
    listed = ", ".join(f"'{name}'" for name in unknown[:MAX_NAMED])
    rest = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    if near:
        hint = f"near are {', '.join(repr(known[name]) for name in dict.fromkeys(near[:MAX_NAMED]))}"
    elif all(_UNNAMED.fullmatch(label) for label in labels):
        hint = "what its classes are called is not known, say it with --labels FILE"
    else:
        hint = f"its classes are called {', '.join(repr(label) for label in labels[:MAX_NAMED])}, …"
    return (
        f"{where}: folders that are no class of the model: {listed}{rest}; {hint}; --classes-file says which is which, "
        "--class-order sorted takes the sorted folders as classes 0, 1, …"
    )


def _read_classes_file(path: Path, labels: Sequence[str]) -> dict[str, set[int]]:
    """Classes by name from a user's file.

    Either text, whose line k names class k (several names apart by commas), or JSON: {name: class} with a class as its
    number or its label, or {number: name}, {number: [names]}.

    Raises:
        UsageError: not readable, or not about the classes of the model.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read the classes: {error}") from error
    if content is None:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) != len(labels):
            raise UsageError(f"{path}: expected {len(labels)} classes, one a line, found {len(lines)}")
        return _index([part.strip() for part in line.split(",")] for line in lines)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object of classes by name, found {type(content).__name__}")
    table: dict[str, set[int]] = defaultdict(set)
    for key, value in content.items():
        names, number = _entry(key, value, labels)
        if number is None or not 0 <= number < len(labels):
            raise UsageError(f"{path}: expected classes 0 to {len(labels) - 1} or their labels, found '{key}': {value}")
        for name in names:
            table[name].add(number)
    return dict(table)


def _entry(key: str, value: object, labels: Sequence[str]) -> tuple[list[str], int | None]:
    """Names and class of an entry of a JSON file."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [key], value
    if key.isdecimal():
        return [str(name) for name in (value if isinstance(value, list) else [value])], int(key)
    return [key], labels.index(value) if isinstance(value, str) and value in labels else None
