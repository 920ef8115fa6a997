# SPDX-License-Identifier: Apache-2.0
"""The programs `jaxsoftmax train-lm`, `evaluate` and `generate`: small models on little text."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import termios
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from pages import names_of
from programs import (
    ROOT,
    SLOW,
    command,
    environment,
    here,
    metrics,
    newest,
    parameters,
    program,
    refused_by,
    wait_until,
)

from jaxsoftmax.training import cli
from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.language import batches, model, step, text, tokens
from jaxsoftmax.training.language.generate import Writer, next_token
from jaxsoftmax.training.language.text import Document
from jaxsoftmax.training.language.tokens import END, IGNORED, Tokens

DOCS = ("--text", ROOT / "docs" / "*.md")
SMALL = (
    *("--vocab", 300, "--width", 16, "--layers", 2, "--heads", 2, "--context", 32),
    *("--batch-size", 8, "--eval-tokens", 500, "--eval-every", 2, "--steps", 6),
)


def train(*arguments: object) -> int:
    """On the project's own docs, if no other text is given."""
    source = () if "--text" in arguments else DOCS
    return here("train-lm", *source, *arguments)


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics, but for the speed."""
    kept = metrics(folder)
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in kept]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm") / "run"
    assert train("--output", folder, *SMALL) == 0
    return folder


def test_everything_is_written_and_shown(tmp_path):
    done = program("train-lm", "--output", tmp_path / "run", *DOCS, *SMALL, "--prompt", "The ")
    assert (done.returncode, done.stderr) == (0, "")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["test_loss"] < lines[0]["test_loss"] < 7
    for words in ("step 6/6", "bits per byte", "unigram", "tokens to train on", "tokens/s"):
        assert words in done.stdout
    assert "\nThe " in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("config.json", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints")
    }
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_and_perplexity(run):
    """Each is the mean loss in other units."""
    line = metrics(run)[-1]
    assert line["test_perplexity"] == pytest.approx(np.exp(line["test_loss"]))
    documents = text.read((f"{DOCS[1]}",)).documents
    tokenizer = tokens.parsed((run / "tokenizer.json").read_text(), 300, "")
    held_out = Tokens(tokenizer, text.split(documents)[1], mask_comments=False)
    per_label = held_out.text_bytes / held_out.counted
    bits = line["test_loss"] / np.log(2) / per_label
    assert line["test_bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize("mask", [(), ("--mask-comments",)], ids=["all", "comments ignored"])
def test_every_head_gives_the_same_numbers(tmp_path, mask):
    source = ("--text", ROOT / "examples" / "*.py")
    for head in ("fused", "recompute", "plain"):
        arguments = (*SMALL, *source, *mask, "--head", head)
        assert train("--output", tmp_path / head, *arguments) == 0
    ours, other, plain = (numbers(tmp_path / head) for head in ("fused", "recompute", "plain"))
    # A step of AdamW is as large as its rate, whatever the gradient: it follows the rounding of
    # small ones, 1e-6 of a sum of 256 terms, at 2e-3 a step.
    for lines in (ours, other):
        for line, expected in zip(lines, plain, strict=True):
            assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-6)
            assert line["test_loss"] == pytest.approx(expected["test_loss"], rel=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        ("--accumulate", "4"),
        ("--mesh", "data=2,fsdp=2,vocab=2"),
        pytest.param(("--mesh", "data=4,vocab=2", "--head", "recompute"), marks=pytest.mark.wide),
        pytest.param(("--mesh", "fsdp=8", "--head", "plain"), marks=pytest.mark.wide),
        ("--remat",),
    ],
    ids=" ".join,
)
def test_however_the_work_is_cut_the_numbers_are_the_same(tmp_path, run, options):
    assert train("--output", tmp_path / "run", *SMALL, *map(str, options)) == 0
    for line, expected in zip(numbers(tmp_path / "run"), numbers(run), strict=True):
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert line["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """At a random moment, which differs from run to run: whatever it is, the numbers are these."""
    arguments = (*DOCS, *SMALL, "--steps", 12)
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        command("train-lm", "--output", folder, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        wait_until(lambda: newest(folder) >= 2, process)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=SLOW)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9999, "tr')
    done = program("train-lm", "--output", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert program("train-lm", "--output", whole, *arguments).returncode == 0
    assert numbers(folder) == numbers(whole)
    ours, theirs = parameters(folder, 12), parameters(whole, 12)
    assert len(ours) > 10
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ctrl_c_ends_after_the_step(tmp_path):
    with subprocess.Popen(
        command("train-lm", "--output", tmp_path / "run", *DOCS, *SMALL, "--steps", 100_000),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: newest(tmp_path / "run") >= 2, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SLOW)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert "train-lm --resume --output" in line


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    arguments = (*SMALL, "--steps", 40, "-l", 1e30, "--warmup", 0, "--weight-decay", 0)
    assert train("--output", tmp_path / "run", *arguments, "--clip", 1e30) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "diverged in step" in line
    assert "--learning-rate" in line


def test_evaluate_and_generate(run, capsys):
    assert here("evaluate", run) == 0
    own = capsys.readouterr().out
    assert "perplexity" in own
    assert here("evaluate", run, "--text", ROOT / "README.md", "--checkpoint", "4") == 0
    other = capsys.readouterr().out
    assert "after step 4" in other
    assert "README.md: 1 file, " in other
    texts = []
    for seed in (0, 0, 1):
        more = ("--prompt", "The loss", "--tokens", 50, "--seed", seed)
        assert here("generate", run, *more, "--top-k", 20) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(written.startswith("The loss") for written in texts)


def endless(run: Path) -> subprocess.Popen[bytes]:
    """Text of so many tokens that it does not end by itself."""
    return subprocess.Popen(
        command("generate", run, "--tokens", 1_000_000, "--temperature", 1000),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_generate_writes_as_it_goes(run):
    """In whole characters, compiled once for all lengths, and Ctrl-C ends it between two tokens."""
    writer = Writer.of_run(run, "best")
    how = {"temperature": 5.0, "top_k": None, "seed": 0}
    programs = next_token._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    parts = [*writer.after("a", count=60, **how)]
    assert len(parts) > 20
    assert not any(part.endswith("\ufffd") for part in parts[:-1])
    assert "".join([*writer.after("a", count=30, **how)][:-1]) in "".join(parts)
    assert next_token._cache_size() == programs + 1  # pyright: ignore[reportAttributeAccessIssue]
    with endless(run) as process:
        assert process.stdout
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SLOW)
    assert process.returncode == 130
    assert errors == b"jaxsoftmax: interrupted\n"


def test_output_that_has_no_such_characters_or_no_reader(run):
    line = command("generate", run, "--tokens", 1, "--prompt", "ü")
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, env=ascii_only, capture_output=True, timeout=SLOW, check=True)
    assert done.stdout.startswith(b"\\xfc")
    with endless(run) as process:
        assert process.stdout
        process.stdout.close()
        assert process.wait(SLOW) == 1
        assert process.stderr
        assert not process.stderr.read()


def test_memory_that_is_not_enough(tmp_path, capsys, monkeypatch):
    """For the model, as a device says it; for one head of three."""
    output = ("--output", tmp_path / "run")

    def exhausted(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    with monkeypatch.context() as patched:
        patched.setattr(model, "drawn", exhausted)
        assert train(*output, *SMALL) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line
    assert all(option in line for option in ("--accumulate", "--remat", "--head recompute"))
    assert not (tmp_path / "run").exists()

    def too_large(*_: object) -> None:
        raise MemoryError("7 TB")

    monkeypatch.setitem(step.HEADS, "plain", too_large)
    assert train(*output, *SMALL, "--compare-heads") == 0
    shown = capsys.readouterr().out
    assert "does not fit: 7 TB" in shown
    assert shown.count("tokens/s") == 2


def test_evaluate_says_when_the_text_has_changed(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    output = ("--text", tmp_path / "?", "--output", tmp_path / "run")
    assert train(*output, *SMALL, "--steps", 1) == 0
    capsys.readouterr()
    (tmp_path / "d").write_text("more")
    assert "has changed" in refused_by(capsys, "evaluate", tmp_path / "run")


def test_compare_heads(tmp_path, capsys):
    assert train("--output", tmp_path / "run", *SMALL, "--compare-heads") == 0
    shown = capsys.readouterr().out
    assert all(head in shown for head in ("fused", "recompute", "plain", "tokens/s", "JAX"))
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
def test_compare_heads_on_a_tpu(capsys):
    pytest.importorskip("libtpu")
    model = ("--vocab", 32768, "--width", 256, "--layers", 2, "--heads", 2, "--batch-size", 8)
    assert train(*model, "--compare-heads", "--target", "v5e") == 0
    shown = capsys.readouterr().out
    assert shown.count("Mcycles") == 3


def test_the_code_of_its_page(run, eval_example):
    names = names_of("guides/language-model", eval_example)
    found = jax.tree.leaves(names["parameters"](run, 4))
    kept = {leaf.tobytes() for leaf in parameters(run, 4)}
    assert len(found) > 5
    assert all(np.asarray(leaf).tobytes() in kept for leaf in found)


# Text, tokens and batches


def test_the_split_does_not_move():
    documents = [Document(f"{i}.py", "x") for i in range(1000)]
    train, held_out = text.split(documents)
    assert 60 < len(held_out) < 140
    assert {*train, *held_out} == {*documents}
    fewer = text.split(documents[::2])
    assert {*fewer[1]} == {*held_out} & {*documents[::2]}
    for few in ([*documents[:2]], [documents[0], documents[7]]):
        assert [len(side) for side in text.split(few)] == [1, 1]
    (first,), (second,) = text.split([Document("one", "a line\n" * 100)])
    assert first.text + second.text == "a line\n" * 100
    assert second.text == "a line\n" * 10


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "binary").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "more.txt").write_text("more text")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"jaxsoftmax": "1", "task": "classifier"}')
    corpus = text.read((f"{tmp_path}",))
    found = sorted(document.name for document in corpus.documents)
    assert found == ["below/more.txt", "text.txt"]
    assert [line.partition(": ")[2] for line in corpus.left_out] == [
        "not UTF-8 text (byte 1)",
        "empty",
        "what a run wrote in it",
    ]


def test_the_standard_library_without_its_tests():
    names = [document.name for document in text.read(()).documents]
    assert "json/decoder.py" in names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)
    assert all(name.endswith(".py") for name in names)


TEXTS = [
    Document("a.py", "x = 1  # one\n# all of it\ny = '# no comment'\n"),
    Document("b.py", "<|endoftext|> é 世界 🎉\r\n\tpass\n" * 3),
]


def test_tokens_give_the_text_back_and_the_end_is_no_text():
    tokenizer = tokens.trained(TEXTS, 270)
    found = Tokens(tokenizer, TEXTS, mask_comments=False)
    for document, inputs, labels in zip(TEXTS, found.inputs, found.labels, strict=True):
        assert inputs[0] == labels[-1] == END
        np.testing.assert_array_equal(inputs[1:], labels[:-1])
        assert END not in labels[:-1]
        assert tokenizer.decode(labels[:-1].tolist()) == document.text
    assert found.text_bytes == sum(len(document.text.encode()) for document in TEXTS)


def test_comments_are_masked():
    tokenizer = tokens.trained(TEXTS, 257)  # bytes
    found = Tokens(tokenizer, TEXTS[:1], mask_comments=True)
    kept = found.labels[0][:-1]
    code = tokenizer.decode(kept[kept != IGNORED].tolist())
    assert code == "x = 1  \n\ny = '# no comment'\n"
    assert found.text_bytes == len(code.encode())
    assert found.labels[0][-1] == END


def test_every_label_comes_once_in_a_pass_and_batches_go_on_where_they_were():
    tokenizer = tokens.trained(TEXTS, 260)
    documents = [Document(f"{i}", TEXTS[1].text * (1 + i % 3)) for i in range(20)]
    found = Tokens(tokenizer, documents, mask_comments=False)
    once = batches.held_out(found, 16, 4, None)
    labels = np.concatenate([batch.labels.ravel() for batch in once])
    assert sorted(labels[labels != IGNORED]) == sorted(np.concatenate(found.labels))
    for batch in once:
        assert batch.inputs.shape == (4, 16)
        np.testing.assert_array_equal(batch.labels == IGNORED, batch.segments == 0)
        # Within a segment each label is the next input, and positions count up.
        same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
        np.testing.assert_array_equal(batch.inputs[:, 1:][same], batch.labels[:, :-1][same])
        steps = batch.positions[:, 1:] - batch.positions[:, :-1]
        assert (steps[same] == 1).all()
    first = batches.Batches(found, 16, 4, seed=3)
    for _ in range(5):
        next(first)
    position = json.loads(json.dumps(first.position()))
    expected = [next(first) for _ in range(60)]  # into the second pass
    again = batches.Batches(found, 16, 4, seed=3)
    again.go_to(position)
    for batch in expected:
        for a, b in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(a, b)
    other = next(batches.Batches(found, 16, 4, seed=4))
    assert not np.array_equal(other.inputs, next(batches.Batches(found, 16, 4, seed=3)).inputs)


# What is refused


@pytest.mark.parametrize(
    "arguments",
    [
        *[(option, "0") for option in ("--layers", "--heads", "--steps", "--batch-size")],
        *[(option, "0") for option in ("--accumulate", "--eval-every", "--eval-tokens", "--clip")],
        *[("--vocab", value) for value in ("256", "1000000", str(2**31))],
        ("--width", "6", "--heads", "2"),
        ("--context", "1000000"),
        *[("--learning-rate", value) for value in ("0", "nan")],
        ("--weight-decay", "-1"),
        ("--warmup", "6"),
        ("--accumulate", "3"),
        *[("--mesh", value) for value in ("data=3,rows=2", "vocab=7", "vocab=8", "data=1")],
        *[("--text", value) for value in ("nowhere", "nothing/*.py", "")],
        ("--target", "v5e"),
        ("--size", "huge"),
        ("--mask-comments",),
    ],
    ids=" ".join,
)
def test_bad_options(tmp_path, capsys, arguments):
    source = () if "--text" in arguments else DOCS
    output = ("--output", tmp_path / "run")
    line = refused_by(capsys, "train-lm", *output, *source, *SMALL, *arguments)
    assert arguments[0] in line
    assert not (tmp_path / "run").exists()


def test_bad_text(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "short").write_text("short")
    for name in ("binary", "empty", "folder", "short"):
        path = tmp_path / name
        line = refused_by(capsys, "train-lm", "--output", tmp_path / "run", "--text", path)
        assert str(path) in line or name == "short"
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "auto"),
        ("--accumulate", "2"),
        ("--size", "tiny", *map(str, SMALL[2:10])),
        ("--text", DOCS[1]),
    ],
    ids=["dtype", "accumulate", "size", "text"],
)
def test_a_run_resumes_with_options_that_are_its_own(tmp_path, capsys, run, arguments):
    """Whether they go with the defaults or not."""
    folder, own = run, SMALL
    if "--accumulate" in arguments:
        folder, own = tmp_path / "run", (*SMALL, "--batch-size", 2, "--accumulate", 2)
        assert train("--output", folder, *own) == 0
    assert here("train-lm", "--output", folder, "--resume", *arguments) == 0
    assert "resumed after step 6" in capsys.readouterr().out


def test_runs_of_others(tmp_path, capsys, run):
    """Of the other task, with another text, with files of a hostile hand."""
    line = refused_by(capsys, "train-lm", "--output", run, "--resume", "--width", 32)
    assert "--width 32" in line
    changed = ("--resume", "--text", ROOT / "README.md")
    assert "sha256" in refused_by(capsys, "train-lm", "--output", run, *changed)
    line = refused_by(capsys, "train", "--output", run, "--resume")
    assert "expected the run of a classifier" in line
    for wrong in ("0", "7", "first", "-1"):
        assert "best, last or one of 2, 4, 6" in refused_by(
            capsys, "evaluate", run, f"--checkpoint={wrong}"
        )
    assert "--top-k" in refused_by(capsys, "generate", run, "--top-k", 301)
    for name in ("missing", "."):
        assert "config.json" in refused_by(capsys, "generate", tmp_path / name)


HOSTILE = {
    "config.json": ["", "[]", "{}", "[" * 100_000, '{"task": "language model"}'],
    "tokenizer.json": ["", "{}", '{"model": {"type": "BPE"}}', "\x00", "[" * 100_000],
}


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"test_loss": "x"}'])
def test_hostile_metrics_of_a_checkpoint(tmp_path, capsys, run, content):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", f"{run}", f"{copy}"], check=True)
    (copy / "checkpoints" / "4" / "metrics" / "metrics").write_text(content)
    assert f"{copy}/checkpoints" in refused_by(capsys, "generate", copy)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, capsys, run, name):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", f"{run}", f"{copy}"], check=True)
    config = json.loads((run / "config.json").read_text())
    contents = [*HOSTILE[name]]
    if name == "config.json":
        wrong = [{"vocab": "300"}, {"width": 32}, {"layers": 3}, {"text": [1]}, {"heads": 0}]
        wrong += [{"dtype": "int8"}, {"eval_every": 0}, {"accumulate": 3}, {"clip": float("nan")}]
        wrong += [{"batch_size": 0}, {"steps": -1}, {"layers": 10**30}, {"head": "none"}]
        for options in wrong:
            changed = config | {"options": config["options"] | options}
            contents.append(json.dumps(changed))
    if name == "tokenizer.json":
        kept = json.loads((run / name).read_text())
        vocab, merges = kept["model"]["vocab"], kept["model"]["merges"]
        last = max(vocab, key=vocab.__getitem__)
        template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
        for changed in (
            {"model": kept["model"] | {"vocab": vocab | {last: 300}}},
            {"model": kept["model"] | {"vocab": vocab | {last: -1}}},
            {"model": kept["model"] | {"vocab": vocab | {last: 299.0}}},
            {"model": kept["model"] | {"merges": [["no", "such"], *merges]}},
            {"model": kept["model"] | {"merges": [["one"]]}},
            {"post_processor": template},
            {"truncation": {"max_length": 3}},
        ):
            contents.append(json.dumps(kept | changed))
    for content in contents:
        (copy / name).write_text(content)
        assert here("generate", copy) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert captured.err.count("\n") == 1
        assert str(copy) in captured.err


@pytest.mark.parametrize("where", ["metrics.jsonl", "checkpoints/6/position/metadata"])
def test_hostile_files_of_a_run_to_resume(tmp_path, capsys, run, where):
    """A line without a metric; a position that is empty, of another kind, outside of the text."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", f"{run}", f"{copy}"], check=True)
    path = copy / where
    kept = path.read_text()
    if where == "metrics.jsonl":
        first, *others = kept.splitlines(keepends=True)
        without, more = json.dumps({"step": 2}) + "\n", first.replace("}", ', "x": 1}')
        contents = ["".join([line, *others]) for line in (without, more)]
    else:
        far = re.sub(r'("next_index": )\d+', r"\g<1>-7", kept)
        assert far != kept
        contents = ["{}", '{"next_index": 3}', far]
    for content in contents:
        path.write_text(content)
        line = refused_by(capsys, "train-lm", "--output", copy, "--resume")
        assert str(path if where == "metrics.jsonl" else copy / "checkpoints" / "6") in line


# Text of every kind


@pytest.mark.parametrize("pattern", ["", "**/*"], ids=["folder", "pattern"])
def test_an_output_folder_within_its_text(tmp_path, capsys, pattern):
    """Its own files are no text, so the run goes on, and is evaluated, on the same."""
    (tmp_path / "text.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    for output in (tmp_path, tmp_path / "run"):  # the second finds the first beside its text
        options = ("--text", tmp_path / pattern, "--output", output)
        assert train(*options, *SMALL, "--steps", 2) == 0
        assert ("what a run wrote" in capsys.readouterr().out) == (output != tmp_path)
    for output in (tmp_path, tmp_path / "run"):
        assert here("train-lm", "--output", output, "--resume") == 0
        assert here("evaluate", output) == 0
        assert capsys.readouterr().out.count(f"left out  {tmp_path}: what a run wrote") == 2


def test_a_folder_that_is_no_run_but_has_its_names(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes.md").write_text("notes")
    for content in ("{}", "[]", '{"task": "my own"}', "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        found = text.read((f"{tmp_path}",))
        assert {*found.documents} == {
            Document("config.json", content),
            Document("checkpoints/notes.md", "notes"),
        }
        assert not found.left_out


def test_patterns(tmp_path):
    """As glob has them, but no link to a folder is followed by `**`: they may go in circles."""
    for name in ("a.py", "b.md", "x/c.py", "x/y/d.py", ".hidden/e.py", "x/.f.py", "[z]/g.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for link in ("one", "two"):
        (tmp_path / "x" / "y" / link).symlink_to(tmp_path)
    for pattern, expected in {
        "*.py": {"a.py"},
        "**/*.py": {"a.py", "x/c.py", "x/y/d.py", "[z]/g.py"},
        "**/**/**/d.py": {"x/y/d.py"},
        "**": {"a.py", "b.md", "x/c.py", "x/y/d.py", "[z]/g.py"},
        "*/**/?.py": {"x/c.py", "x/y/d.py", "[z]/g.py"},
        ".hidden/*.py": {"e.py"},
        "[[]z]/*": {"[z]/g.py"},
        "[z]/*": set(),
    }.items():
        sources = (f"{tmp_path}/{pattern}",)
        if expected:
            assert {d.name for d in text.read(sources).documents} == expected, pattern
        else:
            with pytest.raises(ProgramError, match="matches no file"):
                text.read(sources)
    assert len(text.read((f"{tmp_path}",)).documents) == 5


def test_what_is_no_file(tmp_path, capsys):
    """A pipe that nobody writes to, a device without end, a link to itself."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path / "itself"):
        line = refused_by(capsys, "train-lm", "--output", tmp_path / "run", "--text", path)
        assert f"--text {path}: " in line
    (tmp_path / "text").write_text("text")
    assert [d.name for d in text.read((f"{tmp_path}",)).documents] == ["text"]


def test_names_of_any_bytes(tmp_path, capsys):
    for name in (b"\xff one.md", b"two \xff.md"):
        path = os.path.join(os.fsencode(tmp_path), name)
        Path(os.fsdecode(path)).write_bytes((ROOT / "README.md").read_bytes())
    for source in (tmp_path, tmp_path / os.fsdecode(b"*\xff*")):
        output = tmp_path / f"run {source == tmp_path}"
        assert train("--text", source, "--output", output, *SMALL, "--steps", 1) == 0
        assert here("evaluate", output) == 0
    capsys.readouterr()
    for source in ("\ud800", "*\ud800*", "a\0b", os.fsdecode(b"\xff")):
        line = refused_by(capsys, "train-lm", "--output", tmp_path / "none", "--text", source)
        assert line.startswith("jaxsoftmax: --text ")


def test_a_vocabulary_no_text_has(tmp_path, capsys):
    """The trainer would take memory for it before it looks at the text."""
    line = refused_by(capsys, "train-lm", "--output", tmp_path, *DOCS, "--vocab", 2**31 - 1)
    assert "at most" in line
    documents = [Document("one", "abc" * 20)]
    with pytest.raises(ProgramError, match="at most 317 "):
        tokens.trained(documents, 318)
    with pytest.raises(ProgramError, match=r"at most 2\d\d "):
        tokens.trained(documents, 317)


@pytest.mark.parametrize(
    "arguments",
    [
        *[("--clip", value) for value in ("1e-300", "1e300", "inf", "nan", "-1")],
        *[("--weight-decay", value) for value in ("1e300", "1e-300", "inf", "nan")],
        *[("--learning-rate", value) for value in ("1e-300", "1e300")],
    ],
    ids=" ".join,
)
def test_numbers_that_float32_has_not(tmp_path, capsys, arguments):
    output = ("--output", tmp_path / "run")
    line = refused_by(capsys, "train-lm", *output, *DOCS, *SMALL, *arguments)
    assert arguments[0] in line
    assert f"got {float(arguments[1]):g}" in line


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("x = 1  # one\ry = 2\n", "x = 1  \ry = 2\n"),
        ("x\r# one\r# two\r\ny\r", "x\r\r\r\ny\r"),
        ("x = 1  # é 🎉\r\ny = '''\r\n# z''' # w\r\n", "x = 1  \r\ny = '''\r\n# z''' \r\n"),
        ("\ufeff# one\nx = '🎉'  # two", "\ufeff\nx = '🎉'  "),
        ("\f# one\n\fx = \\\r\n 1  # two\n", "\f\n\fx = \\\r\n 1  \n"),
    ],
)
def test_comments_at_every_end_of_a_line(source, code):
    document = Document("a.py", source)
    tokenizer = tokens.trained([document], 257)
    labels = Tokens(tokenizer, [document], mask_comments=True).labels[0][:-1]
    assert tokenizer.decode(labels[labels != IGNORED].tolist()) == code


@pytest.mark.parametrize("source", ["x = (\n", "x = '''", "  x\n y\n", ")$\n é(}🎉\r\x00©x"])
def test_what_is_not_python(source):
    """In a line; of the last Python 3.13 raises SystemError."""
    document = Document("a.py", source)
    tokenizer = tokens.trained([document], 257)
    with pytest.raises(ProgramError, match="not Python source"):
        Tokens(tokenizer, [document], mask_comments=True)


def test_python_that_a_newer_one_warns_of():
    document = Document("a.py", "x = f'\\{y}'  # one\n")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tokenizer = tokens.trained([document], 257)
        Tokens(tokenizer, [document], mask_comments=True)
    assert not warned


def test_nothing_but_comments(tmp_path, capsys):
    """To evaluate, and to train on: bits of a byte have no meaning without a byte."""
    source = ("--text", ROOT / "examples" / "*.py", "--mask-comments")
    assert train("--output", tmp_path / "run", *SMALL, *source, "--steps", 1) == 0
    comment = tmp_path / "comment.py"
    comment.write_text("# " + "all of it " * 1000)
    capsys.readouterr()
    line = refused_by(capsys, "evaluate", tmp_path / "run", "--text", comment)
    assert "--mask-comments: nothing to predict in comment.py" in line
    names = ("a.py", "b.py", "c.py")
    _, ((held_out, _),) = text.split([Document(name, "") for name in names])
    for name in names:
        source = comment if name == held_out else ROOT / "tests" / "programs.py"
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(source.read_bytes())
    options = ("--output", tmp_path / "other", "--text", tmp_path / "text", "--mask-comments")
    line = refused_by(capsys, "train-lm", *SMALL, *options)
    assert f"--mask-comments: nothing to predict in {held_out}" in line


def test_ctrl_c_while_nobody_reads(run):
    """The pipe is full, and the program waits for it."""
    with subprocess.Popen(
        command("generate", run, "--tokens", 1_000_000, "--prompt", "a" * 100_000),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        fd = process.stdout.fileno()
        full = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        count = bytearray(4)
        wait_until(
            lambda: (
                (fcntl.ioctl(fd, termios.FIONREAD, count), int.from_bytes(count, "little"))[1]
                >= full
            ),
            process,
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(SLOW) == 130
        assert process.stderr.read() == b"jaxsoftmax: interrupted\n"


def test_help_keeps_whole_lines_and_says_what_it_is_about(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("train", "train-lm", "evaluate", "generate", "predict"):
        assert cli.run([name, "--help"]) == 0
        head, _, options = capsys.readouterr().out.partition("╭")
        sentences = [line.strip() for line in head.splitlines() if line.strip()]
        assert all(line.endswith(".") for line in sentences[1:]), sentences
        assert "next four" not in options
        assert "│ Of " not in options
