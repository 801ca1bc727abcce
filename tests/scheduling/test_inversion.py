from __future__ import annotations

from kvswitch.scheduling import FixedPolicy, InversionMeter, PriorityScheduler


def scheduler_of(slots: int = 2, **settings: int) -> PriorityScheduler:
    return PriorityScheduler(
        FixedPolicy(), blocks=100, slots=slots, **{"epoch": 10, "quantum": 9} | settings
    )


def observed(meter: InversionMeter) -> tuple[float, float]:
    return meter.seconds, meter.request_seconds


def test_nothing_is_inverted_where_the_highest_run() -> None:
    scheduler, meter = scheduler_of(), InversionMeter()
    meter.observe(1.0, scheduler)
    for name, priority in [("a", 2), ("b", 1), ("equal", 1), ("low", 0)]:
        scheduler.add(name, need=1, priority=priority)
    meter.observe(1.0, scheduler)  # nobody runs yet
    scheduler.schedule(100)
    meter.observe(1.0, scheduler)
    assert observed(meter) == (0, 0)


def test_time_counts_while_anyone_waits_for_a_lower_one_and_once_for_each_who_does() -> None:
    scheduler, meter = scheduler_of(), InversionMeter()
    scheduler.add("a", need=1, priority=2)
    scheduler.add("b", need=1, priority=1)
    scheduler.schedule(100)
    scheduler.add("c", need=1, priority=3, swapped=True)
    scheduler.add("d", need=1, priority=2)
    scheduler.add("e", need=1, priority=1)
    assert scheduler.inverted == 2  # c and d wait for b; e waits for its equal
    meter.observe(0.5, scheduler)
    scheduler.schedule(98)  # the quantum holds
    meter.observe(0.25, scheduler)
    assert observed(meter) == (0.75, 1.5)


def test_it_ends_with_the_switch_a_new_priority_or_a_departure() -> None:
    for end in (
        lambda s: [s.schedule(99) for _ in range(9)],
        lambda s: s.set_priority("high", 1),
        lambda s: s.set_priority("low", 2),
        lambda s: s.remove("high"),
        lambda s: s.remove("low"),
        lambda s: s.yielded("low"),
    ):
        scheduler, meter = scheduler_of(slots=1), InversionMeter()
        scheduler.add("low", need=1, priority=1)
        scheduler.schedule(100)
        scheduler.add("high", need=1, priority=2)
        meter.observe(1.0, scheduler)
        end(scheduler)
        meter.observe(1.0, scheduler)
        assert observed(meter) == (1.0, 1.0)
        scheduler.check_integrity()


def test_who_was_deferred_waits() -> None:
    scheduler, meter = scheduler_of(), InversionMeter()
    scheduler.add("low", need=1, priority=1)
    scheduler.add("high", need=1, priority=2)
    scheduler.schedule(100)
    meter.observe(1.0, scheduler)
    scheduler.deferred("high")
    meter.observe(1.0, scheduler)
    assert observed(meter) == (1.0, 1.0)
