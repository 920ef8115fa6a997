# SPDX-License-Identifier: Apache-2.0
"""Right and wrong values for every argument of every public function: one table of errors."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax

X = np.zeros((8, 16), np.float32)
LABELS = np.zeros(8, np.int32)
SEVERAL = np.zeros((8, 3), np.int32)
MASK = np.ones((8, 16), bool)
WIDE = np.ones((2, 8, 16), np.float32)
COMPLEX = X.astype(np.complex64)
KEY = jax.random.key(0)
HIDDEN, KERNEL = np.zeros((8, 4), np.float32), np.zeros((4, 16), np.float32)
WEIGHTS, BIAS = np.ones(8, np.float32), np.zeros(16, np.float32)
BIG = 2**70
INT32 = f"must fit int32 as a Python integer; got {BIG}"


def squared(logits, *targets):
    return jnp.sum(logits**2, axis=-1) + sum(targets)


_two_logits = {"logits": X, "target_logits": X}
_two_heads = {
    "hidden": HIDDEN,
    "kernel": KERNEL,
    "target_hidden": HIDDEN[:, :3],
    "target_kernel": KERNEL[:3],
}

# What each function needs at least, by name.
RIGHT: dict[str, dict[str, Any]] = {
    "softmax": {"x": X},
    "log_softmax": {"x": X},
    "logsumexp": {"a": X},
    "softmax_jacobian": {"x": X},
    "softmax_cross_entropy": {"logits": X, "labels": X},
    "softmax_cross_entropy_with_integer_labels": {"logits": X, "labels": LABELS},
    "label_log_probs": {"logits": X, "labels": LABELS},
    "softmax_kl_divergence": _two_logits,
    "softmax_js_divergence": _two_logits,
    "linear_loss": {
        "loss_fn": squared,
        "hidden": HIDDEN,
        "kernel": KERNEL,
        "token_args": (WEIGHTS,),
    },
    "linear_softmax_cross_entropy": {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS},
    "linear_log_probs": {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS},
    "linear_kl_divergence": _two_heads,
    "linear_js_divergence": _two_heads,
    "linear_top_k": {"hidden": HIDDEN, "kernel": KERNEL, "k": 3},
    "linear_sample": {"key": KEY, "hidden": HIDDEN, "kernel": KERNEL},
    "check_labels": {"labels": LABELS, "num_classes": 16},
}
# Those whose results are class numbers have no derivative.
CHOICES = ("linear_top_k", "linear_sample")
DIFFERENTIABLE = [name for name in RIGHT if name not in {*CHOICES, "check_labels"}]
# The first of its arrays.
ARRAY = {
    name: next(a for a in ("x", "a", "logits", "hidden", "labels") if a in least)
    for name, least in RIGHT.items()
}
INTEGER = "softmax_cross_entropy_with_integer_labels"
HEAD = "linear_softmax_cross_entropy"

_transform = {"soft_cap": 30.0, "temperature": np.float32(2)}
_losses = {"axis_name": None, "label_smoothing": 0.1, "z_loss": 1e-4, **_transform}
_classes = {"ignore_index": -100, "class_weights": BIAS + 1}
_head = {"axis_name": None, "bias": BIAS, "chunk_size": 5, "precision": "highest"}
_embedding = {"kernel": KERNEL.T, "transpose_kernel": True, "compute_dtype": "bfloat16"}
_reduced = {"weights": WEIGHTS, "reduction": "mean", "denominator": 8}
_target = {"target_bias": BIAS, "target_soft_cap": 20.0, "where": MASK[:, 0]}

# Every other argument, rightly: changes to the above, each a call.
MORE_RIGHT: dict[str, list[dict[str, Any]]] = {
    "softmax": [{"axis": 0, "where": MASK}, {"axis": None}, {"axis": (1, 0), "where": MASK[:1]}],
    "log_softmax": [{"axis": -2, "where": MASK[:, :1]}, {"axis": [0]}, {"x": 1, "axis": ()}],
    "logsumexp": [
        {"axis": (0, 1), "b": BIAS, "keepdims": True, "return_sign": True, "where": MASK},
        {"a": X[:, 0], "b": X[:, :1]},
    ],
    "softmax_jacobian": [
        {"x": X[:, :0]},
        {"x": X.astype(np.float16), "axis": 0},
        {"x": WIDE, "axis": 1},
    ],
    "softmax_cross_entropy": [
        {"axis": (0, 1), "where": MASK, **_losses},
        {"labels": BIAS, "where": MASK[:, 0]},
        {"logits": X[:, :0], "labels": np.float32(0)},
        {"logits": jnp.zeros((8, 16), jnp.bfloat16), "labels": MASK, "axis": None},
    ],
    INTEGER: [
        {"axis": 1, "where": MASK[:, 0], **_losses, **_classes},
        {"axis": (1, 0), "labels": 5, "where": MASK},
        {"labels": LABELS.astype(np.uint8), "class_weights": np.arange(16)},
    ],
    "label_log_probs": [
        {"axis": -1, "with_entropy": True, "axis_name": None, **_transform},
        {"labels": SEVERAL, "with_predictions": True},
    ],
    "softmax_kl_divergence": [
        {"axis": (0, 1), "where": MASK, "axis_name": None, **_transform},
        {"axis": 0, "where": MASK[:1], "target_logits": jnp.zeros((8, 16), jnp.bfloat16)},
    ],
    "softmax_js_divergence": [
        {"axis": [1], "where": MASK, "axis_name": None, "weight": np.float32(0.3), **_transform}
    ],
    "linear_loss": [
        {**_head, **_reduced},
        {"token_args": (), "reduction": None},
        {"hidden": WIDE[..., :4], "token_args": (WIDE[..., 0], WIDE[..., 1])},
        {"hidden": HIDDEN[0], "token_args": (1.0,)},
        _embedding,
    ],
    "linear_softmax_cross_entropy": [
        {**_head, **_reduced, **_losses, **_classes, "gradients": "recompute"},
        {"reduction": "sum", "gradients": "in_forward", "weights": MASK[:, 0]},
        {"hidden": HIDDEN.reshape(2, 4, 4), "labels": LABELS.reshape(2, 4), "reduction": None},
        {**_embedding, "compute_dtype": np.float16, "transpose_kernel": True},
    ],
    "linear_log_probs": [
        {**_head, **_transform, "with_entropy": True},
        {"labels": SEVERAL, "with_predictions": True, "where": MASK[:, 0]},
        {**_embedding, "compute_dtype": jnp.dtype(jnp.bfloat16)},
    ],
    "linear_kl_divergence": [
        {**_head, **_reduced, **_transform, **_target},
        {
            "reduction": None,
            "hidden": HIDDEN.astype(np.float16),
            "kernel": KERNEL.astype(np.float16),
        },
        {**_embedding, "target_kernel": KERNEL[:3].T},
    ],
    "linear_js_divergence": [
        {**_head, **_reduced, **_transform, **_target, "weight": np.float32(0.3)},
        {**_embedding, "target_kernel": KERNEL[:3].T},
    ],
    "linear_top_k": [{**_head, **_transform, "k": 16}, _embedding],
    "linear_sample": [
        {**_head, **_transform, "top_k": 16},
        {**_embedding, "key": jax.random.PRNGKey(0), "top_k": 1},
        {"key": jax.random.key(0, impl="rbg"), "top_k": None},
    ],
    "check_labels": [{"labels": LABELS - 100, "ignore_index": -100}, {"labels": 3}],
}


def call(name: str, **changes: Any) -> Any:
    """The function with right arguments, `changes` apart."""
    arguments = RIGHT[name] | changes
    first = [arguments.pop(n) for n in ("loss_fn", "hidden", "kernel") if name == "linear_loss"]
    return getattr(jaxsoftmax, name)(*first, *arguments.pop("token_args", ()), **arguments)


class Wrong(NamedTuple):
    """A call with one wrong argument, its error, and the text that follows the function's name."""

    argument: str
    value: Any
    error: type[Exception]
    message: str
    others: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _array(name: str, *, optional: bool = False) -> Iterator[Wrong]:
    """Nothing that is no array."""
    said = f"{name} must be an array or a scalar; got"
    yield Wrong(name, [1.0, 2.0], TypeError, f"{said} list [1.0, 2.0]")
    yield Wrong(name, (1.0, 2.0), TypeError, f"{said} tuple (1.0, 2.0)")
    yield Wrong(name, "text", TypeError, f"{said} str 'text'")
    yield Wrong(name, {"a": 1}, TypeError, f"{said} dict {{'a': 1}}")
    yield Wrong(name, np.array(["a"]), TypeError, f"{said} ndarray <U1[1]")
    yield Wrong(name, np.ma.masked_array(X), TypeError, f"{said} MaskedArray float32[8,16]")
    if not optional:
        yield Wrong(name, None, TypeError, f"{said} NoneType None")


def _integer_of_any_size(name: str) -> Iterator[Wrong]:
    yield Wrong(name, BIG, ValueError, f"{name} {INT32}")


def _floating(name: str, *, optional: bool = False) -> Iterator[Wrong]:
    yield from _array(name, optional=optional)
    yield from _integer_of_any_size(name)
    said = f"{name} must have a real floating-point dtype; got"
    yield Wrong(name, LABELS, TypeError, f"{said} int32")
    yield Wrong(name, MASK, TypeError, f"{said} bool")
    yield Wrong(name, COMPLEX, TypeError, f"{said} complex64")
    yield Wrong(name, KEY, TypeError, f"{said} key<fry>")


def _real(name: str, *, optional: bool = False) -> Iterator[Wrong]:
    yield from _number(name, optional=optional)
    yield from _integer_of_any_size(name)


def _number(name: str, *, optional: bool) -> Iterator[Wrong]:
    yield from _array(name, optional=optional)
    yield Wrong(name, COMPLEX, TypeError, f"{name} must have a real dtype; got complex64")
    yield Wrong(name, KEY, TypeError, f"{name} must have a real dtype; got key<fry>")


def _scalar(name: str, *, optional: bool = True) -> Iterator[Wrong]:
    yield from _number(name, optional=optional)
    yield Wrong(name, True, TypeError, f"{name} must be a real number; got True")
    yield Wrong(name, np.array(False), TypeError, f"{name} must be a real number; got bool[]")
    yield Wrong(name, BIAS, ValueError, f"{name} must be a scalar; got shape (16,)")


def _in_range(name: str, expected: str, *values: float, optional=False) -> Iterator[Wrong]:
    yield from _scalar(name, optional=optional)
    for value in (*values, 10**400):  # more than any float
        yield Wrong(name, value, ValueError, f"{name} must be {expected}; got {value}")
    array = jnp.asarray(values[0], jnp.float32)
    yield Wrong(name, array, ValueError, f"{name} must be {expected}; got {array}")


def _transforms() -> Iterator[Wrong]:
    # 1e-60 and 1e60 are 0 and infinity in float32, where they are used.
    values = (0, -2, -0.5, 1e-60, 1e60, np.inf, np.nan)
    yield from _in_range("soft_cap", "positive and finite", *values, optional=True)
    yield from _in_range("temperature", "positive and finite", *values)


def _options() -> Iterator[Wrong]:
    yield from _transforms()
    yield from _in_range("label_smoothing", "in [0, 1]", -0.5, 1.5, 2, np.inf, np.nan)
    yield from _in_range("z_loss", "at least 0 and finite", -1.0, -1, 1e60, np.inf, np.nan)


def _flag(name: str) -> Iterator[Wrong]:
    said = f"{name} must be True or False; got"
    yield Wrong(name, 1, TypeError, f"{said} int 1")
    yield Wrong(name, "yes", TypeError, f"{said} str 'yes'")
    yield Wrong(name, None, TypeError, f"{said} NoneType None")
    yield Wrong(name, jnp.array(True), TypeError, f"{said} ArrayImpl bool[]")


def _count(name: str, *, optional: bool = False) -> Iterator[Wrong]:
    said = f"{name} must be an integer; got"
    yield Wrong(name, 2.0, TypeError, f"{said} float 2.0")
    yield Wrong(name, "8", TypeError, f"{said} str '8'")
    yield Wrong(name, True, TypeError, f"{said} bool True")
    yield Wrong(name, jnp.array(8), TypeError, f"{said} ArrayImpl int32[]")
    for value in (0, -1):
        yield Wrong(name, value, ValueError, f"{name} must be at least 1; got {value}")
    if not optional:
        yield Wrong(name, None, TypeError, f"{said} NoneType None")


def _axis(allowed: str) -> Iterator[Wrong]:
    said = f"axis must be {allowed}; got"
    yield Wrong("axis", 1.5, TypeError, f"{said} float 1.5")
    yield Wrong("axis", "a", TypeError, f"{said} str 'a'")
    yield Wrong("axis", True, TypeError, f"{said} bool True")
    yield Wrong("axis", np.bool_(True), TypeError, f"{said} bool bool[]")
    yield Wrong("axis", np.array(1), TypeError, f"{said} ndarray int64[]")
    reach = "axis must be in [-2, 2) for an array with 2 axes; got"
    yield Wrong("axis", 2, ValueError, f"{reach} 2")
    yield Wrong("axis", -3, ValueError, f"{reach} -3")
    if "None" not in allowed:
        yield Wrong("axis", None, TypeError, f"{said} NoneType None")
    if "tuple" not in allowed:
        yield Wrong("axis", (0, 1), TypeError, f"{said} tuple (0, 1)")
        return
    yield Wrong("axis", (0, 1.5), TypeError, f"{said} float 1.5")
    yield Wrong("axis", (0, 5), ValueError, f"{reach} 5")
    yield Wrong("axis", (0, -2), ValueError, "axis must name distinct axes; got (0, -2)")
    yield Wrong("axis", [1, 1], ValueError, "axis must name distinct axes; got (1, 1)")


_SOME = "an integer or a tuple of integers"
_ANY = "an integer, a tuple of integers or None"


def _class_axis_of(name: str, **others: Any) -> Iterator[Wrong]:
    """There is a class axis."""
    said = "axis must be in [0, 0) for an array with 0 axes; got -1"
    yield Wrong(name, np.float32(1), ValueError, said, others)


def _classes_of(name: str, **others: Any) -> Iterator[Wrong]:
    """A class axis there is, with a class."""
    yield from _class_axis_of(name, **others)
    said = f"{name} must have at least one class along axis"
    yield Wrong(name, X[:, :0], ValueError, f"{said} 1; got shape (8, 0)", others)
    both = {"axis": (1, 0), **others}
    yield Wrong(name, X[:, :0], ValueError, f"{said} (1, 0); got shape (8, 0)", both)


def _mask(name: str) -> Iterator[Wrong]:
    """The mask of an array called `name`."""
    yield from _array("where", optional=True)
    yield from _integer_of_any_size("where")
    for value in (X, LABELS):
        yield Wrong("where", value, TypeError, f"where must have dtype bool; got {value.dtype}")
    said = f"where must broadcast to (8, 16), the shape of {name}; got"
    yield Wrong("where", MASK[:3], ValueError, f"{said} (3, 16)")
    yield Wrong("where", MASK.T, ValueError, f"{said} (16, 8)")
    if name != "logits":
        yield Wrong("where", WIDE > 0, ValueError, f"{said} (2, 8, 16)")


def _token_mask() -> Iterator[Wrong]:
    """The mask of tokens."""
    yield from _array("where", optional=True)
    yield from _integer_of_any_size("where")
    for value in (BIAS[:8], LABELS):
        yield Wrong("where", value, TypeError, f"where must have dtype bool; got {value.dtype}")
    said = "where must have shape (8,), the tokens of hidden; got"
    for value in (MASK, MASK[0], True):
        yield Wrong("where", value, ValueError, f"{said} {np.shape(value)}")


def _loss_mask() -> Iterator[Wrong]:
    """The mask of a loss has the axes of the logits, or one value per example."""
    yield from _mask("logits")
    said = "where must have shape (8,), one value per example, or have the 2 axes of logits; got"
    yield Wrong("where", MASK[0], ValueError, f"{said} (16,)")
    yield Wrong("where", True, ValueError, f"{said} ()")
    yield Wrong("where", WIDE > 0, ValueError, f"{said} (2, 8, 16)")


def _token_labels(meaning: str, *, several: bool = False) -> Iterator[Wrong]:
    yield from _array("labels")
    yield from _integer_of_any_size("labels")
    said = "labels must have an integer dtype; got"
    yield Wrong("labels", WEIGHTS, TypeError, f"{said} float32")
    yield Wrong("labels", LABELS > 0, TypeError, f"{said} bool")
    yield Wrong("labels", COMPLEX, TypeError, f"{said} complex64")
    yield Wrong("labels", KEY, TypeError, f"{said} key<fry>")
    more = ", or (8, K) for K labels each" if several else ""
    said = f"labels must have shape (8,), {meaning}{more}; got"
    column = LABELS[:3, None] if several else LABELS[:, None]
    for value in (LABELS[:3], column, np.int32(0), WIDE.astype(int)):
        yield Wrong("labels", value, ValueError, f"{said} {value.shape}")


def _ignore_index() -> Iterator[Wrong]:
    said = "ignore_index must be an integer or None; got"
    yield Wrong("ignore_index", 1.0, TypeError, f"{said} float 1.0")
    yield Wrong("ignore_index", True, TypeError, f"{said} bool True")
    yield Wrong("ignore_index", np.bool_(True), TypeError, f"{said} bool bool[]")
    yield Wrong("ignore_index", "pad", TypeError, f"{said} str 'pad'")
    yield Wrong("ignore_index", jnp.array(0), TypeError, f"{said} ArrayImpl int32[]")


def _class_weights() -> Iterator[Wrong]:
    yield from _real("class_weights", optional=True)
    said = "class_weights must have shape (16,), one weight per class; got"
    for value in (WEIGHTS, X, np.float32(1)):
        yield Wrong("class_weights", value, ValueError, f"{said} {np.shape(value)}")


def _integer_logits(*, several: bool = False) -> Iterator[Wrong]:
    """Logits with integer labels, or with several for each row."""
    yield from _floating("logits")
    yield from _classes_of("logits")
    yield from _axis(_SOME)
    yield from _token_labels("the shape of logits without axis -1", several=several)
    said = "labels must have shape"
    wrong = ((0, "(16,)", "(16, K)"), ((0, 1), "()", "(K,)"), ([1], "(8,)", "(8, K)"))
    labels = LABELS[:, None, None] if several else LABELS[:, None]
    for axis, shape, more in wrong:
        expected = f"{said} {shape}, the shape of logits without axis {axis}"
        expected += f", or {more} for K labels each" if several else ""
        expected += f"; got {labels.shape}"
        yield Wrong("labels", labels, ValueError, expected, {"axis": axis})
    more = ", or (2, 8, K) for K labels each" if several else ""
    expected = f"{said} (2, 8), the shape of logits without axis -1{more}; got (8,)"
    yield Wrong("logits", WIDE, ValueError, expected)


def _linear() -> Iterator[Wrong]:
    """The head itself."""
    yield from _floating("hidden")
    said = "hidden must have shape [*tokens, H]; got a scalar"
    yield Wrong("hidden", np.float32(1), ValueError, said)
    yield from _floating("kernel")
    said = "kernel must have shape (4, V), with H = 4 the last axis of hidden; got"
    for value in (KERNEL.T, BIAS, KERNEL[None], np.float32(1)):
        yield Wrong("kernel", value, ValueError, f"{said} {np.shape(value)}")
    expected = "kernel must have shape (3, V), with H = 3 the last axis of hidden; got (4, 16)"
    yield Wrong("hidden", HIDDEN[:, :3], ValueError, expected)
    expected = "kernel must have at least one class along axis 1; got shape (4, 0)"
    yield Wrong("kernel", KERNEL[:, :0], ValueError, expected)
    yield from _flag("transpose_kernel")
    transposed = {"transpose_kernel": True}
    expected = "kernel must have shape (V, 4), as it is transposed, with H = 4 the last axis of"
    said = f"{expected} hidden; got"
    for value in (KERNEL, BIAS, KERNEL.T[None], np.float32(1)):
        yield Wrong("kernel", value, ValueError, f"{said} {np.shape(value)}", transposed)
    expected = "kernel must have at least one class along axis 0; got shape (0, 4)"
    yield Wrong("kernel", KERNEL.T[:0], ValueError, expected, transposed)
    said = "bias must have shape (16,), one number for each of the 16 classes of kernel; got (4,)"
    yield Wrong("bias", BIAS[:4], ValueError, said, transposed | {"kernel": KERNEL.T})
    yield from _floating("bias", optional=True)
    said = "bias must have shape (16,), one number for each of the 16 classes of kernel; got"
    for value in (WEIGHTS, X, np.float32(1)):
        yield Wrong("bias", value, ValueError, f"{said} {np.shape(value)}")
    yield from _count("chunk_size", optional=True)
    said = "precision must be as in jax.lax.dot_general; got"
    for value, came in (("best", "str 'best'"), (3, "int 3"), (X, "ndarray float32[8,16]")):
        yield Wrong("precision", value, ValueError, f"{said} {came}")
    yield from _compute_dtype()


def _compute_dtype() -> Iterator[Wrong]:
    said = "compute_dtype must be a dtype; got"
    for value, came in (("best", "str 'best'"), (8, "int 8"), (X, "ndarray float32[8,16]")):
        yield Wrong("compute_dtype", value, TypeError, f"{said} {came}")
    said = "compute_dtype must be a real floating-point dtype of at least 16 bits; got"
    for value in ("int32", bool, np.complex64, jnp.float8_e4m3fn, jnp.float4_e2m1fn):
        yield Wrong("compute_dtype", value, TypeError, f"{said} {jnp.dtype(value)}")
    for value in ("float64", float):  # Python's, as NumPy has it
        expected = "compute_dtype float64 needs jax_enable_x64"
        yield Wrong("compute_dtype", value, ValueError, expected)


def _target_head() -> Iterator[Wrong]:
    """The head that a divergence is measured from, of width 3."""
    yield from _floating("target_hidden")
    said = "target_hidden must have shape [*tokens, H]; got a scalar"
    yield Wrong("target_hidden", np.float32(1), ValueError, said)
    said = "the tokens of target_hidden must have shape (8,), those of hidden; got"
    for value in (HIDDEN[:3, :3], WIDE[..., :3]):
        yield Wrong("target_hidden", value, ValueError, f"{said} {value.shape[:-1]}")
    yield from _floating("target_kernel")
    said = "target_kernel must have shape (3, V), with H = 3 the last axis of target_hidden; got"
    for value in (KERNEL, BIAS, KERNEL[None], np.float32(1)):
        yield Wrong("target_kernel", value, ValueError, f"{said} {np.shape(value)}")
    expected = "target_kernel must have at least one class along axis 1; got shape (3, 0)"
    yield Wrong("target_kernel", KERNEL[:3, :0], ValueError, expected)
    expected = "the classes of target_kernel must have shape (16,), as kernel; got (15,)"
    yield Wrong("target_kernel", KERNEL[:3, 1:], ValueError, expected)
    transposed = {"transpose_kernel": True, "kernel": KERNEL.T}
    expected = "target_kernel must have shape (V, 3), as it is transposed, with H = 3 the last axis"
    expected = f"{expected} of target_hidden; got (3, 16)"
    yield Wrong("target_kernel", KERNEL[:3], ValueError, expected, transposed)
    yield from _floating("target_bias", optional=True)
    said = "target_bias must have shape (16,), one number for each of the 16 classes of"
    for value in (WEIGHTS, X, np.float32(1)):
        expected = f"{said} target_kernel; got {np.shape(value)}"
        yield Wrong("target_bias", value, ValueError, expected)
    values = (0, -2, 1e-60, np.inf, np.nan)
    yield from _in_range("target_soft_cap", "positive and finite", *values, optional=True)


def _reduction() -> Iterator[Wrong]:
    yield from _real("weights", optional=True)
    said = "weights must have shape (8,), the tokens of hidden; got"
    for value in (WEIGHTS[:3], WEIGHTS[:, None], np.float32(1)):
        yield Wrong("weights", value, ValueError, f"{said} {np.shape(value)}")
    said = "reduction must be one of 'mean', 'sum', None; got"
    for value, came in (
        ("avg", "'avg'"),
        ("none", "'none', a string in place of None itself"),
        (1, "1"),
        (False, "False"),
        (X, "float32[8,16]"),
    ):
        yield Wrong("reduction", value, ValueError, f"{said} {came}")
    yield from _scalar("denominator")
    for reduction in ("sum", None):
        expected = f'denominator needs reduction="mean"; got reduction={reduction!r}'
        yield Wrong("denominator", 2.0, ValueError, expected, {"reduction": reduction})


def _loss_fn() -> Iterator[Wrong]:
    yield Wrong("loss_fn", 3, TypeError, "loss_fn must be callable; got int 3")
    none = {"hidden": HIDDEN[:0], "token_args": (WEIGHTS[:0],)}
    yield Wrong("loss_fn", None, TypeError, "loss_fn must be callable; got NoneType None", none)
    said = "loss_fn must return one loss a token, shape (8,) for logits (8, 16); got"
    yield Wrong("loss_fn", lambda z, y: z.sum(), ValueError, f"{said} float32[]")
    yield Wrong("loss_fn", lambda z, y: z, ValueError, f"{said} float32[8,16]")
    yield Wrong("loss_fn", lambda z, y: None, ValueError, f"{said} None")
    said = "loss_fn must return one loss a token, shape (3,) for logits (3, 16); got"
    yield Wrong("loss_fn", lambda z, y: 1.0, ValueError, f"{said} float32[]", {"chunk_size": 3})
    said = "loss_fn must return a floating dtype; got"
    yield Wrong("loss_fn", lambda z, y: z.argmax(-1), TypeError, f"{said} int32")


def _token_args() -> Iterator[Wrong]:
    for wrong in _array("token_args[1]"):
        yield wrong._replace(argument="token_args", value=(WEIGHTS, wrong.value))
    said = "the first axes of token_args[0] must have shape (8,), the tokens of hidden; got"
    for value in (WEIGHTS[:3], np.float32(1), X.T):
        expected = f"{said} {np.shape(value)[:1]}"
        yield Wrong("token_args", (value,), ValueError, expected)


def _check_labels() -> Iterator[Wrong]:
    # A NumPy array stays one, whatever JAX would make of it.
    yield from (
        wrong for wrong in _array("labels") if not isinstance(wrong.value, int | np.ndarray)
    )
    yield Wrong("labels", np.array(["a"]), TypeError, "labels must have an integer dtype; got <U1")
    expected = "labels must be in [0, 16); got 1 that are not, the first"
    yield Wrong("labels", 2**40, ValueError, f"{expected} {2**40} at index ()")
    yield Wrong("labels", WEIGHTS, TypeError, "labels must have an integer dtype; got float32")
    yield Wrong("labels", True, TypeError, "labels must have an integer dtype; got bool")
    expected = "labels must be in [0, 16); got 2 that are not, the first -1 at index (0, 1)"
    yield Wrong("labels", np.array([[0, -1], [16, 15]]), ValueError, expected)
    expected = "labels must be in [0, 16) or be -1; got 1 that are not, the first 16 at index (2,)"
    yield Wrong("labels", np.array([0, -1, 16]), ValueError, expected, {"ignore_index": -1})
    yield from _count("num_classes")
    yield from _ignore_index()


def _weighted() -> Iterator[Wrong]:
    """What `logsumexp` takes besides."""
    yield from _real("b", optional=True)
    said = "b must have a shape that broadcasts with (8, 16), the shape of a; got"
    yield Wrong("b", X[:3], ValueError, f"{said} (3, 16)")
    yield from _flag("keepdims")
    yield from _flag("return_sign")


def _jacobian() -> Iterator[Wrong]:
    yield from _real("x")
    yield from _axis("an integer")


def _dense() -> Iterator[Wrong]:
    """Logits with a target for each class."""
    yield from _floating("logits")
    yield from _class_axis_of("logits", labels=np.float32(0))
    yield from _axis(_ANY)
    yield from _real("labels")
    said = "labels must broadcast to (8, 16), the shape of logits; got"
    for value in (X[:3], X.T, WIDE, X[:0]):
        yield Wrong("labels", value, ValueError, f"{said} {value.shape}")


def _divergence() -> Iterator[Wrong]:
    """Two logits."""
    yield from _floating("logits")
    yield from _class_axis_of("logits", target_logits=np.float32(0))
    yield from _floating("target_logits")
    said = "target_logits must have shape (8, 16), the shape of logits; got"
    for value in (X[:3], X[:1], BIAS, X.T, WIDE, np.float32(1)):
        yield Wrong("target_logits", value, ValueError, f"{said} {np.shape(value)}")
    yield from _axis(_ANY)
    yield from _mask("logits")
    for value in (MASK[:, 0], WIDE > 0):
        expected = f"where must broadcast to (8, 16), the shape of logits; got {value.shape}"
        yield Wrong("where", value, ValueError, expected)
    yield from _transforms()
    yield from _axis_name()


def _weight() -> Iterator[Wrong]:
    yield from _in_range("weight", "between 0 and 1, and neither", 0, 1, -0.5, np.inf, np.nan)


def _gradients() -> Iterator[Wrong]:
    said = "gradients must be one of 'auto', 'in_forward', 'recompute'; got"
    for value, came in (("fast", "'fast'"), (None, "None"), (X, "float32[8,16]")):
        yield Wrong("gradients", value, ValueError, f"{said} {came}")
    expected = 'gradients="in_forward" needs reduction "mean" or "sum"; got None'
    yield Wrong("gradients", "in_forward", ValueError, expected, {"reduction": None})


def _axis_name() -> Iterator[Wrong]:
    said = "axis_name must be the name of a mesh axis, a tuple of such, or None; got"
    for value, came in (
        (3, "int 3"),
        (["v"], "list ['v']"),
        ((), "tuple ()"),
        (X, "ndarray float32[8,16]"),
    ):
        yield Wrong("axis_name", value, TypeError, f"{said} {came}")
    said = (
        "axis_name must name axes that an enclosing shard_map makes manual, here (), each once; got"
    )
    for value in ("vocab", ("data", "vocab")):
        yield Wrong("axis_name", value, ValueError, f"{said} {value!r}")


def _number_of_classes(name: str, *, optional: bool = False) -> Iterator[Wrong]:
    yield from _count(name, optional=optional)
    expected = f"{name} must be at most the number of classes, 16; got 17"
    yield Wrong(name, 17, ValueError, expected)


def _key() -> Iterator[Wrong]:
    yield from _array("key")
    yield from _integer_of_any_size("key")
    said = "key must be a key of jax.random; got"
    for value, came in ((0, "int32[]"), (X, "float32[8,16]"), (LABELS, "int32[8]")):
        yield Wrong("key", value, TypeError, f"{said} {came}")
    said = "key must be one key; got"
    yield Wrong("key", jax.random.split(KEY), ValueError, f"{said} key<fry>[2]")
    yield Wrong("key", np.zeros((3, 2), np.uint32), ValueError, f"{said} uint32[3,2]")
    yield Wrong("key", np.uint32(7), ValueError, f"{said} uint32[]")
    yield Wrong("key", np.zeros(3, np.uint32), ValueError, f"{said} uint32[3]")


_of_tokens = list(_token_labels("the tokens of hidden"))
_of_log_probs = [*_transforms(), *_flag("with_entropy"), *_flag("with_predictions"), *_axis_name()]
_of_classes = [*_ignore_index(), *_class_weights()]
_of_head = [*_linear(), *_of_tokens]
_of_two_heads = [
    *(*_linear(), *_target_head(), *_reduction()),
    *(*_token_mask(), *_transforms(), *_axis_name()),
]

WRONG: dict[str, list[Wrong]] = {
    "softmax": [*_real("x"), *_axis(_ANY), *_mask("x"), *_class_axis_of("x")],
    "log_softmax": [*_real("x"), *_axis(_ANY), *_mask("x"), *_class_axis_of("x")],
    "logsumexp": [*_real("a"), *_axis(_ANY), *_mask("a"), *_weighted()],
    "softmax_jacobian": [*_jacobian()],
    "softmax_cross_entropy": [*_dense(), *_loss_mask(), *_options(), *_axis_name()],
    INTEGER: [*_integer_logits(), *_loss_mask(), *_options(), *_of_classes, *_axis_name()],
    "label_log_probs": [*_integer_logits(several=True), *_of_log_probs],
    "linear_loss": [*_linear(), *_reduction(), *_loss_fn(), *_token_args(), *_axis_name()],
    HEAD: [*_of_head, *_reduction(), *_options(), *_of_classes, *_gradients(), *_axis_name()],
    "linear_log_probs": [
        *_linear(),
        *_token_labels("the tokens of hidden", several=True),
        *_token_mask(),
        *_of_log_probs,
    ],
    "softmax_kl_divergence": [*_divergence()],
    "softmax_js_divergence": [*_divergence(), *_weight()],
    "linear_kl_divergence": _of_two_heads,
    "linear_js_divergence": [*_of_two_heads, *_weight()],
    "linear_top_k": [*_linear(), *_transforms(), *_number_of_classes("k"), *_axis_name()],
    "linear_sample": [
        *_linear(),
        *_transforms(),
        *_number_of_classes("top_k", optional=True),
        *_key(),
        *_axis_name(),
    ],
    "check_labels": [*_check_labels()],
}
