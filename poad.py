"""POAD: policy optimization with action decomposition, in one file to read top to bottom.

Paper: "Reinforcing Language Agents via Policy Optimization with Action Decomposition",
arXiv 2405.15821, NeurIPS 2024; "Eq. n" is its equation n unless another source is named.
At step t an agent sees o_t and writes an action a_t = (w¹ … wⁿ) token by token; the
environment answers with a reward r_t and o_{t+1}. BAD, the Bellman backup with Action
Decomposition, discounts *between* actions (γ) and never *inside* one (γ_w = 1). POAD is PPO
with BAD: its critic, its advantages and its clipped ratio are per token.

    symbol     name                 meaning                                    shape
    γ, γ_w     gamma, gamma_token   discount between actions, inside one       scalars
    λ, λ_w     lam, lam_token       share of later surprises that GAE passes
                                    back, between actions, inside one          scalars
    Q(o,w<,w)  q                    value of writing w after the prefix w<     (S, N, V)
    v(o,w<)    values               value of an observation and a prefix       (B, N)
    π(w|o,w<)  policy, logp         (log-)probability, (S, N, V) and, written, (B, N)
    Â          advantages           credit of a token                          (B, N)

Capitals in shapes are sizes: B rows (environments, or written actions), N token slots of a
row (in tables: prefixes), T steps, L tokens of an action, S states, A actions (of a menu),
V vocabulary, H features. Where a whole action gets one credit, it is one slot.
"""
import copy
import json
import shlex
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from inspect import signature
from itertools import chain
from pathlib import Path
from statistics import mean, pstdev, stdev
from typing import Literal

import torch
import torch.nn as nn
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from envs import ENVS, Player, make, require, seeded, tiny_lm


def same_shape(**tensors):
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    require(len(set(shapes.values())) == 1, f"these must have one shape: {shapes}")


def check_table(table, mdp):
    shape = (len(mdp.reward), *mdp.child.shape)                             # (S, N, V)
    require(table.shape == shape, f"the table is {tuple(table.shape)}, not {shape}")


# ------------------------------------------------- Bellman backups (tables, float64)


def state_values(q, policy=None, temperature=0.0):
    """Value of a choice: its best option, the policy's mean, or the soft maximum.

    v = max_w Q(w)   or   Σ_w π(w) Q(w)   or   τ log Σ_w exp(Q(w) / τ)   (soft: App. B.3)

    q, policy: (..., V) → (...). −inf marks an invalid token; probability 0 adds 0.
    >>> q = torch.tensor([1.0, 3.0, -torch.inf])
    >>> state_values(q).item(), state_values(q, policy=torch.tensor([0.5, 0.5, 0.0])).item()
    (3.0, 2.0)
    """
    require(policy is None or temperature == 0, "give a policy or a temperature, not both")
    if not torch.is_tensor(q) or not q.is_floating_point():
        q = torch.as_tensor(q, dtype=torch.float64)
    if policy is not None:
        policy = torch.as_tensor(policy, dtype=q.dtype)
        same_shape(q=q, policy=policy)
        return torch.where(policy == 0, 0, policy * q).sum(-1)
    if temperature > 0:
        return temperature * torch.logsumexp(q / temperature, -1)
    return q.amax(-1)


def action_backup(q, mdp, gamma, policy=None, temperature=0.0):
    """One Bellman backup at action level: the whole action is one decision (Eq. 4-5).

    Q(s, a) ← R(s, a) + γ Σ_s' P(s'|s, a) v(s')

    q, policy: (S, A); mdp: a TokenMDP, `reward` (S, A), `transition` (S, A, S). → (S, A)
    For R = 1, γ = ½, P = (½, ½) and v = (4, 12): 1 + ½ · 8 = 5.
    """
    q = torch.as_tensor(q, dtype=torch.float64)
    same_shape(reward=mdp.reward, q=q)
    v = state_values(q, policy, temperature)                                # (S,)
    return mdp.reward + gamma * mdp.transition @ v


def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    """One Bellman backup at token level: every token is a decision.

    Q(s, w<ʲ, wʲ) ← γ_w · v(s, w≤ʲ)                        inside an action  (Eq. 9, 13)
    Q(s, w<ⁿ, wⁿ) ← R(s, a) + γ Σ_s' P(s'|s, a) v(s', ∅)   wⁿ completes a    (Eq. 10, 14)

    γ_w = γ treats every token as a step (naive token level, NTPO), γ_w = 1 is BAD. Three
    tokens of one action with reward 1: ¼, ½, 1 at γ_w = ½, and 1, 1, 1 under BAD.
    q, policy: (S, N, V), ∅ is prefix 0; mdp: a TokenMDP with `child`, `leaf` (N, V).
    → (S, N, V), −inf at invalid tokens.
    """
    q = torch.as_tensor(q, dtype=torch.float64)
    check_table(q, mdp)
    goes_on = mdp.child >= 0                                                # (N, V)
    complete = mdp.leaf >= 0                                                # (N, V)
    valid = goes_on | complete
    q = q.masked_fill(~valid, -torch.inf)
    v = state_values(q, policy, temperature)                                # (S, N)
    outcome = mdp.reward + gamma * mdp.transition @ v[:, 0]                 # (S, A)
    new = torch.full_like(q, -torch.inf)
    new[:, goes_on] = gamma_token * v[:, mdp.child[goes_on]]
    new[:, complete] = outcome[:, mdp.leaf[complete]]
    return new


def bad_backup(q, mdp, gamma, policy=None, temperature=0.0):
    """One Bellman backup with Action Decomposition (Eq. 13-14): `token_backup`, γ_w = 1."""
    return token_backup(q, mdp, gamma, 1.0, policy, temperature)


def solve(backup, q0, tol=1e-12, max_iters=100_000):
    """The fixed point of a backup, found by repeating it from q0 until nothing moves.

    Stops when no entry moves by more than tol; entries that became −inf (invalid tokens)
    do not count.
    RuntimeError after max_iters backups, also for tables that grow without end.
    """
    q = torch.as_tensor(q0, dtype=torch.float64)
    for _ in range(max_iters):
        new = torch.as_tensor(backup(q), dtype=torch.float64)
        residual = torch.where(new.isneginf(), 0, new - q).abs().max()
        if residual <= tol:                             # never if it is NaN (∞ − ∞)
            return new
        q = new
    raise RuntimeError(f"no fixed point in {max_iters} backups: still {residual:.3g}")


def action_policy(token_policy, mdp):
    """Probability of whole actions by the chain rule, (S, N, V) → (S, A), differentiable.

    π(a|s) = Π_j π(wʲ|s, w<ʲ)                    two tokens of ½ and ¼: ⅛
    """
    token_policy = torch.as_tensor(token_policy)
    check_table(token_policy, mdp)
    number = {prefix: n for n, prefix in enumerate(mdp.prefixes)}
    columns = []
    for action in mdp.actions:
        probability = 1
        for j, token in enumerate(action):
            probability = probability * token_policy[:, number[action[:j]], token]   # (S,)
        columns.append(probability)
    return torch.stack(columns, 1)


# ------------------------------------------------- credit over a stream of tokens


def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    """The discount on what follows each token: where BAD and naive part.

    γ_n = γ_w inside an action,  γ after its last token,  0 after a finished episode's last

    BAD is γ_w = 1; naive is γ_w = γ; at action level every slot is an action's end.
    action_end, done: masks of one shape; `done` counts only at action ends. → floats, same
    shape.
    >>> bad_discounts(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 0, 1]]), gamma=0.5)
    tensor([[1.0000, 0.5000, 1.0000, 0.0000]])
    """
    action_end = torch.as_tensor(action_end)
    done = torch.as_tensor(done)
    same_shape(action_end=action_end, done=done)
    discounts = 0.0 * action_end + gamma_token          # floats; a float mask's dtype stays
    discounts[action_end.bool()] = gamma
    discounts[action_end.bool() & done.bool()] = 0
    return discounts


@torch.no_grad()
def gae(rewards, values, discounts, lambdas, mask, last_values):
    """Generalized advantage estimation on a masked stream of tokens (arXiv 1506.02438).

    δ_n = r_n + γ_n v_{n+1} − v_n     Â_n = δ_n + γ_n λ_n Â_{n+1}     returns_n = Â_n + v_n

    v_{n+1} is the value of the next *written* token: a masked slot passes on what follows
    it, and may hold anything. At γ_w = λ_w = 1 an action's first token gets action-level
    GAE(λ); with λ = .95 at every token (the paper's code) only .95⁴ = .81 of the δ at the
    end of five tokens reaches the first. A time limit is no termination: the caller gives
    it as reward r_n + γ v(o_next) with discount 0.
    rewards, values, discounts, mask: (B, N); lambdas: a scalar or (B, N); last_values (B,):
    what follows a row's last written token. → advantages, returns (B, N), 0 where masked.
    >>> one = torch.ones(1, 3)          # an action of three tokens, reward 1 at its end
    >>> reward = torch.tensor([[0.0, 0.0, 1.0]])
    >>> gae(reward, one / 2, torch.tensor([[1, 1, 0]]), 1.0, one, torch.zeros(1))[0]
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    if torch.as_tensor(lambdas).dim() == 0:
        lambdas = torch.full_like(values, lambdas)
    same_shape(
        mask=mask, rewards=rewards, values=values, discounts=discounts, lambdas=lambdas)
    same_shape(rows=mask[:, 0], last_values=last_values)
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = last_values.to(values)                                     # (B,)
    next_advantage = torch.zeros_like(next_value)                           # (B,)
    for n in reversed(range(mask.shape[1])):
        written = mask[:, n]
        delta = rewards[:, n] + discounts[:, n] * next_value - values[:, n]
        advantage = delta + discounts[:, n] * lambdas[:, n] * next_advantage
        advantages[:, n] = torch.where(written, advantage, 0)
        next_value = torch.where(written, values[:, n], next_value)
        next_advantage = torch.where(written, advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0)


# ------------------------------------------------- PPO losses


def selected(mask, **tensors):
    """The entries of each tensor that the mask selects: the others may hold anything."""
    same_shape(mask=mask, **tensors)
    require(mask.any(), "a mean over nothing: the mask selects no entry")
    return [x[mask.bool()] for x in tensors.values()]


def masked_mean(x, mask):
    """Mean of x over the entries that the mask selects, Σ m x / Σ m. → scalar

    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1, 1, 0])).item()
    2.0
    """
    [entries] = selected(mask, x=x)
    if not entries.is_floating_point():
        entries = entries.float()
    return entries.mean()


def normalize(x, mask):
    """Real entries to mean 0 and population standard deviation 1; zeros where masked.

    (x − μ) / (σ + 1e-8)                        a true zero is an entry like any other

    >>> normalize(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor([-1.,  1.,  0.])
    """
    centred = torch.where(mask.bool(), x - masked_mean(x, mask), 0)
    deviation = masked_mean(centred**2, mask).sqrt()
    return centred / (deviation + 1e-8)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, a mean over real slots (arXiv 1707.06347, Eq. 7).

    ratio = exp(logp − old_logp)   loss = −mean min( ratio · Â, clamp(ratio, 1−ε, 1+ε) · Â )

    logp, old_logp, advantages, mask: (B, N) tokens or (B, T) actions; clip: ε, often .1-.3.
    → loss, and without gradient "kl", the mean of ratio − 1 − log ratio (an estimate of
    KL(π_old, π)), and "clip_fraction", the share of |ratio − 1| > ε.
    >>> new = torch.tensor([[1.5, 0.5]]).log()
    >>> one = torch.ones(1, 2)
    >>> round(ppo_policy_loss(new, 0 * one, one, one)[0].item(), 4)   # −(1.2 + .5) / 2
    -0.85
    """
    logp, old_logp, advantages = selected(
        mask, logp=logp, old_logp=old_logp, advantages=advantages)
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    info = {
        "kl": (ratio - 1 - log_ratio).mean().detach(),
        "clip_fraction": ((ratio - 1).abs() > clip).to(ratio).mean()}
    return -objective.mean(), info


def value_loss(values, old_values, returns, mask, clip=None):
    """Half the squared error of v against returns R; with a clip, not below that of a v
    that stays within ±ε of v_old.

    mean ½ (v − R)²    or    mean ½ max( (v − R)², (v_old + clamp(v − v_old, −ε, ε) − R)² )

    values, old_values, returns, mask: (B, N); clip: ε in units of v, or None. → scalar
    >>> one = torch.ones(1, 1)
    >>> value_loss(3 * one, 0 * one, one, one).item()                      # ½ (3 − 1)²
    2.0
    """
    values, old_values, returns = selected(
        mask, values=values, old_values=old_values, returns=returns)
    error = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return error.mean() / 2


# ------------------------------------------------- the methods and their update

METHODS = {  # policy: who samples ("token": a credit a token, others: one an action)
    "glam": dict(policy="glam", lr=3e-4, color="tab:purple"),
    "twosome": dict(policy="twosome", lr=3e-3, color="tab:green"),
    "action": dict(policy="action", lr=3e-4, color="tab:orange"),
    "ntpo": dict(policy="token", lr=3e-4, color="tab:red"),
    "poad": dict(policy="token", lr=3e-4, color="tab:blue")}


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every knob of a run; its meaning, and its unit, is what `--help` shows."""
    method: str = knob("poad", "a row of METHODS")
    updates: int = knob(24, "rollouts, each followed by one PPO update")
    seed: int = knob(0, "of environments, sampling and minibatches")
    n_envs: int = knob(16, "B, environments side by side")
    n_steps: int = knob(32, "T, actions in each of them per update")
    gamma: float = knob(0.95, "γ, discount between actions")
    lam: float = knob(0.95, "λ of GAE between actions")
    gamma_token: float = knob(None, "γ_w inside an action; if not given 1, for ntpo gamma")
    lam_token: float = knob(None, "λ_w inside an action; if not given 1, for ntpo lam")
    lr: float = knob(None, "Adam's step size for the LM; if not given, see `step_size`")
    critic_lr: float = knob(1e-3, "Adam's step size for the critic")
    epochs: int = knob(3, "passes over a rollout")
    minibatches: int = knob(4, "minibatches of a pass, one step of Adam for each")
    critic_steps: int = knob(0, "of the critic alone, after an update: `fit_critic`")
    clip: float = knob(0.2, "ε of the ratio")
    entropy_coef: float = knob(0.01, "weight of an action's entropy (nats)")
    kl_stop: float = knob(0.1, "KL of an action (nats) that ends an update; inf: never")
    max_grad_norm: float = knob(0.5, "gradient clipping, LM and critic each for itself")

    @property
    def policy(self):
        return METHODS[self.method]["policy"]

    def __post_init__(self):
        require(self.method in METHODS, f"{self.method!r} is no method of {list(METHODS)}")
        for option in fields(Config):
            x = getattr(self, option.name)
            if option.type is int and option.name != "seed":
                least = 0 if option.name == "critic_steps" else 1
                require(isinstance(x, int) and x >= least,
                        f"{option.name} is {x}, not a whole number ≥ {least}")
            if option.type is float and x is not None:
                most = 1 if option.name.startswith(("gamma", "lam")) else torch.inf
                require(0 <= x <= most, f"{option.name} is {x}, not from 0 to {most}")


def inside(config):
    """γ_w and λ_w: as given, else 1, 1; for ntpo, where every token is a step, γ, λ."""
    gamma_token = 1.0
    lam_token = 1.0
    if config.method == "ntpo":
        gamma_token = config.gamma
        lam_token = config.lam
    if config.gamma_token is not None:
        gamma_token = config.gamma_token
    if config.lam_token is not None:
        lam_token = config.lam_token
    return gamma_token, lam_token


def step_size(config, lm):
    """Adam's step size for the LM: as given, else the method's; for a real LM a sixth.

    Real: more than 10⁷ weights. The sixth was found with SmolLM2-135M's last four layers.
    """
    if config.lr is not None:
        return config.lr
    if lm.num_parameters() > 1e7:
        return METHODS[config.method]["lr"] / 6
    return METHODS[config.method]["lr"]


def assign(config, mask, values, rewards, done, last_values):
    """Credit for a rollout: advantages and returns of every slot, (B·T, L) each.

    at the last written slot of action t:   r_n = r_t,  γ_n = γ (0 if done),  λ_n = λ
    at its other slots:                     r_n = 0,    γ_n = γ_w,            λ_n = λ_w

    Then the T actions of an environment, one after the other, are one row (T·L slots) for
    `gae`. mask, values: (B·T, L), environment b's action t in row b·T + t; rewards, done:
    (B, T) or (B·T,); last_values: (B,), v after each environment's last action.
    """
    gamma_token, lam_token = inside(config)
    mask = mask.bool()
    end = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))              # (B·T, L)
    reward = end * rewards.reshape(-1, 1)
    over = end & done.reshape(-1, 1).bool()
    discounts = bad_discounts(end, over, config.gamma, gamma_token)
    lambdas = torch.where(end, config.lam, lam_token)
    slots = dict(
        rewards=reward, values=values, discounts=discounts, lambdas=lambdas, mask=mask)
    rows = {name: x.reshape(len(last_values), -1) for name, x in slots.items()}   # (B, T·L)
    advantages, returns = gae(**rows, last_values=last_values)
    return advantages.view(mask.shape), returns.view(mask.shape)


def column(actions, name):
    """One field of many written actions, padded to one tensor: (B, L)."""
    return pad_sequence([getattr(action, name) for action in actions], batch_first=True)


def written(actions):
    """The mask of a column, (B, L): True on slots of the actions, False on padding."""
    return pad_sequence([torch.ones_like(a.choice) for a in actions], batch_first=True)


def fill(actions, **columns):
    """Write columns (B, L), without their padding, into the fields of B written actions."""
    for name, rows in columns.items():
        for action, row in zip(actions, rows):
            setattr(action, name, row[:len(action.choice)])


def credit(actions, last_values, config):
    """Write advantages, normalised over choices, and returns into the actions of a rollout.

    A forced token, such as the last word of most menu entries, is no choice. It has a value
    and takes part in GAE, but log π = 0 whatever the weights: its advantage moves nothing.
    """
    rewards = last_values.new_tensor([action.reward for action in actions])
    done = last_values.new_tensor([action.done for action in actions])
    values = column(actions, "values")
    choice = column(actions, "choice")
    advantages, returns = assign(
        config, written(actions), values, rewards, done, last_values)
    if choice.any():
        advantages = normalize(advantages, choice)
    fill(actions, advantages=advantages, returns=returns)


def minibatch_loss(agent, batch, config):
    """The loss of a minibatch of written actions. → loss, diagnostics

    loss = Σ_choices PPO loss − entropy_coef · Σ_choices entropy     (averaged over actions)
           + the critic's loss                                       (averaged over slots)

    The unit of policy loss, entropy and KL is the action, whatever its length: the mean
    over choices times the choices per action is the sum over an action's choices.
    """
    menus = [action.menu for action in batch]
    logp, entropy, values = agent.evaluate(batch, menus, config.policy)     # (B, L)
    mask = written(batch)
    choice = column(batch, "choice")
    if not choice.any():
        choice = mask                       # all forced: log π = 0 teaches nothing, v does
    policy_loss, info = ppo_policy_loss(
        logp, column(batch, "logp"), column(batch, "advantages"), choice, config.clip)
    critic_loss = value_loss(
        values, column(batch, "values"), column(batch, "returns"), mask)
    choices_per_action = choice.sum() / len(batch)
    entropy = entropy.sum(1).mean()
    loss = choices_per_action * policy_loss - config.entropy_coef * entropy + critic_loss
    info["kl"] = choices_per_action * info["kl"]
    info |= {"entropy": entropy, "value_loss": critic_loss}
    return loss, {name: x.item() for name, x in info.items()}


def ppo_update(agent, optimizer, rollout, config, generator):
    """One PPO update on what `collect` returned; returns diagnostics.

    "kl" is the last minibatch's: what earlier steps moved. A minibatch above `kl_stop`
    is reported and ends the update.
    """
    actions, last_values = rollout
    credit(actions, last_values, config)
    seen = []
    for _ in range(config.epochs):
        order = torch.randperm(len(actions), generator=generator)
        for indices in order.chunk(config.minibatches):
            loss, info = minibatch_loss(agent, [actions[i] for i in indices], config)
            assert seen or info["kl"] < 1e-5, "the policy that is trained did not sample"
            seen.append(info)
            if info["kl"] > config.kl_stop:
                return diagnostics(actions, seen)
            take_step(optimizer, loss, config)
    return diagnostics(actions, seen)


def take_step(optimizer, loss, config):
    """One step of Adam down the gradient, clipped for LM and critic each for itself."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
    optimizer.step()


def fit_critic(agent, optimizer, actions, config, generator):
    """The critic's own steps, each on 64 actions of recent rollouts (cf. arXiv 2009.04416).

    mean ½ (v_j − γ_w^(n−j) R_n)²           over the slots j of actions of n slots

    R_n is the λ-return at an action's end, as credited after its own rollout, also where
    λ_w < 1 lets advantages rely on what the critic says half way. The policy does not move.
    """
    gamma_token, _ = inside(config)
    for _ in range(config.critic_steps):
        picks = torch.randint(len(actions), (64,), generator=generator)
        batch = [actions[i] for i in picks]
        prompts = [action.prompt for action in batch]
        prefixes = [action.ids[:len(action.choice) - 1] for action in batch]
        values = agent.judge(prompts, prefixes)                             # (64, L)
        mask = written(batch)
        to_come = mask.sum(1, keepdim=True) - mask.cumsum(1)                # n − j
        ends = torch.stack([action.returns[-1:] for action in batch])       # (64, 1)
        returns = gamma_token**to_come * ends
        loss = value_loss(values, column(batch, "values"), returns, mask)
        take_step(optimizer, loss, config)


def diagnostics(actions, seen):
    """Means over an update's minibatches (of kl: the last), their number, tokens."""
    means = {name: mean(info[name] for info in seen) for name in seen[0]}
    tokens = sum(len(action.ids) for action in actions)
    return means | {"kl": seen[-1]["kl"], "minibatches": len(seen), "tokens": tokens}


# ------------------------------------------------- language agent

RESTRICTED = ("glam", "twosome")                    # policies that score a menu's entries
POLICIES = ("token", "action", *RESTRICTED)


@dataclass
class Action:
    """One written action; a slot is a token, or for all policies but "token" the action."""
    prompt: str
    menu: tuple                 # the admissible texts, or None: free text
    text: str                   # for the environment
    ids: tuple                  # its L tokens, the last one eos (or free text's limit)
    choice: torch.Tensor        # (slots,) True where two or more possibilities were open
    logp: torch.Tensor = None               # (slots,) under the distribution that sampled
    entropy: torch.Tensor = None            # (slots,) of that ("action": Σ over its tokens)
    values: torch.Tensor = None             # (slots,) v before the slot
    reward: float = 0.0
    done: bool = False                      # the episode ended with this action
    advantages: torch.Tensor = None         # (slots,) see `credit`
    returns: torch.Tensor = None            # (slots,)


@dataclass(frozen=True, eq=False)               # hashed by identity: a key of `memory`
class Menu:
    """A menu as token sequences, eos included, and as their trie."""
    texts: tuple                # A strings
    entries: list               # A tuples of token ids
    trie: dict                  # prefix → the tokens with which some entry goes on


@lru_cache(maxsize=10_000)
def encode_menu(tokenizer, texts):
    """The Menu of a tuple of strings; ValueError if it is empty or says something twice."""
    require(texts, "the menu is empty: at least one action is expected")
    entries = []
    trie = {}
    for text in texts:
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids     # after a prompt
        entry = (*ids, tokenizer.eos_token_id)
        require(ids and entry not in entries, f"{text!r} is empty or twice in {texts}")
        entries.append(entry)
        for j, token in enumerate(entry):
            trie.setdefault(entry[:j], {})[token] = True
    return Menu(texts, entries, trie)


def choices(menu, action):
    """Whether two or more tokens may come next, before each token of an action."""
    if menu is None:
        return [True] * len(action)
    return [len(menu.trie[action[:j]]) > 1 for j in range(len(action))]


def menu_logp(logits, allowed):
    """Next-token log-probabilities, restricted to what a menu allows and renormalised.

    log π(w) = logit_w − log Σ_{w' allowed} exp(logit_w')   for allowed w, else −inf

    logits: (..., V); allowed: masks (..., V), or None: all. → (..., V), float32
    >>> menu_logp(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([True, True, False])).exp()
    tensor([0.5000, 0.5000, 0.0000])
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed.bool(), -torch.inf)
    return logits.float().log_softmax(-1)


def entropy_of(log_pi):
    """−Σ π log π over the last axis, where −inf marks what cannot be sampled."""
    return -(log_pi.exp() * log_pi.masked_fill(log_pi.isneginf(), 0)).sum(-1)


def pad(rows):
    """R tuples of token ids → one tensor (R, L), and its mask, 1 on tokens."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)


class LanguageAgent(nn.Module):
    """A transformers causal LM, with its tokenizer, that writes actions, and their critic.

    The critic is v(o, w<ʲ) before each token: "head", an MLP that reads the LM's features
    and does not train them, or "copy", an MLP on its own copy of the LM, which it trains.
    """

    def __init__(self, lm, tokenizer, critic="head", max_new_tokens=32):
        super().__init__()
        require(critic in ("head", "copy"), f"critic is {critic!r}, not 'head' or 'copy'")
        require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, not ≥ 1")
        self.eos = tokenizer.eos_token_id
        require(self.eos is not None, "the tokenizer has no eos token to end an action")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"             # of prompts only
        self.lm = lm
        self.tokenizer = tokenizer
        lm.generation_config = GenerationConfig(            # no habits of a checkpoint
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            max_new_tokens=max_new_tokens, eos_token_id=self.eos, pad_token_id=self.eos)
        head = nn.Sequential(
            nn.Linear(lm.config.hidden_size, 128), nn.Tanh(), nn.Linear(128, 1))
        for weights in head[-1].parameters():
            nn.init.zeros_(weights)                         # v = 0 before the first reward
        self.critic = nn.ModuleDict({"head": head.to(lm.device)})
        if critic == "copy":
            self.critic["lm"] = copy.deepcopy(lm)
        self.eval()

    def train(self, mode=True):
        """In either mode no dropout: the policy that is trained is the one that sampled."""
        return super().train(False)

    def _tokenize(self, prompts):
        """Ids and mask of prompts, (B, P) each."""
        out = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.lm.device)
        return out.input_ids, out.attention_mask

    def _forward(self, lm, prompts, prefixes):
        """What an LM says after each of R prompts, and after each token of R prefixes.

        → logits (R, W + 1, V), features (R, W + 1, H), W the longest prefix's length. Each
        of U distinct prompts is read once, up to its last token. Then its cache is copied
        to its rows, and each row reads that last token and its prefix.
        """
        distinct = list(dict.fromkeys(prompts))
        owner = torch.tensor([distinct.index(x) for x in prompts], device=lm.device)
        ids, mask = self._tokenize(distinct)                # (U, P), padded on the left
        positions = (mask.cumsum(1) - 1).clamp(min=0)       # do not count the padding
        cache = DynamicCache(config=lm.config)
        renamed = "cache" in signature(lm.forward).parameters   # since transformers 5.24
        read = partial(lm, **{"cache" if renamed else "past_key_values": cache})
        if ids.shape[1] > 1:
            read(input_ids=ids[:, :-1], attention_mask=mask[:, :-1],
                 position_ids=positions[:, :-1], logits_to_keep=1)
            cache.batch_select_indices(owner)
        more, real = (x.to(lm.device) for x in pad(prefixes))               # (R, W)
        ids = torch.cat([ids[owner, -1:], more], 1)                         # (R, 1 + W)
        mask = torch.cat([mask[owner], real], 1)                            # (R, P + W)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1]:]
        out = read(input_ids=ids, attention_mask=mask, position_ids=positions,
                   output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    def judge(self, prompts, prefixes, features=None):
        """v (R, W + 1) after each of R prompts, and after each token of R prefixes.

        features: (R, W + 1, H), what the policy's LM makes of them, if it has read them; a
        critic with its own copy reads by itself.
        """
        if "lm" in self.critic:
            _, features = self._forward(self.critic["lm"], prompts, prefixes)
        elif features is None:
            with torch.no_grad():
                _, features = self._forward(self.lm, prompts, prefixes)
        return self.critic["head"](features.float()).squeeze(-1)

    def values(self, prompts):
        """v(o), before any token is written: B strings → (B,)."""
        return self.judge(prompts, [()] * len(prompts))[:, 0]

    def columns(self, rows, memory):
        """log π, entropy and v before every token of written actions: (L, 3) tensors.

        rows: (prompt, Menu or None, token ids); with a menu the ids are one of its entries.
        What the dictionary `memory` holds is not read again, so it may live as long as the
        weights stand still: one call while training, a whole rollout while playing.
        """
        new = [row for row in dict.fromkeys(rows) if row not in memory]
        if new:
            memory.update(zip(new, self._compute(*zip(*new))))
        return [memory[row] for row in rows]

    def _compute(self, prompts, menus, actions):
        """`columns` of distinct rows that no memory holds; all have a menu, or none."""
        prefixes = [action[:-1] for action in actions]
        logits, features = self._forward(self.lm, prompts, prefixes)
        values = self.judge(prompts, prefixes, features.detach())           # (R, L)
        ids, mask = (x.to(logits.device) for x in pad(actions))             # (R, L)
        allowed = None
        if menus[0] is not None:
            places = []
            for r, action in enumerate(actions):
                for j in range(len(action)):
                    places += [(r, j, token) for token in menus[r].trie[action[:j]]]
            allowed = (mask == 0)[..., None].repeat(1, 1, logits.shape[-1])
            allowed[tuple(torch.tensor(places).T)] = True                   # [r, j, token]
        log_pi = menu_logp(logits, allowed)                                 # (R, L, V)
        logp = log_pi.gather(-1, ids[..., None]).squeeze(-1)
        table = torch.stack([logp, entropy_of(log_pi), values], -1)         # (R, L, 3)
        return [row[:len(action)] for row, action in zip(table, actions)]

    def score(self, prompts, menus, policy="glam", memory=None):
        """How likely the LM finds each entry of a menu: B tensors (A,), with gradient.

        "glam": Σ_j log p(wʲ|o, w<ʲ)      "twosome": that divided by the number of words

        p is over the whole vocabulary, without eos. "eat it" with p = ½, ¼: log ⅛, ½ log ⅛.
        For other policies it is Σ_j log π, restricted to the menu and with eos.
        prompts: B strings; menus: B lists of A strings; memory: see `columns`.
        """
        require(menus is not None, "scores need menus")
        menus = self._encode(prompts, menus, policy)
        rows = []
        words = []
        for prompt, menu in zip(prompts, menus):
            if policy in RESTRICTED:
                rows += [(prompt, None, entry[:-1]) for entry in menu.entries]
            else:
                rows += [(prompt, menu, entry) for entry in menu.entries]
            words += [len(text.split()) for text in menu.texts]
        if memory is None:
            memory = {}
        columns = pad_sequence(self.columns(rows, memory), batch_first=True)
        scores = columns[..., 0].sum(1)                                     # of all entries
        if policy == "twosome":
            scores = scores / scores.new_tensor(words)
        return list(scores.split([len(menu.texts) for menu in menus]))

    def _encode(self, prompts, menus, policy):
        """B Menus, or B times None (free text); ValueError for what cannot be acted on."""
        require(policy in POLICIES, f"policy is {policy!r}, expected one of {POLICIES}")
        require(not isinstance(prompts, str) and prompts, "expected a list of prompts")
        require(all(prompt.strip() for prompt in prompts), "a prompt is empty")
        free = [None] * len(prompts)
        if menus is None or list(menus) == free:
            require(policy not in RESTRICTED, f"{policy} needs a menu (restricted actions)")
            return free
        require(len(menus) == len(prompts) and None not in menus,
                f"{len(prompts)} prompts need as many menus, or none at all")
        return [encode_menu(self.tokenizer, tuple(menu)) for menu in menus]

    def _menu_policy(self, prompts, menus, policy, memory):
        """log π(a|o), the softmax over a menu's scores: (B, A), −inf beyond its end.

        Scores of "token" and "action" are log π(a|o) already, which it leaves as they are.
        """
        scores = self.score(prompts, menus, policy, memory)
        return pad_sequence(scores, True, -torch.inf).log_softmax(-1)

    def _write_freely(self, prompts, greedy, generator):
        """Free text by `generate` of transformers, up to eos or the limit: B tuples."""
        ids, mask = self._tokenize(prompts)                                 # (B, P)
        seed = torch.randint(2**60, (), generator=generator).item()
        with seeded(seed):                                  # `generate` takes no generator
            out = self.lm.generate(ids, attention_mask=mask, do_sample=not greedy)
        actions = []
        for row in out[:, ids.shape[1]:].tolist():
            if self.eos in row:
                row = row[:row.index(self.eos) + 1]
            actions.append(tuple(row))
        return actions

    @torch.no_grad()
    def act(self, prompts, menus=None, policy="token", greedy=False, generator=None,
            memory=None):
        """Write an action for each of B prompts: a list of B records (`Action`).

        With menus (B lists of strings) an entry is drawn from the softmax over its menu's
        scores. "token": π(a|o) = Π_j π(wʲ|o, w<ʲ), next tokens restricted to the menu's
        trie and renormalised; "action": the same, as one slot; others: see `score`.
        Without menus: free text up to `max_new_tokens`, for "token" and "action".
        greedy: the likeliest entry (free text: token) instead; memory: see `columns`.
        """
        encoded = self._encode(prompts, menus, policy)
        if memory is None:
            memory = {}
        if encoded[0] is None:
            actions = self._write_freely(prompts, greedy, generator)
            texts = self.tokenizer.batch_decode(actions, skip_special_tokens=True)
            texts = [text.strip() for text in texts]
        else:
            log_pi = self._menu_policy(prompts, menus, policy, memory).cpu()        # (B, A)
            pick = log_pi.argmax(-1)
            if not greedy:
                pick = log_pi.exp().multinomial(1, generator=generator)[:, 0]
            actions = [menu.entries[k] for menu, k in zip(encoded, pick)]
            texts = [menu.texts[k] for menu, k in zip(encoded, pick)]
        records = []
        for b, ids in enumerate(actions):
            choice = torch.tensor(choices(encoded[b], ids), device=self.lm.device)
            if policy != "token":
                choice = choice.any(0, keepdim=True)
            menu = encoded[b] and encoded[b].texts
            records.append(Action(prompts[b], menu, texts[b], ids, choice))
        logp, entropy, values = self.evaluate(records, menus, policy, memory)
        fill(records, logp=logp, entropy=entropy, values=values)
        return records

    def evaluate(self, actions, menus=None, policy="token", memory=None):
        """Written actions under the present weights, with gradient: what PPO compares.

        actions: B records of `act`, with its menus (without: log π over the vocabulary) and
        policy; memory: see `columns`, not that of `act` if gradients are wanted.
        → logp, entropy, values: (B, L), zero where padded; (B, 1) for all but "token".
        """
        prompts = [action.prompt for action in actions]
        ids = [action.ids for action in actions]
        encoded = self._encode(prompts, menus, policy)
        if memory is None:
            memory = {}
        if policy in RESTRICTED:
            slots = self._entry_slots(prompts, encoded, ids, policy, memory)
        else:
            slots = self.columns(list(zip(prompts, encoded, ids)), memory)
        if policy == "action":
            slots = [torch.stack([*x[:, :2].sum(0), x[0, 2]])[None] for x in slots]
        return pad_sequence(list(slots), batch_first=True).unbind(-1)

    def _entry_slots(self, prompts, menus, actions, policy, memory):
        """log π(a|o), the entropy of π(·|o), and v(o) of B entries of Menus: (B, 1, 3)."""
        texts = [menu.texts for menu in menus]
        log_pi = self._menu_policy(prompts, texts, policy, memory)          # (B, A)
        pick = [menu.entries.index(ids) for menu, ids in zip(menus, actions)]
        logp = log_pi[range(len(pick)), pick]
        first = [(text, None, menu.entries[0][:-1]) for text, menu in zip(prompts, menus)]
        values = [x[0, 2] for x in self.columns(first, memory)]     # v(o)
        return torch.stack([logp, entropy_of(log_pi), torch.stack(values)], -1)[:, None]

    def save(self, folder):
        """Write LM and tokenizer by `save_pretrained`, the critic beside them."""
        self.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.critic.state_dict(), Path(folder) / "critic.pt")


def tiny_agent(env_fn, seed=0, pretrain_steps=300, critic="head"):
    """A language agent without a download: it has learnt an environment's language only.

    It was trained on observations and random admissible actions, one token a word, and
    knows nothing of what actions do.
    """
    lm, tokenizer = tiny_lm(env_fn, seed, pretrain_steps)
    with seeded(seed):                                          # the critic's first layer
        return LanguageAgent(lm, tokenizer, critic)


def load_agent(model, env_fn, seed=0, device="cpu", train_layers=0, critic="head"):
    """The tiny agent ("tiny"), or an agent with a causal LM from elsewhere.

    model: a hub id, a folder (of `save`, with its critic, or of any `save_pretrained`) or a
    .gguf file, else ValueError; train_layers: only so many last layers learn, 0: all;
    critic: see `LanguageAgent`, if none was saved.
    """
    saved = {}
    if model == "tiny":
        lm, tokenizer = tiny_lm(env_fn, seed)
    else:
        lm, tokenizer = pretrained_lm(model)
        weights = Path(model) / "critic.pt"
        if weights.exists():
            saved = torch.load(weights, map_location="cpu", weights_only=True)
            critic = "copy" if any(name.startswith("lm.") for name in saved) else "head"
    if train_layers:
        lists = (x for x in lm.modules() if isinstance(x, nn.ModuleList))
        layers = next(lists)                                # a transformer's first list
        require(0 < train_layers <= len(layers),
                f"train_layers is {train_layers}, but {model} has {len(layers)} layers")
        lm.requires_grad_(False)                            # a critic's copy inherits it
        layers[-train_layers:].requires_grad_(True)
    with seeded(seed):                                      # the critic's first layer
        agent = LanguageAgent(lm, tokenizer, critic)
    if saved:
        agent.critic.load_state_dict(saved)
    return agent.to(device)


def pretrained_lm(model):
    """Any causal LM of transformers, and its tokenizer."""
    path = Path(model)
    options = {}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        model = path.parent
    try:
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
        return lm, AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:                          # a loader may raise anything
        raise ValueError(f"cannot load {path}: expected tiny, a hub id, a folder or "
                         f"a .gguf file ({str(error)[:90]}…)") from error


# ------------------------------------------------- playing and training


def step_all(agent, players, policy, greedy, generator, memory):
    """Every player takes one action: B records (`Action`), reward and done included."""
    prompts = [player.obs for player in players]
    menus = [player.info.get("menu") for player in players]
    actions = agent.act(prompts, menus, policy, greedy, generator, memory)
    for player, action in zip(players, actions):
        action.reward = player.step(action.text)
        action.done = player.over
    return actions


@torch.no_grad()
def collect(agent, players, config, generator, episodes):
    """A rollout: T actions of each of B players; `episodes` takes the finished ones.

    An episode that the time limit cuts was not over: its last reward gets + γ v(o_next).
    → B·T records, player b's action t in place b·T + t; v(o) of what players see now (B,).
    """
    memory = {}                                                 # the weights stand still
    steps = []
    for _ in range(config.n_steps):
        actions = step_all(agent, players, config.policy, False, generator, memory)
        steps.append(actions)
        for player, action in zip(players, actions):
            if player.cut:
                action.reward += config.gamma * agent.values([player.obs]).item()
            if player.over:
                episodes.append((player.total, float(player.info["success"])))
                player.begin()
    rollout = list(chain.from_iterable(zip(*steps)))            # player by player
    return rollout, agent.values([player.obs for player in players])


def train(agent, env_fn, config):
    """Train the agent in place, on environments that env_fn() makes. One seed, one run (on
    a CPU; a GPU adds up in no fixed order).

    Yields one dict per update: update, env_steps, episodes; return_mean (undiscounted) and
    success_rate of the last 100 episodes, with standard errors (None before one has ended);
    seconds; and what `ppo_update` returns.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    players = [Player(env_fn(), seed_of(config.seed, b)) for b in range(config.n_envs)]
    optimizer = torch.optim.Adam([
        dict(params=agent.lm.parameters(), lr=step_size(config, agent.lm)),
        dict(params=agent.critic.parameters(), lr=config.critic_lr)])
    episodes = []
    recent = deque(maxlen=4)                                    # rollouts for `fit_critic`
    for update in range(1, config.updates + 1):
        rollout = collect(agent, players, config, generator, episodes)
        info = ppo_update(agent, optimizer, rollout, config, generator)
        recent.append(rollout[0])
        fit_critic(agent, optimizer, list(chain(*recent)), config, generator)
        steps = update * config.n_envs * config.n_steps
        seconds = time.perf_counter() - begin
        yield {"update": update, "env_steps": steps, "seconds": seconds,
               **summary(episodes[-100:]), "episodes": len(episodes), **info}


def summary(outcomes):
    """Means of (return, success) over episodes, with standard errors; None without any."""
    result = {"episodes": len(outcomes)}
    for k, name in enumerate(("return_mean", "success_rate")):
        xs = [outcome[k] for outcome in outcomes]
        result[name] = mean(xs) if xs else None
        result[name + "_error"] = pstdev(xs) / len(xs) ** 0.5 if xs else None
    return result


def seed_of(seed, b, exam=0):
    """The seed of environment b: even for training, odd for exams."""
    return 2 * (1000 * seed + b) + exam


def play(agent, env_fn, episodes, policy="token", greedy=False, seed=0):
    """Play whole episodes, on seeds that training never uses.

    → (return, success) of each, and the first one as text, a line an action.
    """
    require(episodes >= 1, f"{episodes} episodes to play, expected at least 1")
    players = [Player(env_fn(), seed_of(seed, b, exam=1)) for b in range(episodes)]
    generator = torch.Generator().manual_seed(seed)
    memory = {}
    story = []
    playing = players
    while playing:
        first, *_ = step_all(agent, playing, policy, greedy, generator, memory)
        if playing[0] is players[0]:
            story.append(f"{first.prompt}\n  → {first.text}  ({first.reward:g})")
        playing = [player for player in playing if not player.over]
    outcomes = [(player.total, float(player.info["success"])) for player in players]
    return outcomes, "\n".join(story)


# ------------------------------------------------- command line

PRESETS = {  # where an environment needs other settings than Config's
    "food": dict(wording="long"),
    "lunch": dict(updates=10, n_steps=16),
    "orders": dict(updates=20, lr=1e-3),
    "scikit": dict(
        updates=12, n_envs=32, n_steps=8, entropy_coef=0.001, kl_stop=torch.inf)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REAL = dict(epochs=4, minibatches=1)        # one minibatch: what repeats is read once


@dataclass(frozen=True)
class Options(Config):
    """The command line: a run's Config, and what else can be asked for."""
    method: str = knob("", f"some of {','.join(METHODS)}; default: all that can run")
    env: str = knob("food", f"one of {', '.join(ENVS)}")
    wording: str = knob("", "of food: long (its default here) or short")
    env_options: str = knob("", "other options of the environment, as guests=1,slots=2")
    model: str = knob("tiny", "tiny, a hub id, a folder or a .gguf file")
    train_layers: int = knob(0, "how many of its last layers learn; 0: all")
    critic: Literal["head", "copy"] = knob("head", "reads the policy's LM, or its copy")
    device: str = knob(DEVICE, "cpu or cuda; default: the GPU if there is one")
    seeds: int = knob(1, "how many runs of each method, from --seed on")
    out: str = knob("", "JSON file for the numbers; default runs/ENV.json")
    save: str = knob("", "folder for the trained models and their critics")
    eval: int = knob(0, "play so many episodes, sampled and greedy; no training")

    def __post_init__(self):
        if self.method in METHODS:          # else several: each run checks its own
            super().__post_init__()


def parse(argv):
    """The options: what was typed, else PRESETS and REAL, else the defaults."""
    parser = transformers.HfArgumentParser(Options)
    parser.error = lambda message: parser.exit(2, f"poad.py: {message}\n")
    typed, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS.get(typed.env, {}))
    if typed.model != "tiny":
        parser.set_defaults(**REAL)
    [options] = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return options


def prepare(options):
    """What can be known to fail fails here, before any training. → env_fn, configs"""
    settings = {}
    if options.wording:
        settings["wording"] = options.wording
    for pair in filter(None, options.env_options.split(",")):
        name, _, value = pair.partition("=")
        settings[name] = int(value) if value.isdecimal() else value
    env_fn = partial(make, options.env, **settings)
    _, info = env_fn().reset(seed=0)
    able = [name for name in METHODS if "menu" in info or name not in RESTRICTED]
    methods = able
    if options.method:
        methods = options.method.split(",")
    require(set(methods) <= set(able), f"--method {options.method}: {options.env} can be "
            f"learnt by {', '.join(able)} (glam and twosome need a menu)")
    require(options.seeds >= 1, f"--seeds is {options.seeds}, expected at least 1")
    require(options.eval >= 0, f"--eval is {options.eval}, expected at least 0")
    require(options.train_layers >= 0, f"--train_layers is {options.train_layers}, below 0")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {error}") from error
    configs = []
    for seed in range(options.seed, options.seed + options.seeds):
        configs += [replace(options, method=method, seed=seed) for method in methods]
    return env_fn, configs


def run(agent, env_fn, config, record):
    """Train with a progress bar, then examine; `record` is filled on the way."""
    name = f"{config.method:8} seed {config.seed}"
    bar = tqdm(train(agent, env_fn, config), name, config.updates)
    for metrics in bar:
        record["metrics"].append(metrics)
        if metrics["episodes"] >= 16:               # the first to end are the short ones
            bar.set_postfix(success=metrics["success_rate"])
    outcomes, _ = play(agent, env_fn, 100, config.policy, seed=config.seed)
    record["exam"] = summary(outcomes)


def demonstrate(agent, env_fn, config):
    """Play sampled, then greedy episodes; print a transcript of each, and how all went."""
    for greedy in (False, True):
        outcomes, story = play(
            agent, env_fn, config.eval, config.policy, greedy, config.seed)
        print(story)
        print(f"{config.method}, greedy: {greedy}", summary(outcomes))


def cell(exams, name):
    """Mean ± standard error: over seeds if there are several, else over the episodes."""
    means = [exam[name] for exam in exams]
    error = exams[0][name + "_error"]
    if len(exams) > 1:
        error = stdev(means) / len(means) ** 0.5
    return f"{mean(means):.2f} ± {error:.2f}"


def report(runs, path):
    """Print a table of the exams, a row a method, and draw the learning curves."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(layout="constrained")
    print("method    exam: success     mean return   seconds")
    for method, row in METHODS.items():
        group = [run for run in runs if run["config"]["method"] == method]
        if group:
            axes.plot([], color=row["color"], label=method)        # for the legend
        for run in group:
            curve = [m for m in run["metrics"] if m["episodes"] >= 16]
            steps = [m["env_steps"] for m in curve]
            axes.plot(steps, [m["success_rate"] for m in curve], color=row["color"])
        exams = [run["exam"] for run in group if run["exam"]]
        if exams:
            seconds = mean(run["metrics"][-1]["seconds"] for run in group)
            print(f"{method:9} {cell(exams, 'success_rate'):>13}"
                  f"{cell(exams, 'return_mean'):>16}{seconds:>10.0f}")
    figure.legend(loc="outside right upper")
    axes.set(title=f"Who learns {runs[0]['config']['env']}?", xlabel="environment steps",
             ylabel="success, last 100 episodes (from the 16th on)")
    figure.savefig(path, dpi=130)


def main(argv=None):
    """Train and examine each method with each seed (or only play), and keep the numbers."""
    if argv is None:
        argv = sys.argv[1:]
    runs = []
    starts = {}                                 # seed → the agent to start from
    try:
        options = parse(argv)
        env_fn, configs = prepare(options)
        out = Path(options.out or f"runs/{options.env}.json").with_suffix(".json")
        for folder in (out.parent, Path(options.save)):         # Path("") is here
            folder.mkdir(parents=True, exist_ok=True)
        if options.model == "tiny":
            torch.set_num_threads(1)                # it is too small to share
        for config in configs:
            if config.seed not in starts:
                starts = {config.seed: load_agent(
                    config.model, env_fn, config.seed, config.device, config.train_layers,
                    config.critic)}
            agent = copy.deepcopy(starts[config.seed])
            if config.eval:
                demonstrate(agent, env_fn, config)
                continue
            used = asdict(config) | {"lr": step_size(config, agent.lm)}
            used["critic"] = "copy" if "lm" in agent.critic else "head"
            used = {name: None if x == torch.inf else x for name, x in used.items()}   # JSON
            record = {"config": used, "exam": None, "metrics": []}
            runs.append(record)
            run(agent, env_fn, config, record)
            if config.save:
                agent.save(Path(config.save) / f"{config.method}-{config.seed}")
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept")
    except (ValueError, OSError, ImportError) as error:
        sys.exit("poad.py: " + " ".join(str(error).split()))
    finally:
        runs = [record for record in runs if record["metrics"]]
        if runs:
            command = shlex.join(["python", "poad.py", *argv])
            out.write_text(json.dumps({"command": command, "runs": runs}, indent=1))
            report(runs, out.with_suffix(".png"))
            print(f"curves: {out.with_suffix('.png')}   numbers: {out}")


if __name__ == "__main__":
    main()
