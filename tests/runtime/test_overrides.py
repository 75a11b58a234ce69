import pkgutil

import pytest

from millrace import configs
from millrace.errors import ConfigError
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.flags import RUNTIME, parse
from millrace.runtime.overrides import load_config, override, resolve


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model=org/name", "org/name"),
        ("num_slots=8", 8),
        ("max_context_len=none", None),
        ("max_context_len=4096", 4096),
        ("prefix_caching=false", False),
        ("compile_cache_dir=", ""),
        ("mesh=data=2,tensor=4", (("data", 2), ("tensor", 4))),
        ("mesh.tensor=4", (("tensor", 4),)),
        ("mesh=none", None),
        ("quantization=none", "none"),
        ("kernels.paged_attention=reference", (("paged_attention", "reference"),)),
        ("kernels=paged_attention:reference", (("paged_attention", "reference"),)),
    ],
)
def test_a_setting_becomes_its_options_type(setting, value):
    name = setting.split("=")[0].split(".")[0]
    assert getattr(override(RuntimeConfig(), [setting]), name) == value


def test_a_later_setting_wins_and_keys_add_up():
    config = override(RuntimeConfig(), ["num_slots=8", "mesh=data=2", "mesh.tensor=4", "num_slots=16", "mesh.data=1"])
    assert config.num_slots == 16
    assert config.mesh == (("data", 1), ("tensor", 4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_slots", "expected path=value"),
        ("num_slotz=3", "did you mean num_slots"),
        ("num_slots=3.5", "expected an integer"),
        ("page_size=none", "expected an integer"),
        ("prefix_caching=maybe", "true or false"),
        ("mesh=data", "key=value"),
        ("mesh=data=x", "expected an integer"),
        ("mesh=data=1,data=2", "twice"),
        ("num_slots.x=1", "not a table"),
        ("page_size=0", "page_size"),
    ],
)
def test_a_wrong_setting_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(RuntimeConfig(), [setting])


def test_settings_are_validated_together():
    assert override(RuntimeConfig(), ["num_slots=2048", "max_step_tokens=4096"]).num_slots == 2048


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(configs.__path__)])
def test_every_deployment_loads(name):
    assert isinstance(load_config(name), RuntimeConfig)


def test_an_unknown_deployment_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean embedded"):
        load_config("embeddeds")


def test_flags_stand_above_the_deployment_and_set_above_flags():
    argv = ["--config=embedded", "--num_slots=4", "--page_size=8", "--set=page_size=32", "--noprefix_caching"]
    config = resolve(parse([RUNTIME], argv, "test"))
    assert (config.num_slots, config.page_size, config.prefix_caching) == (4, 32, False)
    assert config.model == "embedded"


def test_without_flags_the_defaults_stand():
    config = resolve(parse([RUNTIME], [], "test"))
    assert config == RuntimeConfig(progress=config.progress)
