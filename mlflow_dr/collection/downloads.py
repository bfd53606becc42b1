"""Published files that are fetched once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path

from mlflow_dr.errors import DataError, one_line
from mlflow_dr.files import atomic_write, cache_dir, digest_of
from mlflow_dr.progress import progress_bar

SECONDS_WITHOUT_DATA = 60
BYTES_AT_A_TIME = 1 << 20
OFFLINE = "HF_HUB_OFFLINE"


def fetched(url: str) -> Path:
    """The file of a URL in the user's cache, fetched first if it is not there.

    A file that somebody has put there under its own name is taken as it is.

    Raises:
        DataError: it is not there and cannot be fetched; with the place to put it.
    """
    name = url.rsplit("/", 1)[1]
    target = cache_dir() / "downloads" / digest_of(url) / name
    if target.is_file():
        return target
    advice = f"fetch {url} on a machine that can, and put it at {target}"
    if os.environ.get(OFFLINE, "0").lower() not in ("", "0", "false", "no", "off"):
        raise DataError(f"{name} is not in the cache, and {OFFLINE} is set; unset it, or {advice}")
    try:
        with (
            urllib.request.urlopen(url, timeout=SECONDS_WITHOUT_DATA) as response,
            atomic_write(target) as partial,
            partial.open("wb") as file,
        ):
            expected = int(response.headers.get("Content-Length") or 0)
            with progress_bar(expected or None, f"fetching {name}", "bytes") as bar:
                while part := response.read(BYTES_AT_A_TIME):
                    file.write(part)
                    bar.update(len(part))
            if expected and file.tell() != expected:
                raise DataError(f"{url}: ended after {file.tell():,} of {expected:,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise DataError(f"{name} cannot be fetched ({one_line(error)}); {advice}") from error
    return target
