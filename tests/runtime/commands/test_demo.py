import re


def test_the_demo_shows_prompt_completion_speed_and_what_next(launch, capsys):
    assert launch("demo") == 0
    out = capsys.readouterr().out
    assert "def fibonacci(n):    return a + b\n" in out
    assert re.search(r"9 tokens at \d+ tokens/s.*first token: \d+ ms", out)
    assert "millrace generate" in out and "make test" in out


def test_the_demo_loads_the_embedded_model(launch):
    launch("demo")
    assert launch.runtime.config.model == "embedded"
