"""The small invented world behind the embedded model: who lives where, what eats what, which word
means what.

`world()` always builds the same facts. The corpus (tiny_corpus.py) tells them in prose, the
instruction rows (tiny_instructions.py) ask for them. Nothing here comes from a data set: people,
towns and rivers are made up, the rest is common knowledge and everyday English.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Slots = dict[str, str]  # what the {names} in a template stand for


def _pairs(text: str) -> dict[str, str]:
    """`a b, c d` -> {"a": "b", "c": "d"}."""
    return dict((pair.split()[0], pair.split()[1]) for pair in text.split(","))


_WOMEN = """
    Mira Ada Nora Ella Ruth Ivy Hazel Lena Clara Wilma Greta Tilda Olive Bela Sonja Petra
    Flora Irma Hedda Juno Kaya Luise Maud Nella Odile Pia Rosa Selma Thea Ulla Vera Zoe
""".split()
_MEN = """
    Tom Ben Otto Hugo Karl Emil Finn Jonas Milo Axel Oskar Peter Rafe Sam Theo Victor Willem
    Arno Bruno Casper Dirk Edgar Felix Gus Henrik Ivo Jasper Klaus Lars Moritz Nils Ralf
""".split()
_TOWNS = """
    Tarn Eldon Brill Corby Dunmore Fenwick Garth Holm Inver Kelso Lorne Marl Norby Orrin
    Penrith Quill Rowan Selby Thorne Ulven Varley Wick Yarrow Zell
""".split()
JOBS = """
    baker miller weaver potter sailor teacher doctor gardener painter farmer carpenter
    tailor fisher librarian blacksmith shepherd
""".split()
PETS = "cat dog goat rabbit parrot pony hen duck turtle mouse pigeon lamb".split()
COLOURS = "red blue green yellow white black brown purple orange grey".split()
FOODS = "soup bread cheese honey plums apples pancakes rice beans pears nuts cherries".split()
KNOWN = """
    bells cheese boats roses clocks bridges kites lamps apples pots drums windmills carpets
    songs candles gates horses honey hats gardens towers salt books bread
""".split()
RIVERS = "Ash Bourne Clyde Dart Esk Frome Gled Isk".split()
PLACES = (
    "on a hill",
    "by the sea",
    "in a forest",
    "by a lake",
    "in a valley",
    "on an island",
    "under a mountain",
    "on a wide plain",
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """
    January February March April May June July August September October November December
""".split()
NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty
""".split()

# Per line: an animal, its young, its food, where it sleeps, its legs, what many are called.
_ANIMALS = """
    cat, kitten, fish, in a basket, four, a clowder
    dog, puppy, meat, in a kennel, four, a pack
    cow, calf, grass, in a barn, four, a herd
    horse, foal, hay, in a stable, four, a herd
    sheep, lamb, grass, in a fold, four, a flock
    goat, kid, leaves, in a shed, four, a herd
    pig, piglet, roots, in a sty, four, a drove
    hen, chick, grain, in a coop, two, a flock
    duck, duckling, weed, in the reeds, two, a flock
    goose, gosling, grass, in a pen, two, a gaggle
    lion, cub, meat, in the grass, four, a pride
    bear, cub, honey, in a cave, four, a sloth
    wolf, pup, meat, in a den, four, a pack
    fox, kit, mice, in a den, four, a skulk
    deer, fawn, leaves, in a thicket, four, a herd
    rabbit, bunny, carrots, in a burrow, four, a colony
    owl, owlet, mice, in a hollow tree, two, a parliament
    eagle, eaglet, fish, on a cliff, two, a convocation
    swan, cygnet, weed, on an island, two, a wedge
    pigeon, squab, grain, in a loft, two, a flock
    frog, tadpole, flies, in a pond, four, an army
    seal, pup, fish, on a rock, no, a pod
    bee, grub, nectar, in a hive, six, a swarm
    ant, grub, seeds, in a nest, six, an army
    spider, spiderling, flies, in a web, eight, a cluster
    butterfly, caterpillar, nectar, under a leaf, six, a flight
    hare, leveret, grass, in a form, four, a drove
    otter, pup, fish, in a holt, four, a raft
    badger, cub, worms, in a sett, four, a clan
    elephant, calf, leaves, under a tree, four, a herd
    kangaroo, joey, grass, in the shade, two, a mob
    whale, calf, krill, in the sea, no, a pod
"""
_OPPOSITES = _pairs("""
    hot cold, big small, old young, fast slow, light dark, high low, long short, wet dry,
    full empty, happy sad, hard soft, loud quiet, early late, near far, open shut, rich
    poor, strong weak, thick thin, wide narrow, clean dirty, left right, up down, in out,
    day night, summer winter, north south, east west, first last, true false, brave afraid,
    sweet bitter, same different, deep shallow, smooth rough, sharp blunt, push pull, give
    take, buy sell, win lose, laugh cry, begin end, come go, find hide, love hate, rise
    fall, sit stand, sleep wake, remember forget
""")
OPPOSITES = _OPPOSITES | {b: a for a, b in _OPPOSITES.items()}
PLURALS = _pairs("""
    apple apples, boat boats, bell bells, book books, candle candles, cart carts, clock
    clocks, cloud clouds, coat coats, cup cups, door doors, drum drums, egg eggs, feather
    feathers, flower flowers, gate gates, hat hats, key keys, kite kites, lamp lamps, letter
    letters, map maps, nail nails, pear pears, plate plates, pot pots, ring rings, road
    roads, rope ropes, shell shells, spoon spoons, stone stones, table tables, tree trees,
    wheel wheels, window windows, box boxes, bus buses, brush brushes, bench benches, dish
    dishes, glass glasses, match matches, dress dresses, berry berries, city cities, story
    stories, pony ponies, lady ladies, fly flies, leaf leaves, knife knives, loaf loaves,
    shelf shelves, wolf wolves, man men, woman women, child children, foot feet, tooth
    teeth, goose geese, mouse mice, potato potatoes, hero heroes
""")
PASTS = _pairs("""
    walk walked, talk talked, look looked, jump jumped, play played, help helped, cook
    cooked, paint painted, plant planted, open opened, call called, wait waited, ask asked,
    answer answered, carry carried, hurry hurried, bake baked, dance danced, smile smiled,
    live lived, like liked, stop stopped, clap clapped, go went, see saw, eat ate, drink
    drank, sing sang, swim swam, run ran, write wrote, read read, find found, give gave,
    take took, make made, come came, buy bought, bring brought, think thought, catch caught,
    teach taught, sleep slept, keep kept, feel felt, leave left, break broke, speak spoke,
    fly flew, grow grew, know knew, throw threw, draw drew, ride rode, sell sold, tell told,
    lose lost, hear heard
""")
COMPARATIVES = _pairs("""
    tall taller, small smaller, old older, young younger, fast faster, slow slower, high
    higher, low lower, long longer, short shorter, hard harder, soft softer, loud louder,
    strong stronger, weak weaker, thick thicker, dark darker, light lighter, deep deeper,
    warm warmer, cold colder, rich richer, poor poorer, sweet sweeter, big bigger, hot
    hotter, wet wetter, thin thinner, happy happier, heavy heavier, dirty dirtier, early
    earlier, good better, bad worse
""")
_KINDS = """
    a fruit: an apple, a pear, a plum, a cherry, a grape, a lemon, a peach, a melon
    a vegetable: a carrot, a bean, an onion, a potato, a cabbage, a turnip, a leek, a radish
    a tool: a hammer, a saw, a spade, a rake, an axe, a drill, a chisel, a needle
    an instrument: a drum, a flute, a harp, a violin, a trumpet, a piano, a horn, a whistle
    a piece of furniture: a table, a chair, a bed, a shelf, a bench, a stool, a desk, a cupboard
    a piece of clothing: a coat, a hat, a scarf, a shirt, a glove, a sock, a dress, an apron
    a tree: an oak, a birch, a willow, a pine, an elm, a beech, a maple, a cedar
    a vehicle: a cart, a boat, a train, a bus, a sledge, a wagon, a ship, a bicycle
"""
KINDS = {
    word.strip(): kind
    for kind, _, words in (line.strip().partition(": ") for line in _KINDS.strip().splitlines())
    for word in words.split(",")
}


@dataclass(frozen=True)
class Person:
    name: str
    she: bool
    town: str
    job: str
    pet: str
    colour: str
    food: str

    def slots(self) -> Slots:
        he, him, his = ("she", "her", "her") if self.she else ("he", "him", "his")
        own = {"n": self.name, "town": self.town, "job": self.job, "pet": self.pet}
        own |= {"colour": self.colour, "food": self.food, "he": he, "him": him, "his": his}
        return own | {"a_job": article(self.job), "a_pet": article(self.pet)}


@dataclass(frozen=True)
class Town:
    name: str
    known: str
    river: str
    place: str
    market: str

    def slots(self) -> Slots:
        own = {"n": self.name, "known": self.known, "river": self.river}
        return own | {"place": self.place, "market": self.market}


@dataclass(frozen=True)
class Animal:
    name: str
    young: str
    eats: str
    sleeps: str
    legs: str
    many: str

    def slots(self) -> Slots:
        own = {"n": self.name, "eats": self.eats, "sleeps": self.sleeps, "legs": self.legs}
        return own | {
            "many": self.many,
            "a_n": article(self.name),
            "A_n": capital(article(self.name)),
            "a_young": article(self.young),
            "A_young": capital(article(self.young)),
        }


ANIMALS = tuple(Animal(*line.strip().split(", ")) for line in _ANIMALS.strip().splitlines())


@dataclass(frozen=True)
class World:
    people: tuple[Person, ...]
    towns: tuple[Town, ...]


def world() -> World:
    """The one world there is: 64 people and 24 towns, drawn once from a fixed seed."""
    rng = random.Random(20)

    def spread(values: tuple[str, ...] | list[str], count: int) -> list[str]:
        """`count` values, each as often as any other, shuffled."""
        out = [values[i % len(values)] for i in range(count)]
        rng.shuffle(out)
        return out

    names = _WOMEN + _MEN
    n, m = len(names), len(_TOWNS)
    columns = zip(*(spread(v, n) for v in (_TOWNS, JOBS, PETS, COLOURS, FOODS)), strict=True)
    people = tuple(
        Person(x, x in _WOMEN, *values) for x, values in zip(names, columns, strict=True)
    )
    columns = zip(*(spread(v, m) for v in (KNOWN, RIVERS, PLACES, DAYS)), strict=True)
    return World(people, tuple(Town(x, *v) for x, v in zip(_TOWNS, columns, strict=True)))


def article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    """The text with its first letter made large."""
    return text[0].upper() + text[1:]
