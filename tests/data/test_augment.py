"""Augmentation and normalisation: against numpy, and independent of how the batch is shared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax.data import augment, normalize

# Compiled whole: one by one, its operations take seconds to compile.
_augment = jax.jit(augment, static_argnames=("pad", "flip", "total"))


def _images(count: int = 8, height: int = 6, width: int = 5, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (count, height, width, channels), dtype=np.uint8)


def _oracle(image: np.ndarray, pad: int, y: int, x: int, mirror: bool) -> np.ndarray:
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = padded[y : y + height, x : x + width]
    return crop[:, ::-1] if mirror else crop


def _explanations(image: np.ndarray, result: np.ndarray, pad: int) -> list[tuple[int, int, bool]]:
    """All (row, column, mirrored) that turn the image into the result."""
    places = range(2 * pad + 1)
    return [
        (y, x, mirror)
        for y in places
        for x in places
        for mirror in (False, True)
        if np.array_equal(_oracle(image, pad, y, x, mirror), result)
    ]


def test_normalize_matches_numpy() -> None:
    images = _images()
    mean, std = np.float32([10.0, 20.0, 30.0]), np.float32([2.0, 4.0, 8.0])
    result = jax.jit(normalize)(images, mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images.astype(np.float64) - mean) / std, rtol=1e-6)


def test_every_result_is_a_padded_crop_and_all_outcomes_occur() -> None:
    images, pad = _images(400), 2
    results = np.asarray(_augment(jax.random.key(0), images, pad=pad, flip=True))
    assert results.dtype == np.uint8
    assert results.shape == images.shape
    seen = []
    for image, result in zip(images, results, strict=True):
        explanations = _explanations(image, result, pad)
        assert len(explanations) == 1
        seen.append(explanations[0])
    rows, columns, mirrored = zip(*seen, strict=True)
    assert set(rows) == set(columns) == set(range(2 * pad + 1))
    assert 140 < sum(mirrored) < 260  # six standard deviations around a half
    assert len(set(zip(rows, columns, strict=True))) == 25  # drawn independently of each other


@pytest.mark.slow
def test_crop_and_mirror_do_not_disturb_each_other() -> None:
    images, key = _images(64), jax.random.key(3)
    flips = np.asarray(_augment(key, images, pad=0, flip=True))
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(flips, images, strict=True)])
    np.testing.assert_array_equal(flips[mirrored], images[mirrored][:, :, ::-1])
    both = _augment(key, images, pad=1, flip=True)
    np.testing.assert_array_equal(both, _augment(key, flips, pad=1, flip=False))


@pytest.mark.parametrize(
    ("pad", "flip"),
    [
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
        (0, True),
    ],
)
def test_the_same_whether_one_device_has_the_batch_or_four(pad: int, flip: bool) -> None:
    images, key = _images(16), jax.random.key(7)
    whole = _augment(key, images, pad=pad, flip=flip)
    parts = [
        _augment(key, images[i : i + 4], pad=pad, flip=flip, offset=jnp.int32(i), total=16)
        for i in range(0, 16, 4)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    constant = jax.jit(functools.partial(augment, pad=pad, flip=flip, offset=4, total=16))
    np.testing.assert_array_equal(constant(key, images[4:8]), whole[4:8])


def test_offset_from_the_axis_index() -> None:
    """As under pmap, with devices played by an axis of vmap."""
    images, key = _images(16), jax.random.key(1)

    def device(images: jax.Array) -> jax.Array:
        offset = jax.lax.axis_index("batch") * 4
        return augment(key, images, pad=2, flip=True, offset=offset, total=16)

    run = jax.jit(jax.vmap(device, axis_name="batch"))
    sharded = run(images.reshape(4, 4, *images.shape[1:]))
    whole = _augment(key, images, pad=2, flip=True)
    np.testing.assert_array_equal(sharded.reshape(images.shape), whole)


def test_nothing_is_traced_when_off() -> None:
    images, key = jnp.asarray(_images()), jax.random.key(0)
    assert augment(key, images, pad=0, flip=False) is images
    traced = jax.make_jaxpr(lambda k, x: augment(k, x, pad=0, flip=False))(key, images)
    assert not traced.eqns


def test_depends_on_the_key_alone() -> None:
    images = _images(32)
    one, same, other = (
        np.asarray(_augment(jax.random.key(seed), images, pad=2, flip=True)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": -1}, "pad must be 0 or more, got -1"),
        ({"pad": 1, "total": 7}, "at least the batch's 8 examples, got 7"),
        ({"pad": 1, "total": 16, "offset": 9}, r"0\.\.8 .* got 9"),
        ({"pad": 1, "total": 16, "offset": -1}, "got -1"),
        ({"pad": 1, "offset": -1}, "offset must be 0 or more, got -1"),
    ],
)
def test_wrong_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(jax.random.key(0), _images(), flip=True, **options)
