"""Which files of a folder are data: one rule for training, evaluation, prediction and negatives."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ffdist.config import ConfigError
from ffdist.data.images import is_image
from ffdist.paths import kind_of, printable, unreachable

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
"""Files and folders that operating systems and network storage add, in lower case."""
SHARD = re.compile(r"[-_.]?\d.*")
"""What follows the split in the name of one of several files, such as `-00000-of-00002.parquet`."""
SYSTEM, FORMAT, UNUSED = "hidden or system entries", "files of another format", "entries of no split"
"""Why something was skipped."""
NAMES = 4
"""Names of skipped entries that one line has room for."""

Skipped = dict[str, Counter[str]]
"""Number of skipped files and folders by name or file extension, by reason."""


def is_parquet(path: Path) -> bool:
    """Says whether a file or folder has a Parquet file's name."""
    return path.suffix.lower() == ".parquet"


def list_files(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns the files below a folder, without hidden and system ones, sorted by folder and name.

    Links are followed. A folder that is reached on several ways is read once, and one above `folder` is not.

    Args:
        folder: Where to look.
        skipped: Is added to.

    Raises:
        ConfigError: A folder cannot be read.
    """
    found, folders, links = list[Path](), [folder], list[Path]()
    real_folder = os.path.realpath(folder)
    above = map(os.path.realpath, (*folder.absolute().parents, *Path(real_folder).parents))
    seen = {each for each in above if not Path(each).is_relative_to(real_folder)}
    while folders or links:
        current = folders.pop() if folders else links.pop()
        if (real := os.path.realpath(current)) in seen:
            continue
        seen.add(real)
        for path in entries(current, skipped):
            kind = kind_of(path)
            if kind == "folder":
                (links if path.is_symlink() else folders).append(path)
            elif kind == "file" or (not kind and path.is_symlink()):  # reading a broken link says what it is
                found.append(path)
            else:
                skip(skipped, SYSTEM, path.name)  # a pipe or a device, which would block
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def entries(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Yields what is directly in a folder, sorted, without hidden and system files and folders.

    `_` in front of a name is a system's, except in that of an image or Parquet file: cameras write `_DSC0001.JPG`.

    Raises:
        ConfigError: The folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208, a Path for each skipped one is of no use
    except OSError as error:
        raise unreachable(folder, error) from error
    for name in names:
        path = folder / name
        is_data = name.startswith("_") and (is_image(path) or is_parquet(path)) and kind_of(path) != "folder"
        if (name.startswith((".", "_")) and not is_data) or name.lower() in SYSTEM_NAMES:
            skip(skipped, SYSTEM, "._*" if name.startswith("._") else name)
        else:
            yield path


def skip(skipped: Skipped, reason: str, *names: str) -> None:
    """Counts skipped files and folders by name."""
    if names:
        skipped.setdefault(reason, Counter()).update(map(printable, names))


def extension(path: Path) -> str:
    """Returns the extension of a file in lower case, by which skipped files are counted."""
    return path.suffix.lower() or "no extension"


def describe_skipped(skipped: Mapping[str, Mapping[str, int]]) -> str:
    """Returns what was skipped and why, in one line; nothing where all was read."""
    parts = []
    for reason, names in skipped.items():
        most = Counter(names).most_common(NAMES)
        rest = ", ..." if len(names) > len(most) else ""
        parts.append(f"{sum(names.values()):,} {reason} ({', '.join(f'{name}: {n:,}' for name, n in most)}{rest})")
    return ", ".join(parts)


def and_skipped(skipped: Mapping[str, Mapping[str, int]]) -> str:
    """Returns the same as the end of a line."""
    return f"; skipped: {describe_skipped(skipped)}" if skipped else ""


def find_splits(
    folder: Path, splits: Sequence[str], is_data: Callable[[Path], bool], what: str, skipped: Skipped
) -> dict[str, list[Path]]:
    """Returns the files or folders of each split, by their names.

    An exact name (`train`, `train.parquet`) is preferred to numbered ones (`train-00000-of-00002.parquet`), which
    belong together, and those to a single other name that begins with the split's (`train_images`).

    Args:
        folder: Where to look.
        splits: Names of the splits.
        is_data: Says whether a file or folder could hold a split.
        what: What a split consists of, for errors; `*` stands for the split.
        skipped: Is added to.

    Raises:
        ConfigError: A split is missing, or several names could be meant.
    """
    place = printable(folder)
    if kind_of(folder) != "folder":
        raise ConfigError(f"data.path must hold {what.replace('*', splits[0] + '*')} (there is no folder {place})")
    there = list(entries(folder, skipped))
    chosen = {}
    for split in splits:
        named = [path for path in there if path.name.startswith(split) and is_data(path)]
        exact = [path for path in named if path.name in (split, f"{split}.parquet")]
        numbered = [path for path in named if SHARD.fullmatch(path.name.removeprefix(split))]
        chosen[split] = exact or numbered or named
        listed = ", ".join(printable(path.name) for path in there[:10]) + (", ..." if len(there) > 10 else "")
        if not named:
            needed = what.replace("*", f"{split}*")
            raise ConfigError(f"data.path must hold {needed} (path: {place}, it holds: {listed or 'nothing'})")
        if len(exact) > 1 or (len(named) > 1 and not exact and not numbered):
            raise ConfigError(
                f"data.path must say which of {', '.join(printable(path.name) for path in exact or named)} is the "
                f"{split} split (path: {place}); move the others, or name it {split}"
            )
    used = {path for paths in chosen.values() for path in paths}
    for path in there:
        if path not in used and (is_data(path) or path.name.startswith(tuple(splits))):
            skip(skipped, UNUSED, path.name)
    return chosen
