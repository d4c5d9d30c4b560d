"""How many tokens `token_merge` merges."""

from __future__ import annotations

import pytest

from sparsiattn import InvalidOption
from sparsiattn.strategies import TokenMerge


@pytest.mark.parametrize(
    ("options", "tokens", "rate"),
    [
        ({}, 196, 9),
        ({}, 1369, 68),
        ({}, 20, 1),
        ({}, 19, 0),
        ({"r": 8}, 1369, 8),
        ({"r": 8}, 9, 4),
        ({"ratio": 0.75}, 100, 25),
        ({"method": "pitome"}, 196, 9),
    ],
)
def test_a_share_unless_a_number_is_given(
    options: dict[str, object], tokens: int, rate: int
) -> None:
    assert TokenMerge(**options).rate(tokens) == rate  # type: ignore[arg-type]


def test_by_default_as_many_tokens_go_through_twelve_blocks_as_by_the_old_number() -> None:
    carried = {}
    for strategy in (TokenMerge(), TokenMerge(r=8)):
        tokens, total = 196, 0
        for _ in range(12):
            tokens -= strategy.rate(tokens)
            total += tokens
        carried[strategy.r] = total
    assert carried[None] == pytest.approx(carried[8], rel=0.01)


def test_a_config_says_which_share_it_has() -> None:
    options = TokenMerge().to_dict()["options"]
    assert (options["r"], options["ratio"]) == (None, 0.95)
    assert TokenMerge.from_dict(TokenMerge().to_dict()) == TokenMerge(ratio=0.95)


def test_two_rates_are_refused() -> None:
    with pytest.raises(InvalidOption, match="only one of r and ratio"):
        TokenMerge(r=8, ratio=0.9)
