"""Norm layout, adaptation state and error tree."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest

from mgg_edge import errors
from mgg_edge.errors import MggEdgeError, StateError
from mgg_edge.norms import NormLayout, NormParameter
from mgg_edge.state import AdaptState, TensorSpec

LAYOUT = NormLayout((NormParameter("a.weight", (3,)), NormParameter("b.weight", (2, 2)), NormParameter("c", ())))
ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, MggEdgeError)]


def arrays() -> dict[str, np.ndarray]:
    return {"a.weight": np.arange(3.0), "b.weight": np.arange(4.0).reshape(2, 2), "c": np.array(9.0)}


class TestNormLayout:
    def test_sizes_and_order(self):
        assert (LAYOUT.size, LAYOUT.sizes, LAYOUT.names) == (8, (3, 4, 1), ("a.weight", "b.weight", "c"))

    def test_flatten_is_row_major_in_layout_order(self):
        assert LAYOUT.flatten(dict(reversed(arrays().items()))).tolist() == [0, 1, 2, 0, 1, 2, 3, 9]

    def test_unflatten_inverts_flatten(self):
        parts = LAYOUT.unflatten(LAYOUT.flatten(arrays()))
        for name, array in arrays().items():
            np.testing.assert_array_equal(parts[name], array)
            assert parts[name].shape == array.shape

    def test_unflatten_gives_views(self):
        theta = np.zeros(8)
        LAYOUT.unflatten(theta)["b.weight"][1, 0] = 5
        assert theta[5] == 5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("c"), "parameter 'c' is missing"),
            (lambda a: a.update(d=np.zeros(1)), "unknown parameter 'd'"),
            (lambda a: a.update(c=np.zeros(1)), r"'c' expected shape \(\), found \(1,\)"),
        ],
    )
    def test_flatten_refuses(self, change, message):
        values = arrays()
        change(values)
        with pytest.raises(StateError, match=message):
            LAYOUT.flatten(values)

    @pytest.mark.parametrize("shape", [(7,), (9,), (8, 1), ()])
    def test_unflatten_refuses_other_shapes(self, shape):
        with pytest.raises(StateError, match=r"theta: expected shape \(8,\), found"):
            LAYOUT.unflatten(np.zeros(shape))

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ((), "at least one parameter"),
            ((NormParameter("a", (1,)), NormParameter("a", (1,))), "'a' appears more than once"),
            ((NormParameter("a", (0,)),), "'a' has an empty shape"),
            ((NormParameter("a", (3, -1)),), "'a' has an empty shape"),
        ],
    )
    def test_layout_refuses(self, parameters, message):
        with pytest.raises(StateError, match=message):
            NormLayout(parameters)


class TestAdaptState:
    def state(self) -> AdaptState:
        return AdaptState({"theta": np.arange(3, dtype=np.float32), "step": np.float32(2).reshape(())})

    def test_arrays_are_read_only_views(self):
        theta = np.zeros(3, np.float32)
        state = AdaptState({"theta": theta})
        assert np.shares_memory(state["theta"], theta)
        with pytest.raises(ValueError, match="read-only"):
            state["theta"][0] = 1
        theta[0] = 1  # the owner may still write

    def test_arrays_become_contiguous(self):
        state = AdaptState({"theta": np.zeros((4, 4), np.float32)[:, 1]})
        assert state["theta"].flags.c_contiguous

    def test_needs_theta(self):
        with pytest.raises(StateError, match=r"expected an array 'theta', found \['m'\]"):
            AdaptState({"m": np.zeros(1)})

    def test_digest_covers_bytes_names_types_and_shapes(self):
        base = {"theta": np.zeros(4, np.float32), "m": np.zeros(4, np.float32)}
        variants = [
            base,
            {**base, "m": np.array([0, 0, 0, 1e-45], np.float32)},
            {**base, "m": np.array([0, 0, 0, -0.0], np.float32)},
            {**base, "m": np.zeros(4, np.int32)},
            {**base, "m": np.zeros((2, 2), np.float32)},
            {"theta": base["theta"], "v": base["m"]},
            {"m": base["m"], "theta": base["theta"]},
        ]
        digests = [AdaptState(variant).digest() for variant in variants]
        assert len(set(digests)) == len(variants)
        assert AdaptState({name: array.copy() for name, array in base.items()}).digest() == digests[0]

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_non_finite_names_the_array(self, value):
        state = AdaptState({"theta": np.zeros(2), "m": np.array([0, value])})
        assert state.non_finite() == "m"
        assert self.state().non_finite() is None

    def test_specs_and_size(self):
        assert self.state().specs == (TensorSpec("theta", "float32", (3,)), TensorSpec("step", "float32", ()))
        assert self.state().size_bytes == 16

    @pytest.mark.parametrize(
        ("specs", "message"),
        [
            ((TensorSpec("theta", "float32", (3,)),), "expected arrays"),
            ((TensorSpec("step", "float32", ()), TensorSpec("theta", "float32", (3,))), "expected arrays"),
            (
                (TensorSpec("theta", "float32", (4,)), TensorSpec("step", "float32", ())),
                r"'theta' expected float32\[4\]",
            ),
            ((TensorSpec("theta", "float64", (3,)), TensorSpec("step", "float32", ())), "'theta' expected float64"),
        ],
        ids=["missing", "order", "shape", "dtype"],
    )
    def test_check(self, specs, message):
        self.state().check(self.state().specs)
        with pytest.raises(StateError, match=message):
            self.state().check(specs)


class TestErrors:
    def test_codes_are_unique(self):
        assert len({kind.code for kind in ERRORS}) == len(ERRORS)

    def test_exit_codes(self):
        special = {kind.__name__: kind.exit_code for kind in ERRORS if kind.exit_code != 1}
        assert special == {"UsageError": 2, "MissingDependencyError": 3, "ParityError": 4}

    def test_the_tree_in_the_docstring_is_the_tree(self):
        listed = dict(re.findall(r"(\w+Error)\s+(?:exit code )?(\d)", errors.__doc__))
        assert listed == {kind.__name__: str(kind.exit_code) for kind in ERRORS}

    def test_every_error_is_exported(self):
        assert sorted(errors.__all__) == sorted(kind.__name__ for kind in ERRORS)

    def test_messages_are_one_line(self):
        assert str(errors.BundleError("a\nb\r\n\tc")) == "a b c"

    def test_messages_hold_no_terminal_escapes(self):
        text = str(errors.BundleError("member '\x1b[2Jx\x07'"))
        assert text.isprintable()
        assert "[2Jx" in text

    def test_long_messages_keep_both_ends(self):
        text = str(errors.BundleError("start " + "x" * 10**6 + " end"))
        assert len(text) <= errors.MAX_MESSAGE_LENGTH
        assert text.startswith("start")
        assert text.endswith("end")


def test_the_core_imports_nothing_heavy():
    code = "import sys, mgg_edge.container, mgg_edge.manifest, mgg_edge.norms, mgg_edge.state; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not modules & {"torch", "onnx", "onnxruntime", "safetensors", "av", "PIL", "typer", "rich"}
