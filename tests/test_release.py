# SPDX-License-Identifier: Apache-2.0
"""What is released: the version said alike everywhere, wheel and sdist, and the wheel at work."""

import ast
import os
import re
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from programs import PROJECT, ROOT, run

NAME, VERSION = PROJECT["project"]["name"], PROJECT["project"]["version"]
# What a working copy may hold beside what is released.
JUNK = {"__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache", "build", "dist", "runs"}
# As a user has it: none of this process's paths, virtual environment or settings of JAX.
USER = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
USER |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
USER |= {"JAX_PLATFORMS": "cpu"}


def test_the_version_is_said_alike():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert released[0][0] == VERSION
    assert re.findall(r"^(?:version|date-released): (\S+)$", citation, re.M) == [*released[0]]


def ours(*parents: str) -> set[str]:
    """Every file of these folders of the repository."""
    paths = [path for parent in parents for path in (ROOT / parent).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT) for path in paths]
    return {str(name) for name in names if not JUNK.intersection(name.parts)}


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{NAME}-{VERSION}.dist-info/METADATA").decode()
    about = {name for name in names if name.startswith(f"{NAME}-{VERSION}.dist-info/")}
    assert names - about == ours("jaxsoftmax") | {"jaxsoftmax_command.py"}
    assert "jaxsoftmax/py.typed" in names
    assert {Path(name).name for name in about} >= {"METADATA", "LICENSE", "entry_points.txt"}
    for name, address in PROJECT["project"]["urls"].items():
        assert f"\nProject-URL: {name}, {address}\n" in metadata
    assert "](https://" in metadata
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.partition("\n\n")[2])


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
    top = f"{NAME}-{VERSION}/"
    assert all(name.startswith(top) for name in files)
    names = {name.removeprefix(top) for name in files}
    folders = ("bench", "docs", "examples", "jaxsoftmax", "tests")
    beside = {
        path.name for suffix in ("md", "cff", "toml", "yml") for path in ROOT.glob(f"*.{suffix}")
    }
    alone = {"jaxsoftmax_command.py", ".ci/run", "LICENSE", ".gitignore", "PKG-INFO"}
    assert names == ours(*folders) | beside | alone


def first_snippet() -> str:
    """README's first lines of Python that do more than import."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        if not all(isinstance(s, ast.Import | ast.ImportFrom) for s in ast.parse(code).body):
            return code
    raise AssertionError("README shows no Python")


@pytest.mark.wide
def test_wheel_and_sdist(tmp_path):
    """They hold what they should, and the wheel works where nothing else is installed."""
    pytest.importorskip("build", reason="the extra `test` has it")
    pytest.importorskip("twine", reason="the extra `test` has it")

    def done(*line: object) -> str:
        result = run(*line, env=USER, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    # The sdist, and from it the wheel.
    done(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT)
    (wheel,), (sdist,) = (list(tmp_path.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    check_wheel(wheel)
    check_sdist(sdist)
    done(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)

    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    done(*install, wheel)
    assert done(python, "-m", NAME, "--version") == f"{NAME} {VERSION}\n"
    assert done(python.with_name(NAME), "--version") == f"{NAME} {VERSION}\n"
    snippet = first_snippet()
    if "optax" in snippet:  # to compare with
        done(*install, "optax")
    done(python, "-c", snippet)
