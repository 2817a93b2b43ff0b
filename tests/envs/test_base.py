import pytest

from glm5_jax.envs.base import Limits, Start, Step


def test_start_and_step_unpack_in_the_order_of_the_protocol():
    messages, tools = Start(({"role": "user"},))
    assert messages == ({"role": "user"},) and tools == ()
    messages, reward, done, info = Step((), 0.5, True)
    assert (messages, reward, done, info) == ((), 0.5, True, {})


@pytest.mark.parametrize("name", ["turns", "tokens", "wall_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_is_positive_or_none(name, value):
    with pytest.raises(ValueError, match=f"Limits.{name}: expected None or more than 0, found {value}"):
        Limits(**{name: value})
    assert Limits(**{name: None}) == Limits()
