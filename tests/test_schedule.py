from ffdist.ff.schedules import lr_scales
from ffdist.pipeline.schedule import Evaluate, Position, Snapshot, Train, schedule


def format_commands(commands):
    letters = {Train: "T", Evaluate: "E", Snapshot: "S"}
    return " ".join(
        letters[type(command)] + (str(command.num_minibatches) if isinstance(command, Train) else "")
        for command in commands
    )


def make_schedule(**changes):
    defaults = {
        "lr_scales": lr_scales("hinton", 3),
        "minibatches": 5,
        "chunk_size": 2,
        "validation_samples": 3,
        "test_samples": 4,
        "validate_every_epochs": 2,
    }
    return list(schedule(**(defaults | changes), evaluation_block=2))


def test_schedule_splits_chunks_at_epoch_ends_and_evaluates_whole_splits():
    assert format_commands(make_schedule()) == "T2 T2 T1 T2 T2 T1 E E S T2 T2 T1 E E S E E"


def test_nothing_is_evaluated_before_the_end_without_validation_samples():
    assert format_commands(make_schedule(validation_samples=0)) == "T2 T2 T1 T2 T2 T1 T2 T2 T1 S E E"


def test_test_set_is_evaluated_once_at_the_end():
    evaluations = [command for command in make_schedule() if isinstance(command, Evaluate) and command.split == "test"]
    assert [(command.first, command.num_samples, command.last) for command in evaluations] == [
        (0, 2, False),
        (2, 2, True),
    ]


def test_chunks_of_any_size_cover_every_minibatch_once():
    for chunk_size in (1, 2, 5, 9):
        chunks = [command for command in make_schedule(chunk_size=chunk_size) if isinstance(command, Train)]
        steps = [command.step + minibatch for command in chunks for minibatch in range(command.num_minibatches)]
        assert steps == list(range(15))
        assert {(command.epoch, command.lr_scale) for command in chunks} == {(0, 1), (1, 1), (2, 1 / 3)}


def test_greedy_schedule_trains_layers_in_turn_each_with_its_own_learning_rate_decay():
    chunks = [command for command in make_schedule(greedy_layers=2) if isinstance(command, Train)]
    by_epoch = sorted({(command.epoch, command.layer, command.lr_scale) for command in chunks})
    assert by_epoch == [(0, 0, 1), (1, 0, 1), (2, 0, 1 / 3), (3, 1, 1), (4, 1, 1), (5, 1, 1 / 3)]
    assert [command.step for command in chunks if command.first == 0] == [5 * epoch for epoch in range(6)]
    assert make_schedule(greedy_layers=2)[-3] == Snapshot(Position(6), 30)


def test_schedule_resumes_from_any_position():
    assert format_commands(make_schedule(start=Position(1, 3))) == "T2 E E S T2 T2 T1 E E S E E"
    assert format_commands(make_schedule(start=Position(1, 5))) == "E E S T2 T2 T1 E E S E E"
    assert format_commands(make_schedule(start=Position(2, 0))) == "T2 T2 T1 E E S E E"
    assert format_commands(make_schedule(start=Position(3, 0))) == "E E"
    steps = [
        command.step for command in make_schedule(start=Position(1, 3), chunk_size=1) if isinstance(command, Train)
    ]
    assert steps == list(range(8, 15))
