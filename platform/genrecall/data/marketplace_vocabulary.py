"""The words of the built-in marketplace: departments, aisles, product types, their names and the attributes they come in.

Written for this project; no name in it is a trade mark. A product type reads `title name + title name : shoppers' words`: sellers use
the names before the colon, shoppers use all of them, so some queries share no word with the titles they mean. Several words
(pan, mat, cover, case, stand) are shared by types on purpose: they are ambiguous and only the shopper's history resolves them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

# Per dimension: `title form = shoppers' words`, most popular first.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "black=jet",
        "white=ivory,cream",
        "grey=gray,charcoal",
        "navy=dark blue",
        "beige=tan,sand",
        "green=olive",
        "red=crimson",
        "pink=rose",
        "yellow=mustard",
    ),
    "metal": (
        "stainless steel=inox,rustproof",
        "aluminium=aluminum,light metal",
        "cast iron=iron",
        "carbon steel=black steel",
        "copper=red metal",
        "titanium=ti",
    ),
    "fabric": ("cotton=jersey", "polyester=synthetic", "wool=merino", "linen=flax", "fleece=fluffy", "velvet=plush", "microfibre=microfiber"),
    "surface": ("oak=hardwood", "bamboo=eco wood", "walnut=dark wood", "glass=see through", "ceramic=stoneware", "plastic=resin", "marble=stone"),
    "size": ("medium=mid size,regular", "large=big", "small=mini,little", "extra large=xl,jumbo", "compact=space saving,slim"),
    "audience": ("womens=ladies,for her", "mens=guys,for him", "kids=childrens,junior", "unisex=everyone"),
    "power": ("cordless=battery powered,rechargeable", "corded=plug in,mains", "solar=sun powered", "manual=hand operated", "usb=usb powered"),
    "style": ("modern=contemporary", "vintage=retro,old fashioned", "rustic=farmhouse", "minimalist=plain,simple", "industrial=loft"),
    "trait": ("waterproof=rainproof,water resistant", "lightweight=ultralight", "insulated=thermal", "foldable=folding,collapsible", "heavy duty=tough,strong"),
    "volume": ("500 ml=half litre", "1 litre=1l,one liter", "250 ml=quarter litre", "2 litre=2l", "5 litre=5l,family size"),
    "scent": ("lavender=relaxing", "citrus=lemon", "unscented=fragrance free", "vanilla=sweet", "cedar=woody"),
    "concern": ("sensitive=gentle", "dry=dehydrated", "oily=greasy", "mature=anti ageing,anti aging", "damaged=repair"),
    "link": ("bluetooth=wireless", "usb-c=type c", "wired=cable", "wifi=smart,connected", "dual band=dual"),
    "breed": ("adult=grown", "puppy=young", "senior=older", "large breed=big breed", "indoor=house"),
    "pack": ("single=1 piece", "set of 2=pair", "set of 4=four pack", "set of 6=six pack", "12 pack=dozen"),
    "theme": ("animals=safari", "space=rocket", "dinosaur=dino", "princess=fairy", "vehicles=cars and trucks", "music=musical"),
}

# Department, then per aisle: name, three dimensions (the first one also names the leaf categories), product types.
DEPARTMENTS: tuple[tuple[str, tuple[tuple[str, tuple[str, str, str], tuple[str, ...]], ...]], ...] = (
    (
        "Kitchen",
        (
            ("Cookware", ("metal", "size", "style"), (
                "frying pan + saute pan : skillet, pan", "saucepan : small pot, milk pot", "stockpot + casserole pot : soup pot, big pot",
                "roasting tin + roaster tray : pan, oven tray", "wok + stir fry pan : asian pan",
            )),
            ("Drinkware", ("surface", "volume", "colour"), (
                "travel mug + thermal tumbler : coffee to go cup, flask", "water bottle + drinking bottle : hydration bottle, flask",
                "coffee mug + tea cup : beaker", "wine glasses + stemware : goblets", "carafe + pitcher : jug",
            )),
            ("Kitchen Appliances", ("power", "size", "colour"), (
                "kettle + water boiler : tea maker", "blender + smoothie maker : liquidiser, mixer", "toaster : bread griller",
                "hand mixer + whisk mixer : egg beater, mixer", "slow cooker + multi cooker : stew cooker",
            )),
            ("Food Storage", ("surface", "pack", "volume"), (
                "storage jar + canister : pantry pot", "lunch box + bento box : sandwich carrier, tiffin", "bread bin + bread box : loaf keeper",
                "spice rack + spice organiser : herb holder, stand",
            )),
        ),
    ),
    (
        "Home",
        (
            ("Lighting", ("style", "power", "colour"), (
                "table lamp + bedside lamp : night light, reading light", "floor lamp + standing lamp : tall light", "pendant light + ceiling lamp : hanging light, chandelier",
                "string lights + fairy lights : party lights, twinkle bulbs", "desk lamp + task lamp : study light, reading light",
            )),
            ("Bedding", ("fabric", "size", "colour"), (
                "duvet cover + quilt cover : comforter case, bed set", "fitted sheet + bed sheet : mattress linen, cover", "pillow + cushion insert : head rest",
                "throw blanket + sofa throw : couch cover, snuggle wrap", "mattress topper + mattress pad : bed softener",
            )),
            ("Furniture", ("surface", "style", "size"), (
                "coffee table + side table : lounge table", "bookcase + shelving unit : book shelf, rack", "bar stool + counter stool : high chair seat",
                "shoe rack + shoe cabinet : trainer storage, rack", "bedside table + nightstand : bed side cabinet, stand",
            )),
            ("Bath", ("fabric", "colour", "pack"), (
                "bath towel + bath sheet : drying cloth", "bath mat + shower mat : floor rug, mat", "shower curtain : tub screen, cover", "bathrobe + dressing gown : house coat",
            )),
        ),
    ),
    (
        "Fashion",
        (
            ("Outerwear", ("audience", "trait", "colour"), (
                "rain jacket + shell jacket : mac, anorak", "winter coat + parka : warm jacket", "gilet + body warmer : sleeveless jacket, vest", "windbreaker : running top, jacket",
            )),
            ("Tops", ("audience", "fabric", "colour"), (
                "t-shirt + crew neck tee : short sleeve top, undershirt", "hoodie + hooded sweatshirt : jumper with hood, sweater", "cardigan + knit jacket : button sweater, woolly",
                "polo shirt : collar top", "tank top + sleeveless top : vest",
            )),
            ("Footwear", ("audience", "colour", "trait"), (
                "running shoes + trainers : sneakers, joggers", "hiking boots + walking boots : trekking footwear", "sandals + slides : flip flops, beach shoes",
                "slippers + house shoes : indoor footwear, mules", "wellington boots + rain boots : wellies, gumboots",
            )),
            ("Bags", ("audience", "trait", "colour"), (
                "backpack + daypack : rucksack, school bag", "tote bag + shopper bag : carry all, purse", "suitcase + cabin trolley : luggage, carry on", "belt bag + waist pack : bum bag, pouch",
            )),
        ),
    ),
    (
        "Electronics",
        (
            ("Audio", ("link", "colour", "size"), (
                "headphones + over ear headset : cans, headset", "earbuds + in ear headphones : ear pods, buds", "portable speaker + mini speaker : boom box, music box",
                "soundbar + tv speaker : home cinema bar", "microphone + podcast mic : voice recorder, streaming mic",
            )),
            ("Phone Accessories", ("link", "colour", "pack"), (
                "phone case + protective case : mobile cover, bumper", "charging cable + charger lead : power cord, wire", "power bank + portable charger : battery pack, juice pack",
                "phone holder + phone mount : mobile stand, car cradle", "screen protector + tempered film : display guard, cover",
            )),
            ("Computing", ("link", "size", "colour"), (
                "keyboard : typing board, keypad", "computer mouse + ergonomic mouse : pointer, clicker", "webcam + video camera : call cam", "laptop stand + notebook riser : computer holder, stand",
                "docking station + usb hub : port splitter, multiport adapter",
            )),
            ("Smart Home", ("link", "power", "colour"), (
                "security camera + surveillance camera : cctv, burglar watch", "video doorbell : door chime, entry cam", "smart plug + remote socket : timer switch", "thermostat + heating controller : temperature control",
            )),
        ),
    ),
    (
        "Garden",
        (
            ("Garden Tools", ("metal", "size", "power"), (
                "hedge trimmer + hedge shears : bush cutter, clippers", "lawn mower + grass cutter : turf trimmer", "pruning shears + secateurs : rose snips, clippers",
                "garden spade + digging shovel : dirt scoop", "leaf blower + garden vacuum : yard sweeper",
            )),
            ("Outdoor Living", ("surface", "style", "colour"), (
                "garden chair + patio chair : deck seat, lounger", "parasol + garden umbrella : sun shade", "fire pit + fire bowl : camp burner", "garden bench : park seat", "hammock + hanging chair : swing bed",
            )),
            ("Planters", ("surface", "size", "colour"), (
                "plant pot + flower pot : planter, big pot", "hanging basket + hanging planter : basket for flowers", "raised bed + grow box : vegetable planter", "watering can + sprinkling can : plant waterer, jug",
            )),
            ("Barbecue", ("metal", "size", "power"), (
                "charcoal grill + kettle barbecue : bbq, cookout", "grill tongs + barbecue tools : bbq grabber", "grill cover + barbecue cover : bbq hood, cover", "pizza oven + outdoor oven : stone baker",
            )),
        ),
    ),
    (
        "Sports",
        (
            ("Fitness", ("colour", "size", "trait"), (
                "yoga mat + exercise mat : gym mat, mat", "dumbbell + hand weights : free weights, barbell", "resistance band + exercise loop : stretch strap, elastic",
                "foam roller + massage roller : muscle roller", "skipping rope + jump rope : speed cord",
            )),
            ("Camping", ("trait", "size", "colour"), (
                "tent + dome shelter : camp house", "sleeping bag + mummy bag : camp bed roll", "camping stove + gas cooker : hiking burner", "headlamp + head torch : forehead light", "cool box + cooler : ice chest, picnic fridge",
            )),
            ("Cycling", ("audience", "colour", "trait"), (
                "bike helmet + cycling helmet : bicycle hat, head protection", "bicycle light + bike lamp : rear blinker", "cycling shorts + bib shorts : padded bike pants", "bike lock + chain lock : bicycle security", "bike pump + tyre inflator : air filler",
            )),
            ("Swimming", ("audience", "colour", "size"), (
                "swimming goggles : pool glasses", "swimsuit + bathing suit : swim costume, bikini", "swim cap + bathing cap : pool hat", "snorkel set + diving mask : underwater glasses",
            )),
        ),
    ),
    (
        "Beauty",
        (
            ("Skin Care", ("concern", "scent", "volume"), (
                "face cream + moisturiser : day lotion, hydrating gel", "facial cleanser + face wash : cleansing foam, soap", "body lotion + body milk : skin softener", "sun cream + sunscreen : spf lotion, uv block",
                "face serum + facial oil : glow drops",
            )),
            ("Hair Care", ("concern", "scent", "volume"), (
                "shampoo : hair wash", "conditioner + hair balm : hair softener, detangler", "hair mask + deep treatment : hair repair pack", "styling gel + hair wax : hair glue, pomade",
            )),
            ("Grooming Tools", ("power", "audience", "colour"), (
                "hair dryer + blow dryer : hair blower", "electric shaver + razor : beard remover", "beard trimmer + hair clipper : clippers, stubble cutter", "toothbrush + sonic toothbrush : teeth cleaner, brush", "hair brush + paddle brush : detangling brush, brush",
            )),
            ("Fragrance", ("scent", "audience", "volume"), (
                "eau de parfum + perfume spray : cologne, scent", "deodorant + roll-on deo : antiperspirant, armpit spray", "scented candle + wax candle : aroma light, wick jar", "reed diffuser + room fragrance : air freshener, aroma sticks",
            )),
        ),
    ),
    (
        "Pets",
        (
            ("Dog Supplies", ("breed", "size", "colour"), (
                "dog bed + pet cushion : puppy basket, mat", "dog lead + dog leash : walking strap", "dog collar + neck band : pet necklace", "dog harness + walking vest : pulling strap, vest", "chew toy + tug toy : dog bone",
            )),
            ("Cat Supplies", ("breed", "size", "colour"), (
                "scratching post + cat tree : kitty tower, climbing stand", "litter box + litter tray : kitty toilet", "cat toy + feather wand : kitten teaser", "cat carrier + pet transport box : kitty cage, travel crate",
            )),
            ("Pet Feeding", ("surface", "pack", "size"), (
                "pet bowl + feeding dish : dog plate", "automatic feeder + food dispenser : timed pet bowl", "pet fountain + water dispenser : cat drinking station", "treat jar + food container : snack bin",
            )),
            ("Pet Care", ("concern", "scent", "size"), (
                "pet shampoo + coat wash : dog soap", "grooming brush + deshedding comb : fur remover, brush", "nail clipper + claw trimmer : paw cutter, clippers", "flea comb + tick remover : bug catcher",
            )),
        ),
    ),
    (
        "Toys",
        (
            ("Building Toys", ("theme", "pack", "size"), (
                "building blocks + construction bricks : stacking cubes", "marble run + ball track : rolling maze", "magnetic tiles + magnet blocks : click shapes", "model kit + assembly kit : craft build",
            )),
            ("Games", ("theme", "pack", "style"), (
                "board game + family game : table game", "jigsaw puzzle + picture puzzle : brain teaser", "card game + playing cards : deck", "dice game + travel game : pocket fun",
            )),
            ("Soft Toys", ("theme", "size", "colour"), (
                "plush toy + stuffed animal : cuddly, teddy", "doll + rag doll : baby figure", "hand puppet + finger puppet : show doll, theatre figure", "comforter blanket + baby comforter : snuggle cloth",
            )),
            ("Outdoor Play", ("theme", "size", "colour"), (
                "scooter + kick scooter : push ride", "balance bike + training bike : first bicycle", "sandpit + sand box : beach play tub", "trampoline + bouncer : jump mat, mat", "kite + stunt kite : wind flyer",
            )),
        ),
    ),
    (
        "Workshop",
        (
            ("Power Tools", ("power", "size", "trait"), (
                "drill driver + power drill : screw gun, hole maker", "circular saw + plunge saw : wood cutter", "sander + orbital sander : smoothing machine", "angle grinder + disc grinder : metal cutter, flex", "jigsaw tool + scroll saw : curve cutter",
            )),
            ("Hand Tools", ("metal", "pack", "size"), (
                "screwdriver + bit driver : turnscrew", "hammer + claw hammer : nail banger", "spanner + wrench : nut turner", "pliers + pincers : gripper", "spirit level + bubble level : straightener",
            )),
            ("Fixings", ("metal", "pack", "size"), (
                "wood screws + chipboard screws : fasteners", "wall plugs + screw anchors : dowels, fasteners", "angle bracket + corner brace : shelf support, l shape", "hinge + door hinge : pivot", "cabinet handle + drawer pull : knob",
            )),
            ("Paint", ("colour", "volume", "trait"), (
                "wall paint + emulsion : room colour", "wood varnish + wood stain : timber finish, lacquer", "spray paint + aerosol paint : graffiti can", "masking tape + painters tape : edge strip", "paint roller + roller set : wall brush, brush",
            )),
        ),
    ),
)  # fmt: skip

TITLE_FILLERS = ("premium", "classic", "pro", "everyday", "comfort", "plus", "deluxe", "essential", "select", "new", "original", "ultra")
CHEAP_WORDS = ("cheap", "budget", "low price", "on sale")
FINE_WORDS = ("best", "luxury", "high quality", "top rated")
# Two lists whose combinations make brand names that belong to nobody.
BRAND_STARTS = (
    "Quill", "Tarn", "Brind", "Vesk", "Mord", "Harl", "Zanth", "Plov", "Ruskin", "Fenn", "Ostr", "Glim", "Wex", "Druv", "Calth", "Yarr", "Jond", "Pesk", "Skov", "Undr",
    "Thald", "Brux", "Ilver", "Nerth", "Gost", "Kemb", "Luthr", "Ambr", "Strov", "Zepp", "Hask", "Velm", "Ordr", "Crisp", "Dwell", "Fjald", "Murv", "Rond", "Taz", "Wimb",
)  # fmt: skip
BRAND_ENDS = ("holt", "mere", "ovar", "wick", "asko", "unda", "elby", "irro", "stad", "eska", "omi", "arden", "ulo", "ysse", "orth", "inka", "abel", "etto", "umma", "ozzi")  # fmt: skip


@dataclass(frozen=True)
class AttributeValue:
    """One value of one dimension: how titles write it and which other words shoppers use for it."""

    dimension: int
    title: str
    synonyms: tuple[str, ...]


@dataclass(frozen=True)
class ProductType:
    """One product type; `aisle` numbers run over all departments, `dimensions` index `DIMENSIONS`."""

    department: int
    aisle: int
    department_name: str
    aisle_name: str
    dimensions: tuple[int, int, int]
    titles: tuple[str, ...]
    colloquial: tuple[str, ...]


@functools.cache
def attribute_values() -> tuple[AttributeValue, ...]:
    """All attribute values, dimension by dimension; a value's place here is its id everywhere in the marketplace."""
    values = []
    for dimension, entries in enumerate(DIMENSIONS.values()):
        for entry in entries:
            title, _, synonyms = entry.partition("=")
            values.append(AttributeValue(dimension, title, tuple(synonyms.split(","))))
    return tuple(values)


@functools.cache
def product_types(departments: int) -> tuple[ProductType, ...]:
    """The product types of the first `departments` departments; a type's place here is its id."""
    dimension_ids = {name: number for number, name in enumerate(DIMENSIONS)}
    types: list[ProductType] = []
    aisle_number = 0
    for department, (department_name, aisles) in enumerate(DEPARTMENTS[:departments]):
        for aisle_name, dimensions, entries in aisles:
            first, second, third = (dimension_ids[name] for name in dimensions)
            for entry in entries:
                titles, _, colloquial = entry.partition(":")
                names = tuple(name.strip() for name in titles.split("+"))
                words = tuple(name.strip() for name in colloquial.split(","))
                types.append(ProductType(department, aisle_number, department_name, aisle_name, (first, second, third), names, words))
            aisle_number += 1
    return tuple(types)
