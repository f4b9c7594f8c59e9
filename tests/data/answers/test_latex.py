"""Mathematics is compared in a process of its own that cannot hang, spread, or touch this process's signals."""

import importlib.util
import signal
import threading

import pytest

from evovlm.data.answers.latex import LatexScorer

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@needs_math_verify
def test_equal_and_unequal_mathematics() -> None:
    with LatexScorer() as score:
        for prediction, truth, expected in [
            ("0.5", r"\frac{1}{2}", 1),
            (r"2\sqrt{2}", r"\sqrt{8}", 1),
            ("(x+1)^2", "x^2+2x+1", 1),
            (r"\{2, 1\}", r"\{1, 2\}", 1),
            ("x = 3", "3", 1),
            ("−3", "-3", 1),
            ("1,000", "1000", 1),
            (r"\frac{1}{3}", "0.5", 0),
            ("-3", "3", 0),
            ("x", "y", 0),
            (r"\frac{", "1", 0),
            ("", "1", 0),
            ("red", "Red", 1),
            ("cat", "tac", 0),  # words are no products of letters
            ("yes", "no", 0),
        ]:
            assert score(prediction, [truth]) == expected, (prediction, truth)
        assert score("0.5", ["2", r"\frac12"]) == 1
        assert score.num_given_up == 0


@needs_math_verify
def test_what_never_ends_is_given_up_and_the_next_comparison_works(caplog: pytest.LogCaptureFixture) -> None:
    with LatexScorer(cpu_seconds=1) as score:
        assert score(r"9^{9^{9^{9}}}", ["3"]) == 0
        assert score.num_given_up == 1
        assert "gave up comparing '9^{9^{9^{9}}}' with '3'" in caplog.text
        assert score(r"2\sqrt{2}", [r"\sqrt{8}"]) == 1
        assert score.num_given_up == 1


@needs_math_verify
def test_from_a_thread_and_without_this_process_signals() -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: called.append(1))
    try:
        mine = signal.getsignal(signal.SIGALRM)
        scores: list[float] = []
        with LatexScorer() as score:
            threads = [
                threading.Thread(target=lambda i=i: scores.append(score(rf"{i}\sqrt{{8}}", [rf"{2 * i}\sqrt{{2}}"])))  # type: ignore[misc]
                for i in (1, 5, 7)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert scores == [1, 1, 1]
        assert signal.getsignal(signal.SIGALRM) is mine
        assert called == []
    finally:
        signal.signal(signal.SIGALRM, before)


@needs_math_verify
def test_a_process_that_was_killed_is_replaced() -> None:
    with LatexScorer() as score:
        assert score(r"2\sqrt{2}", [r"\sqrt{8}"]) == 1
        process = score._process
        assert process is not None
        process.kill()
        process.wait()
        assert score(r"2\sqrt{2}", [r"\sqrt{8}"]) == 0
        assert score(r"2\sqrt{2}", [r"\sqrt{8}"]) == 1
        assert score._process is not process
    assert score._process is None


def test_without_math_verify_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs math-verify, which is not installed: pip install math-verify"):
        LatexScorer()
