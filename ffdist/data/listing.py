"""Listing of the data files in a folder. Training, evaluation, inference and negatives share these rules."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ffdist.data.images import is_image
from ffdist.errors import ConfigError
from ffdist.storage.paths import access_error, kind_of, printable

SYSTEM_NAMES = {
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "desktop.ini",
    "icon\r",
    "lost+found",
    "system volume information",
    "thumbs.db",
}
"""Lower-case names of files and folders that operating systems and network storage create."""
SPLIT_NAMES = {
    "train": re.compile("train"),
    "validation": re.compile(r"val(id(ation)?)?(?![A-Za-z])"),
    "test": re.compile("test"),
}
"""Beginnings of the names of files and folders, by split. Only `validation` is optional, so its names are stricter."""
SHARD_SUFFIX = re.compile(r"[-_.]?\d.*")
"""Suffix of the split in the name of a numbered file, for example `-00000-of-00002.parquet`."""
SYSTEM, FORMAT, UNUSED = "hidden or system entries", "files of another format", "entries of no split"
"""Reasons for skipping a file or folder."""
MAX_LISTED_NAMES = 4
"""Maximum number of names per reason in a one-line description of skipped entries."""

Skipped = dict[str, Counter[str]]
"""Number of skipped files and folders by reason, then by name or file extension."""


def is_parquet(path: Path) -> bool:
    """Returns whether a file or folder has the extension `.parquet`."""
    return path.suffix.lower() == ".parquet"


def is_csv(path: Path) -> bool:
    """Returns whether a file has the extension `.csv`."""
    return path.suffix.lower() == ".csv"


def list_files(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns all files below a folder except hidden and system files, sorted by folder and name.

    Follows links. A folder that several links lead to is read once. The parents of `folder` are never read.

    Args:
        folder: Folder to search.
        skipped: Counts of skipped entries, updated in place.

    Raises:
        ConfigError: A folder cannot be read.
    """
    files, folders, links = list[Path](), [folder], list[Path]()
    real_folder = os.path.realpath(folder)
    parents = map(os.path.realpath, (*folder.absolute().parents, *Path(real_folder).parents))
    visited = {parent for parent in parents if not Path(parent).is_relative_to(real_folder)}
    while folders or links:
        current = folders.pop() if folders else links.pop()
        if (real := os.path.realpath(current)) in visited:
            continue
        visited.add(real)
        for path in list_entries(current, skipped):
            kind = kind_of(path)
            if kind == "folder":
                (links if path.is_symlink() else folders).append(path)
            elif kind == "file" or (not kind and path.is_symlink()):  # a broken link fails when it is read
                files.append(path)
            else:
                skip(skipped, SYSTEM, path.name)  # reading a pipe or device would block
    return sorted(files, key=lambda path: (str(path.parent), path.name))


def list_entries(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Yields the direct entries of a folder except hidden and system ones, sorted.

    Names that begin with `_` are system entries, except image and Parquet files: cameras write `_DSC0001.JPG`.

    Raises:
        ConfigError: The folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208, Path.iterdir creates a Path for skipped entries, too
    except OSError as error:
        raise access_error(folder, error) from error
    for name in names:
        path = folder / name
        is_data = name.startswith("_") and (is_image(path) or is_parquet(path)) and kind_of(path) != "folder"
        if (name.startswith((".", "_")) and not is_data) or name.lower() in SYSTEM_NAMES:
            skip(skipped, SYSTEM, "._*" if name.startswith("._") else name)
        else:
            yield path


def skip(skipped: Skipped, reason: str, *names: str) -> None:
    """Adds names to the counts of skipped entries."""
    if names:
        skipped.setdefault(reason, Counter()).update(map(printable, names))


def extension(path: Path) -> str:
    """Returns the lower-case extension of a file, as counted in `Skipped`."""
    return path.suffix.lower() or "no extension"


def describe_skipped(skipped: Mapping[str, Mapping[str, int]]) -> str:
    """Returns one line that lists the skipped entries by reason, or an empty string."""
    parts = []
    for reason, names in skipped.items():
        top = Counter(names).most_common(MAX_LISTED_NAMES)
        ellipsis = ", ..." if len(names) > len(top) else ""
        parts.append(f"{sum(names.values()):,} {reason} ({', '.join(f'{name}: {n:,}' for name, n in top)}{ellipsis})")
    return ", ".join(parts)


def skip_suffix(skipped: Mapping[str, Mapping[str, int]]) -> str:
    """Returns `describe_skipped` as a suffix for a message, or an empty string."""
    return f"; skipped: {describe_skipped(skipped)}" if skipped else ""


def describe_contents(paths: Sequence[Path], limit: int) -> str:
    """Returns the names of the first entries of a folder, for error messages."""
    names = ", ".join(printable(path.name) for path in paths[:limit])
    return f"it holds: {names or 'nothing'}{', ...' * (len(paths) > limit)}"


def find_splits(
    folder: Path, is_data: Callable[[Path], bool], expected: str, skipped: Skipped
) -> dict[str, list[Path]]:
    """Returns the files or folders of each split, by name: `train`, `test` and, if there is one, `validation`.

    Exact names (`train`, `train.parquet`) take precedence over numbered ones (`train-00000-of-00002.parquet`), which
    are all used. Otherwise a single other name that begins with the name of the split (`train_images`) is used.

    Args:
        folder: Folder to search.
        is_data: Returns whether a file or folder can hold a split.
        expected: Description of a split for error messages, in which `*` stands for its name.
        skipped: Counts of skipped entries, updated in place.

    Raises:
        ConfigError: A split is missing or ambiguous.
    """
    location = printable(folder)
    if kind_of(folder) != "folder":
        raise ConfigError(f"data.path must hold {expected.replace('*', 'train*')} (no folder: {location})")
    paths = list(list_entries(folder, skipped))
    selected = {}
    for split, pattern in SPLIT_NAMES.items():
        matches = {path: match for path in paths if (match := pattern.match(path.name)) and is_data(path)}
        endings = {path: _stem(path)[match.end() :] for path, match in matches.items()}
        exact = [path for path, ending in endings.items() if not ending]
        numbered = [path for path, ending in endings.items() if SHARD_SUFFIX.fullmatch(ending)]
        if len(exact) > 1 or (len(matches) > 1 and not exact and not numbered):
            raise ConfigError(
                f"data.path must hold one candidate for the {split} split (path: {location}, candidates: "
                f"{', '.join(printable(path.name) for path in exact or matches)}); move the others, or rename one to "
                f"{split}"
            )
        if matches:
            selected[split] = exact or numbered or list(matches)
        elif split != "validation":
            raise ConfigError(
                f"data.path must hold {expected.replace('*', f'{split}*')} (path: {location}, "
                f"{describe_contents(paths, 10)})"
            )
    used = {path for split_paths in selected.values() for path in split_paths}
    for path in paths:
        if path in used or (kind_of(path) == "folder" and not is_data(path)):  # a CSV file may name images in folders
            continue
        if is_data(path) or any(pattern.match(path.name) for pattern in SPLIT_NAMES.values()):
            skip(skipped, UNUSED, path.name)
    return selected


def _stem(path: Path) -> str:
    """Returns the name of a file or folder without the extension of a table."""
    return path.stem if is_parquet(path) or is_csv(path) else path.name
