"""An interpolated modified Kneser-Ney n-gram model over token ids: the baseline that a small
language model has to beat.

Chen and Goodman (1999), with the three discounts per order taken from the counts of counts. Every
document starts in a context of separators, so that no context crosses from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Order:
    """One order's tables; a key packs the ids of an n-gram, the oldest id in the highest bits."""

    keys: Ints
    count: Ints  # occurrences at the highest order, distinct left neighbours below it
    contexts: Ints  # keys >> bits
    total: Ints  # per context, the sum of count
    back: NDArray[np.float64]  # per context, the mass that goes to the next lower order
    discount: tuple[float, float, float]  # of counts 1, 2 and 3 or more


@dataclass(frozen=True)
class NGram:
    order: int
    separator: int
    vocab: int
    bits: int
    orders: tuple[_Order, ...]  # unigram first


def _windows(documents: Iterable[Sequence[int]], order: int, separator: int, bits: int) -> Ints:
    """The packed n-gram that ends at each token of each document and at the separator after it."""
    head = [separator] * (order - 1)
    stream: list[int] = []
    keep: list[bool] = []
    for ids in documents:
        stream += [*head, *ids, separator]
        keep += [False] * (order - 1) + [True] * (len(ids) + 1)
    ids_ = np.asarray(stream, dtype=np.int64)
    key = np.zeros_like(ids_)
    for back in range(order):
        key[back:] |= ids_[: len(ids_) - back] << (bits * back)
    chosen: Ints = key[np.asarray(keep)]
    return chosen


def _table(keys: Ints, count: Ints, bits: int) -> _Order:
    n1, n2, n3, n4 = (max(int((count == i).sum()), 1) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    low, mid, high = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    discount = (min(max(low, 0.1), 1.0), min(max(mid, 0.1), 2.0), min(max(high, 0.1), 3.0))
    contexts, start = np.unique(keys >> bits, return_index=True)
    total = np.add.reduceat(count, start)
    taken = np.asarray(discount)[np.minimum(count, 3) - 1]
    back = np.add.reduceat(taken, start) / total
    return _Order(keys, count, contexts, total, back, discount)


def fit(documents: Iterable[Sequence[int]], vocab: int, separator: int, order: int = 5) -> NGram:
    """The model of these documents (token ids, without separators)."""
    bits = (vocab - 1).bit_length()
    assert bits * order < 63
    keys, count = np.unique(_windows(documents, order, separator, bits), return_counts=True)
    orders = [_table(keys, count, bits)]
    for n in range(order - 1, 0, -1):
        keys, count = np.unique(keys & ((1 << (bits * n)) - 1), return_counts=True)
        orders.append(_table(keys, count, bits))
    return NGram(order, separator, vocab, bits, tuple(reversed(orders)))


def _find(table: Ints, keys: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def token_bits(model: NGram, documents: Iterable[Sequence[int]]) -> NDArray[np.float64]:
    """-log2 of the probability of each token of each document and of the separator after it."""
    windows = _windows(documents, model.order, model.separator, model.bits)
    p = np.full(len(windows), 1.0 / model.vocab)
    for n, t in enumerate(model.orders, start=1):
        keys = windows & ((1 << (model.bits * n)) - 1)
        at, seen = _find(t.keys, keys)
        where, known = _find(t.contexts, keys >> model.bits)
        count = np.where(seen, t.count[at], 0)
        taken = np.asarray((0.0, *t.discount))[np.minimum(count, 3)]
        p = np.where(known, (count - taken) / t.total[where] + t.back[where] * p, p)
    bits: NDArray[np.float64] = -np.log2(p)
    return bits


def bits(model: NGram, documents: Iterable[Sequence[int]]) -> float:
    """How many bits the model needs for these documents, the separator after each included."""
    return float(token_bits(model, documents).sum())
