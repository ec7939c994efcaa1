"""Gradients are summed in an order that all processes share, whatever the order in which each of them makes its own."""

from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from sftcli.training.distributed import gradient_exchange
from sftcli.training.distributed.gradient_exchange import GradientExchange
from sftcli.training.distributed.group import Group
from tests.support.processes import run_together

SHAPES = ((3, 2), (5,), (2, 2), (1,))  # in buckets of up to six numbers: the last two, then one each


def _exchange(group: Group) -> tuple[list[Parameter], GradientExchange]:
    gradient_exchange.BUCKET_NUMBERS = 6
    masters = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    return masters, GradientExchange(masters, group)


def _make(masters: list[Parameter], exchange: GradientExchange, places: list[int], value: float) -> None:
    exchange.begin()
    exchange.listen()
    for place in places:
        masters[place].grad = torch.full_like(masters[place], value)
        exchange.hear(masters[place])


def in_one_of_two(group: Group, orders: tuple[list[int], list[int]]) -> None:
    masters, exchange = _exchange(group)
    for step in (1, 2):
        own = orders[group.rank]
        _make(masters, exchange, own, group.rank + step)
        exchange.send_rest()
        exchange.finish()
        for place, master in enumerate(masters):
            expected = sum(rank + step for rank in range(2) if place in orders[rank])
            assert torch.equal(master.grad, torch.full_like(master, expected))
            master.grad = None
    assert group.exchanged_bytes == 2 * 4 * (6 + 5 + 4 + 1)


@pytest.mark.parametrize(
    "orders",
    [
        ([3, 2, 1, 0], [3, 2, 1, 0]),
        ([0, 1, 2, 3], [3, 2, 1, 0]),
        ([3, 2, 0], [2, 3, 1]),  # weights without a gradient in one of them
        ([3, 2, 1, 0], []),  # a process without a micro-batch
        ([3, 0], [3, 0]),  # or in both
    ],
    ids=["alike", "other-order", "some", "none", "unused"],
)
def test_each_gradient_is_the_sum_of_both_processes(
    tmp_path: Path, orders: tuple[list[int], list[int]]
) -> None:
    run_together(in_one_of_two, size=2, folder=tmp_path, args=(orders,))


def gives_up_in_the_middle(group: Group) -> None:
    masters, exchange = _exchange(group)
    _make(masters, exchange, [3, 2] if group.rank else [3, 2, 1, 0], 1.0)
    exchange.give_up()
    for master in masters:
        master.grad = None
    _make(masters, exchange, [3, 2, 1, 0], 1.0)
    exchange.send_rest()
    exchange.finish()
    assert all(torch.equal(master.grad, torch.full_like(master, 2.0)) for master in masters)


def test_a_step_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    run_together(gives_up_in_the_middle, size=2, folder=tmp_path)


def sends_while_others_are_made(group: Group) -> None:
    masters, exchange = _exchange(group)
    _make(masters, exchange, [3, 2], 1.0)
    sent = group.exchanged_bytes
    assert sent == 4 * (4 + 1)  # the first bucket is on its way, with the pass not over
    with pytest.raises(RuntimeError, match="grew after it was sent"):
        exchange.hear(masters[3])
    exchange.give_up()


def test_a_bucket_is_sent_as_soon_as_it_is_whole_and_never_again(tmp_path: Path) -> None:
    run_together(sends_while_others_are_made, size=2, folder=tmp_path)
