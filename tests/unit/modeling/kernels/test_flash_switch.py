"""Newer flash attention is taken only where it is seen to compute the same; here on a CPU, with stand-ins for the packages."""

from dataclasses import replace

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import _registry

from sftcli.modeling.kernels.flash_switch import switch_back, switch_flash, switched_to
from sftcli.modeling.kernels.varlen import Asked
from tests.support.varlen import kernel_of

pytestmark = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="torch 2.10 cannot switch back"
)
CPU = torch.device("cpu")
PLAIN = Asked(dtype=torch.float32, heads=4, key_heads=2, head_dim=16, value_dim=16)
WINDOWED = replace(PLAIN, window=4096, scale=0.5)


class Handle:
    def remove(self):
        pass


@pytest.fixture
def install(monkeypatch):
    """Return what installs a stand-in for a package: how it changes what the kernel is asked, or the error that it raises."""
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", {})
    made = {}

    def add(name, change):
        def register():
            if isinstance(change, Exception):
                raise change
            return Handle()

        made[name] = change
        attention.register_flash_attention_impl(name, register_fn=register)

    def kernel(card=(9, 0)):
        own = kernel_of("2.12")

        def attend(*rows, **told):
            change = made.get(attention.current_flash_attention_impl())
            return change(own.function, rows, told) if change else own.function(*rows, **told)

        return replace(own, function=attend, capability=card)

    add.kernel = kernel
    yield add
    switch_back()


def same(attend, rows, told):
    return attend(*rows, **told) * (1 + 1e-4)


def without_windows(attend, rows, told):
    return attend(*rows, **(told | {"window_size": (-1, 0)}))


def without_scale(attend, rows, told):
    return attend(*rows, **(told | {"scale": None}))


def of_wrong_groups(attend, rows, told):
    query, key, value, *rest = rows
    return attend(query, key.flip(1), value, *rest, **told)


def with_wrong_gradients(attend, rows, told):
    made = attend(*rows, **told)
    return made.detach() + (made - made.detach()) * 1.1


def fails(attend, rows, told):
    raise RuntimeError("no kernel image\nis available")


def test_what_computes_the_same_is_taken(install):
    install("FA3", same)
    assert switch_flash(install.kernel(), [PLAIN, WINDOWED], CPU) == ()
    assert switched_to() == "fa3"
    switch_back()
    assert switched_to() is None


@pytest.mark.parametrize(
    "change", [without_windows, without_scale, of_wrong_groups, with_wrong_gradients, fails]
)
def test_what_computes_something_else_is_not_taken_and_named(install, change):
    install("FA3", change)
    (refused,) = switch_flash(install.kernel(), [PLAIN, WINDOWED], CPU)
    assert switched_to() is None
    assert refused.name == "FA3"
    assert refused.why == (
        "RuntimeError: no kernel image" if change is fails else "its results differ from those of torch's own"
    )


def test_what_is_not_installed_is_not_spoken_of(install):
    install("FA3", ModuleNotFoundError("No module named 'flash_attn_interface'"))
    assert switch_flash(install.kernel(), [PLAIN], CPU) == ()
    assert switched_to() is None


def test_the_next_one_is_taken_where_the_first_is_not_there_or_wrong(install):
    install("FA3", without_windows)
    install("FA4", same)
    (refused,) = switch_flash(install.kernel(), [WINDOWED], CPU)
    assert (refused.name, switched_to()) == ("FA3", "fa4")


@pytest.mark.parametrize(
    ("card", "taken"), [((8, 0), None), ((9, 0), "fa3"), ((10, 0), "fa4"), ((12, 0), None)]
)
def test_a_card_gets_what_was_made_for_it(install, card, taken):
    install("FA3", same)
    install("FA4", same)
    assert switch_flash(install.kernel(card), [PLAIN], CPU) == ()
    assert switched_to() == taken


@pytest.mark.parametrize(
    ("recorded", "taken"), [("varlen", None), ("varlen fa4", "fa4"), ("by document", None)]
)
def test_a_run_that_goes_on_takes_what_it_had(install, recorded, taken):
    install("FA3", same)
    install("FA4", same)
    switch_flash(install.kernel(), [PLAIN], CPU, recorded=recorded)
    assert switched_to() == taken
