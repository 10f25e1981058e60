"""Types of the values of settings."""

import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from ffdist.ff.specs import MAX_VALUE


def _no_boolean(value: Any) -> Any:
    """Rejects YAML's yes and no, which would be converted to 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"a number is needed here, not {value}")
    return value


SECRET_WORDS = ("key", "token", "secret", "password", "pwd", "credential", "sig")
"""Words in the names of query parameters that a URI must not have."""


def reject_secrets(uri: str) -> str:
    """Returns a URI, if it can be written to files and to MLflow.

    Raises:
        ValueError: The URI has a password or a key. The message does not repeat it.
    """
    parts = urlsplit(uri)
    parameters = {name.lower() for name, _ in parse_qsl(parts.query)}
    username = parts.scheme in ("http", "https") and parts.username  # it may be a token
    if parts.password or username or any(word in name for name in parameters for word in SECRET_WORDS):
        raise ValueError(
            f"a URI must hold no password or key, because it is saved with the run (scheme: {parts.scheme}, host: "
            f"{parts.hostname}); use environment variables, such as MLFLOW_TRACKING_PASSWORD or AWS_SECRET_ACCESS_KEY"
        )
    return uri


Number = BeforeValidator(_no_boolean)
Count = Annotated[int, Number, Field(ge=1, le=MAX_VALUE)]


def _absolute(path: str) -> str:  # because saved paths are read in other working folders
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111, the latter raises


NO_TRACKING = "none"
"""Tracking URI that switches MLflow off."""


def with_absolute_path(uri: str) -> str:
    """Returns a tracking URI with an absolute path, because it is saved and read in other working folders."""
    if uri == NO_TRACKING:
        return uri
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + _absolute(uri.removeprefix("sqlite:///"))
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(_absolute(uri.removeprefix("file:"))).as_uri()
    return uri if ":" in uri or uri.startswith("databricks") else _absolute(uri)


Uri = Annotated[str, AfterValidator(reject_secrets)]
FolderUri = Annotated[Uri, AfterValidator(lambda uri: uri if "://" in uri else _absolute(uri))]
Fraction = Annotated[float, Number, Field(ge=0, lt=1)]
Positive = Annotated[float, Number, Field(gt=0, le=MAX_VALUE, allow_inf_nan=False)]
NotNegative = Annotated[float, Number, Field(ge=0, le=MAX_VALUE, allow_inf_nan=False)]
Folder = Annotated[Path, AfterValidator(lambda path: Path(_absolute(str(path))))]
