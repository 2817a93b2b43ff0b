"""The plan of stacks and scans: every layer once, in order, in few pieces."""

from hypothesis import given, strategies as st
import pytest

import glm5_jax as glm5
from glm5_jax.model.config import LayerKind
from glm5_jax.model.stacks import plan

KINDS = [LayerKind(indexer, mlp) for indexer in ("full", "shared") for mlp in ("dense", "sparse")]


def execution_order(segments) -> list[tuple[int, LayerKind]]:
    """(layer, kind) as the scans visit them: the runs of a segment, again for each repeat."""
    return [(int(layer), run.kind) for segment in segments for repeat in range(len(segment[0].layers))
            for run in segment for layer in run.layers[repeat]]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=30))
def test_every_layer_once_in_order(kinds):
    segments = plan(kinds)
    assert execution_order(segments) == list(enumerate(kinds))
    names = [run.name for segment in segments for run in segment]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("config, shapes", [
    (glm5.glm5(), [[(1, 3)], [(1, 75)]]),
    (glm5.glm5_2(), [[(1, 3)], [(18, 3), (18, 1)], [(1, 3)]])], ids=["glm5", "glm5_2"])
def test_released_models_are_few_scans(config, shapes):
    segments = plan(config.layer_kinds)
    assert [[run.layers.shape for run in segment] for segment in segments] == shapes


def test_specs_follow_the_plan():
    layers = glm5.param_specs(glm5.glm5_2())["layers"]
    assert {name: stack["input_norm"].shape[:2] for name, stack in layers.items()} == {
        "0": (1, 3), "3": (18, 3), "6": (18, 1), "75": (1, 3)}
    assert {name for name, stack in layers.items() if "indexer" in stack} == {"0", "6"}
    assert {name for name, stack in layers.items() if "mlp" in stack} == {"0"}
