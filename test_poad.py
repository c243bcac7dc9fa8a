"""Tests of poad.py and envs.py, and the grader of whoever writes them anew: `pytest test_poad.py`.
For instructors: `python test_poad.py blank FOLDER` writes an assignment, `python test_poad.py grade FILE` marks it.

Numbers that a reader can work out, with the derivation beside them; identities; and independent oracles. Every public
function has its own tests, so that the red ones name the function that is wrong, and their messages the likely mistake.
Order: Bellman backups, credit, losses · language agent, training, command line · environments. Nothing is downloaded.
"""
import copy
import dataclasses
import difflib
import doctest
import functools
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import sys
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import envs
import poad
from envs import FOOD_UNSEEN, Player, TokenMDP, lunch_mdp, make, random_mdp
from poad import (METHODS, Config, LanguageAgent, action_backup, action_policy, assign, bad_backup, bad_discounts, gae,
                  masked_mean, menu_logp, menu_trie, normalize, ppo_policy_loss, ppo_update, solve, state_values,
                  tiny_agent, token_backup, train, value_loss)

torch.set_num_threads(1)  # what is tested is small: more threads only wait for each other
INF, NAN = math.inf, math.nan
ON_RANDOM_MDPS = pytest.mark.parametrize("seed", (0, 1, 2))
IN_ALL_MODES = pytest.mark.parametrize("mode", ("greedy", "policy", "soft"))
WITH_ALL_MASKS = pytest.mark.parametrize("dtype", (torch.bool, torch.float64, torch.int64))


# ------------------------------------------------------------------ helpers


def t(x):
    """A float64 tensor without gradient."""
    return torch.as_tensor(x, dtype=torch.float64).detach()


def near(actual, expected, hint, mistakes=None, tol=1e-9):
    """Fail with `hint`, or with the name of the mistake whose wrong result this is."""
    actual, expected = t(actual), t(expected)
    assert actual.shape == expected.shape, f"shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}: {hint}"
    if not torch.allclose(actual, expected, rtol=tol, atol=tol):
        named = next((words for words, wrong in (mistakes or {}).items()
                      if torch.allclose(actual, t(wrong).expand_as(actual), rtol=tol, atol=tol)), None)
        hint = named or hint
        if torch.allclose(actual, expected, rtol=1e-6, atol=1e-6):
            hint = f"nearly right, so something was rounded to float32; {hint}"
        if actual.isnan().any():
            hint = f"NaN: contents of padding or of invalid tokens leaked (0 * NaN is NaN, so select); {hint}"
        worst = (actual - expected).abs().nan_to_num(0, posinf=INF).flatten().argmax()
        failure = pytest.fail.Exception(
            f"{hint}: got {actual.tolist()}, expected {expected.tolist()}" if actual.numel() <= 20 else
            f"{hint}: at worst {actual.flatten()[worst]:.12g}, expected {expected.flatten()[worst]:.12g}")
        failure.named = named is not None                                # the grader shows such a message first
        raise failure


def backward(x):
    assert getattr(x, "requires_grad", False), "no gradient at all: detached from the inputs, or a plain number"
    try:
        x.backward()
    except RuntimeError as error:
        assert "inplace" not in str(error), "the gradient breaks where numbers are overwritten: collect them and stack"
        raise


def refuses(call, *words):
    """The call raises a ValueError whose message holds all these words."""
    try:
        call()
    except ValueError as error:
        missing = [word for word in words if word not in str(error).lower()]
        assert not missing, f"bad input: the ValueError's message does not say {missing}, but: {error}"
    except (RuntimeError, IndexError, TypeError, KeyError) as error:
        if isinstance(error, NotImplementedError):
            raise
        pytest.fail(f"bad input ended in {type(error).__name__} ({error}), but a ValueError in words is expected")
    else:
        pytest.fail(f"bad input was accepted: a ValueError in words is expected{' that says '[:11 * bool(words)]}"
                    f"{' and '.join(map(repr, words))}")


def refuses_shapes(f, count, *rest):
    """f of `count` tensors refuses one whose shape disagrees, also where it would broadcast."""
    for i in range(count):
        for shape in ((2, 2), (2, 1), (3,)):
            args = [torch.ones(shape if k == i else (2, 3)) for k in range(count)]
            refuses(lambda: f(*args, *rest), "(2, 3)", str(shape))


def prefix_ids(mdp):
    """Index of every prefix."""
    return {tuple(prefix): i for i, prefix in enumerate(mdp.prefixes)}


def along(table, mdp, tokens):
    """(S, n): the entries of a token table at the tokens of one action."""
    return torch.stack([table[:, prefix_ids(mdp)[tuple(tokens[:j])], w] for j, w in enumerate(tokens)], -1)


def token_table(mdp, value):
    """(S, N, V) table of value(state, tokens so far, ids of the actions that begin so); -inf at invalid tokens."""
    table = torch.full((len(mdp.reward), len(mdp.prefixes), len(mdp.vocab)), -INF, dtype=torch.float64)
    for s, i, w in torch.cartesian_prod(*map(torch.arange, table.shape)).tolist():
        start = (*mdp.prefixes[i], w)
        actions = [a for a, tokens in enumerate(mdp.actions) if tuple(tokens[:len(start)]) == start]
        if actions:
            table[s, i, w] = value(s, len(start), actions)
    return table


def settings(mode, mdp):
    """Keyword arguments of a mode at action level and at token level; the two policies are the same one."""
    weight = torch.rand(mdp.reward.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.1
    policy = weight / weight.sum(-1, keepdim=True)                                                 # (S, A)
    mass = token_table(mdp, lambda s, j, actions: policy[s, actions].sum()).clamp(min=0)           # (S, N, V)
    return {"greedy": ({}, {}), "soft": ({"temperature": 0.7}, {"temperature": 0.7}),
            "policy": ({"policy": policy}, {"policy": mass / mass.sum(-1, keepdim=True)})}[mode]


def pool(x, policy=None, temperature=0.0):
    """The largest entry, the mean under a policy, or the soft maximum of the last axis."""
    if policy is not None:
        return (policy * x).sum(-1) / policy.sum(-1)
    return temperature * (x / temperature).exp().sum(-1).log() if temperature else x.amax(-1)


def exact(mdp, gamma, gamma_token=1.0, policy=None, temperature=0.0):
    """Q (S, A), where a value is pooled from γ_w^(|a|-1) Q(s, a), and its token table γ_w^(n-j) Q, pooled likewise."""
    n, q = t([len(tokens) for tokens in mdp.actions]), torch.zeros(mdp.reward.shape).double()
    for _ in range(150):
        q = t(mdp.reward) + gamma * t(mdp.transition) @ pool(gamma_token ** (n - 1) * q, policy, temperature)
    return q, token_table(mdp, lambda s, j, actions: pool(
        gamma_token ** (n[actions] - j) * q[s, actions], None if policy is None else policy[s, actions], temperature))


def small_mdp():
    """Two states and the actions "a", "b c", "b a c"."""
    transition = [[[1, 0], [.5, .5], [0, 1]], [[.5, .5], [1, 0], [.25, .75]]]
    return TokenMDP(transition, [[1, 2, 3], [-1, 0, 5]], ((0,), (1, 2), (1, 0, 2)), ("a", "b", "c"))


def small_table(*rows, invalid=-INF):
    """A token table of `small_mdp` from one row per state: the entries of a | b | b c | b a | b a c."""
    mdp, table = small_mdp(), torch.full((2, 3, 3), invalid, dtype=torch.float64)
    for (prefix, token), entries in zip((((), 0), ((), 1), ((1,), 2), ((1,), 0), ((1, 0), 2)), t(rows).T):
        table[:, prefix_ids(mdp)[prefix], token] = entries
    return table


# V(∅), V(b), V(b a) = (4, 8, 10) in state 0 and (12, 5, 7) in state 1
Q_SMALL = small_table((4, 2, 8, 6, 10), (-2, 12, 3, 5, 7))


# ------------------------------------------------------------------ Bellman backups


def test_state_values_takes_the_maximum():
    """Without policy and temperature the value is the largest valid entry of the last axis."""
    near(state_values(t([[[1., 3., -INF], [-4., -2., -INF]]])), [[3, -2]], "not the maximum over the last axis", {
        "an invalid token counts as 0": [[3, 0]], "minimum instead of maximum": [[-INF, -INF]]})
    assert state_values(torch.ones(2)).dtype == torch.float32, "values come out in the dtype of q"


def test_state_values_averages_under_a_policy():
    """With a policy the value is Σ π q, in which 0 · (-inf) = 0."""
    near(state_values(t([[[2., 6., -INF]]]), policy=t([[[.25, .75, 0.]]])), [[5]], "not Σ π q", {      # ¼·2 + ¾·6
        "policy ignored": 6, "policy ignored, all tokens alike": 4, "the mean of policy times q, not the sum": 5 / 3})
    near(state_values(t([1., -INF]), policy=t([.5, .5])), -INF, "an invalid token that the policy writes is worth -inf")


def test_state_values_soft_maximum():
    """With a temperature the value is τ log Σ exp(q / τ), for large values too."""
    # τ = 2, q = (0, 2 log 3): 2 log(exp(0) + exp(log 3)) = 2 log 4
    q = t([[[0., 2 * math.log(3), -INF]]])
    near(state_values(q, temperature=2), [[2 * math.log(4)]], "not τ log Σ exp(q / τ)", {
        "temperature ignored": 2 * math.log(3), "the factor τ in front is missing": math.log(4),
        "q is not divided by τ": 2 * math.log(10), "softmax average, not logsumexp": 1.5 * math.log(3)})
    near(state_values(t([[1e3, 1e3]]), temperature=.01), [1000 + .01 * math.log(2)], "exp overflows for large q / τ")


def test_state_values_refuses_bad_input():
    """Policy and temperature exclude each other, and the policy has the shape of q."""
    refuses(lambda: state_values(t([[1., 2.]]), policy=t([[.5, .5]]), temperature=1.), "policy", "temperature")
    refuses(lambda: state_values(t([[1., 2.]]), policy=t([[.5, .25, .25]])), "(1, 2)", "(1, 3)")
    for bad in (-1., INF, NAN):
        refuses(lambda: state_values(t([[1., 2.]]), temperature=bad), "temperature")


def test_tables_may_be_lists_and_arrays():
    """Lists, NumPy arrays and whole numbers are tables of float64 too."""
    near(state_values(t([.1, .3]).numpy()), .3, "NumPy arrays give another result")
    near(state_values([.1, .3]), .3, "lists give another result, or are rounded to float32", tol=1e-12)
    near(state_values([2, 12], policy=[.9, .1]), 3, "whole numbers must not round the policy")        # 1.8 + 1.2
    near(state_values(torch.tensor([2, 12]), policy=[.9, .1]), 3, "whole numbers must not round the policy")
    near(action_backup([[4, 2, 0], [-2, 12, 6]], small_mdp(), 0), [[1, 2, 3], [-1, 0, 5]], "a list gives another table")
    near(token_backup(Q_SMALL.tolist(), small_mdp(), 0., 1.), token_backup(Q_SMALL, small_mdp(), 0., 1.), "a list")
    near(action_policy(torch.ones(2, 3, 3).tolist(), small_mdp()), [[1] * 3] * 2, "a list gives another result")
    near(bad_discounts([[0, 1, 1]], [[0, 0, 1]], 0.5), [[1, .5, 0]], "a list gives another result")
    near(masked_mean(torch.tensor([True, False, True]), torch.tensor([1, 1, 0])), .5, "booleans are 0 and 1")


def test_action_backup_by_hand():
    """R + γ E V(o′) on two states and three actions."""
    # V = (4, 12); 1 + ½·4, 2 + ½·(½·4 + ½·12), 3 + ½·12; and -1 + ½·8, 0 + ½·4, 5 + ½·(¼·4 + ¾·12)
    q = t([[4, 2, 0], [-2, 12, 6]])
    near(action_backup(q, small_mdp(), 0.5), [[3, 6, 9], [3, 2, 10]], "not R + γ Σ P V", {
        "gamma forgotten": [[5, 10, 15], [7, 4, 15]], "reward forgotten": [[2, 4, 6], [4, 2, 5]],
        "gamma applied to the reward too": [[2.5, 5, 7.5], [3.5, 2, 7.5]],
        "value of this state, not of the next": [[3, 4, 5], [5, 6, 11]]})
    near(action_backup(q, small_mdp(), 0), [[1, 2, 3], [-1, 0, 5]], "γ = 0 is allowed and leaves R")
    near(action_backup(q, small_mdp(), 1), [[5, 10, 15], [7, 4, 15]], "γ = 1 is allowed")
    assert action_backup(q.float(), small_mdp(), 0.5).dtype == torch.float64, "tables are float64"


@IN_ALL_MODES
@ON_RANDOM_MDPS
def test_action_backup_keeps_the_solution(seed, mode):
    """The exact Q* (for a policy Q^π, or the soft one) is a fixed point."""
    mdp = random_mdp(seed)
    kwargs, _ = settings(mode, mdp)
    q, _ = exact(mdp, 0.5, **kwargs)
    near(action_backup(q, mdp, 0.5, **kwargs), q, f"Q moved ({mode}): policy or temperature lost on the way?")


def test_action_backup_refuses_bad_input():
    """γ outside [0, 1], tables of another shape, policy and temperature together."""
    mdp, q = small_mdp(), torch.ones(2, 3)
    refuses(lambda: action_backup(q, mdp, 1.5), "gamma", "1.5")
    refuses(lambda: action_backup(q, mdp, -0.1), "gamma", "-0.1")
    refuses(lambda: action_backup(torch.ones(2, 4), mdp, 0.5), "(2, 4)", "(2, 3)")
    refuses(lambda: action_backup(q, mdp, 0.5, policy=torch.ones(2, 1)), "(2, 1)", "(2, 3)")
    refuses(lambda: action_backup(q, mdp, 0.5, policy=q / 3, temperature=1.), "policy", "temperature")


def test_token_backup_by_hand():
    """γ_w V(prefix) inside an action, R + γ E V(o′, ∅) at its end, -inf at invalid tokens."""
    # γ = ½, γ_w = ¼. a: 1 + ½·4 | b: ¼·8 | b c: 2 + ½·(½·4 + ½·12) | b a: ¼·10 | b a c: 3 + ½·12
    # state 1: a: -1 + ½·(½·4 + ½·12) | b: ¼·5 | b c: 0 + ½·4 | b a: ¼·7 | b a c: 5 + ½·(¼·4 + ¾·12)
    right = small_table((3, 2, 6, 2.5, 9), (3, 1.25, 2, 1.75, 10))
    near(token_backup(Q_SMALL, small_mdp(), 0.5, 0.25), right, "not the table of Eq. 9-10", {
        "gamma was applied inside the action": small_table((3, 4, 6, 5, 9), (3, 2.5, 2, 3.5, 10)),
        "gamma_token forgotten inside the action": small_table((3, 8, 6, 10, 9), (3, 5, 2, 7, 10)),
        "gamma and gamma_token swapped": small_table((2, 4, 4, 5, 6), (1, 2.5, 1, 3.5, 7.5)),
        "gamma_token at the action's end": small_table((2, 2, 4, 2.5, 6), (1, 1.25, 1, 1.75, 7.5)),
        "gamma times gamma_token at the end": small_table((1.5, 2, 3, 2.5, 4.5), (0, 1.25, .5, 1.75, 6.25)),
        "values shifted by one: V before the token": small_table((3, 1, 6, 2, 9), (3, 3, 2, 1.25, 10)),
        "invalid tokens must be -inf": right.clamp(min=0)})


@IN_ALL_MODES
@ON_RANDOM_MDPS
def test_token_backup_naive_solves_another_mdp(seed, mode):
    """Identity 2: its fixed point has the reward γ_w^(|a|-1) R and the discount γ γ_w^(|a|-1)."""
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings(mode, mdp)
    gamma_token = 1. if mode == "soft" else 0.8                          # the soft maximum does not scale with γ_w
    _, table = exact(mdp, 0.7, gamma_token, **kwargs)
    near(token_backup(table, mdp, 0.7, gamma_token, **token_kwargs), table,
         f"the fixed point moved ({mode}): policy or temperature lost, or γ and γ_w in the wrong places?")


def test_token_backup_discrepancy_law():
    """Identity 3: along one forced action of n tokens naive is off by 1 - γ_w^(n-j) at token j."""
    mdp = TokenMDP([[[0, 1]], [[0, 1]]], [[16], [0]], ((0, 1, 2, 3, 4),), tuple("abcde"))
    q = token_table(mdp, lambda s, j, actions: 0.)
    for _ in range(5):
        q = t(token_backup(q, mdp, 0.5, 0.5))
    near(q[0].diagonal(), [1, 2, 4, 8, 16], "16 halves once per token still to come", {
        "gamma_token forgotten inside the action": [16] * 5, "gamma_token at the last token too": [.5, 1, 2, 4, 8]})


def test_token_backup_picks_the_wrong_lunch():
    """With γ_w = γ = .95 the greedy action is wrong somewhere in lunch_mdp; with γ_w = 1 it is right everywhere."""
    mdp, missed = lunch_mdp(), {}
    best, _ = exact(mdp, 0.95)
    for gamma_token in (0.95, 1.0):
        q = token_table(mdp, lambda s, j, actions: 0.)
        for _ in range(100):
            q = t(token_backup(q, mdp, 0.95, gamma_token))
        greedy = q == q.amax(-1, keepdim=True)                                                     # (S, N, V)
        chosen = torch.stack([along(greedy, mdp, tokens).all(-1) for tokens in mdp.actions], -1)   # (S, A)
        missed[gamma_token] = float((best.amax(-1, keepdim=True) - best)[chosen].max())
    assert missed[1.0] < 1e-6, "gamma was applied inside the action: token-greedy at gamma_token = 1 is not greedy"
    assert missed[0.95] > 1e-3, "gamma_token is ignored: naive must fall for the shorter, worse action"


def test_token_backup_refuses_bad_input():
    """γ or γ_w outside [0, 1], tables of another shape, policy and temperature together."""
    mdp, uniform = small_mdp(), torch.ones(2, 3, 3) / 3
    refuses(lambda: token_backup(Q_SMALL, mdp, 1.5, 1.), "gamma", "1.5")
    refuses(lambda: token_backup(Q_SMALL, mdp, 1., -0.1), "gamma_token", "-0.1")
    refuses(lambda: token_backup(torch.ones(2, 4, 3), mdp, 0.5, 1.), "(2, 4, 3)", "(2, 3, 3)")
    refuses(lambda: token_backup(Q_SMALL, mdp, 0.5, 1., policy=torch.ones(2, 3)), "(2, 3)", "(2, 3, 3)")
    refuses(lambda: token_backup(Q_SMALL, mdp, 0.5, 1., policy=uniform, temperature=1.), "policy", "temperature")


def test_bad_backup_by_hand():
    """BAD hands the value on undiscounted inside an action, and discounts by γ at its end."""
    # as above, with V itself inside the action: b: 8 and 5 | b a: 10 and 7
    near(bad_backup(Q_SMALL, small_mdp(), 0.5), small_table((3, 8, 6, 10, 9), (3, 5, 2, 7, 10)), "not Eq. 13-14", {
        "gamma was applied inside the action": small_table((3, 4, 6, 5, 9), (3, 2.5, 2, 3.5, 10)),
        "gamma and gamma_token swapped": small_table((5, 4, 10, 5, 15), (7, 2.5, 4, 3.5, 15)),
        "gamma forgotten at the action's end": small_table((5, 8, 10, 10, 15), (7, 5, 4, 7, 15)),
        "the value is lost inside the action": small_table((3, 0, 6, 0, 9), (3, 0, 2, 0, 10))})


@IN_ALL_MODES
@ON_RANDOM_MDPS
def test_bad_backup_has_the_action_level_solution(seed, mode):
    """Identity 1: Q(s, a) of the action level, pooled over completions, is the fixed point, and is reached."""
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings(mode, mdp)
    _, table = exact(mdp, 0.5, **kwargs)
    near(bad_backup(table, mdp, 0.5, **token_kwargs), table,
         f"Q moved ({mode}): gamma was applied inside the action, or policy or temperature lost")
    q = table.clamp(min=0, max=0).where(table > -INF, table)
    for _ in range(160):                                                 # ½ per action of at most 4 tokens: ½⁴⁰
        q = t(bad_backup(q, mdp, 0.5, **token_kwargs))
    near(q, table, f"repeated backups do not reach Q(s, a) ({mode})")


@ON_RANDOM_MDPS
def test_bad_backup_solves_the_action_level(seed):
    """Identity 1 again, by iterating both: where a token completes an action, the solution is Q(s, a)."""
    mdp = random_mdp(seed)
    whole = solve(lambda q: action_backup(q, mdp, 0.5), torch.zeros(mdp.reward.shape))
    q, ends = solve(lambda q: bad_backup(q, mdp, 0.5), torch.zeros(len(whole), *mdp.child.shape)), mdp.leaf >= 0
    near(q[:, ends], whole[:, mdp.leaf[ends]], "another solution than the action level's: gamma inside the action?")


@ON_RANDOM_MDPS
def test_bad_backup_credit_adds_up(seed):
    """Identity 4: the token advantages of an action sum to A(s, a); naive ones do not."""
    mdp, sums = random_mdp(seed), []
    kwargs, token_kwargs = settings("policy", mdp)
    bad, naive = exact(mdp, 0.8, **kwargs)[1], exact(mdp, 0.8, 0.8, **kwargs)[1]
    for q in (bad_backup(bad, mdp, 0.8, **token_kwargs), naive):
        advantage = t(q) - (token_kwargs["policy"] * t(q).clamp(min=-1e9)).sum(-1, keepdim=True)
        sums.append(torch.stack([along(advantage, mdp, tokens).sum(-1) for tokens in mdp.actions], -1))      # (S, A)
    q, _ = exact(mdp, 0.8, **kwargs)
    a = q - (kwargs["policy"] * q).sum(-1, keepdim=True)
    near(sums[0], a, "the credit does not add up: is gamma applied inside the action?")
    assert (sums[1] - a).abs().max() > 1e-3, "naive credit must not add up on this MDP"


@ON_RANDOM_MDPS
def test_bad_backup_gives_the_policy_gradient(seed):
    """Identity 5: Σ d π π A_BAD ∇log π is ∇J of the action level, and the naive one points elsewhere."""
    mdp = random_mdp(seed)
    allowed = token_table(mdp, lambda s, j, actions: 0.)                                           # 0 or -inf
    noise = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theta = noise.requires_grad_()
    logp = (theta + allowed).log_softmax(-1).clamp(min=-1e9)                                       # (S, N, V)
    policy = torch.stack([along(logp, mdp, a).sum(-1).exp() for a in mdp.actions], -1)             # (S, A)
    chain = torch.einsum("sa,saz->sz", policy, t(mdp.transition))
    visits = torch.linalg.solve(torch.eye(len(chain)) - 0.8 * chain.T, torch.ones(len(chain)).double() / len(chain))
    j_gradient, = torch.autograd.grad(visits @ (policy * t(mdp.reward)).sum(-1), theta, retain_graph=True)
    reach = token_table(mdp, lambda s, j, actions: policy[s, actions].sum().detach()).clamp(min=0)  # π(w^{≤j} | s)

    def gradient(q):
        q, token_policy = t(q).clamp(min=-1e9), logp.exp().detach()
        weight = visits.detach()[:, None, None] * reach * (q - (token_policy * q).sum(-1, keepdim=True))   # (S, N, V)
        return torch.autograd.grad((weight * logp).sum(), theta, retain_graph=True)[0]
    bad, naive = (exact(mdp, 0.8, gamma_token, policy.detach())[1] for gamma_token in (1., 0.8))
    near(gradient(bad_backup(bad, mdp, 0.8, policy=logp.exp().detach())), j_gradient,
         "not the gradient of the action level: gamma inside the action?")
    cosine = torch.cosine_similarity(gradient(naive).flatten(), j_gradient.flatten(), dim=0)
    assert cosine < 1 - 1e-5, "the naive gradient must point elsewhere on this MDP"


def test_bad_backup_refuses_bad_input():
    """γ outside [0, 1], a table of another shape, policy and temperature together."""
    mdp = small_mdp()
    refuses(lambda: bad_backup(Q_SMALL, mdp, 1.5), "gamma", "1.5")
    refuses(lambda: bad_backup(torch.ones(3, 3, 3), mdp, 0.5), "(3, 3, 3)", "(2, 3, 3)")
    refuses(lambda: bad_backup(Q_SMALL, mdp, 0.5, policy=Q_SMALL, temperature=1.), "policy", "temperature")


@pytest.mark.parametrize("start", ([10., -INF, 10.], [-10., 0., 2.]))
def test_solve_finds_the_fixed_point(start):
    """q ← 1 + q / 2 ends at 2 from either side; entries at -inf are not compared; q0 is left alone."""
    q0, half = t(start), t([.5, NAN, .5])
    q = solve(lambda q: torch.where(half > 0, 1 + q / 2, -INF), q0)
    near(q, [2, -INF, 2], "stopped early: is the change signed?", {"stopped at once": start}, tol=1e-11)
    near(q0, start, "q0 was changed in place")
    slow = solve(lambda q: torch.cat([t(q)[:1] / 2, 0 * t(q)[1:]]), torch.ones(1000), tol=1e-4)
    assert abs(float(slow[0])) < 1.1e-4, "stopped by the average change, not by the largest"


def test_solve_counts_its_backups():
    """It stops once the change is within `tol`, and after `max_iters` backups says how far it got."""
    changes = []

    def halve(q):
        changes.append(t(q) / 2)
        return t(q) / 2
    solve(halve, [1.], tol=0.1)                                          # changes ½, ¼, ⅛, 1/16
    assert len(changes) <= 5, f"tol is ignored: {len(changes)} backups where 4 are enough"
    changes.clear()
    with pytest.raises(RuntimeError, match=r"0\.125|1\.25[0]*e-0?1"):      # the residual after three backups: ⅛
        solve(halve, [1.], tol=1e-3, max_iters=3)
    assert len(changes) == 3, f"max_iters = 3 made {len(changes)} backups"


@pytest.mark.parametrize("backup", (lambda q: t(q) + 1, lambda q: 10 * t(q), lambda q: -t(q), lambda q: t(q) + NAN))
def test_solve_never_returns_what_has_not_converged(backup):
    """Growing, overflowing, flipping and NaN tables are a RuntimeError."""
    with pytest.raises(RuntimeError):
        solve(backup, [1., -1.], max_iters=500)


def test_action_policy_by_hand():
    """π(a) is the product of its tokens' probabilities."""
    token_policy = small_table((.25, .75, .5, .5, 1), (.5, .5, .25, .75, 1), invalid=0.)             # a|b|b c|b a|b a c
    near(action_policy(token_policy, small_mdp()), [[.25, .375, .375], [.5, .125, .375]], "not the chain rule", {
        "only the last token": [[.25, .5, 1], [.5, .25, 1]], "only the first token": [[.25, .75, .75], [.5, .5, .5]],
        "sum instead of product": [[.25, 1.25, 2.25], [.5, .75, 2.25]],
        "the last token is left out": [[1, .75, .375], [1, .5, .375]],
        "the first token is left out": [[1, .5, .5], [1, .25, .75]]})


def test_action_policy_lets_the_gradient_through():
    """The derivative of a product by one factor is the product of the others."""
    token_policy = small_table((.25, .75, .5, .5, 1), (.5, .5, .25, .75, 1), invalid=0.).requires_grad_()
    backward(action_policy(token_policy, small_mdp())[0, 2])                                         # b: ¾, a: ½, c: 1
    near(token_policy.grad, small_table((0, .5, 0, .75, .375), [0] * 5, invalid=0.), "not the gradient of the product")


@ON_RANDOM_MDPS
def test_action_policy_inverts_conditioning(seed):
    """A random action policy, conditioned token by token, comes back."""
    mdp = random_mdp(seed)
    kwargs, token_kwargs = settings("policy", mdp)
    near(action_policy(token_kwargs["policy"], mdp), kwargs["policy"], "the chain rule does not invert conditioning")


def test_action_policy_refuses_bad_input():
    """A token policy of another shape."""
    refuses(lambda: action_policy(torch.ones(2, 4, 3), small_mdp()), "(2, 4, 3)", "(2, 3, 3)")


# ------------------------------------------------------------------ credit over a stream of tokens


def gae_loop(rewards, values, discounts, lambdas, last):
    """GAE of one row without gaps, from its definition."""
    advantages, trace = [], 0.
    for r, v, d, lam in reversed(list(zip(rewards, values, discounts, lambdas))):
        trace = r + d * last - v + d * lam * trace
        advantages, last = [trace, *advantages], v
    return advantages


@WITH_ALL_MASKS
def test_bad_discounts_by_hand(dtype):
    """γ_w inside an action, γ after its last token, 0 after the last token of a finished episode."""
    # three tokens | one token, episode over | two tokens; `done` inside an action says nothing
    end, done = torch.tensor([[[0, 0, 1, 1, 0, 1]], [[1, 0, 0, 1, 1, 0]]]).to(dtype)
    near(bad_discounts(end, done, 0.5, 0.25), [[.25, .25, .5, 0, .25, .5]], "not γ_w, γ or 0 where they belong", {
        "gamma was applied inside the action": [[.5, .5, .5, 0, .5, .5]],
        "gamma was applied inside the action, gamma_token at its end": [[.5, .5, .25, 0, .5, .25]],
        "bootstrapped across an episode's end": [[.25, .25, .5, .5, .25, .5]],
        "`done` was read inside an action": [[0, .25, .5, 0, 0, .5]],
        "`done` is upside down": [[.25, .25, 0, .5, .25, 0]],
        "gamma_token survives an episode's end": [[.25, .25, .5, .25, .25, .5]],
        "gamma times gamma_token at the action's end": [[.25, .25, .125, 0, .25, .125]]})
    near(bad_discounts(end, done, 0.5), [[1, 1, .5, 0, 1, .5]], "gamma_token is 1 unless told otherwise", {
        "gamma was applied inside the action": [[.5, .5, .5, 0, .5, .5]]})
    near(bad_discounts(end.view(1, 2, 3), done.view(1, 2, 3), 0.5), [[[1, 1, .5], [0, 1, .5]]], "of any shape")
    exact_end = torch.ones(1, 2, dtype=torch.float64)
    near(bad_discounts(exact_end, t([[0, 1]]), 0.9, 0.3), [[.9, 0]], "γ rounded to float32", tol=1e-12)
    near(bad_discounts(0 * exact_end, t([[0, 1]]), 0.9, 0.3), [[.3, .3]], "γ_w rounded to float32", tol=1e-12)


def test_bad_discounts_refuses_bad_input():
    """γ or γ_w outside [0, 1] or not a number, and masks of different shapes."""
    mask = torch.ones(2, 3)
    for bad in (1.5, -0.1, NAN):
        refuses(lambda: bad_discounts(mask, mask, bad), "gamma")
        refuses(lambda: bad_discounts(mask, mask, 0.5, bad), "gamma_token")
    refuses_shapes(bad_discounts, 2, 0.5)


# two 2-token actions; γ = ½ between them, the episode ends after the second; λ = ¼ at action ends
R, V, D, LAM = [0., 2., 0., 4.], [1., 2., 3., 4.], [1., .5, 1., 0.], [1., .25, 1., .25]
ADVANTAGES = [2.625, 1.625, 1., 0.]


def test_gae_by_hand():
    """δ_n = r_n + γ_n v_{n+1} - v_n, A_n = δ_n + γ_n λ_n A_{n+1}, returns A + v."""
    # δ = (0+2-1, 2+½·3-2, 0+4-3, 4+0-4) = (1, 1½, 1, 0); A₃ = 0, A₂ = 1+0, A₁ = 1½+½·¼·1, A₀ = 1+A₁
    advantages, returns = gae(t([R]), t([V]), t([D]), t([LAM]), torch.ones(1, 4), t([8.]))
    near(advantages, [ADVANTAGES], "not the GAE recurrence", {
        "bootstrapped across an episode's end": [[3.125, 2.125, 5, 4]],           # A₃ = 4+½·8-4, A₂ = 1+4, …
        "lambda forgotten at the action's boundary": [[3, 2, 1, 0]],              # A₁ = 1½+½·1
        "lambda applied inside the action": [[1.40625, 1.625, 1, 0]],             # A₀ = 1+¼·A₁
        "lambdas shifted by one": [[1.5, 2, 1, 0]],                               # A₁ = 1½+½·1, A₀ = 1+¼·2
        "the trace is not discounted": [[2.75, 1.75, 1, 0]], "only the one-step errors δ, no trace": [[1, 1.5, 1, 0]],
        "values shifted by one: v_n in place of v_{n+1}": [[1, 1, 0, 0]],
        "the next value is not discounted": [[5.125, 4.125, 9, 8]],               # δ = (1, 2+3-2, 1, 4+8-4)
        "the values are not subtracted": [[6.5, 4.5, 8, 4]],                      # δ = (0+2, 2+½·3, 0+4, 4)
        "the values are ignored": [[2.5, 2.5, 4, 4]],                             # δ = R
        "the reward is lost where an episode ends": [[2.125, 1.125, -3, -4]],     # A₃ = 0-4, A₂ = 1-4, A₁ = 1½+½·¼·A₂
        "returns and advantages swapped": [[3.625, 3.625, 4, 4]]})
    near(returns, [[3.625, 3.625, 4, 4]], "returns are advantages + values", {
        "a true zero counted as missing": [[3.625, 3.625, 4, 0]], "values subtracted": [[1.625, -.375, -2, -4]],
        "returns without the values": [ADVANTAGES]})


def test_gae_bootstraps_after_the_last_written_token():
    """`last_values` follows the row's last written token, weighed by that token's discount."""
    # r = (0, 2), v = (1, 2), γ = (1, ½): A₁ = 2 + ½·6 - 2 = 3, A₀ = 0 + 2 - 1 + 3 = 4
    row = t([[0, 2, 0]]), t([[1, 2, 7]]), t([[1, .5, .5]])
    near(gae(*row, 1., torch.tensor([[1, 1, 0]]), t([6.]))[0], [[4, 3, 0]], "wrong bootstrap", {
        "last_values ignored, or the next slot read instead of the next written token": [[1, 0, 0]],
        "padding contents leaked: a masked value was used": [[4.5, 3.5, 0]],
        "padding contents leaked: the mask is ignored": [[2.5, 1.5, -4]],         # A₂ = ½·6-7, A₁ = 2+½·7-2+½·A₂
        "last_values undiscounted, or counted twice, as value and as advantage": [[7, 6, 0]]})
    near(gae(*t([[[0.]], [[0.]], [[1.]]]), 1., torch.ones(1, 1), t([5.]))[0], [[5]], "one slot: A = last value", {
        "last_values counts twice, as value and as advantage": [[10]]})


def test_gae_time_limit_is_not_a_termination():
    """A time limit enters as r + γ V(o_next) with discount 0; nothing of the next episode is seen."""
    # A₁ = (2 + ½·6) - 2 = 3, A₀ = 0 + 2 - 1 + ½·3, as if the stream had stopped there with last value 6
    for later in (7., -7.):
        cut = t([[0, 2 + .5 * 6, later]]), t([[1, 2, later]]), t([[1, 0, 1]])
        near(gae(*cut, .5, torch.ones(1, 3), t([9.]))[0][:, :2], [[2.5, 3]], "the next episode leaked into this one", {
            "time limit treated as termination": [[1, 0]], "lambda forgotten": [[4, 3]]})


@WITH_ALL_MASKS
@pytest.mark.parametrize("junk", (100., NAN, INF))
def test_gae_cuts_gaps_out(junk, dtype):
    """Masked slots anywhere, with anything in them, change nothing; a row of padding gives zeros."""
    where, mask = [1, 2, 4, 7], torch.zeros(2, 9)                        # the example above, at slots 1, 2, 4, 7 of 9
    mask[0, where] = 1
    stream = [torch.full((2, 9), junk, dtype=torch.float64) for _ in range(4)]
    for x, row in zip(stream, (R, V, D, LAM)):
        x[0, where] = t(row)
    advantages, returns = gae(*stream, mask.to(dtype), t([8., 3.]))
    near(advantages[0, where], ADVANTAGES, "padding contents leaked, or a gap is not cut out")
    near(returns[0, where], [3.625, 3.625, 4, 4], "padding contents leaked, or a gap is not cut out")
    for x in (advantages, returns):
        near(x[mask == 0], torch.zeros(14), "masked slots must be zero")


@pytest.mark.parametrize("slots", (1, 2, 3, 8, 67))
def test_gae_agrees_with_the_loop(slots):
    """On random streams with gaps it is the plain loop over the written tokens, to 1e-10."""
    noise = torch.Generator().manual_seed(slots)
    rewards, values, last = torch.randn(3, 5, slots, generator=noise, dtype=torch.float64)
    discounts, lambdas, chance, gap = torch.rand(4, 5, slots, generator=noise, dtype=torch.float64)
    discounts, mask = torch.where(chance < 0.1, 0., discounts ** 0.1), gap > 0.4
    mask[0], mask[1] = False, True
    for lam in (lambdas, 0.9, 0, 1):
        what, expected = "(B, N)" if lam is lambdas else lam, torch.zeros_like(rewards)
        for b, m in enumerate(mask):
            rows = [x[b, m].tolist() for x in (rewards, values, discounts, lambdas * 0 + lam)]
            expected[b, m] = t(gae_loop(*rows, float(last[b, 0])))
        advantages, returns = gae(rewards, values, discounts, lam, mask, last[:, 0])
        near(advantages, expected, f"not the loop over the written tokens ({slots} slots, lambdas {what})", tol=1e-10)
        near(returns, torch.where(mask, expected + values, 0.), "returns are advantages + values", tol=1e-10)


@pytest.mark.parametrize("lam", (0., 0.5, 0.95, 1.))
@pytest.mark.parametrize("lengths", ((1, 1, 1, 1), (5, 1, 3, 2), (2, 2, 7, 1)))
def test_gae_first_token_has_the_action_level_advantage(lengths, lam):
    """Identity 6: with λ_w = γ_w = 1 an action's first token has action-level GAE(λ), whatever the tokenisation."""
    level, stream, first = ([1., -2., 3., .5], [.5, 1., -1., 2.], [.9] * 4, [lam] * 4), [], []
    for n, (r, v, d, lam_end) in zip(lengths, zip(*level)):
        first.append(len(stream))
        inside = [(r * (j == n - 1), math.sin(7 * j + n), 1., 1.) for j in range(n)]     # any values inside an action
        inside[0] = (inside[0][0], v, 1., 1.)
        stream += [*inside[:-1], (*inside[-1][:2], d, lam_end)]
    advantages, _ = gae(*t(stream).T[:, None], torch.ones(1, len(stream)), t([4.]))
    whole, _ = gae(*t(level)[:, None], torch.ones(1, 4), t([4.]))
    near(advantages[0, first], whole[0], "the advantage depends on the tokenisation: lambda inside?")


def test_gae_lambda_at_every_token_loses_credit():
    """A 5-token action worth 1 keeps .95⁴ = .8145 at its first token if λ decays per token, and 1 if not."""
    row = t([[0, 0, 0, 0, 1]]), torch.zeros(1, 5).double(), t([[1, 1, 1, 1, 0]])
    for lam, kept in ((0.95, 0.95 ** 4), (t([[1, 1, 1, 1, .95]]), 1.)):
        near(gae(*row, lam, torch.ones(1, 5), t([0.]))[0][0, 0], kept, "not λ once per step between tokens", {
            "lambda ignored": 1., "lambda also decays before the first token": .95 ** 5,
            "the action end's lambda is used inside": .95 ** 4})


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gae_targets_are_constants(dtype):
    """No gradient, the dtype of the values, and untouched inputs."""
    given = [t([R]), torch.tensor([V], dtype=dtype), t([D]), t([LAM])]
    copies = [x.clone() for x in given]
    given[1].requires_grad_()
    for x in gae(*given, torch.tensor([[1, 1, 1, 0]]), t([1.])):
        assert not x.requires_grad, "the critic would be trained through its own target: detach"
        assert x.dtype == dtype, f"values are {dtype}, but {x.dtype} came out"
    assert all(map(torch.equal, given, copies)), "an input was changed in place"


def test_gae_refuses_bad_input():
    """Shapes that disagree, λ or γ outside [0, 1], a non-finite reward on a real token."""
    x, last = torch.ones(2, 3), torch.ones(2)
    refuses_shapes(gae, 5, last)
    refuses(lambda: gae(x, x, x, x, x, torch.ones(3)), "last_values", "(3,)")
    refuses(lambda: gae(x, x, x, x, x, torch.ones(2, 1)), "last_values", "(2, 1)")
    for position, word, values in ((0, "reward", (NAN, INF, -INF)), (2, "discount", (-.1, 1.5, NAN)),
                                   (3, "lambda", (-.1, 1.5, NAN))):
        for bad in values:
            args = [x.clone() for _ in range(5)]
            args[position][1, 1] = bad
            refuses(lambda: gae(*args, last), word)
    refuses(lambda: gae(x, x, x, -0.1, x, last), "lambda")


# ------------------------------------------------------------------ PPO losses


@WITH_ALL_MASKS
def test_masked_mean_over_real_tokens(dtype):
    """Σ m x / Σ m, with gradient 1/n on real tokens and 0 elsewhere."""
    x = torch.tensor([[1., 0., NAN], [8., INF, -100.]], dtype=torch.float64, requires_grad=True)
    mean = masked_mean(x, torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype))
    near(mean, 3, "not the mean over real tokens", {                     # (1 + 0 + 8) / 3
        "divided by all slots, padding too": 1.5, "a true zero counted as missing": 4.5, "sum instead of mean": 9,
        "mean of the rows' means: every token counts alike": 4.25})
    backward(mean)
    near(x.grad, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]], "padding contents leaked into the gradient")


def test_masked_mean_refuses_bad_input():
    """A mean over nothing, and shapes that disagree."""
    refuses(lambda: masked_mean(torch.ones(2, 3), torch.zeros(2, 3)))
    refuses_shapes(masked_mean, 2)


@WITH_ALL_MASKS
def test_normalize_over_real_tokens(dtype):
    """Mean 0 and population std 1 over the real tokens, zero elsewhere."""
    x, mask = t([[0., 0., NAN], [4., INF, 4.]]), torch.tensor([[1, 1, 0], [1, 0, 1]]).to(dtype)   # mean 2, std 2
    right = t([[-1, -1, 0], [1, 0, 1]])
    near(normalize(x, mask), right, "not (x - mean) / std over the real tokens", {
        "population std expected, not the sample std": right * .75 ** .5, "not divided by the std": 2 * right,
        "divided by the variance": right / 2, "not centred": [[0, 0, 0], [2, 0, 2]],
        "a true zero counted as missing": 0}, tol=1e-6)
    near(normalize(t([[1., 3., 100.]]), torch.tensor([[1, 1, 0]]).to(dtype)), [[-1, 1, 0]],
         "advantage normalised with padding", {"masked slots must be zero": [[-1, 1, 98]]}, tol=1e-6)
    near(normalize(t([[5., 5., 9.]]), torch.tensor([[1, 1, 0]])), [[0, 0, 0]], "constants must give zeros")
    near(normalize(t([[3., 9.]]), torch.tensor([[1, 0]])), [[0, 0]], "one token: population std expected")
    near(normalize(t([[-1e-4, 1e-4]]), torch.ones(1, 2)), [[-1, 1]], "eps too large, or inside the root", tol=1e-3)
    near(normalize(t([[-1e-8, 1e-8]]), torch.ones(1, 2)), [[-.5, .5]], "1e-8 is added to the std", tol=1e-6)


def test_normalize_refuses_bad_input():
    """Nothing to normalise, and shapes that disagree."""
    refuses(lambda: normalize(torch.ones(2, 3), torch.zeros(2, 3)))
    refuses_shapes(normalize, 2)


RATIO, ADVANTAGE = [1.5, 0.5, 1.5, 0.5, 1.125], [2., 4., -2., -6., 4.]


def ppo_example(dtype=torch.bool):
    """Log-probs, old log-probs, advantages and mask of five real tokens and one slot of padding."""
    logp = torch.tensor([math.log(r) - 1 for r in RATIO] + [NAN], dtype=torch.float64).view(2, 3).requires_grad_()
    old, advantages = t([[-1.] * 5 + [-INF], ADVANTAGE + [NAN]]).view(2, 2, 3)
    return logp, old, advantages, torch.tensor([[1, 1, 1], [1, 1, 0]]).to(dtype)


@WITH_ALL_MASKS
def test_ppo_policy_loss_by_hand(dtype):
    """-mean of min(ratio · A, clipped ratio · A): above, below and inside the clip, with both signs."""
    # min(3, 2.4) + min(2, 3.2) + min(-3, -2.4) + min(-3, -4.8) + 4.5 = 2.4 + 2 - 3 - 4.8 + 4.5 = 1.1
    near(ppo_policy_loss(*ppo_example(dtype))[0], -1.1 / 5, "not PPO's clipped objective", {
        "min and max swapped in the clipped objective": -5.3 / 5,                # 3 + 3.2 - 2.4 - 3 + 4.5
        "ratio upside down": -(4 / 3 + 4.8 - 1.6 - 12 + 32 / 9) / 5,              # ratios ⅔, 2, ⅔, 2, 8/9
        "the sign is wrong: a loss is minimised": 1.1 / 5,
        "nothing is clipped": -3.5 / 5,                                           # 3 + 2 - 3 - 3 + 4.5
        "the minimum is missing: always clipped": -2.9 / 5,                       # 2.4 + 3.2 - 2.4 - 4.8 + 4.5
        "sum instead of mean": -1.1, "divided by all slots, padding too": -1.1 / 6})


def test_ppo_policy_loss_gradient():
    """-ratio · A / n where the unclipped term is the smaller, exactly 0 where the clip holds and on padding."""
    logp, *rest = ppo_example()
    backward(ppo_policy_loss(logp, *rest)[0])
    # high ratio, A > 0: clipped | low, A > 0: -½·4 | high, A < 0: 1½·2 | low, A < 0: clipped | inside: -1⅛·4 | padding
    near(logp.grad, [[0, -2 / 5, 3 / 5], [0, -4.5 / 5, 0]], "the gradient is not -ratio · A / n", {
        "the clip does not stop the gradient": [[-3 / 5, -2 / 5, 3 / 5], [3 / 5, -4.5 / 5, 0]],
        "the clip also stops tokens on their way back": [[0, 0, 0], [0, -4.5 / 5, 0]], "no gradient at all": 0,
        "min and max swapped in the clipped objective": [[-3 / 5, 0, 0], [3 / 5, -4.5 / 5, 0]]})


def test_ppo_policy_loss_first_step_is_the_policy_gradient():
    """At ratio 1 the loss is -mean A and its gradient -A / n; whole actions (B, T) work as tokens do."""
    logp = torch.full((3, 1), -0.7, dtype=torch.float64, requires_grad=True)
    loss, info = ppo_policy_loss(logp, logp.detach(), t([[1.], [-2.], [4.]]), torch.ones(3, 1))
    backward(loss)
    near(loss, -1, "at ratio 1 the loss is minus the mean advantage")
    near(logp.grad, [[-1 / 3], [2 / 3], [-4 / 3]], "at ratio 1 the gradient is -A / n")
    info |= {"at the edge": ppo_policy_loss(logp, logp.detach(), *torch.ones(2, 3, 1), clip=0.)[1]["clip_fraction"]}
    near([float(x) for x in info.values()], [0, 0, 0], "at ratio 1 kl and clip_fraction are 0, also with clip = 0")


def test_ppo_policy_loss_info():
    """kl is the mean of ratio - 1 - log ratio, clip_fraction the share of |ratio - 1| > clip, both detached."""
    _, info = ppo_policy_loss(*ppo_example())
    log = math.log(81 / 128) / 5                                           # mean log ratio; the ratios sum to 5⅛,
    kl = .125 / 5 - log                                                    # and those upside down to 56/9
    near(float(info["kl"]), kl, "kl is not the mean of ratio - 1 - log ratio", {
        "-log ratio alone, which can be negative": -log, "sign of the kl": -kl, "the -1 is missing": kl + 1,
        "divided by all slots, padding too": kl * 5 / 6, "log ratio added instead of subtracted": kl + 2 * log,
        "ratio upside down": (56 / 9 - 5) / 5 + log})
    near(float(info["clip_fraction"]), 4 / 5, "four of five ratios lie outside 1 ± .2", {
        "only one side of the clip is counted": 2 / 5, "share of tokens that are not clipped": 1 / 5,
        "divided by all slots, padding too": 4 / 6}, tol=1e-6)
    assert not any(getattr(x, "requires_grad", False) for x in info.values()), "diagnostics must be detached"


def test_ppo_policy_loss_clip_range():
    """`clip` sets the range 1 - clip … 1 + clip, in the loss and in clip_fraction."""
    args = t([[math.log(2), math.log(.25)]]), torch.zeros(1, 2), t([[1., -1.]]), torch.ones(1, 2)
    near(ppo_policy_loss(*args, clip=.5)[0], -(1.5 - .5) / 2, "not 1 - clip … 1 + clip", {"clip is ignored": -.2})
    fraction = float(ppo_policy_loss(*args, clip=.9)[1]["clip_fraction"])          # |2 - 1| > .9 but |¼ - 1| < .9
    near(fraction, .5, "not the share of |ratio - 1| > clip", {"clip is ignored": 1})


def test_ppo_policy_loss_refuses_bad_input():
    """A mean over nothing, shapes that disagree, a negative clip."""
    refuses(lambda: ppo_policy_loss(*torch.zeros(4, 2, 3)))
    refuses(lambda: ppo_policy_loss(*torch.ones(4, 2, 3), clip=-.1), "clip")
    refuses_shapes(ppo_policy_loss, 4)


@WITH_ALL_MASKS
def test_value_loss_is_half_the_squared_error(dtype):
    """The mean of ½ (v - R)² over real tokens, with gradient (v - R) / n."""
    values = torch.tensor([[1., 3.], [2., NAN]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]]).to(dtype)
    loss = value_loss(values, t([[9., 9.], [9., INF]]), t([[0., 5.], [2., NAN]]), mask)
    near(loss, 5 / 6, "not the mean of ½ (v - R)²", {                    # ½ (1 + 4 + 0) / 3
        "the ½ is missing": 5 / 3, "divided by all slots, padding too": 5 / 8, "sum instead of mean": 5 / 2,
        "a true zero counted as missing": 5 / 4, "the absolute error": 1 / 2})
    backward(loss)
    near(values.grad, [[1 / 3, -2 / 3], [0, 0]], "the gradient is not (v - R) / n, and 0 on padding")


@pytest.mark.parametrize("value, old, target, clip, free, clipped, gradient, why", [
    (4., 2., 6., .5, 2., 6.125, 0., "v counts as 2½, which is farther from 6: ½·3½², no gradient"),
    (4., 2., 1., .5, 4.5, 1.125, 3., "v counts as 2½, which is nearer to 1: ½·3² is larger"),
    (0., 2., -2., .5, 2., 6.125, 0., "v counts as 1½, which is farther from -2: ½·3½², no gradient"),
    (0., 2., 3., .5, 4.5, 1.125, -3., "v counts as 1½, which is nearer to 3: ½·3² is larger"),
    (2.25, 2., 1., .5, .78125, .78125, 1.25, "v moved by ¼ only, nothing is clipped: ½·1¼²"),
    (4., 2., 6., 0., 2., 8., 0., "clip = 0 is not None: v counts as 2, ½·4²")])
def test_value_loss_clip(value, old, target, clip, free, clipped, gradient, why):
    """With a clip: the larger of the errors of v and of old + clamp(v - old, -clip, clip)."""
    values, loss = torch.tensor([[value, NAN]], dtype=torch.float64, requires_grad=True), max(free, clipped)
    result = value_loss(values, t([[old, NAN]]), t([[target, INF]]), torch.tensor([[1, 0]]), clip=clip)
    near(result, loss, why, {
        "the ½ is missing": 2 * loss, f"always the clipped error, or min and max swapped ({why})": clipped,
        f"clip is ignored, or min and max swapped, or v is not clipped around old_values ({why})": free})
    backward(result)
    near(values.grad, [[gradient, 0]], f"the gradient does not follow the larger error: {why}")


@pytest.mark.parametrize("clip", (None, 0.2))
def test_value_loss_refuses_bad_input(clip):
    """A mean over nothing, shapes that disagree, a negative clip."""
    refuses(lambda: value_loss(*torch.ones(4, 2, 3), clip=-.1), "clip")
    refuses(lambda: value_loss(*torch.zeros(4, 2, 3), clip))
    refuses_shapes(value_loss, 4, clip)


@pytest.mark.parametrize("module", (poad, envs))
def test_docstring_examples_are_true(module):
    """The examples in docstrings are run; poad's exercise functions have one each."""
    results = doctest.testmod(module)
    assert results.failed == 0, f"an example in {module.__name__}.py does not give what its docstring says"
    assert module is envs or results.attempted >= 8


NO_STEP = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")  # where ppo_update is replaced

# ------------------------------------------------------------------ helpers of the agent's tests

AGENT_WORDS = ["wait", "<unk>", *"the in bowl salad eat put ice - cream now you see p0 p1 s0 s1 s2 s3".split(), "<eos>"]
AGENT_PREFIX_MENU = ["eat ice-cream", "eat ice-cream now", "wait", "eat"]  # an entry begins another: eos or on
AGENT_MENU = ["put the salad in the bowl", "wait", "put the bowl in the salad", "eat ice-cream now"]
AGENT_PROMPTS = ["you", "you see the bowl", "you see the salad in the bowl", "you see the bowl", "you see wait wait"]
AGENT_MENUS = [AGENT_MENU, AGENT_PREFIX_MENU, AGENT_PREFIX_MENU, AGENT_MENU, ["eat the salad now"]]
ON_BOTH_LMS = pytest.mark.parametrize("kind", ("llama", "gpt2"))


def _agent(kind="llama", critic="head", spread=0.2, **options):
    """An agent with a random LM: `spread` of its weights .2 makes sharp distributions, .1 softer ones. Token 0 is a
    word and at the same time the pad token; the one word "ice-cream" is three tokens. The critic's last layer, zero at
    first, is made random."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(AGENT_WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="wait", unk_token="<unk>", eos_token="<eos>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            lm = LlamaForCausalLM(LlamaConfig(
                vocab_size=len(AGENT_WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, initializer_range=spread))
        else:
            lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(AGENT_WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                            initializer_range=spread))
        agent = LanguageAgent(lm, tokenizer, critic, **options)
        for p in agent.head.parameters():
            torch.nn.init.normal_(p)
    return agent


def _agent_ids(agent, text):
    return agent.tokenizer(text).input_ids


def _agent_read(agent, prompt, written, lm=None):
    """One plain forward pass, no padding, no cache: log p before every written token (L, V), and features (L, H)."""
    ids = _agent_ids(agent, prompt) + list(written)
    out = (lm or agent.lm)(input_ids=torch.tensor([ids]), output_hidden_states=True)
    before = slice(len(ids) - len(written) - 1, -1)
    return out.logits[0, before].log_softmax(-1), out.hidden_states[-1][0, before]


def _agent_oracle(agent, prompt, menu):
    """Brute force: {entry: (ids, log π of its tokens, their entropies)}, each token renormalised over the menu."""
    ids, found = {entry: _agent_ids(agent, entry) + [agent.tokenizer.eos_token_id] for entry in menu}, {}
    for entry, own in ids.items():
        steps = []
        for j, log_p in enumerate(_agent_read(agent, prompt, own)[0]):
            allowed = sorted({other[j] for other in ids.values() if other[:j] == own[:j]})
            log_pi = log_p[allowed].log_softmax(-1)
            steps.append((log_pi[allowed.index(own[j])], -(log_pi.exp() * log_pi).sum()))
        found[entry] = own, *map(torch.stack, zip(*steps))
    return found


def _agent_raw(agent, prompt, entry):
    """Σ log p of an entry, unrestricted and without eos."""
    ids = _agent_ids(agent, entry)
    return _agent_read(agent, prompt, ids)[0][range(len(ids)), ids].sum()


def _agent_log_policy(agent, prompt, menu, policy):
    """Brute force: log π of every menu entry, (A,)."""
    if policy in ("token", "action"):
        return torch.stack([logp.sum() for _, logp, _ in _agent_oracle(agent, prompt, menu).values()])
    words = torch.tensor([len(entry.split()) if policy == "twosome" else 1 for entry in menu])
    return (torch.stack([_agent_raw(agent, prompt, entry) for entry in menu]) / words).log_softmax(0)


def _agent_near(actual, expected, hint, tol=1e-4):
    actual, expected = (torch.as_tensor(x, dtype=torch.float32).detach() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{hint}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.allclose(actual, expected, rtol=tol, atol=tol), f"{hint}: got {actual}, expected {expected}"


def _agent_rng(seed=0):
    return torch.Generator().manual_seed(seed)


def _agent_refuses(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(w in str(error.value) for w in words), f"the message should say {words}, but is: {error.value}"


class _AgentEnv:
    """Reads "p<player> s<clock>"; an episode has `limit` steps, then it is over, cut, or both; an action pays what
    `pays` says. `ended` holds, for each finished episode, whether it counts as a success."""
    def __init__(self, pays=lambda action: 0.0, limit=1, end="over", player=0, menu=AGENT_MENU, wins=lambda: True):
        self.pays, self.limit, self.end, self.player, self.menu, self.wins = pays, limit, end, player, menu, wins

    def reset(self, seed=None):
        self.clock = 0
        return f"p{self.player} s0", {"menu": self.menu}

    def step(self, action):
        assert action in self.menu, f"{action!r} is not in the menu"
        self.clock, over = self.clock + 1, self.clock + 1 >= self.limit
        info = {"menu": self.menu} | ({"success": self.wins()} if over else {})
        return (f"p{self.player} s{self.clock}", self.pays(action), over and self.end != "cut",
                over and self.end != "over", info)


def _agent_rollout(agent, env_fn, config):
    """What `train` hands to `ppo_update`: (actions, menus, rewards, done, last values)."""
    with mock.patch.object(poad, "ppo_update", return_value={}) as update:
        next(train(agent, env_fn, config))
    return update.call_args.args[2]


# ------------------------------------------------------------------ menus


def test_menu_logp_by_hand():
    """log π over the allowed tokens, -inf elsewhere, in float32."""
    logits, allowed = torch.tensor([[0.0, math.log(3), math.log(4)]]), torch.tensor([[True, True, False]])
    near(menu_logp(logits, allowed), [[math.log(1 / 4), math.log(3 / 4), -INF]], "odds 1 : 3 among the allowed", {
        "not renormalised over the menu": [[math.log(1 / 8), math.log(3 / 8), -INF]],
        "the menu is ignored": [[math.log(1 / 8), math.log(3 / 8), math.log(1 / 2)]],
        "what is not allowed must be -inf, not 0": [[math.log(1 / 4), math.log(3 / 4), 0]],
        "a logit of 0 is a choice like another: use -inf for what is not allowed":
            [[math.log(1 / 5), math.log(3 / 5), math.log(1 / 5)]],
        "only the forbidden tokens are allowed": [[-INF, -INF, 0]],
        "probabilities, not their logarithms": [[1 / 4, 3 / 4, 0]]}, tol=1e-6)
    near(menu_logp(logits, None), [[math.log(1 / 8), math.log(3 / 8), math.log(1 / 2)]], "None allows all", tol=1e-6)
    near(menu_logp(logits.repeat(2, 1), torch.tensor([[1, 1, 0], [0, 1, 0]])).exp(), [[1 / 4, 3 / 4, 0], [0, 1, 0]],
         "each row has its own menu; one choice left has probability 1", tol=1e-6)
    near(menu_logp(torch.tensor([100., 100.]), None), [-math.log(2)] * 2, "exp overflows for large logits", tol=1e-4)
    logits.requires_grad_()
    backward(menu_logp(logits, allowed)[0, 0])
    near(logits.grad, [[1 - 1 / 4, -3 / 4, 0]], "not the gradient of log π, and 0 where nothing is allowed", tol=1e-6)
    for kind in (torch.bfloat16, torch.float64):
        assert menu_logp(logits.to(kind), allowed).dtype == torch.float32, "log-probs must be float32, of any LM"


def test_menu_trie_by_hand():
    tokenizer, eos = _agent().tokenizer, AGENT_WORDS.index("<eos>")
    eat, ice, dash, cream, now = map(AGENT_WORDS.index, "eat ice - cream now".split())
    entries, trie = menu_trie(tokenizer, ("eat", "eat ice-cream", "wait", "eat now"))
    assert list(entries) == [(eat, eos), (eat, ice, dash, cream, eos), (0, eos), (eat, now, eos)], "eos ends an entry"
    assert {prefix: set(after) for prefix, after in trie.items()} == {
        (): {eat, 0}, (0,): {eos}, (eat,): {eos, ice, now}, (eat, now): {eos}, (eat, ice): {dash},
        (eat, ice, dash): {cream}, (eat, ice, dash, cream): {eos}}, "after a prefix: all that some entry goes on with"
    _agent_refuses(lambda: menu_trie(tokenizer, ()), "menu", "empty")
    _agent_refuses(lambda: menu_trie(tokenizer, ("eat", "wait", "eat")), "menu", "twice")
    _agent_refuses(lambda: menu_trie(tokenizer, ("eat", "")), "menu", "empty")
    _agent_refuses(lambda: menu_trie(tokenizer, ("ice-cream", "ice - cream")), "menu")  # the same tokens: same action


# ------------------------------------------------------------------ act, evaluate, score, values


@ON_BOTH_LMS
def test_act_and_evaluate_equal_brute_force_over_the_menu(kind):
    agent, copies, eos = _agent(kind, spread=0.15), 40, AGENT_WORDS.index("<eos>")
    prompts, menus = AGENT_PROMPTS * copies, AGENT_MENUS * copies
    actions = agent.act(prompts, menus, generator=_agent_rng())
    logp, entropy, values = agent.evaluate(actions, menus)
    _agent_near(logp, actions.logp, "evaluate under the same weights must repeat what act stored: the ratio is 1")
    _agent_near(values, actions.values, "evaluate must repeat the values that act stored")
    oracles = [_agent_oracle(agent, *pair) for pair in zip(AGENT_PROMPTS, AGENT_MENUS)]
    for b, oracle in enumerate(oracles * copies):
        assert tuple(actions.prompt_ids[b]) == tuple(_agent_ids(agent, prompts[b])), "prompt_ids: unpadded"
        own, expected, uncertain = oracle[actions.text[b]]
        mask = actions.mask[b]
        assert mask.sum() == len(own) and mask[:len(own)].all(), "the mask is 1 on the action's tokens, eos included"
        assert actions.ids[b, mask].tolist() == own and own[-1] == eos, "ids must spell the text, and end with eos"
        _agent_near(logp[b, mask], expected, f"log π of {actions.text[b]!r} after {prompts[b]!r} over the trie")
        _agent_near(entropy[b, mask], uncertain, "entropy is that of the renormalised distribution")
        forced = uncertain == 0
        assert not logp[b, mask][forced].any() and not entropy[b, mask][forced].any(), "forced: log π = 0, H = 0"
        assert not any(x[b, ~mask].any() for x in (logp, entropy, values)), "padding is zero"
    for b, oracle in enumerate(oracles):
        seen = {actions.text[i]: logp[i].sum().exp().item() for i in range(b, len(prompts), len(oracles))}
        rare = sum(p[1].sum().exp().item() for entry, p in oracle.items() if entry not in seen)
        assert abs(sum(seen.values()) + rare - 1) < 1e-4 and rare < 0.1, "Π_j π(w_j) summed over the menu must be 1"
    eat = next(b for b, text in enumerate(actions.text) if text[:3] == "eat" and menus[b] is AGENT_PREFIX_MENU)
    assert entropy[eat, 1] > 0 > logp[eat, 1], "where an entry begins another, eos is a real choice"


@pytest.mark.parametrize("policy", ("token", "action", "glam", "twosome"))
def test_act_samples_what_it_says(policy):
    agent, prompt, n = _agent(spread=0.1), AGENT_PROMPTS[1], 2000
    expected = _agent_log_policy(agent, prompt, AGENT_PREFIX_MENU, policy)
    actions = agent.act([prompt] * n, [AGENT_PREFIX_MENU] * n, policy, generator=_agent_rng(1))
    for entry, p in zip(AGENT_PREFIX_MENU, expected.exp().tolist()):
        share = actions.text.count(entry) / n
        sigma = math.sqrt(p * (1 - p) / n)
        assert abs(share - p) <= 4 * sigma, f"{policy} wrote {entry!r} {share:.3f} of the time, but π is {p:.3f}"
    logp, entropy, values = agent.evaluate(actions, [AGENT_PREFIX_MENU] * n, policy)
    shape = tuple(actions.mask.shape) if policy == "token" else (n, 1)
    assert tuple(actions.logp.shape) == tuple(logp.shape) == tuple(values.shape) == shape, f"shapes of {policy}"
    _agent_near(actions.logp, logp, "stored and evaluated log π agree")
    _agent_near(logp.sum(1), expected[[AGENT_PREFIX_MENU.index(x) for x in actions.text]], f"log π(a|o) of {policy}")
    if policy in ("glam", "twosome"):
        _agent_near(entropy, -(expected.exp() * expected).sum().expand(n, 1), "entropy over the menu")
    greedy = agent.act([prompt], [AGENT_MENU], policy, greedy=True).text[0]
    if policy in ("glam", "twosome"):
        best = _agent_log_policy(agent, prompt, AGENT_MENU, policy).argmax()
        assert greedy == AGENT_MENU[best], "greedy is not the likeliest entry"
    batch = [prompt] * 50, [AGENT_PREFIX_MENU] * 50, policy
    one, same, other = (agent.act(*batch, generator=_agent_rng(seed)).text for seed in (1, 1, 2))
    assert one == same, "the same generator seed must write the same actions"
    assert one != other, "another seed must write others"


@ON_BOTH_LMS
def test_free_text(kind):
    agent, eos, prompts = _agent(kind, max_new_tokens=6), AGENT_WORDS.index("<eos>"), AGENT_PROMPTS * 8
    actions = agent.act(prompts, generator=_agent_rng())
    logp, entropy, _ = agent.evaluate(actions)
    stopped = 0
    for b, prompt in enumerate(prompts):
        ids = actions.ids[b, actions.mask[b]].tolist()
        assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 6), "free text stops at eos or at max_new_tokens"
        stopped += ids[-1] == eos
        log_p = _agent_read(agent, prompt, ids)[0]
        _agent_near(logp[b, :len(ids)], log_p[range(len(ids)), ids], "free text: log p of a plain forward pass")
        _agent_near(entropy[b, :len(ids)], -(log_p.exp() * log_p).sum(-1), "free text: entropy over the vocabulary")
        words = [AGENT_WORDS[w] for w in ids if w not in (eos, 0)]  # the special tokens are not text
        assert actions.text[b].replace("<unk>", "").split() == [w for w in words if w != "<unk>"], "the text is its ids"
    assert 0 < stopped < len(prompts), "the test wants both ends: eos and the limit"
    _agent_near(actions.logp, logp, "stored and evaluated log p agree")
    _agent_near(agent.evaluate(actions, policy="action")[0], logp.sum(1, True), '"action" is the sum over tokens')
    assert agent.act(prompts, generator=_agent_rng()).text == actions.text, "the same seed must write the same"
    greedy = agent.act(AGENT_PROMPTS, greedy=True)
    for b, prompt in enumerate(AGENT_PROMPTS):
        ids = greedy.ids[b, greedy.mask[b]].tolist()
        assert _agent_read(agent, prompt, ids)[0].argmax(-1).tolist() == ids, "greedy writes the likeliest token"


class _Bigram(torch.nn.Module):
    """A causal LM to compute by hand with: the chances of the next word depend on the last word only."""
    words = ["<eos>", "you", "eat", "ice", "-", "cream", "go", "now"]
    after = {"you": dict(eat=8, go=4, now=2), "eat": {"ice": 8, "<eos>": 4}, "ice": {"-": 8}, "-": {"cream": 4},
             "cream": {"<eos>": 8}, "go": {"<eos>": 8, "eat": 2}, "now": {"go": 1, "eat": 4}}     # in sixteenths

    def __init__(self):
        super().__init__()
        table = torch.zeros(8, 8)
        for i, row in enumerate(self.after.get(word, {}) for word in self.words):
            table[i] = (16 - sum(row.values())) / (8 - len(row))         # the rest is spread over the other words
            for follower, sixteenths in row.items():
                table[i, self.words.index(follower)] = sixteenths
        self.logits = torch.nn.Parameter((table / 16).log())
        self.config, self.device = SimpleNamespace(hidden_size=1, vocab_size=100), torch.device("cpu")

    def forward(self, input_ids, logits_to_keep=0, **_):
        logits = self.logits[input_ids][:, -logits_to_keep:]             # (R, K, V); 0 keeps all
        return SimpleNamespace(logits=logits, hidden_states=[logits[..., :1]], past_key_values=None)


def _bigram_scores(policy):
    """The scores of an agent with that LM, for two prompts and their menus."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_Bigram.words)}, unk_token="now"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    agent = LanguageAgent(_Bigram(), PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="now"))
    scores = agent.score(["you", "go now"], [["eat ice-cream", "go", "eat"], ["go"]], policy)
    assert [len(x) for x in scores] == [3, 1], f"one tensor per menu, one number per entry, not {scores}"
    return torch.cat(list(scores)), agent.lm


def test_score_glam_by_hand():
    """GLAM: Σ log p of an entry's tokens, over the whole vocabulary, each given all that stands before it."""
    # p(eat|you) = p(ice|eat) = p(-|ice) = ½, p(cream|-) = ¼; p(go|you) = ¼, p(go|now) = 1/16; p(eos|eat) = ¼, else ½
    scores, lm = _bigram_scores("glam")
    stay = t(lm.logits.softmax(-1).diagonal())                           # p(word|the same word)
    near(scores.exp(), [1 / 32, 1 / 4, 1 / 2, 1 / 16], "not Σ log p of the entry's tokens", {
        "eos is counted": [1 / 64, 1 / 8, 1 / 8, 1 / 32],
        "restricted to the menu": [4 / 9, 1 / 3, 2 / 3, 1], "restricted to the menu, eos too": [4 / 9, 1 / 3, 2 / 9, 1],
        "mean over tokens, not their sum": [2 ** -1.25, 1 / 4, 1 / 2, 1 / 16],
        "divided by the number of words: that is TWOSOME": [2 ** -2.5, 1 / 4, 1 / 2, 1 / 16],
        "the prompt is not read: log p starts at the second token": [1 / 16, 1, 1, 1],
        "only the last token": [1 / 4, 1 / 4, 1 / 2, 1 / 16], "only the first token": [1 / 2, 1 / 4, 1 / 2, 1 / 16],
        "normalised over the menu: that is log π, not the score": [1 / 25, 8 / 25, 16 / 25, 1],
        "log-prob of the wrong position: what follows the token, not the token":
            [stay[2:6].prod(), stay[6], stay[2], stay[6]],
        "probabilities added, not their logarithms": t([1.75, .25, .5, .0625]).exp()}, tol=1e-5)
    backward(scores.sum())
    # go after now: 1 - 1/16 at go and -p elsewhere
    near(lm.logits.grad[7], torch.eye(8)[6] - lm.logits[7].softmax(-1), "the LM gets no gradient through the scores",
         tol=1e-5)


def test_score_twosome_by_hand():
    """TWOSOME: GLAM's sum divided by the number of words; "ice-cream" is one word and three tokens."""
    right = t([1 / 32, 1 / 4, 1 / 2, 1 / 16]).log() / t([2, 1, 1, 1])
    near(_bigram_scores("twosome")[0], right, "not Σ log p / words", {
        "not divided by the number of words": t([1 / 32, 1 / 4, 1 / 2, 1 / 16]).log(),
        "word count for token count: divided by the number of tokens": t([2 ** -1.25, 1 / 4, 1 / 2, 1 / 16]).log(),
        "divided by the number of tokens and eos": t([1 / 2, 2 ** -1, 2 ** -.5, 2 ** -2]).log(),
        "divided by the number of characters": t([1 / 32, 1 / 4, 1 / 2, 1 / 16]).log() / t([13, 2, 3, 2]),
        "eos is counted": t([1 / 64, 1 / 8, 1 / 8, 1 / 32]).log() / t([2, 1, 1, 1]),
        "divided by the words of the prompt too": t([1 / 32, 1 / 4, 1 / 2, 1 / 16]).log() / t([3, 2, 2, 3])}, tol=1e-5)


def test_score_token_by_hand():
    """ "token": Σ log π, each token restricted to what the menu allows, eos included; over a menu it sums to 1."""
    # you: eat ½, go ¼, so π(eat) = ⅔, π(go) = ⅓; eat: ice ½, eos ¼, so π(ice) = ⅔, π(eos) = ⅓; the rest is forced
    near(_bigram_scores("token")[0].exp(), [4 / 9, 1 / 3, 2 / 9, 1], "not Σ log π over the menu's tokens", {
        "eos is left out, but after \"eat\" it is a choice": [4 / 9, 1 / 3, 2 / 3, 1],
        "not restricted to the menu": [1 / 64, 1 / 8, 1 / 8, 1 / 32],
        "not restricted to the menu, eos left out": [1 / 32, 1 / 4, 1 / 2, 1 / 16],
        "normalised once for the whole entry, not token by token": [1 / 17, 8 / 17, 8 / 17, 1],
        "normalised once for the whole entry, eos left out": [1 / 25, 8 / 25, 16 / 25, 1],
        "divided by the number of words": [2 / 3, 1 / 3, 2 / 9, 1]}, tol=1e-5)


@ON_BOTH_LMS
def test_score_equals_brute_force_and_trains_the_lm(kind):
    agent = _agent(kind)
    fit = list(agent.lm.parameters())
    scores = agent.score(AGENT_PROMPTS, AGENT_MENUS)
    expected = [torch.stack([_agent_raw(agent, prompt, entry) for entry in menu])
                for prompt, menu in zip(AGENT_PROMPTS, AGENT_MENUS)]
    for got, want in zip(scores, expected, strict=True):
        _agent_near(got, want, "score is Σ log p over the words, unrestricted and without eos")
    weights = torch.arange(1.0, 18)  # 4 + 4 + 4 + 4 + 1 entries
    for x, y in zip(*(torch.autograd.grad(torch.cat(s) @ weights, fit) for s in (scores, expected))):
        _agent_near(x, y, "gradient of score, through the shared prompt too", 1e-3)
    actions = agent.act(AGENT_PROMPTS, AGENT_MENUS, generator=_agent_rng())
    want = sum(_agent_oracle(agent, *x)[text][1].sum() for *x, text in zip(AGENT_PROMPTS, AGENT_MENUS, actions.text))
    got = agent.evaluate(actions, AGENT_MENUS)[0].sum()
    for x, y in zip(*(torch.autograd.grad(s, fit) for s in (got, want))):
        _agent_near(x, y, "gradient of evaluate", 1e-3)


def test_a_prompt_is_read_once_for_its_whole_menu():
    agent, long, tokens = _agent(), "you see the salad in the bowl " * 5, []
    agent.lm.register_forward_pre_hook(
        lambda lm, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True)

    def read(call):
        tokens.clear()
        call()
        return sum(tokens)
    most = len(_agent_ids(agent, long)) + 4 * 6  # the prompt, and four entries of up to 6 tokens
    assert read(lambda: agent.score([long], [AGENT_MENU])) <= most, "the prompt must be read once, not once per entry"
    for policy in ("token", "glam"):
        one, many = (agent.act([long] * n, [AGENT_MENU] * n, policy, greedy=True) for n in (1, 9))
        assert read(lambda: agent.evaluate(many, [AGENT_MENU] * 9, policy)) == read(
            lambda: agent.evaluate(one, [AGENT_MENU], policy)), f"{policy}: equal rows must be computed once"


@ON_BOTH_LMS
def test_calls_leave_no_trace(kind):
    """A forward pass on a cache changes it; GPT-2's dropout is on by default; twice must give the same."""
    agent = _agent(kind)
    agent.train()
    first, second = ([*agent.score(AGENT_PROMPTS, AGENT_MENUS), *agent.evaluate(
        agent.act(AGENT_PROMPTS, AGENT_MENUS, generator=_agent_rng()), AGENT_MENUS), agent.values(AGENT_PROMPTS)]
        for _ in range(2))
    for x, y in zip(first, second):
        assert torch.equal(x, y), "the second call differs: dropout is on, or a shared cache was changed"


@ON_BOTH_LMS
@pytest.mark.parametrize("critic", ("head", "copy"))
def test_values(kind, critic):
    agent = _agent(kind, critic)
    own = [p for name, p in agent.named_parameters() if not name.startswith(("lm.", "head."))]
    assert bool(own) == (critic == "copy"), 'the critic "copy" has its own LM, "head" has none'
    with torch.no_grad():
        for p in own:
            p.mul_(1.1)  # so that the critic's LM is no longer the policy's
    actions = agent.act(AGENT_PROMPTS, AGENT_MENUS, generator=_agent_rng())
    values = agent.evaluate(actions, AGENT_MENUS)[2]
    for b, prompt in enumerate(AGENT_PROMPTS):
        ids = actions.ids[b, actions.mask[b]].tolist()
        features = _agent_read(agent, prompt, ids, agent.critic_lm)[1]
        _agent_near(values[b, :len(ids)], agent.head(features)[:, 0], "V(o, w^<j) reads what is *before* token j", 1e-3)
    _agent_near(agent.values(AGENT_PROMPTS), values[:, 0], "V(o) is the value before the first token")
    _agent_near(agent.evaluate(actions, AGENT_MENUS, "glam")[2][:, 0], values[:, 0], "V(o), also for whole actions")
    values.square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.lm.parameters()), "the critic trains the policy"
    assert all(p.grad is not None and p.grad.any() for p in agent.head.parameters()), "the head must learn"
    assert not own or sum(p.grad is not None and bool(p.grad.any()) for p in own) > 5, "the copy must learn"
    assert not LanguageAgent(agent.lm, agent.tokenizer).values(AGENT_PROMPTS).any(), "V = 0 before anything is learnt"


def test_agent_refuses_in_words():
    agent, menu = _agent(), [AGENT_MENU]
    _agent_refuses(lambda: agent.act(["you"], menu, "best"), "policy", "best", "twosome")
    _agent_refuses(lambda: agent.act(["you"], [[]]), "menu", "empty")
    _agent_refuses(lambda: agent.score(["you"], [["eat", "eat"]]), "menu", "twice")
    _agent_refuses(lambda: agent.score(["you"], menu, "best"), "policy", "best")
    for policy in ("glam", "twosome"):
        _agent_refuses(lambda: agent.act(["you"], None, policy), policy, "menu")
    _agent_refuses(lambda: agent.act(["you", "see"], menu), "2", "1", "menu")
    _agent_refuses(lambda: agent.act([]), "prompt")
    _agent_refuses(lambda: agent.act(["you", ""]), "prompt")
    _agent_refuses(lambda: _agent(critic="tail"), "critic", "tail", "head", "copy")
    _agent_refuses(lambda: _agent(max_new_tokens=0), "max_new_tokens")


# ------------------------------------------------------------------ Config, assign, train


def test_methods_and_config():
    assert list(METHODS) == ["glam", "twosome", "action", "ntpo", "poad"]

    def both(*args, **options):
        config = Config(*args, gamma=0.9, lam=0.8, **options)
        return config.gamma_token, config.lam_token
    assert both() == both("poad") == (1, 1), "POAD, the default: γ_w = λ_w = 1"
    assert both("ntpo") == (0.9, 0.8), "naive: γ_w = γ and λ_w = λ, of this Config"
    assert both("poad", lam_token=0.8) == (1, 0.8) and both("ntpo", lam_token=1.0) == (0.9, 1), "γ_w, λ_w can be set"
    assert both("ntpo", gamma_token=0.0) == (0, 0.8), "0 is a value, not a missing one"
    assert Config(lr=0.5).lr == 0.5 and Config(lr=0.0).lr == 0 and Config().lr > 0, "lr: the method's own unless given"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gamma = 0.5
    _agent_refuses(lambda: Config("ppo"), "method", "ppo", "poad", "twosome")
    for name, x in itertools.product(("gamma", "lam", "gamma_token", "lam_token"), (-0.1, 1.1, math.nan)):
        _agent_refuses(lambda: Config(**{name: x}), name)
    _agent_refuses(lambda: train(_agent(), partial(make, "orders", slots=6), Config("glam")).__next__(), "glam", "menu")


def test_assign_in_small_numbers():
    """Two players, two actions each, γ = λ = ½. The return of a token is the λ-return: at an action's end
    r + γ ((1 − λ) V' + λ G'), inside it the same with γ_w, λ_w and r = 0, at an episode's end r alone."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    values = torch.tensor([[2, 4, NAN], [1, NAN, NAN], [0, 2, 4], [5, 3, NAN]])
    outcome = torch.tensor([[1., 2], [0, -1]]), torch.tensor([[1., 0], [0, 0]]), torch.tensor([8., 4])
    # player 0: 1, as the episode ends; 2 + ½·8 = 6 | player 1: -1 + ½·4 = 1, and before it 0 + ½ (½·5 + ½·1) = 1½
    advantages, returns = assign(Config(gamma=.5, lam=.5), mask, values, *outcome)
    near(returns, [[1, 1, 0], [6, 0, 0], [1.5, 1.5, 1.5], [1, 1, 0]], "not the returns of each player's stream", {
        "the reward was given to every token": [[2, 1, 0], [6, 0, 0], [1.25, 1.25, 1.25], [0, 1, 0]],
        "the reward was given to the first token": [[1, 0, 0], [6, 0, 0], [1.5, 1.5, 1.5], [1, 2, 0]],
        "`done` is ignored: bootstrapped across an episode's end": [[2.75, 2.75, 0], [6, 0, 0], [1.5] * 3, [1, 1, 0]],
        "an action ends at its last written slot, not in the last column":
            [[8, 8, 0], [8, 0, 0], [2.25] * 3, [4, 4, 0]],
        "lam was applied inside the action": [[2.5, 1, 0], [6, 0, 0], [2.4375, 2.875, 1.75], [2, 1, 0]],
        "lam and lam_token swapped": [[2.5, 1, 0], [6, 0, 0], [2.25, 2.5, 1], [2, 1, 0]],
        "gamma and gamma_token swapped": [[.5, 1, 0], [10, 0, 0], [.8125, 1.625, 3.25], [1.5, 3, 0]],
        "gamma was applied inside the action": [[.5, 1, 0], [6, 0, 0], [.34375, .6875, 1.375], [.5, 1, 0]],
        "rewards and done of other rows: row b · T + t is step t of player b":
            [[1, 1, 0], [4, 0, 0], [3.5] * 3, [1, 1, 0]],
        "players mixed: row b · T + t is step t of player b": [[1, 1, 0], [3.5, 0, 0], [4, 4, 4], [1, 1, 0]],
        "the players are one stream: a row of `gae` is one player": [[1, 1, 0], [2.375, 0, 0], [1.5] * 3, [1, 1, 0]],
        "each action is a stream of its own: its player's next one follows": [[1, 1, 0], [6, 0, 0], [2] * 3, [1, 1, 0]],
        "last_values ignored": [[1, 1, 0], [2, 0, 0], [1, 1, 1], [-1, -1, 0]]}, tol=1e-6)
    near(advantages, [[-1, -3, 0], [5, 0, 0], [1.5, -.5, -2.5], [-4, -2, 0]], "advantages are returns - values", {
        "returns and advantages swapped": [[1, 1, 0], [6, 0, 0], [1.5, 1.5, 1.5], [1, 1, 0]]}, tol=1e-6)
    # γ_w = ½, λ_w = 0: inside an action ½ of the next token's value
    _, returns = assign(Config(gamma=.5, lam=.5, gamma_token=.5, lam_token=0.), mask, values, *outcome)
    near(returns, [[2, 1, 0], [6, 0, 0], [1, 2, 1.625], [1.5, 1, 0]], "inside an action γ_w and λ_w", {
        "gamma_token ignored": [[4, 1, 0], [6, 0, 0], [2, 4, 2], [3, 1, 0]],
        "lam_token ignored": [[.5, 1, 0], [6, 0, 0], [.34375, .6875, 1.375], [.5, 1, 0]]}, tol=1e-6)


def test_assign_by_hand():
    """Two players, two actions each; γ = .9, λ = .8. The return of a token is the λ-return
    G = r + γ ((1 − λ) V' + λ G') at an action's end, the same with γ_w, λ_w and r = 0 inside."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    values = torch.tensor([[3, 5, math.nan], [1, 2, 4], [0, 2, 3], [1, 7, math.nan]])
    outcome = torch.tensor([[1.0, 2], [0, -1]]), torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([10.0, 4])

    def back(r, v, g):
        return r + 0.9 * (0.2 * v + 0.8 * g)
    last = 2 + 0.9 * 10, -1 + 0.9 * 4  # player 0's first action ends an episode: G = r = 1
    whole = [1, last[0], back(0, 1, last[1]), last[1]]
    begin = back(0, 7, last[1])  # naive: every token is a step, discounted and decayed
    inner, first = back(0, 4, last[0]), back(0, 1, begin)
    naive = [[back(0, 5, 1), 1, 0], [back(0, 2, inner), inner, last[0]],
             [back(0, 2, back(0, 3, first)), back(0, 3, first), first], [begin, last[1], 0]]
    for method in METHODS:
        level = slice(None) if METHODS[method]["policy"] == "token" else slice(1)
        expected = torch.tensor(naive if method == "ntpo" else [[g] * 3 for g in whole])[:, level]
        m, v = mask[:, level], values[:, level]
        advantages, returns = assign(Config(method, gamma=0.9, lam=0.8), m, v, *outcome)
        _agent_near(returns, expected.where(m, 0), f"{method}: returns; episode end, padding, players' order", 1e-5)
        _agent_near(advantages, (expected - v).where(m, 0), f"{method}: advantage = return − value", 1e-5)


@NO_STEP
@pytest.mark.parametrize("end", ("over", "cut", "both"))
def test_time_limit_is_not_a_termination(end):
    agent, config = _agent(), Config(n_envs=2, n_steps=2, gamma=0.9, lam=0.8)
    number = itertools.count()
    actions, menus, rewards, done, last = _agent_rollout(
        agent, lambda: _AgentEnv(lambda action: 0.5, end=end, player=next(number)), config)
    after = agent.values(["p0 s1", "p1 s1"])[:, None].expand(2, 2) if end == "cut" else torch.zeros(2, 2)
    assert done.bool().all(), "an episode that is over or cut is done: no credit crosses the reset"
    _agent_near(rewards, 0.5 + 0.9 * after, "a cut episode pays r + γ V(o'), o' from before the reset; else r")
    _agent_near(last, agent.values(["p0 s0", "p1 s0"]), "last values are those of the present observations")
    returns = assign(config, actions.mask, actions.values, rewards, done, last)[1]
    _agent_near(returns, rewards.reshape(4, 1) * actions.mask, "every token's return is what its own episode pays")


@NO_STEP
def test_rollout_keeps_a_player_together():
    agent, number = _agent(), itertools.count()
    actions, menus, rewards, done, _ = _agent_rollout(
        agent, lambda: _AgentEnv(lambda action: len(action), 2, player=next(number)), Config(n_envs=2, n_steps=3))
    seen = [agent.tokenizer.decode(ids) for ids in actions.prompt_ids]
    assert seen == ["p0 s0", "p0 s1", "p0 s0", "p1 s0", "p1 s1", "p1 s0"], "rows are player by player, step by step"
    assert [len(text) for text in actions.text] == rewards.flatten().tolist(), "rewards stand in the rows' order"
    assert done.tolist() == [[0, 1, 0]] * 2 and menus == [AGENT_MENU] * 6


# choices are the first two tokens; GLAM would hardly ever write the longer ones
AGENT_TWO_CHOICES = ["eat salad", "eat ice-cream now", "put the bowl", "put salad in bowl"]
AGENT_SHORT = ["eat salad", "eat bowl", "put ice", "put salad"]


@NO_STEP
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_of_whole_actions(method):
    """One-step episodes and V = 0: an action's credit is its reward r, for naive (γλ)^(tokens to come) r. The gradient
    must be that of −mean_b Σ_j Â_bj log π(w_j): a sum over an action's tokens, averaged over actions, with Â
    normalised over choices only, so that forced words count nowhere; entropy likewise."""
    agent, policy = LanguageAgent(_agent(spread=0.1).lm, _agent().tokenizer), METHODS[method]["policy"]
    menu = AGENT_SHORT if method == "glam" else AGENT_TWO_CHOICES
    config = Config(method, n_envs=12, n_steps=1, epochs=1, minibatches=1, max_grad_norm=1e9, entropy_coef=0.0)
    pays = dict(zip(menu, (1.0, -0.5, 0.25, 2.0)))
    fit = list(agent.lm.parameters())
    for coef in (0.0, 1.0):
        config = dataclasses.replace(config, entropy_coef=coef)
        env_fn = partial(_AgentEnv, lambda action: pays[action] * (coef == 0), menu=menu)
        rollout = _agent_rollout(agent, env_fn, config)
        text, oracle = rollout[0].text, _agent_oracle(agent, "p0 s0", menu)
        assert len(set(text)) > 2, "the test wants several actions"
        log_pi = dict(zip(menu, _agent_log_policy(agent, "p0 s0", menu, policy)))
        logp = torch.stack([oracle[x][1][:2] if policy == "token" else log_pi[x][None] for x in text])
        decay = (0.95 * 0.95) ** torch.tensor([[len(oracle[x][0]) - 1.0 - j for j in (0, 1)] for x in text])
        credit = torch.tensor([[pays[x]] for x in text]) * (decay if method == "ntpo" else torch.ones_like(logp))
        credit = (credit - credit.mean()) / credit.std(correction=0)
        whole = torch.stack(list(log_pi.values()))
        entropy = (-(whole.exp() * whole).sum() if policy in ("glam", "twosome")
                   else torch.stack([oracle[x][2].sum() for x in text]).mean())
        loss = -(credit * logp).sum(1).mean() if coef == 0 else -entropy
        expected = torch.autograd.grad(loss, fit)
        optimizer = torch.optim.SGD([{"params": fit}, {"params": agent.head.parameters()}], lr=0.0)
        info = poad.ppo_update(agent, optimizer, rollout, config, _agent_rng())
        assert abs(info["entropy"] - entropy.item()) < 1e-3, "the entropy of an action is a sum over its tokens"
        for p, g in zip(fit, expected):
            _agent_near(p.grad, g, f"{method}: gradient of the {'entropy' if coef else 'policy loss'}", 1e-3)


def _agent_pays():
    return _AgentEnv(lambda action: float(len(action)), 2)


def test_train_repeats_itself_and_begins_at_ratio_one():
    tiny = Config(updates=2, n_envs=3, n_steps=4, epochs=1, minibatches=2)
    runs = [list(train(_agent(), _agent_pays, dataclasses.replace(tiny, seed=seed))) for seed in (0, 0, 1)]
    a, b, c = ([{k: x for k, x in m.items() if k != "seconds"} for m in run] for run in runs)
    assert a == b, "the same seed must give the same run"
    assert a != c, "another seed must give another run"
    agent = _agent()
    before = copy.deepcopy(agent.state_dict())
    for m in train(agent, _agent_pays, dataclasses.replace(tiny, lr=0.0, critic_lr=0.0)):
        assert abs(m["kl"]) < 1e-6 and m["clip_fraction"] == 0, "ratio is 1 while nothing was learnt"
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items()), "lr = 0 must change nothing"
    list(train(agent, _agent_pays, tiny))
    moved = {name.split(".")[0] for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"lm", "head"}, f"both the LM and the critic must learn, not only {moved}"


def test_train_metrics():
    number = itertools.count()  # of the episode: the last 50 of 120 are successes
    env_fn = partial(_AgentEnv, lambda action: 0.5, 2, wins=lambda: next(number) >= 70)
    config = Config(updates=2, n_envs=40, n_steps=3, epochs=1, minibatches=1)
    first, second = train(_agent(), env_fn, config)
    assert {"update", "env_steps", "return_mean", "success_rate", "seconds"} <= set(first)
    assert (first["update"], first["env_steps"], second["update"], second["env_steps"]) == (1, 120, 2, 240)
    assert second["success_rate"] == pytest.approx(0.5), "success_rate is over the last 100 episodes, of 120 here"
    assert second["return_mean"] == pytest.approx(1.0), "return_mean is the undiscounted sum of an episode's rewards"
    assert 0 < first["seconds"] <= second["seconds"]
    early = next(train(_agent(), env_fn, Config(n_envs=1, n_steps=1)))
    assert early["return_mean"] is None and early["success_rate"] is None, "None before an episode has ended"


@NO_STEP
def test_kl_stop_and_lr_decay():
    options = dict(updates=1, n_envs=4, n_steps=4, epochs=2, minibatches=2, lr=0.01)
    free, = train(_agent(), _agent_pays, Config(**options, kl_stop=None))
    stopped, = train(_agent(), _agent_pays, Config(**options, kl_stop=1e-6))
    assert free["minibatches"] == 4 and free["kl"] > 1e-6, "without kl_stop: epochs × minibatches"
    assert stopped["minibatches"] == 1, "the first minibatch has KL 0; the next is above kl_stop and must not be used"
    for decays in (False, True):
        seen = []
        with mock.patch.object(poad, "ppo_update", lambda agent, optimizer, *rest: seen.append(
                [group["lr"] for group in optimizer.param_groups]) or {}):
            list(train(_agent(), _agent_pays, Config(
                updates=4, n_envs=1, n_steps=1, lr=0.1, critic_lr=0.2, lr_decay=decays)))
        factors = (1, 0.75, 0.5, 0.25) if decays else (1, 1, 1, 1)
        _agent_near(seen, [[0.1 * x, 0.2 * x] for x in factors], "lr_decay: both step sizes fall linearly", 1e-6)


# ------------------------------------------------------------------ the tiny agent learns

AGENT_LUNCH = partial(make, "lunch")


@lru_cache
def _agent_lunch():
    return tiny_agent(AGENT_LUNCH, pretrain_steps=60, max_new_tokens=20)


def test_tiny_agent_is_reproducible_and_its_tokenizer_reads_every_menu():
    for name in ("lunch", "orders", "food"):
        env = make(name)
        agent = tiny_agent(partial(make, name), seed=3, pretrain_steps=0)
        for entry in env.reset()[1]["menu"]:
            assert agent.tokenizer.decode(_agent_ids(agent, entry)) == entry, "an entry must survive the tokenizer"
        assert agent.tokenizer("zebra").input_ids == [agent.tokenizer.unk_token_id], "an unknown word is <unk>"
        assert agent.values(["a zebra, unheard of"]).isfinite().all()
    noise = torch.get_rng_state()
    one, two, other = (tiny_agent(AGENT_LUNCH, seed, 2).state_dict() for seed in (0, 0, 1))
    assert torch.equal(noise, torch.get_rng_state()), "tiny_agent must leave torch's global generator alone"
    assert all(torch.equal(one[k], two[k]) for k in one), "the same seed must give the same weights"
    assert not torch.equal(one["lm.lm_head.weight"], other["lm.lm_head.weight"]), "another seed, other weights"


def test_tiny_agent_speaks_the_language():
    env, agent = AGENT_LUNCH(), _agent_lunch()
    obs, info = env.reset()
    env.step("put the salad in the bowl")
    written = agent.act([obs] * 50, generator=_agent_rng()).text
    known = sum(text in info["menu"] + env.menu() for text in written)
    assert known >= 20, f"free text should often be a sentence: {written}"
    scores, = agent.score([obs], [info["menu"]])
    per_token = scores / torch.tensor([len(_agent_ids(agent, action)) for action in info["menu"]])
    assert per_token.mean() > -1 > -3 > -math.log(len(agent.tokenizer)), "admissible words should be far above uniform"


def test_poad_learns_to_serve_and_naive_does_not():
    """From half and half: serving (17 words, pays 1.0) or eating (2 words, pays 0.7). Exact shares, not samples."""
    env, share = AGENT_LUNCH(), {}
    env.step("put the salad in the bowl")
    obs, menu = env.observe(), env.menu()

    def served(agent):
        with torch.no_grad():
            p = dict(zip(menu, _agent_log_policy(agent, obs, menu, "token").exp().tolist()))
        serve = next(x for x in menu if x.endswith("serve the salad"))
        return p[serve] / (p[serve] + p["eat it"])
    for method in ("poad", "ntpo"):
        agent = copy.deepcopy(_agent_lunch())
        share["before"] = served(agent)
        list(train(agent, AGENT_LUNCH, Config(method, updates=5, n_envs=8, n_steps=8, lr=1e-3)))
        share[method] = served(agent)
    assert 0.2 < share["before"] < 0.8 <= share["poad"], f"poad should learn to serve: {share}"
    assert share["ntpo"] < 0.2 < share["poad"], f"naive discounts every word and should serve less: {share}"


def test_micro_batches_add_up_to_the_whole_minibatch():
    menus = itertools.cycle((AGENT_MENU, AGENT_MENU, AGENT_MENU[:1]))  # now and then there is nothing to choose
    rollout = _agent_rollout(_agent(), lambda: _AgentEnv(lambda action: float(len(action)), 2, menu=next(menus)),
                             Config(n_envs=3, n_steps=4))
    found = []
    for size in (None, 5, 1):  # 12 actions: at once; 5, 5 and 2; one by one, of which some are forced
        agent, config = _agent(), Config(epochs=1, minibatches=1, micro_batch=size, max_grad_norm=1e9)
        stats = ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), rollout, config, _agent_rng())
        found.append((torch.cat([p.detach().flatten() for p in agent.parameters()]), stats))
    for size, (after, stats) in zip((5, 1), found[1:]):
        _agent_near(after, found[0][0], f"gradients of micro-batches of {size} do not add up to that of the minibatch")
        for name in ("kl", "clip_fraction", "entropy", "value_loss"):
            assert stats[name] == pytest.approx(found[0][1][name], abs=1e-4), f"{name} depends on micro_batch={size}"


def test_a_rollout_reads_nothing_twice():
    agent, read = _agent(), []
    agent.lm.register_forward_pre_hook(lambda lm, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    env = partial(_AgentEnv, limit=1)  # the same observation for ever
    players = [Player(env()) for _ in range(3)]
    calls = []
    for steps in (1, 6):
        read.clear()
        poad.collect(agent, players, Config(n_steps=steps, n_envs=3), _agent_rng(), [])
        calls.append(len(read))
    assert calls[0] == calls[1], f"one step takes {calls[0]} readings of the LM, six of the same {calls[1]}"
    list(poad.train(agent, env, Config(updates=2, n_envs=3, n_steps=2, lr=0.01)))  # asserts that nothing is outdated
    assert agent.memory is None, "what is remembered must not outlive the rollout: the weights change"


def test_greedy_players_in_one_place_write_once():
    agent, read = _agent(), []
    agent.lm.register_forward_pre_hook(lambda lm, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True)
    prompts = ["you", "it", "you", "you", "it"]
    menus = [AGENT_MENU, AGENT_MENU, AGENT_MENU, AGENT_PREFIX_MENU, AGENT_MENU]
    together = agent.act(prompts, menus, greedy=True)
    assert max(read) <= 3, f"three different situations, but {max(read)} rows were read"
    for b, (prompt, menu) in enumerate(zip(prompts, menus)):
        alone = agent.act([prompt], [menu], greedy=True)
        assert together.text[b] == alone.text[0], f"player {b} says {together.text[b]!r}, but alone {alone.text[0]!r}"
        _agent_near(together.logp[b].sum(), alone.logp.sum(), "greedy log-probability")


def test_long_readings_are_cut_into_parts():
    agent = _agent()
    prompts, menus = ["you", "it", "you now"], [AGENT_MENU, AGENT_PREFIX_MENU, AGENT_MENU]
    whole = [x.detach() for x in agent.score(prompts, menus)]
    with mock.patch.object(agent.lm.config, "vocab_size", 2**21):  # as if it were so large that few rows fit
        parts = agent.score(prompts, menus)
    for a, b in zip(whole, parts):
        _agent_near(b, a, "reading in parts changes the scores")


def test_bfloat16_computes_and_trains():
    agent, same = _agent(spread=0.1), _agent(spread=0.1)
    agent.bf16 = True
    a, b = (x.score(["you"], [AGENT_MENU])[0] for x in (agent, same))
    assert a.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.1, "bfloat16 is near float32, and not the same"
    assert all(p.dtype == torch.float32 for p in agent.parameters()), "the weights themselves stay float32"
    for m in train(agent, _agent_pays, Config(updates=2, n_envs=3, n_steps=4)):
        assert math.isfinite(m["kl"]) and math.isfinite(m["value_loss"])


# ------------------------------------------------------------------ checkpoints and evaluation


def _tiny(name, **options):
    env_fn = partial(envs.make, name, **options)
    return poad.tiny_agent(env_fn, pretrain_steps=2), env_fn


def _plain(metrics):
    return [{name: x for name, x in m.items() if name != "seconds"} for m in metrics]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name, options, critic", [("food", {}, "head"), ("orders", dict(slots=2), "copy"),
                                                   ("salad", {}, "head"), ("lunch", {}, "head")])
def test_resume_goes_on_bit_for_bit(tmp_path, name, options, critic):
    start, env_fn = _tiny(name, **options)
    start = LanguageAgent(start.lm, start.tokenizer, critic)
    config = Config(updates=4, n_envs=3, n_steps=7, epochs=1, lr_decay=True)  # 7: the cut falls into the episodes
    whole, first, second = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start)
    expected = list(train(whole, env_fn, config))
    list(itertools.islice(train(first, env_fn, config, tmp_path / "run"), 2))
    for player in second.parameters():
        torch.nn.init.zeros_(player)  # whatever the new agent holds is replaced
    torch.rand(5)  # no hidden dependence on torch's own generator
    resumed = list(train(second, env_fn, config, tmp_path / "run", resume=True))
    assert _plain(resumed) == _plain(expected), "the resumed run differs from an uninterrupted one"
    assert [m["seconds"] for m in resumed] == sorted(m["seconds"] for m in resumed), "the clock goes on, too"
    for (key, x), y in zip(whole.state_dict().items(), second.state_dict().values()):
        assert torch.equal(x, y), f"{key} differs from that of an uninterrupted run"
    assert len(_files(tmp_path / "run")) == 2, f"one checkpoint is kept, not {sorted(_files(tmp_path / 'run'))}"


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


@pytest.mark.parametrize("damage", ("missing", "weights cut", "state cut", "foreign state", "code", "foreign weights"))
def test_a_bad_checkpoint_is_refused_and_kept(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    agent, env_fn = _tiny("lunch")
    config, folder = Config(updates=1, n_envs=2, n_steps=2, epochs=1), tmp_path / "run"
    list(train(agent, env_fn, config, folder))
    weights, = folder.glob("*.safetensors")
    if damage == "missing":
        weights.unlink()
    elif damage == "foreign weights":
        poad.save_model(_tiny("pancake")[0], str(weights))
    elif damage in ("foreign state", "code"):
        torch.save({"x": 1} if damage == "foreign state" else {"metrics": [_Bomb()]}, folder / "state.pt")
    else:
        path = weights if damage == "weights cut" else folder / "state.pt"
        path.write_bytes(path.read_bytes()[:1000])
    before = _files(folder)
    with pytest.raises(ValueError, match="run holds no checkpoint"):
        list(train(agent, env_fn, dataclasses.replace(config, updates=2), folder, resume=True))
    assert _files(folder) == before, "a bad checkpoint must stay as it is"
    assert not (tmp_path / "bombed").exists(), "a checkpoint must never run code"


def test_checkpoints_are_not_mixed_up(tmp_path):
    agent, env_fn = _tiny("lunch")
    config = Config(updates=1, n_envs=2, n_steps=2, epochs=1)
    list(train(agent, env_fn, config, tmp_path))
    before = _files(tmp_path)
    for change, resume, words in (({}, False, "resume"), ({"lr": 0.5}, True, "configuration.*lr.*0.0003")):
        with pytest.raises(ValueError, match=words):
            list(train(agent, env_fn, dataclasses.replace(config, **change), tmp_path, resume))
    with pytest.raises(ValueError, match="folder"):
        next(train(agent, env_fn, config, resume=True))
    decay = dataclasses.replace(config, lr_decay=True)
    list(train(agent, env_fn, decay, tmp_path / "decay"))
    with pytest.raises(ValueError, match="configuration"):  # another number of updates would be another decay
        list(train(agent, env_fn, dataclasses.replace(decay, updates=2), tmp_path / "decay", resume=True))
    (tmp_path / "decay" / "state.pt").unlink()
    speaker, food = _tiny("food", wording="short")
    list(train(speaker, food, dataclasses.replace(config, updates=2), tmp_path / "food"))
    for updates, options, words in ((1, "short", "2 updates"), (2, "long", "other options")):
        with pytest.raises(ValueError, match=words):
            list(train(speaker, partial(envs.make, "food", wording=options),
                       dataclasses.replace(config, updates=updates), tmp_path / "food", resume=True))
    with pytest.raises(ValueError, match="Lunch"):  # the saved game is another one
        list(train(agent, partial(envs.make, "pancake"), config, tmp_path, resume=True))
    with pytest.raises(ValueError, match="snapshot"):
        list(train(_agent(), _agent_pays, config, tmp_path / "other"))
    assert _files(tmp_path) == before, "a refused run must not touch the checkpoint"


def test_a_broken_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    agent, env_fn = _tiny("lunch")
    config = Config(updates=3, n_envs=2, n_steps=2, epochs=1)
    run = train(agent, env_fn, config, tmp_path)
    next(run)
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=KeyboardInterrupt))  # while the second one is written
    with pytest.raises(KeyboardInterrupt):
        next(run)
    monkeypatch.undo()
    assert len(list(train(_tiny("lunch")[0], env_fn, config, tmp_path, resume=True))) == 3


def test_play():
    agent, pays = _agent(spread=0.1), {text: float(k) for k, text in enumerate(AGENT_MENU)}
    env = partial(_AgentEnv, pays.get, limit=1, wins=lambda: True)
    with torch.no_grad():
        chances = agent.score(["p0 s0"], [AGENT_MENU], "token")[0].softmax(-1)
    played, story = poad.play(agent, env, 2000)
    mean = sum(total for total, _ in played) / 2000
    exact = sum(p * pays[text] for p, text in zip(chances.tolist(), AGENT_MENU))
    assert len(played) == 2000 and all(success is True for _, success in played)
    assert abs(mean - exact) < 4 * max(pays.values()) / 2000**0.5, f"mean return {mean}, but Σ π r is {exact}"
    assert "p0 s0" in story and any(text in story for text in AGENT_MENU), f"the first episode is not told: {story}"
    assert poad.play(agent, env, 5)[0] == poad.play(agent, env, 5)[0] != poad.play(agent, env, 50, seed=1)[0][:5]
    greedy = {total for total, _ in poad.play(agent, env, 5, greedy=True)[0]}
    assert len(greedy) == 1, f"greedy play in the same situation must not vary: {greedy}"
    lengths = iter((3, 1, 2))
    played, story = poad.play(agent, lambda: _AgentEnv(lambda action: 1.0, next(lengths)), 3)
    assert [total for total, _ in played] == [3, 1, 2], "every episode ends for itself"
    assert story.count("→") == 3, "the transcript is of the first episode, and whole"


# ------------------------------------------------------------------ command line


@pytest.fixture
def _agent_cli(monkeypatch, tmp_path):
    """`run(*args)` calls main in this process, with a hardly pre-trained agent and small rollouts."""
    monkeypatch.setattr(poad, "tiny_agent", partial(tiny_agent, pretrain_steps=2))
    monkeypatch.setitem(poad.PRESETS, "lunch", dict(updates=9, n_envs=2, n_steps=2, epochs=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return lambda *args: poad.main(["--env", "lunch", *args])


def _agent_json(path):
    def refuse(name):
        pytest.fail(f"{name} is not JSON")
    return json.loads(path.read_text(), parse_constant=refuse)["runs"]


def test_command_line(_agent_cli, tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    _agent_cli("--updates", "1", "--seed", "4", "--seeds", "2", "--method", "poad,glam", "--out", str(out))
    runs = _agent_json(out)
    assert [(r["config"]["method"], r["config"]["seed"]) for r in sorted(runs, key=str)] == [
        ("glam", 4), ("glam", 5), ("poad", 4), ("poad", 5)], "--seeds counts from --seed, for every method"
    for run in runs:
        assert run["config"]["env"] == "lunch" and run["config"]["gamma"] == 0.95
        metrics, = run["metrics"]  # --updates 1
        assert {"update", "env_steps", "return_mean", "success_rate", "seconds"} <= set(metrics)
    assert out.with_suffix(".png").stat().st_size > 1000, "the picture goes beside --out"
    printed = capsys.readouterr().out
    assert "poad" in printed and "glam" in printed and "success" in printed, "a table should be printed"


@pytest.mark.parametrize("args, said", (
    (("--env", "dinner"), ("dinner", "lunch", "food")), (("--method", "poad,ppo"), ("ppo", "poad", "twosome")),
    (("--method", "glam", "--env", "scikit"), ("glam", "poad", "need a menu")),
    (("--wording", "long"), ("wording",)),
    (("--model", "/no/such/folder"), ("/no/such/folder", "tiny")), (("--updates", "many"), ("updates", "many")),
    (("--model", "/no/such/model.gguf"), ("model.gguf", "tiny"))))
def test_command_line_refuses_in_one_line(_agent_cli, capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        _agent_cli(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, f"exit code 2 and one line, not {stop.value.code} and {lines}"
    assert all(word in lines[0] for word in said), f"the line should say {said}: {lines[0]}"


def test_command_line_keeps_what_was_measured(_agent_cli, tmp_path, monkeypatch, capsys):
    def train_then_interrupt(*args):
        yield dict(update=1, env_steps=4, episodes=0, return_mean=None, success_rate=None, seconds=0.1)
        raise KeyboardInterrupt
    monkeypatch.setattr(poad, "train", train_then_interrupt)
    _agent_cli()
    out, = (tmp_path / "runs").glob("*.json")  # the default folder
    run, = _agent_json(out)
    assert [m["update"] for m in run["metrics"]] == [1] and run["metrics"][0]["return_mean"] is None
    assert out.with_suffix(".png").exists() and "interrupt" in "".join(capsys.readouterr()).lower()


def test_command_line_saves_resumes_and_evaluates(_agent_cli, tmp_path, capsys):
    def metrics(name):
        return {run["config"]["method"]: _plain(run["metrics"]) for run in _agent_json(tmp_path / name)}
    both = ("--method", "poad,glam")
    _agent_cli(*both, "--updates", "3", "--out", "whole.json")
    _agent_cli(*both, "--updates", "2", "--out", "part.json", "--save", "kept")
    _agent_cli(*both, "--updates", "3", "--out", "more.json", "--resume", "kept")
    assert metrics("part.json") == {m: x[:2] for m, x in metrics("whole.json").items()}
    assert metrics("more.json") == metrics("whole.json"), "saved after 2 of 3 updates and resumed is not the same run"
    capsys.readouterr()
    for args in (("--resume", "kept"), ()):  # a saved and a fresh agent
        _agent_cli(*both, *args, "--eval", "3")
        printed = capsys.readouterr().out
        assert printed.count("3 sampled episodes") == printed.count("3 greedy episodes") == 2, printed
        assert "success" in printed and "mean return" in printed and "salad" in printed, "figures, and a transcript"
    for args, words in ((("--save", "kept"), "resume"), (("--resume", "nowhere"), "nowhere"), (("--eval", "-1"), "-1"),
                        (("--resume", "kept", "--lr", "0.5"), "configuration"),
                        (("--resume", "kept", "--eval", "2", "--seed", "1"), "no checkpoint")):
        with pytest.raises(SystemExit):
            _agent_cli(*both, *args, "--updates", "3")
        assert words in capsys.readouterr().err


def test_command_line_sets_every_knob(_agent_cli, tmp_path):
    _agent_cli("--method", "poad", "--updates", "1", "--lr", "0.25", "--kl_stop", "null", "--n_envs", "3")
    config = _agent_json(tmp_path / "runs" / "lunch.json")[0]["config"]
    assert (config["lr"], config["kl_stop"], config["n_envs"], config["n_steps"]) == (0.25, None, 3, 2)


@ON_BOTH_LMS
def test_train_layers(tmp_path, kind):
    with pytest.raises(ValueError, match="2 layers"):
        poad.load_agent("tiny", AGENT_LUNCH, train_layers=9)
    agent = _agent(kind)
    agent.lm.save_pretrained(tmp_path)
    agent.tokenizer.save_pretrained(tmp_path)
    for count, learn in ((1, {"1"}), (None, {"0", "1", ""})):
        loaded = poad.load_agent(str(tmp_path), AGENT_LUNCH, train_layers=count)
        before = copy.deepcopy(loaded.lm.state_dict())
        list(train(loaded, _agent_pays, Config(updates=1, n_envs=2, n_steps=2, lr=0.01)))
        moved = {name for name, x in loaded.lm.state_dict().items() if not torch.equal(x, before[name])}
        layers = {"".join(re.findall(r"\.(\d+)\.", name)) for name in moved}
        assert layers == learn, f"train_layers={count}: what moved is {moved}"


def test_load_agent_reads_a_local_folder(tmp_path):
    agent = _agent("gpt2")
    agent.lm.save_pretrained(tmp_path)
    agent.tokenizer.save_pretrained(tmp_path)
    loaded = poad.load_agent(str(tmp_path), AGENT_LUNCH)
    got, want = (x.score(["you"], [AGENT_MENU])[0] for x in (loaded, agent))
    _agent_near(got, want, "the saved LM was not loaded")


TEXT_ENVS = ("pancake", "lunch", "food", "entertainment", "orders", "salad", "salad2")


# ---- environments: exact oracles


def _graph(env):
    """(states, rows): all non-terminal states, the start first, found by search through the `state` setter;
    rows[i] = [(action, ticks it adds to the clock, reward, terminated, success, index of the next state), ...]."""
    env = copy.deepcopy(env)
    env.reset(0)
    states, rows = [env.state], []
    index = {env.state: 0}
    for state in states:  # grows while it is read
        env.reset(0)
        env.state, out = state, []
        for action in env.menu():
            env.reset(0)
            env.state = state
            _, reward, end, _, info = env.step(action)
            if not end and env.state not in index:
                index[env.state] = len(states)
                states.append(env.state)
            out.append((action, env.clock, reward, end, info.get("success", False), None if end else index[env.state]))
        rows.append(out)
    return states, rows


def _random_play(env, rows):
    """(success, return) of a uniformly random agent: the distribution over (ticks, state), pushed forward."""
    alive, success, total = {0: {0: 1.0}}, 0.0, 0.0
    for ticks in range(env.limit):
        for i, p in alive.pop(ticks, {}).items():
            for _, n, reward, end, won, after in rows[i]:
                q, cut = p / len(rows[i]), not end and ticks + n >= env.limit
                total, success = total + q * (reward + env.limit_reward * cut), success + q * won
                if not end and not cut:
                    then = alive.setdefault(ticks + n, {})
                    then[after] = then.get(after, 0.0) + q
    return success, total


def _shortest(rows):
    """(fewest actions to success, number of such sequences, {ticks: how many of them})."""
    level, length, won = {(0, 0): 1}, 0, {}
    while not won:
        length, new = length + 1, {}
        for (i, ticks), count in level.items():
            for _, n, _, end, success, after in rows[i]:
                into, key = (won, ticks + n) if success else (new, (after, ticks + n))
                if success or not end:
                    into[key] = into.get(key, 0) + count
        level = new
    return length, sum(won.values()), won


def _best_return(env, rows, gamma):
    """The best return of a policy that sees the clock, by backward induction; gamma per action."""
    values = [None] * env.limit
    for ticks in reversed(range(env.limit)):
        values[ticks] = [max(r + (0 if end else env.limit_reward if ticks + n >= env.limit else
                                  gamma * values[ticks + n][after]) for _, n, r, end, _, after in out) for out in rows]
    return values[0][0]


def _play(env, actions, seed=0):
    env.reset(seed)
    return [env.step(action) for action in actions]


# ---- TokenMDP


def test_trie_by_hand():
    # actions: 0 = "a", 1 = "b a", 2 = "b b c"; prefixes, shorter first: (), (b), (b b)
    mdp = TokenMDP(np.ones((1, 3, 1)), [[1, 2, 3]], [[0], [1, 0], torch.tensor([1, 1, 2])], ["a", "b", "c"])
    assert mdp.actions == ((0,), (1, 0), (1, 1, 2)) and mdp.vocab == ("a", "b", "c")
    assert mdp.prefixes == ((), (1,), (1, 1))
    assert mdp.child.tolist() == [[-1, 1, -1], [-1, 2, -1], [-1, -1, -1]]
    assert mdp.leaf.tolist() == [[0, -1, -1], [1, -1, -1], [-1, -1, 2]]
    assert mdp.transition.dtype == mdp.reward.dtype == torch.float64
    assert mdp.child.dtype == mdp.leaf.dtype == torch.long
    assert doctest.testmod(envs).failed == 0


def test_token_mdp_copies_its_tables():
    transition, reward = torch.ones(1, 1, 1, dtype=torch.float64), np.zeros((1, 1))
    mdp = TokenMDP(transition, reward, [(0,)], ["a"])
    transition.zero_(), reward.fill(7.0)
    assert mdp.transition.item() == 1.0 and mdp.reward.item() == 0.0


@pytest.mark.parametrize("words, change", [
    ("shape|must be", {"reward": [[0.0]]}), ("must be", {"transition": [[1.0, 1.0]]}), ("must be", {"transition": []}),
    ("table of numbers", {"reward": [[0.0], [0.0, 1.0]]}), ("table of numbers", {"reward": None}),
    ("state 0, action 1 does not sum", {"transition": [[[1.0], [0.9]]]}),
    ("state 0, action 0 does not sum", {"transition": [[[float("nan")], [1.0]]]}),
    ("state 0, action 1 has a reward", {"reward": [[0.0, float("inf")]]}),
    ("action 1 is \\(\\)", {"actions": [(0,), ()]}), ("action 0 is \\(2,\\)", {"actions": [(2,), (1,)]}),
    ("action 1 is \\(-1,\\)", {"actions": [(0,), (-1,)]}), ("whole numbers", {"actions": [(0,), (0.5,)]}),
    ("must be", {"actions": []}), ("action 0, \\(0,\\), is the same as action 1", {"actions": [(0,), (0,)]}),
    ("action 1, \\(0,\\), is a proper prefix of action 0, \\(0, 1\\)", {"actions": [(0, 1), (0,)]}),
    ("vocab entry 1", {"vocab": ["a", "a"]}), ("vocab entry 0", {"vocab": [1, "a"]})])
def test_token_mdp_errors(words, change):
    good = {"transition": [[[1.0], [1.0]]], "reward": [[0.0, 0.0]], "actions": [(0,), (1,)], "vocab": ["a", "b"]}
    TokenMDP(**good)
    with pytest.raises(ValueError, match=words):
        TokenMDP(**(good | change))


def test_negative_probability():
    with pytest.raises(ValueError, match="state 1, action 0 has a negative"):
        TokenMDP([[[1.0, 0.0]], [[-0.5, 1.5]]], [[0.0], [0.0]], [(0,)], ["a"])


def test_random_mdp():
    for seed in range(50):
        mdp, again = random_mdp(seed), random_mdp(seed)
        assert mdp.transition.shape == (4, 5, 4) and mdp.reward.shape == (4, 5) and len(mdp.vocab) == 4
        assert len(set(map(len, mdp.actions))) > 1 and max(map(len, mdp.actions)) <= 4
        assert not any(a != b and b[:len(a)] == a for a in mdp.actions for b in mdp.actions)
        assert mdp.actions == again.actions and torch.equal(mdp.reward, again.reward)
        assert torch.equal(mdp.transition, again.transition)
    assert len({random_mdp(seed).actions for seed in range(50)}) > 5
    assert not torch.equal(random_mdp(0).reward, random_mdp(1).reward)
    # 2 words, 3 tokens: 8 sequences all fit, at full length; 7 of them leave room for one short action (8 - 2 + 1)
    assert set(map(len, random_mdp(0, actions=8, vocab=2, max_length=3).actions)) == {3}
    assert set(map(len, random_mdp(0, actions=7, vocab=2, max_length=3).actions)) == {2, 3}
    for bad in ({"actions": 9, "vocab": 2, "max_length": 3}, {"actions": 2, "vocab": 1}, {"states": 0}):
        with pytest.raises(ValueError, match="do not fit|below 1"):
            random_mdp(0, **bad)


def test_lunch_mdp_fools_the_naive_learner():
    mdp = lunch_mdp()
    assert len(mdp.transition) <= 5 and all(word.isalpha() for word in mdp.vocab)
    transition, reward = mdp.transition.tolist(), mdp.reward.tolist()

    def greedy(gamma_token):
        # token-level values from their definition: discounting inside an action multiplies what it is worth by
        # gamma_token ** (length - 1), and the greedy token leads to the action with the largest of these products
        v = [0.0] * len(reward)
        for _ in range(500):
            q = [[gamma_token ** (len(action) - 1) * (r + 0.95 * sum(p * x for p, x in zip(row, v)))
                  for action, r, row in zip(mdp.actions, *tables)] for tables in zip(reward, transition)]
            v = list(map(max, q))
        return q

    best, naive = greedy(1.0), greedy(0.95)
    choice, trap = best[1].index(max(best[1])), naive[1].index(max(naive[1]))
    assert choice != trap and len(mdp.actions[choice]) > len(mdp.actions[trap])
    assert best[1][choice] - best[1][trap] == pytest.approx(1.0 - 0.7)
    assert naive[1][trap] - naive[1][choice] == pytest.approx(0.95 * 0.7 - 0.95**13)  # 2 words and 14: a margin of .15


# ---- text environments: reference numbers


def test_pancake_numbers():
    env = make("pancake")
    states, rows = _graph(env)
    assert [len(out) for out in rows] == [2, 1, 2]
    # put in takes one step, the other two each succeed with 1/2 a step; in 5 steps that leaves 4 for both:
    # 1 - P(less than two heads in 4) = 1 - (1 + 4) / 16 = 11/16; the return is 2 * 11/16 - 1
    assert _random_play(env, rows) == pytest.approx((0.6875, 0.375))
    assert _shortest(rows)[:2] == (3, 1) and _best_return(env, rows, 0.95) == pytest.approx(0.9025)
    steps = _play(env, ["close the microwave"] * 4 + ["nonsense"])
    assert [s[1] for s in steps] == [0, 0, 0, 0, -1] and steps[-1][2:4] == (False, True)
    assert steps[-1][4]["success"] is False


def test_lunch_numbers():
    env = make("lunch")
    # not decided after n steps with p = 1/2, then 1/3: served = half of 1 - P(undecided after 12) = .4995
    undecided = 0.5**12 + sum(0.5**k * (1 / 3) ** (12 - k) for k in range(1, 13))
    served = (1 - undecided) / 2
    assert served == pytest.approx(0.4995, abs=5e-5)
    assert _random_play(env, _graph(env)[1]) == pytest.approx((served, 1.7 * served))  # 1.0 + 0.7, each as often
    assert 1.7 * served == pytest.approx(0.849, abs=5e-4)
    eat, wait, serve = env.step("put the salad in the bowl")[4]["menu"]
    assert [len(a.split()) for a in (eat, wait, serve)] == [2, 1, 17]
    assert env.step(eat)[1:] == (0.7, True, False, {"success": False})
    assert _play(env, ["put the salad in the bowl", serve])[-1][1:] == (1.0, True, False, {"success": True})


def test_food_numbers():
    env = make("food")
    states, rows = _graph(env)
    assert len(states) == 27 and _random_play(env, rows) == pytest.approx((0.0169, 0.0169), abs=5e-5)
    assert _shortest(rows)[:2] == (6, 1) and _best_return(env, rows, 0.95) == pytest.approx(0.95**5)  # .7738
    best = ["walk to the pancake", "grab the pancake", "walk to the microwave", "open the microwave",
            "put the pancake in the microwave", "close the microwave"]
    assert _play(env, best)[-1][1:4] == (1.0, True, False)


def test_food_menus():
    rooms = ["walk to the living room", "walk to the bathroom", "walk to the bedroom"]
    item, appliance = "walk to the pancake", "walk to the microwave"
    table = {  # (where the pancake is, what one is near) → the rest of the menu in the kitchen
        ("table", "nothing"): [item, appliance], ("inside", "nothing"): [item, appliance],
        ("table", "item"): [appliance, "grab the pancake"],
        ("table", "appliance"): [item, "open the microwave", "close the microwave"],
        ("hand", "nothing"): [item, appliance],
        ("hand", "appliance"): [item, "put the pancake in the microwave", "open the microwave", "close the microwave"],
        ("inside", "both"): ["open the microwave", "close the microwave"]}
    env, met = make("food"), set()
    for state in _graph(env)[0]:
        env.state = state
        if state.room == "kitchen":
            met.add((state.item, state.near))
            assert env.menu() == rooms + table[state.item, state.near]
        else:
            assert len(env.menu()) == 3 and f"walk to the {state.room}" not in env.menu()
            assert "open" not in env.observe() and "table" not in env.observe()  # out of sight
    assert met == set(table)


def test_food_wordings_keep_the_rules():
    short, long = make("food"), make("food", wording="long")

    def shape(env):
        states, rows = _graph(env)
        return states, [[row[1:] for row in out] for out in rows]

    assert all(3 <= len(text.split()) <= 6 for text in short.words.values())
    assert all(13 <= len(text.split()) <= 15 for text in long.words.values()) and len(set(long.words.values())) == 10
    assert shape(short) == shape(long)
    assert len(FOOD_UNSEEN) == 6
    for pair in FOOD_UNSEEN:
        for wording in ("short", "long"):
            env = make("food", item=pair[0], appliance=pair[1], wording=wording)
            text = env.observe() + " ".join(a for out in _graph(env)[1] for a, *_ in out)
            assert shape(env) == shape(short) and pair[0] in text and pair[1] in text
            assert "pancake" not in text and "microwave" not in text.replace(pair[1], "")


def test_entertainment_numbers():
    env = make("entertainment")
    states, rows = _graph(env)
    assert len(states) == 152 and _shortest(rows)[:2] == (11, 8)
    assert _best_return(env, rows, 0.95) == pytest.approx(0.95**10)  # .5987
    assert _random_play(env, rows) == pytest.approx((0.003009, 0.003009), abs=5e-7)
    state = env.reset()[0] and env.state._replace(room="living room", near="television", chips="hand", milk="hand")
    env.state = state
    env.step("turn on the television")
    assert env.state == state  # two full hands
    env.state = state._replace(near="sofa", sitting=True)
    assert env.menu() == ["stand up from the sofa"]


@pytest.mark.parametrize("name, states, shortest, moves, best, play", [
    ("salad", 24, (6, 3), {28: 1, 31: 2}, 0.9092, (0.442, -0.108)),
    ("salad2", 1156, (10, 48), {45: 16, 46: 12, 47: 16, 48: 4}, 0.9176, (0.0102, -0.557))])
def test_salad_numbers(name, states, shortest, moves, best, play):
    env = make(name)
    found, rows = _graph(env)
    assert len(found) == states and _best_return(env, rows, 0.95) == pytest.approx(best, abs=5e-5)
    assert _shortest(rows) == (*shortest, moves)
    assert _random_play(env, rows) == pytest.approx(play, abs=5e-4)
    if name == "salad":  # at γ = .99 chopping again and again pays more than the honest 1.095
        assert _best_return(env, rows, 0.99) == pytest.approx(1.289, abs=5e-4)


def test_salad_by_hand():
    env = make("salad")
    menu = ["pick up the tomato", "take the bowl", "walk to the first board", "serve nothing", "chop nothing"]
    assert env.menu() == menu
    # cells (1,4) → tomato (1,5) → board (1,1) → bowl (5,5) → board → counter (3,1): 1 + 4 + 0 + 8 + 8 + 2 cells; and
    # one move each to take, put, take the bowl, fill it and serve, three to chop: 23 + 8 = 31 moves
    plan = ["pick up the tomato", "put the tomato on the first board", "chop the tomato", "take the bowl",
            "put the tomato in the bowl", "serve the dish"]
    steps, ticks = [], []
    for action in plan:
        steps.append(env.step(action))
        ticks.append(env.clock)
    assert ticks == [2, 7, 10, 19, 28, 31] and steps[-1][2:4] == (True, False) and steps[-1][4]["success"]
    events = [0, 0, 0.2, 0, 0, 1]
    for n, event, step in zip([2, 5, 3, 9, 9, 3], events, steps):
        assert step[1] == pytest.approx(sum(-0.001 * 0.99**i for i in range(n)) + 0.99 ** (n - 1) * event)
    env.reset()
    step = env.step("juggle")
    assert step[1] == pytest.approx(-0.001) and env.clock == 1 and step[4]["invalid"]
    env.reset()
    serves = [env.step(a) for a in ("pick up the tomato", "serve the dish")]  # a raw tomato: 2 + 6 cells + 1 to serve
    assert serves[1][1] == pytest.approx(-0.1 * (1 - 0.99**7) - 0.1 * 0.99**6) and env.state.hand == ""


def test_orders_numbers():
    env = make("orders", guests=2)
    menu = env.menu()
    assert len(menu) == len(set(menu)) == 256 and all(len(a.split()) == 5 for a in menu)
    for guest in envs.GUESTS:  # by symmetry each slot is right in a quarter of the menu: mean reward .25 / guests
        rewards = []
        for action in menu:
            env.reset()
            env.state = env.state._replace(guest=guest)
            rewards.append(env.step(action)[1])
        assert sum(rewards) / 256 == pytest.approx(0.25 / 2) and max(rewards) == 0.5
    for slots, words in ((1, 4), (2, 2), (3, 2), (2, 3), (4, 4), (6, 4), (8, 6)):
        env = make("orders", slots=slots, words=words, guests=3)
        assert len(set(map(tuple, env.wanted.values()))) == 4
        assert env.wanted == make("orders", slots=slots, words=words).wanted
        (_, info), total = env.reset(5), 0.0
        assert ("menu" in info) == (words**slots <= 256)
        for to_come in (2, 1, 0):
            assert env.state.to_come == to_come and env.state.guest in env.observe()
            _, reward, end, cut, info = env.step("serve " + " ".join(env.wanted[env.state.guest]))
            total += reward
        assert total == pytest.approx(1.0) and end and not cut and info["success"]
    for text in ("serve", "serve soup", "", " ", "eat " + "soup bread tea cake fish salt", "serve" + " soup" * 6, None):
        env = make("orders", slots=6, guests=2)
        good = env.random_action()
        step = env.step(text)
        assert step[1] == 0.0 and step[4] == {"invalid": True} and env.state.to_come == 0
        assert env.step(good)[2] and env.admits(good) and not env.state.perfect
    guests = [env.reset(seed) and env.state.guest for seed in range(400)]
    assert all(70 <= guests.count(g) <= 130 for g in envs.GUESTS)  # 100 each, standard deviation 8.7


# ---- text environments: the calling convention


@pytest.mark.parametrize("name", TEXT_ENVS)
def test_any_string_is_safe(name):
    for bad in ("", "fly", "walk to the kitchen ", "\0", "🥞" * 1000, None, 3, ["wait"], {}):
        env = make(name)
        before, menu = env.state, env.reset(0)[1]["menu"]
        env.state = before
        obs, reward, terminated, truncated, info = env.step(bad)
        assert info["invalid"] is True and not terminated and not truncated and info["menu"] and env.clock == 1
        assert reward == (pytest.approx(-0.001) if "salad" in name else 0.0)
        assert name == "orders" or (env.state == before and info["menu"] == menu)
    assert "invalid" not in env.step(menu[0])[4]


@pytest.mark.parametrize("name", TEXT_ENVS)
def test_episodes(name):
    """Menus are distinct plain words, observations end openly, one seed gives one episode, copies are independent."""
    env, twin = make(name), make(name)
    for seed in range(3):
        assert env.reset(seed) == twin.reset(seed)
        done, ticks = False, 0
        while not done:
            menu, text = env.menu(), env.observe()
            assert menu is not env.menu() and len(menu) == len(set(menu))
            assert all(a == " ".join(a.lower().split()) and a.replace(" ", "").isalpha() for a in menu)
            assert text.endswith(" to") and set(text) <= set(" .,") | set(filter(str.isalpha, text))
            assert 20 <= len(text.split()) <= 60 and hash(env.state) == hash(copy.deepcopy(env.state))
            action = env.random_action()
            assert action == twin.random_action() and action in menu
            spare, before = copy.deepcopy(env), env.state
            step, ticks = env.step(action), max(ticks + 1, env.clock)
            assert step == twin.step(action) == spare.step(action) and spare.state == env.state
            assert type(step[1]) is float and type(step[2]) is bool and type(step[3]) is bool
            done = step[2] or step[3]
            assert not (step[2] and step[3]) and ("success" in step[4]) == done
            spare.state = before
            assert spare.state == before and spare.observe() == text and env.observe() == step[0]
        assert ticks <= env.limit + 20
        with pytest.raises(RuntimeError, match="reset"):
            env.step(action)
    follow = [env.reset() and env.state for _ in range(20)]
    assert follow == [twin.reset() and twin.state for _ in range(20)]  # reset() goes on with the same generator
    assert name != "orders" or len(set(follow)) > 1


@pytest.mark.parametrize("name, limit, idle", [
    ("food", 50, "walk to the bedroom"), ("entertainment", 50, "walk to the bedroom"), ("lunch", 12, "wait"),
    ("salad", 200, "nothing"), ("salad2", 200, "nothing")])
def test_time_limit(name, limit, idle):
    steps = _play(make(name), [idle] * limit)
    assert [s[3] for s in steps] == [False] * (limit - 1) + [True] and not any(s[2] for s in steps)
    assert steps[-1][4]["success"] is False and all("success" not in s[4] for s in steps[:-1])


@pytest.mark.parametrize("name, options, words", [
    ("nope", {}, "choose from pancake, lunch, food"), (3, {}, "choose from"), ("food", {"colour": "red"}, "wording"),
    ("lunch", {"guests": 2}, "lunch takes"), ("food", {"wording": "medium"}, "choose from short, long"),
    ("food", {"item": ""}, "plain words"), ("food", {"item": 3}, "plain words"), ("food", {"item": "kitchen"}, "rooms"),
    ("food", {"item": "a  b"}, "plain words"), ("food", {"appliance": "pancake"}, "different"),
    ("orders", {"slots": 0}, "slots is 0: choose from 1, 2"), ("orders", {"words": 7}, "words is 7"),
    ("orders", {"guests": -1}, "guests is -1"), ("orders", {"guests": 2.5}, "guests is 2.5"),
    ("orders", {"slots": True}, "slots"), ("orders", {"slots": 1, "words": 3}, "3 orders"),
    ("scikit", {"dataset": "titanic"}, "choose from breast cancer, wine")])
def test_make_errors(name, options, words):
    with pytest.raises(ValueError, match=words):
        make(name, **options)


# ---- scikit


def test_scikit_score():
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split
    from sklearn.tree import DecisionTreeClassifier
    for name, load in (("wine", datasets.load_wine), ("breast cancer", datasets.load_breast_cancer)):
        env, scores = make("scikit", dataset=name), []
        x, y = load(return_X_y=True)
        for seed in range(5):  # the rule, spelled out
            a, b, ya, yb = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
            p = DecisionTreeClassifier(max_depth=2, random_state=0).fit(a, ya).predict_proba(b)
            scores.append(roc_auc_score(yb, p[:, 1] if p.shape[1] == 2 else p, multi_class="ovo"))
        obs, info = env.reset(0)
        assert str(len(x)) in obs and name in obs and "menu" not in info
        _, reward, terminated, truncated, info = env.step("DecisionTreeClassifier(max_depth=2)")
        assert reward == pytest.approx(np.mean(scores), abs=1e-12) and info == {"success": True}
        assert (terminated, truncated) == (True, False)
    env.reset()
    assert env.step("make_pipeline(StandardScaler(), LogisticRegression(C=0.5))")[1] > 0.98


def test_scikit_is_hostile_proof(tmp_path):
    pytest.importorskip("sklearn")
    env, rng, flag = make("scikit", dataset="iris"), random.Random(0), tmp_path / "flag"
    bad = [f"__import__('os').system('touch {flag}')", f"open('{flag}', 'w')", "().__class__", "GaussianNB().fit", "",
           "GaussianNB", "lambda: 1", "(lambda: GaussianNB())()", "LogisticRegression(C=1e9)", "GridSearchCV()",
           "SVC()",
           "LogisticRegression(**{})", "LogisticRegression(C=0.1, C=0.5)", "RandomForestClassifier(n_estimators=10**6)",
           "RandomForestClassifier(n_estimators=1000000)", "make_pipeline()", "make_pipeline(*[1])", "GaussianNB(",
           "PCA()", "PCA(n_components=8)", "make_pipeline(GaussianNB(), PCA())", "(" * 150, "-" * 199 + "1", "\0",
           "[" * 10**6, "GaussianNB(" * 5000, "9" * 5000, "\ud800", "GaussianNB()\0", "'\\d'", "1 is 1", "import os",
           "x = GaussianNB()", "GaussianNB(); 1", "make_pipeline(" * 7 + "PCA()" + ")" * 7]
    alphabet = list(map(chr, range(128))) + ["GaussianNB", "(", ")", "make_pipeline", "__class__", ".", "lambda:", "="]
    bad += ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(2000)]
    for text in [None, 3, b"GaussianNB()"] + bad:
        if env.done:
            env.reset()
        obs, reward, terminated, truncated, info = env.step(text)
        assert reward == -1.0 and not terminated and info["invalid"] and "menu" not in info, text
        assert truncated == (env.clock == 5) and ("success" in info) == truncated
        assert env.state in obs and len(obs) < 250
    assert not flag.exists()


def test_scikit_random_lines():
    pytest.importorskip("sklearn")
    env, twin = make("scikit", dataset="iris"), make("scikit", dataset="iris")
    env.reset(3), twin.reset(3)
    lines = [env.random_action() for _ in range(400)]
    assert lines == [twin.random_action() for _ in range(400)] and max(map(len, lines)) <= 200
    wrong = [a for a in lines if "Best" in a or "size" in a or a.count("(") != a.count(")")]
    assert 0.1 < len(wrong) / 400 < 0.3  # one in five
    for line in sorted(set(lines) - set(wrong), key=len)[:4]:
        assert env.reset() and env.step(line)[1] > 0.5
    for line in wrong[:20]:
        assert env.reset() and env.step(line)[1] == -1.0


def test_scikit_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        make("scikit")


# ------------------------------------------------------------------ exercises: functions to be written by students

EXERCISES = {name: (int(found[1]), int(found[2])) for owner in (poad, LanguageAgent) for name, f in vars(owner).items()
             if (found := re.match(r"Exercise (\d+) \((\d+) points?\)", getattr(f, "__doc__", None) or ""))}


def function_of(exercise):
    return getattr(poad, exercise, None) or getattr(LanguageAgent, exercise)


@pytest.mark.parametrize("name", [name for name in EXERCISES if ">>>" in function_of(name).__doc__])
def test_docstring_example_of(name):
    """The example in an exercise's docstring gives what it says."""
    try:
        for example in doctest.DocTestFinder(recurse=False).find(function_of(name), name, globs=dict(vars(poad))):
            doctest.DebugRunner().run(example)
    except doctest.UnexpectedException as error:
        raise error.exc_info[1]
    except doctest.DocTestFailure as error:
        example = error.example
        pytest.fail(f"{name}: {example.source.strip()} gives {error.got.strip()}, not {example.want.strip()}")


def exercise_of(test):
    """The exercise that a test, test_NAME_…, belongs to, or None."""
    return max((name for name in EXERCISES if test.startswith(f"test_{name}_")), key=len, default=None)


def cases(test):
    """The keyword arguments of all cases of a test, from its `parametrize` marks."""
    tables = [[dict(zip(names.split(", "), row if ", " in names else [row])) for row in rows]
              for names, rows in (mark.args for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize")]
    return [dict(itertools.chain(*map(dict.items, rows))) for rows in itertools.product(*tables)]


def verdicts(exercise):
    """Run the tests of one exercise without pytest: pairs (name of the test, what it raised or None)."""
    for test in [inspect.unwrap(f) for name, f in list(globals().items()) if name.startswith("test_")]:
        for case in cases(test) if exercise_of(test.__name__) == exercise else ():
            try:
                test(**case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:                               # a solution may raise anything, SystemExit too
                yield test.__name__, error
            else:
                yield test.__name__, None


@lru_cache
def is_right(exercise):
    return all(error is None for _, error in verdicts(exercise))


def called_by(test, case):
    """The exercises whose functions run while a test runs."""
    code = {name: getattr(inspect.unwrap(function_of(name)), "__code__", None)
            for name in sorted(EXERCISES, key=EXERCISES.get)}
    seen = set()
    sys.setprofile(lambda frame, event, arg: seen.add(frame.f_code))
    try:
        test(**case)
    except (Exception, pytest.fail.Exception):
        pass
    finally:
        sys.setprofile(None)
    return [name for name in code if code[name] in seen]


def hide_failures(error):
    return not error.errisinstance(pytest.skip.Exception)


def one_exercise_at_a_time(test):
    """The test, skipped where an exercise is not written yet, or fails because of another one that is wrong."""
    @functools.wraps(test)
    def run(**case):
        __tracebackhide__ = hide_failures
        try:
            return test(**case)
        except (Exception, pytest.fail.Exception) as error:
            if isinstance(error, NotImplementedError) and str(error).startswith("Exercise "):
                pytest.skip(f"{error} is not written yet")
            for other in called_by(test, case):
                if other not in (exercise_of(test.__name__), case.get("name")) and not is_right(other):
                    pytest.skip(f"Exercise {EXERCISES[other][0]}: {other} is wrong, and this rests on it")
            raise
    return run


# ---- the course kit: blank and grade

COURSE = Path(__file__).parent / ".course"


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(COURSE)
    return importlib.import_module("kit")


def test_blank_takes_out_the_bodies_and_nothing_else(kit, tmp_path):
    kit.main(["blank", str(tmp_path / "new" / "hw")])
    folder, whole = tmp_path / "new" / "hw", Path(poad.__file__).read_text()
    text = (folder / "poad.py").read_text()
    for name, (number, _) in EXERCISES.items():
        assert f'raise NotImplementedError("Exercise {number}: {name}")\n' in text, f"{name} is not blanked"
        body = inspect.getsource(function_of(name)).split('"""')[2]
        assert body not in text and body in whole, f"{name}'s solution is still there"
    gone = [line for line in difflib.ndiff(whole.splitlines(), text.splitlines()) if line[0] == "+"]
    assert len(gone) == len(EXERCISES), "only lines that raise may be new"
    dead = [name for name in re.findall(r"^def (_\w+)\(", text, re.M) if len(re.findall(rf"\b{name}\b", text)) == 1]
    assert set(dead) <= {"_check_shapes"}, f"{dead}: only solutions call it, so it gives one away (kit.HELPERS)"
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([".gitignore", ".pytest.ini", "LICENSE", "README.md", "envs.py", "llm_demo.ipynb", "poad.py",
                            "requirements.txt", "tabular_demo.ipynb", "test_poad.py"]), names
    tests = (folder / "test_poad.py").read_text()
    assert not [oracle for oracle in kit.ORACLES if f"def {oracle}(" in tests], "an oracle is a solution in other words"
    assert all(f"def test_{name}_" in tests for name in EXERCISES), "every exercise has tests in the student's folder"
    for notebook in ("tabular_demo.ipynb", "llm_demo.ipynb"):
        cells = [cell for cell in json.loads((folder / notebook).read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "outputs show what is right"
        assert "".join(cells[-1]["source"]).startswith("KEY = "), "the cell that checks answers must stay, last"


def test_blank_of_some_exercises(kit, tmp_path):
    kit.main(["blank", str(tmp_path), "--exercises", "1-2,7"])
    text = (tmp_path / "poad.py").read_text()
    assert [name for name in EXERCISES if f': {name}")' in text] == ["state_values", "action_backup", "gae"]


def test_course_kit_refuses_in_one_line(kit, tmp_path, capsys):
    (tmp_path / "work.txt").write_text("mine")
    for args, said in ((["blank", tmp_path], "not an empty folder"), (["blank", tmp_path / "work.txt"], "not an empty"),
                       (["blank", tmp_path / "x", "--exercises", "99"], "no exercise 99"),
                       (["blank", tmp_path / "work.txt" / "x"], "work.txt"), (["grade", tmp_path], "not a file"),
                       (["grade", tmp_path / "no.py"], "no.py is not a file"), (["grade"], "FILE"), (["mark"], "mark"),
                       (["grade", tmp_path / "work.txt", "--exercises", "one"], "'one'")):
        with pytest.raises(SystemExit) as stop:
            kit.main([str(x) for x in args])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and said in lines[0], f"{args}: {stop.value.code}, {lines}"
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"], "something was written"


SUBMISSION = """
import no_such_module
print("garbage")

def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    _check_shapes(action_end=action_end, done=done)
    return my_choice(action_end, done, gamma, gamma_token)

def my_choice(end, done, gamma, gamma_token):
    kind = end.dtype if end.is_floating_point() else torch.float32
    return torch.where(end.bool(), gamma * (1 - done.to(kind)), gamma_token).to(kind)

def gae(rewards, values, discounts, lambdas, mask, last_values):
    return rewards - values, rewards

def masked_mean(x, mask):
    while True:
        print("garbage")

def normalize(x, mask):
    import os
    os._exit(0)

def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    raise SystemExit("bye")

def value_loss(values, old_values, returns, mask, clip=None):
    return (values - returns) *+* 2

def menu_logp(logits, allowed):
    import ctypes
    return ctypes.string_at(0)

class LanguageAgent(nn.Module):
    def score(self, prompts, menus, policy="glam"):
        raise NotImplementedError("Exercise 13: score")

from poad import bad_backup as theirs
def bad_backup(q, mdp, gamma, policy=None, temperature=0.0):
    return theirs(q, mdp, gamma, policy, temperature)
"""


def test_grade_contains_whatever_a_solution_does(kit, tmp_path, capsys):
    (tmp_path / "poad.py").write_text(SUBMISSION)
    kit.main(["grade", str(tmp_path / "poad.py"), "--limit", "3", "--json", "--exercises", "4,6-14"])
    result = json.loads(capsys.readouterr().out)
    rows = {row["function"]: row for row in result["exercises"]}
    assert rows["bad_discounts"]["points"] == result["points"] == EXERCISES["bad_discounts"][1], rows["bad_discounts"]
    line = 1 + SUBMISSION[:SUBMISSION.index("*+*")].count("\n")
    for name, words in dict(gae="GAE recurrence", masked_mean="endless loop", normalize="exit code 0",
                            ppo_policy_loss="bye", value_loss=f"SyntaxError in line {line}", menu_logp="SIGSEGV",
                            score="not written", assign="defines no function assign", bad_backup="theirs").items():
        assert not rows[name]["passed"] and words in rows[name]["message"], f"{name}: {rows[name]}"


def test_grade_takes_one_point_for_bad_input(kit, tmp_path, capsys):
    (tmp_path / "poad.py").write_text("def masked_mean(x, mask):\n    return x[mask.bool()].mean()\n")
    kit.main(["grade", str(tmp_path / "poad.py"), "--exercises", "8"])
    out = capsys.readouterr().out
    assert " 1 / 2  passed, but: bad input was accepted" in out, out


for _name, _test in list(globals().items()):
    if _name.startswith("test_"):
        globals()[_name] = one_exercise_at_a_time(_test)

if __name__ == "__main__":
    if not (course := Path(__file__).parent / ".course").is_dir():
        sys.exit("test_poad.py: blank and grade need the folder .course, which is missing; for tests use pytest")
    sys.path.insert(0, str(course))
    import kit
    kit.main()
