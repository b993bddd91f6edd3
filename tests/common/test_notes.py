"""How far long work has come: said to whoever shows it, else in the log, and there not too often."""

from nalora_jax.common import notes


def test_a_listener_hears_everything_from_the_start():
    heard = []
    with notes.listening(lambda *given: heard.append(given)), notes.counting("evaluating", 3) as done:
        done(1)
        done(2)
    assert heard == [("evaluating", 0, 3), ("evaluating", 1, 3), ("evaluating", 3, 3)]
