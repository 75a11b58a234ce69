"""Chat templates are somebody else's programs: they render as in transformers, or end within their limits."""

import pytest

from millrace.errors import CheckpointError, InvalidRequestError
from millrace.runtime.chat_template import ChatLimits, ChatRenderer

TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|{{ message.role }}|>{{ message['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""
HELLO = [{"role": "user", "content": " Hello "}]
LIMITS = ChatLimits(render_s=1.0, max_chars=1000, max_messages_chars=1000)


@pytest.fixture
def renderer():
    made = []

    def make(template):
        made.append(ChatRenderer(template, {"bos_token": "<s>"}, LIMITS))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_messages_render_with_blocks_trimmed(renderer):
    chat = renderer(TEMPLATE)
    assert chat.render(HELLO) == "<s><|user|>Hello\n<|assistant|>"
    assert chat.render(HELLO, add_generation_prompt=False) == "<s><|user|>Hello\n"


def test_text_parts_are_joined_by_newlines(renderer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert renderer("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%%') }}{{ tools is none }}{{ unknown }}", "%True"),
        ("{{ messages[0].name }}{{ enable_thinking }}", "AnnFalse"),
    ],
)
def test_template_language_is_that_of_transformers(template, text, renderer):
    messages = [{"role": "user", "content": "x", "name": "Ann"}]
    assert renderer(template).render(messages, template_kwargs={"enable_thinking": False}) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for", "TemplateSyntaxError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not finish in 1.0 s"),
        ("{{ 'a' * 10**10 }}", "512 MiB of memory"),
        ("{% for i in range(2000) %}a{% endfor %}", "more than 1000 characters"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__x=1) %}", "underscore"),
        ("x" * (2 << 20), "longer than"),
    ],
)
def test_template_that_cannot_be_used_is_a_checkpoint_error(template, reason, renderer):
    with pytest.raises(CheckpointError, match=reason):
        renderer(template).render(HELLO)


def test_template_that_refuses_the_messages_says_why(renderer):
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        renderer("{{ raise_exception('roles must alternate') }}").render(HELLO)
    with pytest.raises(InvalidRequestError, match="UndefinedError"):
        renderer("{{ messages[0].tool_calls.name }}").render(HELLO)


def test_missing_template_is_named(renderer):
    with pytest.raises(InvalidRequestError, match="no chat template"):
        renderer(None).render(HELLO)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "empty list"),
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\] needs a role"),
        ([{"role": 1, "content": "x"}], "needs a role"),
        ([*HELLO, {"role": "user"}], r"messages\[1\] needs content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "each part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "each part"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "plain JSON"),
        ([{"role": "user", "content": "x", "extra": float("nan")}], "plain JSON"),
        ([{"role": "user", "content": "x" * 1001}], "the most is 1000"),
    ],
)
def test_wrong_messages_are_refused(messages, reason, renderer):
    with pytest.raises(InvalidRequestError, match=reason):
        renderer(TEMPLATE).render(messages)


def test_next_chat_works_after_one_that_was_killed(renderer):
    chat = renderer(
        "{% for m in messages %}{% for i in range(m.n) %}{% for j in range(m.n) %}{% endfor %}{% endfor %}{% endfor %}x"
    )
    with pytest.raises(CheckpointError, match="did not finish"):
        chat.render([{**HELLO[0], "n": 99999}])
    assert chat.render([{**HELLO[0], "n": 1}]) == "x"


def test_process_that_died_or_was_closed_is_replaced(renderer):
    chat = renderer("x")
    assert chat.render(HELLO) == "x"
    process = chat._worker._process
    assert chat.render(HELLO) == "x"
    assert chat._worker._process is process
    process.kill()
    process.wait()
    assert chat.render(HELLO) == "x"
    chat.close()
    assert chat.render(HELLO) == "x"
