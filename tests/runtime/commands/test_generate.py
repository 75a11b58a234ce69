import io
import json

import pytest

TEXT = "    return a + b\n"


def test_one_prompt_is_streamed_as_bare_text(launch, capsys):
    assert launch("generate", "--prompt=def add(a, b):") == 0
    out, err = capsys.readouterr()
    assert out == TEXT
    assert "3 tokens" in err and "tokens/s" in err
    assert launch.runtime.closed


def test_text_without_a_line_end_gets_one(launch, capsys):
    launch.runtime.pieces = ["x"]
    launch("generate", "--prompt=hi")
    assert capsys.readouterr().out == "x\n"


def test_token_ids_are_written_where_there_is_no_text(launch, capsys):
    launch.runtime.pieces, launch.runtime.has_tokenizer = ["", "", ""], False
    assert launch("generate", "--prompt_token_ids=5,6,7") == 0
    assert launch.runtime.asked[0][0] == [5, 6, 7]
    assert capsys.readouterr().out == "0,1,2\n"


def test_an_empty_text_is_not_written_as_token_ids(launch, capsys):
    launch.runtime.pieces = [""]
    launch("generate", "--prompt=hi")
    assert capsys.readouterr().out == "\n"


def test_a_piped_text_that_is_not_utf8_is_named_by_its_byte(launch, capsys):
    launch.pipe(b"caf\xe9 au lait")
    assert launch("generate") == 1
    assert "standard input must be UTF-8; byte 3 (from 0) is 0xe9" in capsys.readouterr().err
    assert not launch.runtime.asked


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_a_text_that_stdout_cannot_encode_is_escaped(launch, monkeypatch, format):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    launch.runtime.pieces = ["gr\u00f6\u00dfer"]
    assert launch("generate", "--prompt=\u00f6", f"--format={format}") == 0
    narrow.flush()
    written = narrow.buffer.getvalue().decode("ascii")
    assert written == "gr\\xf6\\xdfer\n" if format == "text" else json.loads(written)["prompt"] == "\u00f6"


def test_a_piped_text_is_one_prompt_as_it_stands(launch):
    launch.pipe("def f():\n    pass\n")
    assert launch("generate") == 0
    assert launch.runtime.asked[0][0] == "def f():\n    pass\n"


def test_several_prompts_are_written_under_headings(launch, capsys):
    assert launch("generate", "--prompt=one", "--prompt=two", "--n=2") == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert headings == [f"--- prompt {p}, completion {c}: '{t}'" for p, t in ((1, "one"), (2, "two")) for c in (1, 2)]


def test_a_refused_prompt_leaves_the_others(launch, capsys):
    assert launch("generate", "--prompt=bad", "--prompt=good") == 1
    out, err = capsys.readouterr()
    assert TEXT in out
    assert err == "millrace: prompt 1: bad is refused\n"


def test_jsonl_has_the_documented_fields(launch, capsys):
    assert launch("generate", "--prompt=hi", "--format=jsonl", "--logprobs=1") == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    completion = record.pop("outputs")[0]
    assert record == {
        "request_id": "0",
        "prompt": "hi",
        "prompt_token_ids": [1, 2],
        "num_cached_tokens": 0,
        "prompt_logprobs": [None, {"2": {"logprob": None, "rank": 2, "decoded_token": "b"}}],
    }
    assert completion == {
        "index": 0,
        "text": TEXT,
        "token_ids": [7],
        "finish_reason": "length",
        "stop_reason": None,
        "seed": 11,
        "cumulative_logprob": -0.5,
        "logprobs": [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}],
    }


def test_jsonl_puts_an_error_in_a_refused_prompts_place(launch, capsys):
    assert launch("generate", "--prompt=good", "--prompt=bad", "--format=jsonl") == 1
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["outputs"] and bad == {"prompt": "bad", "error": "bad is refused"}


def test_a_prompt_with_half_a_surrogate_pair_leaves_the_later_ones(launch, capsys):
    assert launch("generate", "--prompt=half \udc80", "--prompt=good", "--format=jsonl") == 1
    bad, good = map(json.loads, capsys.readouterr().out.splitlines())
    assert bad == {"prompt": "half \udc80", "error": "bad is refused"} and good["outputs"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_is_split_at_line_ends_alone_and_may_have_a_byte_order_mark(launch, tmp_path, name):
    path, texts = tmp_path / name, ["a\u2028b\x0cc\x85d", "e"]
    lines = [json.dumps(text, ensure_ascii=False) if name.endswith("l") else text for text in texts]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert launch("generate", f"--prompt_file={path}") == 0
    assert [prompt for prompt, _ in launch.runtime.asked] == texts


def test_a_file_has_a_prompt_per_line(launch, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert launch("generate", f"--prompt_file={path}") == 0
    assert [prompt for prompt, _ in launch.runtime.asked] == ["one", "two"]


def test_a_jsonl_file_has_texts_lists_and_objects(launch, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a\\nb"\n[1, 2]\n{"prompt": "c"}\n{"prompt_token_ids": [3]}\n')
    assert launch("generate", f"--prompt_file={path}") == 0
    assert [prompt for prompt, _ in launch.runtime.asked] == ["a\nb", [1, 2], "c", [3]]


@pytest.mark.parametrize(
    "line",
    ["{", "1", "[1.5]", "[true]", '{"prompt": "a", "n": 2}', '{"promt": "a"}', "null", "9" * 5000, "[" * 100_000],
    ids=lambda line: line[:16],
)
def test_a_malformed_jsonl_line_is_named(launch, capsys, tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"good"\n{line}\n')
    assert launch("generate", f"--prompt_file={path}") == 1
    err = capsys.readouterr().err
    assert "prompts.jsonl:2" in err and "a bug" not in err
    assert not launch.runtime.asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no prompt"),
        (("--prompt=a", "--prompt_token_ids=1"), "use one of them"),
        (("--prompt_file=absent.txt",), "cannot be read"),
    ],
)
def test_without_usable_prompts_no_runtime_is_opened(launch, capsys, flags, message):
    assert launch("generate", *flags) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not launch.runtime.closed


def test_sampling_flags_reach_the_request(launch, last_params):
    launch("generate", "--prompt=a", "--temperature=0", "--stop=x", "--stop=y", "--stop_token_ids=4,5", "--ignore_eos")
    params = last_params()
    assert (params.temperature, params.stop, params.stop_token_ids, params.ignore_eos) == (0, ("x", "y"), (4, 5), True)
    launch("generate", "--prompt=a", "--logit_bias=3:-1.5,4:2", "--noskip_special_tokens", "--max_tokens=9")
    params = last_params()
    assert (params.logit_bias, params.skip_special_tokens, params.max_tokens) == ({3: -1.5, 4: 2.0}, False, 9)


def test_the_models_own_max_tokens_counts_where_it_names_one(launch, last_params):
    launch("generate", "--prompt=a")
    assert last_params().max_tokens == 256
    launch.runtime.default_sampling_params = launch.runtime.default_sampling_params.replace(max_tokens=40)
    launch("generate", "--prompt=a")
    assert last_params().max_tokens == 40


@pytest.mark.parametrize("flag", ["--temperature=nan", "--top_p=0", "--max_tokens=0", "--n=1000", "--logprobs=21"])
def test_a_value_out_of_range_is_one_line(launch, capsys, flag):
    assert launch("generate", "--prompt=a", flag) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("millrace: ") and err.count("\n") == 1
    assert flag[2:].split("=")[0] in err


def test_ctrl_c_while_streaming_exits_with_130_and_closes_the_runtime(launch, capsys):
    launch.runtime.interrupt_after = 1
    assert launch("generate", "--prompt=a") == 130
    assert "Traceback" not in capsys.readouterr().err
    assert launch.runtime.closed
