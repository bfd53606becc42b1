"""Files of passages or queries without a collection, as Tevatron encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.jsonl import checked_id, read_records, state_of, text_and_tokens
from mlflow_dr.collection.records import Passage, unique
from mlflow_dr.errors import DataError, quoted

IDS = ("docid", "query_id", "text_id", "_id", "id")
TEXTS = ("text", "query", "query_text", "document_text", "content")


def read_text_files(files: Sequence[Path]) -> Corpus:
    """The texts of files, as a corpus, whether they are passages or queries.

    Args:
        files: JSON lines, a JSON array or Parquet, each record with an id, a text, and maybe a
            title. The text may be a list of token ids.

    Raises:
        DataError: no such file, a malformed record, or an id that is used twice.
    """

    def read() -> Iterator[tuple[str, Passage]]:
        tokenised: bool | None = None
        for file in files:
            for location, record in read_records(file, dict):
                passage = text_of(record, location)
                if tokenised not in (None, passage.tokens is not None):
                    raise DataError(f"{location}: some texts are token ids, and others are not")
                tokenised = passage.tokens is not None
                yield location, passage

    key = "\n".join(["texts", *map(state_of, files)])
    return cached_corpus(key, unique("text", read), location=", ".join(map(str, files)))


def text_of(record: Mapping[str, Any], location: str) -> Passage:
    """A record with an id, a text and maybe a title, whichever names these have.

    Raises:
        DataError: it lacks one of them.
    """
    name = next((record[key] for key in IDS if key in record), None)
    text: Any = next((record[key] for key in TEXTS if key in record), None)
    title = record.get("title") or ""
    is_tokens = isinstance(text, list) and all(type(token) is int for token in text)
    if not isinstance(name, str | int) or not (isinstance(text, str) or is_tokens):
        raise DataError(
            f"{location}: expected an id ({', '.join(IDS)}) and a text ({', '.join(TEXTS)}), not "
            f"{quoted(dict(record))}"
        )
    if not isinstance(title, str):
        raise DataError(f"{location}: title is {quoted(title)}; expected text")
    plain, tokens = text_and_tokens(text)
    return Passage(checked_id(str(name), location), title, plain, tokens)
