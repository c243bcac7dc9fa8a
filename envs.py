"""Environments for POAD: small decision problems whose actions are sentences.

First the tabular part. A `TokenMDP` has actions that are sequences of tokens; all prefixes
of its actions form a tree, the *trie*. S states, A actions, V words, N prefixes (its inner
nodes). Then text environments: the agent reads a short paragraph and answers with one
sentence.

    name           the lesson                            reward                   the limit
    pancake        which word opens the microwave?       +1, or -1 at the limit   5 steps
    lunch          the best sentence can be the longest  short 0.7, long 1.0      12 steps
    food           the whole kitchen, sparse reward      +1 at the end            50 steps
    entertainment  a longer plan with two hands          +1 at the end            50 steps
    orders         words**slots sentences                share of right words     1 a guest
    salad, salad2  actions that take time                moves cost, chops pay    200 moves
    scikit         free text: one line of code           ROC-AUC, or -1           5 steps

They follow Gymnasium's calling convention without needing it; `make(name, **options)`
builds one. Lunch and orders are our own, the others follow the experiments of the paper
(arXiv 2405.15821). Last, `tiny_lm`, a language model that learns to speak an environment's
language in seconds.
"""
import ast
import inspect
import random
import re
import warnings
from collections import Counter, namedtuple
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from itertools import product
from operator import eq

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import Split
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def require(ok, message):
    """Raise a ValueError that says `message`, unless `ok`."""
    if not ok:
        raise ValueError(message)


# ------------------------------------------------- tables


class TokenMDP:
    """A finite Markov decision process whose actions are token sequences.

    transition  (S, A, S)  P(s' | s, a); a terminal state loops to itself with reward 0
    reward      (S, A)     expected reward of action a in state s
    actions     A tuples of token ids, distinct, none a proper prefix of another: the last
                token tells that it is last
    vocab       V distinct strings
    Tables are copied to float64; malformed input is a ValueError. Derived:
    prefixes    N token tuples: every proper prefix of every action, shorter ones first
    child       (N, V)     index of the prefix after that token, or −1
    leaf        (N, V)     id of the action that this token completes, or −1
    >>> mdp = TokenMDP([[[1.0], [1.0]]], [[0.0, 1.0]], [(0,), (1, 0)], ["wait", "eat"])
    >>> mdp.prefixes, mdp.child.tolist(), mdp.leaf.tolist()
    (((), (1,)), [[-1, 1], [-1, -1]], [[0, -1], [1, -1]])
    """

    def __init__(self, transition, reward, actions, vocab):
        self.vocab = tuple(vocab)
        self.actions = tuple(tuple(np.asarray(action).tolist()) for action in actions)
        self.transition = torch.tensor(np.asarray(transition, dtype=float))  # (S, A, S)
        self.reward = torch.tensor(np.asarray(reward, dtype=float))         # (S, A)
        self._check()
        self._grow_trie()

    def _check(self):
        strings = all(isinstance(word, str) for word in self.vocab)
        require(strings and len(set(self.vocab)) == len(self.vocab),
                f"vocab must be distinct strings, not {self.vocab}")
        known = range(len(self.vocab))
        for i, action in enumerate(self.actions):
            require(action and set(action) <= set(known),
                    f"action {i} is {action}: it needs token ids, all in {known}")
        size = (*self.reward.shape[:1], len(self.actions))                  # (S, A)
        fits = self.reward.shape == size and self.transition.shape == (*size, size[0])
        require(fits and self.reward.numel(), "transition must be (S, A, S), reward "
                f"(S, A), with A = {len(self.actions)} actions")
        off = abs(self.transition.sum(-1) - 1)                              # (S, A)
        fine = (off <= 1e-6) & (self.transition >= 0).all(-1) & self.reward.isfinite()
        for state, action in (~fine).nonzero().tolist():
            raise ValueError(f"state {state}, action {action}: the transition must be "
                             "probabilities that sum to one, the reward a finite number")

    def _grow_trie(self):
        prefixes = set()
        for action in self.actions:
            prefixes.update(action[:j] for j in range(len(action)))
        self.prefixes = tuple(sorted(sorted(prefixes), key=len))
        number = {prefix: n for n, prefix in enumerate(self.prefixes)}
        self.child = torch.full((len(self.prefixes), len(self.vocab)), -1)  # (N, V)
        self.leaf = self.child.clone()                                      # (N, V)
        for prefix in self.prefixes[1:]:
            self.child[number[prefix[:-1]], prefix[-1]] = number[prefix]
        for i, action in enumerate(self.actions):
            require(action not in prefixes and action not in self.actions[:i],
                    f"action {i}, {action}, is another's proper prefix, or its equal")
            self.leaf[number[action[:-1]], action[-1]] = i


def random_mdp(seed, states=4, actions=5, vocab=4, max_length=4):
    """A random TokenMDP with actions of mixed lengths, the same for the same seed.

    Rewards are standard normal, transitions uniform numbers normalised. The actions are
    leaves, spread evenly from the shortest to the longest, of a trie that grows by
    splitting random leaves. ValueError where they do not fit.
    """
    longest = vocab**max_length                         # that many sequences of full length
    require(min(states, actions, vocab, max_length) > 0 and actions <= longest,
            f"{actions} actions do not fit into {longest}, or a size is below 1")
    generator = torch.Generator().manual_seed(seed)
    enough = max(actions, min(2 * actions, longest - vocab + 1))    # a split less than all
    leaves = [(word,) for word in range(vocab)]
    while True:
        short = [leaf for leaf in leaves if len(leaf) < max_length]
        mixed = len(leaves[0]) < len(leaves[-1])
        if not short or (mixed and len(leaves) >= enough):
            break
        leaf = short[torch.randint(len(short), (), generator=generator)]
        leaves.remove(leaf)
        leaves += [leaf + (word,) for word in range(vocab)]
        leaves.sort(key=len)
    last = len(leaves) - 1
    chosen = [leaves[i * last // max(actions - 1, 1)] for i in range(actions)]
    size = (states, actions, states)
    weight = torch.rand(size, generator=generator, dtype=torch.float64)     # (S, A, S)
    reward = torch.randn(size[:2], generator=generator, dtype=torch.float64)  # (S, A)
    transition = weight / weight.sum(-1, keepdim=True)
    return TokenMDP(transition, reward, chosen, [f"w{i}" for i in range(vocab)])


def lunch_mdp():
    """The `lunch` environment as tables, a trap for learners that discount tokens.

    State 0, in pieces: "put ..." leads to state 1, all else waits. State 1, in the bowl:
    "eat it" pays 0.7, "carry ..." pays 1.0, both lead to state 2, the end. At γ = 0.95
    serving is best; discounted per token (γ_w = γ), its 17 words are worth 0.95¹⁶ = 0.44
    against 0.95 · 0.7 = 0.665.
    """
    sentences = [
        "wait", "put the salad in the bowl", "eat it", "carry the full bowl over to the "
        "table where the guest is waiting and serve the salad"]
    vocab = sorted(set(" ".join(sentences).split()))
    actions = []
    for sentence in sentences:
        actions.append([vocab.index(word) for word in sentence.split()])
    next_state = torch.tensor([[0, 1, 0, 0], [1, 1, 2, 2], [2, 2, 2, 2]])        # (S, A)
    reward = [[0, 0, 0, 0], [0, 0, 0.7, 1], [0, 0, 0, 0]]
    return TokenMDP(torch.nn.functional.one_hot(next_state), reward, actions, vocab)


# ------------------------------------------------- what all texts share


class TextEnv:
    """What all text environments share: clock, menu, and what a bad action does.

    A subclass sets `start`, its first state, and writes
        choices()      admissible action → what it does, in a form that `apply` reads; or
                       menu(), a new list of actions, empty where they are unrestricted
        observe()      what the agent reads: one paragraph, which its action continues
        apply(action)  does an admissible action; returns (reward, outcome): None, or at the
                       end whether it succeeded
    `state` is hashable, in plain words, without the clock; it can be read and set. Deep
    copies work. reset(seed) seeds the environment's own generator, reset() continues it.
    """

    limit = 50                  # ticks of the clock until the episode is cut
    limit_reward = 0.0          # what the cut pays
    refused = 0.0               # what an inadmissible action pays

    def __init__(self):
        self.rng = random.Random(0)
        self.reset()

    def reset(self, seed=None):
        """Start an episode; returns (observation, info)."""
        if seed is not None:
            self.rng = random.Random(int(seed))
        self.clock = 0
        self.done = False
        self.state = self.start
        return self._look()

    def step(self, action):
        """Do `action`; returns (observation, reward, terminated, truncated, info).

        An action outside the menu changes nothing, costs a step and sets info["invalid"].
        A step after an episode's end, where info["success"] is told, is a RuntimeError.
        """
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        self.clock += 1
        valid = isinstance(action, str) and self.admits(action)
        if valid:
            reward, outcome = self.apply(action)
        else:
            reward, outcome = self.refuse()
        terminated = outcome is not None
        truncated = not terminated and self.clock >= self.limit
        if truncated:
            reward += self.limit_reward
        self.done = terminated or truncated
        obs, info = self._look()
        if not valid:
            info["invalid"] = True
        if self.done:
            info["success"] = bool(outcome)
        return obs, reward, terminated, truncated, info

    def _look(self):
        menu = self.menu()
        return self.observe(), {"menu": menu} if menu else {}

    def menu(self):
        """The admissible actions, distinct strings."""
        return list(self.choices())

    def random_action(self):
        """A random admissible action, uniform over the menu, from the own generator."""
        return self.rng.choice(self.menu())

    def admits(self, action):
        """Whether the string `action` is admissible now."""
        return action in self.menu()

    def refuse(self):
        """What an inadmissible action does; returns (reward, outcome) as `apply` does."""
        return self.refused, None


class Player:
    """An environment being played: any that follows the calling convention above.

    What it answers is checked here; what is wrong is a ValueError that names the field.
    obs, info   what is shown now
    menu        what can be said now, a list of texts; None where text is free, or at an end
    total       the return so far
    over, cut   whether the episode is over, and whether that was only a time limit
    success     at its end whether it was done, before that None
    """

    def __init__(self, env, seed=None):
        self.env = env
        self.begin(seed)

    def begin(self, seed=None):
        """Start an episode."""
        answer = self.env.reset(seed=seed)
        require(isinstance(answer, (tuple, list)) and len(answer) == 2,
                "reset must return (observation, info), as Gymnasium's does")
        self.total = 0.0
        self.over = False
        self.cut = False
        self.success = None
        self._show(*answer)

    def step(self, action):
        """Do `action`; returns the reward."""
        answer = self.env.step(action)
        require(isinstance(answer, (tuple, list)) and len(answer) == 5, "step must return "
                "(observation, reward, terminated, truncated, info), as Gymnasium's does")
        obs, reward, terminated, truncated, info = answer
        number = isinstance(reward, (int, float, np.number, np.bool_))
        require(number and np.isfinite(reward),
                f"the environment's reward is {reward!r}, expected a finite number")
        self.total += float(reward)
        terminated = _flag("terminated", terminated)
        truncated = _flag("truncated", truncated)
        self.over = terminated or truncated
        self.cut = truncated and not terminated
        self._show(obs, info)
        if self.over:
            told = info.get("success", "missing")
            self.success = _flag('info["success"] at the end', told)
        return float(reward)

    def _show(self, obs, info):
        require(isinstance(obs, str) and obs.strip(),
                f"the observation is {obs!r}, expected a text to read")
        require(isinstance(info, dict), f"info is {info!r}, expected a dict")
        self.obs = obs
        self.info = info
        self.menu = None
        if not self.over and info.get("menu") is not None:
            self.menu = _listed(info["menu"])


def make_players(env_fn, seeds):
    """A Player for each seed, each with an environment of its own; ValueError if not."""
    require(callable(env_fn), "env_fn makes environments: pass a class, not an instance")
    seeds = list(seeds)
    envs = [env_fn() for _ in seeds]
    require(len(set(map(id, envs))) == len(envs),
            "env_fn must make a new environment at each call")
    return list(map(Player, envs, seeds))


def _flag(name, value):
    fits = isinstance(value, (int, float, np.generic)) and value in (0, 1)
    require(fits, f"{name} is {value!r}, expected True or False")
    return bool(value)


def _listed(menu):
    require(not isinstance(menu, (str, set)), f"menu is {menu!r}, expected a list of texts")
    try:
        menu = list(menu)
    except TypeError:
        menu = [menu]                                   # refused below: it is no text
    require(menu, "menu is empty: leave it out where text is free")
    wrong = [text for text in menu if not isinstance(text, str) or not text.strip()]
    require(not wrong, f"menu has {wrong}, expected a list of texts")
    [(text, times)] = Counter(menu).most_common(1)
    require(times == 1, f"menu has {text!r} {times} times")
    return list(map(str, menu))                         # NumPy's strings become Python's


def _choose(name, value, choices):
    choices = list(map(repr, choices))                  # True is not 1 here
    expected = ", ".join(choices)
    require(repr(value) in choices, f"{name} is {value!r}: choose from {expected}")


def _and(names):
    """["tomato", "bowl"] → "the tomato and the bowl"; [] → "nothing"."""
    return " and ".join(f"the {name}" for name in names) or "nothing"


# ------------------------------------------------- two short stories


class Story(TextEnv):
    """An environment that is a few tables; its state is the name of a scene.

    scenes   scene → a sentence to read
    actions  scene → {admissible action: next scene}
    pays     ending → reward; `goal` is the good ending
    """

    def choices(self):
        return self.actions.get(self.state, {})

    def observe(self):
        return self.text.format(self.scenes[self.state])

    def apply(self, action):
        self.state = self.actions[self.state][action]
        if self.state in self.pays:
            return self.pays[self.state], self.state == self.goal
        return 0.0, None


class Pancake(Story):
    """The paper's case study of token credit; a random agent gets 0.375 on average."""

    limit = 5
    limit_reward = -1.0
    start = "in hand, closed"
    goal = "inside, closed"
    text = ("You are in the kitchen. {} You want the pancake inside the closed microwave. "
            "Your next step is to")
    scenes = {
        "in hand, closed": "You hold the pancake and see a closed microwave.",
        "in hand, open": "You hold the pancake and see an open microwave.",
        "inside, open": "You hold nothing and see an open microwave with the pancake "
                        "inside.",
        "inside, closed": "You hold nothing and see a closed microwave with the pancake "
                          "inside."}
    actions = {
        "in hand, closed": {"open the microwave": "in hand, open",
                            "close the microwave": "in hand, closed"},
        "in hand, open": {"put the pancake in the microwave": "inside, open"},
        "inside, open": {"open the microwave": "inside, open",
                         "close the microwave": "inside, closed"}}
    pays = {"inside, closed": 1.0}


class Lunch(Story):
    """A trap for learners that discount tokens, see `lunch_mdp`; success means served."""

    limit = 12
    start = "in pieces"
    goal = "served"
    text = ("You are in the kitchen. {} You want the guest at the table to have lunch. "
            "Your next step is to")
    scenes = {
        "in pieces": "The salad lies in pieces on the board.",
        "in the bowl": "The salad is in the bowl and ready.",
        "eaten": "You have eaten the salad.",
        "served": "The guest has the salad."}
    actions = {
        "in pieces": {"put the salad in the bowl": "in the bowl", "wait": "in pieces"},
        "in the bowl": {
            "eat it": "eaten",
            "wait": "in the bowl",
            "carry the full bowl over to the table where the guest is waiting and serve "
            "the salad": "served"}}
    pays = {"eaten": 0.7, "served": 1.0}


# ------------------------------------------------- two evenings at home


class Household(TextEnv):
    """Its `choices()` are action → {part of the state: new value}, `success()` pays +1."""

    def apply(self, action):
        self.state = self.state._replace(**self.choices()[action])
        if self.success():
            return 1.0, True
        return 0.0, None


ROOMS = ("living room", "kitchen", "bathroom", "bedroom")
FOOD_ACTIONS = (*ROOMS, "item", "appliance", "grab", "put", "open", "close")
FOOD_WORDINGS = {       # a line for each of FOOD_ACTIONS
    "short": """\
walk to the living room
walk to the kitchen
walk to the bathroom
walk to the bedroom
walk to the {item}
walk to the {appliance}
grab the {item}
put the {item} in the {appliance}
open the {appliance}
close the {appliance}""",
    "long": """\
leave this room and walk slowly through the hallway until you reach the living room
leave this room and follow the smell of food all the way to the kitchen
leave this room and go down the corridor to the small bathroom with white tiles
leave this room and climb up the wooden stairs to the quiet bedroom above
cross the floor with a few calm steps and stop right beside the {item}
cross the floor with a few calm steps and stop in front of the {appliance}
reach out with one free hand and carefully pick up the {item} from the table
lift both hands a little and gently place the {item} inside the waiting {appliance}
put two fingers on the handle and pull the door of the {appliance} open
press one palm on the door and push until the {appliance} is firmly closed"""}
FOOD_UNSEEN = (         # (item, appliance), to test generalisation
    ("cheese", "microwave"), ("hamburger", "microwave"), ("apple pie", "microwave"),
    ("pizza", "microwave"), ("dishes", "dishwasher"), ("clothes", "washing machine"))
FoodState = namedtuple("FoodState", "room near item open")


class Food(Household):
    """Food preparation (the paper's VirtualHome task): the pancake into the microwave.

    It takes 6 steps at best; a random agent manages in 1.69 % of its episodes. `item` and
    `appliance` swap words, wording "short" says an action in 3-6 words, "long" in 14 or 15.
    Item and appliance keep their state while the agent is elsewhere and cannot see them.
    """

    start = FoodState("kitchen", (), "table", False)

    def __init__(self, item="pancake", appliance="microwave", wording="long"):
        plain = all(map(str.isalpha, f"{item} {appliance}".split(" ")))
        require(plain and len({item, appliance, *ROOMS}) == 2 + len(ROOMS),
                "item and appliance must be plain words, different, and not rooms")
        _choose("wording", wording, FOOD_WORDINGS)
        self.item = item
        self.appliance = appliance
        texts = FOOD_WORDINGS[wording].format(item=item, appliance=appliance)
        self.words = dict(zip(FOOD_ACTIONS, texts.splitlines(), strict=True))
        super().__init__()

    def choices(self):
        room, near, item, door_open = self.state
        choices = {x: {"room": x, "near": ()} for x in ROOMS if x != room}
        both = ("item", "appliance")
        if room == "kitchen":
            if "item" not in near:
                where = {"table": ("item",), "hand": (), "inside": both}
                choices["item"] = {"near": where[item]}
            if "appliance" not in near:
                where = {"table": ("appliance",), "hand": ("appliance",), "inside": both}
                choices["appliance"] = {"near": where[item]}
            if near == ("item",):
                choices["grab"] = {"item": "hand", "near": ()}
            if "appliance" in near:
                if item == "hand":
                    choices["put"] = {}
                    if door_open:
                        choices["put"] = {"item": "inside", "near": both}
                choices["open"] = {"open": True}
                choices["close"] = {"open": False}
        return {self.words[key]: change for key, change in choices.items()}

    def success(self):
        return self.state.item == "inside" and not self.state.open

    def observe(self):
        item = f"the {self.item}"
        near = _and(getattr(self, thing) for thing in self.state.near)
        held = item if self.state.item == "hand" else "nothing"
        seen = ""
        if self.state.room == "kitchen":
            door = "an open" if self.state.open else "a closed"
            inside = {"hand": "", "table": f" and {item} on the table",
                      "inside": f" with {item} inside"}[self.state.item]
            seen = f"You see {door} {self.appliance}{inside}. "
        return (f"You are in the {self.state.room}, near {near}. You hold {held}. {seen}"
                f"You want {item} inside the closed {self.appliance}. Your next step is to")


EntertainmentState = namedtuple(
    "EntertainmentState", "room near sitting television chips milk")


class Entertainment(Household):
    """An evening at home (the paper's VirtualHome task): television, chips and milk.

    Success: sitting, the television on, chips and milk each in hand or on the coffee table.
    It takes 11 steps at best; a random agent manages in 0.30 % of its episodes. Two full
    hands cannot switch anything.
    """

    start = EntertainmentState("kitchen", "nothing", False, False, "kitchen", "kitchen")

    def _snacks(self, place):
        return [snack for snack in ("chips", "milk") if getattr(self.state, snack) == place]

    def choices(self):
        s = self.state
        if s.sitting:
            return {"stand up from the sofa": {"sitting": False}}
        choices = {}
        for room in ROOMS:
            if room != s.room:
                choices[f"walk to the {room}"] = {"room": room, "near": "nothing"}
        if s.room == "kitchen":
            for snack in self._snacks("kitchen"):
                if s.near == snack:
                    choices[f"grab the {snack}"] = {snack: "hand", "near": "nothing"}
                else:
                    choices[f"walk to the {snack}"] = {"near": snack}
        if s.room == "living room":
            for place in ("coffee table", "television", "sofa"):
                if place != s.near:
                    choices[f"walk to the {place}"] = {"near": place}
        if s.near == "coffee table":
            for snack in self._snacks("hand"):
                choices[f"put the {snack} on the coffee table"] = {snack: "table"}
            for snack in self._snacks("table"):
                choices[f"grab the {snack}"] = {snack: "hand"}
        elif s.near == "television":
            switch = "off" if s.television else "on"
            change = {}
            if len(self._snacks("hand")) < 2:
                change = {"television": not s.television}
            choices[f"turn {switch} the television"] = change
        elif s.near == "sofa":
            choices["sit down on the sofa"] = {"sitting": True}
        return choices

    def success(self):
        s = self.state
        return s.sitting and s.television and "kitchen" not in (s.chips, s.milk)

    def observe(self):
        s = self.state
        place = f"near the {s.near}"
        if s.near == "nothing":
            place = "near nothing"
        if s.sitting:
            place = "sitting on the sofa"
        seen = ""
        if s.room == "kitchen":
            seen = f"You see {_and(self._snacks('kitchen'))}. "
        if s.room == "living room":
            seen = (f"The television is {'on' if s.television else 'off'}. "
                    f"You see {_and(self._snacks('table'))} on the coffee table. ")
        return (f"You are in the {s.room}, {place}. You hold {_and(self._snacks('hand'))}. "
                f"{seen}You want to sit and watch television with the chips and the milk. "
                "Your next step is to")


# ------------------------------------------------- orders

GUESTS = ("Ann", "Bob", "Cleo", "Dan")
COURSES = (     # one group for each slot, one word for each choice
    "soup salad melon shrimp olives toast", "bread rice pasta fries beans corn",
    "tea coffee water juice milk cider", "cake pudding fruit waffle sorbet pie",
    "fish chicken tofu beef lamb eggs", "salt pepper butter mustard lemon oil",
    "fork spoon knife straw cup plate", "window garden corner terrace bar door")
NUMBERS = "no one two three four five six seven eight nine ten".split()
MIXED = ("{}", "fresh {}", "plenty of {}") * 2         # dishes of one to three words
OrdersState = namedtuple("OrdersState", "guest to_come perfect")


class Orders(TextEnv):
    """An action space that explodes: words ** slots sentences out of slots * words dishes.

    A random guest orders; the answer is "serve" and a dish for each slot. Each guest always
    wants the same, no two the same. Reward: share of slots that are right, divided by
    `guests`: in all at best 1, at random 1 / words. Up to 256 sentences are listed as the
    menu; beyond, the agent writes freely, and other text leaves the guest unserved.
    wording: "short", a word a dish, or "mixed", one to three words.
    State: the guest, how many come after this one, whether all dishes were right so far.
    """

    limit = float("inf")        # the episode ends with its last guest

    def __init__(self, slots=4, words=4, guests=5, wording="short"):
        _choose("slots", slots, range(1, 9))
        _choose("words", words, range(2, 7))
        _choose("guests", guests, range(1, 11))
        _choose("wording", wording, ("short", "mixed"))
        count = words**slots
        require(count >= len(GUESTS), f"slots={slots} and words={words} make {count} "
                f"orders, fewer than {len(GUESTS)}")
        self.restricted = count <= 256
        self.guests = guests
        self.courses = []
        self.wanted = {guest: [] for guest in GUESTS}
        for i, course in enumerate(COURSES[:slots]):
            dishes = course.split()[:words]
            if wording == "mixed":
                dishes = list(map(str.format, MIXED, dishes))
            self.courses.append(dishes)
            for g, guest in enumerate(GUESTS):
                shift = g // words      # with two or three, this tells four guests apart
                self.wanted[guest].append(dishes[(g + i + i % 2 * shift) % words])
        pattern = "".join(f" ({'|'.join(dishes)})" for dishes in self.courses)
        self.order = re.compile(f"serve{pattern}")
        super().__init__()

    @property
    def start(self):
        return OrdersState(self.rng.choice(GUESTS), self.guests - 1, True)

    def menu(self):
        if not self.restricted:
            return []
        return list(map(" ".join, product(["serve"], *self.courses)))

    def random_action(self):
        dishes = [self.rng.choice(course) for course in self.courses]
        return " ".join(["serve", *dishes])

    def admits(self, action):
        return self.order.fullmatch(action) is not None

    def observe(self):
        guest, to_come, _ = self.state
        return (f"You are the waiter. {guest} wants the usual lunch. After this guest "
                f"{NUMBERS[to_come]} more will come. You want every part of the lunch to "
                "be right. Your next step is to")

    def apply(self, action):
        guest, to_come, perfect = self.state
        right = 0
        served = self.order.fullmatch(action)
        if served:
            right = sum(map(eq, served.groups(), self.wanted[guest]))
        reward = right / len(self.courses) / self.guests
        perfect = perfect and right == len(self.courses)
        if to_come == 0:
            self.state = OrdersState(guest, 0, perfect)
            return reward, perfect
        self.state = OrdersState(self.rng.choice(GUESTS), to_come - 1, perfect)
        return reward, None

    def refuse(self):
        return self.apply("")           # nothing is right, and it is the next guest's turn


# ------------------------------------------------- salad

# thing or place → (floor cell where one uses it, wall cell where it stands), (row, column)
# each; the later of two names of a floor cell is the one that is read
KITCHEN = {
    "lettuce": ((1, 5), (1, 6)), "tomato": ((1, 5), (0, 5)), "onion": ((2, 5), (2, 6)),
    "bowl": ((5, 5), (6, 5)), "first board": ((1, 1), (1, 0)),
    "second board": ((2, 1), (2, 0)), "counter": ((3, 1), (3, 0))}
SaladState = namedtuple("SaladState", "cell where chopped")


class Salad(TextEnv):
    """Cooking (the paper's Overcooked task): chop the tomato, into the bowl, serve it.

    An action is an errand of n moves: walking a cell is one, so are taking and putting,
    chopping is three. An event e (chopping what the recipe needs +0.2, serving the right
    dish +1, anything else −0.1) falls on the last move: −0.1 (1 − 0.99ⁿ) + 0.99ⁿ⁻¹ e. The
    agent sees its hand and what is at most two rows and columns away. Best return at
    γ = 0.95 is 0.9092; a random agent serves in 44.2 % of its episodes of 200 moves.
    State: the agent's cell; where each thing is: a board, "hand", for foods also "bowl", or
    at home, which goes by the thing's own name; and the foods that are chopped.
    """

    foods = ("tomato",)
    recipe = ["tomato"]
    boards = ("first board",)
    limit = 200
    refused = -0.1 * (1 - 0.99)

    @property
    def start(self):
        things = (*self.foods, "bowl")
        return SaladState((1, 4), tuple(zip(things, things)), frozenset())

    @property
    def state(self):
        return SaladState(self.cell, tuple(self.where.items()), frozenset(self.chopped))

    @state.setter
    def state(self, state):
        self.cell = state.cell
        self.where = dict(state.where)
        self.chopped = set(state.chopped)

    def choices(self):
        hand = self._at("hand")
        fetch = "pick up the {}"
        if hand == "bowl":
            fetch = "put the {} in the bowl"
        visit = "walk to"
        if hand and hand not in self.chopped:
            visit = f"put the {hand} on"
        choices = {}
        for food in self.foods:
            choices[fetch.format(food)] = partial(self._fetch, food)
        choices["take the bowl"] = partial(self._fetch, "bowl")
        for board in self.boards:
            choices[f"{visit} the {board}"] = partial(self._visit_board, board)
        choices["serve the dish" if hand else "serve nothing"] = self._serve
        food = self._here()
        choices[f"chop the {food}" if food in self.foods else "chop nothing"] = self._chop
        return choices

    def observe(self):
        seen = []
        for thing, place in self.where.items():
            if place == thing and self._sees(thing):
                seen.append(thing)
        for board in self.boards:
            if self._sees(board):
                seen.append(f"{board} with {self._describe(board)}")
        row, column = self.cell
        place = f"in row {NUMBERS[row]}, column {NUMBERS[column]}"
        for spot, (floor, _) in KITCHEN.items():
            if floor == self.cell:
                place = f"at the {spot}"
        wanted = _and(f"chopped {food}" for food in self.recipe)
        held = self._describe("hand")
        return (f"You are {place}. You see {_and(seen)}. You hold {held}. You want a bowl "
                f"with {wanted} served. Your next step is to")

    def apply(self, action):
        self.moves = 1                  # what the hand does; the way to it is added
        errand = self.choices()[action]
        event = errand() or 0.0
        moves = max(self.moves, 1)
        self.clock += moves - 1         # step() has counted one
        reward = -0.1 * (1 - 0.99**moves) + 0.99 ** (moves - 1) * event
        return reward, event == 1.0 or None

    def _fetch(self, thing):
        place = self.where[thing]
        in_bowl = thing in self._in_bowl()
        if in_bowl:
            place = self.where["bowl"]
        if place == "hand":
            return
        self._walk(place, until_seen=in_bowl)
        if place in self.boards and thing in self.foods and thing not in self.chopped:
            self.moves -= 1             # only go there, to chop it
        elif not in_bowl:
            self.moves += thing == "bowl" and self._at("hand") in self.chopped
            self._handle(thing)

    def _visit_board(self, board):
        hand = self._at("hand")
        lying = self._at(board)
        self._walk(board)
        if not hand:
            self.moves -= 1             # only go there
        elif lying:
            self._handle(lying)
        else:
            self.where[hand] = board

    def _handle(self, thing):
        """Take `thing`, or unite it with what is held: the bowl and a chopped food."""
        hand = self._at("hand")
        food = thing if hand == "bowl" else hand
        if not hand:
            self.where[thing] = "hand"
        elif "bowl" in (hand, thing) and food in self.chopped:
            self.where.update({food: "bowl", "bowl": "hand"})

    def _serve(self):
        hand = self._at("hand")
        self._walk("counter")
        if not hand:
            self.moves -= 1             # only go there
            return 0.0
        if hand == "bowl" and self._in_bowl() == self.recipe:
            return 1.0
        for thing, place in self.where.items():
            if place in ("hand", hand):         # held, or in the bowl that is: it goes home
                self.where[thing] = thing
                self.chopped.discard(thing)
        return -0.1

    def _chop(self):
        food = self._here()
        if food not in self.foods or food in self.chopped:
            return 0.0
        self.moves = 3
        if self._at("hand"):
            return 0.0
        self.chopped.add(food)
        return 0.2 * (food in self.recipe)

    def _walk(self, spot, until_seen=False):
        """Walk, rows first, to `spot` or until it is in view."""
        goal, _ = KITCHEN[spot]
        while self.cell != goal and not (until_seen and self._sees(spot)):
            cell = list(self.cell)
            axis = int(cell[0] == goal[0])
            cell[axis] += 1 if cell[axis] < goal[axis] else -1
            self.cell = tuple(cell)
            self.moves += 1

    def _sees(self, spot):
        _, wall = KITCHEN[spot]
        return all(abs(here - there) <= 2 for here, there in zip(self.cell, wall))

    def _at(self, place):
        """The thing in the hand or on a board, "" if there is none."""
        return {where: thing for thing, where in self.where.items()}.get(place, "")

    def _here(self):
        """The thing on the board at which the agent stands, "" if there is none."""
        for board in self.boards:
            if KITCHEN[board][0] == self.cell:
                return self._at(board)
        return ""

    def _in_bowl(self):
        return [food for food in self.foods if self.where[food] == "bowl"]

    def _describe(self, place):
        thing = self._at(place)
        if not thing:
            return "nothing"
        if thing in self.chopped:
            return f"the chopped {thing}"
        if thing == "bowl" and self._in_bowl():
            return "the bowl with " + _and(f"chopped {food}" for food in self._in_bowl())
        return f"the {thing}"


class Salad2(Salad):
    """And lettuce, a second board, an onion; best return 0.9176, random success 1.02 %."""

    foods = ("tomato", "lettuce", "onion")
    recipe = ["tomato", "lettuce"]
    boards = ("first board", "second board")


# ------------------------------------------------- scikit

SCIKIT_NAMES = {        # name → (module, {argument: values}); first two of preprocessing
    "StandardScaler": ("preprocessing", {}),
    "PCA": ("decomposition", {"n_components": (1, 2, 4, 8)}),
    "GaussianNB": ("naive_bayes", {}),
    "KNeighborsClassifier": ("neighbors", {
        "n_neighbors": (1, 3, 5, 10, 20), "weights": ("uniform", "distance")}),
    "LogisticRegression": ("linear_model", {
        "C": (0.01, 0.1, 0.5, 1.0, 10.0), "max_iter": (10, 50, 100, 200)}),
    "DecisionTreeClassifier": ("tree", {
        "max_depth": (1, 2, 4, 8), "criterion": ("gini", "entropy")}),
    "RandomForestClassifier": ("ensemble", {
        "n_estimators": (1, 5, 10, 20, 50), "max_depth": (1, 2, 4, 8)})}


class Scikit(TextEnv):
    """Data-science coding: one line of free text, read as a scikit-learn classifier.

    Such as "make_pipeline(StandardScaler(), LogisticRegression(C=0.5))". Reward: mean
    ROC-AUC (one-vs-one for several classes) over five stratified 50/50 splits, which ends
    the episode; −1 for whatever fails. The text is never executed, but parsed and rebuilt
    from SCIKIT_NAMES; limits are sizes, not seconds, so that one seed gives one run. The
    state is the name of the last error, "" at first.
    """

    start = ""
    limit = 5
    refused = -1.0

    def __init__(self, dataset="breast cancer"):
        _choose("dataset", dataset, ("breast cancer", "wine", "iris", "digits"))
        self.dataset = dataset
        super().__init__()

    def menu(self):
        return []

    def observe(self):
        x, y = _data(self.dataset)
        rows, columns = x.shape
        error = f"The last line failed with a {self.state}. " if self.state else ""
        return (f"The data set {self.dataset} has {rows} rows, {columns} columns and "
                f"{len(set(y))} classes. {error}You want a scikit learn classifier with a "
                "high score. Your next line of code is")

    def random_action(self):
        """A random line; one in five has a typo, a wrong name or a wrong argument."""
        first, second, *classifiers = SCIKIT_NAMES
        step = self.rng.choice([first, second])
        names = [step] * self.rng.randrange(2)          # with it or without
        names.append(self.rng.choice(classifiers))
        calls = []
        for name in names:
            _, arguments = SCIKIT_NAMES[name]
            argument, values = self.rng.choice([("", ()), *arguments.items()])
            if argument:
                argument += f"={self.rng.choice(values)!r}"
            calls.append(f"{name}({argument})")
        text = ", ".join(calls)
        if len(calls) > 1:
            text = f"make_pipeline({text})"
        if self.rng.random() < 0.8:
            return text
        wrong_name = text.replace(name, "BestClassifier")
        wrong_argument = text.replace(calls[-1], f"{name}(size=0)")
        return self.rng.choice([text[:-1], wrong_name, wrong_argument])

    def admits(self, action):
        try:
            _auc(action, self.dataset)
        except Exception as error:      # whatever the text provokes, also in scikit-learn
            self.state = type(error).__name__
            return False
        return True

    def apply(self, action):
        return _auc(action, self.dataset), True


@cache
def _data(name):
    load = getattr(import_module("sklearn.datasets"), f"load_{name.replace(' ', '_')}")
    return load(return_X_y=True)


@cache
def _auc(text, dataset):
    """Mean ROC-AUC of the classifier that `text` describes, over five stratified splits."""
    from sklearn.model_selection import cross_val_score, train_test_split
    from threadpoolctl import threadpool_limits  # comes with scikit-learn
    require(len(text) <= 200 and text.count("(") <= 6, "the line is too long")
    x, y = _data(dataset)
    rows = range(len(y))
    splits = []
    for seed in range(5):
        splits.append(train_test_split(rows, test_size=0.5, random_state=seed, stratify=y))
    with warnings.catch_warnings(), threadpool_limits(1):      # more would only wait
        warnings.simplefilter("ignore")
        model = _estimator(ast.parse(text.strip(), mode="eval").body)
        scores = cross_val_score(model, x, y, cv=splits, scoring="roc_auc_ovo",
                                 error_score="raise")
    return float(scores.mean())


def _estimator(node):
    """The estimator that a call in a syntax tree describes, or NameError, TypeError."""
    match node:
        case ast.Call(ast.Name("make_pipeline"), steps, []) if steps:
            return import_module("sklearn.pipeline").make_pipeline(*map(_estimator, steps))
        case ast.Call(ast.Name(name), [], keywords) if name in SCIKIT_NAMES:
            module, allowed = SCIKIT_NAMES[name]
        case _:
            raise NameError("not a call of a listed name")
    given = {}
    for keyword in keywords:
        value = ast.literal_eval(keyword.value)
        if keyword.arg in given or value not in allowed.get(keyword.arg, ()):
            raise TypeError("not a listed argument or value")
        given[keyword.arg] = value
    estimator = getattr(import_module(f"sklearn.{module}"), name)(**given)
    if "random_state" in estimator.get_params():
        estimator.set_params(random_state=0)
    return estimator


# ------------------------------------------------- all of them

ENVS = {
    "pancake": Pancake, "lunch": Lunch, "food": Food, "entertainment": Entertainment,
    "orders": Orders, "salad": Salad, "salad2": Salad2, "scikit": Scikit}


def make(name, **options):
    """Build an environment of ENVS; ValueError for a name or option that is not there."""
    _choose("the environment", name, ENVS)
    allowed = list(inspect.signature(ENVS[name]).parameters)
    for option in options:
        require(option in allowed, f"{name} takes the options {allowed}, no {option}")
    return ENVS[name](**options)


# ------------------------------------------------- who speaks their language


@contextmanager
def seeded(seed):
    """Inside, torch draws what this seed says; outside, as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tiny_lm(env_fn, seed=0, pretrain_steps=300):
    """A language model without a download, pre-trained in seconds: (lm, tokenizer).

    A Llama of 2 layers × 64 with one token a word. It reads observations with random
    admissible actions: it speaks the language and knows nothing of the dynamics.
    """
    texts = [joined(*pair) for pair in _random_play(env_fn(), seed)]
    tokenizer = _word_tokenizer(texts)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=1024)
    with seeded(seed):
        lm = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
        for _ in trange(pretrain_steps, desc="pre-training the tiny LM", leave=False):
            chosen = [f"{texts[i]}<eos>" for i in torch.randint(len(texts), (16,))]
            batch = tokenizer(chosen, padding=True, return_tensors="pt")
            padding = batch.attention_mask == 0                             # (B, L)
            labels = batch.input_ids.masked_fill(padding, -100)     # −100 is not learned
            optimizer.zero_grad()
            lm(batch.input_ids, batch.attention_mask, labels=labels).loss.backward()
            optimizer.step()
    return lm, tokenizer


def _random_play(env, seed, steps=3000):
    """The distinct (observation, action) pairs of a random agent, in order."""
    pairs = {}
    player = Player(env, seed)
    for _ in range(steps):
        action = env.random_action()
        pairs[player.obs, action] = None
        player.step(action)
        if player.over:
            player.begin()
    return list(pairs)


def joined(prompt, text):
    """Both as one text, with a space between unless the prompt ends in white space."""
    gap = " " * (not prompt[-1].isspace())
    return prompt + gap + text


def _word_tokenizer(texts):
    """One token for each word or run of punctuation, with the white space before it.

    The first is read as after a space. So decoding gives the text back.
    """
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    words.pre_tokenizer = Split(Regex(r"\s*(\w+|[^\w\s]+)"), "isolated")
    words.decoder = decoders.Fuse()
    special = ["<pad>", "<unk>", "<eos>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>",
                                   unk_token="<unk>", eos_token="<eos>")
