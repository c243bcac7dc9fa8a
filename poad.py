"""POAD: policy optimization with action decomposition, in one file to read top to bottom.

Paper: "Reinforcing Language Agents via Policy Optimization with Action Decomposition",
arXiv 2405.15821, NeurIPS 2024; "Eq. n" is its equation n unless another source is named.
At step t an agent sees o_t and writes an action a_t = (w¹ … wⁿ) token by token; it gets a
reward r_t and sees o_{t+1}. BAD, the Bellman backup with Action Decomposition, discounts
*between* actions (γ), never *inside* one (γ_w = 1). POAD is PPO with BAD: its critic, its
advantages and its clipped ratio are per token.

    symbol     name                 meaning                                    shape
    γ, γ_w     gamma, gamma_token   discount between actions, inside one       scalars
    λ, λ_w     lam, lam_token       share of the next token's Â in a token's   scalars
    G          returns              what an action brought, as far as known    (B, N)
    Q(o,w<,w)  q                    value of writing w after the prefix w<     (S, N, V)
    v(o,w<)    values               value of an observation and a prefix       (B, N)
    π(w|o,w<)  policy, logp         (log-)probability, (S, N, V) and, written, (B, N)
    Â          advantages           credit of a token                          (B, N)

Sizes: B rows (environments, or written actions), N token slots of a row (in tables:
prefixes), T steps, L tokens of an action, S states, A actions (of a menu), V vocabulary,
H features; n is an action's length in wⁿ, elsewhere the number of a slot or prefix. Where
a whole action gets one credit, it is one slot.
"""
import argparse
import copy
import json
import math
import re
import shlex
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from itertools import chain, takewhile
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn as nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

from envs import joined, make, make_players, require, seeded, tiny_lm


def same_shape(**tensors):
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    require(len(set(shapes.values())) == 1, f"these must have one shape: {shapes}")


def check_table(table, mdp):
    shape = (len(mdp.reward), *mdp.child.shape)                             # (S, N, V)
    require(table.shape == shape, f"the table is {tuple(table.shape)}, not {shape}")


# ------------------------------------------------- Bellman backups (tables, float64)

# What BAD is, exactly, on tables small enough to solve; training calls none of this. A
# TokenMDP numbers all beginnings of its actions, ∅ is prefix 0. child[n, w] is the prefix
# that word w leads to from prefix n, leaf[n, w] the action it completes; −1 means none.

def state_values(q, policy=None, temperature=0.0):
    """Value of a choice: its best option, the policy's mean, or the soft maximum.

    v = max_w Q(w)   or   Σ_w π(w) Q(w)   or   τ log Σ_w exp(Q(w) / τ)   (soft: App. B.3)

    q, policy: floats (..., V) → (...), in q's dtype; −inf marks an invalid token, and
    0 · (−inf) = 0. ValueError where shapes differ, or for both a policy and a temperature.
    >>> q = torch.tensor([1.0, 3.0, -torch.inf])
    >>> state_values(q).item(), state_values(q, policy=torch.tensor([0.5, 0.5, 0.0])).item()
    (3.0, 2.0)
    """
    require(policy is None or temperature == 0, "give a policy or a temperature, not both")
    if policy is not None:
        same_shape(q=q, policy=policy)
        return torch.where(policy == 0, 0, policy * q).sum(-1)
    if temperature > 0:
        return temperature * torch.logsumexp(q / temperature, -1)
    return q.amax(-1)


def action_backup(q, mdp, gamma, policy=None, temperature=0.0):
    """One Bellman backup at action level: the whole action is one decision (Eq. 4-5).

    Q(s, a) ← R(s, a) + γ Σ_s' P(s'|s, a) v(s')

    q, policy: (S, A), else ValueError; mdp: a TokenMDP. → (S, A), float64
    For R = 1, γ = ½, P = (½, ½) and v = (4, 12): 1 + ½ · 8 = 5.
    """
    same_shape(reward=mdp.reward, q=q)
    v = state_values(q.double(), policy, temperature)                                # (S,)
    return mdp.reward + gamma * mdp.transition @ v


def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    """One Bellman backup at token level: every token is a decision.

    Q(s, w<ʲ, wʲ) ← γ_w · v(s, w≤ʲ)                        inside an action  (Eq. 9, 13)
    Q(s, w<ⁿ, wⁿ) ← R(s, a) + γ Σ_s' P(s'|s, a) v(s', ∅)   wⁿ completes a    (Eq. 10, 14)

    γ_w = γ treats every token as a step (naive token level, NTPO), γ_w = 1 is BAD. Three
    tokens of one action with reward 1: ¼, ½, 1 at γ_w = ½, and 1, 1, 1 under BAD.
    q, policy: (S, N, V), else ValueError; at invalid tokens q may hold anything.
    → (S, N, V), float64, −inf at invalid tokens
    """
    check_table(q, mdp)
    goes_on = mdp.child >= 0                                                # (N, V)
    complete = mdp.leaf >= 0                                                # (N, V)
    valid = goes_on | complete
    q = q.double().masked_fill(~valid, -torch.inf)
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
    """The fixed point of a backup, repeated from q0 until no entry moves by more than tol.

    Entries that became −inf (invalid tokens) do not count. RuntimeError after max_iters.
    """
    q = torch.as_tensor(q0, dtype=torch.float64)
    residual = torch.inf
    for _ in range(max_iters):
        new = backup(q)
        residual = torch.where(new.isneginf(), 0, new - q).abs().max()
        if residual <= tol:                             # never if it is NaN (∞ − ∞)
            return new
        q = new
    raise RuntimeError(f"no fixed point in {max_iters} backups: still {residual:.3g}")


def action_policy(token_policy, mdp):
    """Probability of whole actions by the chain rule, (S, N, V) → (S, A), differentiable.

    π(a|s) = Π_j π(wʲ|s, w<ʲ)                    two tokens of ½ and ¼: ⅛

    In the policy's dtype; ValueError for another shape.
    """
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

    γ_n = γ_w inside an action,  γ after its last token,  0 after an episode's last

    BAD is γ_w = 1; naive is γ_w = γ; at action level every slot is an action's end. An
    episode that was cut gets 0, too: `credit` has put γ v(o_next) into its last reward.
    action_end, done (read at action ends): masks of one shape, else ValueError. → floats
    >>> bad_discounts(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 0, 1]]), gamma=0.5)
    tensor([[1.0000, 0.5000, 1.0000, 0.0000]])
    """
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
    what follows each row. Other shapes: ValueError. → advantages, returns (B, N), 0 where
    masked, in the dtype of `values`, without gradient
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

    x: floats; mask: bool or 0/1, in x's shape. ValueError if not, or if all is masked.
    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1, 1, 0])).item()
    2.0
    """
    [entries] = selected(mask, x=x)
    return entries.mean()


def normalize(x, mask):
    """Real entries to mean 0 and population standard deviation 1; zeros where masked.

    (x − μ) / (σ + 1e-8)                        a true zero is an entry like any other

    x, mask: as in `masked_mean`.
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

    logp, old_logp, advantages, mask: (B, N) tokens or (B, T) actions, else ValueError, also
    if all is masked; clip: ε, often .1-.3. → loss, and scalars without gradient: "kl", the
    mean of ratio − 1 − log ratio (never below 0, as eˣ ≥ 1 + x; it estimates
    KL(π_old, π)), and "clip_fraction", the share of |ratio − 1| > ε. A log ratio above 20
    counts as 20, lest exp overflows.
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
    """Half the squared error of v against returns G, a mean over real slots.

    mean ½ (v − G)²

    values, returns, mask: (B, N), else ValueError, also if all is masked. → scalar
    >>> one = torch.ones(1, 1)
    >>> value_loss(3 * one, one, one).item()                               # ½ (3 − 1)²
    2.0
    """
    values, returns = selected(mask, values=values, returns=returns)
    return ((values - returns) ** 2).mean() / 2


# ------------------------------------------------- the methods and their update

# Of an agent they need judge(rows), v before every slot, with rows as in `Action.before`,
# and evaluate(actions, policy), log π and entropy of every slot.

@dataclass
class Action:
    """One written action in slots: one a token under policy "token", else one for it all.

    The menu is "eat it", "eat pizza"; written is "eat it": three tokens, of which only the
    second could have been another.

        policy     ids              choice                   logp
        "token"    (eat, it, eos)   (False, True, False)     (0, log ½, 0)
        "action"   (eat, it, eos)   (True,)                  (log ½,)

    With log p over the whole vocabulary instead, PPO's ratio would not be that of the
    distribution that sampled, and forced tokens, whose log p is below 0, would be pushed.
    """

    prompt: str                     # what was read, as text
    context: tuple                  # and as token ids
    menu: object                    # the `Menu` it was chosen from; None: free text
    text: str                       # for the environment
    ids: tuple                      # its L tokens, the last one eos (or free text's limit)
    choice: torch.Tensor = None     # (slots,) True where two or more tokens were possible
    logp: torch.Tensor = None       # (slots,) under the distribution that sampled
    reward: float = 0.0
    done: bool = False              # its episode's last in a rollout: over, or cut
    after: tuple = None             # token ids that would be read next, where it was cut
    returns: torch.Tensor = None            # (slots,) λ-returns, what the critic learns
    advantages: torch.Tensor = None         # (slots,) what the policy learns from

    @property
    def mask(self):
        """True on every slot; `column` pads with False."""
        return torch.ones_like(self.choice)

    @property
    def before(self):
        """Its row for `judge` (v before each slot): prompt, ids before the last slot."""
        return self.context, self.ids[:len(self.choice) - 1]


def column(actions, name):
    """One field of B written actions as one tensor, (B, slots), padded with 0."""
    return pad_sequence([getattr(action, name) for action in actions], batch_first=True)


# Who samples; Adam's step size for the LM; a colour. "token" gets a credit for each token,
# with γ_w and λ_w inside an action (`Config.inside`), the others one for the whole action.
METHODS = {
    # the softmax over a menu of Σ log p (GLAM, arXiv 2302.02662), or of that divided by the
    # number of words (TWOSOME, arXiv 2401.14151)
    "glam": dict(policy="glam", lr=1e-4, color="tab:purple"),
    "twosome": dict(policy="twosome", lr=1e-3, color="tab:green"),
    # the control: POAD's policy, one credit
    "action": dict(policy="action", lr=1e-3, color="tab:orange"),
    # naive token level, every token a step (Eq. 9-10): γ_w = γ, λ_w = λ
    "ntpo": dict(policy="token", lr=1e-3, color="tab:red"),
    # BAD (Eq. 13-14): γ_w = 1, λ_w = 1
    "poad": dict(policy="token", lr=1e-3, color="tab:blue")}
LEAST = dict(n_envs=1, n_steps=1, epochs=1, minibatches=1, max_grad_norm=1e-9)  # others: 0


@dataclass(frozen=True)
class Config:
    """Every knob of a run.

    method: a row of METHODS; on the command line several, with commas
    updates: rollouts, each followed by one update; 0: only the exam
    seed: of the tiny LM, environments, sampling and minibatches
    n_envs: B, environments side by side
    n_steps: T, actions in each of them per update
    gamma: γ, discount between actions
    lam: λ of GAE between actions
    gamma_token: γ_w inside an action; if not given 1, for ntpo γ
    lam_token: λ_w inside an action; if not given 1, for ntpo λ
    lr: Adam's step size for the LM; if not given 1e-3, for glam 1e-4
    critic_lr: Adam's step size for the critic
    critic_steps: steps of the critic, on 64 actions each, per update
    epochs: passes over a rollout
    minibatches: minibatches of a pass, one step of Adam for each
    clip: ε of the ratio
    entropy_coef: weight of an action's entropy (nats)
    kl_stop: KL of an action, its choices' added up (nats), that ends an update; inf: never
    max_grad_norm: gradient clipping, LM and critic each for itself
    """

    method: str = "poad"
    updates: int = 16
    seed: int = 0
    n_envs: int = 16
    n_steps: int = 32
    gamma: float = 0.95
    lam: float = 0.95
    gamma_token: float = None
    lam_token: float = None
    lr: float = None
    critic_lr: float = 1e-3
    critic_steps: int = 100
    epochs: int = 3
    minibatches: int = 4
    clip: float = 0.2
    entropy_coef: float = 0.01
    kl_stop: float = 0.1
    max_grad_norm: float = 0.5

    def __post_init__(self):
        require(self.method in METHODS, f"{self.method!r} is no method of {list(METHODS)}")
        for knob in fields(Config)[1:]:
            value = getattr(self, knob.name)
            low = LEAST.get(knob.name, 0)
            high = 1 if knob.name.startswith(("gamma", "lam")) else math.inf
            fits = isinstance(value, (int, knob.type)) and low <= value <= high
            require(fits or value is knob.default,          # None: not given
                    f"{knob.name} is {value!r}, expected {knob.type.__name__} from {low} "
                    f"to {high}")
        require(self.minibatches <= self.n_envs * self.n_steps,
                "there are more minibatches than actions, n_envs × n_steps")

    @property
    def policy(self):
        return METHODS[self.method]["policy"]

    @property
    def step_size(self):
        return METHODS[self.method]["lr"] if self.lr is None else self.lr

    @property
    def inside(self):
        """γ_w and λ_w: what was given, else the method's."""
        gamma_token, lam_token = 1.0, 1.0
        if self.method == "ntpo":
            gamma_token, lam_token = self.gamma, self.lam   # turns POAD into naive
        if self.gamma_token is not None:
            gamma_token = self.gamma_token
        if self.lam_token is not None:
            lam_token = self.lam_token
        return gamma_token, lam_token


def assign(config, mask, values, rewards, done):
    """Credit for a rollout: advantages and returns of every slot, (B·T, L) each.

    at the last written slot of action t:   r_n = r_t,  γ_n = γ (0 if done),  λ_n = λ
    at its other slots:                     r_n = 0,    γ_n = γ_w,            λ_n = λ_w

    The T actions of an environment are one row (T·L slots) for `gae`. What follows a row
    counts 0: where it was cut, γ v(o_next) is in the reward (`credit`). γ_w and λ_w are
    `config.inside`.
    At γ_w = λ_w = 1 an action's first token gets action-level GAE(λ); with λ = .95 at every
    token (the paper's code) only .95⁴ = .81 of the δ at the end of five tokens reaches it.
    mask (not all of a row masked), values: (B·T, L), environment b's action t in row
    b·T + t; rewards, done: (B, T), else ValueError.
    """
    gamma_token, lam_token = config.inside
    require(rewards.shape == done.shape and rewards.dim() == 2, "rewards, done: (B, T)")
    mask = mask.bool()
    end = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))              # (B·T, L)
    over = done.reshape(-1, 1).expand(mask.shape)
    discounts = bad_discounts(end, over, config.gamma, gamma_token)
    lambdas = torch.where(end, config.lam, lam_token)
    slots = (end * rewards.reshape(-1, 1), values, discounts, lambdas, mask)
    rows = [x.reshape(len(rewards), -1) for x in slots]                     # (B, T·L)
    advantages, returns = gae(*rows, last_values=torch.zeros(len(rewards)))
    return advantages.view(mask.shape), returns.view(mask.shape)


@torch.no_grad()
def credit(agent, actions, config):
    """Judge a rollout; write advantages (at each call) and returns (kept once written).

    `train` calls it twice: before `fit_critic`, with λ_w = 1, for the returns, which are
    the critic's targets; after it, with the method's λ_w, for advantages by the fitted
    critic. A cut episode is `done` here, but was not over: γ v(o_next) joins a copy of its
    last reward. If there are choices, advantages are normalised over them, 0 elsewhere:
    a forced token takes part in GAE, but its log π is 0 whatever the weights.
    γ = λ = ½, γ_w = λ_w = 1, v = 1; one player writes two slots, which pay 0, then one,
    which pays 4 and is cut where v(o_next) = 6. Returns: 4 + ½ · 6 = 7 and
    ½ (½ · 1 + ½ · 7) = 2. Advantages before they are normalised: (1, 1) and (6).
    actions: B·T records, as `collect` returns them.
    """
    cut = [bool(action.after) for action in actions]
    rows = [a.before for a in actions] + [(a.after, ()) for a in actions if a.after]
    values = agent.judge(rows)                              # of slots, then of o_next
    rewards = torch.tensor([action.reward for action in actions])           # (B·T,)
    rewards[cut] += config.gamma * values[len(actions):, 0]
    done = torch.tensor([action.done for action in actions])
    shape = config.n_envs, config.n_steps
    mask = column(actions, "mask")
    advantages, returns = assign(config, mask, values[:len(actions)],
                                 rewards.view(shape), done.view(shape))     # (B·T, L)
    choice = column(actions, "choice")
    if choice.any():
        advantages = normalize(advantages, choice)
    for action, advantage, target in zip(actions, advantages, returns):
        action.advantages = advantage[:len(action.choice)]
        if action.returns is None:                          # the first call
            action.returns = target[:len(action.choice)]


def fit_critic(agent, optimizer, actions, config, generator):
    """Train the critic on the returns that `credit` wrote with λ_w = 1. → the last loss

    mean ½ (v(o, w<ʲ) − γ_w^(n−j) G)²       over the slots j of actions of n slots

    G_t = r_t + γ ((1 − λ) v(o_t+1) + λ γ_w^(n−1) G_t+1), n of action t+1; r_t at an end,
    r_t + γ v(o_next) at a cut. Unlike in the paper's code this comes before the advantages.
    actions: those of the last four rollouts; a step reads 64 of them, with replacement.
    """
    targets = column(actions, "returns")
    mask = column(actions, "mask")
    loss = torch.zeros(())
    for _ in range(config.critic_steps):
        picks = torch.randint(len(actions), (64,), generator=generator)
        values = agent.judge([actions[i].before for i in picks])            # (64, L)
        width = values.shape[1]
        loss = value_loss(values, targets[picks, :width], mask[picks, :width])
        take_step(optimizer, loss, config)
    return loss.item()


def minibatch_loss(agent, batch, config):
    """The policy's loss on a minibatch of written actions. → loss, floats

    The floats: "kl", "clip_fraction", "entropy".

    loss = Σ_choices PPO loss − entropy_coef · Σ_choices entropy     (averaged over actions)

    The unit of loss, entropy and KL is the action, whatever its length: they are sums over
    its choices, averaged over actions. Entropy is summed along what was written: that
    earlier tokens decide which prefixes occur is ignored.
    """
    logp, entropy = agent.evaluate(batch, config.policy)                    # (B, L)
    choice = column(batch, "choice")
    policy_loss, info = ppo_policy_loss(
        logp, column(batch, "logp"), column(batch, "advantages"), choice, config.clip)
    per_action = choice.sum() / len(batch)                  # turns means into sums
    entropy = entropy.sum(1).mean()                         # a forced slot has none
    loss = per_action * policy_loss - config.entropy_coef * entropy
    info["kl"] *= per_action
    info["entropy"] = entropy
    return loss, {name: x.item() for name, x in info.items()}


def ppo_update(agent, optimizer, actions, config, generator):
    """One PPO update of the policy on credited actions. → diagnostics

    Each epoch shuffles the actions and cuts them into minibatches of equal size, give or
    take one. A minibatch without any choice is skipped. KL is read before the step: above
    `kl_stop` it is recorded, the step is not taken, and the update ends ("stopped"). The
    first minibatch must find the policy that sampled, with a ratio of 1, else ValueError.
    """
    seen = []
    for _ in range(config.epochs):
        order = torch.randperm(len(actions), generator=generator)
        for indices in order.tensor_split(config.minibatches):
            batch = [actions[i] for i in indices]
            if not column(batch, "choice").any():
                continue
            loss, info = minibatch_loss(agent, batch, config)
            require(seen or not info["kl"] > 1e-5, "the policy that is trained did not "
                    "sample: is the LM read with TF32 or bfloat16?")
            seen.append(info)
            if info["kl"] > config.kl_stop:
                return diagnostics(seen) | {"stopped": True}
            take_step(optimizer, loss, config)
    return diagnostics(seen) | {"stopped": False}


def diagnostics(seen):
    """Means over an update's minibatches, of "kl" the last; and their number."""
    means = {"kl": 0.0, "clip_fraction": 0.0, "entropy": 0.0}      # where all was forced
    if seen:
        for name in means:
            means[name] = mean(info[name] for info in seen)
        means["kl"] = seen[-1]["kl"]
    return means | {"minibatches": len(seen)}


def take_step(optimizer, loss, config):
    """One step of Adam down the gradient, which is clipped to a norm."""
    optimizer.zero_grad()
    loss.backward()
    [group] = optimizer.param_groups
    norm = nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
    require(loss.isfinite() and norm.isfinite(),
            f"the loss is {loss.item()}, the norm of its gradient {norm}: "
            "see step sizes and the LM's precision")
    optimizer.step()


# ------------------------------------------------- language agent

RESTRICTED = ("glam", "twosome")                    # policies that score a menu's entries
POLICIES = ("token", "action", *RESTRICTED)


def encode(tokenizer, text):
    """The token ids of a text to be continued: special tokens once, no eos added behind."""
    bos = tokenizer.bos_token
    brings_bos = bos is not None and text.startswith(bos)       # as chat templates do
    encoding = tokenizer(
        text, add_special_tokens=not brings_bos, return_special_tokens_mask=True)
    ids = encoding.input_ids
    if encoding.special_tokens_mask[-1:] == [1]:                # the tokenizer's, not typed
        ids.pop()
    require(ids and text.strip(), f"the tokenizer makes no token of {text!r}")
    return tuple(ids)


@dataclass(frozen=True, eq=False)               # hashed by identity
class Menu:
    """What may be said after a prompt, and its trie."""

    context: tuple              # the prompt's token ids
    texts: tuple                # A strings
    entries: list               # A tuples of token ids, eos included
    trie: dict                  # prefix → the tokens with which some entry goes on


def encode_menu(tokenizer, prompt, texts):
    """The Menu of a tuple of strings after a prompt; ValueError for what cannot be one.

    An entry's tokens are those that follow the prompt's when both are read as one text
    (`joined`), and eos. No two entries may have the same, and no token may belong to prompt
    and entry.
    """
    require(texts, "the menu is empty: at least one action is expected")
    context = encode(tokenizer, prompt)
    entries = []
    trie = {}
    for text in texts:
        require(isinstance(text, str), f"{text!r} is on the menu, expected a text")
        ids = encode(tokenizer, joined(prompt, text))
        require(ids[:len(context)] == context,
                f"to the tokenizer the end of {prompt!r} and the beginning of {text!r} are "
                "one token: end the prompt with a word")
        entry = (*ids[len(context):], tokenizer.eos_token_id)
        require(len(entry) > 1 and entry not in entries, f"{text!r} is empty, or the "
                f"tokenizer cannot tell it from another entry of {texts}")
        entries.append(entry)
        for j, token in enumerate(entry):
            trie.setdefault(entry[:j], set()).add(token)
    return Menu(context, texts, entries, trie)


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


def pad(rows, device="cpu", side="right"):
    """R tuples of token ids → one tensor (R, L), and its mask, True on tokens."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, True, -1, side).to(device)
    return ids.clamp(min=0), ids >= 0


# Two ways to read R rows, pairs of token tuples: a prompt and a prefix of an action, up to
# P and W long. → an LM's logits, or a body's features, after the prompt and each token of
# the prefix


def read_plainly(model, rows):
    """Both as one sequence, padded on its right, where a causal LM does not look."""
    ids, _ = pad([prompt + prefix for prompt, prefix in rows], model.device)
    out = model(input_ids=ids, use_cache=False)[0]                          # (R, P + W, ·)
    parts = []
    for row, (prompt, prefix) in zip(out, rows):
        parts.append(row[len(prompt) - 1:len(prompt) + len(prefix)])
    return pad_sequence(parts, batch_first=True)                            # (R, W + 1, ·)


def read_shared(model, rows):
    """Each of U prompts once, but for its last token, which is read with every prefix."""
    shared = [prompt[:-1] for prompt, _ in rows]
    prompts = list(dict.fromkeys(shared))
    ids, mask = pad(prompts, model.device, "left")                          # (U, P − 1)
    cache = DynamicCache(config=model.config)
    read_on(model.base_model, ids, mask, cache)
    owner = torch.tensor([prompts.index(prompt) for prompt in shared], device=model.device)
    cache.batch_select_indices(owner)
    ids, more = pad([prompt[-1:] + prefix for prompt, prefix in rows], model.device)
    mask = torch.cat([mask[owner], more], 1)                                # (R, P + W)
    return read_on(model, ids, mask, cache)


def read_on(model, ids, mask, cache):
    """Read ids behind those in the cache, which grows by them; the mask covers both."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)           # padding does not count
    return model(input_ids=ids, attention_mask=mask, cache=cache,
                 position_ids=positions[:, -ids.shape[1]:])[0]              # (R, W + 1, ·)


def alike(x, y):
    """Are two tensors of logits equal, up to rounding?"""
    return bool((x - y).abs().max() < 0.02 * y.std())


class LanguageAgent(nn.Module):
    """A transformers causal LM, with its tokenizer, that writes actions; and their critic.

    The critic v(o, w<ʲ) is a linear head on its own copy of the LM's body. To choose, act →
    score → recall → tokens → read; to record, act → slots. Results lie on the CPU, except
    `read`'s.
    """

    def __init__(self, lm, tokenizer, max_new_tokens=32):
        super().__init__()
        eos = tokenizer.eos_token_id
        require(eos is not None, "the tokenizer has no eos token to end an action")
        require(hasattr(lm, "generation_config"),
                f"{type(lm).__name__} is no causal language model")
        also = lm.generation_config.eos_token_id            # None, a number, or several
        if not isinstance(also, list):
            also = [also]
        self.ends = {eos, *also} - {None}
        self.lm = lm
        self.tokenizer = tokenizer
        self.size = len(lm.get_input_embeddings().weight)   # V, of the critic's copy too
        self.memory = None                                  # see `standing_still`
        lm.generation_config = GenerationConfig(            # no habits of a checkpoint
            do_sample=True, top_k=0, remove_invalid_values=True, pad_token_id=eos,
            max_new_tokens=max_new_tokens, eos_token_id=list(self.ends))
        self.body = copy.deepcopy(lm.base_model)            # frozen layers stay frozen
        self.eval()
        self._test()
        features = read_plainly(self.body, [((0,), ())])                    # (1, 1, H)
        self.head = nn.Linear(features.shape[-1], 1, device=lm.device)
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
        """Can prompts be shared? ValueError if not causal, or if another policy samples."""
        name = type(self.lm).__name__
        rows = [((0, 2, 1), (0, 2)), ((2,), (2, 0)), ((0, 2, 1), (2, 1))]
        prompts = [prompt for prompt, _ in rows]
        plain = read_plainly(self.lm, rows)                                 # (3, 3, V)
        alone = [read_plainly(self.lm, [(prompt, ())]) for prompt in prompts]
        require(alike(plain[:, :1], torch.cat(alone)), f"{name} is no causal language "
                "model: what it says after some tokens depends on what follows them")
        self.shares_prompts = False
        with suppress(Exception):                           # a model may fail in any way
            self.shares_prompts = alike(read_shared(self.lm, rows), plain)
        if self.shares_prompts:
            written, drawn = self._generate(prompts, torch.Generator(), 2, True)
            read = self.read(self.lm, list(zip(prompts, written)))          # (3, W + 1, V)
            require(alike(torch.stack(drawn, 1), read[:, :-1]),
                    f"{name} samples free text from something else than what is read")

    def read(self, model, rows):
        """`read_shared` where prompts repeat and the LM can do it, else `read_plainly`.

        ValueError for what is too long for the LM, or not in its vocabulary.
        """
        self._check([prompt + prefix for prompt, prefix in rows])
        shared = {prompt[:-1] for prompt, _ in rows}
        if self.shares_prompts and any(shared) and len(shared) < len(rows):
            return read_shared(model, rows)
        return read_plainly(model, rows)

    def _check(self, texts):
        config = self.lm.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", math.inf)
        for ids in texts:
            require(len(ids) <= limit, f"a prompt and its action are {len(ids)} tokens, "
                    f"and the LM reads at most {limit}")
            require(max(ids) < self.size, f"the LM has {self.size} tokens, its tokenizer "
                    "more: call resize_token_embeddings before the agent is made")

    def judge(self, rows):
        """The critic's v (B, W + 1) of rows as in `read`, equal ones read once."""
        distinct = list(dict.fromkeys(rows))
        features = self.read(self.body, distinct)
        values = self.head(features.float()).squeeze(-1).cpu()
        return values[[distinct.index(row) for row in rows]]

    @contextmanager
    def standing_still(self):
        """Inside (weights fixed, no gradient) no menu is encoded or action read twice."""
        self.memory = {}
        try:
            yield
        finally:
            self.memory = None

    @property
    def known(self):
        """The memory where there is one, else an empty one for a single call."""
        return {} if self.memory is None else self.memory

    def recall(self, rows):
        """`tokens` of R rows, (R, L, 3), 0-padded; it gets new ones, in parts."""
        known = self.known
        new = [row for row in dict.fromkeys(rows) if row not in known]
        for start in range(0, len(new), 256):               # large menus
            part = new[start:start + 256]
            known.update(zip(part, self.tokens(part)))
        return pad_sequence([known[row] for row in rows], batch_first=True)

    def tokens(self, rows):
        """log π, entropy, choice of every token of R written actions: R tensors (L, 3).

        rows: (context, token ids, Menu or None); with a Menu the ids are an entry's.
        """
        logits = self.read(self.lm, [(context, ids[:-1]) for context, ids, _ in rows])
        require(not logits.isnan().any(), "the LM says NaN: see step sizes and precision")
        allowed = torch.ones_like(logits, dtype=torch.bool)                 # (R, L, V)
        for r, (_, ids, menu) in enumerate(rows):
            if menu:
                for j in range(len(ids)):
                    allowed[r, j] = False
                    allowed[r, j, list(menu.trie[ids[:j]])] = True
        pi = Categorical(logits=menu_logp(logits, allowed))
        written = [ids for _, ids, _ in rows]
        padded, _ = pad(written, logits.device)                             # (R, L)
        choice = allowed.sum(2) > 1                         # read off the trie
        found = torch.stack([pi.log_prob(padded), pi.entropy(), choice], 2).cpu()
        return [x[:len(ids)] for x, ids in zip(found, written)]

    def score(self, prompts, menus, policy="glam"):
        """How likely the LM finds each entry of a menu: B tensors (A,), with gradient.

        "glam": Σ_j log p(wʲ|o, w<ʲ)      "twosome": that divided by the number of words

        p is over the whole vocabulary; eos is not in the sum. "eat it" with p = ½, ¼: log ⅛
        and ½ log ⅛. Words are split at white space: without it, TWOSOME is GLAM. For other
        policies it is Σ_j log π, restricted to the menu and with eos.
        prompts: B strings; menus: B lists of A strings, or Menus.
        """
        require(menus is not None, "scores need menus")
        menus = self.menus(prompts, menus, policy)
        rows = []
        words = []
        for menu in menus:
            words += [len(text.split()) for text in menu.texts]
            if policy in RESTRICTED:
                rows += [(menu.context, entry[:-1], None) for entry in menu.entries]
            else:
                rows += [(menu.context, entry, menu) for entry in menu.entries]
        slots = self.recall(rows)                                           # (R, L, 3)
        scores = slots[..., 0].sum(1)                                       # of all entries
        if policy == "twosome":
            scores = scores / torch.tensor(words)
        return list(scores.split([len(menu.texts) for menu in menus]))

    def menus(self, prompts, menus, policy):
        """B Menus, or B times None (free text); ValueError for what cannot be acted on."""
        require(policy in POLICIES, f"policy is {policy!r}, expected one of {POLICIES}")
        require(not isinstance(prompts, str) and prompts, "expected a list of prompts")
        if menus is None:
            menus = [None] * len(prompts)
        ready = []
        known = self.known
        for prompt, menu in zip(prompts, menus):
            if isinstance(menu, (list, tuple)):
                key = prompt, tuple(menu)
                if key not in known:
                    known[key] = encode_menu(self.tokenizer, *key)
                menu = known[key]
            ready.append(menu)
        kinds = {type(menu) for menu in ready}
        fits = kinds == {Menu} or kinds == {type(None)} and policy not in RESTRICTED
        require(fits and len(menus) == len(prompts), f"{len(prompts)} prompts need as many "
                "menus, each a list of texts, or none at all (glam and twosome need them)")
        return ready

    def _generate(self, contexts, generator, longest, scores=False):
        """B tuples of W token ids; if asked for, their logits, W times (B, V)."""
        require(self.shares_prompts, f"{type(self.lm).__name__} cannot be read with a "
                "cache: it can choose from menus, but not write freely")
        self._check([context + (0,) * longest for context in contexts])
        ids, mask = pad(contexts, self.lm.device, "left")                   # (B, P)
        seed = torch.randint(2**60, (), generator=generator).item()
        with seeded(seed):                                  # `generate` takes no generator
            out = self.lm.generate(
                ids, attention_mask=mask.long(), max_new_tokens=longest,
                output_scores=scores, return_dict_in_generate=True)
        written = out.sequences[:, ids.shape[1]:]                           # (B, W)
        return list(map(tuple, written.tolist())), out.scores

    @torch.no_grad()
    def act(self, prompts, menus=None, policy="token", generator=None):
        """Write an action for each of B prompts: a list of B records (`Action`).

        With menus (B lists of strings) an entry is drawn from the softmax over its menu's
        `score`: for "token" π(a|o) = Π_j π(wʲ|o, w<ʲ), next tokens restricted to the menu's
        trie and renormalised; "action" is the same, as one slot. Without menus these two
        write free text: n decisions look at n · |V| numbers, where one among all sentences
        would look at |V|ⁿ.
        """
        menus = self.menus(prompts, menus, policy)
        if menus[0] is None:
            actions = self._write_freely(prompts, generator)
        else:
            actions = []
            scores = pad_sequence(self.score(prompts, menus, policy), True, -torch.inf)
            picks = scores.softmax(-1).multinomial(1, generator=generator)[:, 0]
            for prompt, menu, k in zip(prompts, menus, picks):
                actions.append(
                    Action(prompt, menu.context, menu, menu.texts[k], menu.entries[k]))
        for action, slots in zip(actions, self.slots(actions, policy)):
            action.logp, _, choice = slots[:len(action.ids)].unbind(1)
            action.choice = choice.bool()
        return actions

    def _write_freely(self, prompts, generator):
        contexts = [encode(self.tokenizer, prompt) for prompt in prompts]
        longest = self.lm.generation_config.max_new_tokens
        written, _ = self._generate(contexts, generator, longest)
        actions = []
        for prompt, context, row in zip(prompts, contexts, written):
            words = list(takewhile(lambda token: token not in self.ends, row))
            text = self.tokenizer.decode(words, skip_special_tokens=True).strip()
            ids = row[:len(words) + 1]
            actions.append(Action(prompt, context, None, text, ids))
        return actions

    def evaluate(self, actions, policy="token"):
        """log π and entropy of B records of `act` under the present weights, with gradient.

        (B, L) each, zero where padded; (B, 1) unless "token". In free text V are options.
        """
        return self.slots(actions, policy).unbind(2)[:2]

    def slots(self, actions, policy):
        """log π, entropy, choice of the slots of B written actions: (B, L or 1, 3)."""
        if policy not in RESTRICTED:
            slots = self.recall([(a.context, a.ids, a.menu) for a in actions])
            if policy == "action":
                slots = slots.sum(1, keepdim=True)          # choice: how many
            return slots
        menus = [a.menu for a in actions]
        scores = self.score([a.prompt for a in actions], menus, policy)
        pi = Categorical(logits=pad_sequence(scores, True, -torch.inf))     # over A
        picks = torch.tensor([a.menu.entries.index(a.ids) for a in actions])
        choice = torch.tensor([len(menu.texts) > 1 for menu in menus])
        return torch.stack([pi.log_prob(picks), pi.entropy(), choice], 1)[:, None]

    def save(self, folder):
        """Write LM and tokenizer by `save_pretrained`, the critic beside them."""
        self.lm.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        torch.save(self.critic.state_dict(), Path(folder) / "critic.pt")


def tiny_agent(env_fn, seed=0, pretrain_steps=300):
    """An agent without a download, which knows an environment's language and no more.

    It was trained on observations with random admissible actions, one token a word.
    """
    return LanguageAgent(*tiny_lm(env_fn, seed, pretrain_steps))


@contextmanager
def loading(what):
    """Inside, whatever a loader raises becomes a ValueError that names what it loads."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load {what}. {error}") from error


def load_lm(model, env_fn=None, seed=0):
    """A causal LM and its tokenizer: "tiny", a hub id, a folder or a .gguf file."""
    if model == "tiny":
        return tiny_lm(env_fn, seed)
    source = Path(model)
    options = {}
    if source.suffix == ".gguf":
        options["gguf_file"] = source.name
        source = source.parent
    with loading(f"{model}: expected tiny, a hub id, a folder or a .gguf file"):
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    lm.hf_quantizer = None                                  # or it could not be saved
    return lm, tokenizer


def load_agent(model, env_fn, seed=0, device="cpu", train_layers=0, load=load_lm):
    """The tiny agent, or one with a causal LM from elsewhere.

    model: as in `load_lm`, else ValueError; a folder of `save` brings its critic.
    train_layers: only so many last layers learn, 0: all.
    """
    if model != "tiny":
        seed = 0                                            # one reading serves all seeds
    lm, tokenizer = load(model, env_fn, seed)
    lm = copy.deepcopy(lm).to(device)
    if train_layers:
        layers, *_ = [x for x in lm.get_decoder().modules() if isinstance(x, nn.ModuleList)]
        require(0 < train_layers <= len(layers),
                f"train_layers is {train_layers}, but {model} has {len(layers)} layers")
        lm.requires_grad_(False)                            # the critic's copy inherits it
        layers[-train_layers:].requires_grad_(True)
    agent = LanguageAgent(lm, tokenizer)
    saved = Path(model) / "critic.pt"
    if saved.exists():
        with loading(f"{saved}: it is broken, or of another model"):
            agent.critic.load_state_dict(torch.load(saved, device, weights_only=True))
    return agent


# ------------------------------------------------- playing and training

def step_all(agent, players, policy, generator):
    """Every player takes one action: B records (`Action`), reward and done included."""
    prompts = [player.obs for player in players]
    menus = [player.menu for player in players]
    actions = agent.act(prompts, menus, policy, generator)
    for player, action in zip(players, actions):
        action.reward = player.step(action.text)
        action.done = player.over
    return actions


def collect(agent, players, config, generator, episodes):
    """A rollout: T actions of each of B players; `episodes` takes the finished ones.

    Where a time limit, or the rollout's end, cuts an episode, the record is `done` and says
    what would be read `after`. → B·T records, player b's action t in place b·T + t
    """
    steps = []
    with agent.standing_still():
        for t in range(config.n_steps):
            actions = step_all(agent, players, config.policy, generator)
            steps.append(actions)
            last = t == config.n_steps - 1
            for player, action in zip(players, actions):
                if player.cut or (last and not player.over):
                    action.after = encode(agent.tokenizer, player.obs)
                    action.done = True
                if player.over:
                    episodes.append((player.total, float(player.success)))
                    player.begin()
    return list(chain(*zip(*steps)))               # player by player


def train(agent, env_fn, config):
    """Train the agent in place, on environments that env_fn() makes: one dict per update.

    Its keys: see the last lines, `summary` (of the last 100 episodes) and `diagnostics`. On
    a CPU, one seed is one run.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(config.seed)
    players = make_players(env_fn, [seed_of(config.seed, b) for b in range(config.n_envs)])
    optimizer = torch.optim.Adam(agent.lm.parameters(), config.step_size)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), config.critic_lr)
    between = replace(config, lam_token=1.0)                # for the critic's targets
    episodes = []
    recent = []                                             # actions of four rollouts
    for update in range(1, config.updates + 1):
        rollout = collect(agent, players, config, generator, episodes)
        recent = (recent + rollout)[-4 * len(rollout):]
        credit(agent, rollout, between)
        critic_loss = fit_critic(agent, critic_optimizer, recent, config, generator)
        credit(agent, rollout, config)
        info = ppo_update(agent, optimizer, rollout, config, generator)
        yield {"update": update, "env_steps": update * len(rollout),
               "seconds": time.perf_counter() - begin, "episodes": len(episodes),
               **summary(episodes[-100:]), "value_loss": critic_loss, **info}


def summary(outcomes):
    """Means of (return, undiscounted, and success) over episodes; None without any."""
    if not outcomes:
        return {"return_mean": None, "success_rate": None}
    returns, successes = zip(*outcomes)
    return {"return_mean": mean(returns), "success_rate": mean(successes)}


def seed_of(seed, b, exam=0):
    """The seed of environment b: even for training, odd for exams, and never twice."""
    beyond = b // 1000 * 10**9              # b ≥ 1000 must not meet the next seed's
    return 2 * (1000 * seed + b + beyond) + exam


def play(agent, env_fn, episodes, policy="token", seed=0, max_steps=1000):
    """Play whole episodes, on seeds that training never uses.

    → (return, success) of each, and the first as text. ValueError if one has no end.
    """
    players = make_players(env_fn, [seed_of(seed, b, exam=1) for b in range(episodes)])
    generator = torch.Generator().manual_seed(seed)
    story = []
    playing = players
    with agent.standing_still():
        for _ in range(max_steps):
            first, *_ = step_all(agent, playing, policy, generator)
            if playing[0] is players[0]:
                story.append(f"{first.prompt}\n  → {first.text}  ({first.reward:g})")
            playing = [player for player in playing if not player.over]
            if not playing:
                break
    require(not playing, f"an episode has not ended after {max_steps} actions")
    return [(player.total, float(player.success)) for player in players], "\n".join(story)


# ------------------------------------------------- command line

PRESETS = {  # where an environment, or a real model, needs other settings than the defaults
    "lunch": dict(updates=10, n_steps=16),
    "orders": dict(method="action,ntpo,poad", env_options="guests=1", updates=20,
                   n_envs=128, n_steps=1, minibatches=2, lr=2e-3, kl_stop=0.3),
    "scikit": dict(method="action,ntpo,poad", env_options="dataset=iris", updates=12,
                   n_envs=32, n_steps=8, entropy_coef=0.001, kl_stop=0.3),
    "real": dict(
        updates=10, lr=5e-5, critic_lr=1e-4, critic_steps=10, epochs=4, minibatches=1)}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)   # Student's t, 2 to 10 seeds


@dataclass(frozen=True)
class Options(Config):
    """What the command line asks for, beside the knobs of `Config`.

    env: pancake, lunch, food, entertainment, orders, salad, salad2 or scikit
    env_options: of the environment, such as guests=1,slots=2
    model: tiny, a hub id, a folder or a .gguf file
    train_layers: how many of the model's last layers learn; 0: all
    device: cpu, cuda or cuda:1
    seeds: how many runs of each method, from --seed on
    out: JSON file for the numbers
    save: folder for the trained models and their critics
    """

    method: str = ",".join(METHODS)
    env: str = "food"
    env_options: str = ""
    model: str = "tiny"
    train_layers: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seeds: int = 1
    out: str = ""
    save: str = ""


def parse(argv):
    """What was typed, else PRESETS, else the defaults: a Namespace."""
    parser = argparse.ArgumentParser(
        "poad.py", add_help=False, usage=argparse.SUPPRESS,     # an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    meaning = dict(re.findall(r"(\w+): (.+)", Config.__doc__ + Options.__doc__))
    for option in fields(Options):
        parser.add_argument(f"--{option.name}", type=option.type, default=option.default,
                            help=meaning[option.name])
    typed, _ = parser.parse_known_args(argv)                # --help waits for the presets
    preset = {"out": f"runs/{typed.env}.json", **PRESETS.get(typed.env, {})}
    if typed.model != "tiny":
        preset |= PRESETS["real"]
    parser.set_defaults(**preset)
    parser.add_argument("-h", "--help", action="help")
    given = parser.parse_args(argv)
    if typed.env_options and "env_options" in preset:       # they join the preset's
        given.env_options = preset["env_options"] + "," + typed.env_options
    return given


def prepare(given):
    """What can be known to fail fails here, before any training. → env_fn, configs"""
    settings = {}
    for pair in filter(None, given.env_options.split(",")):
        name, _, value = pair.partition("=")
        settings[name] = int(value) if value.isdecimal() else value
    env_fn = partial(make, given.env, **settings)
    _, info = env_fn().reset(seed=0)
    methods = given.method.split(",")
    require("menu" in info or not set(methods) & set(RESTRICTED),
            f"--method {given.method}: without a menu neither glam nor twosome can learn")
    require(len(set(methods)) == len(methods), f"--method {given.method}: name each once")
    try:
        torch.zeros(1, device=given.device)
    except Exception as error:                              # CUDA's have many lines
        raise ValueError(f"--device {given.device}: {error}".split("\n")[0]) from error
    configs = []
    for seed in range(given.seed, given.seed + given.seeds):
        for method in methods:
            own = vars(given) | {"method": method, "seed": seed}
            configs.append(Options(**own))
    require(configs, "--seeds is at least 1")
    return env_fn, configs


def run(agent, env_fn, config, record):
    """Train with a progress bar, then examine; `record` is filled. → a transcript"""
    bar = tqdm(train(agent, env_fn, config), config.method, config.updates)
    for metrics in bar:
        record["metrics"].append(metrics)
        bar.set_postfix(success=metrics["success_rate"])
    outcomes, story = play(agent, env_fn, 100, config.policy, config.seed)
    record["exam"] = summary(outcomes) | {"episodes": 100}
    return story


def interval(xs):
    """Mean ± half a 95 % interval over seeds; of one seed only the number."""
    if len(xs) == 1:
        return f"{xs[0]:.2f}"
    half = T95[min(len(xs), 10) - 2] * stdev(xs) / len(xs) ** 0.5
    return f"{mean(xs):.2f} ± {half:.2f}"


def success(rates):
    """`interval`, and how many seeds fail (a rate below ½), if any."""
    fails = sum(rate < 0.5 for rate in rates)
    return interval(rates) + f" ({fails} fail)" * (fails > 0)


def report(runs, path):
    """Print a table of the exams, a row a method, and draw the learning curves."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(layout="constrained")
    print(f"{'':8}{'success':>24}{'return':>16}")
    for method in METHODS:
        mine = [x for x in runs if x["config"]["method"] == method]
        exams = [x["exam"].values() for x in mine if x["exam"]]
        if exams:
            returns, rates, _ = zip(*exams)
            print(f"{method:8}{success(rates):>24}{interval(returns):>16}")
        for i, x in enumerate(mine):
            late = [m for m in x["metrics"] if m["episodes"] >= 16]
            axes.plot([m["env_steps"] for m in late], [m["success_rate"] for m in late],
                      color=METHODS[method]["color"], label="_" * i + method)
    axes.set(title=f"Who learns {runs[0]['config']['env']}?", xlabel="environment steps",
             ylabel="success, last 100 episodes (from the 16th on)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=130)
    print(f"curves: {path}")


def main(argv):
    """Train and examine each method with each seed, and keep the numbers."""
    runs = []
    load = lru_cache(maxsize=1)(load_lm)                    # one start for all methods
    try:
        given = parse(argv)
        env_fn, configs = prepare(given)
        out = Path(given.out)
        for folder in (out.parent, Path(given.save)):       # Path("") is here
            folder.mkdir(parents=True, exist_ok=True)
        out.open("a").close()                               # if it can fail, it fails now
        if given.model == "tiny":
            torch.set_num_threads(1)                        # it is too small to share
        for config in configs:
            agent = load_agent(
                given.model, env_fn, config.seed, given.device, given.train_layers, load)
            print(f"{config.method}, seed {config.seed}: {given.model} on {given.device}, "
                  f"step sizes {config.step_size:g} (LM), {config.critic_lr:g} (critic)")
            used = asdict(config) | {"lr": config.step_size}
            runs.append({"config": used, "exam": None, "metrics": []})
            story = run(agent, env_fn, config, runs[-1])
            if given.save:
                agent.save(Path(given.save) / f"{config.method}-{config.seed}")
        print(story)
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept")
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print("poad.py:", error, file=sys.stderr)
        sys.exit(2)
    finally:
        if runs:
            runs = json.loads(json.dumps(runs), parse_constant=lambda infinity: None,
                              parse_float=lambda x: float(f"{float(x):.6g}"))
            command = "python poad.py " + shlex.join(argv)
            out.write_text(json.dumps({"command": command, "runs": runs}, indent=1))
            print(f"numbers: {out}")
            report(runs, f"{out}.png")


if __name__ == "__main__":
    with suppress(AttributeError):                          # notebooks and IDLE
        sys.stdout.reconfigure(errors="replace")            # consoles without Greek
    main(sys.argv[1:])
