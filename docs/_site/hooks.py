# SPDX-License-Identifier: Apache-2.0
"""What the site changes in the documents, so that these read well on the code host too.

Mathematics becomes MathML while the site is built, so that pages need no script for it. A link that
leaves `docs/` goes to the page that shows that file, or to the file on the code host. The search
shows the pages that say how to use the library before those that say how it came about.
"""

import html
import posixpath
import re
from pathlib import Path

from math_core import LatexError, LatexToMathML
from mkdocs.plugins import get_plugin_logger
from mkdocs.utils import get_relative_url

_LOG = get_plugin_logger("site")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([,.;:)]*)', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\w+)\}")
_CODE = re.compile(r"^( *)(```+).*?^\1\2 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)\s]+")
_DOCUMENT = re.compile(
    r"(?<![\w/])docs/([\w/-]+\.md)\b(\s+equations?\s+(?:\(\d+\)(?:,\s+|\s+and\s+)?)+)?"
)
_FLAG = re.compile(r"(?<=<code>)--[\w-]+")
_PRIVATE = re.compile(r' title="jaxsoftmax\._[\w.]+"| \(jaxsoftmax\._[\w.]+\)(?=")')
# Files of the repository that are pages here.
_PAGES = {
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "README.md": "docs/index.md",
}
# What the search multiplies a page's rank by.
_BOOSTS = {
    "reference/": 4,
    "guides/migrate.md": 2,
    "questions.md": 2,
    "benchmarks.md": 0.5,
    "derivation.md": 0.5,
    "forms.md": 0.5,
    "performance.md": 0.5,
    "upstream.md": 0.5,
}
_to_mathml = LatexToMathML(fancy_error=False)


def on_page_markdown(markdown, *, page, config, **_):
    """Links that leave `docs/`, and the page's rank in the search."""
    boost = next((b for name, b in _BOOSTS.items() if page.file.src_uri.startswith(name)), 1)
    page.meta.setdefault("search", {"boost": boost})
    docs, root = Path(config.docs_dir), Path(config.config_file_path).parent
    folder = posixpath.dirname(f"{docs.name}/{page.file.src_uri}")

    def on_code_host(match):
        path, _, anchor = match[0].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("../../"):  # beside its files, as a link on the code host has it
            return config.repo_url + path.removeprefix("../..")
        path = _PAGES.get(path, path)
        if path.startswith(f"{docs.name}/"):
            return posixpath.relpath(path, folder) + (f"#{anchor}" if anchor else "")
        if not (root / path).exists():
            _LOG.warning("%s links to %s, which is not there", page.file.src_uri, path)
        return f"{config.repo_url}/blob/main/{path}" + (f"#{anchor}" if anchor else "")

    parts, end = [], 0
    for code in [*_CODE.finditer(markdown), None]:
        prose = markdown[end : code.start() if code else None]
        parts += [_LINK.sub(on_code_host, prose), code[0] if code else ""]
        end = code.end() if code else end
    return "".join(parts)


def on_page_content(content, *, page, files, **_):
    """Mathematics, documents named by docstrings, and flags of commands."""

    def mathml(match):
        latex = html.unescape(match[2])
        number = _TAG.search(latex)
        try:
            made = _to_mathml.convert_with_local_state(
                _TAG.sub("", latex), displaystyle=match[1] == "div"
            )
        except LatexError as error:
            _LOG.warning("%s: %s in %s", page.file.src_uri, error, latex)
            return match[0]
        if match[1] == "span":
            return f'<span class="unbroken">{made}{match[3]}</span>' if match[3] else made
        # In the search it would be a string of letters. The number stays while a wide one scrolls.
        anchor = f' id="equation-{number[1]}"' if number else ""
        beside = f"<span>({number[1]})</span>" if number else ""
        return f'<div class="math" data-search-exclude{anchor}><div>{made}</div>{beside}</div>'

    def link(match):
        target = files.get_file_from_path(match[1])
        if target is None:
            _LOG.warning("a docstring on %s names %s", page.file.src_uri, match[0])
            return match[0]
        url = get_relative_url(target.url, page.url)
        equations = re.sub(r"\((\d+)\)", rf'<a href="{url}#equation-\1">(\1)</a>', match[2] or "")
        return f'<a href="{url}">docs/{match[1]}</a>{equations}'

    if page.file.src_uri.startswith("reference/"):
        content = _DOCUMENT.sub(link, content)
    # A browser would break lines after the first dash.
    content = _FLAG.sub(r'<span class="unbroken">\g<0></span>', content)
    return _MATH.sub(mathml, content)


def on_post_page(output, *, page, **_):
    """No name's tooltip shows the private module that it comes from."""
    return _PRIVATE.sub("", output) if page.file.src_uri.startswith("reference/") else output
