"""Datasets of Hugging Face's library `datasets`: saved in a folder, or on the Hub."""

from collections.abc import Iterator, Mapping
from typing import Any

from ffdist.config.sections import Data
from ffdist.data.listing import SPLIT_NAMES
from ffdist.data.readers import Origin, Splits, read_tables
from ffdist.data.tables import Source
from ffdist.errors import ConfigError


def read_huggingface(config: Data) -> Splits:
    """Reads the splits `train`, `test` and perhaps `validation` of a dataset: columns of images or numbers, and labels.

    Raises:
        ConfigError: The library is missing, the dataset cannot be loaded, or a sample is invalid.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "data.name=huggingface needs the package datasets; install it by pip install 'ffdist[huggingface]'"
        ) from error
    location = str(config.options["path"] if config.is_remote else config.path)
    try:
        loaded = datasets.load_dataset(**config.options) if config.is_remote else datasets.load_from_disk(location)
    except Exception as error:  # the library raises errors of many kinds
        raise ConfigError(
            f"{location} cannot be loaded as a dataset ({' '.join(str(error).split())[:200]}); set data.path to a "
            f"folder that save_to_disk wrote, or data.options.path to the name of a dataset on the Hub"
        ) from error
    if not isinstance(loaded, Mapping) or not {"train", "test"} <= loaded.keys():
        splits = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else "none"
        raise ConfigError(f"{location} must have the splits train and test (splits: {splits}); save a DatasetDict")
    sources = {split: [_source(loaded[split], f"{location}, {split}")] for split in SPLIT_NAMES if split in loaded}
    return read_tables(config, sources, Origin())


def _source(dataset: Any, location: str) -> Source:
    def batches(columns: list[str], rows: int) -> Iterator[Any]:
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=rows):
            yield from table.to_batches()

    return Source(location, "a dataset", dataset.features.arrow_schema, dataset.num_rows, batches)
