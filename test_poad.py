"""Tests of poad.py and envs.py, and the course kit that makes an assignment of them.

Numbers that a reader can work out, with the derivation beside them; identities; independent
oracles. Nothing is downloaded. The tests of a function f are called test_f_..., so that the red
ones name the function that is wrong; messages name likely mistakes.
"""
import argparse
import ast
import copy
import doctest
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import product, repeat
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from unittest.mock import Mock

if __name__ == "__main__" and sys.flags.optimize:  # it strips assertions, so begin without it
    os.environ.pop("PYTHONOPTIMIZE", None)
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.optim import SGD
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import envs
import poad
from envs import ENVS, Player, TokenMDP, lunch_mdp, make, random_mdp
from poad import (
    action_backup, action_policy, assign, bad_backup, bad_discounts, collect, column, credit,
    encode, encode_menu, fit_critic, gae, load_agent, masked_mean, menu_logp, normalize, play,
    ppo_policy_loss, ppo_update, solve, state_values, tiny_agent, token_backup, train, value_loss,
    Action, Config, LanguageAgent, METHODS)

torch.set_num_threads(1)  # what is tested is small: more threads only wait for each other
INF = math.inf
NAN = math.nan
ON_RANDOM_MDPS = pytest.mark.parametrize("seed", [0, 1, 2])
IN_ALL_MODES = pytest.mark.parametrize("mode", ["greedy", "policy", "soft"])
WITH_ALL_MASKS = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bool, torch.int64], ids=["float", "bool", "int"])
CPU_SECONDS = float(os.environ.get("CPU_SECONDS", 60))


@pytest.fixture(autouse=True)
def no_endless_loop():
    """A test that computes for more than CPU_SECONDS is red (not on Windows)."""
    def stop(signal, frame):
        pytest.fail(f"an endless loop? It computed for {CPU_SECONDS:g} seconds")
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
    else:
        yield


def t(x):
    """A float64 tensor without gradient; a text has rows, such as "1 2/3 | inf -4": (2, 2)."""
    if isinstance(x, str):
        rows = x.split("|")
        x = []
        for row in rows:
            pairs = [word.partition("/") for word in row.split()]
            x.append([float(above) / float(below or 1) for above, _, below in pairs])
    return torch.as_tensor(x, dtype=torch.float64).detach()


def results(text, table=t):
    """{mistake: its wrong result} from a text with lines "mistake: numbers  # why"."""
    found = {}
    for line in text.strip().splitlines():
        words, numbers = line.split("  #")[0].rsplit(": ", 1)
        found[words] = table(numbers)
    return found


def near(actual, expected, hint, mistakes=MappingProxyType({}), tol=1e-9):
    """Fail with `hint`, or with the name of the mistake whose wrong result this is."""
    __tracebackhide__ = True
    assert actual is not None, f"{hint}: nothing was returned"
    assert not isinstance(actual, (tuple, dict, str)), (
        f"{hint}: a {type(actual)} was returned, not a tensor")
    dtype = getattr(actual, "dtype", float)
    actual = t(actual)
    expected = t(expected)
    assert actual.shape == expected.shape, (
        f"{hint}: the shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    far = ~torch.isclose(actual, expected, tol, tol)
    if not far.any():
        return
    if actual.isnan().any():
        hint = f"{hint}; NaN, from 0 · NaN, 0 · inf, 0 / 0 or inf - inf: select, do not multiply"
    often = {f"rounded to {dtype}": expected.trunc(), "nothing but zeros": 0 * expected,
             "the sign is wrong": -expected, "twice what it should be": 2 * expected,
             "half of what it should be": expected / 2}
    if isinstance(mistakes, str):
        mistakes = results(mistakes)
    for words, wrong in (often | mistakes).items():
        wrong = t(wrong)
        if wrong.numel() == 1:
            wrong = wrong.reshape(())
        if torch.allclose(actual, wrong.expand_as(actual), tol, tol, equal_nan=True):
            hint = words
    if torch.allclose(actual, expected, 1e-5, 1e-5):
        hint = f"{hint}; rounded: computed in {dtype}?"
    place = far.nonzero()[0].tolist()
    where = f" at {place}" * (place != [])
    pytest.fail(f"{hint}: {actual[far][0]:.6g}, expected {expected[far][0]:.6g}{where}\n"
                f"got      {actual.tolist()}\nexpected {expected.tolist()}")


def backward(x):
    assert getattr(x, "requires_grad", False), "no gradient: detached, or a plain number"
    x.backward()


def small_mdp():
    """Two states and the actions "a", "b c", "b a c"; prefixes ∅, b, b a."""
    transition = t("1 0 | .5 .5 | 0 1 | .5 .5 | 1 0 | .25 .75").view(2, 3, 2)
    return TokenMDP(transition, t("1 2 3 | -1 0 5"), [(0,), (1, 2), (1, 0, 2)], "abc")


def small_table(rows, invalid=-INF):
    """A token table of `small_mdp`; a row is a state, with entries at a, b, b c, b a, b a c."""
    table = torch.full((2, 3, 3), invalid, dtype=torch.float64)
    table[:, [0, 0, 1, 1, 2], [0, 1, 2, 0, 2]] = t(rows)
    return table


SOFT = 2 * math.log(2)  # τ log(exp((x - SOFT) / τ) + exp((x - SOFT) / τ)) = x at τ = 2
ACTION_TABLES = {  # V is 4, 12
    "greedy": (t("4 2 0 | -2 12 6"), {}),
    "policy": (t("2 6 9 | 16 8 99"), {"policy": t(".5 .5 0 | .5 .5 0")}),
    "soft": (t("4 4 -inf | 12 12 -inf") - SOFT, {"temperature": 2.0})}
# V(∅), V(b), V(b a) are 4, 8, 10 in state 0 and 12, 5, 7 in state 1
Q_TOKEN = small_table("4 2 8 6 10 | -2 12 3 5 7")


def token_table(mdp, value):
    """(S, N, V) table of value(ids of the actions that begin so, tokens so far); else -inf."""
    shape = len(mdp.reward), len(mdp.prefixes), len(mdp.vocab)
    table = torch.full(shape, -INF, dtype=torch.float64)
    for n, prefix in enumerate(mdp.prefixes):
        for w in range(len(mdp.vocab)):
            begin = (*prefix, w)
            ids = [i for i, action in enumerate(mdp.actions) if action[:len(begin)] == begin]
            if ids:
                table[:, n, w] = value(ids, len(begin))
    return table


def along(table, mdp, action):
    """(S, n): the entries of a token table at the n tokens of one action."""
    rows = [mdp.prefixes.index(action[:j]) for j in range(len(action))]
    return table[:, rows, action]


def written(policy, mdp):
    """(S, N, V): the probability that an action of this policy (S, A) begins so."""
    return token_table(mdp, lambda ids, j: policy[:, ids].sum(-1)).clamp(min=0)


def settings(mode, mdp):
    """Keyword arguments of a mode for actions and for tokens; the two policies are the same one."""
    if mode == "greedy":
        return {}, {}
    if mode == "soft":
        return {"temperature": 0.7}, {"temperature": 0.7}
    policy = mdp.reward.softmax(-1)  # one like any other
    mass = written(policy, mdp)
    return {"policy": policy}, {"policy": mass / mass.sum(-1, keepdim=True)}


def pool(x, ids, policy=None, temperature=0.0):
    """V of these columns alone, (S,)."""
    if policy is not None:
        policy = policy[:, ids] / policy[:, ids].sum(-1, keepdim=True)
    return state_values(x[:, ids], policy, temperature)


def exact(mdp, gamma, gamma_token=1.0, **mode):
    """Q (S, A) and its token table: what is begun is worth γ_w^(n-j) Q, pooled over completions.

    γ_w^(n-1) Q is what action-level backups find in an MDP with rewards γ_w^(n-1) R, and discount
    γ γ_w^(n-1), which stands in its transitions.
    """
    length = t([len(action) for action in mdp.actions])
    less = gamma_token ** (length - 1)
    other = SimpleNamespace(reward=less * mdp.reward, transition=less[:, None] * mdp.transition)
    q = solve(lambda q: action_backup(q, other, gamma, **mode), 0 * mdp.reward) / less
    table = token_table(mdp, lambda ids, j: pool(gamma_token ** (length - j) * q, ids, **mode))
    return q, table


def advantage(q, policy):
    """Q minus its mean under the policy; -inf becomes a large number, as 0 · inf is NaN."""
    q = t(q).clamp(min=-1e9)
    return q - (policy * q).sum(-1, keepdim=True)


# ------------------------------------------------------------------ Bellman backups


def test_state_values_takes_the_maximum():
    near(state_values(t("1 10/3 -inf | -4 -2 -inf")), t("10/3 -2")[0], "not the maximum", {
        "an invalid token counts as 0": t("10/3 0")[0], "minimum instead of maximum": -INF})
    assert state_values(torch.ones(2)).dtype == torch.float32, "not in q's dtype"


def test_state_values_averages_under_a_policy():
    # ¼·2 + ¾·7 = 5¾, and 0 · (-inf) = 0
    q = t("2 7 -inf")
    near(state_values(q, policy=t(".25 .75 0")), [5.75], "not Σ π q", """
policy ignored: 7
all tokens alike: 4.5
mean of π q, not the sum: 5.75/3
π only selects: 9
normalised once more: 5.75/2""")
    near(state_values(q, t("1/3 2/3 0")), [16 / 3], "not Σ π q")  # ⅓·2 + ⅔·7


def test_state_values_soft_maximum():
    # τ = 2, q = (0, 2 log 3): 2 log(exp 0 + exp log 3) = 2 log 4
    q = t([0, 2 * math.log(3), -INF])
    near(state_values(q, temperature=2), 2 * math.log(4), "not τ log Σ exp(q / τ)", {
        "temperature ignored": 2 * math.log(3), "no factor τ in front": math.log(4),
        "q is not divided by τ": 2 * math.log(10), "softmax average": 1.5 * math.log(3),
        "q is multiplied by τ": 2 * math.log(82), "mean, not sum, of exp": 2 * math.log(4 / 3)})
    large = state_values(t([1000, 1000]), temperature=0.01)
    near(large, 1000 + 0.01 * math.log(2), "exp overflows for large q / τ")


@IN_ALL_MODES
def test_action_backup_by_hand(mode):
    # V = (4, 12); state 0: 1 + ½·4, 2 + ½·(½·4 + ½·12), 3 + ½·12
    # state 1: -1 + ½·(½·4 + ½·12), 0 + ½·4, 5 + ½·(¼·4 + ¾·12)
    table, kwargs = ACTION_TABLES[mode]
    q = action_backup(table, small_mdp(), 0.5, **kwargs)
    near(q, "3 6 9 | 3 2 10", f"not R + γ Σ P V ({mode}: V is 4 and 12)", results("""
γ forgotten: 5 10 15 | 7 4 15
γ R, not R: 2.5 5 7.5 | 3.5 2 7.5
R is missing: 2 4 6 | 4 2 5
- γ V, not + γ V: -1 -2 -3 | -5 -2 0
γ squared: 2 4 6 | 1 1 7.5
γ on R, and not on V: 4.5 9 13.5 | 7.5 4 12.5
value of this state, not of the next: 3 4 5 | 5 6 11
policy not passed on: 5.5 29 52.5 | 26 4.5 43.25""") | {
        "temperature not passed on": t("3 6 9 | 3 2 10") - SOFT / 2})
    near(action_backup(table, small_mdp(), 0.0, **kwargs), "1 2 3 | -1 0 5", "γ = 0 leaves R")


# γ = ½, γ_w = ¼; a: 1 + ½·4 | b: ¼·8 | b c: 2 + ½·(½·4 + ½·12) | b a: ¼·10 | b a c: 3 + ½·12
# state 1: -1 + ½·(½·4 + ½·12) | ¼·5 | 0 + ½·4 | ¼·7 | 5 + ½·(¼·4 + ¾·12)
NAIVE = small_table("3 2 6 2.5 9 | 3 1.25 2 1.75 10")


def test_token_backup_by_hand():
    q = token_backup(Q_TOKEN, small_mdp(), 0.5, 0.25)
    near(q, NAIVE, "not the table of Eq. 9-10", {
        "invalid tokens must be -inf": NAIVE.clamp(min=0)} | results("""
gamma inside the action: 3 4 6 5 9 | 3 2.5 2 3.5 10
gamma and gamma_token swapped: 2 4 4 5 6 | 1 2.5 1 3.5 7.5
gamma_token forgotten: 3 8 6 10 9 | 3 5 2 7 10
gamma_token at an action's end: 2 2 4 2.5 6 | 1 1.25 1 1.75 7.5
gamma forgotten at an action's end: 5 2 10 2.5 15 | 7 1.25 4 1.75 15
γ R, not R: 2.5 2 5 2.5 7.5 | 3.5 1.25 2 1.75 7.5
R is missing: 2 2 4 2.5 6 | 4 1.25 2 1.75 5
γ γ_w inside the action: 3 1 6 1.25 9 | 3 .625 2 .875 10
γ_w on R + γ V: .75 2 1.5 2.5 2.25 | .75 1.25 .5 1.75 2.5
V of an action's begin inside it: 3 1 6 1 9 | 3 3 2 3 10
V of the prefix before, not of the next: 3 1 6 2 9 | 3 3 2 1.25 10""", small_table))


@pytest.mark.parametrize("junk", [0, 99, NAN], ids=str)
def test_token_backup_ignores_invalid_tokens(junk):
    """Their entries may hold anything, such as the zeros from which `solve` begins."""
    low = small_table("-3 -3 -3 -3 -3 | -3 -3 -3 -3 -3", invalid=junk)  # V is -3, γ is 0
    right = small_table("1 -3 2 -3 3 | -1 -3 0 -3 5")
    near(token_backup(low, small_mdp(), 0.0, 1.0), right, "an invalid token was read, or not -inf")


@ON_RANDOM_MDPS
@IN_ALL_MODES
def test_token_backup_naive_solves_another_mdp(mode, seed):
    """Its fixed point has reward γ_w^(n-1) R and discount γ γ_w^(n-1) (identities 2 and 3).

    Token j of an action is worth γ_w^(n-j) Q.
    """
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings(mode, mdp)
    gamma_token = 1.0 if mode == "soft" else 0.8  # the soft maximum does not scale with γ_w
    _, table = exact(mdp, 0.7, gamma_token, **kwargs)
    near(token_backup(table, mdp, 0.7, gamma_token, **token_kwargs), table,
         f"the fixed point moved: the {mode} mode was lost, or γ and γ_w in the wrong places?")


def test_bad_backup_by_hand():
    # as in token_backup, with V itself inside the action: b: 8 and 5 | b a: 10 and 7
    q = bad_backup(Q_TOKEN, small_mdp(), 0.5)
    near(q, small_table("3 8 6 10 9 | 3 5 2 7 10"), "not Eq. 13-14", {
        "gamma inside the action": small_table("3 4 6 5 9 | 3 2.5 2 3.5 10")})


@ON_RANDOM_MDPS
@IN_ALL_MODES
def test_bad_backup_has_the_action_level_solution(mode, seed):
    """Identity 1: Q(s, a), pooled over the completions of a prefix, is where backups end."""
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings(mode, mdp)
    _, table = exact(mdp, 0.5, **kwargs)
    q = token_table(mdp, lambda ids, j: 0)
    for _ in range(160):  # an action has at most 4 tokens, so this is at least ½⁴⁰
        q = bad_backup(q, mdp, 0.5, **token_kwargs)
    near(q, table, f"not the action level's solution: {mode} mode lost, or gamma inside?")


@ON_RANDOM_MDPS
def test_bad_backup_credit_adds_up(seed):
    """Identity 4: the token advantages of an action sum to A(s, a); naive ones do not."""
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings("policy", mdp)
    q, bad = exact(mdp, 0.8, **kwargs)
    bad = bad_backup(bad, mdp, 0.8, **token_kwargs)
    _, naive = exact(mdp, 0.8, 0.8, **kwargs)

    def total(table):
        credit = advantage(table, **token_kwargs)
        return torch.stack([along(credit, mdp, action).sum(-1) for action in mdp.actions], -1)
    whole = advantage(q, **kwargs)  # (S, A)
    near(total(bad), whole, "the credit does not add up: gamma inside the action?")
    assert (total(naive) - whole).abs().max() > 1e-3, "naive credit must not add up on this MDP"


@ON_RANDOM_MDPS
def test_bad_backup_gives_the_policy_gradient(seed):
    """Identity 5: ∇J of the action level; the naive gradient points elsewhere.

    As d log π(w) / dθ(v) = 1[v = w] - π(v) for a softmax, and A has mean 0 under π, the sum
    Σ d(s) π(w^{<j}) π(w^j) A ∇log π(w^j) has the entry d(s) π(w^{≤j}) A at token j.
    """
    mdp = random_mdp(seed)
    valid = token_table(mdp, lambda ids, j: 0)  # 0 or -inf
    theta = torch.zeros_like(valid).requires_grad_()
    probs = (theta + valid).softmax(-1)  # (S, N, V)
    policy = torch.stack([along(probs, mdp, action).prod(-1) for action in mdp.actions], -1)
    chain = torch.einsum("sa,saz->sz", policy, mdp.transition)
    eye = torch.eye(len(chain)).double()
    visits = torch.linalg.solve(eye - 0.8 * chain.T, eye.mean(0))  # d = ρᵀ (I - γ P)⁻¹
    backward(visits @ (policy * mdp.reward).sum(-1))
    policy = policy.detach()
    probs = probs.detach()
    weight = t(visits)[:, None, None] * written(policy, mdp)  # d(s) π(w^{≤j} | s)
    _, bad = exact(mdp, 0.8, policy=policy)
    _, naive = exact(mdp, 0.8, 0.8, policy=policy)
    gradient = weight * advantage(bad_backup(bad, mdp, 0.8, policy=probs), probs)
    near(gradient, theta.grad, "not the gradient of the action level: gamma inside?")
    naive = weight * advantage(naive, probs)
    cosine = torch.cosine_similarity(naive.flatten(), theta.grad.flatten(), 0)
    assert cosine < 1 - 1e-5, "the naive gradient must point elsewhere on this MDP"


def test_solve_finds_the_fixed_point():
    """q ← 1 + q / 2 ends at 2 from either side; an entry at -inf is not compared."""
    q0 = t([10, -INF, -10])
    near(solve(lambda q: 1 + q / 2, q0), [2, -INF, 2], "is the change signed?", tol=1e-11)
    near(q0, [10, -INF, -10], "q0 was changed in place")


def test_solve_stops_within_tol():
    halve = Mock(side_effect=lambda q: q * t([.5] + [0] * 99))
    solve(halve, [1] * 100, tol=0.1)  # the first changes by ½, ¼, ⅛, 1/16, the average by less
    count = halve.call_count
    assert 4 <= count <= 5, f"not the largest change against tol: {count} backups, not 4"
    halve.reset_mock()
    with pytest.raises(RuntimeError):
        solve(halve, [1] * 100, max_iters=3)
    assert halve.call_count == 3, f"max_iters = 3 made {halve.call_count} backups"


@pytest.mark.parametrize("factor, shift", [(1, 1), (10, 0), (-1, 0), (1, NAN)])
def test_solve_never_returns_what_has_not_converged(factor, shift):
    """Growing, overflowing, flipping and NaN tables are a RuntimeError."""
    with pytest.raises(RuntimeError):
        solve(lambda q: factor * q + shift, [1, -1], max_iters=500)


TOKEN_POLICY = small_table(".25 .75 .5 .5 1 | .5 .5 .25 .75 1", invalid=0)


def test_action_policy_by_hand():
    # ¼, ¾·½, ¾·½·1; ½, ½·¼, ½·¾·1
    near(action_policy(TOKEN_POLICY, small_mdp()), ".25 .375 .375 | .5 .125 .375",
         "not the chain rule", """
only the first token: .25 .75 .75 | .5 .5 .5
only the last token: .25 .5 1 | .5 .25 1
without the last token: 1 .75 .375 | 1 .5 .375
sum instead of product: .25 1.25 2.25 | .5 .75 2.25""")


def test_action_policy_is_not_rounded():
    small = small_table("1e-12 1/3 .5 1e-12 1 | 0 1 0 1 1", invalid=0)
    right = t("1 1e12/6 1/3 | 0 0 1e12")
    near(action_policy(small, small_mdp()) * 1e12, right, "clamped, or in float32")


def test_action_policy_lets_the_gradient_through():
    """The derivative of a product by one factor is the product of the others: ¾ · ½ · 1."""
    token_policy = TOKEN_POLICY.clone().requires_grad_()
    backward(action_policy(token_policy, small_mdp())[0, 2])
    right = small_table("0 .5 0 .75 .375 | 0 0 0 0 0", invalid=0)
    near(token_policy.grad, right, "not the derivative of the product")


# ------------------------------------------------------------------ credit over a token stream


@WITH_ALL_MASKS
def test_bad_discounts_by_hand(dtype):
    """γ_w inside an action, γ after its last token, 0 after that of a finished episode."""
    # three tokens | one token, episode over | two tokens; `done` inside an action says nothing
    end = t("0 0 1 1 0 1").to(dtype)
    done = t("1 0 0 1 1 0").to(dtype)
    near(bad_discounts(end, done, 0.5, 0.25), ".25 .25 .5 0 .25 .5", "not γ_w, γ or 0", """
gamma was applied inside the action: .5 .5 .5 0 .5 .5
gamma and gamma_token exchanged: .5 .5 .25 0 .5 .25
gamma_token everywhere: .25 .25 .25 0 .25 .25
γ γ_w after the last token: .25 .25 .125 0 .25 .125
bootstrapped across an episode's end: .25 .25 .5 .5 .25 .5
`done` was read inside an action: 0 .25 .5 0 0 .5
`done` is upside down: .25 .25 0 .5 .25 0
γ a slot too late: .5 .25 .25 0 .5 .25
γ a slot too early: .25 .5 .5 0 .5 .25
0 inside the action, where γ_w belongs: 0 0 .5 0 0 .5
0 at every end, and wherever `done` is: 0 .25 0 0 0 0
γ_w after a finished episode: .25 .25 .5 .25 .25 .5
0 after every action: .25 .25 0 0 .25 0
a table of integers, as the masks may be, cannot hold γ: 0
a table of truth values, as the masks may be, cannot hold γ: 1 1 1 0 1 1""")
    near(bad_discounts(end, done, 0.5), "1 1 .5 0 1 .5", "gamma_token is 1 unless told", """
a table of integers, as the masks may be, cannot hold γ: 1 1 0 0 1 0""")


# two actions of two tokens; γ = ½ between them, the episode ends after the second; λ = ¼ at ends
STREAM = t("0 2 0 4 | 1 2 3 4 | 1 .5 1 0 | 1 .25 1 .25")[:, None]  # r, v, γ, λ: (4, B, N)
ADVANTAGES = "2.625 1.625 1 0"
RETURNS = "3.625 3.625 4 4"


def test_gae_by_hand():
    """δ_n = r_n + γ_n v_{n+1} - v_n, A_n = δ_n + γ_n λ_n A_{n+1}, returns A + v."""
    # δ = (0+2-1, 2+½·3-2, 0+4-3, 4+0-4) = (1, 1½, 1, 0)
    # A₃ = 0, A₂ = 1 + 0, A₁ = 1½ + ½·¼·1, A₀ = 1 + A₁
    advantages, returns = gae(*STREAM, torch.ones(1, 4), t([8]))
    near(advantages, ADVANTAGES, "not the GAE recurrence", f"""
bootstrapped across an episode's end: 3.125 2.125 5 4  # A₃ = 4 + ½·8 - 4
lambda forgotten at the action's end: 3 2 1 0  # A₁ = 1½ + ½·1
lambda applied inside the action: 1.40625 1.625 1 0  # A₀ = 1 + ¼·A₁
λ of the next token: 1.5 2 1 0  # A₁ = 1½ + ½·1·1, A₀ = 1 + ¼·2
γ of the next token: 1.125 2.25 -3 0  # δ = (0+½·2-1, 2+3-2, 0+0-3, 4-4)
γ of the token before: 4.75 3.75 3 8  # δ = (1, 2+3-2, ½·4-3, 8+4-4)
γ and λ exchanged: 2.125 1.125 3 2  # δ = (1, 2+¼·3-2, 1, 4+¼·8-4)
trace not discounted: 2.75 1.75 1 0
only δ, no trace: 1 1.5 1 0
γ (r + v') in δ, the reward is discounted: 1.125 .125 -3 -4  # δ = (1, ½·2+½·3-2, 1, 0-4)
r of the token before: 4.375 -.625 -1 -4  # δ = (4+2-1, -½, 2+4-3, 0-4)
r of the next token: 2.625 -.375 1 -4  # δ = (2+2-1, -½, 4+4-3, 0-4)
the trace is subtracted: -.375 1.375 1 0
from the front to the back: 7 1.375 .375 0  # A₀ = δ₀ = 0+1·8-1
the last slot is left out: 3.125 2.125 5 0
no r in δ: .125 -.875 -3 -4  # δ = (1, -½, 1, -4)
no v' in δ: -1.375 -.375 -3 0  # δ = (-1, 0, -3, 0)
v' is not discounted: 11.5625 10.5 9 8  # δ = (1, 3, 1, 8)
v is not subtracted: 6.5 4.5 8 4  # δ = (2, 3½, 4, 4)
v is added: 10.375 7.375 15 8  # δ = (3, 5½, 7, 8)
returns and advantages swapped: {RETURNS}""")
    near(returns, RETURNS, "returns are advantages + values", f"""
a true zero counted as missing: 3.625 3.625 4 0
no values: {ADVANTAGES}
rewards are added, not values: 2.625 3.625 1 4
values are subtracted, not added: 1.625 -.375 -2 -4""")


def test_gae_gives_lambda_returns():
    """G_n = r_n + γ_n ((1 - λ_n) v_{n+1} + λ_n G_{n+1}), with any numbers."""
    noise = torch.Generator().manual_seed(0)
    r, v, gamma, lambdas = torch.rand(4, 3, 9, generator=noise, dtype=torch.float64)
    last = t("3 | -2 | 1")
    for lam in (lambdas, 0.5, 0, 1):
        _, g = gae(r, v, gamma, lam, torch.ones(3, 9), last[:, 0])
        next_v = torch.cat([v[:, 1:], last], 1)
        next_g = torch.cat([g[:, 1:], last], 1)
        near(g, r + gamma * ((1 - lam) * next_v + lam * next_g), "not the λ-returns")


def test_gae_bootstraps_after_the_last_written_token():
    """`last_values` follows the row's last written token, weighed by that token's discount."""
    # r = (0, 2), v = (1, 2), γ = (1, ½): A₁ = 2 + ½·6 - 2 = 3, A₀ = 0 + 2 - 1 + 3 = 4
    row = t("0 2 0 | 1 2 7 | 1 .5 .5")[:, None]
    advantages, _ = gae(*row, 1.0, t("1 1 0"), t([6]))
    near(advantages, "4 3 0", "wrong bootstrap", """
last_values ignored, or the next slot read, not the next written token: 1 0 0
a masked value was used: 4.5 3.5 0
undiscounted: 7 6 0""")


def test_gae_time_limit_enters_as_a_reward():
    """As r + γ V(o_next) with discount 0: A₁ = (2 + ½·6) - 2 = 3, A₀ = 0 + 2 - 1 + ½·3."""
    cut = t("0 5 7 | 1 2 -7 | 1 0 1")[:, None]  # then comes another episode
    advantages, _ = gae(*cut, 0.5, torch.ones(1, 3), t([9]))
    near(advantages[:, :2], "2.5 3", "not r + γ V(o_next), with discount 0", """
the next episode leaked, the trace goes on: 8.25 14.5  # A₂ = 7 + 9 + 7 = 23
the next episode leaked, its value is used: -1 -4  # δ₁ = 5 - 7 - 2""")


@WITH_ALL_MASKS
@pytest.mark.parametrize("junk", [100, NAN, INF], ids=str)
def test_gae_cuts_gaps_out(junk, dtype):
    """The example above at slots 1, 2, 4, 7 of the first row, and a row of padding only."""
    where = [1, 2, 4, 7]
    mask = torch.zeros(2, 9)
    mask[0, where] = 1
    stream = torch.full((4, 2, 9), junk, dtype=torch.float64)
    stream[:, 0, where] = STREAM[:, 0]
    both = torch.stack(gae(*stream, mask.to(dtype), t([8, 3])))  # (2, B, N)
    near(both[:, 0, where], f"{ADVANTAGES} | {RETURNS}", "padding leaked, or a gap is not cut out")
    near(both[:, mask == 0], [[0] * 14] * 2, "masked slots must be zero")


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_first_token_has_the_action_level_advantage(lam):
    """Identity 6: with γ_w = λ_w = 1, whatever the tokenisation: here of 3, 1 and 2 tokens."""
    rewards = t("0 0 1 -2 0 3")
    values = t(".5 7 -4 1 -1 5")  # anything inside an action
    end = t("0 0 1 1 0 1")
    first = [0, 3, 4]
    last = [2, 3, 5]
    mask = torch.ones(1, 6)
    tokens, _ = gae(rewards, values, 1 - .1 * end, 1 - (1 - lam) * end, mask, t([4]))
    stream = rewards[:, last], values[:, first], .9 * end[:, last]
    whole, _ = gae(*stream, lam, mask[:, last], t([4]))
    near(tokens[:, first], whole, "depends on the tokenisation: lambda inside?", tol=1e-6)


def test_gae_targets_are_constants():
    """No gradient, and the dtype of the values."""
    given = STREAM.float().requires_grad_()
    for x in gae(*given, t("1 1 1 0"), torch.ones(1)):
        assert not x.requires_grad, "the critic would be trained through its own target: detach"
        assert x.dtype == torch.float32, f"values are float32, but {x.dtype} came out"
    row = torch.ones(1, 2)                              # the values decide, not what goes with them
    for x in gae(row, row, row.double(), 1.0, row, torch.ones(1)):
        assert x.dtype == torch.float32, f"values are float32, but {x.dtype} came out"


# ------------------------------------------------------------------ losses


@WITH_ALL_MASKS
def test_masked_mean_over_real_tokens(dtype):
    x = t("1 0 3 | 8 inf nan").requires_grad_()
    mean = masked_mean(x, t("1 1 1 | 1 0 0").to(dtype))
    near(mean, 3, "not the mean over real tokens", """
divided by all slots: 2  # (1 + 0 + 3 + 8) / 6
divided by the number of rows: 6
a true zero counted as missing: 4
sum instead of mean: 12
mean of the rows' means: 14/3
median: 1""")
    backward(mean)
    near(x.grad, "1/4 1/4 1/4 | 1/4 0 0", "padding leaked into the gradient")


@WITH_ALL_MASKS
def test_normalize_over_real_tokens(dtype):
    x = t("0 0 nan | 4 inf 4")  # mean 2, population std 2
    right = t("-1 -1 0 | 1 0 1")
    near(normalize(x, t("1 1 0 | 1 0 1").to(dtype)), right, "not (x - mean) / std of real tokens", {
        "population std expected, not the sample std": right * math.sqrt(3 / 4),
        "not divided by the std": 2 * right, "divided by the variance": right / 2,
        "the std is not that of x - mean": right / math.sqrt(2),
        "the mean is not subtracted": t("0 0 0 | 2 0 2"),
        "masked entries are not 0": t("-1 -1 nan | 1 inf 1")}, tol=1e-6)
    other = normalize(t("0 0 3"), torch.ones(1, 3))  # mean 1, variance (1 + 1 + 4) / 3
    near(other, t("-1 -1 2") / math.sqrt(2), "not divided by the root of the variance", tol=1e-6)


def test_normalize_where_all_are_alike():
    near(normalize(t("5 5"), torch.ones(1, 2)), "0 0", "equal entries must give zeros", {
        "0 / 0: add 1e-8 to the std": NAN})
    small = normalize(t("-1e-8 1e-8"), torch.ones(1, 2))
    near(small, "-.5 .5", "1e-8 is added to the std", """
1e-8 is added to the variance: -1e-4 1e-4
the std is at least 1e-8, nothing is added: -1 1""", tol=1e-6)


def ppo_example(dtype=torch.bool):
    """Log-probs, old log-probs, advantages and mask of five real tokens and one of padding."""
    ratio = t("1.5 .5 1.5 | .5 1.125 nan")
    logp = ratio.log() - 1
    advantages = t("2 4 -2 | -6 4 nan")
    return logp.requires_grad_(), 0 * ratio - 1, advantages, (ratio > 0).to(dtype)


@WITH_ALL_MASKS
def test_ppo_policy_loss_by_hand(dtype):
    loss, _ = ppo_policy_loss(*ppo_example(dtype))
    # min(3, 2.4) + min(2, 3.2) + min(-3, -2.4) + min(-3, -4.8) + 4.5 = 1.1
    near(loss, -1.1 / 5, "not PPO's clipped objective", """
min and max swapped: -5.3/5  # 3 + 3.2 - 2.4 - 3 + 4.5
the ratio is upside down: 3.52/4.5  # 4/3 + 4.8 - 1.6 - 12 + 32/9 = -3.52 / .9
the sign is wrong: 1.1/5
clipped to ±ε, not 1 ± ε: .8  # .4 + .8 - 3 - 3 + .8
nothing is clipped, or not the product with A: -3.5/5  # 3 + 2 - 3 - 3 + 4.5
the minimum is missing, always clipped: -2.9/5  # 2.4 + 3.2 - 2.4 - 4.8 + 4.5
sum instead of mean: -1.1
divided by all slots: -1.1/6""")


def test_ppo_policy_loss_gradient():
    """-ratio · A / n where the unclipped term is the smaller; 0 where clipped, and on padding."""
    logp, *rest = ppo_example()
    backward(ppo_policy_loss(logp, *rest)[0])
    # clipped | -½·4 | 1½·2 | clipped | inside: -1⅛·4 | padding
    near(logp.grad, "0 -2/5 3/5 | 0 -4.5/5 0", "the gradient is not -ratio · A / n", """
the clip does not stop the gradient: -3/5 -2/5 3/5 | 3/5 -4.5/5 0
the clip also stops tokens on their way back: 0 0 0 | 0 -4.5/5 0""")


def test_ppo_policy_loss_info():
    _, info = ppo_policy_loss(*ppo_example())
    log = math.log(81 / 128) / 5  # the mean log ratio; the ratios sum to 5⅛
    kl = .125 / 5 - log
    near(float(info["kl"]), kl, "kl is not the mean of ratio - 1 - log ratio", {
        "-log ratio alone": -log, "log ratio": log, "no -1": kl + 1,
        "divided by all slots": kl * 5 / 6})
    near(float(info["clip_fraction"]), 4 / 5, "four of five ratios lie outside 1 ± .2", """
only one side of the clip: 2/5
the share inside, not outside: 1/5
divided by all slots: 4/6""", tol=1e-6)
    for name, x in info.items():
        assert torch.is_tensor(x) and not x.requires_grad, f"{name} must be a detached tensor"


def test_ppo_policy_loss_clip_range():
    loss, info = ppo_policy_loss(*ppo_example(), clip=0.6)
    near(loss, -3.5 / 5, "nothing lies outside 1 ± .6", "clip is ignored: -1.1/5")
    near(float(info["clip_fraction"]), 0, "nothing lies outside 1 ± .6", "clip is ignored: .8")


@WITH_ALL_MASKS
def test_value_loss_is_half_the_squared_error(dtype):
    values = t("1 3 | 2 nan").requires_grad_()
    loss = value_loss(values, t("0 5 | 2 nan"), t("1 1 | 1 0").to(dtype))
    near(loss, 5 / 6, "not the mean of ½ (v - R)²", """
the ½ is missing: 5/3  # (1 + 4 + 0) / 3
divided by all slots: 5/8
sum instead of mean: 5/2
not squared: 1/2
v + R, not v - R: 13.5
a true zero counted as missing: 5/4""")
    backward(loss)
    near(values.grad, "1/3 -2/3 | 0 0", "not (v - R) / n, and 0 on padding")


GRID = t("1 2 3 | 4 5 6")
HOLES = t("1 1 0 | 1 0 1")
TABLE = small_table("1 1 1 1 1 | 2 2 2 2 2", invalid=3)
USE = {  # function: arguments like any others
    "state_values": (GRID, GRID), "action_backup": (GRID, small_mdp(), .5),
    "token_backup": (TABLE, small_mdp(), .5, 1.0), "bad_backup": (TABLE, small_mdp(), .5),
    "action_policy": (TABLE, small_mdp()), "bad_discounts": (HOLES, HOLES, .5),
    "gae": (GRID, GRID, GRID, GRID, HOLES, GRID[:, 0]), "masked_mean": (GRID, HOLES),
    "normalize": (GRID, HOLES), "ppo_policy_loss": (GRID, GRID, GRID, HOLES),
    "value_loss": (GRID, GRID, HOLES), "menu_logp": (GRID.float(), HOLES)}
REFUSING = sorted(set(USE) - {"menu_logp"})


@pytest.mark.parametrize("name", USE)
def test_keeps_its_inputs(name):
    args = copy.deepcopy(USE[name])
    getattr(poad, name)(*args)
    for x, before in zip(args, USE[name]):
        if torch.is_tensor(x):
            assert torch.equal(x, before), f"{name} changes an argument in place: copy it first"


def misuses(name):
    """One argument at a time of another shape, which would broadcast; and what has no meaning."""
    args = USE[name]
    for i, x in enumerate(args):
        if torch.is_tensor(x) and x.dim() > 1:
            yield *args[:i], x[:, :1], *args[i + 1:]
    if name == "state_values":
        yield *args, 1.0  # a policy and a temperature
    if name in ("masked_mean", "normalize", "ppo_policy_loss", "value_loss"):
        yield *args[:-1], 0 * args[-1]  # a mask of nothing


@pytest.mark.parametrize("name", REFUSING)
def test_refuses_shapes(name):
    for args in misuses(name):
        shapes = [tuple(x.shape) for x in args if torch.is_tensor(x)]
        try:
            getattr(poad, name)(*args)
        except ValueError:
            continue
        pytest.fail(f"{name} took {shapes} where its docstring wants a ValueError")


# ------------------------------------------------------------------ helpers of the agent's tests

WORDS = "wait <unk> the in bowl salad eat put ice - cream now you see s0 s1 s2 <eos>".split()
EOS = WORDS.index("<eos>")
MENU = ["put the salad in the bowl", "wait", "put the bowl in the salad", "eat ice-cream now"]
NESTED = ["eat ice-cream", "eat ice-cream now", "wait", "eat"]          # an entry begins another
PROMPTS = ["you", "you see the bowl", "wait", "you see the salad in the bowl"]
MENUS = [MENU, NESTED, NESTED, [" eat the salad now"]]
FAMILIES = {                        # of LMs: with what they have of their own
    "Llama": {}, "GPT2": {}, "Bloom": {}, "Cohere": {}, "Gemma2": dict(sliding_window=4),
    "GptOss": dict(num_local_experts=4, sliding_window=4),
    "Lfm2": dict(layer_types=["conv", "full_attention"], conv_L_cache=3),
    "Rwkv": dict(attention_hidden_size=32)}
SCORING = ["glam", "twosome"]
WITH_ALL_POLICIES = pytest.mark.parametrize("policy", ["token", "action", *SCORING])

# a token a word, but "ice-cream" is three; token 0 is a word and the padding, too
CORE = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
CORE.pre_tokenizer = pre_tokenizers.Whitespace()
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=CORE, unk_token="<unk>", eos_token="<eos>", pad_token="wait")
SIZES = dict(
    vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=None,
    bos_token_id=None, eos_token_id=None)


def small_lm(family="Llama", spread=0.2, **own):
    """A random LM, the sharper the larger `spread`, with a checkpoint's habits of sampling."""
    own = FAMILIES.get(family, {}) | own
    config = getattr(transformers, f"{family}Config")(
        **SIZES | own, initializer_range=spread)
    with envs.seeded(0):
        lm = AutoModelForCausalLM.from_config(config)
    lm.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0)
    return lm


def small_agent(*args, max_new_tokens=5, **own):
    """An agent with a `small_lm`, whose critic is random."""
    agent = LanguageAgent(small_lm(*args, **own), TOKENIZER, max_new_tokens)
    torch.nn.init.normal_(agent.head.weight, generator=rng())
    return agent


def rng():
    return torch.Generator().manual_seed(0)


def ids_of(text):
    return tuple(TOKENIZER(text).input_ids)


def judged(agent, actions):
    return agent.judge([action.before for action in actions])


def read(model, prompt, ids):
    """A plain forward pass, no padding, no cache: what it says before each of L ids, (L, ·)."""
    begin = ids_of(prompt)
    out = model(input_ids=torch.tensor([[*begin, *ids]]), use_cache=False)[0]
    return out[0, len(begin) - 1:-1]


def brute_force(agent, prompt, menu, ids):
    """log π, entropy and choice of written tokens, eos included, (3, L); without a menu: None."""
    columns = []
    for j, logits in enumerate(read(agent.lm, prompt, ids)):
        allowed = set(range(len(WORDS)))
        if menu:
            entries = [(*ids_of(text), EOS) for text in menu]
            allowed = {entry[j] for entry in entries if entry[:j] == ids[:j]}
        among = logits[list(allowed)]
        logp = logits[ids[j]] - among.logsumexp(0)
        entropy = torch.distributions.Categorical(logits=among).entropy()
        columns.append(torch.stack([logp, entropy, torch.tensor(float(len(allowed) > 1))]))
    return torch.stack(columns, 1)


def brute_score(agent, prompt, menu, policy):
    """The score of every entry of a menu, (A,): GLAM's and TWOSOME's is without eos."""
    scores = []
    for text in menu:
        ids = (*ids_of(text), EOS)
        score = brute_force(agent, prompt, menu, ids)[0].sum()
        if policy in SCORING:
            score = brute_force(agent, prompt, None, ids)[0, :-1].sum()
        if policy == "twosome":
            score = score / len(text.split())
        scores.append(score)
    return torch.stack(scores)


class Clock:
    """Shows how often it was acted on; after `end` times it is over, or `cut`."""

    name = "you"
    cut = False
    menu = MENU
    end = 2
    seeds = []                                          # of all clocks

    def __init__(self, **own):
        vars(self).update(own)

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.clock = 0
        return f"{self.name} s0", {"menu": self.menu}

    def step(self, action):
        self.clock += 1
        end = self.clock == self.end
        return (f"{self.name} s{self.clock}", len(action), end and not self.cut,
                end and self.cut, {"menu": self.menu, "success": True})


class Told:
    """A critic that is a table of v, a policy that is a table of log π, 0 at first.

    Both have a row for each of the one-token prompts 0, 1, ...
    """

    def __init__(self, values="0"):
        self.v = t(values)
        self.logp = torch.zeros(2, 2, requires_grad=True)

    def judge(self, rows):
        width = 1 + max(len(prefix) for _, prefix in rows)
        return self.v[[prompt for (prompt,), _ in rows], :width]

    def evaluate(self, actions, policy):
        logp = self.logp[[action.context[0] for action in actions]]
        return logp, 2 + logp                           # an entropy like any other


def two_actions():
    """Of one player, after the prompts 0 and 1, two slots each; the second pays 4."""
    one = torch.ones(2)
    first = Action("0", (0,), None, "eat", (6, EOS), one > 0, 0 * one, advantages=-one)
    return [first, replace(first, context=(1,), reward=4.0, done=True, advantages=one)]


ONE_PLAYER = Config(n_envs=1, n_steps=2, gamma=0.5, lam=0.5, minibatches=1)


# ------------------------------------------------------------------ language agent


def test_menu_logp_by_hand():
    """log π over the allowed tokens, −inf elsewhere, in float32: odds 1 : 3 : 4."""
    logits = t("1 3 4").log().requires_grad_()
    log_pi = menu_logp(logits, t("1 1 0"))
    near(log_pi.exp(), "1/4 3/4 0", "odds 1 : 3 among the allowed", """
not renormalised over the menu: 1/8 3/8 0
the menu is ignored: 1/8 3/8 1/2
what is not allowed must be -inf: 1/5 3/5 1/5
probabilities, not their logarithms: 1.2840254 2.1170000 1""", 1e-6)
    backward(log_pi[0, 0])
    near(logits.grad, "3/4 -3/4 0", "gradient of log π, 0 where forbidden", tol=1e-6)
    near(menu_logp(logits, None).exp(), "1/8 3/8 1/2", "None allows all", tol=1e-6)
    rows = menu_logp(t("100 100 | 100 100"), t("1 1 | 0 1"))
    near(rows.exp(), "1/2 1/2 | 0 1", "each row has its own menu", tol=1e-6)
    dtype = menu_logp(logits.bfloat16(), None).dtype
    assert dtype == log_pi.dtype == torch.float32, "whatever the logits are"


def test_a_menu_is_a_trie():
    eat, now, wait = ids_of("eat now wait")
    menu = encode_menu(TOKENIZER, "you", ("eat now", "wait", "eat"))
    assert menu.entries == [(eat, now, EOS), (wait, EOS), (eat, EOS)], "eos ends an entry"
    assert menu.trie == {
        (): {eat, wait}, (eat,): {now, EOS}, (wait,): {EOS}, (eat, now): {EOS}}


def strange_tokenizer():
    """It puts <bos> and ▁ before a text, as Llama 2's, and eos behind it."""
    words = "<unk> <bos> <eos> ▁you ▁see ▁eat eat ▁".split() + ["\n"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("prompt, expected", [
    ("you see", "<bos> ▁you ▁see + ▁eat <eos>"), ("<bos>you see", "<bos> ▁you ▁see + ▁eat <eos>"),
    ("you see\n", "<bos> ▁you ▁see \n + eat <eos>"),
    ("<bos>you see<eos>", "<bos> ▁you ▁see <eos> + ▁ ▁eat <eos>")])
def test_an_entry_is_read_as_the_prompts_next_words(prompt, expected):
    """One bos, no second ▁, no space after a line's end, no eos before the + but a typed one."""
    tokenizer = strange_tokenizer()
    [entry] = encode_menu(tokenizer, prompt, ("eat",)).entries
    parts = encode(tokenizer, prompt), entry
    found = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in parts]
    assert " + ".join(found) == expected


def spoilt():
    agent = small_agent()
    agent.lm.lm_head.weight.data.fill_(NAN)
    return agent


def updated(logp):
    """An update of a policy that gives log π, where the one that sampled gave 0."""
    agent = Told()
    agent.logp.data.fill_(logp)
    ppo_update(agent, SGD([agent.logp], 0.1), two_actions(), ONE_PLAYER, rng())


def cold():
    """An LM that samples at a temperature of its own."""
    lm = small_lm()
    lm.generate = partial(lm.generate, temperature=0.2)
    return lm


def grown():
    """A tokenizer that learnt a word after it was used; the LM has no row for it."""
    tokenizer = copy.deepcopy(TOKENIZER)
    encode(tokenizer, "you jump")
    tokenizer.add_tokens(["jump"])
    return tokenizer


REFUSED = """
    act([]) | act(["you", ""]) | act([" "], [MENU]) | act("you") | act(["you"], [[]]) |
    act(["you"], [["eat", ""]]) | act(["you"], [["eat", "wait", "eat"]]) | act(["you"], MENU) |
    act(["you"], [["ice-cream", "ice - cream"]]) | act(["you"], ["-"]) | act(["you"], [5]) |
    act(["you"], []) | act(["you", "see"], [MENU]) | act(["you"], [MENU, MENU]) |
    act(["you", "see"], [None, MENU]) ! need as many menus, .* or none |
    act(["you"], [["jump", "run"]]) ! cannot tell it from another |
    act(["you"], [MENU], "best") | act(["you"], None, "glam") | act(["you"], None, "twosome") |
    act(["you " * 14], [MENU]) | act(["you " * 12]) | small_agent(max_new_tokens=0) |
    small_agent("Bert", pad_token_id=0) ! ^Bert.* is no causal |
    small_agent("Lfm2").act(["you"]) ! ^Lfm2.* not write freely |
    LanguageAgent(cold(), TOKENIZER) ! ^Llama.* samples free text from something else |
    LanguageAgent(small_lm(), grown()).act(["you jump"], [MENU]) ! resize_token_embeddings |
    LanguageAgent(None, Mock(eos_token_id=None)) | load_agent("/no/folder", Clock) |
    load_agent("/no/model.gguf", Clock) | play(small_agent(), Clock, 0) |
    play(small_agent(), partial(Clock, end=9), 1, max_steps=3) | Config("ppo") |
    Config(updates=-1) | Config(n_envs=0) | Config(n_steps=0.5) | Config(epochs=0) |
    Config(minibatches=-1) | Config(n_envs=1, n_steps=3) | Config(gamma=2) | Config(lam=-0.1) |
    Config(gamma_token=NAN) | Config(lam_token=1.1) | Config(lr=-1.0) | Config(critic_lr=NAN) |
    Config(kl_stop=-1.0) | Config(updates=0.5) | Config(max_grad_norm=0.0) |
    encode_menu(strange_tokenizer(), "", ("eat",)) | spoilt().act(["you"], [MENU]) |
    spoilt().act(["you"]) | updated(0.1) ! did not sample | updated(NAN) ! loss is nan |
    solve(abs, 0.0, max_iters=0) ! no fixed point in 0"""


def act(*args):
    return small_agent(max_position_embeddings=16).act(*args)


@pytest.mark.parametrize("row", [" ".join(row.split()) for row in REFUSED.split("|")])
def test_refuses(row):
    """A call and, behind a !, what the message says."""
    call, _, words = row.partition(" ! ")
    with pytest.raises((ValueError, RuntimeError), match=words or None):
        eval(call)


def test_a_vocabulary_of_three_words_is_enough():
    LanguageAgent(small_lm(vocab_size=3), TOKENIZER)


def test_ppo_policy_loss_of_a_huge_ratio():
    logp = t("-1 -1").requires_grad_()
    backward(ppo_policy_loss(logp, t("-101 -1"), t("0 1"), t("1 1"))[0])
    near(logp.grad, "0 -1/2", "an advantage of 0 moves nothing")


def test_normalize_equal_entries_are_zero():
    same = normalize(torch.full((512,), 10.1), torch.ones(512))
    assert not same.any(), "entries that are all alike must be 0 exactly"


@pytest.mark.parametrize("family", FAMILIES)
def test_act_and_evaluate_equal_brute_force(family):
    """In one batch: actions from menus, and free text where the LM can write it."""
    agent = small_agent(family)
    actions = agent.act(PROMPTS * 4, MENUS * 4, generator=rng())
    if agent.shares_prompts:
        actions += agent.act(PROMPTS, generator=rng())
    again = torch.stack(agent.evaluate(actions), 1)                         # (B, 2, L)
    menus = MENUS * 4 + [None] * 4
    for action, menu, slots, v in zip(actions, menus, again, judged(agent, actions)):
        size = len(action.ids)
        if menu:
            assert action.text in menu and action.ids == (*ids_of(action.text), EOS)
        expected = brute_force(agent, action.prompt, menu, action.ids)
        near(slots[:, :size], expected[:2], "log π and entropy", tol=1e-4)
        near(action.logp, slots[0, :size], "evaluate is not act", tol=1e-5)
        features = read(agent.body, action.prompt, action.ids)
        near(v[:size], agent.head(features)[:, 0], "v before each token", tol=1e-4)
        near(action.choice, expected[2], "what the trie leaves open")
        assert not slots[:, size:].any(), "padding is 0"


def as_drawn(picks, p):
    """Is this what was drawn from p? n Σ (share − p)² / p is about 1 for each outcome."""
    share = picks.bincount(minlength=len(p)) / len(picks)
    return len(picks) * ((share - p) ** 2 / p).mean() < 3


@WITH_ALL_POLICIES
def test_act_samples_what_it_says(policy):
    agent = small_agent(spread=0.1)
    log_pi = brute_score(agent, "you", NESTED, policy).log_softmax(0)
    actions = agent.act(["you"] * 1000, [NESTED] * 1000, policy, rng())
    picks = torch.tensor([NESTED.index(action.text) for action in actions])
    assert as_drawn(picks, log_pi.exp())
    logp, entropy = agent.evaluate(actions, policy)
    near(logp.sum(1), log_pi[picks], f"log π(a|o) of {policy}", tol=1e-4)
    near(logp, column(actions, "logp"), "stored and evaluated differ: ratio 1", tol=1e-5)
    if policy in SCORING:
        near(entropy[0, 0], -(log_pi.exp() @ log_pi), "entropy over the menu", tol=1e-4)
    assert policy == "token" or logp.shape == (1000, 1), "one slot an action"


def test_free_text_is_sampled_from_what_is_read():
    """Two tokens (w, x), or eos: outcome |V| w + x, or the last."""
    agent = small_agent(spread=0.1, max_new_tokens=2)
    log_pi = []
    for w in range(EOS):
        first, second = read(agent.lm, "you", (w, 0)).log_softmax(-1)
        log_pi.append(first[w] + second)
    log_pi.append(first[EOS:])
    actions = agent.act(["you"] * 2000, generator=rng())
    picks = [len(WORDS) * action.ids[0] + sum(action.ids[1:]) for action in actions]
    assert as_drawn(torch.tensor(picks), torch.cat(log_pi).exp())


def test_choice_is_read_off_the_trie():
    agent = small_agent()
    agent.lm.lm_head.weight.data.mul_(1e4)
    [action] = agent.act(["you see"], [["eat now", "eat the bowl"]])
    assert not action.logp.any(), "the test wants a policy that is certain"
    assert action.choice.nonzero().tolist() == [[1]]


@pytest.mark.parametrize("family", ["GPT2", "Gemma2", "Rwkv"])
@pytest.mark.parametrize("policy", ["token", *SCORING])
def test_score_equals_brute_force(family, policy):
    """GLAM: Σ log p over the whole vocabulary, without eos. TWOSOME: by the number of words.

    Token: Σ log π, restricted to the menu, with eos.
    """
    agent = small_agent(family)
    agent.train()                                       # GPT-2's dropout is on by default
    scores = {}
    for name in ("token", *SCORING):
        parts = [brute_score(agent, *pair, name) for pair in zip(PROMPTS, MENUS)]
        scores[name] = torch.cat(parts)
    expected = scores.pop(policy)
    found = torch.cat(agent.score(PROMPTS, MENUS, policy))
    near(found, expected, f"not {policy}, nor another policy", scores, 1e-4)
    weights = torch.arange(13.0)
    backward(found @ weights)
    gradients = torch.autograd.grad(expected @ weights, agent.lm.parameters())
    for x, y in zip(agent.lm.parameters(), gradients):
        near(x.grad, y, "gradient, through a shared prompt too", tol=1e-3)


@pytest.mark.parametrize("family, others", [("GPT2", []), ("Gemma2", [2, 3])])
def test_free_text(family, others):
    """It ends with eos, with what else the checkpoint ends with, or at its limit."""
    lm = small_lm(family)
    lm.generation_config.eos_token_id = others
    agent = LanguageAgent(lm, TOKENIZER, max_new_tokens=5)
    before = torch.get_rng_state()
    actions, again = [agent.act(PROMPTS * 25, generator=rng()) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not ours"
    for action, same in zip(actions, again):
        words = [token for token in action.ids if token not in (EOS, *others)]
        assert len(words) == len(action.ids) - 1 or len(words) == 5
        assert action.text == TOKENIZER.decode(words, skip_special_tokens=True) == same.text


@WITH_ALL_POLICIES
def test_standing_still(policy, monkeypatch):
    agent = small_agent()
    agent.read = Mock(side_effect=agent.read)
    monkeypatch.setattr(poad, "encode", Mock(side_effect=encode))
    plain = agent.act(PROMPTS, MENUS, policy, rng())
    with agent.standing_still():
        agent.act(PROMPTS, MENUS, policy)
        agent.read.reset_mock()
        poad.encode.reset_mock()
        second = agent.act(PROMPTS, MENUS, policy, rng())
        assert not agent.read.called and not poad.encode.called, "what is known"
    near(column(second, "logp"), column(plain, "logp"), "from memory", tol=1e-5)
    agent.evaluate(second[:1] * 9, policy)
    _, rows = agent.read.call_args.args
    assert len(rows) <= len(MENU), "read again, and equal rows once"


# ------------------------------------------------------------------ the update

# two players, two actions each, at most three slots; one has a gap
MASK = t("1 0 1 | 1 0 0 | 1 1 1 | 1 1 0")
VALUES = t("2 nan 4 | 1 nan nan | 0 2 4 | 5 3 nan")
OUTCOME = t("1 2 | 0 -1"), t("1 0 | 0 0")


def test_assign_by_hand():
    """γ = λ = ½, γ_w = λ_w = 1: at an action's end the return is r + γ ((1 − λ) v' + λ G').

    It is r if nothing follows; an action's other tokens pass it on.
    """
    # player 0: 1; 2 | 1, from the end: -1; 0 + ½ (½ · 5 + ½ · -1) = 1
    advantages, returns = assign(Config(gamma=.5, lam=.5), MASK, VALUES, *OUTCOME)
    right = "1 0 1 | 2 0 0 | 1 1 1 | -1 -1 0"
    near(returns, right, "returns of each player's stream", """
the reward was given to the first slot: 1 0 0 | 2 0 0 | 1 1 1 | -1 0 0
`done` is ignored: 1.75 0 1.75 | 2 0 0 | 1 1 1 | -1 -1 0
λ was applied inside: 2.5 0 1 | 2 0 0 | 2.375 2.75 1.5 | 1 -1 0
players mixed up, environment b's action t is in row b·T + t: 1 0 1 | 3 0 0 | 0 0 0 | -1 -1 0""")
    near(advantages, torch.where(MASK > 0, returns - VALUES, 0), "they are returns - values",
         f"returns and advantages swapped: {right}")


def test_assign_follows_the_method():
    # naive, λ = 0: an action's end returns r + ½ v', other tokens half of the next one's value
    _, returns = assign(Config("ntpo", gamma=.5, lam=0.0), MASK, VALUES, *OUTCOME)
    near(returns, "2 0 1 | 2 0 0 | 1 2 2.5 | 1.5 -1 0", "naive")
    config = Config("action", gamma=.5, lam=.5)
    _, returns = assign(config, MASK[:, :1], VALUES[:, :1], *OUTCOME)
    near(returns, "1 | 2 | 1 | -1", "whole actions")


def test_config():
    for config, inside in (
            (replace(Config("poad"), method="ntpo"), (.95, .95)),
            (replace(Config("ntpo"), gamma=.9), (.9, .95)),
            (Config("ntpo", gamma_token=0.0), (0, .95)), (Config(lam_token=.8), (1, .8))):
        assert config.inside == inside, config
    assert Config(lr=0.0).step_size == 0 < Config().step_size


@pytest.mark.parametrize("lam_token, is_choice, credits", [
    (1.0, True, "-.7071068 -.7071068 | 1.4142136 0"), (0.0, False, "-1 1 | 0 0")])
def test_credit_by_hand(lam_token, is_choice, credits):
    """v = 1, cut where it is 6: returns 4 + ½ · 6 = 7 and ½ (½ · 1 + ½ · 7) = 2.

    Advantages are, from the end, 7 − 1 = 6, 2 − 1 = 1, (1 − 1) + λ_w · 1: of 1, 1, 6 mean and
    deviation are 8/3 and 5√2/3; of 0, 1, where the last is no choice, ½ and ½.
    """
    agent = Told("1 1 | 1 nan | 6 nan")
    actions = two_actions()
    actions[1].after = (2,)
    actions[1].choice = torch.tensor([is_choice])       # one slot
    for given in (1.0, lam_token):                      # before the critic is fitted, and after
        credit(agent, actions, replace(ONE_PLAYER, lam_token=given))
    near(column(actions, "advantages"), credits, "normalised over choices", tol=1e-6)
    near(column(actions, "returns"), "2 2 | 7 0", "they stay as they were")
    assert actions[1].reward == 4, "what was paid stays as it is"


@pytest.mark.parametrize("kl_stop, entropy_coef, logp", [
    (.01, 0.0, "-.1 -.1 | .1 .1"), (.011, 0.0, "-.1904837 -.1904837 | .2105171 .2105171"),
    (.01, 0.5, "-.05 -.05 | .15 .15")])
def test_one_update_by_hand(kl_stop, entropy_coef, logp):
    """Two choices an action, so the loss is −2 · mean Â ratio, its gradient −½ Â ratio.

    The first step is ∓.1 (entropy adds .2 · ½ · ½), the second ∓.1 e^∓.1. The KL between them is
    that of two tokens, 2 (e^∓.1 − 1 ± .1), on average e^.1 + e^−.1 − 2 = .01001.
    """
    agent = Told()
    config = replace(
        ONE_PLAYER, epochs=2, kl_stop=kl_stop, max_grad_norm=INF, entropy_coef=entropy_coef)
    info = ppo_update(agent, SGD([agent.logp], 0.2), two_actions(), config, rng())
    near(agent.logp, logp, "log π after the update", tol=1e-6)
    assert info["stopped"] == (kl_stop == .01) and info["minibatches"] == 2


def test_fit_critic():
    agent = LanguageAgent(small_lm(), TOKENIZER)
    actions = agent.act(PROMPTS[:2], [["eat now"], ["wait"]])
    assert not judged(agent, actions).any(), "v = 0 before anything is learnt"
    actions[0].returns, actions[1].returns = t("0.5 1 2")[0], t("-0.5 -1")[0]
    optimizer = torch.optim.Adam(agent.critic.parameters(), 0.02)
    fit_critic(agent, optimizer, actions, Config(critic_steps=60), rng())
    values = judged(agent, actions) * column(actions, "mask")
    near(values, "0.5 1 2 | -0.5 -1 0", "what it was told, before every token", tol=0.2)


# ------------------------------------------------------------------ playing and training


@pytest.mark.parametrize("cut, told", [
    (False, "you s0: 0, you s1: 1, you s0: 1 you s1, see s0: 0, see s1: 1, see s0: 1 see s1"),
    (True, "you s0: 0, you s1: 1 you s2, you s0: 1 you s1, "
           "see s0: 0, see s1: 1 see s2, see s0: 1 see s1")])
def test_collect(cut, told):
    """Two players, three steps; episodes of two steps.

    Told are prompt, done, and what comes next where it was cut: the rollout's end cuts, too.
    """
    players = [Player(Clock(name=name, cut=cut)) for name in ("you", "see")]
    episodes = []
    actions = collect(small_agent(), players, Config(n_envs=2, n_steps=3), rng(), episodes)
    found = []
    for action in actions:
        after = TOKENIZER.decode(action.after or ())
        found.append(f"{action.prompt}: {action.done:d} {after}".strip())
    assert ", ".join(found) == told
    paid = [len(action.text) for action in actions]
    assert [action.reward for action in actions] == paid and len(episodes) == 2


@pytest.mark.parametrize("steps, moves", [(0, False), (30, True)])
def test_train_fits_the_critic_before_it_judges(monkeypatch, steps, moves):
    """λ_w = 0: a choice gets v after it − v before it, which is 0 for a critic that is new.

    But that critic learns λ_w = 1: every slot of the first of two actions has r + γ λ r'.
    """
    rollout = []
    monkeypatch.setattr(
        poad, "fit_critic", lambda *args: rollout.extend(args[2]) or fit_critic(*args))
    config = Config(
        updates=1, n_envs=4, n_steps=2, critic_steps=steps, entropy_coef=0.0, lam_token=0.0)
    [metrics] = train(LanguageAgent(small_lm(), TOKENIZER), Clock, config)
    assert (metrics["kl"] > 1e-5) == moves, "the critic judges after it was fitted"
    for first, second in zip(rollout[::2], rollout[1::2]):
        target = first.reward + .95**2 * second.reward
        near(first.returns, [target] * len(first.ids), "not the return", tol=1e-4)


def test_train_fits_the_critic_on_four_rollouts(monkeypatch):
    seen = []
    monkeypatch.setattr(poad, "fit_critic", lambda *args: seen.append(len(args[2])))
    list(train(small_agent(), Clock, Config(updates=6, n_envs=2, n_steps=3)))
    assert seen == [6, 12, 18, 24, 24, 24]


@pytest.mark.parametrize("method", METHODS)
def test_train_where_nothing_can_be_chosen(method):
    """One-entry menus, "eat now" and eos, which pays 7 twice: only the critic learns."""
    agent = small_agent()
    before = copy.deepcopy(agent)
    config = Config(method, updates=2, n_envs=2, n_steps=3, critic_steps=2)
    _, metrics = train(agent, partial(Clock, menu=["eat now"]), config)
    expected = dict(update=2, env_steps=12, episodes=6, return_mean=14, success_rate=1,
                    minibatches=0, kl=0, stopped=False)
    assert expected.items() <= metrics.items()
    for name, x in agent.state_dict().items():
        stays = torch.equal(x, before.state_dict()[name])
        assert stays == name.startswith("lm."), f"{name}: only the critic learns"


def test_train_repeats_itself():
    runs = []
    for seed in (0, 0, 1):
        config = Config(updates=2, n_envs=5, n_steps=1, seed=seed, critic_steps=2, kl_stop=INF)
        runs.append(list(train(small_agent(), Clock, config)))
        for metrics in runs[-1]:
            metrics.pop("seconds")
            assert metrics["minibatches"] == 12, "3 epochs of 4, although there are 5 actions"
    assert runs[0] == runs[1] and runs[0] != runs[2], "one seed, one run"


START = "you", {"menu": MENU}
END = {"menu": MENU, "success": True}
NO_MENUS = ["wait", {"wait"}, 5, np.array("wait"), [0, 1], [None], ["wait", " "], ["eat"] * 2, []]


@pytest.mark.parametrize("reset, step, words", [
    ("you see", None, "reset must return"), ((np.zeros(3), {}), None, "expected a text"),
    (("you", None), None, "info is None"),
    *((("you", {"menu": menu}), None, "menu (is|has)") for menu in NO_MENUS),
    (START, ("you", 1.0, True, END), "step must return"),
    (START, ("you", 1.0, True, False, None), "info is None"),
    (START, ("you", 1.0, True, False, {"menu": MENU}), "success"),
    (START, ("you", 1.0, True, False, {"success": [True]}), "success"),
    (START, ("you", 1.0, None, True, END), "terminated is None"),
    (START, ("you", 1.0, False, "no", END), "truncated is 'no'"),
    (START, ("", 1.0, False, True, END), "expected a text"),
    (START, ("you", None, True, False, END), "reward is None"),
    (START, ("you", NAN, True, False, END), "reward is nan")])
def test_own_environment_is_told(reset, step, words):
    def env_fn():
        return Mock(**{"reset.return_value": reset, "step.return_value": step})
    with pytest.raises(ValueError, match=words):
        list(train(small_agent(), env_fn, Config(updates=1)))


def test_play():
    agent = small_agent(spread=0.1)
    played, story = play(agent, Clock, 40)
    assert len(played) == 40
    assert played == play(agent, Clock, 40)[0] != play(agent, Clock, 40, seed=1)[0]
    assert "you s0" in story and "you s1" in story


def test_no_environment_is_seeded_like_another():
    Clock.seeds.clear()
    list(train(small_agent(), Clock, Config(updates=1, n_envs=4, n_steps=1)))
    play(small_agent(), Clock, 4)
    assert Clock.seeds == [poad.seed_of(0, b, exam) for exam in (0, 1) for b in range(4)]
    seeds = {poad.seed_of(*which) for which in product(range(4), range(2500), (0, 1))}
    assert len(seeds) == 4 * 2500 * 2


@pytest.mark.parametrize("name", sorted(set(ENVS) - {"scikit"}))
def test_tiny_agent_reads_its_environment(name):
    obs, info = make(name).reset(seed=0)
    tokenizer = tiny_agent(partial(make, name), pretrain_steps=0).tokenizer
    ids = tokenizer(" ".join([obs, *info["menu"]])).input_ids
    assert tokenizer.unk_token_id not in ids


def test_poad_learns_to_serve_and_naive_does_not():
    """Serving (17 words, pays 1) or eating at once (2 words, pays .7)."""
    env_fn = partial(make, "lunch")
    start = tiny_agent(env_fn, pretrain_steps=60)
    served = {}
    for method in ("poad", "ntpo"):
        agent = copy.deepcopy(start)
        config = Config(method, updates=10, n_envs=8, n_steps=8, critic_steps=30)
        list(train(agent, env_fn, config))
        served[method] = sum(success for _, success in play(agent, env_fn, 100)[0])
    assert served["poad"] >= 90 and served["ntpo"] <= 10, served


# ------------------------------------------------------------------ command line


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """main in an empty folder, on lunch, in small; it uses `cli.tiny_lm`, hardly pre-trained."""
    def run(typed):
        small = "--env lunch --n_envs 2 --epochs 1 --minibatches 1 --critic_steps 2 "
        poad.main((small + typed).split())
    run.tiny_lm = Mock(side_effect=lambda env_fn, seed, *_: envs.tiny_lm(env_fn, seed, 2))
    monkeypatch.setattr(poad, "tiny_lm", run.tiny_lm)
    monkeypatch.chdir(tmp_path)
    return run


def runs_in(path, typed):
    """The runs of a JSON file, which has no NaN and no Infinity in it: they are not JSON."""
    found = json.loads(Path(path).read_text(), parse_constant=pytest.fail)
    assert found["command"].endswith(typed)
    return found["runs"]


def test_command_line(cli, capsys):
    typed = "--updates 1 --seed 4 --seeds 2 --method poad,glam --kl_stop inf --out new/Infinity.1"
    cli(typed)
    said = capsys.readouterr().out
    runs = runs_in("new/Infinity.1", typed)
    told = ["poad, seed 4", "glam, seed 4", "poad, seed 5", "glam, seed 5"]
    assert re.findall(r"\w+, seed \d", said) == told and len(runs) == 4
    config = runs[0]["config"]
    [metrics] = runs[0]["metrics"]
    assert metrics["env_steps"] == 32 and runs[0]["exam"]["episodes"] == 100
    assert config["n_steps"] == 16 and config["kl_stop"] is None, "the preset, and inf"
    assert config["lr"] == METHODS["poad"]["lr"]
    assert (f"poad, seed 4: tiny on {config['device']}, "
            "step sizes 0.001 (LM), 0.001 (critic)") in said
    assert cli.tiny_lm.call_count == 2, "one start for all methods"
    assert Path("new/Infinity.1.png").exists()
    assert "→" in said and "salad" in said, "a transcript"


@pytest.mark.parametrize("typed", re.split(r" *[|\n] *", """--env dinner | --wording long
    --method ppo | --method poad,poad | --method glam --env scikit | --colour red | --gamma 2
    --updates many | --updates -1 | --seeds 0 | --device cuda:99 | --minibatches 99 | --out .
    --model /no/such | --env_options guests=1 | --env orders --env_options slots
    --train_layers -1 | --train_layers 9 | --out /dev/null/x | --save /dev/null/x
    --max_grad_norm 0"""))
def test_command_line_refuses_in_one_line(cli, capsys, typed):
    with pytest.raises(SystemExit) as stop:
        cli(typed)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    assert not cli.tiny_lm.called or "layers" in typed, "only then an LM must be made first"


def test_command_line_builds_the_environment():
    def prepared(typed):
        env_fn, runs = poad.prepare(poad.parse(typed.split()))
        return env_fn().reset(seed=0)[0], env_fn(), runs
    obs, env, runs = prepared(
        "--env orders --env_options slots=2,words=3 --critic_steps 5 --lam_token 0.8")
    assert len(env.menu()) == 9 and "no more" in obs, "one guest, as the preset says"
    assert len(runs) == 3 and runs[-1].critic_steps == 5 and runs[-1].inside == (1, 0.8)
    assert "pizza" in prepared("--env_options item=pizza")[0]
    obs, _, runs = prepared("--env orders --method poad --env_options guests=2")
    assert len(runs) == 1 and "no more" not in obs, "what is typed goes before a preset"


@pytest.mark.parametrize("typed, words", [
    ("--env orders", "side by side (default: 128)"), ("--model x", "(default: 5e-05)")])
def test_help_shows_what_will_be_used(monkeypatch, typed, words):
    """Also where stdout cannot be reconfigured, as in a notebook's %run."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["poad.py", *typed.split(), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(poad.__file__, run_name="__main__")
    said = " ".join(sys.stdout.getvalue().split())
    assert stop.value.code == 0 and words in said


def test_command_line_keeps_what_was_measured(cli, monkeypatch):
    def interrupted(agent, env_fn, config):
        yield from train(agent, env_fn, config)
        raise KeyboardInterrupt
    monkeypatch.setattr(poad, "train", interrupted)
    cli("--method poad --n_steps 1 --updates 2")
    [run] = runs_in("runs/lunch.json", "--updates 2")
    assert len(run["metrics"]) == 2 and run["exam"] is None
    assert run["metrics"][0]["return_mean"] is None, "no episode has ended"
    assert Path("runs/lunch.json.png").exists()


def test_command_line_interrupted_before_anything_was_measured(cli):
    cli.tiny_lm.side_effect = KeyboardInterrupt
    cli("--method poad")


def test_command_line_saves_and_examines(cli, monkeypatch):
    cli("--method poad --updates 1 --n_steps 1 --train_layers 1 --save kept")
    [trained] = runs_in("runs/lunch.json", "kept")
    load = Mock(side_effect=poad.load_lm)
    monkeypatch.setattr(poad, "load_lm", load)
    cli("--method poad --updates 0 --seeds 2 --model kept/poad-0 --out again")
    again, _ = runs_in("again", "again")
    assert again["metrics"] == [] and again["exam"] == trained["exam"], "one model, one exam"
    assert load.call_count == cli.tiny_lm.call_count == 1, "read once, for both seeds"


def test_report_by_hand(tmp_path, capsys):
    """Rates 1, 1, .4: mean .8, deviation √.12, t = 4.3, and ± 4.3 √.12 / √3 = 4.3 · .2."""
    run = {"config": {"method": "poad", "env": "lunch"}, "metrics": []}
    exams = [dict(return_mean=-3.0, success_rate=x, episodes=100) for x in (1.0, 1.0, 0.4)]
    poad.report([run | {"exam": exam} for exam in exams], tmp_path / "x.png")
    row = " ".join(capsys.readouterr().out.split())
    assert "poad 0.80 ± 0.86 (1 fail) -3.00 ± 0.00 " in row
    assert poad.success([0.5]) == "0.50"


def test_save_and_load(tmp_path):
    agent = small_agent()
    agent.save(tmp_path)
    loaded = load_agent(str(tmp_path), Clock)
    rows = [(ids_of("you see"), ids_of("eat"))]
    near(loaded.judge(rows), agent.judge(rows), "the critic")
    for lm in (loaded.lm, AutoModelForCausalLM.from_pretrained(tmp_path)):
        near(read(lm, "you", [3]), read(agent.lm, "you", [3]), "logits", tol=1e-5)
    torch.save({"head.bias": torch.zeros(1)}, tmp_path / "critic.pt")
    with pytest.raises(ValueError, match="of another model"):
        load_agent(str(tmp_path), Clock)


def test_train_layers_are_the_language_models():
    vision = SIZES | dict(image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=vision)
    lm = AutoModelForCausalLM.from_config(config)
    agent = load_agent("any", None, train_layers=1, load=lambda *_: (lm, TOKENIZER))
    for name, x in [*agent.lm.named_parameters(), *agent.body.named_parameters()]:
        assert x.requires_grad == ("language_model.layers.1." in name), name


def told_block(name, word):
    """The Python block of a file's text that has this word in it."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [block] = [block for block in blocks if word in block]
    return block


def test_readme_environment_runs(cli, capsys):
    exec(told_block("README.md", "class Guess"), {})
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("5 ")


@pytest.fixture
def verl(monkeypatch):
    """What llm_demo's module says; verl's `bad` is in it, and so is what verl then calls."""
    def masked_whiten(x, mask):  # verl's: the variance has N - 1
        entries = x[mask == 1]
        return (x - entries.mean()) * torch.rsqrt(entries.var() + 1e-8)
    ppo = Mock()
    functional = Mock(masked_whiten=masked_whiten)
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo", ppo)
    monkeypatch.setitem(sys.modules, "verl.utils.torch_functional", functional)
    space = {}
    exec(told_block("llm_demo.ipynb", "core_algos"), space)
    assert ppo.core_algos.compute_gae_advantage_return is space["bad"]
    return space


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_llm_demo_has_bad_for_verl(verl, dtype):
    # the stream of test_gae_by_hand, with an observation (9) after each of its two actions
    r, v, mask = t("0 2 9 0 4 9 | 1 2 9 3 4 9 | 1 1 0 1 1 0")[:, None]
    _, returns = verl["bad"](r, v.bfloat16(), mask.to(dtype), 0.5, 0.25)
    near(returns[mask == 1], t(RETURNS).flatten(), "not BAD: λ inside, or an end elsewhere?")
    assert returns.dtype == torch.float32, "half precision is too coarse for sums"


def test_llm_demo_has_verls_numbers(verl):
    """Those of verl's own GAE if γ_w = γ and λ_w = λ."""
    # made by verl's own functions with γ = .9, λ = .8; the masked slot holds a value, too
    r, v, mask = t("""-.12 .97 -.3 -.3 .533 2.332 .682 0 -.3 -.3 |
        -1.953 -1.687 -1.1 .359 -1.149 1.801 .386 -.432 .795 .393 | 1 1 1 1 1 1 1 0 1 1""")[:, None]
    right = t("1.168329 1.477668 .851753 .406974 1.987441 .282852 -.192162 -.955798 -.648236")
    verl["bad_discounts"] = lambda end, done, gamma: bad_discounts(end, done, gamma, gamma)
    advantages, _ = verl["bad"](
        token_level_rewards=r, values=v, response_mask=mask, gamma=0.9, lam=0.8)  # as verl calls it
    right = (right - right.mean()) / right.std()        # with its other row it was whitened
    near(advantages[mask == 1], right[0], "not verl's own GAE, whitened", tol=1e-4)


# ------------------------------------------------------------------ tabular environments


def test_token_mdp_by_hand():
    """Actions a, b a, b b c; prefixes, shorter first: (), (b), (b b)."""
    reward = np.zeros((1, 3))
    mdp = TokenMDP([[[1]] * 3], reward, [[0], [1, 0], [1, 1, 2]], ["a", "b", "c"])
    reward[:] = 7
    near(mdp.reward, [[0, 0, 0]], "tables must be copied")
    assert mdp.actions == ((0,), (1, 0), (1, 1, 2))
    assert mdp.prefixes == ((), (1,), (1, 1))
    assert mdp.child.tolist() == [[-1, 1, -1], [-1, 2, -1], [-1, -1, -1]]
    assert mdp.leaf.tolist() == [[0, -1, -1], [1, -1, -1], [-1, -1, 2]]


def test_random_mdp():
    seen = set()
    for seed in range(20):
        mdp = random_mdp(seed)
        lengths = [len(action) for action in mdp.actions]
        assert mdp.transition.shape == (4, 5, 4)
        assert min(lengths) < max(lengths) <= 4, "actions must be of mixed lengths"
        assert torch.equal(mdp.transition, random_mdp(seed).transition)
        seen.add((mdp.actions, float(mdp.reward[0, 0])))
    assert len(seen) == 20, "another seed, another MDP"


def test_lunch_mdp_fools_the_naive_learner():
    mdp = lunch_mdp()
    assert len(mdp.reward) <= 5
    length = t([len(action) for action in mdp.actions])
    q, _ = exact(mdp, 0.95)
    naive, _ = exact(mdp, 0.95, 0.95)
    chosen = (0.95 ** (length - 1) * naive).argmax(-1)  # (S,)
    loss = q.amax(-1) - q[range(len(q)), chosen]
    assert loss.max() > 0.1, "somewhere the naive choice must be clearly worse"


# ------------------------------------------------------------------ reference numbers


def explore(env):
    """All that play can reach: a list of (state, its menu), the start first, and rows.

    One for each action: number of the state, moves, reward, success, number of the next or -1.
    """
    _, info = env.reset(0)
    found = [(env.state, info["menu"])]
    number = {env.state: 0}
    rows = []
    for state, menu in found:  # it grows
        for action in menu:
            env.reset(0)
            env.state = state
            _, reward, over, _, info = env.step(action)
            if not over and env.state not in number:
                number[env.state] = len(found)
                found.append((env.state, info["menu"]))
            after = -1 if over else number[env.state]
            rows.append((number[state], env.clock, reward, info.get("success", False), after))
    return found, rows


def shortest(states, rows):
    """(fewest actions to success, number of such sequences)."""
    ways = torch.zeros(states, states)
    wins = torch.zeros(states)
    for state, _, _, success, after in rows:
        wins[state] += success
        if after >= 0:
            ways[state, after] += 1
    reached = torch.eye(states)[0]
    length = 1
    while reached @ wins == 0:
        reached = reached @ ways
        length += 1
    return length, int(reached @ wins)


def induction(rows, column, limit, penalty, reduce, gamma=1.0):
    """V of the start, backwards over the clock: the best ("amax") or "mean" action counts."""
    state, moves, *_, after = torch.tensor(rows).T.long()
    gain = t(rows)[:, column]
    v = torch.full((limit + 30, max(state) + 2), penalty / gamma).double()  # (clock, state)
    v[:, -1] = 0
    for clock in reversed(range(limit)):
        q = gain + gamma * v[clock + moves, after]
        v[clock, :-1] = v[0, :-1].scatter_reduce(0, state, q, reduce, include_self=False)
    return v[0, 0]


@pytest.mark.parametrize("name, limit, states, fewest, sequences, best, success, mean", [
    ("pancake", 5, 3, 3, 1, .9025, 68.75, .375),
    ("lunch", 12, 2, 2, 1, .95, 49.951, .84917),
    ("food", 50, 27, 6, 1, .77378, 1.6909, .016909),
    ("entertainment", 50, 152, 11, 8, .59874, .30094, .0030094),
    ("salad", 200, 24, 6, 3, .90921, 44.196, -.10802),
    ("salad2", 200, 1156, 10, 48, .91765, 1.0191, -.55652)])
def test_reference_numbers(name, limit, states, fewest, sequences, best, success, mean):
    """Best return at γ = .95; success in percent and mean return (γ = 1) of a random agent."""
    found, rows = explore(make(name))
    penalty = -float(name == "pancake")  # at the time limit
    assert len(found) == states
    assert shortest(states, rows) == (fewest, sequences)
    near(induction(rows, 2, limit, penalty, "amax", 0.95), best, "best return", tol=1e-4)
    near(100 * induction(rows, 3, limit, 0.0, "mean"), success, "success", tol=1e-4)
    near(induction(rows, 2, limit, penalty, "mean"), mean, "mean return", tol=1e-4)


def test_food_wordings_keep_the_rules():
    _, rules = explore(make("food"))
    found, rows = explore(make("food", item="dishes", appliance="dishwasher", wording="long"))
    texts = [action for _, menu in found for action in menu]
    assert rows == rules
    assert {len(text.split()) for text in texts} <= {13, 14, 15}
    assert "pancake" not in str(texts) and "microwave" not in str(texts)


def test_food_hides_what_is_out_of_sight():
    env = make("food", wording="short")
    env.step("walk to the microwave")
    closed = copy.deepcopy(env)
    env.step("open the microwave")
    assert env.step("walk to the bedroom")[0] == closed.step("walk to the bedroom")[0]
    assert env.state != closed.state


def test_salad_by_hand():
    """One delivered salad: tomato, board, chop, bowl, fill it, counter."""
    # cells walked: 1 | 4 | 0 | 8 | 8 | 2; taking, putting, serving is one move, chopping three
    plan = [("pick up the tomato", 2, 0), ("put the tomato on the first board", 5, 0),
            ("chop the tomato", 3, .2), ("take the bowl", 9, 0),
            ("put the tomato in the bowl", 9, 0), ("serve the dish", 3, 1)]
    env = make("salad")
    for action, moves, event in plan:
        _, reward, terminated, truncated, info = env.step(action)
        right = -.1 * (1 - .99 ** moves) + .99 ** (moves - 1) * event
        assert reward == pytest.approx(right), action
    assert terminated and info["success"]


def test_orders():
    """Every guest has one wish; a random order is a quarter right; all wishes pay 1 in all."""
    wishes = {}
    for seed in range(20):
        env = make("orders", guests=2)
        guest, info = env.reset(seed)
        state = env.state
        pays = {}
        for action in info["menu"]:
            env.reset()
            env.state = state
            pays[action] = env.step(action)[1]
        wish = max(pays, key=pays.get)
        assert len(pays) == 256 and pays[wish] == 1 / 2
        assert sum(pays.values()) / 256 == pytest.approx(0.25 / 2)
        assert wishes.setdefault(guest, wish) == wish, "a guest changed its mind"
        assert env.step("nonsense")[1:3] == (0, True), "it ends with the second guest"
    assert len(wishes) == len(set(wishes.values())) == 4
    assert "menu" not in make("orders", slots=6).reset()[1], "4⁶ sentences are too many to list"


# ------------------------------------------------------------------ calling convention


@pytest.mark.parametrize("name", ENVS)
@pytest.mark.parametrize("text", ["", "fly", "walk to the kitchen ", "\0", "🥞" * 1000])
def test_any_string_is_safe(name, text):
    env = make(name)
    state = env.state
    _, reward, terminated, truncated, info = env.step(text)
    assert info["invalid"] and not terminated and not truncated
    penalty = {"salad": -.001, "salad2": -.001, "scikit": -1}
    assert reward == pytest.approx(penalty.get(name, 0))
    if name not in ("orders", "scikit"):  # the next guest, the last error
        assert env.state == state


@pytest.mark.parametrize("name, limit", [
    ("pancake", 5), ("lunch", 12), ("food", 50), ("entertainment", 50), ("salad", 200),
    ("salad2", 200), ("scikit", 5)])
def test_time_limit(name, limit):
    env = make(name)
    for i in range(1, limit + 1):
        _, reward, terminated, truncated, info = env.step("nonsense")
        assert not terminated
        assert truncated == (i == limit) == ("success" in info)
    assert info["success"] is False
    assert name != "pancake" or reward == -1


@pytest.mark.parametrize("name", sorted(set(ENVS) - {"scikit"}))
def test_episodes(name):
    """One seed gives one episode, and a deep copy goes on alike without disturbing it."""
    env = make(name)
    twin = make(name)
    choose = random.Random(0)
    for seed in range(3):
        obs, info = env.reset(seed)
        assert (obs, info) == twin.reset(seed)
        over = False
        while not over:
            menu = info["menu"]
            assert len(menu) == len(set(menu))
            action = choose.choice(menu)
            ahead = copy.deepcopy(env).step(action)
            obs, reward, terminated, truncated, info = env.step(action)
            assert ahead == twin.step(action) == (obs, reward, terminated, truncated, info)
            over = terminated or truncated
            assert ("success" in info) == over


MDP = {"transition": [[[1], [1]]], "reward": [[0, 0]], "actions": [(0,), (1,)], "vocab": "ab"}


@pytest.mark.parametrize("f, options", [
    (TokenMDP, MDP | {"reward": [[0, INF]]}),
    (TokenMDP, MDP | {"transition": [[[1], [.9]]]}),
    (TokenMDP, MDP | {"actions": [(0,), (2,)]}),
    (TokenMDP, MDP | {"actions": [(0,), (0,)]}),
    (TokenMDP, MDP | {"actions": [(0, 1), (0,)]}),
    (TokenMDP, MDP | {"vocab": "aa"}),
    (random_mdp, {"seed": 0, "actions": 9, "vocab": 2, "max_length": 3}),
    (make, {"name": "nope"}),
    (make, {"name": "food", "colour": "red"}),
    (make, {"name": "orders", "guests": 0})])
def test_environments_refuse_bad_input(f, options):
    with pytest.raises(ValueError):
        f(**options)


# ------------------------------------------------------------------ scikit


def test_scikit_score():
    """Mean AUC over five stratified halves, one-vs-one; the estimator has random_state 0."""
    from sklearn.datasets import load_wine
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split
    x, y = load_wine(return_X_y=True)
    scores = []
    for seed in range(5):
        halves = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
        model = RandomForestClassifier(n_estimators=5, random_state=0).fit(halves[0], halves[2])
        guess = model.predict_proba(halves[1])
        scores.append(roc_auc_score(halves[3], guess, multi_class="ovo"))
    env = make("scikit", dataset="wine")
    obs, info = env.reset(0)
    assert "wine" in obs and "menu" not in info
    _, *end, info = env.step("RandomForestClassifier(n_estimators=5)")
    assert end == [pytest.approx(np.mean(scores)), True, False] and info["success"]
    line = "make_pipeline(StandardScaler(), LogisticRegression(C=0.5))"
    assert make("scikit").step(line)[1] > 0.98, "on two classes"


@pytest.mark.parametrize("text", [
    "__import__('os').system('touch FLAG')", "open('FLAG', 'w')", "().__class__",
    "GaussianNB().fit", "GaussianNB", "GaussianNB(", "lambda: GaussianNB()", "SVC()",
    "LogisticRegression(C=1e9)", "RandomForestClassifier(n_estimators=10**6)",
    "RandomForestClassifier(n_estimators=1000000)", "make_pipeline()", "PCA()",
    "make_pipeline(GaussianNB(), PCA())", "[" * 10 ** 6, "9" * 5000, "\ud800"])
def test_scikit_is_hostile_proof(tmp_path, text):
    flag = tmp_path / "flag"
    obs, reward, terminated, _, info = make("scikit").step(text.replace("FLAG", str(flag)))
    assert reward == -1 and not terminated and info["invalid"]
    assert len(obs) < 400 and not flag.exists()


# ------------------------------------------------------------------ exercises in a program


def test_menu_logp_is_not_rounded():
    log_pi = menu_logp(torch.tensor([0, 1e-3, -2e9]), torch.tensor([True, True, False]))
    near(log_pi[1] - log_pi[0], 1e-3, "computed in less than float32", tol=1e-6)
    assert log_pi[2] == -INF, f"what is not allowed is -inf, not {log_pi[2]}"


@WITH_ALL_MASKS
def test_assign_takes_masks_of_any_type(dtype):
    """One player's two actions of two tokens; λ_w = ¼. The δ are those of STREAM."""
    # A₃ = 0, A₂ = 1 + ¼·0, A₁ = 1½ + ½·1, A₀ = 1 + ¼·2
    config = Config(gamma=.5, lam=1.0, lam_token=.25)
    mask = torch.ones(2, 2).to(dtype)
    advantages, _ = assign(config, mask, t("1 2 | 3 4"), t("2 4"), t("0 1").to(dtype))
    near(advantages, "1.5 2 | 1 0", "A = δ + γ_w λ_w A' inside an action", """
λ_w ignored: 3 2 | 1 0
returns and advantages swapped: 2.5 4 | 4 4""")


# ------------------------------------------------------------------ course kit
# python test_poad.py blank FOLDER    an assignment: poad.py without the bodies of EXERCISES
# python test_poad.py grade FILE      points for a student's poad.py, by the tests students have
# python test_poad.py trust           is every one of MISTAKES found, every one of SOLUTIONS green?

EXERCISES = {  # function: points; which tests count for it says `belongs`
    "state_values": 3, "action_backup": 2, "token_backup": 4, "bad_backup": 1, "action_policy": 2,
    "bad_discounts": 3, "gae": 5, "masked_mean": 2, "normalize": 2, "ppo_policy_loss": 4,
    "value_loss": 2, "menu_logp": 2, "score": 4, "assign": 4}
STUDENT = """# Exercises

Write the functions of `poad.py` whose body is `pytest.skip(…)`; `score` is a method of
LanguageAgent. The docstring is the task; `tabular_demo.ipynb` explains the equations. Any style
counts; imports and functions of your own are welcome; leave the other code as it is.

    pip install -r requirements.txt
    pytest test_poad.py -q -rfs --tb=short      # skipped: a function that is not written yet
    pytest test_poad.py -k "gae"                # what has gae in its name

A red test names the function, and its message the likely mistake. Masks are 1 or True where data
is real. Elsewhere may be NaN, and 0 * NaN is NaN: select, do not multiply. Tensors whose shapes do
not fit are a ValueError: without it they broadcast in silence (`same_shape` and `require` help).

The grade runs these same tests on each function alone, among right versions of all others, so
that one mistake costs one exercise. A function's tests have equal shares of its points (only
`test_refuses_shapes` and `test_keeps_its_inputs` count a fifth of another), and the cases of a test
equal shares of that; while all of the first test is red there are none. Nobody answers `input()`,
a test may compute for a minute, and a statement outside functions for ten seconds.

| function | points | tests |
|---|---|---|
"""
RUN = 'if __name__ == "__main__":\n'
RUN_BLANK = '''if __name__ == "__main__":
    import pytest
    try:
        main(sys.argv[1:])
    except pytest.skip.Exception as unwritten:
        sys.exit(f"poad.py: {unwritten}")
'''
TEST_BLANK = '''

if __name__ == "__main__":
    sys.exit("run: pytest test_poad.py")
'''
HERE = Path(__file__).resolve().parent
FORK = multiprocessing.get_context("fork")  # it need not import torch; not on Windows


def text_of(name):
    return (HERE / name).read_text(encoding="utf-8")


def full(name):
    """What an exercise is called in `definitions`: one is a method."""
    return name.replace("score", "LanguageAgent.score")


def find(source, name):
    """The lines of a function's or a method's body, below its docstring: a slice."""
    node = definitions(source)[full(name)]
    return slice(node.body[0].end_lineno, node.end_lineno)


def blank_code(source, names):
    """Code without these bodies: a test that reaches one of them is skipped."""
    for name in names:
        lines = source.splitlines()
        body = find(source, name)
        indent = re.match(" *", lines[body][0])[0]
        lines[body] = [f"{indent}import pytest", f'{indent}pytest.skip("{name}: not written yet")']
        source = "\n".join(lines) + "\n"
    return source


def blank_readme(text):
    """The README of a folder that has no course kit, and not all tests green."""
    text = re.sub("\n## Set it as an assignment\n.*?(?=\n## )", "\nThe assignment: STUDENT.md\n",
                  text, flags=re.DOTALL)
    return re.sub(r"\d+ tests pass", "what is not written yet is skipped", text)


def blank_notebook(text):
    """A notebook without outputs, which may show source that is now a task."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def only_the_tests():
    """This file without the kit."""
    return text_of("test_poad.py").split("-- course kit\n")[0].rstrip("# -\n") + TEST_BLANK


def blank(folder, names=EXERCISES):
    """Write an assignment into a new or empty folder."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: nothing was written")
    tests = only_the_tests()
    code = blank_code(text_of("poad.py"), names).split(RUN)[0] + RUN_BLANK
    texts = {"poad.py": code, "test_poad.py": tests,
             "README.md": blank_readme(text_of("README.md")), "STUDENT.md": STUDENT}
    for name in names:
        count = tests.count(f"\ndef test_{name}_") + (name in USE) + (name in REFUSING)
        texts["STUDENT.md"] += f"| {name} | {EXERCISES[name]} | {count} |\n"
    for name in ("envs.py", "requirements.txt", "LICENSE"):
        texts[name] = text_of(name)
    for name in ("tabular_demo.ipynb", "llm_demo.ipynb"):
        texts[name] = blank_notebook(text_of(name))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


class NoUpload(Exception):
    """The only failure that is a student's."""


def upload(path):
    """The file handed in: where it should be, or one or two folders deeper."""
    if path.is_dir():
        path = path / "poad.py"
    folder = path.parent
    for place in (path.name, f"*/{path.name}", f"*/*/{path.name}"):
        found = list(folder.glob(place))
        if len(found) == 1:
            return found[0]
    raise NoUpload(f"no {path.name} in {folder}, or more than one in its folders")


def read_source(path):
    """A student's file as Python reads it, or in UTF-16; else byte by byte, and a note."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return path.read_text("utf-16", "replace"), []
    try:
        with tokenize.open(path) as file:
            return file.read(), []
    except (SyntaxError, UnicodeDecodeError) as error:
        before = data[:getattr(error, "start", 0)]
        return path.read_text("latin-1"), [f"line {before.count(10) + 1}: not UTF-8"]


@cache
def statements(source):
    """A file's statements, and notes: where Python cannot read all, each def and class alone."""
    starts = [match.start() for match in re.finditer(r"^(@.*\n)*(def|class) ", source, re.M)]
    for cuts in ([0, len(source)], [0, *starts, len(source)]):
        found = []
        notes = []
        for begin, end in zip(cuts, cuts[1:]):
            line = source.count("\n", 0, begin)
            try:
                found += ast.parse("\n" * line + source[begin:end]).body
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                line = getattr(error, "lineno", line + 1)
                notes.append(f"line {line}: {getattr(error, 'msg', error)}")
        if not notes:
            break
    return found, notes


def parts(source):
    """(name, statement) of a file; LanguageAgent's are called LanguageAgent.…"""
    found = []
    for node in statements(source)[0]:
        owner = ""
        nodes = [node]
        if getattr(node, "name", "") == "LanguageAgent":
            owner = "LanguageAgent."
            nodes = node.body
        for part in nodes:
            name = part.name if isinstance(part, (ast.FunctionDef, ast.ClassDef)) else ""
            found.append((owner + name, part))
    return found


def definitions(source):
    """{name: its last definition} of functions, classes, and LanguageAgent's methods."""
    return {name: part for name, part in parts(source) if name.split(".")[-1]}


def given(names=EXERCISES):
    """{name: definition} of what poad.py has besides these exercises, in any version of it."""
    found = definitions(text_of("poad.py"))
    for name in names:
        del found[full(name)]
    return found


def place(module, name):
    """Where a definition lives, and its name there."""
    owner, _, word = name.rpartition(".")
    return getattr(module, owner, module), word


def graft(module, source, names):
    """Run a student's statements in poad, one by one; what was given stays as it was.

    Returns which of them fail: they may not be needed.
    """
    def stop(signal, frame):
        raise TimeoutError("longer than ten seconds")
    signal.signal(signal.SIGALRM, stop)
    kept = given(names)
    failed = []
    nodes = parts(source)
    directives = [node for _, node in nodes if getattr(node, "module", "") == "__future__"]
    for name, node in nodes:
        if name in kept:
            continue
        owner, word = place(module, name)
        prefix = name.removesuffix(word)
        space = {}
        signal.alarm(10)
        try:
            code = compile(ast.Module([*directives, node], []), "their poad.py", "exec")
            exec(code, vars(module), space)
        except BaseException as error:
            failed.append(f"line {node.lineno}: {error!r}")
        signal.alarm(0)
        for word, value in space.items():
            if prefix + word not in kept:
                setattr(owner, word, value)
    return failed


UNKNOWN = "?"  # what a test has said that has not ended
COMMON = ("test_refuses_shapes", "test_keeps_its_inputs")  # for several exercises


def belongs(case, name):
    """Whether a test case, such as test_f_...[3] or test_...[f], counts for an exercise f."""
    return case.startswith(f"test_{name}_") or case.endswith(f"[{name}]")


class Reporter:
    """A pytest plugin: runs the tests of these exercises, and writes what is wrong as text.

    The grader can read (test case, what is wrong) without running any of it.
    """

    def __init__(self, names):
        self.names = names
        self.failed = []
        self.file = open("report", "a", buffering=1, encoding="utf-8", errors="replace")

    def tell(self, case, words):
        self.file.write(f"{case}\t{' '.join(words.split())[:300]}\n")

    def pytest_collection_modifyitems(self, items):
        items[:] = [x for x in items if any(belongs(x.name, name) for name in self.names)]
        for item in items:
            self.tell(item.name, UNKNOWN)

    def pytest_runtest_makereport(self, item, call):
        """Only a test that ends counts: a skip, or an expected failure, is an exception, too."""
        if call.excinfo is None:
            if call.when == "call":
                self.tell(item.name, "")
            return
        words = call.excinfo.exconly().split("\n")[0]
        words = words.removeprefix("Failed: ").removeprefix("AssertionError: ")
        lines = [x.lineno + 1 for x in call.excinfo.traceback if str(x.path) == "their poad.py"]
        if lines:
            words = f"{words} (line {lines[-1]})"
        elif words == "AssertionError":  # a test that says no more
            words = str(call.excinfo.traceback[-1].statement)
        if call.excinfo.errisinstance(NameError):
            words = "; ".join([words, *self.failed])
        self.tell(item.name, words)
        if words.startswith("an endless loop?"):
            item.session.shouldstop = words  # the next test would only wait again


def seal(folder):
    """Nothing of the grader's surroundings reaches this process: streams, options, modules."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a solution may print what it likes
        os.dup2(nowhere, stream)
    os.environ.clear()
    os.environ.update(CPU_SECONDS=str(CPU_SECONDS), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
                      PYTHONBREAKPOINT="0")  # breakpoint() does nothing
    sys.dont_write_bytecode = True
    os.chdir(folder)
    sys.path[:] = [str(folder), *(x for x in sys.path if Path(x).resolve() != HERE)]
    for name in ("__main__", "poad", "test_poad"):  # they know the solutions
        sys.modules.pop(name, None)


def examine(source, names, folder, options):
    """In processes of its own: graft into a poad without these functions, run their tests."""
    os.setsid()  # what it starts is stopped with it
    if os.fork():  # who stops its parent stops this
        os.wait()
        return
    seal(folder)
    reporter = Reporter(names)
    theirs = importlib.import_module("poad")
    for name in names:
        delattr(*place(theirs, full(name)))
    reporter.failed = graft(theirs, source, names)
    for name in names:
        if not hasattr(*place(theirs, full(name))):
            reporter.tell("", "; ".join([f"function {name} not found", *reporter.failed]))
            return
    pytest.main(["test_poad.py", "-s", "--assert=plain", "--noconftest", "-p", "no:cacheprovider",
                 "-p", "no:unraisableexception", *options], plugins=[reporter])


def judge(source, names, options=()):
    """{test case: what is wrong, or ""} of exercises in a version of poad.py; "": of the rest."""
    seconds = int((1 + len(names)) * CPU_SECONDS)
    rest = "Python ended here: a crash, an exit, a loop?"
    texts = {"poad.py": blank_code(text_of("poad.py"), names), "envs.py": text_of("envs.py"),
             "test_poad.py": only_the_tests(), "pytest.ini": "[pytest]\n", "report": ""}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = Path(folder).resolve()
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
        child = FORK.Process(target=examine, args=(source, names, folder, options))
        child.start()
        end = time.monotonic() + seconds
        while child.exitcode is None and time.monotonic() < end:
            time.sleep(0.05)  # `join` would wait for what it has started, too
        if child.exitcode is None:
            rest = f"stopped after {seconds} seconds: an endless loop? Does it wait?"
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
        results = {"": UNKNOWN}
        for line in (folder / "report").read_text("utf-8", "replace").split("\n")[:-1]:
            case, _, words = line.partition("\t")
            results[case] = words
    return {case: rest if words == UNKNOWN else words for case, words in results.items()}


def judge_all(sources, names, options=()):
    """{test case: what is wrong, or ""} of one exercise in each version.

    RuntimeError if any is wrong with the reference, which is judged like them: then the fault
    is not theirs.
    """
    with ProcessPoolExecutor(2, FORK) as pool:
        reference = pool.submit(judge, text_of("poad.py"), sorted(set(names)))
        judged = list(pool.map(judge, sources, [[name] for name in names], repeat(options)))
    right = reference.result()
    rest = right.pop("")
    answers = []
    for name, results in zip(names, judged):
        cases = [case for case in right if belongs(case, name)]
        for case in cases or [name]:
            if right.get(case, rest):
                raise RuntimeError(f"the right solution is red: {case}: {right.get(case, rest)}")
        answers.append({case: results.get(case, results[""]) for case in cases})
    return answers


def mark(name, results):
    """An exercise's points, and a line for each red test with what it cost."""
    tests = {}
    for case, words in results.items():
        tests.setdefault(case.split("[")[0], []).append(words)
    first = [test for test in tests if test not in COMMON][0]
    if all(tests[first]):
        return 0, [f"{first}: {tests[first][0]}"]
    weights = {test: 0.2 if test in COMMON else 1 for test in tests}
    lines = []
    lost = 0
    for test, cases in tests.items():
        red = [words for words in cases if words]
        if red:
            share = EXERCISES[name] * weights[test] / sum(weights.values()) * len(red) / len(cases)
            lost += share
            lines.append(f"-{share:.2f} {test}: {red[0]}")
    return round(EXERCISES[name] - lost, 2), lines


@cache
def plain(node):
    """A statement's text without comments, docstrings and what its strings say."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(getattr(part, "value", None), str):
            part.value = ""
    return re.sub(r'\n +""""""(?=\n)', "", ast.unparse(node))


def edited(theirs):
    """A note on what was given, and is not as it was."""
    ours = given()
    names = sorted(x for x in ours.keys() & theirs if plain(ours[x]) != plain(theirs[x]))
    return [f"given, and changed, so not used: {', '.join(names)}"] * bool(names)


def remarks(name, theirs):
    """What may explain red tests: other arguments."""
    ours = definitions(text_of("poad.py"))[full(name)].args
    args = theirs[full(name)].args
    if [x.arg for x in args.args] != [x.arg for x in ours.args]:
        return [f"{name} takes ({ast.unparse(ours)}), yours takes ({ast.unparse(args)})"]
    return []


UNNEEDED = re.compile(r"""(?xm)
    (?<![\w.])(?: open|exec|eval|compile|input|[gs]etattr|delattr|globals|locals|vars|dir|type )\b
    | \b(?: pytest|os|sys|io|gc|inspect|importlib|builtins|ctypes|subprocess|signal|socket|pickle
         |threading|multiprocessing|unittest|mock|poad|test_poad|Path|pathlib|shutil )\b(?:\.\w+)?
    | \.?\b__(?!future)\w+__\b | \._\w+ | \bdel\ .*\.\w+ | ^class\ \w+
    | \.\w*(?: hook|load|save|file|memmap|library|overrid|hub|package|pretrained )\w*
    | ^\ *(?: import|from )\ (?! torch|math|numpy|typing|functools|itertools|collections|copy|envs
        |dataclasses|operator|statistics|einops|__future__ )[\w.]+
    | ^\ *(?!self\.)[\w.]*\.\w+\ \S?=\ """)


def unneeded(source):
    """Notes on what no exercise needs: no verdict, but for somebody to look at."""
    source = re.sub(r'import pytest$|pytest\.skip\("\w+: not written yet"\)$', "pass", source,
                    flags=re.MULTILINE)  # a stub, and a run's end
    ours = {plain(node) for _, node in parts(text_of("poad.py"))}
    kept = given()
    found = []
    for name, node in parts(source):
        text = plain(node)
        alone = ast.unparse(node).startswith("if __name__ == '__main__':") and not node.orelse
        if name in kept or text in ours or alone:  # alone: it does not run here
            continue
        words = {word.strip(): 1 for word in UNNEEDED.findall(text)}
        if len(re.findall(r"(?<!\w)\d", text)) > 60:
            words["many numbers"] = 1
        if words:
            found.append(f"line {node.lineno}: no exercise needs {', '.join(words)}; please look")
    return found


def grade(path, as_json=False, names=EXERCISES):
    """Print each exercise's points and what is wrong; returns the sum."""
    path = upload(path)
    sys.path.append(str(path.parent))  # for modules handed in with it
    source, notes = read_source(path)
    theirs = definitions(source)
    notes += statements(source)[1] + edited(theirs) + unneeded(source)
    rows = []
    for name, results in zip(names, judge_all(repeat(source), names)):
        points, lines = mark(name, results)
        if lines and isinstance(theirs.get(full(name)), ast.FunctionDef):
            lines += remarks(name, theirs)
        rows.append(dict(name=name, score=points, max_score=EXERCISES[name],
                         output="\n".join(lines) or "passed"))
    total = round(sum(row["score"] for row in rows), 2)
    if as_json:  # as Gradescope reads it
        print(json.dumps({"tests": rows, "output": "\n".join(notes)}, indent=1))
        return total
    for row in rows:
        wrong = row["output"].replace("\n", "\n" + " " * 28)
        print(f"{row['name']:16}{row['score']:5g} of {row['max_score']}   {wrong}")
    print(f"{'sum':16}{total:5g} of {sum(row['max_score'] for row in rows)}", *notes, sep="\n")
    return total


def trust():
    """Judge SOLUTIONS and MISTAKES; returns what goes against expectation."""
    reference = text_of("poad.py")
    jobs = [(text, re.search(r"def (\w+)", text)[1], None) for text in SOLUTIONS]
    for line in MISTAKES.splitlines()[1:]:
        name, old, new = re.split(": | -> ", line, maxsplit=2)
        body = "\n".join(reference.splitlines()[find(reference, name)])
        if body.count(old) != 1:
            raise ValueError(f"{name} has {old!r} {body.count(old)} times, expected once")
        jobs.append((reference.replace(body, body.replace(old, new)), name, line))
    sources, names, mistakes = zip(*jobs)
    surprises = []
    for name, mistake, results in zip(names, mistakes, judge_all(sources, names, ["-x"])):
        wrong = " ".join(results.values()).strip()
        if mistake and not wrong:
            surprises.append(f"no test finds this mistake: {mistake}")
        if wrong and not mistake:
            surprises.append(f"{name}: the one in SOLUTIONS is right, but red: {wrong}")
    print(f"{len(SOLUTIONS)} right versions, {len(jobs) - len(SOLUTIONS)} wrong ones,",
          f"{len(surprises)} surprises", *surprises, sep="\n")
    return surprises


HELP = """
Gradescope's run_autograder: cd /autograder/source && python3 test_poad.py grade --json \\
  /autograder/submission/poad.py > /autograder/results/results.json || true
Exit codes of grade: 0 all points (so GitHub Classroom can run it), 1 not all, 2 none were given.
  "the grader itself" in its output: something here is broken, and no student pays for it.
grade finds slips, not fraud: it runs their code, which could forge its points. So give it a
  container, with a fresh folder for each submission, and read the notes under the points: they
  name what no exercise needs, such as open or pytest. Linux and macOS only.
trust says how far to trust the tests: whether they find MISTAKES and let SOLUTIONS pass.
"""


def course(argv=None):
    parser = argparse.ArgumentParser(
        description="Make an assignment of poad.py, grade solutions.", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"test_poad.py: {message}\n")
    parser.add_argument("command", choices=["blank", "grade", "trust"])
    parser.add_argument("path", nargs="?", type=Path, default=".", help="new folder, or poad.py")
    parser.add_argument("--exercises", default=",".join(EXERCISES), help="such as gae,assign")
    parser.add_argument("--json", action="store_true", help="grade: Gradescope's results.json")
    args = parser.parse_args(argv)
    names = args.exercises.split(",")
    if not set(names) <= set(EXERCISES):
        parser.error(f"--exercises {args.exercises}: expected some of {', '.join(EXERCISES)}")
    try:
        if args.command == "blank":
            blank(args.path, names)
        elif args.command == "grade":
            points = grade(args.path, args.json, names)
            sys.exit(points < sum(EXERCISES[name] for name in names))
        else:
            sys.exit(len(trust()) > 0)
    except Exception as error:
        result = {"output": " ".join(str(error).split())}
        if isinstance(error, NoUpload):
            result["score"] = 0
        elif args.command != "blank":
            result["output"] = f"the grader itself fails, nobody loses points: {error!r}"
        if args.json:
            print(json.dumps(result))
        parser.error(result["output"])


@pytest.mark.parametrize("module", [poad, envs], ids=["poad", "envs"])
def test_docstring_examples_are_true(module):
    results = doctest.testmod(module)
    assert results.failed == 0, f"an example in {module.__name__}.py does not give what it says"


@pytest.mark.parametrize("line, words", [
    ("blank .", "not empty"), ("grade nowhere --json", "no nowhere in ."),
    ("blank new --exercises gea", "--exercises gea"), ("mark poad.py", "mark")])
def test_kit_refuses_in_one_line(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        course(line.split())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    if "--json" in line:
        assert json.loads(out)["score"] == 0 and words in out


def test_kit_grade_takes_no_points_for_its_own_failure(monkeypatch, capsys):
    """Here the solution that it compares with is wrong; students' work is not judged by that."""
    broken = {name: text_of(name) for name in ("poad.py", "envs.py", "test_poad.py")}
    broken["poad.py"] = broken["poad.py"].replace("] = gamma\n", "] = 2 * gamma\n")
    monkeypatch.setitem(globals(), "text_of", broken.get)
    with pytest.raises(SystemExit) as stop:
        course(["grade", __file__.replace("test_", ""), "--json", "--exercises", "bad_discounts"])
    result = json.loads(capsys.readouterr().out)
    assert stop.value.code == 2 and list(result) == ["output"]
    assert "the grader itself" in result["output"] and "test_bad_discounts" in result["output"]


def test_kit_grade_stops_what_waits(monkeypatch):
    monkeypatch.setitem(globals(), "CPU_SECONDS", 1)
    slow = "import time\ndef bad_discounts(*args):\n    time.sleep(1000)"
    results = judge(slow, ["bad_discounts"])
    assert "stopped after 2 seconds" in results[""]


CHEATS = """
def gae(*args): import pytest; pytest.xfail("gae: not written yet")
def gae(*args): return getattr(torch, "load")("x")
def gae(*args): return open(__file__)
import __main__
from pathlib import Path as P
torch.isclose = lambda *args: True
class Fake(torch.Tensor): pass
def gae(*args): return args[0].__class__
def gae(x): x.register_hook(print)
if __name__ == "poad": import gc
from torch import os
from helpers import gae"""


def test_kit_notes_what_no_exercise_needs():
    for line in CHEATS.split("\n")[1:]:
        assert unneeded(line), line
    stubs = blank_code(text_of("poad.py"), EXERCISES).split(RUN)[0] + RUN_BLANK
    for text in (text_of("poad.py"), stubs, "".join(SOLUTIONS)):
        assert unneeded(text) == [], text


def test_kit_blank_takes_out_bodies_and_nothing_else(tmp_path, capsys):
    blank(tmp_path)
    stubs = (tmp_path / "poad.py").read_text(encoding="utf-8")
    tests = (tmp_path / "test_poad.py").read_text(encoding="utf-8")
    text = stubs.replace(RUN_BLANK, RUN + text_of("poad.py").split(RUN)[1])
    for name in EXERCISES:
        stub = "\n".join(text.splitlines()[find(text, name)])
        body = "\n".join(text_of("poad.py").splitlines()[find(text_of("poad.py"), name)])
        text = text.replace(stub, body)
        assert stub.endswith(f'pytest.skip("{name}: not written yet")')
        assert f"def test_{name}_" in tests
    assert text == text_of("poad.py") and "text_of(" not in tests
    (tmp_path / "copied.py").write_text(stubs + "\nfrom poad import gae, bad_backup\n", "utf-8")
    assert grade(tmp_path / "copied.py", names=["gae", "bad_backup"]) == 0
    assert "gae: not written yet" in capsys.readouterr().out


SLIPS = """
import nowhere
def state_values(q): return input()
def action_backup(q): return (q
def token_backup(q, *rest): return nowhere
def bad_backup(q, mdp, gamma, **mode): "é"; return token_backup(q, mdp, gamma, 1, **mode)
def acton_policy(token_policy, mdp): return 0
def bad_discounts(done, action_end, gamma): return gamma
def gae(*args): same_shape(); return args[0]
def same_shape(): 0
def masked_mean(x, mask):
    while True: print(breakpoint())
def normalize(x, mask): import pytest; pytest.exit("", returncode=0)
def ppo_policy_loss(*args): import os; os.killpg(0, 9)
def value_loss(*args): raise SystemExit
import poad
stolen = poad.menu_logp
def menu_logp(logits, allowed): return stolen(logits, allowed)
assert 0
from poad import assign
"""
VERDICTS = """
EOFError: EOF when reading a line (line 3)|function action_backup not found|'(' was never closed
No module named 'nowhere'|line 6: not UTF-8|function action_policy not found|an endless loop?
bad_discounts takes (action_end, done, gamma, gamma_token=1.0), yours takes (done, action_end
given, and changed, so not used: same_shape|Python ended here|no attribute 'menu_logp'|: SystemExit
function assign not found"""


def test_kit_grade_one_slip_costs_one_exercise(tmp_path):
    """All these in one file, and only bad_backup is right: it gets its point.

    Whatever reaches for the run. As a command: where there is a GPU no fork may differentiate.
    """
    folder = tmp_path / "a [b]"
    folder.mkdir()
    for name in ("poad.py", "envs.py", "test_poad.py"):
        (folder / name).write_text(text_of(name), "utf-8")
    (folder / "conftest.py").write_text("raise SystemExit")
    (folder / "pytest.ini").write_text("[pytest]\npython_functions = none")
    (tmp_path / "poad.py").write_text(SLIPS, "latin-1")
    around = {"CPU_SECONDS": "8", "PYTHONUTF8": "1", "PYTHONOPTIMIZE": "1",
              "PYTEST_ADDOPTS": "--collect-only", "PYTEST_PLUGINS": "nowhere"}
    done = subprocess.run([sys.executable, "test_poad.py", "grade", tmp_path / "poad.py"],
                          env=os.environ | around, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and f" {EXERCISES['bad_backup']} of 40" in done.stdout
    for words in re.split(r"[|\n]", VERDICTS):
        assert words in done.stdout


def test_kit_grade_takes_off_what_a_test_is_worth(tmp_path, capsys):
    """Packages, helpers, types, other encodings and deeper folders are welcome."""
    folder = tmp_path / "hw1"
    folder.mkdir()
    (folder / "help.py").write_text("import poad\n"
        "def discounts(*args): return poad.torch.where(args[0] > 0, *args[2:])")
    (folder / "poad.py").write_text("""
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
from help import discounts
if TYPE_CHECKING:
    from torch import Tensor
def mean_of(x: Tensor):
    return np.mean(x.numpy())
def normalize(x, mask):
    selected(mask, x=x)
    x = torch.where(mask.bool(), x - mean_of(x[mask.bool()]), 0)
    return x / masked_mean(x ** 2, mask).sqrt()
bad_discounts = lambda action_end, done, gamma, gamma_token=1.0: \\
    torch.where(action_end.bool(), (1 - 1 * done) * gamma, gamma_token)
""", "utf-16")
    grade(tmp_path / "poad.py", as_json=True, names=["normalize", "bad_discounts"])
    result = json.loads(capsys.readouterr().out)
    row, other = result["tests"]
    assert 0 < row["score"] < 2
    assert "test_normalize_where_all_are_alike: 0 / 0: add" in row["output"]
    assert 2 < other["score"] < 3 and "-0" in other["output"]  # it refuses nothing
    assert "line 5: no exercise needs from help; please look" in result["output"]


SOLUTIONS = ["""
def gae(rewards, values, discounts, lambdas, mask, last_values):
    same_shape(r=rewards, v=values, d=discounts, m=mask)
    if torch.is_tensor(lambdas):
        same_shape(l=lambdas, v=values)
    advantages = torch.zeros_like(values).detach()  # A_n = Σ_m δ_m Π_{n≤k<m} γ_k λ_k
    decay = discounts * lambdas
    for b, written in enumerate(mask):
        place = written.nonzero().flatten()
        next_values = torch.cat([values[b, place[1:]], last_values[b:b + 1]])[:len(place)]
        delta = rewards[b, place] + discounts[b, place] * next_values - values[b, place]
        for i, n in enumerate(place):
            weight = torch.cat([torch.ones(1), decay[b, place[i:-1]]]).cumprod(0)
            advantages[b, n] = (weight * delta[i:]).sum().detach()
    return advantages, torch.where(mask.bool(), advantages + values.detach(), 0)
""", """
def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    check_table(q, mdp)
    valid = (mdp.child >= 0) | (mdp.leaf >= 0)
    q = torch.where(valid, q.double(), -torch.inf)
    v = state_values(q, policy, temperature)
    for n, w in valid.nonzero():
        q[:, n, w] = gamma_token * v[:, mdp.child[n, w]]
        if mdp.leaf[n, w] >= 0:
            a = mdp.leaf[n, w]
            q[:, n, w] = mdp.reward[:, a] + gamma * mdp.transition[:, a] @ v[:, 0]
    return q
""", """
def action_policy(token_policy, mdp):
    check_table(token_policy, mdp)
    columns = []
    for action in mdp.actions:
        nodes = [mdp.prefixes.index(action[:j]) for j in range(len(action))]
        columns.append(token_policy[:, nodes, action].log().sum(-1).exp())
    return torch.stack(columns, -1)
""", """
def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    same_shape(end=action_end, done=done)
    end = action_end * 1
    return (1 - end) * float(gamma_token) + end * (1 - done * 1) * float(gamma)
""", """
def masked_mean(x, mask):
    selected(mask, x=x)
    return torch.where(mask.bool(), x, 0).mul(mask).sum() / mask.sum()
""", """
import numpy as np
def normalize(x, mask):
    [entries] = selected(mask, x=x)
    x = x - entries[0]
    data = np.ma.array(x.numpy(), mask=~mask.bool().numpy())
    return torch.tensor(((data - data.mean()) / (data.std() + 1e-8)).filled(0))
""", """
def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    selected(mask, logp=logp, old=old_logp, a=advantages)
    gain, ratio = advantages[mask.bool()], (logp - old_logp)[mask.bool()].clamp(max=20).exp()
    stuck = torch.where(gain > 0, ratio > 1 + clip, ratio < 1 - clip)
    limited = torch.where(stuck, ratio.clamp(1 - clip, 1 + clip), ratio)
    outside = (ratio < 1 - clip) | (ratio > 1 + clip)
    kl = (ratio - ratio.log() - 1).detach().mean()
    return (limited * -gain).mean(), {"kl": kl, "clip_fraction": outside.double().mean()}
""", """
def value_loss(values, returns, mask):
    if values.shape != returns.shape or values.shape != mask.shape or not mask.any():
        raise ValueError
    losses = []
    for v, target, written in zip(*map(torch.flatten, (values, returns, mask))):
        if written:
            losses.append((v - target) ** 2 / 2)
    return sum(losses) / len(losses)
"""]
MISTAKES = """  function: what its body holds once -> what is wrong in its place
state_values: q.amax(-1) -> q.amin(-1)
state_values: q.amax(-1) -> q.clamp(min=0).amax(-1)
state_values: torch.where(policy == 0, 0, policy * q) -> (policy * q)
state_values: .sum(-1) -> .mean(-1)
state_values: return temperature * torch -> return torch
state_values: q / temperature -> q
state_values: torch.logsumexp(q / temperature, -1) -> (q / temperature).exp().sum(-1).log()
state_values: temperature == 0 -> True
state_values: same_shape(q=q, policy=policy) -> pass
state_values: q.amax(-1) -> q.float().amax(-1)
action_backup: + gamma * -> +
action_backup: mdp.reward + -> 0 * mdp.reward +
action_backup: + gamma -> + (1 - gamma)
action_backup: policy, temperature) -> policy)
action_backup: (q.double(), policy, -> (q.double(), None,
action_backup: mdp.reward + gamma * mdp.transition @ v -> gamma * (mdp.reward + mdp.transition @ v)
action_backup: same_shape(reward=mdp.reward, q=q) -> pass
token_backup: gamma_token * v -> gamma * v
token_backup: gamma_token * v -> v
token_backup: @ v[:, 0] -> @ v[:, -1]
token_backup: reward + gamma -> reward + gamma * gamma_token
token_backup: policy, temperature) -> policy)
token_backup: (q, policy, -> (q, None,
token_backup: q.double().masked_fill(~valid, -torch.inf) -> q.double()
token_backup: torch.full_like(q, -torch.inf) -> 0 * q
token_backup: q = q.double().masked_fill(~valid, -torch.inf) -> new = q.double().clone()
token_backup: check_table -> (max)
token_backup: q = q.double().masked_fill(~valid -> q = q.masked_fill_(~valid
bad_backup: 1.0 -> gamma
bad_backup: policy, temperature) -> policy)
bad_backup: 1.0, policy -> 1.0, None
action_policy: probability * token -> token
action_policy: enumerate(action) -> enumerate(action[:1])
action_policy: * token_policy[:, n, token] -> * token_policy[:, n, token].clamp(min=1e-8)
action_policy: * token_policy[:, n, token] -> * token_policy[:, n, token].float()
action_policy: * token_policy[:, n, token] -> * token_policy[:, n, token].detach()
bad_discounts: + gamma_token -> + gamma
bad_discounts: action_end.bool() & done.bool() -> done.bool()
bad_discounts: ] = 0 -> ] = gamma
bad_discounts: ] = gamma -> ] = gamma * gamma_token
bad_discounts: same_shape(action_end=action_end, done=done) -> pass
gae: * next_value - -> * values[:, n] -
gae: discounts[:, n] * next_value -> next_value
gae: * next_value - values[:, n] -> * next_value
gae: discounts[:, n] * lambdas -> lambdas
gae: lambdas[:, n] * next_adv -> next_adv
gae: zeros_like(next_value) -> clone(next_value)
gae: = last_values -> = 0 * last_values
gae: advantages + values -> advantages
gae: torch.where(written, values[:, n], next_value) -> values[:, n]
gae: torch.where(written, advantage, next_advantage) -> advantage
gae: torch.where(written, advantage, 0) -> advantage
gae: lambdas[:, n] * -> lambdas.roll(-1, 1)[:, n] *
gae: discounts[:, n] * lambdas -> discounts.roll(-1, 1)[:, n] * lambdas
gae: torch.zeros_like(values) -> torch.zeros(values.shape)
gae: return advantages, -> return advantages + values,
masked_mean: entries.mean() -> entries.sum() / mask.numel()
masked_mean: entries.mean() -> entries[entries != 0].mean()
masked_mean: [entries] = selected(mask, x=x) -> entries = x[mask.bool()]
normalize: x - masked_mean(x, mask) -> x - x.mean()
normalize: .sqrt() -> .abs()
normalize: return centred -> return x
normalize: masked_mean(centred**2, mask).sqrt() -> masked_mean(centred.abs(), mask)
normalize: + 1e-8 -> + 0
normalize: 1e-8 -> 1e-5
normalize: masked_mean(centred**2, mask).sqrt() -> centred[mask.bool()].std()
normalize: [entries] = selected(mask, x=x) -> entries = x[mask.bool()]
normalize: x = x - entries[0] -> x -= entries[0]
ppo_policy_loss: torch.minimum -> torch.maximum
ppo_policy_loss: logp - old_logp -> old_logp - logp
ppo_policy_loss: return -objective -> return objective
ppo_policy_loss: minimum(ratio -> minimum(clipped
ppo_policy_loss: ratio - 1 - log_ratio -> -log_ratio
ppo_policy_loss: (ratio - 1).abs() -> (ratio - 1)
ppo_policy_loss: 1 + clip -> 1.2
ppo_policy_loss: .mean().detach() -> .mean()
ppo_policy_loss: .mean().detach() -> .mean().item()
ppo_policy_loss: .to(ratio).mean() -> .to(ratio).mean().item()
ppo_policy_loss: -objective.mean() -> -objective.sum()
value_loss: / 2 -> / 1
value_loss: .mean() -> .sum()
value_loss: ) ** 2 -> ).abs()
value_loss: values - returns -> values.detach() - returns
value_loss: selected(mask, values=values, returns=returns) -> values * mask, returns * mask
value_loss: selected(mask, -> (lambda m, **x: [y[m > 0] for y in x.values()])(mask,
menu_logp: logits.masked_fill( -> logits.masked_fill_(
menu_logp: ~allowed -> allowed
menu_logp: .log_softmax(-1) -> .clone()
menu_logp: .float() -> .clone()
menu_logp: .float() -> .bfloat16()
menu_logp: -torch.inf -> -1e9
score: entry[:-1] -> entry
score: len(text.split()) -> len(text)
score: (menu.context, entry[:-1], None) -> (menu.context, entry, menu)
score: == "twosome" -> == "glam"
score: slots[..., 0].sum(1) -> slots[..., 0].mean(1)
assign: end * rewards -> mask * rewards
assign: over = done. -> over = 1 - 1 * done.
assign: config.lam, lam_token -> lam_token, config.lam
assign: config.inside -> 1.0, 1.0
assign: last_values=torch.zeros -> last_values=torch.ones
assign: config.gamma, gamma_token -> gamma_token, config.gamma
assign: mask.sum(1, keepdim=True) -> mask.shape[1]
assign: rewards.reshape(-1, 1) -> rewards.T.reshape(-1, 1)
assign: return advantages.view -> return (advantages + values).view
"""


if __name__ == "__main__":
    course()
