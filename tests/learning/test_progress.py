from mbf_mlx.learning.progress import SaveClock


def test_saves_by_the_clock_take_at_most_two_hundredths_of_a_run():
    """A slow disk, or large factors: the next save waits until this one was worth it."""
    clock = SaveClock(None, 60, now=0)
    assert not clock.is_due(1, 59.9) and clock.is_due(1, 60)
    clock.saved(60, 60.5)
    assert not clock.is_due(2, 120.4) and clock.is_due(2, 120.5)
    now, saving = 120.5, 0.0
    for step in range(3, 2000):
        now += 10
        if clock.is_due(step, now):
            clock.saved(now, now + 7)
            now, saving = now + 7, saving + 7
    assert saving > 0 and saving <= 0.02 * now


def test_saves_by_steps_come_when_they_were_asked_for():
    clock = SaveClock(5, None, now=0)
    clock.saved(0, 1000)
    assert [step for step in range(1, 21) if clock.is_due(step, 1e9)] == [5, 10, 15, 20]
    assert not any(SaveClock(None, None, now=0).is_due(step, 1e9) for step in range(1, 21))
