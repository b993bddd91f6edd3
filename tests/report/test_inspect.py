"""`nalora inspect`: numbers against a direct float64 computation."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.report.inspect import (
    batches_of_texts,
    layer_summary,
    responsive_share,
    save_picture,
)
from tests import tiny

CUTS = (-1.2785, 0.0, 4.485)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu_sums(z, dz):
    """The statistics of pre-activations ``[tokens, L, C]``, as the blocks sum them, by their
    definitions."""
    rho = sigmoid(z)
    slope = np.abs(rho * (1 + z * (1 - rho)))
    region = np.stack([np.digitize(z, CUTS) == k for k in range(4)], -2)
    tokens = np.full(z.shape[1], float(len(z)))
    return {
        "tokens": tokens,
        "slope": slope.sum(0),
        "occupancy": region.sum(0).astype(float),
        "probe_tokens": tokens,
        "feature": np.abs(rho * dz).sum(0),
        "selection": np.abs((sigmoid(z + dz) - rho) * (z + dz)).sum(0),
        "linear": np.abs(z * rho * (1 - rho) * dz).sum(0),
    }


@pytest.fixture
def sums():
    rng = np.random.default_rng(0)
    z = rng.normal(-0.3, 1.5, (400, 3, 16)) * np.linspace(0.2, 3, 16)
    return silu_sums(z, 0.3 * rng.standard_normal(z.shape))


@pytest.mark.parametrize("experts", [1, 2])
def test_means_per_layer(sums, experts):
    """Also of two experts, the second without tokens."""
    routed = {name: np.stack([value, 0 * value], 1) for name, value in sums.items()}
    summary = layer_summary(sums if experts == 1 else routed)
    np.testing.assert_allclose(summary.slope, (sums["slope"] / 400).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(summary.occupancy, (sums["occupancy"] / 400).mean(-1), rtol=1e-12)
    np.testing.assert_allclose(summary.occupancy.sum(1), 1.0, rtol=1e-12)
    for name, value in (("selection", summary.misalignment), ("linear", summary.limit)):
        np.testing.assert_allclose(value, sums[name].sum(1) / sums["feature"].sum(1), rtol=1e-12)


def test_a_share_is_relative_to_the_layer_and_weighs_experts_by_their_tokens():
    slope = np.array(
        [[[1.0, 3.0, 4.0, 8.0], [1.0, 1.0, 1.0, 1.0]]]
    )  # means over 10 and over 30 tokens
    tokens = np.array([[10.0, 30.0]])
    # Expert 0: mean slope 4, three of four channels reach 2; channel 0 does not. Expert 1: all
    # reach half of 1.
    np.testing.assert_allclose(
        responsive_share(slope * tokens[..., None], tokens), [(0.75 * 10 + 1.0 * 30) / 40]
    )
    at_half = np.array([[[2.0, 6.0]]])  # a channel at exactly half of the mean responds
    np.testing.assert_allclose(responsive_share(at_half, np.array([[1.0]])), [1.0])
    np.testing.assert_allclose(responsive_share(1e-9 * slope[:, :1], np.array([[10.0]])), [0.75])


def test_layers_that_no_adapter_moves_take_the_limit_of_the_probe(sums):
    still = sums | {
        name: sums[name] * [[1.0], [0.0], [1.0]] for name in ("feature", "selection", "linear")
    }
    alone, probed = layer_summary(still), layer_summary(still, sums)
    for values in (alone.misalignment, alone.limit, probed.misalignment):
        np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    np.testing.assert_allclose(probed.limit, layer_summary(sums).limit, rtol=1e-12)


def test_the_picture_is_what_its_suffix_says(tmp_path, sums):
    path = save_picture(layer_summary(sums), tmp_path / "sub" / "a.svg", "gates")
    assert path.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gates.jpg",
            "--picture: expected a name that ends in .png, .svg or .pdf, found .*gates.jpg",
        ),
        ("file/gates.svg", "--picture: expected a file that can be written, found .*File exists"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused(tmp_path, sums, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(NaloraError, match=message):
        save_picture(layer_summary(sums), tmp_path / name)


def test_texts_without_tokens_are_refused(sums):
    with pytest.raises(NaloraError, match="inspect: texts: expected real tokens in every layer"):
        layer_summary(sums | {"tokens": np.array([400.0, 0.0, 400.0])})
    message = "inspect: texts: expected at least one text with a token in it, found 2 texts"
    with pytest.raises(NaloraError, match=message):
        next(batches_of_texts(tiny.word_tokenizer(), ["", " "], 8))
