# SPDX-License-Identifier: Apache-2.0
"""Text: which files it comes from, how they are read, and which of them are held out."""

import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsoftmax.training.checkpoint import CHECKPOINTS, CONFIG, LOSS_PLOT, METRICS, read_config
from jaxsoftmax.training.errors import ProgramError, in_words

_OF_A_RUN = {CONFIG, METRICS, CHECKPOINTS, LOSS_PLOT, "tokenizer.json"}
_HELD_OUT = 0.1
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """A file's text; the name, relative to what was asked for, says on which side it is."""

    name: str
    text: str


class Corpus(NamedTuple):
    """The documents, and what is no text in folders and patterns, each with the reason."""

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
    for source in sources:
        if not source:
            raise ProgramError("--text: expected a file, a folder or a pattern; got an empty one")
        try:
            os.path.getsize(source)
        except ValueError as error:  # a character that no path can have
            raise ProgramError(f"--text {source!r}: not the name of a file: {error}") from error
        except OSError:
            pass  # `read` says which
    return tuple(os.path.abspath(source) for source in sources)


def read(sources: Sequence[str]) -> Corpus:
    """The documents of files, folders and patterns, or of Python's own sources if there are none.

    In a folder hidden files are passed over, and what is empty, unreadable or not UTF-8 is left out
    and named; of a file or a pattern it is an error. Of both, what a run wrote is left out and
    named: the output may be in a folder that is read. Neither a folder nor `**` follows links to
    folders.

    Raises:
        ProgramError: naming the file.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    seen: set[str] = set()
    for root, path, lenient in _files(sources, left_out):
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
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device may never end
            return _NoText("not a regular file")
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        return _NoText(f"not UTF-8 text (byte {error.start})")
    except OSError as error:
        return _NoText(f"cannot be read: {error.strerror}")


def _files(sources: Sequence[str], left_out: list[str]) -> Iterator[tuple[str, str, bool]]:
    """What names are relative to, a file, and whether it may be left out; in a fixed order."""

    def not_of_a_run(paths: Iterable[str]) -> Iterator[str]:
        for path in paths:
            if not _of_a_run(path):
                yield path
            elif (line := f"{os.path.dirname(path)}: what a run wrote in it") not in left_out:
                left_out.append(line)

    if not sources:
        library = str(standard_library())
        for path in _walk(library):
            below = os.path.relpath(path, library).split(os.sep)
            if path.endswith(".py") and _LEFT_OUT.isdisjoint(below):
                yield library, path, True
        return
    for source in sources:
        if os.path.isdir(source):
            yield from ((source, path, True) for path in not_of_a_run(_walk(source)))
        elif os.path.lexists(source):
            yield os.path.dirname(source), source, False
        else:
            found = _matching(source)
            if not found:
                pattern = "matches no file" if glob.has_magic(source) else "no such file or folder"
                raise ProgramError(f"--text {source}: {pattern}")
            root = source[: next(i for i, c in enumerate(source) if c in "*?[")]
            root = os.path.dirname(root)
            yield from ((root, path, False) for path in not_of_a_run(found))


def _of_a_run(path: str) -> bool:
    folder, name = os.path.split(path)
    try:
        return (
            name in _OF_A_RUN
            and os.path.isfile(os.path.join(folder, CONFIG))
            and {"jaxsoftmax", "task"} <= {*read_config(Path(folder))}
        )
    except (ProgramError, OSError):  # not a file that a run wrote
        return False


def _matching(pattern: str) -> list[str]:
    """The files, sorted. Glob's own `**` follows links, also in circles."""
    top, *parts = Path(os.path.abspath(pattern)).parts
    found = {top}
    for part in [*parts, "*"] if parts[-1] == "**" else parts:
        if part == "**":
            found = {below for path in found if os.path.isdir(path) for below, _ in _below(path)}
        else:
            found = {
                os.path.join(path, name)
                for path in found
                for name in glob.glob(part, root_dir=path)
            }
    return sorted(path for path in found if os.path.isfile(path))


def _walk(folder: str) -> Iterator[str]:
    """The files in it and below, but for hidden ones."""
    for parent, names in _below(folder):
        paths = (os.path.join(parent, name) for name in names)
        yield from (path for path in paths if os.path.isfile(path))


def _below(folder: str) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it, each with its files, but for hidden ones, in a fixed order."""

    def failed(error: OSError) -> None:
        raise ProgramError(f"--text {in_words(error)}") from error

    for parent, folders, names in os.walk(folder, onerror=failed):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name != "__pycache__"
            and not (name == CHECKPOINTS and _of_a_run(os.path.join(parent, name)))
        )
        yield parent, sorted(name for name in names if not name.startswith("."))
