"""Claims about how an implementation is chosen."""

import dataclasses
import logging
from collections.abc import Callable

import pytest

from millrace.errors import KernelError
from millrace.pallas_kernels.dispatch import Implementation, KernelChoices, anywhere, choose


def refuses(reason: str) -> Callable[[object], str]:
    return lambda problem: reason


FAST = Implementation[object]("fast", max, refuses("wants a faster chip"))
EVEN = Implementation[object]("even", max, lambda problem: None if problem == 2 else "wants 2")
PLAIN = Implementation[object]("plain", max, anywhere)


def test_choose_takes_the_first_that_serves() -> None:
    assert choose("sum", [FAST, EVEN, PLAIN], 2) is EVEN
    assert choose("sum", [FAST, EVEN, PLAIN], 3) is PLAIN


def test_choose_names_every_reason_when_none_serves() -> None:
    with pytest.raises(KernelError, match="sum.*3.*fast: wants a faster chip; even: wants 2"):
        choose("sum", [FAST, EVEN], 3)


def test_a_named_implementation_that_cannot_serve_raises_its_reason() -> None:
    with pytest.raises(KernelError, match="fast: wants a faster chip"):
        choose("sum", [FAST, PLAIN], 3, "fast")


def test_a_named_implementation_is_taken_before_earlier_ones() -> None:
    assert choose("sum", [EVEN, PLAIN], 2, "plain") is PLAIN


def test_an_unknown_name_raises_with_the_known_ones() -> None:
    with pytest.raises(KernelError, match="sum has no implementation named 'quick'.*fast, plain"):
        choose("sum", [FAST, PLAIN], 3, "quick")


def test_choices_log_each_choice_once_with_what_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    kernels = KernelChoices("cpu")
    with caplog.at_level(logging.INFO):
        for problem in (3, 3, 5):
            assert kernels.choose("paged_attention", [FAST, PLAIN], problem) is PLAIN
    assert caplog.messages == ["paged_attention on cpu: plain (not fast: wants a faster chip)"]
    assert kernels.made == (("paged_attention", "plain"),)


def test_a_choice_for_another_reason_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    kernels = KernelChoices("cpu")
    with caplog.at_level(logging.INFO):
        for table in ([FAST, PLAIN], [EVEN, PLAIN], [FAST, PLAIN]):
            assert kernels.choose("paged_attention", table, 3) is PLAIN
    first, second = caplog.messages
    assert "(not fast: " in first and "(not even: " in second


def test_choices_follow_the_given_names() -> None:
    kernels = KernelChoices("cpu", {"grouped_matmul": "plain"})
    assert kernels.choose("grouped_matmul", [EVEN, PLAIN], 2) is PLAIN
    assert kernels.choose("paged_attention", [EVEN, PLAIN], 2) is EVEN


def test_choices_refuse_an_unknown_operation() -> None:
    with pytest.raises(KernelError, match="no operation 'attention'.*paged_attention"):
        KernelChoices("cpu", {"attention": "plain"})


def test_choices_refuse_an_unknown_platform() -> None:
    with pytest.raises(KernelError, match="'abacus'"):
        KernelChoices("abacus")  # type: ignore[arg-type]


def test_a_tuned_implementation_is_given_the_device_kind() -> None:
    tuned = Implementation("tuned", lambda x, *, device_kind: (x, device_kind), lambda problem: None, is_tuned=True)
    kernels = KernelChoices("gpu", device_kind="NVIDIA H200")
    assert kernels.choose("paged_attention", [tuned], 1).fn(3) == (3, "NVIDIA H200")
    assert kernels.choose("paged_attention", [tuned], 1).several is None
    tuned = dataclasses.replace(tuned, several=tuned.fn)
    several = kernels.choose("paged_attention", [tuned], 1).several
    assert several is not None
    assert several(3) == (3, "NVIDIA H200")
