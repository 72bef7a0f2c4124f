"""A generated text classification task: notes to a hotel, each to go to one of six departments.

A note mentions three to six things that belong to two or three departments. Its label is the department that
it mentions most often, so no single word decides: the mentions have to be weighed against each other. One word
in twelve is misspelled, mostly into one that training has hardly seen, so that some notes cannot be told.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

DEPARTMENTS = {
    "kitchen": "breakfast dinner lunch soup bread coffee menu pasta salad fish dessert buffet toast cheese omelette",
    "rooms": "bed bathroom shower window balcony carpet pillow mattress heating closet lamp bathtub desk sofa curtain",
    "front desk": "receptionist porter luggage key passport lobby checkout reservation elevator umbrella parcel taxi",
    "accounts": "bill rate deposit fee tax charge discount invoice refund receipt voucher surcharge currency payment",
    "wellness": "sauna pool massage towel gym yoga steam trainer treadmill robe slippers jacuzzi facial lotion",
    "events": "wedding conference projector stage microphone banquet orchestra seating speaker flowers dance",
}
LABELS = tuple(DEPARTMENTS)
OPENINGS = ("", "hello :", "urgent :", "again :", "thanks :", "today :", "suite nine :")
JOINTS = (",", "and", "then", "also", "with", "plus", "near", "besides")
# Mentions of the note's own department, and of the others.
COUNTS = ((2, 1), (2, 1, 1), (3, 1), (3, 1, 1), (3, 2), (3, 2, 1))
MISSPELLED = 1 / 12


@dataclass(frozen=True)
class Note:
    """A text and the index of its label in LABELS."""

    text: str
    label: int


def make_corpus(n: int, seed: int) -> list[Note]:
    """Generate `n` notes; the same seed gives the same ones."""
    random = Random(seed)
    return [_note(random) for _ in range(n)]


def _note(random: Random) -> Note:
    counts = random.choice(COUNTS)
    departments = random.sample(LABELS, len(counts))
    mentions = [
        word
        for department, count in zip(departments, counts, strict=True)
        for word in random.sample(DEPARTMENTS[department].split(), count)
    ]
    random.shuffle(mentions)
    text = f"{random.choice(OPENINGS)} {mentions[0]}"
    for mention in mentions[1:]:
        text += f" {random.choice(JOINTS)} {mention}"
    words = [misspelled(random, word) if random.random() < MISSPELLED else word for word in text.split()]
    return Note(" ".join(words), LABELS.index(departments[0]))


def misspelled(random: Random, word: str) -> str:
    """Put a random letter in the place of one of the word's."""
    place = random.randrange(len(word))
    return word[:place] + random.choice(ascii_lowercase) + word[place + 1 :]
