"""Parts of the time add up to no more than all of it."""

import time

import torch

from vqhit.stopwatch import Stopwatch


def test_parts_are_added_up_and_waiting_is_one_of_them():
    watch = Stopwatch(torch.device("cpu"))

    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    for _ in watch.waiting(slow()):
        with watch.part("work"):
            time.sleep(0.01)
    watch.stop()
    seconds = watch.seconds
    assert 0.06 <= watch.parts["waiting for images"] < seconds
    assert 0.03 <= watch.parts["work"] < seconds
    assert sum(watch.parts.values()) <= seconds
    time.sleep(0.01)
    assert watch.seconds == seconds
