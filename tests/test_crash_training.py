"""A killed run goes on to the same bits; `make crash` kills a hundred."""

import random

from tests.crash_training import crashes


def test_killed_runs_go_on_from_the_newest_complete_checkpoint_to_the_same_bits(tmp_path):
    found = list(crashes(6, tmp_path, random.Random(0)))
    assert len(found) >= 6
    assert [fault for _, _, fault in found if fault] == []
