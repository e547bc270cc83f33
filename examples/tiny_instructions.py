"""The instruction rows that come with the embedded model: questions about the world of
tiny_world.py, with their answers.

Every entity (a person, a town, an animal, a word, a sum, a day) is on one side only: what a
held-out row asks is asked in no row for training, in no wording. The knowledge is in the text that
the model learned from; the rows show how a question is put and how it is answered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import tiny_world as W
from tiny_world import NUMBERS, Slots, capital

Row = dict[str, list[dict[str, str]]]
Fact = tuple[tuple[str, ...], str]  # the wordings of a question, and the answer

_PERSON: tuple[Fact, ...] = (
    (
        ("Where does {n} live?", "In which town does {n} live?", "Where is the home of {n}?"),
        "{n} lives in {town}.",
    ),
    (("What is the work of {n}?", "What does {n} do?", "Which trade has {n}?"), "{n} is {a_job}."),
    (
        ("What pet has {n}?", "Which animal does {n} keep?", "What is the pet of {n}?"),
        "{n} keeps {a_pet}.",
    ),
    (
        ("Which colour does {n} like best?", "What is the favourite colour of {n}?"),
        "{n} likes {colour} best.",
    ),
    (
        ("What does {n} like to eat?", "What is the favourite food of {n}?"),
        "{n} likes to eat {food}.",
    ),
    (("Who is {n}?", "Tell me about {n}."), "{n} is the {job} from {town}."),
)
_TOWN: tuple[Fact, ...] = (
    (("What is {n} known for?", "Why is {n} famous?"), "{n} is known for its {known}."),
    (
        ("Which river flows through {n}?", "What is the river of {n}?"),
        "{n} lies on the river {river}.",
    ),
    (("Where is {n}?", "Where does {n} stand?"), "{n} stands {place}."),
    (
        ("When is the market in {n}?", "Which day is market day in {n}?"),
        "The market in {n} is on {market}.",
    ),
)
_ANIMAL: tuple[Fact, ...] = (
    (
        ("What is a young {n} called?", "What do you call the young of {a_n}?"),
        "{A_young} is a young {n}.",
    ),
    (("What does {a_n} eat?", "What is the food of {a_n}?"), "{A_n} eats {eats}."),
    (("Where does {a_n} sleep?", "Where is {a_n} at night?"), "{A_n} sleeps {sleeps}."),
    (("How many legs has {a_n}?", "On how many legs does {a_n} stand?"), "{A_n} has {legs} legs."),
)
_OPPOSITE: Fact = (
    ("What is the opposite of {a}?", "Which word is the opposite of {a}?"),
    "The opposite of {a} is {b}.",
)
_PLURAL: Fact = (
    ("What is the plural of {a}?", "How do we say more than one {a}?"),
    "The plural of {a} is {b}.",
)
_PAST: Fact = (
    ("What is the past of {a}?", "How do we say {a} in the past?"),
    "The past of {a} is {b}.",
)
_MORE: Fact = (
    ("What is more than {a}?", "Which word says more than {a}?"),
    "What is more than {a} is {b}.",
)
_KIND: Fact = (("What is {a}?", "What kind of thing is {a}?"), "{A} is {b}.")
_NEXT: Fact = (("What comes after {a}?", "Which one follows {a}?"), "After {a} comes {b}.")
_SUM: Fact = (("How much is {x} and {y}?", "What is {x} plus {y}?"), "{X} and {y} make {z}.")


def _pair(a: str, b: str) -> Slots:
    return {"a": a, "b": b, "A": capital(a)}


def _entities() -> Iterator[list[list[tuple[Fact, Slots]]]]:
    """Per kind of entity, every entity with all that can be asked about it."""
    world = W.world()
    yield [[(fact, person.slots()) for fact in _PERSON] for person in world.people]
    yield [[(fact, town.slots()) for fact in _TOWN] for town in world.towns]
    yield [[(fact, animal.slots()) for fact in _ANIMAL] for animal in W.ANIMALS]
    # A word and its opposite are one entity.
    yield [
        [(_OPPOSITE, _pair(a, b)), (_OPPOSITE, _pair(b, a))]
        for a, b in W.OPPOSITES.items()
        if a < b
    ]
    for fact, pairs in (
        (_PLURAL, W.PLURALS),
        (_PAST, W.PASTS),
        (_MORE, W.COMPARATIVES),
        (_KIND, W.KINDS),
    ):
        yield [[(fact, _pair(a, b))] for a, b in pairs.items()]
    yield [
        [(_NEXT, _pair(a, b))]
        for names in ([*W.DAYS, W.DAYS[0]], [*W.MONTHS, W.MONTHS[0]], NUMBERS)
        for a, b in zip(names, names[1:], strict=False)
    ]
    yield [
        [(_SUM, {"x": NUMBERS[x], "y": NUMBERS[y], "z": NUMBERS[x + y], "X": capital(NUMBERS[x])})]
        for x in range(1, 11)
        for y in range(1, 11)
    ]


def rows(train: int = 1200, held_out: int = 150) -> tuple[list[Row], list[Row]]:
    """The rows for training, and the held-out ones.

    A third of the entities of each kind is held out. In training a fact is asked in two wordings.
    """
    rng = random.Random(7)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for entities in _entities():
        rng.shuffle(entities)
        for i, facts in enumerate(entities):
            held = i % 3 == 0
            for (wordings, answer), slots in facts:
                for question in rng.sample(wordings, 1 if held else 2):
                    user = {"role": "user", "content": question.format(**slots)}
                    told = {"role": "assistant", "content": answer.format(**slots)}
                    sides[held].append({"messages": [user, told]})
    for side in sides:
        rng.shuffle(side)
    return sides[0][:train], sides[1][:held_out]
