"""Blocks of a paged cache: nobody gets one that is held, none is lost, equal prefixes are found."""

from hypothesis import given
from hypothesis import strategies as st

from purelm.nn.blocks import Blocks, names


@given(
    count=st.integers(2, 12),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)), max_size=60),
)
def test_any_order_of_moves(count: int, moves: list[tuple[int, int, int]]) -> None:
    """Requests of few texts come, go, and are forgotten; a content is only found where it is."""
    blocks, running = Blocks(count), []
    content: dict[int, bytes] = {}
    for kind, length, text in moves:
        if kind < 2:
            named = names([text] * length, 1)
            known = blocks.match(named)
            assert [content[b] for b in known] == named[: len(known)]
            room, need = blocks.room, length - len(known)
            fresh = blocks.take(need)
            assert (fresh is None) == (need > room)
            if fresh is None:
                blocks.release(known)
                continue
            assert not {b for held, _ in running for b in held} & set(fresh)
            content.update(zip(fresh, named[len(known) :], strict=True))
            if kind == 0:
                blocks.name([*known, *fresh], named)
            running.append(([*known, *fresh], named))
        elif kind == 2 and running:
            blocks.release(running.pop(length % len(running))[0])
        elif length == 0:
            blocks.forget()
            assert not blocks.match(names([0], 1))
        elif text == 0:
            count += length
            blocks.grow(count)
        held = {b for held, _ in running for b in held}
        assert 0 not in held and blocks.held == len(held) and blocks.room == count - 1 - len(held)
    for held_, _ in running:
        blocks.release(held_)
    everything = blocks.take(count - 1)
    assert everything is not None and sorted(everything) == list(range(1, count))


def test_the_longest_idle_block_is_taken_first_and_ends_before_beginnings() -> None:
    blocks = Blocks(5)
    for text in ([1, 2], [3, 4]):
        taken = blocks.take(2)
        assert taken is not None
        blocks.name(taken, names(text, 1))
        blocks.release(taken)
    assert blocks.take(1) is not None
    kept = blocks.match(names([1, 2], 1))
    assert len(kept) == 1  # [1] stays, [1, 2] went
    assert len(blocks.match(names([3, 4], 1))) == 2


def test_names_are_of_the_whole_prefix() -> None:
    a, b = names([1, 2, 3, 4, 5], 2), names([9, 2, 3, 4], 2)
    assert len(a) == 2 and len(b) == 2 and not set(a) & set(b)
    assert names([1, 2, 3, 4], 2) == a and names([1], 2) == []
