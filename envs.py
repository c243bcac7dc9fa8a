"""Environments for POAD: small decision problems whose actions are sentences.

First the tabular part.  A `TokenMDP` has actions that are sequences of tokens; all prefixes of its actions form a
tree, the *trie*.  Letters: S states, A actions, V words, N prefixes (the trie's inner nodes).
Then text environments, in which the agent reads one short paragraph and answers with one sentence:

    name           the lesson                                     reward                         the limit
    pancake        which word of "open the microwave" matters?    +1, or -1 at the limit         5 steps
    lunch          the best sentence can be the longest           0.7 short way, 1.0 long way    12 steps
    food           the whole kitchen, sparse reward               +1 at the end                  50 steps
    entertainment  a longer plan with two hands                   +1 at the end                  50 steps
    orders         words**slots sentences, slots * words words    share of correct words         one step a guest
    salad, salad2  actions that take time, shaped rewards         moves cost, chopping pays      200 moves
    scikit         free text: one line of data-science code       ROC-AUC, or -1                 5 steps

They follow Gymnasium's calling convention without needing it; `make(name, **options)` builds one.  Lunch and orders
are small constructions of our own, the others follow the experiments of the paper (arXiv 2405.15821)."""
import ast
import importlib
import inspect
import itertools
import operator
import random
import warnings
from collections import namedtuple

import torch

class TokenMDP:
    """A finite Markov decision process whose actions are token sequences (paper, section 3).
    transition  (S, A, S)  P(s' | s, a); a terminal state is by convention one that loops to itself with reward 0
    reward      (S, A)     expected reward of action a in state s
    actions     A tuples of token ids, distinct, none a proper prefix of another: the last token tells that it is last
    vocab       V distinct strings
    Tables are copied to float64; malformed input is a ValueError naming the action or state.  Derived:
    prefixes    N token tuples: every proper prefix of every action, shorter ones first, so prefixes[0] = ()
    child       (N, V)     index of the prefix after that token, or -1
    leaf        (N, V)     id of the action that this token completes, or -1
    >>> mdp = TokenMDP([[[1.0], [1.0]]], [[0.0, 1.0]], [(0,), (1, 0)], ["wait", "eat"])
    >>> mdp.prefixes, mdp.child.tolist(), mdp.leaf.tolist()
    (((), (1,)), [[-1, 1], [-1, -1]], [[0, -1], [1, -1]])"""
    def __init__(self, transition, reward, actions, vocab):
        self.vocab = tuple(vocab)
        for i, word in enumerate(self.vocab):
            if not isinstance(word, str) or word in self.vocab[:i]:
                raise ValueError(f"vocab entry {i} is {word!r}: entries must be strings, each listed once")
        self.actions = _prefix_free(actions, len(self.vocab))
        self.transition, self.reward = _table("transition", transition), _table("reward", reward)
        shape = (self.transition.shape[:1] or (0,)) + (len(self.actions),)  # (S, A)
        if 0 in shape or self.reward.shape != shape or self.transition.shape != shape + shape[:1]:
            raise ValueError(f"transition is {tuple(self.transition.shape)} and reward {tuple(self.reward.shape)}, but "
                             f"with {len(self.actions)} actions they must be (S, A, S) and (S, A)")
        for words, bad in (("does not sum to one over the next states", ~((self.transition.sum(-1) - 1).abs() <= 1e-6)),
                           ("has a negative probability", (self.transition < 0).any(-1)),
                           ("has a reward that is not a finite number", ~self.reward.isfinite())):
            if bad.any():  # (S, A)
                raise ValueError("state {}, action {} {}".format(*bad.nonzero()[0].tolist(), words))
        self.prefixes = tuple(sorted({a[:j] for a in self.actions for j in range(len(a))}, key=lambda p: (len(p), p)))
        inner, whole = ({p: i for i, p in enumerate(ps)} for ps in (self.prefixes, self.actions))
        longer = [[p + (w,) for w in range(len(self.vocab))] for p in self.prefixes]
        self.child = torch.tensor([[inner.get(p, -1) for p in row] for row in longer])  # (N, V)
        self.leaf = torch.tensor([[whole.get(p, -1) for p in row] for row in longer])  # (N, V)

def _table(name, values):  # a float64 copy of nested lists, an array or a tensor
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is not a rectangular table of numbers: {error}") from None

def _prefix_free(actions, vocab_size):
    """The actions as tuples of ints, checked to be distinct and prefix-free."""
    try:
        actions = tuple(tuple(operator.index(w) for w in action) for action in actions)
    except TypeError:
        raise ValueError("actions must be sequences of token ids, which are whole numbers") from None
    for i, action in enumerate(actions):
        if not action or min(action) < 0 or max(action) >= vocab_size:
            raise ValueError(f"action {i} is {action}: it needs at least one token id, all from 0 to {vocab_size - 1}")
    for (i, short), (j, long) in itertools.permutations(enumerate(actions), 2):
        if short == long[: len(short)]:
            relation = "the same as" if short == long else "a proper prefix of"
            raise ValueError(f"action {i}, {short}, is {relation} action {j}, {long}")
    return actions

def random_mdp(seed, states=4, actions=5, vocab=4, max_length=4):
    """A random TokenMDP with prefix-free actions of mixed lengths, the same for the same seed.
    Rewards are standard normal, transitions uniform numbers normalised.  The actions are leaves, spread evenly from the
    shortest to the longest, of a trie that grows by splitting random leaves.  ValueError where they do not fit."""
    if min(states, actions, vocab, max_length) < 1 or actions > vocab**max_length:
        raise ValueError(f"{actions} actions do not fit into {vocab} ** {max_length} sequences, or a size is below 1")
    generator = torch.Generator().manual_seed(seed)
    leaves = [(w,) for w in range(vocab)]
    enough = max(actions, min(2 * actions, vocab**max_length - vocab + 1))  # the latter: one split less than all
    while (short := [p for p in leaves if len(p) < max_length]) and (
            len(leaves) < enough or len(leaves[0]) == len(leaves[-1])):
        leaf = short[torch.randint(len(short), (), generator=generator)]
        leaves.remove(leaf)
        leaves = sorted(leaves + [leaf + (w,) for w in range(vocab)], key=len)
    chosen = [leaves[i * (len(leaves) - 1) // max(actions - 1, 1)] for i in range(actions)]
    weight = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    return TokenMDP(weight / weight.sum(-1, keepdim=True), reward, chosen, [f"w{i}" for i in range(vocab)])

def lunch_mdp():
    """The `lunch` environment as tables: three states, four actions, and a trap for learners that discount tokens.
    State 0, the salad in pieces: "put it in the bowl" leads to state 1, all else waits.  State 1, in the bowl: "eat it"
    pays 0.7, "carry the bowl ..." pays 1.0, both lead to state 2, the end.  At γ = 0.95 serving is best; discounted
    per token (γ_w = γ), its 14 words are worth 0.95¹³ = 0.51 against 0.7 · 0.95 = 0.665."""
    sentences = [s.split() for s in (
        "wait", "put it in the bowl", "eat it", "carry the bowl of salad to the guest by the window and serve it")]
    vocab = sorted({word for sentence in sentences for word in sentence})
    transition, reward = torch.eye(3)[:, None].repeat(1, 4, 1), torch.zeros(3, 4)  # at first nothing changes anything
    for state, action, pays, after in ((0, 1, 0.0, 1), (1, 2, 0.7, 2), (1, 3, 1.0, 2)):  # put, eat, serve
        transition[state, action] = torch.eye(3)[after]
        reward[state, action] = pays
    return TokenMDP(transition, reward, [[vocab.index(w) for w in s] for s in sentences], vocab)

class TextEnv:
    """What all text environments share: the clock, the menu, the generator, and what happens to a bad action.
    A subclass sets `start`, its first state, and writes
        menu()         the admissible actions, a new list of distinct strings; empty where actions are unrestricted
        observe()      what the agent reads: one short paragraph, which its action continues
        apply(action)  does an admissible action; returns (reward, outcome): None, or at the end whether it succeeded
    `state` is a hashable value in plain words, without the clock, that can be read and set.  Deep copies work.  Each
    environment has its own generator: its seed is 0 at first, reset(seed) seeds it anew, reset() continues it."""
    limit, limit_reward, refused = 50, 0.0, 0.0  # ticks until the cut, the reward for it and for inadmissible actions

    def __init__(self):
        self.rng = random.Random(0)
        self.reset()

    def reset(self, seed=None):
        """Start an episode; returns (observation, info)."""
        self.rng = self.rng if seed is None else random.Random(int(seed))
        self.clock, self.done, self.state = 0, False, self.start
        return self.observe(), {"menu": menu} if (menu := self.menu()) else {}

    def step(self, action):
        """Do `action`; returns (observation, reward, terminated, truncated, info).
        An action outside the menu changes nothing, costs a step and sets info["invalid"].  info["menu"] lists the next
        actions; info["success"] says at an episode's end, after which a step is a RuntimeError, whether it was done."""
        if self.done:
            raise RuntimeError("the episode is over: call reset() first")
        self.clock += 1
        valid = isinstance(action, str) and self.admits(action)
        reward, outcome = self.apply(action) if valid else self.refuse()
        terminated, truncated = outcome is not None, outcome is None and self.clock >= self.limit
        self.done = terminated or truncated
        info = ({"menu": menu} if (menu := self.menu()) else {}) | ({} if valid else {"invalid": True})
        info |= {"success": bool(outcome)} if self.done else {}
        return self.observe(), reward + self.limit_reward * truncated, terminated, truncated, info

    def random_action(self):
        """A random admissible action, uniform over the menu; the environment's own generator draws it."""
        return self.rng.choice(self.menu())

    def admits(self, action):
        """Whether the string `action` is admissible now."""
        return action in self.menu()

    def refuse(self):
        """What an inadmissible action does; returns (reward, outcome) as `apply` does."""
        return self.refused, None

    def snapshot(self):
        """All that changes in play, the clock and the generator included, as plain tuples, strings and numbers."""
        state = tuple(self.state) if isinstance(self.state, tuple) else self.state
        return dict(name=type(self).__name__, state=state, clock=self.clock, done=self.done, rng=self.rng.getstate(),
                    shown=[self.observe(), *self.menu()])

    def restore(self, snapshot):
        """Continue where `snapshot` was taken; ValueError if that was in another environment."""
        _choose("the environment of the saved game", snapshot["name"], [type(self).__name__])
        self.rng.setstate(snapshot["rng"])
        self.clock, self.done, state = snapshot["clock"], snapshot["done"], snapshot["state"]
        self.state = type(self.state)(*state) if isinstance(state, tuple) else state
        if snapshot["shown"] != [self.observe(), *self.menu()]:
            raise ValueError(f"the saved game of {snapshot['name']} was played with other options: its texts differ")

class Player:
    """An environment being played: what it shows now (obs, info), the return so far (total), and whether it is over.
    `env` follows the calling convention above; to be saved, it needs `snapshot` and `restore` as well."""
    def __init__(self, env, seed=None):
        self.env = env
        self.begin(seed)

    def begin(self, seed=None):
        (self.obs, self.info), self.total, self.over = self.env.reset(seed=seed), 0.0, False

    def step(self, action):
        """Do `action`; returns (reward, terminated, truncated)."""
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.total, self.over = self.total + float(reward), bool(terminated or truncated)
        return reward, bool(terminated), bool(truncated)

    def snapshot(self):
        if not hasattr(self.env, "snapshot"):
            raise ValueError(f"{type(self.env).__name__} cannot be saved: it has no snapshot() and restore()")
        return vars(self) | {"env": self.env.snapshot()}

    def restore(self, snapshot):
        self.env.restore(snapshot["env"])
        vars(self).update(snapshot | {"env": self.env})

def _choose(name, value, choices):  # ValueError in words unless `value` is one of `choices`
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{name} is {value!r}: choose from {', '.join(map(str, choices))}")

def _and(names):  # ["tomato", "bowl"] → "the tomato and the bowl"; [] → "nothing"
    return " and ".join(f"the {name}" for name in names) or "nothing"

class Story(TextEnv):
    """An environment that is a table: scene → (a sentence to read, {action: (reward, next scene)}).
    The state is the name of the scene.  A scene without actions is an ending; `goal` is the good one."""
    def menu(self):
        return list(self.scenes[self.state][1])

    def observe(self):
        return self.text.format(self.scenes[self.state][0])

    def apply(self, action):
        reward, self.state = self.scenes[self.state][1][action]
        return reward, None if self.menu() else self.state == self.goal

class Pancake(Story):
    """The paper's case study of token credit: open the microwave, put the pancake in, close it.
    It pays +1, or -1 if not done by step 5; a random agent succeeds in 11 of 16 episodes and gets 0.375 on average."""
    limit, limit_reward, start, goal = 5, -1.0, "in hand, closed", "inside, closed"  # pancake, microwave
    text = "You are in the kitchen. {} You want the pancake inside the closed microwave. Your next step is to"
    scenes = {
        "in hand, closed": ("You hold the pancake and see a closed microwave.", {
            "open the microwave": (0.0, "in hand, open"), "close the microwave": (0.0, "in hand, closed")}),
        "in hand, open": ("You hold the pancake and see an open microwave.", {
            "put the pancake in the microwave": (0.0, "inside, open")}),
        "inside, open": ("You hold nothing and see an open microwave with the pancake inside.", {
            "open the microwave": (0.0, "inside, open"), "close the microwave": (1.0, "inside, closed")}),
        "inside, closed": ("You hold nothing and see a closed microwave with the pancake inside.", {})}

class Lunch(Story):
    """A trap for learners that discount every token: the best action is the longest sentence.
    Eating the salad takes 2 words and pays 0.7, serving it takes 17 words and pays 1.0; waiting pays nothing.  With
    a discount of 0.95 a token, serving is worth 0.95¹⁶ = 0.44 before its first word.  Success means served."""
    limit, start, goal = 12, "in pieces", "served"
    text = "You are in the kitchen. {} You want the guest at the table to have lunch. Your next step is to"
    scenes = {
        "in pieces": ("The salad lies in pieces on the board.", {
            "put the salad in the bowl": (0.0, "in the bowl"), "wait": (0.0, "in pieces")}),
        "in the bowl": ("The salad is in the bowl and ready.", {
            "eat it": (0.7, "eaten"), "wait": (0.0, "in the bowl"),
            "carry the full bowl over to the table where the guest is waiting and serve the salad": (1.0, "served")}),
        "eaten": ("You have eaten the salad.", {}),
        "served": ("The guest has the salad.", {})}

ROOMS = ("living room", "kitchen", "bathroom", "bedroom")
FOOD_WORDINGS = {  # action → words, in menu order
    "short": {room: f"walk to the {room}" for room in ROOMS} | {
        "item": "walk to the {item}", "appliance": "walk to the {appliance}", "grab": "grab the {item}",
        "put": "put the {item} in the {appliance}", "open": "open the {appliance}", "close": "close the {appliance}"},
    "long": {
        "living room": "leave this room and walk slowly through the hallway until you reach the living room",
        "kitchen": "leave this room and follow the smell of food all the way to the kitchen",
        "bathroom": "leave this room and go down the corridor to the small bathroom with white tiles",
        "bedroom": "leave this room and climb up the wooden stairs to the quiet bedroom above",
        "item": "cross the floor with a few calm steps and stop right beside the {item}",
        "appliance": "cross the floor with a few calm steps and stop in front of the {appliance}",
        "grab": "reach out with one free hand and carefully pick up the {item} from the table",
        "put": "lift both hands a little and gently place the {item} inside the waiting {appliance}",
        "open": "put two fingers on the handle and pull the door of the {appliance} open",
        "close": "press one palm on the door and push until the {appliance} is firmly closed"}}
FOOD_MENU = {  # in the kitchen: (where the item is, what the agent is near) → actions besides walking to other rooms
    ("table", "nothing"): ["item", "appliance"], ("table", "item"): ["appliance", "grab"],
    ("table", "appliance"): ["item", "open", "close"],
    ("hand", "nothing"): ["item", "appliance"], ("hand", "appliance"): ["item", "put", "open", "close"],
    ("inside", "nothing"): ["item", "appliance"], ("inside", "both"): ["open", "close"]}
FOOD_UNSEEN = (("cheese", "microwave"), ("hamburger", "microwave"), ("apple pie", "microwave"), ("pizza", "microwave"),
               ("dishes", "dishwasher"), ("clothes", "washing machine"))  # (item, appliance), to test generalisation
FoodState = namedtuple("FoodState", "room near item open")  # near: nothing, item, appliance, both; open: True, False

class Food(TextEnv):
    """Food preparation in a household (the paper's VirtualHome task): get the pancake into the closed microwave.
    Sparse reward: +1 at success, which takes 6 steps at best; a random agent manages in 1.69 % of its episodes.
    `item` and `appliance` swap words and leave the rules alone; wording "short" says every action in 3-6 words,
    "long" in 13-15.  Item and appliance keep their state while the agent is in another room and cannot see them."""
    start = FoodState("kitchen", "nothing", "table", False)

    def __init__(self, item="pancake", appliance="microwave", wording="short"):
        for name, other in ((item, appliance), (appliance, item)):
            if not isinstance(name, str) or not all(map(str.isalpha, name.split(" "))) or name in (*ROOMS, other):
                raise ValueError(f"{name!r}: item and appliance must be different names in plain words, and not rooms")
        _choose("wording", wording, list(FOOD_WORDINGS))
        self.item, self.appliance = item, appliance
        self.words = {key: text.format(item=item, appliance=appliance) for key, text in FOOD_WORDINGS[wording].items()}
        super().__init__()

    def menu(self):
        room, near, item, _ = self.state
        more = FOOD_MENU[item, near] if room == "kitchen" else []
        return [self.words[key] for key in [r for r in ROOMS if r != room] + more]

    def observe(self):
        s, item, appliance = self.state, self.item, self.appliance
        near = {"nothing": [], "item": [item], "appliance": [appliance], "both": [item, appliance]}[s.near]
        text = f"You are in the {s.room}, near {_and(near)}. You hold {_and([item] * (s.item == 'hand'))}. "
        if s.room == "kitchen":
            place = {"table": f" and the {item} on the table", "hand": "", "inside": f" with the {item} inside"}
            text += f"You see {'an open' if s.open else 'a closed'} {appliance}{place[s.item]}. "
        return text + f"You want the {item} inside the closed {appliance}. Your next step is to"

    def apply(self, action):
        s, key = self.state, next(key for key, words in self.words.items() if words == action)
        self.state = s = s._replace(**{
            "item": {"near": {"table": "item", "hand": "nothing", "inside": "both"}[s.item]},
            "appliance": {"near": "both" if s.item == "inside" else "appliance"},
            "grab": {"item": "hand", "near": "nothing"},
            "put": {"item": "inside", "near": "both"} if s.open else {},
            "open": {"open": True}, "close": {"open": False}}.get(key, {"room": key, "near": "nothing"}))
        success = s.item == "inside" and not s.open
        return float(success), success or None

EntertainmentState = namedtuple("EntertainmentState", "room near sitting television chips milk")

class Entertainment(TextEnv):
    """An evening at home (the paper's VirtualHome task): sit before the running television with chips and milk.
    Sparse reward: +1 for sitting with the television on and both chips and milk in hand or on the coffee table.  That
    takes 11 steps at best; a random agent manages in 0.30 % of its episodes.  Two full hands cannot switch anything."""
    start = EntertainmentState("kitchen", "nothing", False, False, "kitchen", "kitchen")

    def _snacks(self, place):
        return [snack for snack in ("chips", "milk") if getattr(self.state, snack) == place]

    def menu(self):
        s = self.state
        if s.sitting:
            return ["stand up from the sofa"]
        menu = [f"walk to the {room}" for room in ROOMS if room != s.room]
        if s.room == "kitchen":
            menu += [f"{'grab' if s.near == snack else 'walk to'} the {snack}" for snack in self._snacks("kitchen")]
        if s.room == "living room":
            menu += [f"walk to the {x}" for x in ("coffee table", "television", "sofa") if x != s.near]
        if s.near == "coffee table":
            menu += [f"put the {snack} on the coffee table" for snack in self._snacks("hand")]
            menu += [f"grab the {snack}" for snack in self._snacks("table")]
        return menu + {"television": [f"turn {'off' if s.television else 'on'} the television"],
                       "sofa": ["sit down on the sofa"]}.get(s.near, [])

    def observe(self):
        s = self.state
        place = "sitting on the sofa" if s.sitting else f"near {_and([s.near] * (s.near != 'nothing'))}"
        seen = {"kitchen": f"You see {_and(self._snacks('kitchen'))}. ",
                "living room": f"The television is {'on' if s.television else 'off'}. "
                               f"You see {_and(self._snacks('table'))} on the coffee table. "}.get(s.room, "")
        return (f"You are in the {s.room}, {place}. You hold {_and(self._snacks('hand'))}. {seen}"
                "You want to sit and watch television with the chips and the milk. Your next step is to")

    def apply(self, action):
        s, (verb, *words), target = self.state, action.split(), action.removeprefix("walk to the ")
        self.state = s = s._replace(**{
            "walk": {"room": target, "near": "nothing"} if target in ROOMS else {"near": target},
            "grab": {words[1]: "hand", "near": "nothing" if s.room == "kitchen" else s.near},
            "put": {words[1]: "table"},
            "turn": {"television": s.television ^ (len(self._snacks("hand")) < 2)},
            "sit": {"sitting": True}, "stand": {"sitting": False}}[verb])
        success = s.sitting and s.television and "kitchen" not in (s.chips, s.milk)
        return float(success), success or None

GUESTS = ("Ann", "Bob", "Cleo", "Dan")
COURSES = (  # one group for each slot, one word for each choice
    "soup salad melon shrimp olives toast", "bread rice pasta fries beans corn", "tea coffee water juice milk cider",
    "cake pudding fruit waffle sorbet pie", "fish chicken tofu beef lamb eggs", "salt pepper butter mustard lemon oil",
    "fork spoon knife straw cup plate", "window garden corner terrace bar door")
NUMBERS = "no one two three four five six seven eight nine ten".split()
OrdersState = namedtuple("OrdersState", "guest to_come perfect")  # guests after this one; whether all words were right

class Orders(TextEnv):
    """An action space that explodes: words ** slots sentences, spelled with only slots * words words.
    A random guest orders; the answer is "serve" and a word for each slot.  Each guest always wants the same, no two the
    same.  Reward: share of slots that are right, divided by `guests`, in all at best 1, or 1 / words at random.  Up to
    256 sentences are listed as the menu; beyond, the agent writes freely, and other text leaves the guest unserved."""
    limit = float("inf")  # the episode ends with its last guest

    def __init__(self, slots=4, words=4, guests=5):
        _choose("slots", slots, range(1, 9))
        _choose("words", words, range(2, 7))
        _choose("guests", guests, range(1, 11))
        if words**slots < len(GUESTS):
            raise ValueError(f"slots={slots} and words={words} make {words**slots} orders, fewer than {len(GUESTS)}")
        self.guests, self.courses = guests, [course.split()[:words] for course in COURSES[:slots]]
        self.wanted = {guest: [course[(g + i + i % 2 * (g // words)) % words] for i, course in enumerate(self.courses)]
                       for g, guest in enumerate(GUESTS)}  # i % 2 ... tells four guests apart by two or three words
        self.restricted = words**slots <= 256
        super().__init__()

    @property
    def start(self):
        return OrdersState(self.rng.choice(GUESTS), self.guests - 1, True)

    def menu(self):
        return [" ".join(("serve", *dish)) for dish in itertools.product(*self.courses)] if self.restricted else []

    def random_action(self):
        return " ".join(["serve"] + [self.rng.choice(course) for course in self.courses])

    def admits(self, action):
        verb, *dish = action.split(" ")
        return (verb, len(dish)) == ("serve", len(self.courses)) and all(map(operator.contains, self.courses, dish))

    def observe(self):
        return (f"You are the waiter. {self.state.guest} wants the usual lunch. After this guest "
                f"{NUMBERS[self.state.to_come]} more will come. You want every part of the lunch to be right. "
                "Your next step is to")

    def apply(self, action):
        guest, to_come, perfect = self.state
        right = sum(map(operator.eq, action.split(" ")[1:], self.wanted[guest]))
        guest, perfect = self.rng.choice(GUESTS) if to_come else guest, perfect and right == len(self.courses)
        self.state = OrdersState(guest, max(to_come - 1, 0), perfect)
        return right / len(self.courses) / self.guests, None if to_come else perfect

    def refuse(self):
        return self.apply("")  # no word is right, and it is the next guest's turn

KITCHEN = {  # thing or place → (the floor cell where one uses it, the cell on the wall where it stands); (row, column)
    "tomato": ((1, 5), (0, 5)), "lettuce": ((1, 5), (1, 6)), "onion": ((2, 5), (2, 6)), "bowl": ((5, 5), (6, 5)),
    "first board": ((1, 1), (1, 0)), "second board": ((2, 1), (2, 0)), "counter": ((3, 1), (3, 0))}
SaladState = namedtuple("SaladState", "cell hand boards bowl")  # hand and every board: a thing or ""; bowl: foods

class Salad(TextEnv):
    """Cooking (the paper's Overcooked task, tomato salad): chop the tomato, put it in the bowl, serve the bowl.
    An action is an errand of n moves: walking a cell is one, so are taking and putting, chopping is three.  An event e
    (chopping what the recipe needs +0.2, serving the right dish +1, anything else -0.1) falls on the last move, and the
    reward is -0.1 (1 - 0.99ⁿ) + 0.99ⁿ⁻¹ e.  The agent sees its hand and what is at most two rows and columns away.
    Best return at γ = 0.95 is 0.9092; a random agent serves in 44.2 % of its episodes of at most 200 moves."""
    foods, recipe, boards = ("tomato",), ("tomato",), ("first board",)
    start, limit, refused = SaladState((1, 4), "", ("",), ()), 200, -0.1 * (1 - 0.99)

    def menu(self):
        cell, hand, boards, _ = self.state
        put = f"put the {hand} on" if hand in (*self.foods, "bowl") else "walk to"
        chop = [b.split()[-1] for at, b in zip(self.boards, boards) if KITCHEN[at][0] == cell and b not in ("", "bowl")]
        return ([f"put the {food} in the bowl" if hand == "bowl" else f"pick up the {food}" for food in self.foods]
                + ["take the bowl"] + [f"{put} the {board}" for board in self.boards]
                + ["serve the dish" if hand else "serve nothing", f"chop {_and(chop)}"])

    def observe(self):
        cell, hand, boards, bowl = self.state
        away = " ".join((hand, *boards, *bowl)).split()
        full = {"bowl": f"bowl with {_and(bowl)}"} if bowl else {}
        seen = [thing for thing in (*self.foods, "bowl") if thing not in away and _sees(cell, thing)]
        seen += [f"{board} with {_and([full.get(lying, lying)] * bool(lying))}"
                 for board, lying in zip(self.boards, boards) if _sees(cell, board)]
        place = next((f"at the {spot}" for spot in KITCHEN if KITCHEN[spot][0] == cell),
                     f"in row {NUMBERS[cell[0]]}, column {NUMBERS[cell[1]]}")
        return (f"You are {place}. You see {_and(seen)}. You hold {_and([full.get(hand, hand)] * bool(hand))}. "
                f"You want a bowl with {_and(f'chopped {food}' for food in self.recipe)} served. Your next step is to")

    def apply(self, action):
        slot = (*self.foods, "bowl", *self.boards, "counter", "chop")[self.menu().index(action)]
        cell, hand, boards, bowl = self.state
        boards, chopped, moves, event = dict(zip(self.boards, boards)), f"chopped {slot}", 1, 0.0
        spot = next((board for board in boards if boards[board] in (slot, chopped)), slot)  # where one finds it
        here = next((board for board in boards if KITCHEN[board][0] == cell and boards[board] in self.foods), None)
        if slot == "chop" and here:
            moves, event = 3, 0.0 if hand else 0.2 * (boards[here] in self.recipe)
            boards[here] = boards[here] if hand else f"chopped {boards[here]}"
        elif chopped in bowl and hand != "bowl":  # it is in the bowl on a board: go until that is in sight
            spot = next(board for board in boards if boards[board] == "bowl")
            path = _path(cell, KITCHEN[spot][0])
            moves = 1 + next(i for i, step in enumerate(path) if _sees(step, spot))
            cell = path[moves - 1]
        elif slot != "chop" and chopped not in bowl and hand not in (slot, chopped):  # otherwise there is nothing to do
            moves, cell = len(_path(cell, KITCHEN[spot][0])), KITCHEN[spot][0]
            lying = boards.get(spot, slot)
            if not hand and slot in (*boards, "counter") or slot in self.foods and spot in boards and lying == slot:
                moves = max(moves - 1, 1)  # only go there: to a place, or to a food that lies ready to be chopped
            elif slot == "counter" and hand == "bowl" and bowl == tuple(f"chopped {food}" for food in self.recipe):
                event = 1.0
            elif slot == "counter":  # the wrong dish: what is in the hand goes back to where it came from
                event, hand, bowl = -0.1, "", () if hand == "bowl" else bowl
            elif not lying:
                hand, boards[spot] = "", hand
            elif not hand or "bowl" in (hand, lying) and "chopped" in hand + lying:  # take, or put together and take
                if hand:
                    bowl = tuple(f"chopped {f}" for f in self.foods if f"chopped {f}" in (*bowl, hand, lying))
                moves += bool(hand) and slot == "bowl"
                hand = "bowl" if hand else lying
                boards.update({spot: ""} if spot in boards else {})
        self.state = SaladState(cell, hand, tuple(boards.values()), bowl)
        self.clock += moves - 1  # step() has counted one
        return -0.1 * (1 - 0.99**moves) + 0.99 ** (moves - 1) * event, True if event == 1.0 else None

def _path(start, goal):  # the cells from start to goal, both included, rows first
    down, right = (1 if there >= here else -1 for here, there in zip(start, goal))
    rows, columns = range(start[0], goal[0], down), range(start[1], goal[1] + right, right)
    return [(row, start[1]) for row in rows] + [(goal[0], column) for column in columns]

def _sees(cell, spot):  # whether a thing or place on the wall is in view: at most two rows and two columns away
    return max(abs(a - b) for a, b in zip(cell, KITCHEN[spot][1])) <= 2

class Salad2(Salad):
    """Tomato and lettuce, a second board, an onion that nobody ordered.  Best return 0.9176; random success 1.02 %."""
    foods, recipe, boards = ("tomato", "lettuce", "onion"), ("tomato", "lettuce"), ("first board", "second board")
    start = SaladState((1, 4), "", ("", ""), ())

SCIKIT_NAMES = {  # name → (module, {argument: values}); preprocessing first, then classifiers
    "StandardScaler": ("preprocessing", {}),
    "PCA": ("decomposition", {"n_components": (1, 2, 4, 8)}),
    "GaussianNB": ("naive_bayes", {}),
    "KNeighborsClassifier": ("neighbors", {"n_neighbors": (1, 3, 5, 10, 20), "weights": ("uniform", "distance")}),
    "LogisticRegression": ("linear_model", {"C": (0.01, 0.1, 0.5, 1.0, 10.0), "max_iter": (10, 50, 100, 200)}),
    "DecisionTreeClassifier": ("tree", {"max_depth": (1, 2, 4, 8), "criterion": ("gini", "entropy")}),
    "RandomForestClassifier": ("ensemble", {"n_estimators": (1, 5, 10, 20, 50), "max_depth": (1, 2, 4, 8)})}

class Scikit(TextEnv):
    """Data-science coding (paper): one line of free text, read as a scikit-learn classifier and scored on a data set.
    "make_pipeline(StandardScaler(), LogisticRegression(C=0.5))" is such a line.  Reward: mean ROC-AUC (one-vs-one for
    several classes) over five stratified 50/50 splits, and the episode ends; -1 for whatever fails, at most five times.
    The text is never executed, but parsed and rebuilt from SCIKIT_NAMES; limits are sizes, not seconds, so that one
    seed gives one run.  The state is the name of the last error, "" at first."""
    start, limit, refused, scores = "", 5, -1.0, {}  # scores: (data set, text) → reward, shared by all instances

    def __init__(self, dataset="breast cancer"):
        _choose("dataset", dataset, ("breast cancer", "wine", "iris", "digits"))
        try:
            load = getattr(importlib.import_module("sklearn.datasets"), f"load_{dataset.replace(' ', '_')}")
        except ImportError:
            raise ImportError("the scikit environment needs scikit-learn: pip install scikit-learn") from None
        self.dataset, self.data = dataset, load(return_X_y=True)
        super().__init__()

    def menu(self):
        return []

    def observe(self):
        (rows, columns), classes = self.data[0].shape, len(set(self.data[1]))
        error = f"The last line failed with a {self.state}. " if self.state else ""
        return (f"The data set {self.dataset} has {rows} rows, {columns} columns and {classes} classes. {error}"
                "You want a scikit learn classifier with a high score. Your next line of code is")

    def random_action(self):
        """A random line of the grammar; one in five has a typo, a wrong name or a wrong argument."""
        names, calls = list(SCIKIT_NAMES), []
        for name in [self.rng.choice(names[:2])] * self.rng.randrange(2) + [self.rng.choice(names[2:])]:
            key, values = self.rng.choice([("", [""]), *SCIKIT_NAMES[name][1].items()])
            calls.append(f"{name}({key and f'{key}={self.rng.choice(values)!r}'})")
        text = f"make_pipeline({', '.join(calls)})" if len(calls) > 1 else calls[0]
        wrong = [text[:-1], text.replace(name, "BestClassifier"), text.replace(calls[-1], f"{name}(size=0)")]
        return text if self.rng.random() < 0.8 else self.rng.choice(wrong)

    def admits(self, action):
        try:
            if (self.dataset, action) not in self.scores:
                self.scores[self.dataset, action] = _auc(action, *self.data)
            return True
        except Exception as error:  # whatever the text provokes, in the parser or in scikit-learn
            self.state = type(error).__name__
            return False

    def apply(self, action):
        return self.scores[self.dataset, action], True

def _auc(text, x, y):
    """Mean ROC-AUC of the classifier that `text` describes, over five shuffled, stratified 50/50 splits."""
    import threadpoolctl  # comes with scikit-learn
    from sklearn.model_selection import cross_val_score, train_test_split
    if len(text) > 200 or text.count("(") > 6:
        raise ValueError("the line is too long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _estimator(ast.parse(text.strip(), mode="eval").body)
        splits = [train_test_split(range(len(y)), test_size=0.5, random_state=k, stratify=y) for k in range(5)]
        with threadpoolctl.threadpool_limits(1):  # more threads would wait for each other longer than they work
            return float(cross_val_score(model, x, y, cv=splits, scoring="roc_auc_ovo", error_score="raise").mean())

def _estimator(node):
    """The estimator that a call in a syntax tree describes; NameError or TypeError outside SCIKIT_NAMES."""
    name = getattr(getattr(node, "func", None), "id", None)
    if name == "make_pipeline" and node.args and not node.keywords:
        return importlib.import_module("sklearn.pipeline").make_pipeline(*map(_estimator, node.args))
    if name not in SCIKIT_NAMES:
        raise NameError("not a call of a listed name")
    module, allowed = SCIKIT_NAMES[name]
    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}  # a tokenizer may put spaces into strings
    given = {k: v.strip() if isinstance(v, str) else v for k, v in given.items()}
    if node.args or len(given) < len(node.keywords) or not all(v in allowed.get(k, ()) for k, v in given.items()):
        raise TypeError("not a listed argument or value")
    estimator = getattr(importlib.import_module(f"sklearn.{module}"), name)(**given)
    return estimator.set_params(**{"random_state": 0} if "random_state" in estimator.get_params() else {})

ENVS = {"pancake": Pancake, "lunch": Lunch, "food": Food, "entertainment": Entertainment, "orders": Orders,
        "salad": Salad, "salad2": Salad2, "scikit": Scikit}

def make(name, **options):
    """Build the environment called `name`, one of ENVS, with that class's options.
    make("food", item="pizza", wording="long").  ValueError for a name, an option or a value that does not exist."""
    _choose("the environment", name, list(ENVS))
    allowed = list(inspect.signature(ENVS[name]).parameters)
    if not set(options) <= set(allowed):
        raise ValueError(f"{name} takes the options {allowed}, not {list(options)}")
    return ENVS[name](**options)
