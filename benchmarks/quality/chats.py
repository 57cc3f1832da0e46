"""Chats to tune a language model on, made from templates: instructions about invented facts, and answers in a fixed manner.

The texts are this project's own and come under its licence (Apache-2.0, see LICENSE). Names, places and numbers are invented.
They are a stand-in for data of instructions: varied tasks, a manner to be learnt, and answers that follow from the question.
"""

import random

_WORDS = """\
Ada, Bela, Cyrus, Dora, Edwin, Farah, Gita, Hugo, Iris, Jonas, Kira, Liam, Mona, Noel, Olga, Petra, Quinn, Rosa, Samir, Tess
Alderby, Brookford, Carnwell, Dunmore, Easthaven, Fenwick, Glenroy, Harrowgate, Inverlea, Kingsmere, Lowdale, Marston
baker, carpenter, doctor, farmer, gardener, librarian, mechanic, nurse, painter, teacher, tailor, writer
English, French, Indian, Italian, Japanese, Chinese, Mexican, Turkish, Thai, Greek
The Anchor, Blue Door, Cedar House, The Dolphin, Old Mill, Green Lantern, The Harvest, Ivy Garden, The Kettle, Red Barn
by the river, in the city centre, near the station, next to the park, on the market square, at the harbour
cheap, moderately priced, expensive
apples, books, candles, envelopes, forks, gloves, hats, jars, keys, lamps, maps, needles, oranges, pencils, ropes, shoes
charming, delightful, excellent, gripping, moving, splendid, warm, witty
boring, clumsy, dull, flat, hollow, messy, tedious, tiresome
acting, camera work, dialogue, ending, music, plot, pacing, script
"""
_NAMES, _TOWNS, _TRADES, _FOODS, _PLACES, _AREAS, _PRICES, _THINGS, _FINE, _POOR, _WORKS = (
    line.split(", ") for line in _WORDS.splitlines()
)
_OPENINGS = ("Certainly.", "Of course.", "Here you are.", "Gladly.")


def make(count: int, seed: int = 0) -> list[list[str]]:
    """That many chats, all different: turns of the user and of the assistant, who has the last. The same each time."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], list[str]] = {}
    while len(found) < count:
        chat = rng.choice(_MAKERS)(rng)
        found.setdefault(tuple(chat), chat)
    return list(found.values())


def _describe(rng: random.Random) -> list[str]:
    place, food, area, price = (rng.choice(names) for names in (_PLACES, _FOODS, _AREAS, _PRICES))
    families = rng.random() < 0.5
    ask = rng.choice(("Describe this restaurant in a sentence.", "Write one sentence about this place."))
    facts = f"name: {place}; food: {food}; where: {area}; price: {price}; for families: {'yes' if families else 'no'}"
    guests = "welcomes families" if families else "is meant for adults"
    answer = rng.choice(
        (
            f"{place} serves {price} {food} food {area} and {guests}.",
            f"{place}, a {price} {food} restaurant {area}, {guests}.",
        )
    )
    return [f"{ask} {facts}", f"{rng.choice(_OPENINGS)} {answer}"]


def _extract(rng: random.Random) -> list[str]:
    name, trade, town, age = rng.choice(_NAMES), rng.choice(_TRADES), rng.choice(_TOWNS), rng.randint(20, 70)
    text = rng.choice(
        (
            f"{name}, {age} years old, is a {trade} who lives in {town}.",
            f"In {town} there is a {trade} called {name}, aged {age}.",
            f"The {trade} {name} comes from {town} and is {age}.",
        )
    )
    ask = rng.choice(("Give the facts as JSON:", "Turn this sentence into JSON:"))
    return [f"{ask} {text}", f'{{"name": "{name}", "age": {age}, "trade": "{trade}", "town": "{town}"}}']


def _sort(rng: random.Random) -> list[str]:
    words = rng.sample(_THINGS, rng.randint(3, 6))
    backwards = rng.random() < 0.3
    ask = "in reverse alphabetical order" if backwards else "alphabetically"
    sorted_words = sorted(words, reverse=backwards)
    return [f"Sort these words {ask}: {', '.join(words)}", f"{rng.choice(_OPENINGS)} {', '.join(sorted_words)}"]


def _judge(rng: random.Random) -> list[str]:
    good = rng.random() < 0.5
    first, second = rng.sample(_WORKS, 2)
    words = rng.sample(_FINE if good else _POOR, 2)
    text = f"The {first} is {words[0]} and the {second} {words[1]}."
    verdict = "positive" if good else "negative"
    ask = rng.choice(("Is this review positive or negative, and why?", "What does the reviewer think, and why?"))
    return [f"{ask} {text}", f"The review is {verdict}: it calls the {first} {words[0]} and the {second} {words[1]}."]


def _count(rng: random.Random) -> list[str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    had, more = rng.randint(2, 40), rng.randint(2, 20)
    if rng.random() < 0.5 or more > had:
        verb, total, sign = rng.choice(("buys", "finds", "gets")), had + more, "+"
    else:
        verb, total, sign = rng.choice(("loses", "sells", "gives away")), had - more, "-"
    ask = f"{name} has {had} {thing} and {verb} {more}. How many does {name} have now?"
    return [ask, f"{had} {sign} {more} = {total}, so {name} has {total} {thing}."]


def _same(rng: random.Random) -> list[str]:
    name, other, town = *rng.sample(_NAMES, 2), rng.choice(_TOWNS)
    trade, different = rng.sample(_TRADES, 2)
    first = f"{name} works as a {trade} in {town}."
    second, verdict, why = rng.choice(
        (
            (f"In {town}, {name} is a {trade}.", "Yes", "both say the same of the same person"),
            (f"In {town}, {other} is a {trade}.", "No", f"the first is about {name}, the second about {other}"),
            (f"In {town}, {name} is a {different}.", "No", f"a {trade} is not a {different}"),
        )
    )
    return [f'Do these mean the same? "{first}" "{second}"', f"{verdict}: {why}."]


def _remember(rng: random.Random) -> list[str]:
    """Two turns: the answer to the second needs the first."""
    name, town, trade = rng.choice(_NAMES), rng.choice(_TOWNS), rng.choice(_TRADES)
    told = f"My name is {name}, I live in {town} and I am a {trade}."
    hello = f"Nice to meet you, {name}."
    ask, answer = rng.choice(
        (
            ("Where do I live?", f"You live in {town}."),
            ("What is my name?", f"Your name is {name}."),
            ("What do I do for a living?", f"You are a {trade}."),
        )
    )
    return [told, hello, ask, answer]


_MAKERS = (_describe, _extract, _sort, _judge, _count, _same, _remember)
