# SPDX-License-Identifier: Apache-2.0
"""The documentation site: built without a warning, whole, and alone with its own files."""

import html
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import jaxsoftmax
import jaxsoftmax_command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs pip install -e '.[docs]'"
)
# Addresses in the theme's scripts: the start of one; of a message; of the code host, for its count
# of stars; of a library for diagrams. No page has the elements for which the last two are asked,
# and every browser has what else would be loaded from the last, `ResizeObserver`.
INERT = {"", "bit.ly", "api.github.com", "unpkg.com"}
WAKES = ('data-md-component="source"', 'class="mermaid"')
FORWARD_MODE = [
    name
    for name, value in vars(jaxsoftmax.forward_mode).items()
    if inspect.isfunction(value) and not name.startswith("_")
]


class Page(HTMLParser):
    """A built page: its anchors, its links, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        if tag == "a":
            self.anchors.add(given.get("name"))
            self.links.append(given.get("href") or "")
        else:
            self.loads += [given[key] or "" for key in ("src", "srcset", "href") if key in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert not re.search(r"WARNING|ERROR|Deprecat", output), output
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_resolve(pages):
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            target = urlsplit(link)
            if target.scheme or target.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                broken.append((path.name, link))
            elif target.fragment and file in pages:
                anchor = unquote(target.fragment)
                broken += [(path.name, link)] if anchor not in pages[file].anchors else []
    assert not broken


def test_no_other_host_is_contacted(site, pages):
    for path, page in pages.items():
        foreign = [load for load in page.loads if urlsplit(load).netloc]
        assert not foreign, path
        assert not any(mark in page.html for mark in WAKES), path
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", page.html), path
    styles, scripts = [*site.rglob("*.css")], [*site.rglob("*.js")]
    assert styles
    assert scripts
    for path in styles:
        style = path.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style), path
    for path in scripts:
        # Data; and other languages' rules for the search, with their sources' addresses.
        if path.parent != site / "search" and "lunr" not in path.parts:
            script = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            hosts = re.findall(r"https?://([\w.-]*)", script)
            assert {*hosts} <= INERT, path


def test_the_search_finds_functions(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"] for entry in index["docs"]}
    for name in jaxsoftmax.__all__:
        assert any(location.endswith(f"#jaxsoftmax.{name}") for location in found), name
    text = " ".join(html.unescape(entry["text"]) for entry in index["docs"])
    words = {*re.split(index["config"]["separator"], re.sub(r"<[^>]*>", "", text))}
    assert {"batchmean", "CrossEntropyLoss", "jvp", "kl_div", "softmax_cross_entropy"} <= words


def test_every_public_name_has_an_entry(site, pages):
    reference = {p: page for p, page in pages.items() if p.parent == site / "reference"}
    anchors = set().union(*(page.anchors for page in reference.values()))
    names = [*jaxsoftmax.__all__, "forward_mode", *(f"forward_mode.{n}" for n in FORWARD_MODE)]
    assert len(FORWARD_MODE) > 5
    assert {f"jaxsoftmax.{name}" for name in names} <= anchors
    assert not [p for p, page in reference.items() if "jaxsoftmax._" in page.html]
    commands = reference[site / "reference" / "commands.html"].html
    assert all(f"jaxsoftmax {command}<" in commands for command in jaxsoftmax_command._NEEDED)


def test_every_equation_is_set(site, pages):
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        page = pages[site / path.relative_to(ROOT / "docs").with_suffix(".html")]
        assert {f"equation-{n}" for n in re.findall(r"\\tag\{(\w+)\}", text)} <= page.anchors
        assert "arithmatex" not in page.html
        assert "$$" not in page.html


def test_the_drawing_has_every_module():
    drawn = (ROOT / "docs" / "figures" / "modules.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="name">([\w.]+)<', drawn)
    package = ROOT / "jaxsoftmax"
    files = [*package.glob("*.py"), *(package / "_head").glob("*.py")]
    modules = [".".join(f.relative_to(package).with_suffix("").parts) for f in files]
    assert sorted(names) == sorted(m for m in modules if not m.endswith("__"))
