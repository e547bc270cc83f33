"""The stories of the embedded model's corpus: an opening, a plot and a close, in which things stay
what they were: a name, a colour, a number of apples comes back lines later.

In a template `[a|b]` stands for one of its alternatives, drawn anew each time (they may be nested),
and `{slot}` for what the story is about.
"""

from __future__ import annotations

import random
import re

from tiny_world import ANIMALS, COLOURS, DAYS, MONTHS, NUMBERS, Slots, World, article, capital

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_THINGS = "kite hat lamp boat drum cart cup book ring map bell coat key box".split()
_COUNTED = "apples pears eggs shells nails candles stones feathers letters keys".split()

_OPEN = (
    "[One [morning|evening|{day}]|On {day}|Early one {day}|Late in {month}|One day in {month}], "
    "{n}, the {job} [of|from] {town}, [went|walked|set out|hurried] [to|towards] {other}.",
    "{n} the {job} [lived in {town}|had a small house in {town}] with {his} {pet}. "
    "[One {day}|In {month}|One day] {he} [went|walked|rode] to {other}.",
    "[It was {day} and|It was {month}, and] {n} [could not sleep|was in good spirits|had no work]. "
    "So the {job} [left {town} and went|took {his} {pet} and walked] to {other}.",
)
_PLOTS = (
    # a gift
    "There {he} [bought|found|was given] {a_new} {thing}. "
    "On the way home {he} met {m}, the {m_job} from {m_town}. "
    '"[What a fine|I have never seen such a|Where did you get that] {new} {thing}," said {m}. '
    "[{n} smiled and gave {m_him} the {thing}|{n} would not sell it, but they became friends"
    "|In the end {n} let {m_him} have the {thing} for {some} {counted}].",
    # a sum
    "At the market {he} bought {x} {counted}. "
    "[Then|At the gate|A little later] {m} came by and gave {him} {y} more. "
    "Now {n} had {z} {counted}[, and that was enough for everyone"
    "|. {He} counted them twice, and there were {z}| to carry home].",
    # a difference
    "{n} had {z} {counted} in {his} [bag|basket]. "
    "{m} [asked for|needed] some, so {he} gave {m_him} {y} and kept {x}. "
    '"{X} {counted} are enough for me," said {n}.',
    # a lost animal
    "[There|By the road|Under the bridge] {he} saw {a_animal}, [lost and hungry|wet and tired"
    "|alone in the rain]. {n} gave it {eats}, for that is what {a_animal} eats. "
    "{m} [helped|came to help], and together they brought it home, where it could sleep {sleeps}.",
    # a lost thing
    "{m} was waiting there with {a_new} {thing}. "
    '"[Is this yours|Did you lose this|Do you know this {thing}]?" {m_he} asked. '
    '"[Yes|Thank you], I looked for my {thing} everywhere," said {n}. '
    "[They|The two of them] [ate {food} together|shared some {food}], "
    "because {n} [liked {food} best|liked {food} more than anything else].",
    # a thing mended
    "The {thing} of {m} was broken, and {m_he} was [sad|angry]. "
    '"[Do not worry|Be calm]," said {n}. "I will [mend it|make it new] and paint it {colour}." '
    "{Colour} [is|was] the colour {n} liked best. "
    "[By evening|After {some} hours] the {thing} was {colour} and as good as new.",
    # a runaway
    "{He} wanted to see the {known} of {other}, for the town is known for its {known}. "
    "But the {pet} [ran away|hid under a [cart|table|bench|bush]]. {m} [found|caught] the {pet} "
    "[near the river {river}|on the bank of the {river}] and brought it back. "
    "{n} thanked {m_him} with {some} {counted}.",
)
_CLOSE = (
    "[That night|In the evening] {n} "
    "[slept well in {town}|was back in {town}|told {his} {pet} all about it].",
    "From that day on {n} and {m} were [good friends|never apart for long].",
    "[And that is why|So that is how] {m} [still speaks of|came to know] the {job} from {town}.",
    "",
)


def fill(rng: random.Random, template: str, slots: Slots) -> str:
    """The template with every `[a|b]` replaced by one of its alternatives, then every slot."""
    while "[" in template:
        template = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template)
    return template.format(**slots)


def sums(rng: random.Random) -> Slots:
    """x and y from one to ten, and z, what they make, in words."""
    x, y = rng.randint(1, 10), rng.randint(1, 10)
    return {"x": NUMBERS[x], "y": NUMBERS[y], "z": NUMBERS[x + y], "X": capital(NUMBERS[x])}


def story(rng: random.Random, world: World) -> str:
    """A story of four to eight sentences about two people of the world."""
    one, other = rng.sample(world.people, 2)
    place = rng.choice([town for town in world.towns if town.name != one.town])
    animal = rng.choice([animal for animal in ANIMALS if animal.legs != "no"])
    slots = one.slots() | {f"m_{key}": value for key, value in other.slots().items()}
    slots |= {"m": other.name, "other": place.name, "known": place.known, "river": place.river}
    slots |= {"a_animal": article(animal.name), "eats": animal.eats, "sleeps": animal.sleeps}
    slots |= {key: rng.choice(names) for key, names in (("day", DAYS), ("month", MONTHS))}
    slots |= {"thing": rng.choice(_THINGS), "counted": rng.choice(_COUNTED)}
    slots |= {"new": rng.choice(COLOURS), "some": NUMBERS[rng.randint(2, 9)]} | sums(rng)
    slots["a_new"] = article(slots["new"])
    slots |= {"He": capital(slots["he"]), "Colour": capital(slots["colour"])}
    parts = (fill(rng, rng.choice(part), slots) for part in (_OPEN, _PLOTS, _CLOSE))
    return " ".join(part for part in parts if part)
