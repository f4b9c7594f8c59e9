"""Prompts join a family only if each is the beginning of the longest, but for a short tail, images and all."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evovlm.engine.generate_families import MAX_MEMBERS, MAX_TAIL, Prompt, Task, families


def prompt(tokens: list[int], rows: tuple[int, ...] = (), tiles: float = 0.0, stride: float = 1.0) -> Prompt:
    return Prompt(
        np.array(tokens, dtype=np.int32),
        np.arange(len(tokens), dtype=np.float32) * stride,
        np.array(rows, dtype=np.int64),
        torch.full((1 if rows else 0, 3, 2, 2), tiles),
    )


def joined(*prompts: Prompt) -> list[int]:
    """Number of members of each family."""
    return [len(family.members) for family in families(Task(p, (0,)) for p in prompts)]


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(TOKENS, max_size=6))
def test_members_see_and_feed_just_their_own_tokens(texts: list[list[int]]) -> None:
    tasks = [Task(prompt(text), (number,)) for number, text in enumerate(texts)]
    found = list(families(tasks))
    assert [member.task for family in found for member in family.members] == tasks
    for family in found:
        whole = family.prompt.tokens.tolist()
        for member in family.members:
            assert 1 <= member.seen <= len(whole)
            assert len(member.tail) <= MAX_TAIL
            assert whole[: member.seen] + member.tail == member.task.prompt.tokens.tolist()
        assert any(member.task.prompt is family.prompt for member in family.members)


def test_prefixes_of_a_solution_are_one_family_in_any_order() -> None:
    whole = list(range(100, 160))
    cut = [whole[:20], [*whole[:30], 7], whole, whole[:50]]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        (family,) = families(Task(prompt(cut[i]), (0,)) for i in order)
        assert family.prompt.tokens.tolist() == whole
        assert {(member.seen, tuple(member.tail)) for member in family.members} == {
            (20, ()),
            (30, (7,)),
            (60, ()),
            (50, ()),
        }


def test_tails_are_short() -> None:
    whole = list(range(40))
    assert joined(prompt(whole), prompt(whole[:20] + [99] * MAX_TAIL)) == [2]
    assert joined(prompt(whole), prompt(whole[:20] + [99] * (MAX_TAIL + 1))) == [1, 1]
    # A longer prompt does not make an old one's tail too long, either.
    first, second = prompt([*range(10), *[99] * (MAX_TAIL + 1)]), prompt(whole)
    assert joined(first, second) == [1, 1]
    assert joined(prompt([5]), prompt([6])) == [1, 1]


def test_other_images_or_positions_do_not_join() -> None:
    whole = list(range(30))
    one = prompt(whole, (2, 3), tiles=1.0)
    assert joined(one, prompt(whole[:10], (2, 3), tiles=1.0)) == [2]
    assert joined(one, replace(one, tiles=one.tiles.clone())) == [2]
    assert joined(one, prompt(whole, (2, 3), tiles=2.0)) == [1, 1]
    assert joined(one, prompt(whole, (3, 4), tiles=1.0)) == [1, 1]
    assert joined(one, prompt(whole, (2, 3), tiles=1.0, stride=0.5)) == [1, 1]
    assert joined(one, prompt(whole)) == [1, 1]
    # An image in the tail would have to be fed as visual tokens.
    late = prompt(whole, (28, 29), tiles=1.0)
    assert joined(late, prompt([*whole[:27], 99, 98, 97], (28, 29), tiles=1.0)) == [1, 1]


def test_families_end() -> None:
    assert joined() == []
    assert joined(*[prompt([1, 2, 3])] * (MAX_MEMBERS + 3)) == [MAX_MEMBERS, 3]
