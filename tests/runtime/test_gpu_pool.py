"""How much of a GPU a runtime takes."""

import os

import pytest

from millrace.runtime.gpu_pool import VARIABLES, claim_memory
from millrace.sharding.targets import POOL_SHARE


def test_xla_is_let_have_more_than_three_quarters_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    claim_memory()
    assert os.environ[VARIABLES[0]] == str(POOL_SHARE)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_share_that_the_environment_names_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "0.5")
    claim_memory()
    assert {each: os.environ.get(each) for each in VARIABLES} == dict.fromkeys(VARIABLES) | {name: "0.5"}
