"""benchmarks/kernels.py at toy size: every part runs, compares before it times, and writes its results. No time is
asserted.
"""

import json

import jax.numpy as jnp
import pytest


@pytest.fixture
def kernels(benchmarks):
    return benchmarks("kernels")


def toy(kernels):
    return kernels.Sizes(queries=2, heads=2, rank=12, value_dim=8, index_heads=2, index_dim=4, top_k=8, rows=3,
                         grouped=(12, 3, 4, 5))


def test_the_parts_measure_themselves(kernels, tmp_path, capsys):
    kernels.main(["--parts", "attention", "selection", "grouped", "--lengths", "24", "--rounds", "1", "--out",
                  str(tmp_path)], toy(kernels))
    path, = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["sizes"]["top_k"] == 8 and record["rounds"] == 1
    for dtype, allowed in kernels.AGREEMENT.items():
        assert record["attention"][dtype]["difference_where_all_are_selected"] < allowed
        assert set(record["attention"][dtype]["24"]) == {
            "dense", "sparse", "sparse_mla alone", "dense gradient", "sparse_mla gradient"}
    assert set(record["selection"]) == {"24"}
    assert set(record["grouped"]) == {f"{dtype} {load}" for dtype in kernels.AGREEMENT for load in ("even", "zipf")}
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize("part, spoiled, message", [
    ("attention", "sparse", "sparse attention over all keys, float32: expected dense attention within"),
    ("selection", "bisection", "selection of 8 from 16: expected the keys of lax.top_k"),
    ("grouped", "grouped_matmul", "grouped_matmul, float32, even: expected lax.ragged_dot within")])
def test_nothing_wrong_is_timed(kernels, monkeypatch, part, spoiled, message):
    if spoiled == "sparse":
        attend = kernels.sparse
        monkeypatch.setattr(kernels, "sparse", lambda *args: attend(*args) * 1.1)
    elif spoiled == "grouped_matmul":
        monkeypatch.setattr(kernels.pallas_kernels, spoiled, lambda x, w, sizes: x @ w[0])
    else:
        monkeypatch.setattr(kernels.xla, "best_by_bisection", lambda x, top_k: jnp.zeros((len(x), top_k), jnp.int32))
    with pytest.raises(SystemExit, match=message):
        kernels.PARTS[part](toy(kernels), (16,), 1)
