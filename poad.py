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
    G          returns              what an action brought, as far as known    (B, N)
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from statistics import mean, median, stdev

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

# What BAD is, exactly, on tables small enough to solve; training calls none of this. A
# TokenMDP numbers all beginnings of its actions, ∅ is prefix 0. child[n, w] is the prefix
# that word w leads to from prefix n, leaf[n, w] the action that it completes, −1 if none.


def state_values(q, policy=None, temperature=0.0):
    """Value of a choice: its best option, the policy's mean, or the soft maximum.

    v = max_w Q(w)   or   Σ_w π(w) Q(w)   or   τ log Σ_w exp(Q(w) / τ)   (soft: App. B.3)

    q, policy: (..., V) → (...), in q's dtype. −inf marks an invalid token; probability 0
    adds 0. ValueError where shapes differ, or for both a policy and a temperature.
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

    q, policy: (S, A), else ValueError; mdp: a TokenMDP, `reward` (S, A), `transition`
    (S, A, S). → (S, A), float64
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
    q, policy: (S, N, V), else ValueError, ∅ is prefix 0; mdp: a TokenMDP with `child`,
    `leaf` (N, V), both −1 where a token is invalid: q may hold anything there.
    → (S, N, V), float64, −inf at invalid tokens
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

    In the policy's dtype; another shape than (S, N, V) is a ValueError.
    """
    token_policy = torch.as_tensor(token_policy)
    check_table(token_policy, mdp)
    columns = []
    for action in mdp.actions:
        probability = 1
        for j, token in enumerate(action):
            n = mdp.prefixes.index(action[:j])
            probability = probability * token_policy[:, n, token]           # (S,)
        columns.append(probability)
    return torch.stack(columns, 1)


# ------------------------------------------------- credit over a stream of tokens


def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    """The discount on what follows each token: where BAD and naive differ.

    γ_n = γ_w inside an action,  γ after its last token,  0 after a finished episode's last

    BAD is γ_w = 1; naive is γ_w = γ; at action level every slot is an action's end.
    action_end, done: masks of one shape, else ValueError; `done` counts only at action
    ends. → floats, same shape
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
    it, and may hold anything.
    rewards, values, discounts, mask: (B, N); lambdas: a scalar or (B, N); last_values (B,):
    what follows a row's last written token. Other shapes: ValueError. → advantages, returns
    (B, N), 0 where masked, in the dtype of `values` and without gradient.
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

    mask: bool or 0/1, of any dtype and x's shape. ValueError if not, or if all is masked.
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

    x, mask: as in `masked_mean`. Entries that are all alike become 0 exactly, although
    their mean is rounded.
    >>> normalize(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor([-1.,  1.,  0.])
    """
    [entries] = selected(mask, x=x)
    x = x - entries[0]                          # so that equal entries are 0 exactly
    centred = torch.where(mask.bool(), x - masked_mean(x, mask), 0)
    deviation = masked_mean(centred**2, mask).sqrt()
    return centred / (deviation + 1e-8)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, a mean over real slots (arXiv 1707.06347, Eq. 7).

    ratio = exp(logp − old_logp)   loss = −mean min( ratio · Â, clamp(ratio, 1−ε, 1+ε) · Â )

    logp, old_logp, advantages, mask: (B, N) tokens or (B, T) actions; clip: ε, often .1-.3.
    → loss, and a dict of scalar tensors without gradient: "kl", the mean of ratio − 1 −
    log ratio (an estimate of KL(π_old, π)), and "clip_fraction", the share of
    |ratio − 1| > ε. A log ratio above 20 counts as 20, lest exp overflows. ValueError where
    shapes differ, or all is masked.
    >>> new = torch.tensor([[1.5, 0.5]]).log()
    >>> one = torch.ones(1, 2)
    >>> round(ppo_policy_loss(new, 0 * one, one, one)[0].item(), 4)   # −(1.2 + .5) / 2
    -0.85
    """
    logp, old_logp, advantages = selected(
        mask, logp=logp, old_logp=old_logp, advantages=advantages)
    log_ratio = (logp - old_logp).clamp(max=20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    info = {
        "kl": (ratio - 1 - log_ratio).mean().detach(),
        "clip_fraction": ((ratio - 1).abs() > clip).to(ratio).mean()}
    return -objective.mean(), info


def value_loss(values, returns, mask):
    """Half the squared error of v against returns R, a mean over real slots.

    mean ½ (v − R)²

    values, returns, mask: (B, N), else ValueError, also if all is masked. → scalar
    >>> one = torch.ones(1, 1)
    >>> value_loss(3 * one, one, one).item()                               # ½ (3 − 1)²
    2.0
    """
    values, returns = selected(mask, values=values, returns=returns)
    return ((values - returns) ** 2).mean() / 2


# ------------------------------------------------- the methods and their update


@dataclass
class Action:
    """One written action, in slots: its tokens, or (all policies but "token") the whole.

    The `Menu`, the sentences allowed here, is "eat it", "eat pizza"; written is "eat it":
    three tokens, of which only the second could have been another.

        policy     ids              choice                   logp
        "token"    (eat, it, eos)   (False, True, False)     (0, log ½, 0)
        "action"   (eat, it, eos)   (True,)                  (log ½,)
    """
    prompt: str                     # what was read
    menu: object                    # the `Menu` it was chosen from; None: free text
    text: str                       # for the environment
    ids: tuple                      # its L tokens, the last one eos (or free text's limit)
    choice: torch.Tensor            # (slots,) True where two or more tokens were possible
    logp: torch.Tensor = None       # (slots,) under the distribution that sampled
    entropy: torch.Tensor = None    # (slots,) of that ("action": Σ over its tokens)
    reward: float = 0.0
    done: bool = False              # nothing of its episode follows in the rollout
    after: str = None               # what would be read next, where it was cut short
    returns: torch.Tensor = None            # (slots,) what the critic should say
    advantages: torch.Tensor = None         # (slots,) see `credit`


# Who samples; Adam's step size for the LM; a colour. "token" gets a credit for each token,
# with γ_w and λ_w inside an action (see `inside`), the others one for the whole action.
METHODS = {
    # the softmax over a menu of Σ log p (GLAM, arXiv 2302.02662), or of that divided by the
    # number of words (TWOSOME, arXiv 2401.14151)
    "glam": dict(policy="glam", lr=1e-4, color="tab:purple"),
    "twosome": dict(policy="twosome", lr=1e-3, color="tab:green"),
    # the control: POAD's policy, one credit
    "action": dict(policy="action", lr=1e-3, color="tab:orange"),
    # naive token level, every token a step (Eq. 9-10): γ_w = γ, λ_w = λ
    "ntpo": dict(policy="token", lr=1e-3, color="tab:red"),
    # BAD (Eq. 13-14): γ_w = 1, λ_w = 1 − trust
    "poad": dict(policy="token", lr=1e-3, color="tab:blue")}


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every knob of a run; its meaning, and its unit, is what `--help` shows."""
    method: str = knob("poad", "a row of METHODS")
    updates: int = knob(16, "rollouts, each followed by one update; 0: only the exam")
    seed: int = knob(0, "of the tiny LM, environments, sampling and minibatches")
    n_envs: int = knob(16, "B, environments side by side")
    n_steps: int = knob(32, "T, actions in each of them per update")
    gamma: float = knob(0.95, "γ, discount between actions")
    lam: float = knob(0.95, "λ of GAE between actions")
    gamma_token: float = knob(None, "γ_w inside an action; if not given 1, for ntpo γ")
    lam_token: float = knob(None, "λ_w inside an action; if not given 1 minus the measured "
                            "trust in the critic, for ntpo λ")
    lr: float = knob(None, "Adam's step size for the LM; if not given, see METHODS")
    critic_lr: float = knob(1e-3, "Adam's step size for the critic")
    critic_steps: int = knob(100, "steps of the critic, on 64 actions each, per update")
    epochs: int = knob(3, "passes over a rollout")
    minibatches: int = knob(4, "minibatches of a pass, one step of Adam for each")
    clip: float = knob(0.2, "ε of the ratio")
    entropy_coef: float = knob(0.01, "weight of an action's entropy (nats)")
    kl_stop: float = knob(0.1, "KL of an action (nats) that ends an update; inf: never")
    max_grad_norm: float = knob(0.5, "gradient clipping, LM and critic each for itself")

    def __post_init__(self):
        require(self.method in METHODS, f"{self.method!r} is no method of {list(METHODS)}")
        counts = self.n_envs, self.n_steps, self.epochs, self.minibatches
        whole = *counts, self.updates, self.critic_steps
        require(all(isinstance(x, int) for x in whole) and min(counts) >= 1,
                "updates, critic_steps, n_envs, n_steps, epochs and minibatches are whole "
                "numbers, the last four at least 1")
        require(self.minibatches <= self.n_envs * self.n_steps,
                "there are more minibatches than actions, n_envs × n_steps")
        shares = self.gamma, self.lam, self.gamma_token, self.lam_token
        require(all(x is None or 0 <= x <= 1 for x in shares),
                "gamma, lam, gamma_token and lam_token are from 0 to 1")
        sizes = (self.updates, self.lr, self.critic_lr, self.critic_steps, self.clip,
                 self.entropy_coef, self.kl_stop, self.max_grad_norm)
        require(all(x is None or x >= 0 for x in sizes), "no knob but seed is below 0")

    @property
    def policy(self):
        return METHODS[self.method]["policy"]

    @property
    def step_size(self):
        if self.lr is None:
            return METHODS[self.method]["lr"]
        return self.lr


def inside(config, trust=0.0):
    """γ_w and λ_w: what was given, else what the method wants.

    Trust in the critic is from 0 to 1. Without any (the default), λ_w = 1 never takes its
    word for how an action will end; with all, λ_w = 0 always does.
    """
    gamma_token = 1.0
    lam_token = 1.0 - trust
    if config.method == "ntpo":                             # every token is a step
        gamma_token = config.gamma
        lam_token = config.lam
    if config.gamma_token is not None:
        gamma_token = config.gamma_token
    if config.lam_token is not None:
        lam_token = config.lam_token
    return gamma_token, lam_token


def assign(config, mask, values, rewards, done, last_values, trust=0.0):
    """Credit for a rollout: advantages and returns of every slot, (B·T, L) each.

    at the last written slot of action t:   r_n = r_t,  γ_n = γ (0 if done),  λ_n = λ
    at its other slots:                     r_n = 0,    γ_n = γ_w,            λ_n = λ_w

    Then the T actions of an environment, one after the other, are one row (T·L slots) for
    `gae`. At γ_w = λ_w = 1 an action's first token gets action-level GAE(λ); with λ = .95
    at every token (the paper's code) only .95⁴ = .81 of the δ at the end of five tokens
    reaches the first.
    mask, values: (B·T, L), environment b's action t in row b·T + t; rewards, done: (B, T)
    or (B·T,); last_values: (B,), v after each environment's last action; trust: `inside`.
    """
    gamma_token, lam_token = inside(config, trust)
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


def judge(agent, actions):
    """The critic's v(o, w<ʲ) before every slot of B written actions, (B, L).

    A whole action is one slot, and before it nothing is written: v(o).
    """
    prompts = [action.prompt for action in actions]
    prefixes = [action.ids[:len(action.choice) - 1] for action in actions]
    return agent.judge(prompts, prefixes)


def assign_rollout(agent, actions, values, config, trust=0.0):
    """`assign` for the B·T actions of a rollout, with the critic's values (B·T, L).

    An episode that was cut was not over: its last action is `done` for GAE, and γ v(o_next)
    joins its reward instead.
    """
    rewards = torch.tensor([action.reward for action in actions])           # (B·T,)
    cut = [i for i, action in enumerate(actions) if action.after is not None]
    if cut:
        rewards[cut] += config.gamma * agent.values([actions[i].after for i in cut])
    done = torch.tensor([action.done for action in actions])
    nothing = torch.zeros(config.n_envs)                    # follows an environment's last
    return assign(config, written(actions), values, rewards, done, nothing, trust)


@torch.no_grad()
def measure_trust(agent, actions, config):
    """Write the critic's targets into a fresh rollout, and measure, from 0 to 1, how well
    it knew them before.

    R² = 1 − Σ (G − v(o, w<ⁿ))² / Σ (G − v(o))²         trust = max(0, R²)

    Of what the prompt leaves open about the outcome, it is the share that the sentence
    tells the critic. G_t = r_t + γ ((1 − λ) v(o_t+1) + λ G_t+1) is the λ-return between
    actions (λ_w = 1; with γ_w < 1 what follows is discounted inside, too). The target of
    slot j, `returns`, is γ_w^(n−j) G.
    """
    values = judge(agent, actions)                                          # (B·T, L)
    between = replace(config, lam_token=1.0)
    _, returns = assign_rollout(agent, actions, values, between)
    fill(actions, returns=returns)
    error = (returns - values)**2                                           # (B·T, L)
    last = written(actions).sum(1, keepdim=True) - 1
    share = (error.gather(1, last).sum() + 1e-8) / (error[:, 0].sum() + 1e-8)
    return max(0.0, 1 - share.item())


def fit_critic(agent, optimizer, actions, config, generator):
    """Train the critic, each step on 64 actions of recent rollouts. → the last loss

    mean ½ (v(o, w<ʲ) − γ_w^(n−j) G)²       over the slots j of actions of n slots
    """
    loss = torch.zeros(())
    for _ in range(config.critic_steps):
        picks = torch.randint(len(actions), (64,), generator=generator)
        batch = [actions[i] for i in picks]
        loss = value_loss(judge(agent, batch), column(batch, "returns"), written(batch))
        take_step(optimizer, loss, config)
    return loss.item()


@torch.no_grad()
def credit(agent, actions, config, trust):
    """Write advantages, normalised over choices, into the actions of a rollout.

    First between actions, with λ_w = 1 (or as given): G of every action. Then inside each
    action, which is over with G, with λ_w = 1 − trust: so trusting the critic inside
    actions does not shorten what λ passes back from later ones.
    A forced token, such as the last word of most menu entries, is no choice. It has a value
    and takes part in GAE, but log π = 0 whatever the weights: its advantage moves nothing.
    """
    mask = written(actions)                                                 # (B·T, L)
    values = judge(agent, actions)
    _, returns = assign_rollout(agent, actions, values, config)
    outcomes = returns.gather(1, mask.sum(1, keepdim=True) - 1)             # G (B·T, 1)
    over = torch.ones(len(actions))
    advantages, _ = assign(config, mask, values, outcomes, over, 0 * over, trust)
    choice = column(actions, "choice")
    if choice.any():
        advantages = normalize(advantages, choice)
    fill(actions, advantages=advantages)


def minibatch_loss(agent, batch, config):
    """The policy's loss on a minibatch of written actions. → loss, diagnostics

    loss = Σ_choices PPO loss − entropy_coef · Σ_choices entropy     (averaged over actions)

    The unit of loss, entropy and KL is the action, whatever its length: the mean over
    choices times the choices per action is the sum over an action's choices.
    """
    logp, entropy = agent.evaluate(batch, config.policy)                    # (B, L)
    choice = column(batch, "choice")
    policy_loss, info = ppo_policy_loss(
        logp, column(batch, "logp"), column(batch, "advantages"), choice, config.clip)
    choices_per_action = choice.sum() / len(batch)
    entropy = entropy.sum(1).mean()
    loss = choices_per_action * policy_loss - config.entropy_coef * entropy
    info["kl"] = choices_per_action * info["kl"]
    info["entropy"] = entropy
    return loss, {name: x.item() for name, x in info.items()}


def ppo_update(agent, optimizer, actions, config, generator):
    """One PPO update of the policy on credited actions; returns diagnostics.

    A minibatch whose KL is above `kl_stop` is reported, and ends the update.
    """
    seen = []
    for _ in range(config.epochs):
        order = torch.randperm(len(actions), generator=generator)
        for indices in order.tensor_split(config.minibatches):
            batch = [actions[i] for i in indices]
            if not column(batch, "choice").any():           # nothing to learn
                continue
            loss, info = minibatch_loss(agent, batch, config)
            assert seen or not info["kl"] > 1e-5, (
                "the policy that is trained did not sample: read with TF32, bfloat16?")
            seen.append(info)
            if info["kl"] > config.kl_stop:
                return diagnostics(seen) | {"stopped": True}
            take_step(optimizer, loss, config)
    return diagnostics(seen) | {"stopped": False}


def take_step(optimizer, loss, config):
    """One step of Adam down the gradient, which is clipped to a norm."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        require(loss.isfinite() and norm.isfinite(),
                f"the loss is {loss.item()}, the norm of its gradient {norm}: "
                "see step sizes and the LM's precision")
    optimizer.step()


def diagnostics(seen):
    """Means over an update's minibatches, of "kl" the last; and their number."""
    means = {"kl": 0.0, "clip_fraction": 0.0, "entropy": 0.0}      # where all was forced
    for name in means:
        means[name] = mean([info[name] for info in seen] or [0.0])
    if seen:
        means["kl"] = seen[-1]["kl"]
    return means | {"minibatches": len(seen)}


# ------------------------------------------------- language agent

RESTRICTED = ("glam", "twosome")                    # policies that score a menu's entries
POLICIES = ("token", "action", *RESTRICTED)


@lru_cache(maxsize=100_000)
def encode(tokenizer, text):
    """The token ids of a text to be continued: special tokens once, no eos at the end."""
    bos = tokenizer.bos_token
    brings_bos = bos is not None and text.startswith(bos)       # as chat templates do
    ids = tokenizer(text, add_special_tokens=not brings_bos).input_ids
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()
    require(ids and text.strip(), f"the tokenizer makes no token of {text!r}")
    return tuple(ids)


@dataclass(frozen=True, eq=False)               # hashed by identity
class Menu:
    """What may be said after a prompt, as token sequences, eos included, and their trie."""
    texts: tuple                # A strings
    entries: list               # A tuples of token ids
    trie: dict                  # prefix → the tokens with which some entry goes on

    def options(self, ids):
        """The tokens that were possible where each token of an entry was written."""
        return [tuple(self.trie[ids[:j]]) for j in range(len(ids))]


@lru_cache(maxsize=10_000)
def encode_menu(tokenizer, prompt, texts):
    """The Menu of a tuple of strings after a prompt; ValueError for what cannot be one.

    An entry's tokens are those that the tokenizer adds to the prompt's when it reads both
    as one text, with a space between them unless the prompt ends in white space.
    """
    require(texts, "the menu is empty: at least one action is expected")
    start = encode(tokenizer, prompt)
    gap = " " * (not prompt[-1].isspace())
    entries = []
    trie = {}
    for text in texts:
        ids = encode(tokenizer, prompt + gap + text)
        require(ids[:len(start)] == start,
                f"to the tokenizer the end of {prompt!r} and the beginning of {text!r} are "
                "one token: end the prompt with a word")
        entry = (*ids[len(start):], tokenizer.eos_token_id)
        require(len(entry) > 1 and entry not in entries,
                f"{text!r} is empty, or the tokenizer cannot tell it from another entry "
                f"of {texts}")
        entries.append(entry)
        for j, token in enumerate(entry):
            trie.setdefault(entry[:j], {})[token] = None            # a dict, for its order
    return Menu(texts, entries, trie)


def menu_logp(logits, allowed):
    """Next-token log-probabilities, restricted to what a menu allows and renormalised.

    log π(w) = logit_w − log Σ_{w' allowed} exp(logit_w')   for allowed w, else −inf

    logits: (..., V); allowed: masks (..., V), or None: all. → (..., V), float32
    >>> menu_logp(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([True, True, False])).exp()
    tensor([0.5000, 0.5000, 0.0000])
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed.bool(), -torch.inf)
    return logits.log_softmax(-1)


def entropy_of(log_pi):
    """−Σ π log π over the last axis, where −inf marks what cannot be sampled."""
    return -(log_pi.exp() * log_pi.masked_fill(log_pi.isneginf(), 0)).sum(-1)


def pad(rows, device="cpu", side="right"):
    """R tuples of token ids → one tensor (R, L), and its mask, True on tokens."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, True, -1, side).to(device)
    return ids.clamp(min=0), ids >= 0


class LanguageAgent(nn.Module):
    """A transformers causal LM, with its tokenizer, that writes actions; and their critic.

    The critic v(o, w<ʲ) is a linear head on its own copy of the LM's body. Who calls whom:
    act → _menu_policy → score (of every entry of the menus) → slots → _read, to choose;
    act → evaluate → slots, to record; judge → _read. What act, evaluate, score and judge
    return lies on the CPU.
    """

    def __init__(self, lm, tokenizer, max_new_tokens=32):
        super().__init__()
        require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, not ≥ 1")
        self.eos = tokenizer.eos_token_id
        require(self.eos is not None, "the tokenizer has no eos token to end an action")
        self.lm = lm
        self.tokenizer = tokenizer
        self.memory = None                                  # see `standing_still`
        lm.generation_config = GenerationConfig(            # no habits of a checkpoint
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, remove_invalid_values=True,
            max_new_tokens=max_new_tokens, eos_token_id=self.eos, pad_token_id=self.eos)
        self.body = copy.deepcopy(lm.base_model)            # frozen layers stay frozen
        self.eval()
        self.head = nn.Linear(self._test(), 1, device=lm.device)
        for weights in self.head.parameters():
            nn.init.zeros_(weights)                         # v = 0 before the first reward

    @property
    def critic(self):
        """What `fit_critic` trains, as one module."""
        return nn.ModuleDict({"body": self.body, "head": self.head})

    def train(self, mode=True):
        """In either mode no dropout: the policy that is trained is the one that sampled."""
        return super().train(False)

    @torch.no_grad()
    def _test(self):
        """Find a way to read that gives what one forward a prefix gives, or ValueError.

        → H, the size of the body's features.
        """
        rows = [((1, 2, 3), (4, 5)), ((6,), (2, 1)), ((1, 2, 3), (7, 4))]
        expected = []
        for prompt, prefix in rows:
            for j in range(3):
                ids = torch.tensor([prompt + prefix[:j]], device=self.lm.device)
                expected.append(self.lm(input_ids=ids, use_cache=False).logits[0, -1])
        expected = torch.stack(expected)                                    # (9, V)
        for self.shares_prompts in (True, False):           # stays at the first that passes
            try:
                error = self._read(self.lm, rows).flatten(0, 1) - expected
            except Exception:                               # a model may fail in any way
                continue
            if error.abs().max() < 0.02 * expected.std():
                return self._read(self.body, rows).shape[-1]
        raise ValueError(f"{type(self.lm).__name__} is no causal language model: what it "
                         "says after some tokens depends on what follows them")

    def _read(self, model, rows):
        """What a model says after each of R prompts, and after each token of R prefixes.

        rows: pairs of token tuples, prompt and prefix. → (R, W + 1, V) logits of the LM, or
        (R, W + 1, H) features of a body; W is the longest prefix's length. Plainly: prompt
        and prefix are one row, padded on its right, where a causal LM does not look.
        """
        self._check_length(max(len(prompt) + len(prefix) for prompt, prefix in rows))
        prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
        repeat = len(prompts) < len(rows) and max(map(len, prompts)) > 1
        if self.shares_prompts and repeat:
            return self._read_shared(model, prompts, rows)
        ids, _ = pad([prompt + prefix for prompt, prefix in rows], model.device)
        out = model(input_ids=ids, use_cache=False)[0]                      # (R, P + W, ·)
        parts = []
        for row, (prompt, prefix) in zip(out, rows):
            last = len(prompt) - 1                          # the prompt's last token
            parts.append(row[last:last + len(prefix) + 1])
        return pad_sequence(parts, batch_first=True)                        # (R, W + 1, ·)

    def _read_shared(self, model, prompts, rows):
        """`_read` where prompts repeat: each of U is read once, up to its last token.

        Then its cache is copied to its rows, and each reads that last token and its prefix.
        """
        number = {prompt: u for u, prompt in enumerate(prompts)}
        owner = torch.tensor([number[prompt] for prompt, _ in rows], device=model.device)
        more, real = pad([prefix for _, prefix in rows], model.device)      # (R, W)
        ids, mask = pad(prompts, model.device, "left")                      # (U, P)
        whole = torch.cat([mask[owner], real], 1)                           # (R, P + W)
        new = torch.cat([ids[owner, -1:], more], 1)                         # (R, 1 + W)
        cache = DynamicCache(config=model.config)

        def step(model, ids, mask):
            positions = (mask.cumsum(1) - 1).clamp(min=0)   # do not count the padding
            positions = positions[:, -ids.shape[1]:]
            return model(
                input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache)[0]

        step(model.base_model, ids[:, :-1], mask[:, :-1])
        cache.batch_select_indices(owner)
        return step(model, new, whole)                                      # (R, W + 1, ·)

    def _check_length(self, longest):
        """ValueError if a prompt with what follows it is longer than the LM's positions."""
        limit = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        require(limit is None or longest <= limit,
                f"a prompt and its action are {longest} tokens, and the LM reads at most "
                f"{limit}")

    def judge(self, prompts, prefixes):
        """v (B, W + 1) after each of B prompts, and after each token of B prefixes."""
        prompts = [encode(self.tokenizer, prompt) for prompt in prompts]
        rows = list(zip(prompts, prefixes))
        number = {row: r for r, row in enumerate(dict.fromkeys(rows))}  # equal rows once
        features = self._read(self.body, list(number))
        values = self.head(features.float()).squeeze(-1).cpu()
        return values[[number[row] for row in rows]]

    def values(self, prompts):
        """v(o), before any token is written: B strings → (B,)."""
        return self.judge(prompts, [()] * len(prompts))[:, 0]

    @contextmanager
    def standing_still(self):
        """Inside, no weight changes, and nothing is read twice."""
        self.memory = {}
        try:
            yield
        finally:
            self.memory = None

    def slots(self, rows):
        """log π and entropy of every token of written actions: a tensor (L, 2) for each.

        rows: (prompt, Menu or None, token ids); with a Menu the ids are one of its entries.
        """
        known = {}
        if self.memory is not None:
            known = self.memory
        new = [row for row in dict.fromkeys(rows) if row not in known]
        for start in range(0, len(new), 256):               # large menus in parts
            part = new[start:start + 256]
            known.update(zip(part, self._slots(part)))
        return [known[row] for row in rows]

    def _slots(self, rows):
        """`slots` of R distinct rows, M tokens in all; all have a Menu, or none has."""
        prompts, menus, actions = zip(*rows)
        prompts = [encode(self.tokenizer, prompt) for prompt in prompts]
        _, real = pad(actions)                                              # (R, L)
        logits = self._read(self.lm, list(zip(prompts, [ids[:-1] for ids in actions])))
        logits = logits[real]                                               # (M, V)
        tokens = list(chain(*actions))                         # M of V
        allowed = None
        if menus[0] is not None:
            options = list(chain(*map(Menu.options, menus, actions)))
            tokens = [x.index(token) for x, token in zip(options, tokens)]  # M of K
            options, allowed = pad(options, logits.device)                  # (M, K)
            logits = logits.gather(1, options)
        log_pi = menu_logp(logits, allowed)
        logp = log_pi[range(len(tokens)), tokens]                           # (M,)
        require(not logp.isnan().any(), "the LM's log-probabilities are NaN: see step size "
                "and precision")
        slots = torch.stack([logp, entropy_of(log_pi)], 1).cpu()            # (M, 2)
        return slots.split([len(ids) for ids in actions])

    def score(self, prompts, menus, policy="glam"):
        """How likely the LM finds each entry of a menu: B tensors (A,), with gradient.

        "glam": Σ_j log p(wʲ|o, w<ʲ)      "twosome": that divided by the number of words

        p is over the whole vocabulary, without eos. "eat it" with p = ½, ¼: log ⅛, ½ log ⅛.
        For other policies it is Σ_j log π, restricted to the menu and with eos.
        prompts: B strings; menus: B lists of A strings.
        """
        require(menus is not None, "scores need menus")
        menus = self._menus(prompts, menus, policy)
        rows = []
        words = []
        for prompt, menu in zip(prompts, menus):
            words += [len(text.split()) for text in menu.texts]
            if policy in RESTRICTED:
                rows += [(prompt, None, entry[:-1]) for entry in menu.entries]
            else:
                rows += [(prompt, menu, entry) for entry in menu.entries]
        slots = pad_sequence(self.slots(rows), batch_first=True)
        scores = slots[..., 0].sum(1)                                       # of all entries
        if policy == "twosome":
            scores = scores / torch.tensor(words)
        return list(scores.split([len(menu.texts) for menu in menus]))

    def _menus(self, prompts, menus, policy):
        """B Menus, or B times None (free text); ValueError for what cannot be acted on."""
        require(policy in POLICIES, f"policy is {policy!r}, expected one of {POLICIES}")
        require(not isinstance(prompts, str) and prompts, "expected a list of prompts")
        if menus is None or list(menus) == [None] * len(prompts):
            require(policy not in RESTRICTED, f"{policy} needs a menu (restricted actions)")
            return [None] * len(prompts)
        lists = [menu for menu in menus if isinstance(menu, (list, tuple))]
        require(len(lists) == len(menus) == len(prompts),
                f"{len(prompts)} prompts need as many menus, each a list of texts, or none")
        return [encode_menu(self.tokenizer, *x) for x in zip(prompts, map(tuple, lists))]

    def _menu_policy(self, prompts, menus, policy):
        """log π(a|o), the softmax over a menu's scores: (B, A), −inf beyond its end.

        Scores of "token" and "action" are log π(a|o) already, which it leaves as they are.
        """
        scores = self.score(prompts, [menu.texts for menu in menus], policy)
        return pad_sequence(scores, True, -torch.inf).log_softmax(-1)

    def _write_freely(self, prompts, greedy, generator):
        """Free text by `generate` of transformers, up to eos or the limit: B tuples."""
        require(self.shares_prompts, f"{type(self.lm).__name__} cannot be read with a "
                "cache: it can choose from menus, but not write freely")
        prompts = [encode(self.tokenizer, prompt) for prompt in prompts]
        ids, mask = pad(prompts, self.lm.device, "left")                    # (B, P)
        self._check_length(ids.shape[1] + self.lm.generation_config.max_new_tokens)
        seed = torch.randint(2**60, (), generator=generator).item()
        with seeded(seed):                                  # `generate` takes no generator
            out = self.lm.generate(ids, attention_mask=mask.long(), do_sample=not greedy)
        actions = []
        for row in out[:, ids.shape[1]:].tolist():
            if self.eos in row:
                row = row[:row.index(self.eos) + 1]
            actions.append(tuple(row))
        return actions

    @torch.no_grad()
    def act(self, prompts, menus=None, policy="token", greedy=False, generator=None):
        """Write an action for each of B prompts: a list of B records (`Action`).

        With menus (B lists of strings) an entry is drawn from the softmax over its menu's
        scores. "token": π(a|o) = Π_j π(wʲ|o, w<ʲ), next tokens restricted to the menu's
        trie and renormalised; "action": the same, as one slot; others: see `score`.
        Without menus: free text up to `max_new_tokens`, for "token" and "action".
        greedy: the likeliest entry (free text: token) instead.
        """
        menus = self._menus(prompts, menus, policy)
        if menus[0] is None:
            actions = self._write_freely(prompts, greedy, generator)
            texts = self.tokenizer.batch_decode(actions, skip_special_tokens=True)
            texts = [text.strip() for text in texts]
        else:
            log_pi = self._menu_policy(prompts, menus, policy)              # (B, A)
            pick = log_pi.argmax(-1)
            if not greedy:
                pick = log_pi.exp().multinomial(1, generator=generator)[:, 0]
            actions = [menu.entries[k] for menu, k in zip(menus, pick)]
            texts = [menu.texts[k] for menu, k in zip(menus, pick)]
        records = []
        for prompt, menu, text, ids in zip(prompts, menus, texts, actions):
            choice = torch.ones(len(ids), dtype=torch.bool)
            if menu is not None:
                choice = torch.tensor([len(x) > 1 for x in menu.options(ids)])
            if policy != "token":
                choice = choice.any(0, keepdim=True)
            records.append(Action(prompt, menu, text, ids, choice))
        logp, entropy = self.evaluate(records, policy)
        fill(records, logp=logp, entropy=entropy)
        return records

    def evaluate(self, actions, policy="token"):
        """Written actions under the present weights, with gradient: what PPO compares.

        actions: B records of `act` with this policy; where a menu is None, log π is over
        the vocabulary. → logp, entropy: (B, L), zero where padded; (B, 1) unless "token".
        """
        if policy not in RESTRICTED:
            slots = self.slots([(a.prompt, a.menu, a.ids) for a in actions])
            if policy == "action":
                slots = [x.sum(0, keepdim=True) for x in slots]
            return pad_sequence(slots, batch_first=True).unbind(-1)
        log_pi = self._menu_policy(
            [a.prompt for a in actions], [a.menu for a in actions], policy)     # (B, A)
        pick = [a.menu.entries.index(a.ids) for a in actions]
        logp = log_pi[range(len(pick)), pick]
        return logp[:, None], entropy_of(log_pi)[:, None]

    def save(self, folder):
        """Write LM and tokenizer by `save_pretrained`, the critic beside them."""
        self.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.critic.state_dict(), Path(folder) / "critic.pt")


def tiny_agent(env_fn, seed=0, pretrain_steps=300):
    """A language agent without a download: it has learnt an environment's language only.

    It was trained on observations and random admissible actions, one token a word, and
    knows nothing of what actions do.
    """
    return LanguageAgent(*tiny_lm(env_fn, seed, pretrain_steps))


def load_agent(model, env_fn, seed=0, device="cpu", train_layers=0):
    """The tiny agent ("tiny"), or an agent with a causal LM from elsewhere.

    model: a hub id, a folder (of `save`, with its critic, or of any `save_pretrained`) or a
    .gguf file, else ValueError; train_layers: only so many last layers learn, 0: all.
    """
    if model == "tiny":
        lm, tokenizer = tiny_lm(env_fn, seed)
    else:
        try:
            lm, tokenizer = pretrained(model)
        except Exception as error:                          # a loader may raise anything
            raise ValueError(f"cannot load {model}: expected tiny, a hub id, a folder or "
                             f"a .gguf file. {error}") from error
    if train_layers:
        lists = (x for x in lm.modules() if isinstance(x, nn.ModuleList))
        layers = next(lists)                                # a transformer's first list
        require(0 < train_layers <= len(layers),
                f"train_layers is {train_layers}, but {model} has {len(layers)} layers")
        lm.requires_grad_(False)                            # the critic's copy inherits it
        layers[-train_layers:].requires_grad_(True)
    agent = LanguageAgent(lm, tokenizer)
    saved = Path(model) / "critic.pt"
    if model != "tiny" and saved.exists():
        try:
            agent.critic.load_state_dict(torch.load(saved, "cpu", weights_only=True))
        except Exception as error:                          # the same
            raise ValueError(
                f"cannot load {saved}: it is broken, or of another model") from error
    return agent.to(device)


def pretrained(model):
    """A causal LM of transformers, and its tokenizer."""
    path = Path(model)
    options = {}
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        model = path.parent
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    lm.hf_quantizer = None                                  # or it could not be saved
    return lm, AutoTokenizer.from_pretrained(model, **options)


# ------------------------------------------------- playing and training


def step_all(agent, players, policy, greedy, generator):
    """Every player takes one action: B records (`Action`), reward and done included."""
    prompts = [player.obs for player in players]
    menus = [player.info.get("menu") for player in players]
    actions = agent.act(prompts, menus, policy, greedy, generator)
    for player, action in zip(players, actions):
        action.reward = player.step(action.text)
        action.done = player.over
    return actions


def collect(agent, players, config, generator, episodes):
    """A rollout: T actions of each of B players; `episodes` takes the finished ones.

    Where a time limit, or the rollout's end, cuts an episode, the record says what would
    have been read `after`. → B·T records, player b's action t in place b·T + t.
    """
    steps = []
    with agent.standing_still():
        for _ in range(config.n_steps):
            actions = step_all(agent, players, config.policy, False, generator)
            steps.append(actions)
            for player, action in zip(players, actions):
                if player.cut:
                    action.after = player.obs
                if player.over:
                    episodes.append((player.total, float(player.info["success"])))
                    player.begin()
    for player, action in zip(players, steps[-1]):
        if not action.done:
            action.after = player.obs
            action.done = True
    return list(chain(*zip(*steps)))               # player by player


def train(agent, env_fn, config):
    """Train the agent in place, on environments that env_fn() makes. One seed, one run (on
    a CPU; a GPU adds up in no fixed order).

    Yields one dict per update: update, env_steps, episodes; return_mean (undiscounted) and
    success_rate of the last 100 episodes (None before one has ended); seconds, trust,
    value_loss; and what `ppo_update` returns.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    players = [Player(env_fn(), seed_of(config.seed, b)) for b in range(config.n_envs)]
    optimizer = torch.optim.Adam(agent.lm.parameters(), config.step_size)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), config.critic_lr)
    episodes = []
    recent = deque(maxlen=4)                                    # rollouts, for the critic
    for update in range(1, config.updates + 1):
        rollout = collect(agent, players, config, generator, episodes)
        recent.append(rollout)
        trust = measure_trust(agent, rollout, config)       # and what `fit_critic` reads
        critic_loss = fit_critic(
            agent, critic_optimizer, list(chain(*recent)), config, generator)
        credit(agent, rollout, config, trust)
        info = ppo_update(agent, optimizer, rollout, config, generator)
        yield {"update": update, "env_steps": update * len(rollout),
               "seconds": time.perf_counter() - begin,
               **summary(episodes[-100:]), "episodes": len(episodes),
               "trust": trust, "value_loss": critic_loss, **info}


def summary(outcomes):
    """Means of (return, success) over episodes; None without any."""
    result = dict(episodes=len(outcomes), return_mean=None, success_rate=None)
    if outcomes:
        result["return_mean"], result["success_rate"] = map(mean, zip(*outcomes))
    return result


def seed_of(seed, b, exam=0):
    """The seed of environment b: even for training, odd for exams."""
    return 2 * (1000 * seed + b) + exam


def play(agent, env_fn, episodes, policy="token", greedy=False, seed=0, max_steps=1000):
    """Play whole episodes, on seeds that training never uses.

    → (return, success) of each, and the first one as text, two lines an action. ValueError
    if one has not ended after max_steps actions.
    """
    players = [Player(env_fn(), seed_of(seed, b, exam=1)) for b in range(episodes)]
    generator = torch.Generator().manual_seed(seed)
    story = []
    playing = players
    with agent.standing_still():
        for _ in range(max_steps):
            first, *_ = step_all(agent, playing, policy, greedy, generator)
            if playing[0] is players[0]:
                story.append(f"{first.prompt}\n  → {first.text}  ({first.reward:g})")
            playing = [player for player in playing if not player.over]
            if not playing:
                break
    require(not playing, f"an episode has not ended after {max_steps} actions")
    outcomes = [(player.total, float(player.info["success"])) for player in players]
    return outcomes, "\n".join(story)


# ------------------------------------------------- command line

PRESETS = {  # where an environment, or a real model, needs other settings than the defaults
    "lunch": dict(updates=10, n_steps=16),
    "orders": dict(method="action,ntpo,poad", env_options="guests=1", updates=20,
                   n_envs=128, n_steps=1, minibatches=2, lr=2e-3, kl_stop=0.3),
    "scikit": dict(env_options="dataset=iris", updates=12, n_envs=32, n_steps=8,
                   entropy_coef=0.001, kl_stop=0.3),
    "real": dict(
        updates=10, lr=5e-5, critic_lr=1e-4, critic_steps=10, epochs=4, minibatches=1)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # Student's t, 2 to 10 seeds


@dataclass(frozen=True)
class Options(Config):
    """The command line: a run's Config, and what else can be asked for."""
    method: str = knob("", f"some of {','.join(METHODS)}; default: all that can run "
                      "(orders: the last three)")
    env: str = knob("food", f"one of {', '.join(ENVS)}")
    env_options: str = knob("", "of the environment, such as guests=1,slots=2")
    model: str = knob("tiny", "tiny, a hub id, a folder or a .gguf file")
    train_layers: int = knob(0, "how many of its last layers learn; 0: all")
    device: str = knob(DEVICE, "cpu or cuda; default: the GPU if there is one")
    seeds: int = knob(1, "how many runs of each method, from --seed on")
    out: str = knob("", "JSON file for the numbers; default runs/ENV.json")
    save: str = knob("", "folder for the trained models and their critics")

    def __post_init__(self):
        """`method` may be several; `prepare` makes Options with one, which are checked."""
        if self.method in METHODS:
            super().__post_init__()


def parse(argv):
    """The options: what was typed, else PRESETS, else the defaults."""
    parser = transformers.HfArgumentParser(Options)
    parser.error = lambda message: parser.exit(2, f"poad.py: {message}\n")
    typed, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS.get(typed.env, {}))
    if typed.model != "tiny":
        parser.set_defaults(**PRESETS["real"])
    [options] = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return options


def prepare(options):
    """What can be known to fail fails here, before any training. → env_fn, configs"""
    settings = {}
    given = PRESETS.get(options.env, {}).get("env_options", "")
    for pair in filter(None, f"{given},{options.env_options}".split(",")):
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
    require(options.seeds >= 1 and options.train_layers >= 0,
            "--seeds is at least 1, --train_layers at least 0")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason, *_ = str(error).splitlines()                # CUDA goes on for lines
        raise ValueError(f"--device {options.device}: {reason}") from error
    configs = []
    for seed in range(options.seed, options.seed + options.seeds):
        configs += [replace(options, method=method, seed=seed) for method in methods]
    return env_fn, configs


def run(agent, env_fn, config, record):
    """Train with a progress bar, then examine; `record` is filled. → a transcript"""
    metrics = {"trust": 0.0, "seconds": 0.0}                # where nothing is trained
    bar = tqdm(train(agent, env_fn, config), config.method, config.updates)
    for metrics in bar:
        record["metrics"].append(metrics)
        if metrics["episodes"] >= 16:               # the first to end are the short ones
            bar.set_postfix(success=metrics["success_rate"], trust=metrics["trust"])
    outcomes, story = play(agent, env_fn, 100, config.policy, seed=config.seed)
    cost = {"trust": metrics["trust"], "seconds": metrics["seconds"]}
    record["exam"] = summary(outcomes) | cost
    return story


def interval(xs):
    """Mean ± half a 95 % interval over seeds; of one seed only the number."""
    if len(xs) == 1:
        return f"{xs[0]:.2f}"
    half = T95[min(len(xs), 10) - 2] * stdev(xs) / len(xs) ** 0.5
    return f"{mean(xs):.2f} ± {half:.2f}"


def over_seeds(xs):
    """`interval`; where only some seeds fail (below ½), the median and how many do."""
    fails = sum(x < 0.5 for x in xs)
    if 0 < fails < len(xs):
        return f"{median(xs):.2f} ({fails} fail)"
    return interval(xs)


def report(runs, path):
    """Print a table of the exams, a row a method, and draw the learning curves."""
    columns = {"success_rate": over_seeds, "return_mean": over_seeds, "trust": interval,
               "seconds": interval}
    print(" " * 8, *(f"{name:>15}" for name in columns))
    for method in METHODS:
        exams = [x["exam"] for x in runs if x["exam"] and x["config"]["method"] == method]
        if exams:
            cells = [tell([exam[name] for exam in exams]) for name, tell in columns.items()]
            print(f"{method:8}", *(f"{cell:>15}" for cell in cells))
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(layout="constrained")
    for method in dict.fromkeys(x["config"]["method"] for x in runs):
        axes.plot([], color=METHODS[method]["color"], label=method)         # for the legend
    for x in runs:
        curve = [m for m in x["metrics"] if m["episodes"] >= 16]
        axes.plot([m["env_steps"] for m in curve], [m["success_rate"] for m in curve],
                  color=METHODS[x["config"]["method"]]["color"])
    figure.legend(loc="outside right upper")
    axes.set(title=f"Who learns {runs[0]['config']['env']}?", xlabel="environment steps",
             ylabel="success, last 100 episodes (from the 16th on)")
    figure.savefig(path, dpi=130)
    print(f"curves: {path}")


def main(argv):
    """Train and examine each method with each seed, and keep the numbers."""
    runs = []
    load = lru_cache(maxsize=1)(load_agent)                 # one start for all methods
    try:
        options = parse(argv)
        env_fn, configs = prepare(options)
        out = Path(options.out or f"runs/{options.env}.json")
        for folder in (out.parent, Path(options.save)):     # Path("") is here
            folder.mkdir(parents=True, exist_ok=True)
        out.open("a").close()                               # if it can fail, it fails now
        if options.model == "tiny":
            torch.set_num_threads(1)                        # it is too small to share
        print(f"{len(configs)} runs on {options.device}")
        for config in configs:
            start = load(options.model, env_fn, config.seed, "cpu", options.train_layers)
            agent = copy.deepcopy(start).to(options.device)
            used = asdict(config) | {"lr": config.step_size}
            runs.append({"config": used, "exam": None, "metrics": []})
            folder = Path(options.save) / f"{config.method}-{config.seed}"
            if options.save:
                agent.save(folder)                          # if that can fail, it fails now
            story = run(agent, env_fn, config, runs[-1])
            if options.save:
                agent.save(folder)
        print(story)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept")
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print("poad.py:", error, file=sys.stderr)
        sys.exit(2)
    finally:
        if runs:
            record = {"command": shlex.join(["python", "poad.py", *argv]), "runs": runs}
            text = json.dumps(record, indent=1)
            out.write_text(text.replace("Infinity", "null"))            # as JSON has it
            print(f"numbers: {out}")
    if runs:
        report(runs, f"{out}.png")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                # consoles without Greek
    main(sys.argv[1:])
