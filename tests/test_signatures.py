"""What a call of a region depends on: whatever changes it is noticed, whatever does not is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memfit.integrations.signatures import Reader, Unreadable


class Leaf(nn.Module):
    """Holds numbers, and things that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.first: Any = None
        self.second: Any = 2
        self.cache: Any = None
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", None)


def region() -> nn.Sequential:
    return nn.Sequential(Leaf(), nn.Sequential(nn.Dropout(0.1), Leaf()))


def key(reader: Reader, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return reader.enter(module, args or (torch.ones(2),), kwargs).key


def moves_a_number(leaf: Any) -> None:
    leaf.first, leaf.second = leaf.second, leaf.first


def renames(leaf: Any) -> None:
    del leaf.scale
    leaf.other = 1.0


CHANGES: dict[str, Callable[[Any], object]] = {
    "a value": lambda leaf: setattr(leaf, "scale", 2.0),
    "a type": lambda leaf: setattr(leaf, "scale", True),
    "none to a number": lambda leaf: setattr(leaf, "first", 0.5),
    "which holds a number": moves_a_number,
    "a new number": lambda leaf: setattr(leaf, "new", 1),
    "a name": renames,
    "mode": lambda leaf: leaf.eval(),
    "a frozen parameter": lambda leaf: leaf.weight.requires_grad_(False),
    "a new parameter": lambda leaf: setattr(leaf, "bias", nn.Parameter(torch.ones(2))),
    "a buffer": lambda leaf: setattr(leaf, "mask", torch.ones(2)),
    "a new child": lambda leaf: setattr(leaf, "child", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_module_is_noticed(change: str) -> None:
    reader, module = Reader(), region()
    before = key(reader, module)
    assert key(reader, module) == before
    leaf = module.get_submodule("1.1")
    CHANGES[change](leaf)
    changed = key(reader, module)
    assert changed != before
    assert key(reader, module) == changed == key(Reader(), module)


def test_another_child_is_noticed() -> None:
    reader, module = Reader(), region()
    before = key(reader, module)
    module.set_submodule("1.0", nn.Dropout(0.2))
    assert key(reader, module) != before
    module.set_submodule("1.0", nn.Dropout(0.1))
    assert key(reader, module) == before


def test_what_is_no_number_changes_nothing() -> None:
    reader, module = Reader(), region()
    before = key(reader, module)
    for cache in (torch.ones(1), [1.0], None):
        module.get_submodule("1.1").cache = cache  # type: ignore[assignment]
        assert key(reader, module) == before
    module[0].register_forward_hook(lambda *_: None)
    module[0].weight = nn.Parameter(torch.zeros(2))
    assert key(reader, module) == before


def test_a_change_of_the_arguments_is_noticed() -> None:
    reader, module = Reader(), region()
    base = torch.ones(4, 4)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((base,), {}),
        ((base.t()[:2],), {}),
        ((base[:2],), {}),
        ((base.double(),), {}),
        ((base.clone().requires_grad_(),), {}),
        ((base, base), {}),
        ((base, base.clone()), {}),
        ((base[:2], base[2:]), {}),
        ((base, None), {}),
        (([base],), {}),
        ((base,), {"use": True}),
        ((base,), {"use": 1}),
        ((base,), {"used": True}),
    ]
    keys = [key(reader, module, *args, **kwargs) for args, kwargs in calls]
    assert len(set(keys)) == len(keys)
    assert keys == [key(reader, module, *args, **kwargs) for args, kwargs in calls]


def test_places_are_those_of_modules_that_occur_twice_once() -> None:
    leaf = Leaf()
    module = nn.Sequential(leaf, leaf)
    places = Reader().enter(module, (), {}).places
    assert [(held is leaf._parameters, name) for held, name in places] == [(True, "weight")]
    module.append(module)  # a cycle
    assert Reader().enter(module, (), {}).places == places


def test_sparse_parameters_are_refused() -> None:
    module = region()
    reader = Reader()
    key(reader, module)
    module[0].weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(Unreadable, match="its weight is a tensor of layout"):
        key(reader, module)
