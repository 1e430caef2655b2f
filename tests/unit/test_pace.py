"""run.min_steps: how many questions a step asks where time is short. Every number by hand."""

import pytest

from alphamed.config.loading import build_config
from alphamed.errors import ConfigError
from alphamed.rollout.pace import Pace, step_questions


def config(**sections):
    tree = {
        "model": {"path": "m"},
        "data": {"train": ["d.jsonl"]},
        "run": {"steps": 24, "min_steps": 12, "time_limit_s": 800},
        "rollout": {"questions_per_step": 8},
    }
    return build_config(tree | {name: tree.get(name, {}) | values for name, values in sections.items()})


@pytest.mark.parametrize(
    ("wanted", "unit", "question_s", "left_s", "steps", "asked"),
    [
        (8, 1, 4.0, 700.0, 11, 8),  # 32 s a step, 63 s are there
        (8, 1, 20.0, 660.0, 11, 3),  # 60 s a step
        (8, 1, 20.0, 100.0, 11, 2),  # never fewer than two
        (8, 2, 20.0, 1100.0, 11, 4),  # 100 s: five, of which two updates take four
        (8, 4, 20.0, 100.0, 11, 4),
        (8, 1, 20.0, 0.0, 0, 2),
        (1, 1, 1.0, 100.0, 1, 1),
    ],
)
def test_questions_of_a_step_that_there_is_time_for(wanted, unit, question_s, left_s, steps, asked):
    assert step_questions(wanted, unit, question_s, left_s, steps) == asked


class Machine:
    """A step takes `fixed` seconds and so many for each question."""

    def __init__(self, question_s, fixed=0.0, **sections):
        self.now, self.question_s, self.fixed, self.notes = 0.0, question_s, fixed, []
        self.pace = Pace(config(**sections), 800.0, self.notes.append, clock=lambda: self.now)

    def run(self):
        """Sizes of the steps that begin before the time is up, as Run.steps lets them."""
        sizes = []
        while self.now < 800.0 and len(sizes) < 24:
            sizes.append(self.pace.questions(len(sizes) + 1))
            self.now += self.fixed + self.question_s * sizes[-1]
        return sizes


def test_a_fast_machine_asks_all():
    machine = Machine(question_s=4.0)
    assert machine.run() == [8] * 24 and machine.notes == []


@pytest.mark.parametrize(("question_s", "fixed"), [(15.0, 0.0), (20.0, 5.0), (22.0, 5.0)])
def test_a_slow_machine_still_takes_the_steps_that_were_wanted(question_s, fixed):
    sizes = Machine(question_s, fixed).run()
    assert len(sizes) >= 12 and sizes[0] == 8 and min(sizes) >= 2


def test_what_is_left_out_is_printed_once_for_each_change():
    machine = Machine(question_s=20.0)
    machine.run()
    assert machine.notes[0] == (
        "run.min_steps: step 1 took 160 s with 8 questions, 640 s are left for 11 more steps; "
        "a step now asks 2 questions of 8"
    )  # 58 s a step, 20 s a question
    assert len(machine.notes) == len(set(machine.notes))


def test_an_evaluation_that_had_no_time_for_its_questions_shortens_the_first_step():
    machine = Machine(question_s=10.0)
    machine.pace.evaluated(100, 200)
    assert machine.pace.questions(1) == 4
    assert machine.notes == [
        "run.min_steps: an evaluation had time for 100 of 200 questions; a step now asks 4 questions of 8"
    ]
    machine.now = 40.0  # 10 s a question, 69 s a step: 6
    assert machine.pace.questions(2) == 6
    machine.pace.evaluated(10, 200)  # of a later evaluation nothing follows
    assert machine.pace.questions(3) == 8


def test_sizes_keep_what_updates_and_data_ranks_need():
    machine = Machine(question_s=50.0, algorithm={"mini_batches": 2}, parallel={"data": 2})
    assert set(machine.run()) == {8, 4}


@pytest.mark.parametrize("sections", [{"rollout": {"max_staleness": 1}}, {"rollout": {"deterministic": True}}])
def test_where_steps_can_not_be_sized_min_steps_is_refused(sections):
    with pytest.raises(
        ConfigError, match="run.min_steps: 12 sizes steps by their time, which rollout.* set run.min_steps=null"
    ):
        config(**sections)
    assert not config(**sections, run={"time_limit_s": None}).sizes_steps
    assert not config(rollout={"replay": "runs/x"}).sizes_steps
