import pytest

from glm5_jax.core import compat


@pytest.mark.parametrize("jax_version, flax_version, message", [
    ("0.7.1", "0.11.2", "needs jax >= 0.7.2, but jax 0.7.1 is installed"),
    ("0.7.2", "0.10.0", "needs flax >= 0.11.2, but flax 0.10.0"),
    ("0.12.0.1", "0.12.8", "jax 0.12.0.1 and flax 0.12.8 do not fit together: jax >= 0.12 needs flax >= 0.12.10"),
    ("0.10.2", "0.12.12", "jax 0.10.2 and flax 0.12.12 do not fit together: this flax needs jax >= 0.11.1"),
])
def test_check_versions_explains(monkeypatch, jax_version, flax_version, message):
    monkeypatch.setattr(compat.metadata, "version", {"jax": jax_version, "flax": flax_version}.get)
    monkeypatch.setattr(compat.metadata, "requires",
                        lambda _: ["numpy>=1.23", "jax>=0.11.1", 'jaxlib; extra == "testing"'])
    with pytest.raises(RuntimeError, match=message) as raised:
        compat.check_versions()
    assert "\n" not in str(raised.value) and "pip install -U jax flax" in str(raised.value)


@pytest.mark.parametrize("jax_version, flax_version", [("0.7.2", "0.11.2"), ("0.10.2", "0.12.8"),
                                                       ("0.12.0.1", "0.12.12"), ("0.13.0.dev3+gabc", "0.13rc1")])
def test_check_versions_accepts(monkeypatch, jax_version, flax_version):
    monkeypatch.setattr(compat.metadata, "version", {"jax": jax_version, "flax": flax_version}.get)
    monkeypatch.setattr(compat.metadata, "requires", lambda _: ["jax>=0.6.0"])
    compat.check_versions()


def test_check_versions_accepts_this_environment():
    compat.check_versions()
