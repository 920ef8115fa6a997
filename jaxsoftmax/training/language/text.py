# SPDX-License-Identifier: Apache-2.0
"""Text: which files it comes from, how they are read, and which of them are held out."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsoftmax.training.checkpoint import CHECKPOINTS, CONFIG
from jaxsoftmax.training.errors import ProgramError, in_words

_HELD_OUT = 0.1
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """A file's text; the name, relative to what was asked for, says on which side it is."""

    name: str
    text: str


class Corpus(NamedTuple):
    """The documents, and the files in folders that are no text, each with the reason."""

    documents: list[Document]
    left_out: list[str]

    @property
    def sha256(self) -> str:
        """A fingerprint of names and contents."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in document:
                data = part.encode(errors="surrogatepass")
                digest.update(len(data).to_bytes(8) + data)
        return digest.hexdigest()


def standard_library() -> Path:
    """The folder of Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def full_paths(sources: Sequence[str]) -> tuple[str, ...]:
    """The same files from any directory."""
    if "" in sources:
        raise ProgramError("--text: expected a file, a folder or a pattern; got an empty one")
    return tuple(os.path.abspath(source) for source in sources)


def read(sources: Sequence[str]) -> Corpus:
    """The documents of files, folders and patterns, or of Python's own sources if there are none.

    In a folder, hidden files and the output folders of runs are passed over, and what is empty,
    unreadable or not UTF-8 is left out and named; of a file or a pattern it is an error. A link to
    a folder is not followed.

    Raises:
        ProgramError: naming the file.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    seen: set[str] = set()
    for root, path, lenient in _files(sources):
        if (resolved := os.path.realpath(path)) in seen:
            continue
        seen.add(resolved)
        text = _text(path)
        if isinstance(text, str) and text:
            documents.append(Document(os.path.relpath(path, root).replace(os.sep, "/"), text))
            continue
        reason = text.reason if isinstance(text, _NoText) else "empty"
        if not lenient:
            raise ProgramError(f"--text {path}: {reason}")
        left_out.append(f"{path}: {reason}")
    if not documents:
        where = ", ".join(sources) or str(standard_library())
        more = f"; {left_out[0]}" if left_out else ""
        raise ProgramError(f"--text {where}: no file with UTF-8 text in it{more}")
    return Corpus(documents, left_out)


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Those to train on and those held out, about a tenth.

    By a hash of their names, so that it does not move when other files come or go. There is always
    one on each side; of a single document the last tenth is held out, from a line on if it has any.
    """
    if len(documents) == 1:
        ((name, text),) = documents
        cut = text.rfind("\n", 0, int((1 - _HELD_OUT) * len(text))) + 1
        cut = cut or int((1 - _HELD_OUT) * len(text))
        if not 0 < cut < len(text):
            raise ProgramError(f"--text {name}: too short to hold a tenth of it out")
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    order = sorted(documents, key=lambda document: (_share(document.name), document.name))
    held_out = sum(_share(document.name) < _HELD_OUT for document in order)
    held_out = min(max(1, held_out), len(order) - 1)
    chosen = {id(document) for document in order[:held_out]}
    return (
        [document for document in documents if id(document) not in chosen],
        [document for document in documents if id(document) in chosen],
    )


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8]) / 2**64


class _NoText(NamedTuple):
    reason: str


def _text(path: str) -> str | _NoText:
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        return _NoText(f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        return _NoText(f"cannot be read: {error.strerror}")


def _files(sources: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """What names are relative to, a file, and whether it may be left out; in a fixed order."""
    if not sources:
        library = str(standard_library())
        for path in _walk(library):
            below = os.path.relpath(path, library).split(os.sep)
            if path.endswith(".py") and _LEFT_OUT.isdisjoint(below):
                yield library, path, True
        return
    for source in sources:
        if os.path.isdir(source):
            yield from ((source, path, True) for path in _walk(source))
        elif os.path.lexists(source):
            yield os.path.dirname(source), source, False
        else:
            found = [p for p in sorted(glob.glob(source, recursive=True)) if os.path.isfile(p)]
            if not found:
                pattern = "matches no file" if glob.has_magic(source) else "no such file or folder"
                raise ProgramError(f"--text {source}: {pattern}")
            root = source[: next(i for i, c in enumerate(source) if c in "*?[")]
            yield from ((os.path.dirname(root), path, False) for path in found)


def _walk(folder: str) -> Iterator[str]:
    def failed(error: OSError) -> None:
        raise ProgramError(f"--text {in_words(error)}") from error

    for parent, folders, names in os.walk(folder, onerror=failed):
        if CHECKPOINTS in folders and CONFIG in names:  # what a run wrote is not text for one
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(names):
            path = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield path
