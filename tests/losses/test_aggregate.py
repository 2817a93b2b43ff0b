"""Sums over sequences and the three aggregations, against loops over rows and segments."""

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.losses import aggregate
from tests.losses import reference

KINDS = ["sequence_mean_of_token_means", "sequence_mean", "token_mean"]


@settings(max_examples=20)
@given(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1) | st.integers(-2, 2), min_size=6, max_size=6))
def test_equal_ids_have_equal_numbers_below_their_count(ids):
    numbers = np.asarray(aggregate.renumber(jnp.array(ids)))
    assert ((0 <= numbers) & (numbers < len(ids))).all()
    for i, j in np.ndindex(6, 6):
        assert (numbers[i] == numbers[j]) == (ids[i] == ids[j])


@pytest.mark.parametrize("wide", [False, True])
def test_ids_of_64_bits_stay_different(wide):
    ids = np.array([[2 ** 40, 2 ** 32, 0, 2 ** 32], [5, 5, -2 ** 63, 2 ** 63 - 1]])
    with reference.float64(wide):
        for given_ids in (ids, ids.tolist()):
            mask_BT, sequence_BT = aggregate.read_mask(np.ones((2, 4)), given_ids)
            assert mask_BT.tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
            numbers = np.asarray(sequence_BT)
            np.testing.assert_array_equal(numbers[:, :, None] == numbers[:, None], ids[:, :, None] == ids[:, None])
        assert float(aggregate.count(np.ones((2, 4)), ids, aggregation="sequence_mean")) == 5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_aggregations_by_loop(kind, packed, seed):
    arrays = reference.batch(seed, packed=packed)
    weights = np.where(arrays["mask"], np.random.default_rng(seed).uniform(0.5, 2, arrays["mask"].shape), 0)
    places, terms = reference.sequences(**arrays), arrays["advantage"]
    sums = [sum(weights[p] * terms[p] for p in places_of_one) for places_of_one in places]
    lengths = [sum(weights[p] for p in places_of_one) for places_of_one in places]
    means = [s / n for s, n in zip(sums, lengths)]
    expected = {"sequence_mean_of_token_means": np.mean(means), "sequence_mean": np.mean(sums),
                "token_mean": sum(sums) / sum(lengths)}[kind]
    counts = {"token_mean": sum(lengths)}.get(kind, len(places))

    read = aggregate.read_mask(weights, arrays.get("segment_ids"))
    found = aggregate.aggregate(jnp.float32(terms), *read, aggregation=kind, denominator=None)
    assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert float(aggregate.count(weights, arrays.get("segment_ids"), aggregation=kind)) == pytest.approx(counts)
    given_count = aggregate.aggregate(jnp.float32(terms), *read, aggregation=kind, denominator=2 * counts)
    assert float(given_count) == pytest.approx(expected / 2, rel=1e-5, abs=1e-6)
    once = aggregate.aggregate(jnp.float32(terms), *read, aggregation=kind, denominator=None, one_per_sequence=True)
    assert float(once) == pytest.approx(np.mean(means) if kind == "sequence_mean" else expected, rel=1e-5, abs=1e-6)


def test_padding_of_a_packed_row_is_not_counted():
    segments, mask = np.array([[5, 5, 0, 0], [0, 0, 0, 0]]), np.ones((2, 4))
    assert float(aggregate.count(mask, segments, aggregation="token_mean")) == 2
    assert float(aggregate.count(mask, segments, aggregation="sequence_mean")) == 1
    assert float(aggregate.count(mask, aggregation="sequence_mean")) == 2


def test_it_compiles_with_static_shapes_and_differentiates():
    segments = np.array([[1, 1, 2, 0], [9, 8, 8, 8]])

    @jax.jit
    def longest(x, segment_ids):
        return jnp.max(aggregate.sequence_sum(x, aggregate.renumber(segment_ids)))

    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert float(longest(x, segments)) == 5 + 6 + 7
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(aggregate.sequence_sum(x, aggregate.renumber(
        jnp.array(segments))) ** 2))(x), [[4, 4, 4, 6], [8, 108, 108, 108]])


def test_float64_is_kept():
    with reference.float64(True):
        mask_BT, sequence_BT = aggregate.read_mask(np.ones((1, 3), bool), np.ones((1, 3), int), dtype=jnp.float64)
        assert mask_BT.dtype == aggregate.aggregate(mask_BT, mask_BT, sequence_BT, aggregation="token_mean",
                                                    denominator=3).dtype == jnp.float64


@pytest.mark.parametrize("arguments, message", [
    (dict(mask=np.ones(3)), r"mask: expected shape \[B, T\], found \(3,\)"),
    (dict(mask=np.ones((2, 3)), segment_ids=np.ones((2, 3))), "segment_ids: expected integers of .* found float"),
    (dict(mask=np.ones((2, 3)), segment_ids=np.ones((3, 2), int)), r"segment_ids: .*\(2, 3\).*\(3, 2\)"),
    (dict(mask=np.ones((2, 3)), aggregation="sum"), "aggregation: expected one of .*, found 'sum'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        aggregate.count(**{"aggregation": "token_mean", **arguments})


@pytest.mark.parametrize("denominator", [0, -1.0, float("nan"), np.ones(2)])
def test_bad_denominator(denominator):
    with pytest.raises(ValueError, match="denominator: expected a scalar"):
        aggregate.aggregate(jnp.ones((1, 2)), jnp.ones((1, 2)), None, aggregation="token_mean", denominator=denominator)
