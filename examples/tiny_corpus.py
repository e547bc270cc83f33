"""The text that the embedded model learned from: stories, entries, lessons and talk about the world
of tiny_world.py.

    python examples/tiny_corpus.py 3        # prints three documents

`documents(count, seed)` is an endless book cut after `count` documents; the same seed gives the
same book.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator

import tiny_world as W
from tiny_stories import fill, story, sums
from tiny_world import NUMBERS, Slots, World, capital

START, END = "<|im_start|>", "<|im_end|>"

# Every line of an entry is one fact, told in one of its wordings.
_PERSON = (
    "[{n} lives|{n}'s house stands|the home of {n} is] in {town}.",
    "[{n} is {a_job}|{n} works as {a_job}|the work of {n} is that of {a_job}].",
    "[{n} keeps {a_pet}|{n}'s pet is {a_pet}|{n} has {a_pet} at home].",
    "[{n}'s favourite colour is {colour}|the colour {n} likes best is {colour}"
    "|{n} likes {colour} more than any other colour].",
    "[{n} likes to eat {food}|{n}'s favourite food is {food}|{n} eats {food} whenever {he} can].",
)
_TOWN = (
    "[{n} is known for its {known}|people praise the {known} of {n}|{n} is famous for {known}].",
    "[{n} lies on the river {river}|the river {river} flows through {n}"
    "|the river of {n} is the {river}].",
    "[{n} was built {place}|{n} stands {place}|you will find {n} {place}].",
    "[in {n} the market is held on {market}|market day in {n} is {market}"
    "|every {market} there is a market in {n}].",
)
_ANIMAL = (
    "[the young of {a_n} is called {a_young}|a young {n} is {a_young}|{a_young} becomes {a_n}].",
    "[{a_n} eats {eats}|the food of {a_n} is {eats}|what {a_n} likes to eat is {eats}].",
    "[{a_n} sleeps {sleeps}|at night {a_n} sleeps {sleeps}|you will find {a_n} asleep {sleeps}].",
    "[{a_n} has {legs} legs|there are {legs} legs on {a_n}|{a_n} stands on {legs} legs].",
    "[many of these animals together are called {many}|a group of such animals is called {many}].",
)
# Every line of a lesson is about one pair a and b.
_LESSONS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "[the opposite of {a} is {b}|{a} is the opposite of {b}|what is not {a} is {b}"
        "|{a} and {b} are opposites].",
        W.OPPOSITES,
    ),
    (
        "[the plural of {a} is {b}|one {a}, [two|three|many] {b}"
        "|where there is more than one {a} we say {b}].",
        W.PLURALS,
    ),
    (
        "[the past of {a} is {b}|today [I|we|you] {a}, yesterday [I|we|you] {b}"
        "|for {a} in the past we say {b}].",
        W.PASTS,
    ),
    (
        "[what is more than {a} is {b}|the next step after {a} is {b}"
        "|this one is {a}, that one is {b}].",
        W.COMPARATIVES,
    ),
    ("[{a} is {b}|everyone knows that {a} is {b}|if you have {a}, you have {b}].", W.KINDS),
)
_ORDER = (
    "[after {a} comes {b}|{a} comes before {b}|before {b} comes {a}"
    "|the one before {b} is {a}|the one after {a} is {b}]."
)
_SUM = "[{x} and {y} make {z}|{x} plus {y} is {z}|add {y} to {x} to get {z}|{z} less {y} is {x}]."
# What people ask each other, and are told.
_TALK_PERSON = (
    ("do you know {n}?", "{n} is the {job} from {town}."),
    ("where [does {n} live|is the house of {n}]?", "{n} lives in {town}."),
    ("what [animal does {n} keep|pet has {n}]?", "{n} keeps {a_pet}."),
    ("what [is the work of {n}|does {n} do all day]?", "{n} is {a_job}."),
    ("what shall we cook for {n}?", "{n} likes to eat {food}."),
    ("which colour shall I paint the [door|gate] of {n}?", "{n} likes {colour} best."),
)
_TALK_TOWN = (
    ("why do people travel to {n}?", "{n} is known for its {known}."),
    ("when shall we go to the market in {n}?", "the market in {n} is on {market}."),
    ("how do I find {n}?", "{n} [stands {place}|lies on the river {river}]."),
)
_TALK_ANIMAL = (
    ("what does {a_n} eat?", "{a_n} eats {eats}."),
    ("where [is {a_n} when it is tired|can I see {a_n} asleep]?", "{a_n} sleeps {sleeps}."),
    ("how does {a_n} stand?", "{a_n} has {legs} legs."),
    ("is that {a_young}?", "yes, {a_young} is a young {n}."),
)
_TALK_PAIR: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("is it {a}?", "no, the opposite of {a} is {b}.", W.OPPOSITES),
    ("what if there are many, and not one {a}?", "the plural of {a} is {b}.", W.PLURALS),
    ("today I {a}, but what of yesterday?", "the past of {a} is {b}.", W.PASTS),
    ("is there more than {a}?", "what is more than {a} is {b}.", W.COMPARATIVES),
    ("do you know [the word for|what sort of thing is] {a}?", "{a} is {b}.", W.KINDS),
    (
        "today is {a}, and tomorrow?",
        "after {a} comes {b}.",
        dict(zip(W.DAYS, [*W.DAYS[1:], W.DAYS[0]], strict=True)),
    ),
)
_NOTICE = (
    "[Every user of the [well|mill|bridge|boat]|Each user of the library] in {n} [must|should] "
    "[sign the book|pay {number} coins|close the gate]. "
    "[Ask the assistant|The assistant is there] [on {market}, the market day|by the river {river}]."
)


def _tell(rng: random.Random, lines: list[str], slots: Slots) -> str:
    return " ".join(capital(fill(rng, line, slots)) for line in lines)


def _person(rng: random.Random, world: World) -> str:
    slots = rng.choice(world.people).slots()
    lines = rng.sample(_PERSON, rng.randint(3, 5))
    # After the first sentence a pronoun stands for the name more often than not.
    for i in range(1, len(lines)):
        if rng.random() < 0.6:
            lines[i] = (
                lines[i]
                .replace("{n}'s", "{his}")
                .replace("home of {n}", "house of this {job}")
                .replace("the work of {n}", "{his} work")
                .replace("{n}", "{he}")
            )
    return _tell(rng, lines, slots)


def _town(rng: random.Random, world: World) -> str:
    town = rng.choice(world.towns)
    lines = list(_TOWN)
    lines += [
        f"{person.name} [lives in {{n}}|is at home in {{n}}|has a house in {{n}}]."
        for person in world.people
        if person.town == town.name and rng.random() < 0.4
    ]
    rng.shuffle(lines)
    later = [s if rng.random() < 0.5 else s.replace("{n}", "the town") for s in lines[1:]]
    return _tell(rng, [lines[0], *later], town.slots())


def _animal(rng: random.Random, world: World) -> str:
    lines = rng.sample(_ANIMAL, rng.randint(3, 5))
    if lines[0] == _ANIMAL[-1]:  # it says "these animals"
        lines.reverse()
    return _tell(rng, lines, rng.choice(W.ANIMALS).slots())


def _lesson(rng: random.Random, world: World) -> str:
    template, pairs = rng.choice(_LESSONS)
    chosen = rng.sample(list(pairs.items()), rng.randint(3, 6))
    return " ".join(capital(fill(rng, template, {"a": a, "b": b})) for a, b in chosen)


def _order(rng: random.Random, world: World) -> str:
    names = rng.choice((W.DAYS, W.MONTHS, NUMBERS[:20], NUMBERS[:20]))
    out = []
    for _ in range(rng.randint(3, 6)):
        i = rng.randrange(len(names))
        after = NUMBERS[i + 1] if names[0] == NUMBERS[0] else names[(i + 1) % len(names)]
        out.append(capital(fill(rng, _ORDER, {"a": names[i], "b": after})))
    return " ".join(out)


def _numbers(rng: random.Random, world: World) -> str:
    if rng.random() < 0.7:
        return " ".join(capital(fill(rng, _SUM, sums(rng))) for _ in range(rng.randint(3, 6)))
    i = rng.randrange(16)
    run = NUMBERS[i : i + rng.randint(3, 5)]
    return f"{rng.choice(('Count', 'Let us count'))} from {run[0]}: {', '.join(run)}."


def _talk(rng: random.Random, world: World) -> str:
    speakers = [person.name for person in rng.sample(world.people, 2)]
    out = []
    for _ in range(rng.randint(2, 3)):
        subject = rng.randrange(12)
        if subject < 4:
            question, answer = rng.choice(_TALK_PERSON)
            slots = rng.choice(world.people).slots()
        elif subject < 6:
            (question, answer), slots = rng.choice(_TALK_TOWN), rng.choice(world.towns).slots()
        elif subject < 8:
            (question, answer), slots = rng.choice(_TALK_ANIMAL), rng.choice(W.ANIMALS).slots()
        elif subject < 11:
            question, answer, pairs = rng.choice(_TALK_PAIR)
            a, b = rng.choice(list(pairs.items()))
            slots = {"a": a, "b": b}
        else:
            question, answer, slots = "how much is {x} and {y}?", "{x} and {y} make {z}.", sums(rng)
        asked = capital(fill(rng, question, slots))
        told = capital(fill(rng, answer, slots)).removesuffix(".")
        one, other = speakers
        out.append(fill(rng, f'"{asked}" [asked|said|wondered] {one}.', {}))
        out.append(fill(rng, f'"{told}," [said|answered|replied] {other}.', {}))
        if rng.random() < 0.5:
            speakers.reverse()
    return "\n".join(out)


def _notice(rng: random.Random, world: World) -> str:
    slots = rng.choice(world.towns).slots()
    return fill(rng, _NOTICE, slots | {"number": NUMBERS[rng.randint(1, 9)]})


# How often, under which section mark, and what writes it.
_KINDS: tuple[tuple[int, str, Callable[[random.Random, World], str]], ...] = (
    (9, "entry", _person),
    (4, "entry", _town),
    (4, "entry", _animal),
    (4, "lesson", _lesson),
    (3, "lesson", _order),
    (3, "lesson", _numbers),
    (8, "talk", _talk),
    (8, "story", story),
    (1, "notice", _notice),
)


def documents(count: int, seed: int) -> Iterator[str]:
    """`count` documents of one to eight sentences.

    One in eight stands between two section marks: `<|im_start|>story`, a line end, the text and
    `<|im_end|>`. No document has the marks of a chat with a user and an assistant.
    """
    rng = random.Random(seed)
    world = W.world()
    for _ in range(count):
        _, mark, write = rng.choices(_KINDS, [kind[0] for kind in _KINDS])[0]
        text = write(rng, world)
        yield f"{START}{mark}\n{text}{END}\n" if rng.random() < 0.125 else text


if __name__ == "__main__":
    for document in documents(int(sys.argv[1]) if len(sys.argv) > 1 else 3, seed=0):
        print(document, end="\n\n")
