# SPDX-License-Identifier: Apache-2.0
"""The names, signatures and documents users see; who imports whom; what an import does."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arguments import ARRAY, CHOICES, DIFFERENTIABLE, RIGHT, call
from programs import run

import jaxsoftmax

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "jaxsoftmax_command.py",
    *(
        path
        for folder in ("jaxsoftmax", "bench", "tests", "examples", "docs")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
OUTSIDE = ("jaxsoftmax/training", "jaxsoftmax_command", "bench", "examples", "tests")
# Tests of a private formulation may reach for it.
PRIVATE_IN_TESTS = {"jaxsoftmax._cpu", "jaxsoftmax._row_sums", "jaxsoftmax._head"}
# What the library itself needs beside the standard library.
NEEDED = {"jax", "numpy", "jaxtyping"}
DROP_INS = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": jax.nn.logsumexp,
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": optax.softmax_cross_entropy_with_integer_labels,
}
FUNCTIONS = [n for n in jaxsoftmax.__all__ if inspect.isfunction(getattr(jaxsoftmax, n))]
HEADS = [name for name in FUNCTIONS if name.startswith("linear")]

public = pytest.mark.parametrize("name", FUNCTIONS)
computed = pytest.mark.parametrize("name", [*DIFFERENTIABLE, *CHOICES])
on_logits = pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n not in HEADS])
source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_array(name: str):
    """A right call as a function of its first array, and such an array."""
    x = RIGHT[name][ARRAY[name]]
    x = np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    axis = {"axis": -1} if name == "logsumexp" else {}
    return lambda x: call(name, **{ARRAY[name]: x}, **axis), x


def test_all_is_sorted_and_true():
    names = [
        name
        for name, value in vars(jaxsoftmax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert jaxsoftmax.__all__ == sorted(names)
    assert jaxsoftmax.__version__ == version("jaxsoftmax")
    assert (ROOT / "jaxsoftmax" / "py.typed").is_file()


@public
def test_the_document_is_a_contract(name):
    function = getattr(jaxsoftmax, name)
    document = inspect.getdoc(function) or ""
    sections = ["Args:", "Returns:", "Raises:", "Differentiable in", "Example:"]
    if "log_probs" in name:
        sections[3] = "Every field is differentiable in"
    if name in CHOICES:
        sections[3] = "Not differentiable, in any mode:"
    elif name not in DIFFERENTIABLE:
        del sections[3]
    positions = [document.find(f"\n{section}") for section in sections]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert len(document.partition("\n")[0]) <= 100
    described = re.findall(r"^  \*?(\w+): ", document[positions[0] : positions[1]], re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)
    assert re.search(r"^  (Type|Value)Error: ", document[positions[2] :], re.MULTILINE)
    assert re.search(r"^  >>> .*\n +[^ >]", document[positions[-1] :], re.MULTILINE)
    assert name not in DIFFERENTIABLE or "mode" in document


def test_what_the_readme_calls_the_default_is():
    """In every public function that has the argument."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+)=([^`]+)`\W{1,3}the\s+default", text)
    assert named
    signatures = [inspect.signature(getattr(jaxsoftmax, function)) for function in FUNCTIONS]
    for argument, value in named:
        parameters = [s.parameters[argument] for s in signatures if argument in s.parameters]
        assert {one.default for one in parameters} == {ast.literal_eval(value)}, argument


def _library_modules():
    for info in pkgutil.walk_packages(jaxsoftmax.__path__, "jaxsoftmax."):
        if not info.name.endswith("__main__"):
            yield info.name


@pytest.mark.every
@pytest.mark.parametrize("name", ["jaxsoftmax", *_library_modules()])
def test_examples_in_documents(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    public = (getattr(jaxsoftmax, n) for n in jaxsoftmax.__all__)
    functions = [f for f in public if inspect.isfunction(f) and f.__module__ == name]
    assert result.attempted >= 2 * len(functions)


@pytest.mark.parametrize("name", DROP_INS)
def test_signature_starts_as_the_one_it_replaces(name):
    theirs = list(inspect.signature(DROP_INS[name]).parameters.values())
    ours = list(inspect.signature(getattr(jaxsoftmax, name)).parameters.values())

    def facts(parameters):
        return [(p.name, p.kind, p.default) for p in parameters]

    assert facts(ours[: len(theirs)]) == facts(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def _imports(path: Path) -> list[str]:
    """Every imported module, relative ones in full; a name imported from a package as one too."""
    package = [*path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def _module(path: Path) -> str:
    """Its name below `jaxsoftmax`, such as `_head.layout`."""
    parts = path.relative_to(ROOT / "jaxsoftmax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _order() -> list[str]:
    """The one list of the library's modules, in CONTRIBUTING.md: each imports from those below."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^```text\n(_.*?)^```", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^_[\w.]+", listed, re.MULTILINE)


ORDER = _order()


def _place(name: str) -> int:
    """Of the module that a full name is, or is in."""
    name = name.removeprefix("jaxsoftmax.")
    while name not in ORDER:
        assert name, "in no module of the list"
        name = name.rpartition(".")[0]
    return ORDER.index(name)


@source
def test_imports_point_down(path):
    imports = _imports(path)
    private = [m for m in imports if re.match(r"jaxsoftmax\._(?!_)", m)]
    if relative(path).startswith(OUTSIDE):
        allowed = PRIVATE_IN_TESTS if relative(path).startswith("tests") else set()
        if relative(path) == "bench/formula.py":
            allowed = {"jaxsoftmax._head"}  # the sizes of which it counts the memory
        reached = {".".join(m.split(".")[:2]) for m in private}
        assert reached <= allowed
    elif relative(path).startswith("jaxsoftmax") and path.stem != "__main__":
        if (module := _module(path)) in ORDER:
            assert not [m for m in private if _place(m) <= ORDER.index(module)]
        roots = {m.partition(".")[0] for m in imports}
        assert roots - set(sys.stdlib_module_names) <= NEEDED | {"jaxsoftmax"}
        assert not any(m.startswith(("jax._src", "jaxsoftmax.training")) for m in imports)


def test_every_module_of_the_library_has_its_place():
    """A package's own file needs none while it is empty."""
    inside = [p for p in SOURCES if relative(p).startswith("jaxsoftmax/_") and p.stem != "__main__"]
    inside = [p for p in inside if p.parent != ROOT / "jaxsoftmax" or p.stem != "__init__"]
    assert {_module(p) for p in inside if p.stem != "__init__" or _imports(p)} <= set(ORDER)
    assert set(ORDER) <= {_module(p) for p in inside}
    assert len(ORDER) == len(set(ORDER))


@source
def test_licence_line(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"


IMPORT = """
import sys, warnings
warnings.simplefilter("error")
import jax
before, loaded = dict(jax.config.values), set(sys.modules)
import jaxsoftmax
assert dict(jax.config.values) == before, "the import changes JAX's configuration"
new = set(sys.modules) - loaded
ours = {"jaxsoftmax", "jaxtyping", "numpy", "wadler_lindig", *sys.stdlib_module_names}
# What costs: the import takes 1.04 of JAX's; with `jax.extend`, which imports Pallas, it was 1.08.
costly = {name for name in new - {"jax.ad_checkpoint"} if name.partition(".")[0] not in ours}
assert not costly, costly
assert "jaxsoftmax.training" not in new
jax.config.update("jax_num_cpu_devices", 3)  # JAX refuses this once a backend exists
assert jax.device_count() == 3
"""


def test_an_import_has_no_side_effects():
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": "/tmp"}
    done = run(sys.executable, "-c", IMPORT, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@computed
def test_named_scope_in_the_lowered_program(name):
    f, x = of_array(name)
    text = jax.jit(f).lower(x).as_text(debug_info=True)
    assert re.search(rf"jaxsoftmax\.{name}(?!\w)", text)
    others = set(jaxsoftmax.__all__) - {name}
    assert not any(re.search(rf"jaxsoftmax\.{other}(?!\w)", text) for other in others)


@on_logits
def test_a_policy_keeps_the_row_statistics_by_name(name):
    """(m, r) alone are kept, and the backward pass does not take the sums again.

    m is the row's maximum, or its label's logit. A divergence has those of the target too.
    """
    f, x = of_array(name)

    def kept(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        pullback = jax.vjp(jax.checkpoint(f, policy=policy), x)[1]
        rows = [a for a in jax.tree.leaves(pullback) if getattr(a, "shape", ()) == x.shape[:1]]
        return [np.asarray(row) for row in rows if row.dtype == jnp.float32]

    assert kept("nobody.uses.this") == []
    rows = 2 if "divergence" in name else 1
    own = [m for m in kept("jaxsoftmax.shift") if (m[:, None] == np.asarray(x)).any(-1).all()]
    if "integer_labels" not in name:
        np.testing.assert_array_equal(own, [np.max(x, axis=-1)])
    remainder = np.sum(np.exp(x - own[0][:, None]), axis=-1) - 1
    found = kept("jaxsoftmax.remainder")
    assert [np.allclose(r, remainder, rtol=1e-6, atol=0) for r in found].count(True) == 1
    assert len(kept("jaxsoftmax.shift")) == len(found) == rows
    assert len(kept("jaxsoftmax.shift", "jaxsoftmax.remainder")) == 2 * rows
