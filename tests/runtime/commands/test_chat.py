import pytest

REPLY = "    return a + b\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text=REPLY):
    return {"role": "assistant", "content": text}


def test_each_piped_line_is_a_message_and_sees_the_history(launch, capsys):
    launch.pipe("one\n\ntwo\n")
    assert launch("chat") == 0
    chats = [asked for asked, _ in launch.runtime.asked if isinstance(asked, list)]
    assert chats == [[user("one")], [user("one"), assistant(), user("two")]]
    assert capsys.readouterr().out == f"{REPLY}\n{REPLY}\n"


def test_a_system_message_opens_every_conversation(launch):
    launch.pipe("one\n/reset\ntwo\n")
    assert launch("chat", "--system=Be brief.") == 0
    system = {"role": "system", "content": "Be brief."}
    chats = [asked for asked, _ in launch.runtime.asked if isinstance(asked, list)]
    assert chats == [[system, user("one")], [system, user("two")]]


def test_exit_leaves_before_the_rest(launch):
    launch.pipe("/exit\none\n")
    assert launch("chat") == 0
    assert not launch.runtime.asked


def test_an_unknown_slash_command_is_no_message(launch, capsys):
    launch.pipe("/exti\n")
    assert launch("chat") == 0
    assert not launch.runtime.asked
    assert "/exit and /reset" in capsys.readouterr().err


def test_a_refused_message_ends_a_piped_chat(launch, capsys):
    launch.pipe("bad\none\n")
    assert launch("chat") == 1
    assert capsys.readouterr().err == "millrace: bad is refused\n"


def test_a_refused_message_leaves_a_typed_chat_as_it_was(launch):
    launch.type("bad", "one")
    assert launch("chat") == 0
    chats = [asked for asked, _ in launch.runtime.asked if isinstance(asked, list)]
    assert chats[-1] == [user("one")]


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(launch):
    launch.runtime.interrupt_after = 1
    launch.type("one", "two")
    assert launch("chat") == 0
    chats = [asked for asked, _ in launch.runtime.asked if isinstance(asked, list)]
    assert chats == [[user("one")], [user("one"), assistant("    return"), user("two")]]


def test_ctrl_c_at_the_prompt_asks_again(launch, capsys):
    launch.type(KeyboardInterrupt, "one")
    assert launch("chat") == 0
    assert len([asked for asked, _ in launch.runtime.asked if isinstance(asked, list)]) == 1
    assert "/exit" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "own", "opens"), [(["--n=2"], 1, False), ([], 2, True)])
def test_several_replies_are_refused(launch, capsys, flags, own, opens):
    launch.runtime.default_sampling_params = launch.runtime.default_sampling_params.replace(n=own)
    launch.pipe("one\n")
    assert launch("chat", *flags) == 1
    assert "n must be 1; got 2" in capsys.readouterr().err
    assert (launch.runtime.closed, launch.runtime.asked) == (opens, [])


def test_a_piped_line_that_is_not_utf8_is_named_by_its_byte(launch, capsys):
    launch.pipe(b"one\ntw\xff\n")
    assert launch("chat") == 1
    assert "byte 6 (from 0) is 0xff" in capsys.readouterr().err
