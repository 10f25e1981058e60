from ffdist.pipeline.schedule import Evaluate, Position, Snapshot, Train, schedule


def picture(orders):
    signs = {Train: "T", Evaluate: "E", Snapshot: "S"}
    return " ".join(
        signs[type(order)] + (str(order.num_minibatches) if isinstance(order, Train) else "") for order in orders
    )


def a_schedule(**changes):
    shape = {
        "epochs": 3,
        "minibatches": 5,
        "chunk_size": 2,
        "validation_samples": 3,
        "test_samples": 4,
        "validate_every_epochs": 2,
    }
    return list(schedule(**(shape | changes), evaluation_block=2))


def test_schedule_is_cut_at_epoch_ends_and_evaluates_whole_splits():
    assert picture(a_schedule()) == "T2 T2 T1 T2 T2 T1 E E S T2 T2 T1 E E S E E"


def test_nothing_is_evaluated_before_the_end_without_validation_samples():
    assert picture(a_schedule(validation_samples=0)) == "T2 T2 T1 T2 T2 T1 T2 T2 T1 S E E"


def test_the_test_set_is_seen_once_at_the_end():
    tests = [order for order in a_schedule() if isinstance(order, Evaluate) and order.split == "test"]
    assert [(order.first, order.num_samples, order.last) for order in tests] == [(0, 2, False), (2, 2, True)]


def test_chunks_cover_every_minibatch_once_at_every_size():
    for chunk_size in (1, 2, 5, 9):
        chunks = [order for order in a_schedule(chunk_size=chunk_size) if isinstance(order, Train)]
        steps = [order.step + minibatch for order in chunks for minibatch in range(order.num_minibatches)]
        assert steps == list(range(15))
        assert {(order.epoch, order.lr_scale) for order in chunks} == {(0, 1), (1, 1), (2, 1 / 3)}


def test_greedy_layers_learn_one_after_the_other_each_with_its_own_fall_of_the_rate():
    chunks = [order for order in a_schedule(greedy_layers=2) if isinstance(order, Train)]
    by_epoch = sorted({(order.epoch, order.layer, order.lr_scale) for order in chunks})
    assert by_epoch == [(0, 0, 1), (1, 0, 1), (2, 0, 1 / 3), (3, 1, 1), (4, 1, 1), (5, 1, 1 / 3)]
    assert [order.step for order in chunks if order.first == 0] == [5 * epoch for epoch in range(6)]
    assert a_schedule(greedy_layers=2)[-3] == Snapshot(Position(6), 30)


def test_a_schedule_goes_on_from_any_place():
    assert picture(a_schedule(start=Position(1, 3))) == "T2 E E S T2 T2 T1 E E S E E"
    assert picture(a_schedule(start=Position(1, 5))) == "E E S T2 T2 T1 E E S E E"
    assert picture(a_schedule(start=Position(2, 0))) == "T2 T2 T1 E E S E E"
    assert picture(a_schedule(start=Position(3, 0))) == "E E"
    rest = [order.step for order in a_schedule(start=Position(1, 3), chunk_size=1) if isinstance(order, Train)]
    assert rest == list(range(8, 15))
