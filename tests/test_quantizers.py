"""Quantisers against the formulas in numpy, and what any quantiser must satisfy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitmixer_jax import quantizers
from bitmixer_jax.policy import BitSpace
from tests import oracle

BOTH = pytest.mark.parametrize("choices", oracle.SPACES, ids=str)
EACH = pytest.mark.parametrize("kind", oracle.WEIGHT_QUANTIZERS)
SIGNED = pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
WIDEST_STEP = np.float32(0.25)  # a power of two, so that the clip edges below are met exactly
SHAPE = (40, 60)


def steps_for(kind, choices):
    """Step sizes as the library stores them: one for nested kinds, else one per width."""
    if kind == "independent":
        return WIDEST_STEP * 2.0 ** (choices[-1] - np.array(choices, np.float32))
    return np.array([WIDEST_STEP], np.float32)


def stored(kind, steps, index):
    """The element of `steps` that a width learns."""
    return steps[index if kind == "independent" else 0]


@functools.cache
def values(choices):
    """Random values past both ends of every grid, with the edges and the ties of each."""
    rng = np.random.default_rng(0)
    v = rng.normal(0, 0.7 * WIDEST_STEP * 2 ** (choices[-1] - 1), SHAPE).astype(np.float32)
    special = [np.float32(0)]
    for bits in choices:
        unit = WIDEST_STEP * np.float32(2 ** (choices[-1] - bits))
        for signed in (False, True):
            for edge in oracle.limits(bits, signed):
                special += [unit * (edge + np.float32(x)) for x in (-0.5, 0, 0.5, 1)]
    v.flat[: len(special)] = special
    return v


@functools.cache
def run_weights(kind, choices):
    """``f(v, steps, index, upstream)``: codes, step and both gradients; the index is traced."""

    @jax.jit
    def run(v, steps, index, upstream):
        def loss(v, steps):
            codes, step = quantizers.weight_codes(v, steps, index, BitSpace(choices), kind)
            return jnp.sum(upstream * (codes * step)), (codes, step)

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(v, steps)
        return (*out, *grads)

    return lambda *args: tuple(np.asarray(x) for x in run(*args))


@functools.cache
def run_activations(signed, choices):
    """As `run_weights`."""

    @jax.jit
    def run(v, steps, index, upstream):
        def loss(v, steps):
            codes, step = quantizers.activation_codes(v, steps, index, BitSpace(choices), signed)
            return jnp.sum(upstream * (codes * step)), (codes, step)

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(v, steps)
        return (*out, *grads)

    return lambda *args: tuple(np.asarray(x) for x in run(*args))


def upstream():
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


# --- codes and gradients, as the formulas say ---


@BOTH
@EACH
def test_weight_codes_and_steps_are_those_of_the_formulas(kind, choices):
    v, steps = values(choices), steps_for(kind, choices)
    for index, bits in enumerate(choices):
        codes, step, *_ = run_weights(kind, choices)(v, steps, index, upstream())
        s = stored(kind, steps, index)
        np.testing.assert_array_equal(codes, oracle.codes(kind, v, s, bits, choices[-1]))
        assert step == oracle.pitch(kind, s, bits, choices[-1])


@BOTH
@EACH
def test_weight_codes_agree_with_the_formulas_for_a_step_of_no_special_size(kind, choices):
    v = values(choices)
    steps = steps_for(kind, choices) * np.float32(1.2345678)
    for index, bits in enumerate(choices):
        codes, *_ = run_weights(kind, choices)(v, steps, index, upstream())
        expected = oracle.codes(kind, v, stored(kind, steps, index), bits, choices[-1])
        np.testing.assert_array_equal(codes, expected)


@BOTH
@EACH
def test_weight_gradients_are_those_of_the_formulas_also_at_the_clip_edges(kind, choices):
    v, steps, r = values(choices), steps_for(kind, choices), upstream()
    for index, bits in enumerate(choices):
        *_, d_v, d_steps = run_weights(kind, choices)(v, steps, index, r)
        s = stored(kind, steps, index)
        of_v, of_s = oracle.gradients(kind, v, s, bits, choices[-1], r, v.size)
        np.testing.assert_allclose(d_v, of_v, rtol=1e-6)
        expected = np.zeros(len(steps))
        expected[index if kind == "independent" else 0] = of_s
        np.testing.assert_allclose(d_steps, expected, rtol=2e-4)


@BOTH
@SIGNED
def test_activation_codes_and_gradients_are_those_of_lsq(signed, choices):
    v, r = values(choices), upstream()
    steps = steps_for("independent", choices)
    for index, bits in enumerate(choices):
        codes, step, d_v, d_steps = run_activations(signed, choices)(v, steps, index, r)
        grid = ("independent", v, steps[index], bits, choices[-1])
        np.testing.assert_array_equal(codes, oracle.codes(*grid, signed))
        assert step == steps[index]
        of_v, of_s = oracle.gradients(*grid, r, SHAPE[1], signed)
        np.testing.assert_allclose(d_v, of_v, rtol=1e-6)
        np.testing.assert_allclose(d_steps, np.eye(len(choices))[index] * of_s, rtol=2e-4)


def test_activation_step_gradient_is_scaled_by_the_features_of_one_example():
    v = np.full((8, 3, 5, 2), 100, np.float32)  # all beyond Qp = 15, so d v_hat / d s = 15

    def loss(steps):
        codes, step = quantizers.activation_codes(v, steps, 0, BitSpace((4,)))
        return jnp.sum(codes * step)

    gradient = jax.grad(loss)(jnp.ones(1))
    np.testing.assert_allclose(gradient, [15 * v.size / np.sqrt(3 * 5 * 2 * 15)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["floor", "double"])
def test_a_shared_step_moves_in_proportion_like_the_step_in_use_would(kind):
    # With s_b = s 2^d, LSQ's g dL/ds_b relative to s_b, and what s gets relative to s, agree.
    choices = (2, 4, 8)
    v, steps, r = values(choices), steps_for(kind, choices), upstream()
    for index, bits in enumerate(choices):
        codes, step, _, d_steps = run_weights(kind, choices)(v, steps, index, r)
        qn, qp = oracle.limits(bits, True)
        u = v / step
        inside = (u > qn) & (u < (qp + 1 if kind == "floor" else qp))
        lsq = np.sum(r * np.where(inside, codes - u, codes)) / np.sqrt(v.size * qp)
        np.testing.assert_allclose(d_steps[0] / steps[0], lsq / step, rtol=2e-4)


@EACH
def test_a_static_index_gives_what_a_traced_one_gives(kind):
    choices = (2, 4, 8)
    v, steps = values(choices), steps_for(kind, choices)
    for index in range(3):
        traced, traced_step, *_ = run_weights(kind, choices)(v, steps, index, upstream())
        codes, step = quantizers.weight_codes(v, jnp.asarray(steps), index, BitSpace(choices), kind)
        np.testing.assert_array_equal(codes, traced)
        assert step == traced_step


# --- nesting ---


def all_codes(kind, choices):
    """Whole codes by width, of the same weights."""
    v, steps = values(choices), steps_for(kind, choices) * np.float32(1.1)
    found = {}
    for index, bits in enumerate(choices):
        codes, *_ = run_weights(kind, choices)(v, steps, index, upstream())
        found[bits] = np.floor(codes).astype(np.int64)
    return found


@BOTH
def test_floor_codes_are_the_widest_ones_shifted_right(choices):
    codes = all_codes("floor", choices)
    for bits, narrow in codes.items():
        np.testing.assert_array_equal(narrow, codes[choices[-1]] >> (choices[-1] - bits))


@BOTH
def test_double_rounded_codes_come_from_the_widest_ones_alone(choices):
    codes = all_codes("double", choices)
    for bits in choices[:-1]:
        d = choices[-1] - bits
        expected = np.clip((codes[choices[-1]] + 2 ** (d - 1)) >> d, *oracle.limits(bits, True))
        np.testing.assert_array_equal(codes[bits], expected)


# --- what any quantiser must satisfy ---

FULL = (2, 3, 4, 5, 6, 7, 8)
RAMP = np.linspace(-80, 80, 2400, dtype=np.float32).reshape(SHAPE)  # ascending, past every end


@EACH
def test_weight_quantisers_are_bounded_monotone_and_use_every_level(kind):
    steps = steps_for(kind, FULL)
    half = 0.5 if kind == "floor" else 0
    for index, bits in enumerate(FULL):
        codes, *_ = run_weights(kind, FULL)(RAMP, steps, index, upstream())
        qn, qp = oracle.limits(bits, True)
        assert (codes.min(), codes.max()) == (qn + half, qp + half)
        assert (np.diff(codes.ravel()) >= 0).all()
        assert len(np.unique(codes)) == 2**bits


@SIGNED
def test_activation_quantisers_are_bounded_monotone_and_use_every_level(signed):
    steps = steps_for("independent", FULL)
    for index, bits in enumerate(FULL):
        codes, *_ = run_activations(signed, FULL)(RAMP, steps, index, upstream())
        assert (codes.min(), codes.max()) == oracle.limits(bits, signed)
        assert (np.diff(codes.ravel()) >= 0).all()
        assert len(np.unique(codes)) == 2**bits


@EACH
def test_quantising_twice_is_quantising_once(kind):
    v, steps = values(FULL), steps_for(kind, FULL) * np.float32(0.77)
    for index in range(len(FULL)):
        codes, step, *_ = run_weights(kind, FULL)(v, steps, index, upstream())
        again, *_ = run_weights(kind, FULL)(codes * step, steps, index, upstream())
        np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize(("kind", "roundings"), [("floor", 1), ("independent", 1), ("double", 2)])
def test_inside_the_grid_the_error_is_at_most_half_a_pitch_per_rounding(kind, roundings):
    v, steps = values(FULL), steps_for(kind, FULL)
    for index, bits in enumerate(FULL):
        codes, step, *_ = run_weights(kind, FULL)(v, steps, index, upstream())
        qn, qp = oracle.limits(bits, True)
        inside = (v >= qn * step) & (v <= qp * step)
        worst = step / 2 + (steps[0] / 2 if roundings == 2 and bits < 8 else 0)
        assert np.abs(codes * step - v)[inside].max() <= worst


@EACH
def test_every_code_of_up_to_8_bits_is_exact_in_bfloat16(kind):
    for index, bits in enumerate(FULL):
        codes, *_ = run_weights(kind, FULL)(RAMP, steps_for(kind, FULL), index, upstream())
        assert len(np.unique(codes.astype(jnp.bfloat16))) == 2**bits
        np.testing.assert_array_equal(codes.astype(jnp.bfloat16).astype(np.float32), codes)


def test_every_unsigned_code_of_8_bits_is_exact_in_bfloat16():
    codes, _ = quantizers.activation_codes(
        jnp.arange(256.0)[None], jnp.ones(1), 0, BitSpace((8,)), False
    )
    np.testing.assert_array_equal(codes.astype(jnp.bfloat16).astype(np.float32)[0], np.arange(256))


# --- what files and engines ask a weight quantiser ---


@BOTH
@EACH
def test_stored_codes_give_the_codes_of_every_width(kind, choices):
    quantizer, codes = quantizers.WEIGHT_QUANTIZERS[kind], all_codes(kind, choices)
    narrow_first = [codes[bits].astype(np.int8) for bits in choices]
    stored = np.stack(narrow_first[-1:] if quantizer.nested else narrow_first)
    for index, expected in enumerate(narrow_first):
        found = quantizer.codes_at(stored, index, BitSpace(choices), choices[-1])
        np.testing.assert_array_equal(found, expected)
        traced = quantizer.codes_at(
            jnp.asarray(stored), jnp.int32(index), BitSpace(choices), choices[-1]
        )
        np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("kind", ["floor", "double"])
def test_a_width_needs_the_planes_that_its_codes_depend_on(kind):
    quantizer, space = quantizers.WEIGHT_QUANTIZERS[kind], BitSpace((2, 4, 8))
    widest = np.arange(-128, 128, dtype=np.int16)
    for bits in space.choices:
        whole = quantizer.truncate(widest, 8 - bits, 8)
        for planes in range(bits, 9):
            cut = quantizer.truncate(widest >> (8 - planes), planes - bits, planes)
            assert np.array_equal(cut, whole) == (planes >= quantizer.planes(bits, space))


@EACH
def test_integer_codes_and_the_half_give_the_codes(kind):
    v, steps = values((2, 3, 4)), steps_for(kind, (2, 3, 4))
    codes, *_ = run_weights(kind, (2, 3, 4))(v, steps, 1, upstream())
    half = quantizers.WEIGHT_QUANTIZERS[kind].half
    np.testing.assert_array_equal(np.floor(codes) + half, codes)


def test_planes_are_named_by_width_where_widths_are_not_nested():
    space = BitSpace((2, 3))
    names = {kind: q.plane_names(space) for kind, q in quantizers.WEIGHT_QUANTIZERS.items()}
    assert names["floor"] == names["double"] == [["plane.0", "plane.1", "plane.2"]]
    assert names["independent"] == [
        ["plane.2bits.0", "plane.2bits.1"],
        ["plane.3bits.0", "plane.3bits.1", "plane.3bits.2"],
    ]


def test_an_unknown_weight_quantiser_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown weight quantiser 'flor'; choose from floor, dou"):
        quantizers.weight_codes(jnp.ones(3), jnp.ones(1), 0, BitSpace((2, 3)), "flor")


def test_arguments_of_version_0_1_are_still_taken():
    w, one = jnp.linspace(-1, 1, 9), jnp.full(1, 0.25)
    with pytest.warns(DeprecationWarning, match=r"weight_codes\((kind|steps)=\)"):
        old = quantizers.weight_codes(w, steps=one, index=0, space=BitSpace((2,)), kind="double")
    new = quantizers.weight_codes(w, one, 0, BitSpace((2,)), quantizer="double")
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a, b)


# --- step sizes ---


@pytest.mark.parametrize("step", [0.0, -0.3])
def test_a_step_pushed_to_zero_or_below_still_gives_finite_codes_and_a_gradient(step):
    steps = np.array([step], np.float32)
    codes, used, d_v, d_steps = run_weights("floor", (2, 3, 4))(
        values((2, 3, 4)), steps, 1, np.ones(SHAPE, np.float32)
    )
    assert used > 0
    assert np.isfinite(codes).all()
    assert np.isfinite(d_v).all()
    assert np.isfinite(d_steps).all()
    assert d_steps[0] != 0


@SIGNED
def test_the_first_step_size_is_twice_the_mean_over_the_root_of_the_top_code(signed):
    v = values((2, 3, 4))
    for bits in range(2, 9):
        expected = 2 * np.abs(v).mean() / np.sqrt(oracle.limits(bits, signed)[1])
        np.testing.assert_allclose(quantizers.init_step_size(v, bits, signed), expected, rtol=1e-6)


def test_the_first_step_size_of_zeros_is_positive():
    assert quantizers.init_step_size(jnp.zeros(5), 4, True) > 0


def test_nested_kinds_learn_one_step_and_independent_ones_one_per_width():
    space = BitSpace((2, 4, 8))
    counts = {
        kind: quantizers.step_size_count(kind, space) for kind in quantizers.WEIGHT_QUANTIZERS
    }
    assert counts == {"floor": 1, "double": 1, "independent": 3}


# --- levels ---


@pytest.mark.parametrize("bits", [2, 3, 8])
@EACH
def test_levels_counts_each_code_from_the_lowest_to_the_highest(kind, bits):
    v = values((bits,))
    codes, *_ = run_weights(kind, (bits,))(v, steps_for(kind, (bits,)), 0, upstream())
    counts = np.asarray(quantizers.code_histogram(codes, bits, True))
    qn, qp = oracle.limits(bits, True)
    whole = oracle.whole_codes(kind, v, WIDEST_STEP, bits, bits)
    assert counts.tolist() == [np.sum(whole == q) for q in range(qn, qp + 1)]


def test_levels_shows_a_code_that_is_never_used():
    assert quantizers.code_histogram(jnp.array([0.0, 1, 1, 3]), 2, False).tolist() == [1, 2, 0, 1]
