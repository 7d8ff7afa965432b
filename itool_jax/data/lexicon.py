"""Words of the generated corpora: verbs, things and parameters of the pretraining and task domains.

The two sets of domains share no thing and no parameter, so the tools of the second are new to a model trained on the
first. Every word is one token of the embedded tokenizer.
"""

from typing import Any, NamedTuple


class Parameter(NamedTuple):
    """A parameter and the phrases for it; `phrases` hold {} where the value goes.

    `default` is the default of an optional parameter of one tool; None if it has none.
    """

    name: str
    type: str
    phrases: tuple[str, ...]
    options: tuple[str, ...] = ()
    default: Any = None


class Domain(NamedTuple):
    """Things (name, synonym) and the parameters that their tools may have."""

    name: str
    things: tuple[tuple[str, str], ...]
    parameters: tuple[Parameter, ...]


def _parameter(line: str) -> Parameter:
    name, kind, *phrases = (part.strip() for part in line.split(";"))
    if "|" in kind:
        return Parameter(name, "string", tuple(phrases), tuple(kind.split("|")))
    return Parameter(name, kind, tuple(phrases))


def _domain(name: str, things: str, *parameters: str) -> Domain:
    pairs = [tuple(pair.split("/")) for pair in things.split()]
    return Domain(name, tuple((a, b) for a, b in pairs), tuple(_parameter(line) for line in parameters))


VERBS = tuple(
    tuple(group.split("/"))
    for group in (
        "find/search book/reserve cancel/drop buy/purchase send/forward play/start check/inspect add/insert "
        "delete/remove show/present rate/score open/launch share/publish update/change list/enumerate"
    ).split()
)
TASK_VERBS = tuple(
    tuple(group.split("/"))
    for group in (
        "schedule/plan order/request track/follow repair/fix assign/allot measure/gauge ship/dispatch "
        "renew/extend approve/accept print/copy compare/match archive/store"
    ).split()
)

PRETRAINING_DOMAINS = (
    _domain(
        "travel",
        "hotel/lodging flight/plane taxi/cab cruise/voyage",
        "city; string; in {}; near {}",
        "nights; integer; for {} nights; staying {} nights",
        "guests; integer; for {} guests; with {} guests",
        "airline; string; on {}; flying {}",
        "cabin; economy|business|first; in {} class; {} class",
        "breakfast; boolean; with breakfast; without breakfast",
    ),
    _domain(
        "food",
        "table/seat recipe/dish meal/dinner cafe/diner",
        "place; string; in {}; around {}",
        "people; integer; for {} people; feeding {} people",
        "chef; string; by {}; cooked by {}",
        "diet; vegan|meat|fish; with {}; for a {} diet",
        "spicy; boolean; made spicy; not spicy",
        "budget; number; under {} dollars; for {} dollars",
    ),
    _domain(
        "media",
        "song/tune movie/film photo/picture podcast/series",
        "title; string; titled {}; called {}",
        "artist; string; by {}; from {}",
        "genre; rock|jazz|pop; of the {} kind; in {} style",
        "minutes; integer; for {} minutes; lasting {} minutes",
        "volume; integer; at volume {}; with volume {}",
        "repeat; boolean; on repeat; played once",
    ),
    _domain(
        "office",
        "email/letter event/meeting note/memo task/chore",
        "recipient; string; to {}; for {}",
        "subject; string; about {}; on {}",
        "hour; integer; at {}; by {}",
        "status; draft|final|open; as {}; marked {}",
        "private; boolean; in private; in public",
        "sender; string; from {}; signed by {}",
    ),
    _domain(
        "home",
        "light/lamp door/gate heater/stove window/blind",
        "room; string; in {}; inside {}",
        "level; integer; at level {}; to level {}",
        "color; red|green|blue; in {}; colored {}",
        "timer; integer; after {} minutes; in {} minutes",
        "locked; boolean; kept locked; kept unlocked",
        "owner; string; for {}; of {}",
    ),
    _domain(
        "shop",
        "product/item gift/parcel jacket/coat ticket/voucher",
        "brand; string; from {}; made by {}",
        "price; number; for {} dollars; under {} dollars",
        "quantity; integer; {} times; {} of them",
        "size; small|medium|large; in {}; in size {}",
        "wrapped; boolean; with wrapping; without wrapping",
        "buyer; string; for {}; on behalf of {}",
    ),
    _domain(
        "sport",
        "game/contest player/athlete stadium/arena race/sprint",
        "team; string; for {}; of {}",
        "season; integer; in season {}; of season {}",
        "coach; string; with {}; under {}",
        "league; junior|senior|open; in the {} league; at {} level",
        "indoor; boolean; played indoor; played outdoor",
        "score; number; with score {}; scoring {}",
    ),
    _domain(
        "money",
        "account/profile card/badge transfer/payment stock/bond",
        "bank; string; at {}; with {}",
        "amount; number; of {} dollars; worth {} dollars",
        "client; string; for {}; on behalf of {}",
        "currency; euro|yen|peso; in {}; as {}",
        "secure; boolean; with security; without security",
        "months; integer; for {} months; over {} months",
    ),
)

TASK_DOMAINS = (
    _domain(
        "clinic",
        "patient/case medicine/drug scan/image surgery/operation",
        "ward; string; in {}; inside {}",
        "doctor; string; under {}; seen by {}",
        "dose; number; of {} grams; dosed {}",
        "urgency; low|normal|high; with {} priority; {} priority",
        "insured; boolean; covered; not covered",
        "weeks; integer; for {} weeks; over {} weeks",
    ),
    _domain(
        "freight",
        "container/package truck/lorry crate/box pallet/load",
        "depot; string; at {}; via {}",
        "carrier; string; by {}; with {}",
        "weight; number; weighing {} tons; of {} tons",
        "fuel; diesel|petrol|hybrid; on {}; burning {}",
        "fragile; boolean; handled gently; handled roughly",
        "stops; integer; with {} stops; after {} stops",
    ),
    _domain(
        "farm",
        "field/plot crop/harvest tractor/plough barn/shed",
        "farmer; string; for {}; tended by {}",
        "acres; integer; across {} acres; of {} acres",
        "soil; clay|sand|loam; on {}; with {} soil",
        "region; string; around {}; in {}",
        "irrigated; boolean; kept wet; kept dry",
        "yield; number; giving {} tons; yielding {}",
    ),
    _domain(
        "school",
        "lesson/class exam/quiz pupil/student essay/paper",
        "teacher; string; by {}; taught by {}",
        "topic; string; about {}; covering {}",
        "grade; integer; for grade {}; in grade {}",
        "format; oral|written|mixed; in {} form; held {}",
        "graded; boolean; with marks; without marks",
        "length; number; taking {} hours; {} hours long",
    ),
    _domain(
        "plant",
        "engine/motor sensor/probe pump/valve robot/machine",
        "line; string; on {}; along {}",
        "operator; string; run by {}; for {}",
        "voltage; number; rated {} volts; at {} volts",
        "mode; manual|auto|idle; in {} mode; set to {}",
        "cooled; boolean; with cooling; without cooling",
        "shift; integer; during shift {}; in shift {}",
    ),
    _domain(
        "museum",
        "exhibit/gallery statue/bust painting/canvas tour/visit",
        "curator; string; from {}; chosen by {}",
        "hall; string; in {}; through {}",
        "era; ancient|modern|gothic; of the {} era; in {} taste",
        "visitors; integer; for {} visitors; with {} visitors",
        "guided; boolean; with a guide; without a guide",
        "fee; number; at {} coins; costing {} coins",
    ),
    _domain(
        "law",
        "permit/license contract/deed invoice/bill claim/appeal",
        "party; string; for {}; filed by {}",
        "court; string; at {}; before {}",
        "sum; number; worth {} pounds; of {} pounds",
        "stage; pending|active|closed; as {}; now {}",
        "notarized; boolean; with a seal; without a seal",
        "years; integer; for {} years; valid {} years",
    ),
    _domain(
        "harbor",
        "boat/vessel anchor/chain cargo/goods pier/dock",
        "port; string; to {}; bound for {}",
        "captain; string; led by {}; with {}",
        "crew; integer; with crew {}; manned by {}",
        "tide; rising|falling|slack; on a {} tide; at {} water",
        "towed; boolean; under tow; under sail",
        "depth; number; at {} meters; {} meters deep",
    ),
)

# A made-up name is any start followed by any ending.
NAME_STARTS = tuple(
    c + v for c in "Bal Bor Dan Del Fen Gar Hal Jor Kav Kel Lan Lor Mar Mel Nor".split() for v in "aeio"
)
NAME_STARTS += tuple(c + v for c in "Pal Pel Ras Ron Sal Ser Tal Tor Val Vor Wen Yar Zan Zel".split() for v in "aeio")
NAME_ENDS = tuple(c + v for c in "b d f g k l m n p r s t v z ch sh".split() for v in "an en in on ul ar".split())

# Further words for the random tools of the pretraining corpus, besides all words above.
FILLERS = tuple(
    (
        "apple arrow basin beacon bell blanket bottle branch brick brush bucket button cabinet candle canyon carpet "
        "castle ceiling circle cloud coin comet copper corner cotton cradle crystal curtain desert diamond dragon drum "
        "eagle ember engine fabric feather fence ferry finger flame flower forest fountain fox garden garlic glacier "
        "glove granite hammer harp hazel helmet hill honey horizon island ivory jewel jungle kettle ladder lagoon "
        "lantern leaf lemon lily linen lion magnet maple marble meadow mirror moon mountain needle nest ocean olive "
        "onion orchid owl paddle palace pearl pebble pepper pillow pine planet plum pocket pond puzzle quartz rabbit "
        "rain ribbon ridge river rocket rose saddle salt sand shadow shell shield silk silver spark spider spoon "
        "spring star stone storm sugar sun swan temple thread thunder tiger timber tower trumpet tulip tunnel valley "
        "velvet village violin wagon walnut water wheel whistle willow wind wing winter wolf wood"
    ).split()
)

# Openings and joints of sentences, and the only refusal.
OPENINGS = ("please", "can you", "i want to", "could you", "i need to", "help me", "kindly", "you should")
JOINTS = (" and ", " and then ", ", then ", " and also ")
REFUSAL = "None of the tools can do that."


def words() -> tuple[str, ...]:
    """Returns every content word, sorted: verbs, things, parameters, options, fillers."""
    vocabulary = {word for verb in VERBS + TASK_VERBS for word in verb} | set(FILLERS)
    for domain in PRETRAINING_DOMAINS + TASK_DOMAINS:
        vocabulary.update(word for thing in domain.things for word in thing)
        for parameter in domain.parameters:
            vocabulary.update((parameter.name, *parameter.options))
    return tuple(sorted(vocabulary))
