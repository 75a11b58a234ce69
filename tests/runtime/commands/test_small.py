"""A command opens a runtime of the size that it fills, unless somebody chose sizes."""

import pytest

from millrace.runtime.commands.small import most_tokens

LONG = "x" * 100


@pytest.mark.parametrize(
    ("flags", "num_slots", "step_tokens"),
    [
        (("--prompt=a",), 1, 64),
        ((f"--prompt={LONG}",), 1, 256),
        ((f"--prompt={5 * LONG}",), 1, None),
        (("--prompt=a", "--prompt=b"), 8, 64),
        (("--prompt=a", "--n=8"), 8, 64),
        (("--prompt=a", "--n=9"), None, None),
        (("--prompt_token_ids=1,2,3",), 1, 64),
        (("--prompt=a", "--num_slots=4"), 4, None),
        (("--prompt=a", "--max_step_tokens=32"), None, 32),
        (("--prompt=a", "--set=seed=3"), None, None),
        (("--prompt=a", "--config=embedded"), 8, 256),
        (("--prompt=a", "--artifact=folder"), None, None),
    ],
)
def test_generate_opens_as_many_slots_as_its_prompts_fill(launch, flags, num_slots, step_tokens):
    assert launch("generate", *flags) == 0
    config = launch.runtime.config
    assert (config.num_slots, config.max_step_tokens) == (num_slots, step_tokens)


def test_chat_and_demo_open_one_slot(launch):
    assert launch("demo") == 0
    assert (launch.runtime.config.num_slots, launch.runtime.config.max_step_tokens) == (1, 64)
    launch.pipe("hello\n")
    assert launch("chat") == 0
    assert (launch.runtime.config.num_slots, launch.runtime.config.max_step_tokens) == (1, None)


def test_a_text_has_at_most_a_token_for_each_byte_and_one_to_begin_with():
    assert most_tokens(["é\ud800", [1, 2]]) == (1 + 3) + (1 + 2)
