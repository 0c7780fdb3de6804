"""More sorts of facts, for histories in which more are planted than `facts.SORTS` has: none asks what another does.

Wordings and values are as there.
"""

from __future__ import annotations

from kvchat.evals.facts import CITIES, DIGITS_3, DIGITS_4, PETS, SORTS, WOMEN, Sort, _words

MEN = _words(
    """
    Archibald Bartholomew Cornelius Desmond Ebenezer Ferdinand Gottfried Horatio Ignatius Jeremiah Kasimir Leopold
    Mortimer Nathaniel Octavius Percival Quentin Reginald Sylvester Thaddeus Ulysses Valerius Wolfgang Xavier Zacharias
    Algernon Benedikt Cuthbert Dietrich Evander
    """
)
FLOWERS = _words(
    """
    hydrangea gladiolus marigold snapdragon foxglove chrysanthemum dahlia petunia begonia anemone primrose geranium
    carnation magnolia jasmine gardenia camellia peony freesia azalea hyacinth bluebell buttercup edelweiss
    """
)
FRUITS = _words(
    """
    papaya guava lychee kumquat nectarine pomegranate persimmon rhubarb tangerine grapefruit apricot gooseberry
    mulberry cranberry blackcurrant cantaloupe jackfruit mango kiwi clementine satsuma quince elderberry pineapple
    """
)
ANIMALS = _words(
    """
    hedgehog otter badger lynx walrus giraffe ocelot platypus armadillo pangolin flamingo pelican meerkat wombat
    chameleon porcupine reindeer alpaca gazelle manatee narwhal capybara axolotl tapir
    """
)
INSTRUMENTS = _words(
    """
    bassoon oboe harpsichord trombone clarinet accordion mandolin xylophone banjo cello bagpipes harmonica ukulele
    saxophone tuba piccolo zither glockenspiel marimba didgeridoo theremin dulcimer euphonium lute
    """
)
TRADES = _words(
    """
    plumber electrician carpenter locksmith beekeeper blacksmith optician surveyor librarian florist cobbler
    upholsterer pharmacist astronomer veterinarian translator midwife glazier stonemason goldsmith botanist
    cartographer sommelier taxidermist
    """
)
DRINKS = _words(
    """
    espresso lemonade cider kombucha buttermilk cappuccino matcha sherry absinthe eggnog mead sangria limoncello
    rooibos chai horchata ouzo kefir vermouth grappa mocktail mojito cocoa bourbon
    """
)
MATERIALS = _words(
    """
    porcelain velvet mahogany marble bamboo walnut pewter linen titanium granite leather copper suede rattan denim
    ebony terracotta cashmere aluminium limestone satin corduroy soapstone teakwood
    """
)
SUBJECTS = _words(
    """
    geography chemistry algebra geology philosophy zoology astronomy linguistics theology genetics economics
    archaeology trigonometry anthropology physics sociology calculus rhetoric ecology meteorology mineralogy statistics
    toxicology seismology
    """
)


def _sort(id: str, kind: str, owned: str, values: tuple[str, ...], *others: str) -> Sort:
    first, second, third = others
    return Sort(id, kind, f"my {owned}", values, (first, second, third))


MORE = (
    _sort(
        *("brother-name", "name", "brother's name", MEN),
        *("I have a brother called {}.", "my brother {} is coming to visit.", "I must call {}, that is my brother."),
    ),
    _sort(
        *("dentist-name", "name", "dentist's name", MEN),
        *("I see a dentist called {}.", "{} is my dentist.", "my dentist, {}, told me to come again."),
    ),
    _sort(
        *("landlord-name", "name", "landlord's name", MEN),
        *("I rent from a man called {}.", "{} is my landlord.", "my landlord, {}, wants the rent on Friday."),
    ),
    _sort(
        *("coach-name", "name", "coach's name", MEN),
        *("I train with a coach called {}.", "{} is my coach.", "my coach, {}, makes me run a lot."),
    ),
    _sort(
        *("grandfather-name", "name", "grandfather's name", MEN),
        *("my grandfather was called {}.", "{} was my grandfather.", "I was close to {}, my grandfather."),
    ),
    _sort(
        *("teacher-name", "name", "piano teacher's name", WOMEN),
        *("I learn the piano from {}.", "{} is my piano teacher.", "my piano teacher, {}, is strict."),
    ),
    _sort(
        *("lawyer-name", "name", "lawyer's name", WOMEN),
        *("I have a lawyer called {}.", "{} is my lawyer.", "my lawyer, {}, wrote the letter."),
    ),
    _sort(
        *("horse-name", "name", "horse's name", PETS),
        *("I ride a horse called {}.", "my horse {} won a ribbon.", "{} is the horse that I bought."),
    ),
    _sort(
        *("boat-name", "name", "boat's name", FLOWERS),
        *("I own a boat called {}.", "my boat is the {}.", "we painted {} on my boat, that is what it is called."),
    ),
    _sort(
        *("bus-number", "number", "bus number", DIGITS_3),
        *("I take bus {} to work.", "the bus I take is number {}.", "bus {} brings me home."),
    ),
    _sort(
        *("house-number", "number", "house number", DIGITS_3),
        *("I live in house number {}.", "the number on my house is {}.", "my letters go to house number {}."),
    ),
    _sort(
        *("taxi-number", "number", "taxi number", DIGITS_3),
        *("my taxi had the number {}.", "I came in taxi {}.", "I left my hat in taxi number {}."),
    ),
    _sort(
        *("race-number", "number", "race number", DIGITS_3),
        *(
            "I start in the race with number {}.",
            "in the race I wear number {}.",
            "the race gave me number {}.",
        ),
    ),
    _sort(
        *("invoice-number", "number", "invoice number", DIGITS_4),
        *("I am paying invoice {}.", "the number of my invoice is {}.", "my invoice is number {}."),
    ),
    _sort(
        *("lottery-number", "number", "lottery number", DIGITS_4),
        *("I play number {} in the lottery.", "my lottery ticket says {}.", "in the lottery I always bet on {}."),
    ),
    _sort(
        *("phone-extension", "number", "phone extension", DIGITS_4),
        *("at work you reach me at extension {}.", "call extension {} for me.", "they moved me to phone extension {}."),
    ),
    _sort(
        *("suitcase-code", "number", "suitcase code", DIGITS_4),
        *("I set the lock of my suitcase to {}.", "my suitcase opens with {}.", "the code of my suitcase is {}."),
    ),
    _sort(
        *("university-town", "place", "university town", CITIES),
        *("I went to university in {}.", "I studied in {}.", "{} is where I went to university."),
    ),
    _sort(
        *("honeymoon", "place", "honeymoon destination", CITIES),
        *("we went to {} on our honeymoon.", "our honeymoon was in {}.", "we spent our honeymoon in {}."),
    ),
    _sort(
        *("factory-location", "place", "factory's location", CITIES),
        *("my factory stands in {}.", "I own a factory in {}.", "we built my factory in {}."),
    ),
    _sort(
        *("penfriend-home", "place", "pen friend's home", CITIES),
        *("my pen friend lives in {}.", "I write to a pen friend in {}.", "letters to my pen friend go to {}."),
    ),
    _sort(
        *("flower", "preference", "favourite flower", FLOWERS),
        *("the flower I like best is the {}.", "I love the {} most of all flowers.", "no flower is like the {} to me."),
    ),
    _sort(
        *("fruit", "preference", "favourite fruit", FRUITS),
        *("the fruit I like best is {}.", "I love {} more than any other fruit.", "of all fruit I prefer {}."),
    ),
    _sort(
        *("animal", "preference", "favourite animal", ANIMALS),
        *("the animal I like best is the {}.", "I love the {} most of all animals.", "of all animals I prefer the {}."),
    ),
    _sort(
        *("instrument", "name", "instrument", INSTRUMENTS),
        *("I play the {}.", "the instrument I play is the {}.", "I have played the {} since I was a child."),
    ),
    _sort(
        *("uncle-trade", "name", "uncle's profession", TRADES),
        *("my uncle works as a {}.", "my uncle is a {}.", "my uncle earns his living as a {}."),
    ),
    _sort(
        *("drink", "preference", "favourite drink", DRINKS),
        *("the drink I like best is {}.", "I love {} more than any other drink.", "of all drinks I prefer {}."),
    ),
    _sort(
        *("table-material", "name", "table's material", MATERIALS),
        *("my table is made of {}.", "I bought a table of {}.", "the table I have is made of {}."),
    ),
    _sort(
        *("subject", "preference", "favourite subject at school", SUBJECTS),
        *("at school I liked {} best.", "I loved {} most at school.", "the subject I liked best at school was {}."),
    ),
)

ALL = (*SORTS, *MORE)
