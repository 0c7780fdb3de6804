"""What facts are planted: their sorts, the values that they may have, and ways to tell, correct and ask for them.

In every wording, {} stands for the value, or for the subject and then the value. No list of values
has fewer than 20, so that guessing seldom helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True, slots=True)
class Sort:
    """A sort of fact: how its owner names it, where values come from, and other ways to tell it than "subject is"."""

    id: str
    kind: str
    subject: str
    values: Sequence[str]
    others: tuple[str, str, str]


WOMEN = _words(
    """
    Adelheid Clementine Eleonora Gwendolyn Imogen Jocasta Leopoldine Marguerite Octavia Rosalind Theodora Valentina
    Winifred Yolanda Beatrix Dorothea Henrietta Philippa Ottilie Constance Millicent Cordelia Isolde Genevieve
    Petronella Wilhelmina Francesca Augusta Seraphina Katarina
    """
)
PETS = _words(
    """
    Biscuit Waffles Pepper Marbles Noodle Pickles Ziggy Truffle Sprocket Muffin Gizmo Dumpling Bandit Pumpkin
    Snowball Peanut Cricket Mocha Pebbles Tinker Widget Doodle Scout Twix Pretzel Bramble
    """
)
STREETS = _words(
    """
    Kingsway Broadway Maplewood Juniperhill Harbourside Chestnutfield Willowbank Orchardside Lanternhill Quarryside
    Heronsgate Falconhurst Meadowbank Granitefield Cedarwood Thistledown Windmillhill Coppergate Hazelwood Abbeygate
    Brewerygate Foundryside Larkspurfield Saddlersgate
    """
)
CITIES = _words(
    """
    Lisbon Oslo Kyoto Valencia Dublin Krakow Quebec Tallinn Bergen Seville Antwerp Porto Cardiff Bologna Zagreb
    Nairobi Helsinki Marseille Havana Santiago Adelaide Wellington Reykjavik Ljubljana Aberdeen Osaka Turin Salzburg
    Riga Malmo
    """
)
COLOURS = _words(
    """
    turquoise crimson lavender emerald maroon indigo amber teal beige magenta violet charcoal coral ivory scarlet
    khaki burgundy olive mustard lilac bronze cobalt fuchsia mauve
    """
)
FOODS = _words(
    """
    lasagna paella goulash risotto ramen moussaka falafel gumbo pierogi ratatouille tiramisu couscous gnocchi
    jambalaya ceviche bibimbap borscht tempura quiche schnitzel cannelloni enchiladas stroganoff
    """
)
SPORTS = _words(
    """
    badminton curling fencing archery rowing hurling handball snooker judo karate rugby lacrosse squash volleyball
    bowling wrestling netball croquet polo biathlon softball triathlon kayaking bouldering
    """
)
MUSIC = _words(
    """
    jazz reggae flamenco bluegrass techno opera ska gospel salsa merengue fado klezmer grunge swing tango disco dubstep
    funk trance calypso ragtime samba zydeco synthpop
    """
)
DIGITS_3 = tuple(map(str, range(100, 1000)))
DIGITS_4 = tuple(map(str, range(1000, 10000)))
SEATS = tuple(f"{row}{letter}" for row in range(10, 60) for letter in "ABCDEF")

SORTS = (
    Sort(
        "sister-name",
        "name",
        "my sister's name",
        WOMEN,
        ("I have a sister called {}.", "my sister {} is coming to visit.", "I must call {}, that is my sister."),
    ),
    Sort(
        "boss-name",
        "name",
        "my boss's name",
        WOMEN,
        ("I work for a woman called {}.", "{} is my boss.", "my boss, {}, wants a report from me."),
    ),
    Sort(
        "daughter-name",
        "name",
        "my daughter's name",
        WOMEN,
        ("we named our daughter {}.", "I have a little daughter, {}.", "my daughter {} starts school soon."),
    ),
    Sort(
        "neighbour-name",
        "name",
        "my neighbour's name",
        WOMEN,
        ("{} is the neighbour next door to me.", "I have a new neighbour called {}.", "my neighbour {} has my keys."),
    ),
    Sort(
        "dog-name",
        "name",
        "my dog's name",
        PETS,
        ("I have a dog called {}.", "my dog {} needs a walk.", "we got a dog and named him {}."),
    ),
    Sort(
        "cat-name",
        "name",
        "my cat's name",
        PETS,
        ("I have a cat called {}.", "my cat {} sleeps all day.", "the cat I adopted is called {}."),
    ),
    Sort(
        "street-name",
        "name",
        "my street's name",
        STREETS,
        ("I live in {}.", "my flat is in {}.", "you can find me in {}, that is where I live."),
    ),
    Sort(
        "locker-number",
        "number",
        "my locker number",
        DIGITS_3,
        ("I was given locker {}.", "my things are in locker number {}.", "I use locker {} at the gym."),
    ),
    Sort(
        "seat-number",
        "number",
        "my seat number on the flight",
        SEATS,
        ("I am in seat {} on the flight.", "they gave me seat {} on the plane.", "on my flight I booked seat {}."),
    ),
    Sort(
        "room-number",
        "number",
        "my hotel room number",
        DIGITS_3,
        ("at the hotel I am in room {}.", "the hotel gave me room {}.", "you can reach me in hotel room {}."),
    ),
    Sort(
        "door-code",
        "number",
        "my door code",
        DIGITS_4,
        ("the code for my door is {}.", "to open my door, type {}.", "I set the code of my door to {}."),
    ),
    Sort(
        "card-number",
        "number",
        "my library card number",
        DIGITS_4,
        ("I have library card number {}.", "the number on my library card is {}.", "my library card says {}."),
    ),
    Sort(
        "parcel-number",
        "number",
        "my parcel number",
        DIGITS_4,
        (
            "I am waiting for parcel number {}.",
            "the number of my parcel is {}.",
            "my parcel is the one with number {}.",
        ),
    ),
    Sort(
        "home-town",
        "place",
        "my home town",
        CITIES,
        ("I grew up in {}.", "I was born and raised in {}.", "{} is the town I come from."),
    ),
    Sort(
        "holiday-destination",
        "place",
        "my holiday destination",
        CITIES,
        ("I am going to {} on holiday.", "this year I spend my holiday in {}.", "I booked a holiday in {}."),
    ),
    Sort(
        "grandmother-birthplace",
        "place",
        "my grandmother's birthplace",
        CITIES,
        ("my grandmother was born in {}.", "my grandmother comes from {}.", "{} is where my grandmother was born."),
    ),
    Sort(
        "meeting-place",
        "place",
        "my next meeting's location",
        CITIES,
        ("I have my next meeting in {}.", "my next meeting is held in {}.", "for my next meeting I travel to {}."),
    ),
    Sort(
        "colour",
        "preference",
        "my favourite colour",
        COLOURS,
        ("the colour I like best is {}.", "I love the colour {} most.", "no colour is as nice as {} to me."),
    ),
    Sort(
        "food",
        "preference",
        "my favourite food",
        FOODS,
        ("the food I like best is {}.", "I could eat {} every day, I love it most.", "{} is the food I love most."),
    ),
    Sort(
        "sport",
        "preference",
        "my favourite sport",
        SPORTS,
        ("the sport I like best is {}.", "I love {} more than any other sport.", "no sport is as good as {} to me."),
    ),
    Sort(
        "music",
        "preference",
        "my favourite kind of music",
        MUSIC,
        ("the music I like best is {}.", "I love {} more than any other music.", "of all music I prefer {}."),
    ),
)

OPENERS = ("", "By the way, ", "Before I forget: ", "So you know, ", "One more thing: ", "Please remember: ")
CORRECTIONS = (
    "Actually, {} is {} now.",
    "Correction: {} is {}, not what I told you before.",
    "I have to correct myself, {} is {}.",
    "Forget what I said about {}: it is {}.",
    "There was a change, and now {} is {}.",
    "Sorry, I told you wrong earlier: {} is {}.",
)
QUESTIONS = (
    "What is {}?",
    "Can you remind me what {} is?",
    "Do you still remember {}?",
    "I forgot {}. What was it?",
    "Please tell me {} again.",
    "What did I say {} was?",
)
