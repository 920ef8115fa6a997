# SPDX-License-Identifier: Apache-2.0
"""From text to tokens and back: a byte-level BPE, and the labels of each document."""

import io
import json
import re
import tokenize
import warnings
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.language.text import Document

TOKENIZER = "tokenizer.json"
IGNORED = -1  # the label of a token that does not count
_END = "<|endoftext|>"
END = 0  # its number: before and after every document
_BYTES_AND_END = 257  # the smallest vocabulary
_AT_ONCE = 256  # documents


def trained(documents: Sequence[Document], vocab: int) -> Tokenizer:
    """A tokenizer of `vocab` tokens, from the documents to train on.

    Raises:
        ProgramError: the text does not have so many.
    """
    # Of n bytes there are at most n merges; the trainer takes memory for all it is asked for.
    most = _BYTES_AND_END + sum(len(document.text.encode()) for document in documents)
    if vocab > most:
        raise _too_many(vocab, most)
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab:
        raise _too_many(vocab, found)
    return tokenizer


def _too_many(vocab: int, most: int) -> ProgramError:
    return ProgramError(
        f"--vocab {vocab}: the text to train on gives at most {most} different tokens; choose at "
        "most so many, or more text"
    )


def parsed(text: str, vocab: int, where: str) -> Tokenizer:
    """The tokenizer that a run kept.

    Its tokens and merges are taken from the file, all else is as `trained` has it.

    Raises:
        ProgramError: it is none, or not one of `vocab` tokens.
    """
    try:
        kept = json.loads(text)
        found, merges = kept["model"]["vocab"], kept["model"]["merges"]
        if (
            len(found) != vocab
            or {type(number) for number in found.values()} != {int}
            or {*found.values()} != {*range(vocab)}
        ):
            raise ValueError(f"{len(found)} tokens, expected the numbers from 0 to {vocab - 1}")
        if found.get(_END) != END:
            raise ValueError(f"{_END} is not number {END}")
        if missing := {*pre_tokenizers.ByteLevel.alphabet()} - {*found}:
            raise ValueError(f"{len(missing)} bytes have no token")
        others = ("truncation", "padding", "normalizer", "post_processor")
        if not_ours := [name for name in others if kept.get(name) is not None]:
            raise ValueError(f"it has a {not_ours[0]}")
        pairs = [
            (first, second)
            for first, second in (p.split(" ") if isinstance(p, str) else p for p in merges)
        ]
        tokenizer = _byte_level(models.BPE(found, pairs))
        tokenizer.add_special_tokens([_END])
    except Exception as error:  # the library's errors are of the class Exception itself
        raise ProgramError(f"{where}: not the file this program wrote: {error}") from error
    return tokenizer


def _byte_level(bpe: models.BPE) -> Tokenizer:
    """Around its tokens and merges; the name of the end in a document is text as any other."""
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.encode_special_tokens = True
    return tokenizer


class Tokens:
    """Documents as the model reads them, and what it is asked for after each token.

    Attributes:
        inputs: of each document int32 `[n]`: the end of the one before, then its own tokens.
        labels: int32 `[n]`: its own tokens, then its end; IGNORED where the label does not count.
        text_bytes: how many bytes of text the labels that count stand for.
    """

    def __init__(
        self, tokenizer: Tokenizer, documents: Sequence[Document], *, mask_comments: bool
    ) -> None:
        """Encodes the documents; with `mask_comments` labels within comments do not count.

        Raises:
            ProgramError: no byte of the text counts, so that there is nothing to predict.
        """
        self.inputs, self.labels = [], []
        for document, encoding in _encoded(tokenizer, documents):
            ids = np.asarray(encoding.ids, np.int32)
            labels = np.append(ids, np.int32(END))
            if mask_comments:
                starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
                in_comment = np.append(_in_comments(document), False)
                before = np.cumsum(np.append(False, in_comment))
                labels[:-1][before[ends] > before[starts]] = IGNORED
            self.inputs.append(np.insert(ids, 0, END))
            self.labels.append(labels)
        # A byte-level BPE writes each byte of a token as one character; the end has none.
        names = (tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size()))
        lengths = np.array([len(name or "") for name in names])
        lengths[END] = 0
        self.text_bytes = int(lengths @ self.counts(len(lengths)))
        if not self.text_bytes:
            first, *others = [document.name for document in documents]
            more = f" and {len(others)} more files" if others else ""
            raise ProgramError(
                f"--mask-comments: nothing to predict in {first}{more}: all of the text is comments"
            )

    @property
    def counted(self) -> int:
        """How many labels count."""
        return sum(int((labels != IGNORED).sum()) for labels in self.labels)

    def counts(self, vocab: int) -> np.ndarray:
        """How often each token is a label, int32 `[vocab]`."""
        labels = np.concatenate(self.labels)
        return np.bincount(labels[labels != IGNORED], minlength=vocab).astype(np.int32)


def _encoded(tokenizer, documents):
    """By batches: an encoding takes many times the memory of its numbers."""
    for i in range(0, len(documents), _AT_ONCE):
        batch = documents[i : i + _AT_ONCE]
        encodings = tokenizer.encode_batch([document.text for document in batch])
        yield from zip(batch, encodings, strict=True)


def unigram_loss(counts: np.ndarray, labels: np.ndarray) -> float:
    """The loss of a model that knows how frequent tokens are, and nothing else.

    One is added to every count, so that no token is impossible.
    """
    log_probs = np.log(counts + 1.0) - np.log(np.sum(counts + 1.0))
    return -float(log_probs[labels[labels != IGNORED]].mean())


def _in_comments(document: Document) -> np.ndarray:
    """Of each character, whether it is in a comment of Python source."""
    text = re.sub(r"\r(?!\n)", "\n", document.text)  # a line's end to Python, not to its tokenizer
    begin = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    flags = np.zeros(len(text), bool)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is only read
            found = tokenize.generate_tokens(io.StringIO(text, newline="\n").readline)
            comments = [token for token in found if token.type == tokenize.COMMENT]
    # Python 3.12 and newer raise ValueError or SystemError on some text that is not.
    except (tokenize.TokenError, SyntaxError, ValueError, SystemError) as error:
        raise ProgramError(
            f"--mask-comments: {document.name}: not Python source: {error}"
        ) from error
    for comment in comments:
        at = begin[comment.start[0] - 1] + comment.start[1]
        flags[at : at + len(comment.string)] = True
    return flags
