"""Claims about when a process counts as standing still."""

from __future__ import annotations

from paceline.engine.elsewhere.stillness import Stillness


def test_who_uses_hardly_any_processor_stands_still_since_it_last_did() -> None:
    stillness = Stillness(10.0, 5.0)
    assert stillness.look(11.0, 5.9, is_excused=False) == 0.0
    assert stillness.look(12.0, 5.91, is_excused=False) == 1.0  # a hundredth: the link's threads
    assert stillness.look(14.0, 5.94, is_excused=False) == 3.0
    assert stillness.look(15.0, 6.5, is_excused=False) == 0.0
    assert stillness.look(16.0, 6.5, is_excused=False) == 1.0


def test_waiting_for_home_is_no_standing_still() -> None:
    stillness = Stillness(10.0, 5.0)
    assert stillness.look(40.0, 5.0, is_excused=True) == 0.0
    assert stillness.look(41.0, 5.0, is_excused=False) == 1.0
