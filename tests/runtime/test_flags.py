import dataclasses

import pytest

from millrace.errors import ConfigError
from millrace.runtime.config import RuntimeConfig
from millrace.runtime.flags import RUNTIME, SAMPLING, Group, Option, parse
from millrace.runtime.sampling_params import SamplingParams


def test_every_sampling_param_has_a_flag_of_its_name():
    assert [option.name for option in SAMPLING.options] == [field.name for field in dataclasses.fields(SamplingParams)]


def test_every_runtime_option_has_a_flag_but_the_seed_which_is_the_requests():
    launcher_only = ["config", "set", "log_level"]
    flags = [option.name for option in RUNTIME.options if option.name not in launcher_only]
    options = [field.name for field in dataclasses.fields(RuntimeConfig) if field.name != "seed"]
    assert flags == options


def test_switches_are_the_boolean_options():
    switches = {option.name for group in (RUNTIME, SAMPLING) for option in group.options if option.kind == "switch"}
    fields = [*dataclasses.fields(RuntimeConfig), *dataclasses.fields(SamplingParams)]
    assert switches == {field.name for field in fields if isinstance(field.default, bool)}


COPY = Group("Copy", (Option("source", "text", ""), Option("names", "texts", ""), Option("all", "switch", "", True)))


def test_arguments_without_a_flag_fill_their_places():
    values = parse((COPY,), ["a", "--noall", "b", "c"], "copy", ("source", "names"))
    assert values == {"source": "a", "names": ["b", "c"], "all": False}


@pytest.mark.parametrize(("argv", "message"), [(["a", "b"], "unexpected argument 'b'"), (["a", "--source=b"], "twice")])
def test_arguments_without_a_place_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse((COPY,), argv, "copy", ("source",))


@pytest.mark.parametrize("spelling", ["--noall", "--no-all", "--all=false"])
def test_a_switch_is_turned_off_in_each_of_its_spellings(spelling):
    assert parse((COPY,), [spelling], "copy")["all"] is False


def test_a_value_that_looks_like_a_switch_stays_as_it_is():
    values = parse((COPY,), ["--source", "--no-all", "--", "--no-all"], "copy", ("names",))
    assert values == {"source": "--no-all", "names": ["--no-all"], "all": True}
