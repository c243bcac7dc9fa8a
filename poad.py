"""POAD: policy optimization with action decomposition, in one file that reads top to bottom.

Paper: "Reinforcing Language Agents via Policy Optimization with Action Decomposition", arXiv 2405.15821, NeurIPS 2024;
"Eq. n" is its equation n unless another source is named. An agent sees o_t and writes an action a_t = (w¹ … wⁿ) token
by token; the environment answers r_t, o_{t+1}. BAD, the Bellman backup with Action Decomposition, discounts *between*
actions (γ) and never *inside* one (γ_w = 1). POAD is PPO with BAD: critic, advantages and clipped ratio are per token.
    symbol     name                 meaning                                      shape
    γ, γ_w     gamma, gamma_token   discount between actions, and inside one     scalars; BAD: γ_w = 1
    λ, λ_w     lam, lam_token       trace decay of GAE, likewise                 scalars
    Q(o,w<,w)  q                    value of writing w after the prefix w<       tables (S, N, V); actions (S, A)
    V(o,w<)    values               value of an observation and begun action     (B, N); tables (S, N)
    π(w|o,w<)  logp, policy         (log-)probability of a token                 (B, N); tables (S, N, V)
    A          advantages           credit of a token                            (B, N)
B rows (environments, or written actions) · N token slots of a row (tables: prefixes) · T steps · L tokens of an action
S states · A actions (of a menu) · V vocabulary · U distinct prompts · R rows read · H features; K, P, W widths"""
import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, median, pstdev

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from envs import ENVS, Player, make

def _check(ok, message):
    if not ok:
        raise ValueError(message)
def _one_line(error, length=None):
    return " ".join(str(error).split())[:length]
def _check_unit(**scalars):
    for name, x in scalars.items():
        _check(torch.as_tensor((x >= 0) & (x <= 1)).all(), f"{name} is {x}, but a discount or decay lies in [0, 1]")
def _check_shapes(**tensors):
    (first, x), *others = tensors.items()
    for name, y in others:
        _check(x.shape == y.shape, f"{first} is {tuple(x.shape)} but {name} is {tuple(y.shape)}; they must agree")

# ---------------------------------------------------------------- Bellman backups (tables, float64)
def state_values(q, policy=None, temperature=0.0):
    """Exercise 1 (3 points). Value of a choice: its best option, the policy's mean, or the soft maximum.
    V = max_w Q(w)   or   Σ_w π(w) Q(w)   or   τ · log Σ_w exp(Q(w) / τ)                (soft: App. B.3)
    Args: q: (..., W), −inf: no such option; policy: (..., W), 0 · (−inf) = 0; or, not both, temperature: τ > 0. → (...)
    >>> q = torch.tensor([1.0, 3.0, -torch.inf])
    >>> state_values(q).item(), state_values(q, policy=torch.tensor([0.5, 0.5, 0.0])).item()
    (3.0, 2.0)"""
    q = q if torch.is_tensor(q) and q.is_floating_point() else torch.as_tensor(q, dtype=torch.float64)
    _check(0 <= temperature < torch.inf, f"temperature is {temperature}, expected a finite number ≥ 0")
    _check(policy is None or temperature == 0, "give a policy or a temperature, not both")
    if policy is None:
        return temperature * torch.logsumexp(q / temperature, -1) if temperature else q.amax(-1)
    policy = torch.as_tensor(policy, dtype=q.dtype, device=q.device)
    _check_shapes(q=q, policy=policy)
    return (policy * q.masked_fill((policy == 0) & q.isneginf(), 0)).sum(-1)

def action_backup(q, mdp, gamma, policy=None, temperature=0.0):
    """Exercise 2 (2 points). One Bellman backup at action level: the whole action is one decision.
    Q(s, a) ← R(s, a) + γ Σ_s' P(s'|s, a) V(s')   (Eq. 4-5)      R = 1, γ = ½, P = (½, ½), V = (4, 12): 1 + ½ · 8 = 5
    Args: q, policy: (S, A); mdp: TokenMDP (`reward`, `transition`); gamma: in [0, 1].   → (S, A), float64."""
    _check_unit(gamma=gamma)
    q = torch.as_tensor(q, dtype=torch.float64)
    _check_shapes(reward=mdp.reward, q=q)
    return mdp.reward + gamma * mdp.transition @ state_values(q, policy, temperature)

def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    """Exercise 3 (4 points). One Bellman backup at token level: every token is a decision.
    Q(s, w<ʲ, wʲ) ← γ_w · V(s, w≤ʲ)                         inside the action, j < n       (Eq. 9, 13)
    Q(s, w<ⁿ, wⁿ) ← R(s, a) + γ Σ_s' P(s'|s, a) V(s', ∅)    when wⁿ completes a            (Eq. 10, 14)
    γ_w = γ is naive (NTPO), γ_w = 1 is BAD: 3 tokens that pay 1 at the end are worth ¼, ½, 1 at γ_w = ½, else 1, 1, 1.
    Args: q, policy (S, N, V), ∅ is prefix 0; mdp: TokenMDP (`child`, `leaf`); γ, γ_w in [0, 1]. Invalid token: −inf."""
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    q = torch.as_tensor(q, dtype=torch.float64)
    inside, complete = mdp.child >= 0, mdp.leaf >= 0                                      # (N, V): goes on | completes
    _check_shapes(table=torch.empty(len(mdp.reward), *inside.shape), q=q)
    v = state_values(q.masked_fill(~(inside | complete), -torch.inf), policy, temperature)              # (S, N)
    outcome = mdp.reward + gamma * mdp.transition @ v[:, 0]                                             # (S, A)
    new = torch.where(inside, gamma_token * v[:, mdp.child], outcome[:, mdp.leaf])                      # (S, N, V)
    return new.masked_fill(~(inside | complete), -torch.inf)

def bad_backup(q, mdp, gamma, policy=None, temperature=0.0):
    """Exercise 4 (1 point). One Bellman backup with Action Decomposition (Eq. 13-14): `token_backup` with γ_w = 1."""
    return token_backup(q, mdp, gamma, 1.0, policy, temperature)

def solve(backup, q0, tol=1e-12, max_iters=100_000):
    """The fixed point of a backup, from q0 until no finite entry moves by more than tol; else RuntimeError; float64."""
    q, residual = torch.as_tensor(q0, dtype=torch.float64), torch.inf
    for _ in range(max_iters):
        old, q = q, torch.as_tensor(backup(q), dtype=torch.float64)
        residual = max((q - old)[q.isfinite() & old.isfinite()].abs().tolist(), default=0.0)
        if residual <= tol and not (q.isnan() | q.isposinf()).any():
            return q
    raise RuntimeError(f"no fixed point after {max_iters} backups: the last one still moved an entry by {residual:.3g}")

def action_policy(token_policy, mdp):
    """Exercise 5 (2 points). Chain rule, (S, N, V) → (S, A), differentiable: π(a|s) = Π_j π(wʲ|s, w<ʲ); ½ · ¼ = ⅛."""
    token_policy, node = torch.as_tensor(token_policy), {prefix: n for n, prefix in enumerate(mdp.prefixes)}
    _check_shapes(table=torch.empty(len(mdp.reward), *mdp.child.shape), token_policy=token_policy)
    columns = [[token_policy[:, node[a[:j]], w] for j, w in enumerate(a)] for a in map(tuple, mdp.actions)]
    return torch.stack([torch.stack(column).prod(0) for column in columns], 1)

# ---------------------------------------------------------------- credit over a stream of tokens
def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    """Exercise 6 (3 points). What follows each token is worth this much: the one vector in which BAD and naive differ.
    γ_n = γ_w inside an action,   γ after its last token,   0 after the last token of a finished episode
    BAD is γ_w = 1, naive is γ_w = γ, action level is every slot an action end.
    Args: action_end, done (any shape): booleans or 0/1, float dtypes stay; done read at action ends; γ, γ_w in [0, 1].
    >>> bad_discounts(torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 0, 1]]), gamma=0.5)
    tensor([[1.0000, 0.5000, 1.0000, 0.0000]])"""
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    action_end, done = torch.as_tensor(action_end), torch.as_tensor(done)
    _check_shapes(action_end=action_end, done=done)
    dtype = action_end.dtype if action_end.is_floating_point() else torch.get_default_dtype()
    inside, between, over = torch.tensor([gamma_token, gamma, 0.0], dtype=dtype, device=action_end.device)
    return torch.where(action_end.bool(), torch.where(done.bool(), over, between), inside)

def _recurrence(b, c, last):
    """x_n = b_n + c_n x_{n+1} for all n at once, x_N = last: (B, N), (B, N), (B,) → (B, N + 1).
    A loop would be  x = last;  for n = N−1 … 0:  x = b[n] + c[n] * x.  Here each of log₂ N steps puts the equation
    into itself and doubles the distance k at which  x_n = b_n + c_n x_{n+k}  holds."""
    b, k = torch.cat([b, last[:, None]], 1), 1
    while k < b.shape[1]:
        b[:, :-k] += c * b[:, k:]                                  # c: one entry for every n whose n + k is in the row
        c, k = c[:, :-k] * c[:, k:], 2 * k
    return b

@torch.no_grad()
def gae(rewards, values, discounts, lambdas, mask, last_values):
    """Exercise 7 (5 points). Generalized advantage estimation on a masked stream of tokens (arXiv 1506.02438, Eq. 16).
    δ_n = r_n + γ_n v_{n+1} − v_n        A_n = δ_n + γ_n λ_n A_{n+1}        returns_n = A_n + v_n
    v_{n+1} is the value of the next *written* token; a masked slot has no reward, value or decay and may hold anything.
    With γ_w = λ_w = 1 (POAD here) an action's first token gets the action-level GAE(λ); λ at every token (the paper's
    code) leaves .95⁴ = .81 of it to 5. A time limit is no termination: it enters as r_n + γ V(o_next) with discount 0.
    Args: rewards, values, discounts (see `bad_discounts`), mask: (B, N); lambdas: scalar or (B, N); last_values: (B,),
      what follows a row's last written token.   Returns: (advantages, returns), (B, N), 0 where masked, no gradient.
    >>> one = torch.ones(1, 3)                            # an action of three tokens, reward 1 at its end, values ½
    >>> gae(torch.tensor([[0, 0, 1.]]), one / 2, torch.tensor([[1, 1, 0.]]), 1.0, one, torch.zeros(1))[0]
    tensor([[0.5000, 0.5000, 0.5000]])"""
    lambdas = lambdas.to(values) if torch.as_tensor(lambdas).dim() else torch.full_like(values, float(lambdas))
    _check_shapes(mask=mask, rewards=rewards, values=values, discounts=discounts, lambdas=lambdas)
    _check_shapes(rows=mask[:, 0], last_values=last_values)
    mask = mask.bool()
    _check(rewards[mask].isfinite().all(), "a reward on a written token is not finite")
    _check_unit(discounts=discounts[mask], lambdas=lambdas[mask])
    rewards, values, decay = (torch.where(mask, x.to(values), 0) for x in (rewards, values, discounts))
    next_values = _recurrence(values, (~mask).to(values), last_values.to(values))[:, 1:]            # gaps pass it on
    delta = rewards + decay * next_values - values
    trace = torch.where(mask, decay * lambdas, 1)                                                   # likewise
    advantages = _recurrence(torch.where(mask, delta, 0), trace, torch.zeros_like(values[:, 0]))[:, :-1]
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)

# ---------------------------------------------------------------- PPO losses
def masked_mean(x, mask):
    """Exercise 8 (2 points). Mean over real entries, Σ m x / Σ m; the others may hold anything, NaN too. → scalar
    >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([1, 1, 0])).item()
    2.0"""
    _check_shapes(x=x, mask=mask)
    _check(mask.any(), "a mean over nothing: the mask selects no entry")
    return x[mask.bool()].mean(dtype=None if x.is_floating_point() else torch.get_default_dtype())

def normalize(x, mask):
    """Exercise 9 (2 points). (x − μ) / (σ + 1e-8), mean μ, population σ of real entries, zeros too; 0 where masked.
    >>> normalize(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor([-1.,  1.,  0.])"""
    centred = torch.where(mask.bool(), x - masked_mean(x, mask), 0)
    return centred / (masked_mean(centred ** 2, mask).sqrt() + 1e-8)

def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """Exercise 10 (4 points). PPO's clipped surrogate (arXiv 1707.06347, Eq. 7): a mean over real tokens or actions.
    ratio = exp(logp − old_logp)        loss = −mean min( ratio · A,  clamp(ratio, 1 − ε, 1 + ε) · A )
    Args: logp, old_logp, advantages, mask: (B, N) tokens or (B, T) actions; clip: ε, usually .1-.3.   Returns: (loss,
      info, detached): "kl", mean of ratio − 1 − log ratio ≈ KL(π_old, π); "clip_fraction": share of |ratio − 1| > ε.
    >>> new, one = torch.tensor([[1.5, 0.5]]).log(), torch.ones(1, 2)
    >>> round(ppo_policy_loss(new, 0 * one, one, one)[0].item(), 4)      # −(1.2 + 0.5) / 2: the first ratio is clipped
    -0.85"""
    _check(clip >= 0, f"clip is {clip}, expected a number ≥ 0")
    _check_shapes(mask=mask, logp=logp, old_logp=old_logp, advantages=advantages)
    log_ratio, advantages = (logp - old_logp)[mask.bool()], advantages[mask.bool()]
    ratio, all_real = log_ratio.exp(), torch.ones_like(log_ratio)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    info = {"kl": ratio - 1 - log_ratio, "clip_fraction": ((ratio - 1).abs() > clip).to(ratio)}
    return -masked_mean(objective, all_real), {name: masked_mean(x.detach(), all_real) for name, x in info.items()}

def value_loss(values, old_values, returns, mask, clip=None):
    """Exercise 11 (3 points). Squared error of the critic against returns R; with ε also that of a step clipped to ±ε.
    loss = mean ½ (V − R)²    or    mean ½ max( (V − R)², (V_old + clamp(V − V_old, −ε, ε) − R)² )
    Args: values, old_values, returns, mask: (B, N); clip: ε or None.   Returns: scalar.
    >>> value_loss(torch.tensor([[3.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.ones(1, 1)).item()
    2.0"""
    _check(clip is None or clip >= 0, f"clip is {clip}, expected None or a number ≥ 0")
    _check_shapes(mask=mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (x[mask.bool()] for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2)
    return masked_mean(error / 2, torch.ones_like(error))

# ---------------------------------------------------------------- language agent
RESTRICTED, POLICIES = ("glam", "twosome"), ("token", "action", "glam", "twosome")      # RESTRICTED need a menu

@dataclass
class Actions:
    """B written actions of up to L tokens; all of it is data, carried along and never inferred again."""
    text: list               # B strings, for the environment
    prompt_ids: list         # B tuples of token ids, unpadded
    ids: torch.Tensor        # (B, L) the action's tokens, eos included, padded on the right
    mask: torch.Tensor       # (B, L) True on written tokens
    logp: torch.Tensor       # (B, L) log π(wʲ|o, w<ʲ) when sampled; all policies but "token": (B, 1) log π(a|o)
    values: torch.Tensor     # likewise: V before each token; V(o)
    entropy: torch.Tensor    # likewise: of the distribution that sampled, 0 where the menu leaves no choice

    def rows(self, index):
        return Actions(*([x[i] for i in index] if isinstance(x, list) else x[index] for x in vars(self).values()))

@lru_cache(maxsize=10_000)
def menu_trie(tokenizer, menu):
    """A menu (tuple of strings) as token sequences, with eos, and as a trie {prefix: tokens that may follow}."""
    _check(menu, "the menu is empty: at least one action is expected")
    entries = [tuple(tokenizer(" " + text, add_special_tokens=False).input_ids) for text in menu]
    _check(all(entries) and len(set(entries)) == len(menu), f"an entry is empty or listed twice in the menu {menu}")
    entries, trie = [entry + (tokenizer.eos_token_id,) for entry in entries], {}
    for prefix, token in dict.fromkeys((entry[:j], entry[j]) for entry in entries for j in range(len(entry))):
        trie.setdefault(prefix, []).append(token)
    return entries, trie

def menu_logp(logits, allowed):
    """Exercise 12 (2 points). Next-token log-probabilities, restricted to what a menu allows and renormalised.
    log π(w) = logit_w − log Σ_{w' allowed} exp(logit_w')  for allowed w, else −inf
    Args: logits: (..., V); allowed: (..., V) booleans, or None: all.   Returns: (..., V), float32.
    >>> menu_logp(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([True, True, False])).exp()
    tensor([0.5000, 0.5000, 0.0000])"""
    return (logits if allowed is None else logits.masked_fill(~allowed.bool(), -torch.inf)).float().log_softmax(-1)

def _entropy(log_pi):                        # H = −Σ π log π over the last axis; −inf marks what cannot be sampled
    return -(log_pi.exp() * log_pi.masked_fill(log_pi.isneginf(), 0)).sum(-1)
def _sample(log_pi, greedy, generator):      # (B, W) → (B, 1); drawn on the CPU: a seed means the same on every device
    pick = log_pi.argmax(-1, True) if greedy else log_pi.cpu().exp().multinomial(1, generator=generator)
    return pick.to(log_pi.device)
def _pad(rows, side="right"):                # R lists of token ids → one tensor (R, W), padded on one side; its mask
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, side)
    return ids.clamp(min=0), ids >= 0
def _distinct(rows):                         # → the number of one row of each kind; for each row the number of its kind
    first = {row: b for b, row in reversed(list(enumerate(rows)))}
    kind = {row: u for u, row in enumerate(first)}
    return list(first.values()), [kind[row] for row in rows]
def _allow(free, places, size):              # booleans (…, V): every token where free, at (index …, token) that token
    allowed = free[..., None].repeat(*[1] * free.dim(), size)
    allowed[tuple(torch.tensor(places, device=free.device).T)] = True
    return allowed

class LanguageAgent(nn.Module):
    """A transformers causal LM, with its tokenizer, that writes actions; and a critic, V(o, w<ʲ) before each token:
    "head", an MLP that reads the LM's features but does not train them, or "copy", an MLP on its own copy of the LM."""
    def __init__(self, lm, tokenizer, critic="head", max_new_tokens=32):
        super().__init__()
        _check(critic in ("head", "copy"), f"critic is {critic!r}, expected 'head' or 'copy'")
        _check(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, expected at least 1")
        _check(tokenizer.eos_token_id is not None, "the tokenizer has no eos token, which must end an action")
        self.lm, self.tokenizer, self.max_new_tokens = lm, tokenizer, max_new_tokens
        self.critic_lm = copy.deepcopy(lm) if critic == "copy" else None
        self.head = nn.Sequential(nn.Linear(lm.config.hidden_size, 128), nn.Tanh(), nn.Linear(128, 1)).to(lm.device)
        for x in self.head[-1].parameters():
            nn.init.zeros_(x)                       # V = 0: no advantage, rather than normalised noise, before a reward
        self.memory, self.bf16 = None, False        # what `_tokens` has read; whether the LM computes in bfloat16
        self.eval()

    def remembering(self):
        """A twin that shares all weights and reads nothing twice: for a rollout, while the weights stand still."""
        twin = copy.copy(self)
        twin.memory = {}
        return twin

    def train(self, mode=True):
        return super().train(False)                   # no dropout: the policy that is trained is the one that sampled

    def _tokenize(self, prompts, menus=None, policy="token"):             # prompts, or their ids → ids; menus → tries
        _check(policy in POLICIES, f"unknown policy {policy!r}, expected one of {', '.join(POLICIES)}")
        _check(menus is not None or policy not in RESTRICTED, f"{policy} needs a restricted action set (a menu)")
        _check(menus is None or len(menus) == len(prompts), f"{len(prompts)} prompts, but {len(menus or ())} menus")
        ids = [p if isinstance(p, tuple) else tuple(self.tokenizer(p).input_ids) for p in prompts]
        _check(ids and all(ids) and not isinstance(prompts, str), "expected a list of prompts, none of them empty")
        return ids, menus and [menu_trie(self.tokenizer, tuple(menu)) for menu in menus]

    def _forward(self, lm, ids, mask, cache=None, seen=None, keep=0):
        """Read ids (R, K) after what a cache has seen: logits (of the last `keep`; 0: all), features, both renewed."""
        seen = mask if seen is None else torch.cat([seen, mask], 1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]              # explicit: padding shifts them
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            out = lm(input_ids=ids, attention_mask=seen.long(), position_ids=positions, past_key_values=cache,
                     use_cache=True, output_hidden_states=True, logits_to_keep=keep)
        return out.logits, out.hidden_states[-1], out.past_key_values, seen

    def _read(self, lm, prompt_ids, ids, mask):
        """Logits for, and features before, every token of ids (R, L): (R, L, V), (R, L, H); the cache; what it saw.
        Each distinct prompt is read once, up to its last token, and its cache shared by its rows."""
        first, which = _distinct(prompt_ids)
        prompts, seen = (x.to(lm.device) for x in _pad([prompt_ids[b][:-1] for b in first], "left"))       # (U, P)
        if cache := self._forward(lm, prompts, seen, keep=1)[2] if prompts.numel() else None:
            cache.batch_select_indices(torch.tensor(which, device=lm.device))      # our own: to be extended at will
        last = torch.tensor([prompt[-1:] for prompt in prompt_ids], device=lm.device)
        ids, mask = torch.cat([last, ids[:, :-1]], 1), torch.cat([torch.ones_like(last).bool(), mask[:, :-1]], 1)
        return self._forward(lm, ids, mask, cache, seen[which])

    def _tokens(self, prompt_ids, written, tries=None, critic=False):
        """log π, entropy and, if asked for, V of every token of R sequences: (R, L), 0 where masked.
        Only distinct rows that the memory does not hold are read, so many at once that their logits fill 2²⁶ bytes."""
        rows = list(zip(prompt_ids, written, map(id, tries) if tries else written))         # a trie stands for its menu
        (first, which), length, critic = _distinct(rows), max(map(len, written)), critic or self.memory is not None
        known = {} if self.memory is None else self.memory                  # of V, too: a later call may ask for it
        new, few = [r for r in first if rows[r] not in known], max(1, 2**24 // self.lm.config.vocab_size // length)
        for part in [new[k:k + few] for k in range(0, len(new), few)]:
            prompts, texts = [prompt_ids[r] for r in part], [written[r] for r in part]
            ids, mask = (x.to(self.lm.device) for x in _pad(texts))
            logits, features, *_ = self._read(self.lm, prompts, ids, mask)
            places = tries and [(k, j, w) for k, r in enumerate(part) for j in range(len(written[r]))
                                for w in tries[r][1][written[r][:j]]]
            log_pi = menu_logp(logits, tries and _allow(~mask, places, logits.shape[-1]))                 # (R, L, V)
            columns = [log_pi.gather(-1, ids[..., None]).squeeze(-1), _entropy(log_pi)]
            if critic:
                features = self._read(self.critic_lm, prompts, ids, mask)[1] if self.critic_lm else features.detach()
                columns.append(self.head(features.float()).squeeze(-1))
            known.update(zip([rows[r] for r in part], torch.where(mask[..., None], torch.stack(columns, -1), 0)))
        return pad_sequence([known[rows[r]] for r in first], True)[which, :length].unbind(-1)

    def values(self, prompts):
        """V(o), before any token is written: B strings → (B,)."""
        return self._tokens(self._tokenize(prompts)[0], [(0,)] * len(prompts), critic=True)[2][:, 0]

    def score(self, prompts, menus, policy="glam"):
        """Exercise 13 (4 points). Σ_j log p(wʲ|o, w<ʲ), no eos, unrestricted, of every menu entry: list of (A_i,).
        "twosome" divides it by the number of words: ½ log ⅛ if p = ½, ¼ for "eat it". "token" sums log π, restricted to
        the menu and with eos. The softmax over a menu is π(a|o). With gradient; `_tokens` reads a prompt only once."""
        (prompt_ids, tries), raw = self._tokenize(prompts, menus, policy), policy in RESTRICTED
        rows = [(p, entry[:-1] if raw else entry, trie) for p, trie in zip(prompt_ids, tries) for entry in trie[0]]
        prompt_ids, written, owners = zip(*rows)
        scores = self._tokens(prompt_ids, written, None if raw else owners)[0].sum(1)
        words = [len(text.split()) if policy == "twosome" else 1 for menu in menus for text in menu]
        return list((scores / scores.new_tensor(words)).split([len(menu) for menu in menus]))

    def _menu_policy(self, prompt_ids, menus, policy):     # log π(a|o) of the entries, (B, A); −inf beyond a menu's end
        return pad_sequence(self.score(prompt_ids, menus, policy), True, -torch.inf).log_softmax(-1)

    def _write(self, prompt_ids, tries, greedy, generator):
        """Write token by token, free text or in tries, until eos or the limit: B tuples of ids; log π(a|o) (B, 1)."""
        writing = torch.ones(len(prompt_ids), 1, dtype=torch.bool, device=self.lm.device)
        logits, _, cache, seen = self._read(self.lm, prompt_ids, writing.long(), writing)       # that token is not read
        written, logp = [() for _ in prompt_ids], torch.zeros(writing.shape, device=self.lm.device)
        while True:
            places = tries and [(b, w) for b, row in enumerate(written) for w in tries[b][1].get(row, ())]
            log_pi = menu_logp(logits[:, -1], tries and _allow(~writing[:, 0], places, logits.shape[-1]))   # (B, V)
            token = _sample(log_pi, greedy, generator)
            logp += torch.where(writing, log_pi.gather(1, token), 0)
            written = [row + (w,) if go else row for row, w, go in zip(written, token[:, 0].tolist(), writing[:, 0])]
            writing = writing & (token != self.tokenizer.eos_token_id)
            if not writing.any() or (not tries and max(map(len, written)) == self.max_new_tokens):
                return written, logp
            logits, _, cache, seen = self._forward(self.lm, token, writing, cache, seen, keep=1)

    @torch.no_grad()
    def act(self, prompts, menus=None, policy="token", greedy=False, generator=None):
        """Write an action for each of B prompts (strings), given B menus (lists of strings) or None. → Actions
        "token": π(a|o) = Π_j π(wʲ|o, w<ʲ), next tokens restricted to the menu's trie and renormalised; without menus,
        free text up to max_new_tokens. "action": the same, kept as one log π(a|o). "glam", "twosome": see `score`."""
        prompt_ids, tries = self._tokenize(prompts, menus, policy)
        if policy not in RESTRICTED and (not menus or greedy or max(map(len, menus)) > 32):    # > 32: long to read
            keys = list(zip(prompt_ids, map(id, tries) if tries else prompt_ids))
            first, which = _distinct(keys) if greedy else [range(len(keys))] * 2    # greedy: one text per prompt
            written, logp = self._write([prompt_ids[b] for b in first], tries and [tries[b] for b in first],
                                        greedy, generator)
            written, logp = [written[u] for u in which], logp[list(which)]
        else:
            log_pi = self._menu_policy(prompt_ids, menus, policy)
            pick = _sample(log_pi, greedy, generator)
            written, logp = [trie[0][a] for trie, a in zip(tries, pick)], log_pi.gather(1, pick)
        text = [menu[trie[0].index(row)] for menu, trie, row in zip(menus, tries, written)] if menus else \
            [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]
        ids, mask = (x.to(self.lm.device) for x in _pad(written))
        actions = Actions(text, prompt_ids, ids, mask, None, None, None)
        actions.logp, actions.entropy, actions.values = self.evaluate(actions, menus, policy)
        assert torch.allclose(actions.logp.sum(1, True), logp, atol=1 if self.bf16 else 1e-2), "stored ≠ sampled"
        return actions

    def evaluate(self, actions, menus=None, policy="token"):
        """Log-probabilities, entropies and values of written actions under the present weights, with gradient.
        Each distinct (prompt, menu, action) is computed once, with logits for action positions only.
        Returns: (logp, entropy, values): (B, L), zero where masked; all policies but "token": (B, 1), whole actions."""
        prompt_ids, tries = self._tokenize(actions.prompt_ids, menus, policy)
        written = [tuple(row[m.bool()].tolist()) for row, m in zip(actions.ids, actions.mask)]
        _check(all(row in trie[0] for row, trie in zip(written, tries or ())), "an action is no entry of its menu")
        if policy in RESTRICTED:
            log_pi = self._menu_policy(prompt_ids, menus, policy)
            pick = torch.tensor([[trie[0].index(row)] for trie, row in zip(tries, written)], device=log_pi.device)
            return log_pi.gather(1, pick), _entropy(log_pi)[:, None], self.values(prompt_ids)[:, None]
        columns = self._tokens(prompt_ids, written, tries, critic=True)
        columns = tuple(F.pad(x, (0, actions.ids.shape[1] - x.shape[1])) for x in columns)                # (B, L) each
        return columns if policy == "token" else (columns[0].sum(1, True), columns[1].sum(1, True), columns[2][:, :1])

def tiny_agent(env_fn, seed=0, pretrain_steps=300, critic="head", max_new_tokens=32):
    """A language agent that needs no download: a Llama of 2 layers × 64, one token a word, pre-trained in seconds.
    It reads observations and random admissible actions: it speaks the language and knows nothing of the dynamics."""
    obs, pairs = (env := env_fn()).reset(seed=seed)[0], {}
    for _ in range(3000):
        pairs[obs, action := env.random_action()] = None
        obs, _, *over, _ = env.step(action)
        obs = env.reset()[0] if any(over) else obs
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(sum(pairs, ()), trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>", "<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    texts = [tokenizer(f"{obs} {action}").input_ids + [tokenizer.eos_token_id] for obs, action in pairs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                                          num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=1024))
        optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
        for _ in trange(pretrain_steps, desc="pre-training the tiny LM", leave=False):
            ids, mask = _pad([texts[i] for i in torch.randint(len(texts), (16,))])
            optimizer.zero_grad()
            lm(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss.backward()
            optimizer.step()
        return LanguageAgent(lm, tokenizer, critic, max_new_tokens)

# ---------------------------------------------------------------- training
METHODS = {  # policy: who samples, and what gets one credit; γ_w, λ_w (a name: as that field); step size; colour
    "glam":    dict(policy="glam",    gamma_token=1.0,     lam_token=1.0,   lr=3e-4, color="tab:purple"),
    "twosome": dict(policy="twosome", gamma_token=1.0,     lam_token=1.0,   lr=3e-3, color="tab:green"),
    "action":  dict(policy="action",  gamma_token=1.0,     lam_token=1.0,   lr=3e-4, color="tab:orange"),
    "ntpo":    dict(policy="token",   gamma_token="gamma", lam_token="lam", lr=3e-4, color="tab:red"),
    "poad":    dict(policy="token",   gamma_token=1.0,     lam_token=1.0,   lr=3e-4, color="tab:blue")}
PRESETS = {"lunch": dict(updates=10, n_steps=16), "orders": dict(updates=20, lr=1e-3),  # where an environment needs it
           "scikit": dict(updates=12, n_envs=32, n_steps=8, lr=1e-3, entropy_coef=0.001, kl_stop=None)}
REAL = dict(epochs=4, minibatches=1, micro_batch=64)      # a real model: few passes, which read what repeats once,
                                                          # lr / 30, for its last layers lr / 6 (see main)

@dataclass(frozen=True)
class Config:
    """Every knob of a run. None: the method's own, from METHODS, filled in once (so make a new Config per method)."""
    method: str = "poad"          # a row of METHODS
    updates: int = 24             # rollouts, each followed by one PPO update
    seed: int = 0                 # of environments, sampling and minibatches
    n_envs: int = 16              # environments side by side
    n_steps: int = 32             # actions in each of them per update
    gamma: float = 0.95           # γ between actions
    lam: float = 0.95             # λ of GAE between actions
    gamma_token: float = None     # γ_w inside an action
    lam_token: float = None       # λ_w inside an action
    lr: float = None              # Adam's step size for the LM
    critic_lr: float = 1e-3       # Adam's step size for the critic
    lr_decay: bool = False        # both fall linearly to 0
    epochs: int = 3               # passes over a rollout
    minibatches: int = 4          # per pass
    clip: float = 0.2             # ε of the ratio
    value_clip: float = None      # ε of the critic's step, in units of V; None: not clipped
    entropy_coef: float = 0.01    # weight of an action's entropy (nats)
    kl_stop: float = 0.1          # an action's KL(old, new) (nats) that ends the update; None: never
    max_grad_norm: float = 0.5    # gradient clipping, LM and critic each for itself
    micro_batch: int = None       # actions per backward pass, to bound memory; None: the whole minibatch

    def __post_init__(self):
        _check(self.method in METHODS, f"unknown method {self.method!r}, expected one of {', '.join(METHODS)}")
        for name in [name for name in ("gamma_token", "lam_token", "lr") if getattr(self, name) is None]:
            x = METHODS[self.method][name]
            object.__setattr__(self, name, getattr(self, x) if isinstance(x, str) else x)
        _check_unit(**{name: getattr(self, name) for name in ("gamma", "lam", "gamma_token", "lam_token")})
        counts = self.updates, self.n_envs, self.n_steps, self.epochs, self.minibatches, self.micro_batch or 1
        _check(all(isinstance(x, int) and x >= 1 for x in counts), "a count is not a whole number from 1 on")
        for name in ("lr", "critic_lr", "entropy_coef", "clip", "max_grad_norm", "kl_stop"):
            _check((getattr(self, name) or 0) >= 0, f"{name} is {getattr(self, name)}, expected a number ≥ 0")

def _step(agent, players, policy, greedy=False, generator=None):      # of all players → actions, menus, outcome (3, B)
    menus = [player.info["menu"] for player in players] if "menu" in players[0].info else None
    actions = agent.act([player.obs for player in players], menus, policy, greedy, generator)
    outcome = zip(*(player.step(text) for player, text in zip(players, actions.text)))
    return actions, menus, torch.tensor([*outcome], dtype=torch.float, device=actions.ids.device)

@torch.no_grad()
def collect(agent, players, config, generator, episodes):
    """Play T actions with each of B players; (return, success) of every finished episode goes to `episodes`.
    Returns: actions and menus (or None) in rows b · T + t; rewards, done (B, T); last_values (B,)."""
    steps, policy, agent = [], METHODS[config.method]["policy"], agent.remembering()
    for _ in range(config.n_steps):
        actions, menus, (rewards, terminated, truncated) = _step(agent, players, policy, generator=generator)
        if cut := [b for b, player in enumerate(players) if truncated[b] and not terminated[b]]:
            rewards[cut] += config.gamma * agent.values([players[b].obs for b in cut])    # not over: what was to come
        steps.append((actions, menus, rewards, terminated.maximum(truncated)))
        for player in [player for player in players if player.over]:
            episodes.append((player.total, float(player.info["success"])))
            player.begin()
    actions, menus, rewards, done = zip(*steps)
    columns = [[x[b] for b in range(len(players)) for x in xs] for xs in zip(*(vars(a).values() for a in actions))]
    actions = Actions(*(pad_sequence(x, True) if torch.is_tensor(x[0]) else x for x in columns))
    menus = [menu[b] for b in range(len(players)) for menu in menus] if menus[0] else None
    return actions, menus, torch.stack(rewards, 1), torch.stack(done, 1), agent.values([p.obs for p in players])

def play(agent, env_fn, episodes, policy="token", greedy=False, seed=0):
    """Play whole episodes. Returns: (return, success) of each; the first as text, one line an action."""
    _check(episodes >= 1, f"{episodes} episodes to play, expected at least 1")
    players, story = [Player(env_fn(), 1000 * seed + b) for b in range(episodes)], []
    agent, generator = agent.remembering(), torch.Generator().manual_seed(seed)
    while playing := [player for player in players if not player.over]:
        shown = playing[0].obs
        actions, _, (rewards, *_) = _step(agent, playing, policy, greedy, generator)
        if playing[0] is players[0]:
            story.append(f"{shown}\n  → {actions.text[0]}  ({rewards[0]:g})")
    return [(player.total, bool(player.info["success"])) for player in players], "\n".join(story)

def assign(config, mask, values, rewards, done, last_values):
    """Exercise 14 (3 points). Advantages, returns (B · T, L): a player's T actions are one stream (B, T · L) for `gae`.
    Row b · T + t ends at its last written slot: reward and `done` (B, T) belong there. config: γ, γ_w, λ, λ_w."""
    end = mask & (mask.cumsum(1) == mask.sum(1, True))                                     # the last written slot
    discounts = bad_discounts(end, done.view(-1, 1).expand(mask.shape), config.gamma, config.gamma_token)
    lambdas = torch.where(end, config.lam, config.lam_token)
    stream = [x.reshape(len(rewards), -1) for x in (rewards.view(-1, 1) * end, values, discounts, lambdas, mask)]
    return [x.view(mask.shape) for x in gae(*stream, last_values)]

def ppo_update(agent, optimizer, rollout, config, generator):
    """One PPO update on what `collect` returned; returns diagnostics, averaged over the minibatches used.
    The unit of policy loss, entropy and KL is the action: a mean over tokens times the tokens per action is a sum over
    its tokens, averaged over actions. The critic has a mean over tokens. Forced tokens (entropy 0) have no gradient:
    they count in the stream of credit and for the critic, and not in the advantages' μ and σ or any other mean."""
    (actions, menus, *outcome), policy, stats = rollout, METHODS[config.method]["policy"], []
    old_logp, old_values, choice = actions.logp, actions.values, actions.entropy > 0
    mask = actions.mask[:, :old_logp.shape[1]]                                     # of tokens, or one slot an action
    advantages, returns = assign(config, mask, old_values, *outcome)
    advantages = normalize(advantages, choice if choice.any() else mask)
    for i in [j for _ in range(config.epochs)
              for j in torch.randperm(len(mask), generator=generator).chunk(config.minibatches) if choice[j].any()]:
        optimizer.zero_grad()
        sums, i = 0, torch.tensor(sorted(i.tolist(), key=actions.prompt_ids.__getitem__))  # a prompt's actions together
        for k in i.split(config.micro_batch or len(i)):                                    # their gradients add up
            logp, entropy, values = agent.evaluate(actions.rows(k), menus and [menus[row] for row in k], policy)
            assert stats or torch.allclose(logp, old_logp[k], atol=1 if agent.bf16 else 1e-3), "trained ≠ sampled"
            per_action = choice[k].sum() / len(i)                # times a mean over choices: their sum, per action of i
            share = mask[k].sum() / mask[i].sum()                # of these tokens in the critic's mean over i
            chosen = choice[k] if per_action else mask[k]        # no choice at all: only the critic learns
            policy_loss, info = ppo_policy_loss(logp, old_logp[k], advantages[k], chosen, config.clip)
            critic_loss = share * value_loss(values, old_values[k], returns[k], mask[k], config.value_clip)
            entropy = per_action * masked_mean(entropy, chosen)
            (per_action * policy_loss - config.entropy_coef * entropy + critic_loss).backward()
            clipped = choice[k].sum() / choice[i].sum() * info["clip_fraction"]
            sums += torch.stack([per_action * info["kl"], clipped, entropy, critic_loss]).detach()
        if config.kl_stop is not None and sums[0] > config.kl_stop:
            break
        stats.append(sums.tolist())
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        optimizer.step()
    unexplained = (returns - old_values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-12)
    means = dict(zip(("kl", "clip_fraction", "entropy", "value_loss"), map(mean, zip(*stats)) if stats else [None] * 4))
    return means | dict(minibatches=len(stats), tokens=mask.sum().item(), explained_variance=1 - unexplained.item())

def _weights(folder, state):                                    # the file that belongs to a state: one name per update
    return folder / f"update-{len(state['metrics'])}.safetensors"

def save(folder, agent, **state):
    """Write a checkpoint: weights as safetensors, the rest as plain data. A complete one replaces the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    new, old = _weights(folder, state), set(folder.glob("update-*.safetensors"))
    save_model(agent, str(new))
    torch.save(state, folder / "state.part")
    (folder / "state.part").replace(folder / "state.pt")                             # from here on the new one counts
    for path in old - {new}:
        path.unlink()

def load(folder, agent):
    """Read a folder's checkpoint: weights into the agent, the rest is returned. ValueError if there is none for it."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        load_model(agent, str(_weights(folder, state)))
        return state
    except Exception as error:                                        # whatever a loader raises: missing, cut, foreign
        raise ValueError(f"{folder} holds no checkpoint for this agent ({_one_line(error, 90)})") from None

def train(agent, env_fn, config, folder=None, resume=False):
    """Train the agent in place, on environments that env_fn() makes. The same seed gives the same run.
    folder: for a checkpoint after every update; resume: go on from the one there, as if never interrupted.
    Yields one dict per update: update, env_steps, episodes; return_mean (undiscounted) and success_rate over the last
    100 episodes, None before one has ended; seconds; and what `ppo_update` returns."""
    folder, begin, generator = folder and Path(folder), time.perf_counter(), torch.Generator().manual_seed(config.seed)
    _check(folder or not resume, "to resume, give the folder that holds the checkpoint")
    _check(resume or not folder or not (folder / "state.pt").exists(), f"{folder} holds a checkpoint: resume it")
    players, episodes, history = [Player(env_fn(), 1000 * config.seed + b) for b in range(config.n_envs)], [], []
    learn = [(name.startswith("lm."), x) for name, x in agent.named_parameters() if x.requires_grad]
    optimizer = torch.optim.Adam([dict(params=[x for in_lm, x in learn if in_lm is lm]) for lm in (True, False)])
    if resume:
        state = load(folder, agent)
        free = {} if config.lr_decay else {"updates": config.updates}      # with lr_decay their number sets the steps
        other = dict((state["config"] | free).items() - asdict(config).items())
        _check(not other, f"{folder} holds a run of another configuration: {other}")
        episodes, history, begin = state["episodes"], state["metrics"], begin - state["metrics"][-1]["seconds"]
        _check(len(history) <= config.updates, f"{folder} holds {len(history)} updates already")
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        for player, snapshot in zip(players, state["players"]):
            player.restore(snapshot)
        yield from history
    for update in range(len(history), config.updates):
        for group, lr in zip(optimizer.param_groups, (config.lr, config.critic_lr)):
            group["lr"] = lr * (1 - update / config.updates if config.lr_decay else 1)
        stats = ppo_update(agent, optimizer, collect(agent, players, config, generator, episodes), config, generator)
        return_mean, success_rate = torch.tensor(episodes[-100:]).mean(0).tolist() if episodes else (None, None)
        history.append(dict(update=update + 1, env_steps=(update + 1) * config.n_envs * config.n_steps,
                            episodes=len(episodes), return_mean=return_mean, success_rate=success_rate,
                            seconds=time.perf_counter() - begin, **stats))
        if folder:
            save(folder, agent, config=asdict(config), metrics=history, episodes=episodes,
                 players=[player.snapshot() for player in players],
                 generator=generator.get_state(), optimizer=optimizer.state_dict())
        yield history[-1]

# ---------------------------------------------------------------- command line
def load_agent(model, env_fn, seed=0, device="cpu", train_layers=None):
    """The tiny agent ("tiny"), or a causal LM from the hub, a local folder or a .gguf file; else ValueError.
    train_layers: only that many of its last layers learn. On a GPU a real model computes in bfloat16, else float32."""
    if model == "tiny":
        agent = tiny_agent(env_fn, seed)
    else:
        where, gguf = (Path(model).parent, {"gguf_file": Path(model).name}) if model.endswith(".gguf") else (model, {})
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)                                              # the critic's first layer is drawn
                agent = LanguageAgent(AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **gguf),
                                      AutoTokenizer.from_pretrained(where, **gguf))
        except Exception as error:                                   # whatever a loader raises, the user typed a name
            raise ValueError(f"cannot load the model {model!r}: expected tiny, a hub id, a local folder or a .gguf "
                             f"file ({_one_line(error, 90)}…)") from error
        agent.bf16 = device.startswith("cuda")
    if train_layers:
        layers = next(x for x in agent.lm.modules() if isinstance(x, nn.ModuleList))       # a model's first list
        _check(0 < train_layers <= len(layers), f"train_layers is {train_layers}, but {model} has {len(layers)} layers")
        agent.lm.requires_grad_(False)
        layers[-train_layers:].requires_grad_(True)
    return agent.to(device)

def demonstrate(agent, env_fn, episodes, method, seed):
    """Play sampled, then greedy episodes; print success, mean return and one transcript of each."""
    for greedy in (False, True):
        played, story = play(agent, env_fn, episodes, METHODS[method]["policy"], greedy, seed)
        print(f"{story}\n{method}, seed {seed}, {episodes} {'greedy' if greedy else 'sampled'} episodes:",
              "mean return {:.2f}, success rate {:.2f}\n".format(*map(mean, zip(*played))))

def report(runs, out):
    """Write the runs to the JSON file `out`, their curves beside it, and print a table: mean ± std over seeds."""
    import matplotlib.pyplot as plt
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"runs": runs}, indent=1))
    fig, ax = plt.subplots(layout="constrained", subplot_kw=dict(xlabel="environment steps", ylabel="success rate"))
    print("method         success  mean return   steps to 90 %   seconds")
    for method in dict.fromkeys(run["config"]["method"] for run in runs):
        rows = []
        for curve in [run["metrics"] for run in runs if run["config"]["method"] == method]:
            rate = [m["success_rate"] if m["episodes"] > 15 else torch.nan for m in curve]  # the first to end are short
            ax.plot([m["env_steps"] for m in curve], rate, METHODS[method]["color"], label=None if rows else method)
            to_90 = [m["env_steps"] for m in curve if m["episodes"] >= 30 and m["success_rate"] >= 0.9] + [torch.inf]
            rows.append([curve[-1][name] or 0.0 for name in ("success_rate", "return_mean", "seconds")] + to_90[:1])
        success, total, seconds, to_90 = zip(*rows)
        print(f"{method:11}{mean(success):6.2f} ± {pstdev(success):.2f}{mean(total):7.2f} ± {pstdev(total):.2f}"
              f"{median(to_90):>16.0f}{mean(seconds):>10.0f}")
    ax.legend(title=f"Who learns {runs[0]['config']['env']}?")
    fig.savefig(out.with_suffix(".png"), dpi=130)
    print(f"curves: {out.with_suffix('.png')}   numbers: {out}")

def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a language agent with POAD and its relatives.",
                                     epilog="And every knob of Config, for all methods: --lr 1e-3 --kl_stop null")
    parser.error = lambda message: parser.exit(2, f"poad.py: {message}\n")
    for flag, default, text in (
            ("env", "food", f"one of {', '.join(ENVS)}"), ("wording", "", "of food: long (default) or short"),
            ("method", "", f"some of {','.join(METHODS)}; default: all that can run"),
            ("model", "tiny", "tiny, a hub id, a folder or a .gguf file"), ("device", "cpu", "cpu or cuda"),
            ("train-layers", 0, "how many of its last layers learn; default: all"), ("seed", 0, "the first"),
            ("seeds", 1, "how many"), ("out", "", "JSON file; default runs/ENV.json"),
            ("save", "", "folder for checkpoints"), ("resume", "", "folder to go on from, and save to"),
            ("eval", 0, "play N episodes, sampled and greedy; no training")):
        parser.add_argument("--" + flag, type=type(default), default=default, help=text)
    for knob in vars(Config()).keys() - {"method", "seed"}:
        parser.add_argument("--" + knob, type=json.loads, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    args, runs = parser.parse_args(argv), []
    knobs, tiny = {name: x for name, x in vars(args).items() if name in vars(Config())}, args.model == "tiny"
    wording = {"wording": args.wording or "long"} if args.wording or args.env == "food" else {}
    env_fn, folder = partial(make, args.env, **wording), Path(args.resume or args.save)
    try:
        has_menu = "menu" in env_fn().reset(seed=0)[1]
        able = [method for method, row in METHODS.items() if has_menu or row["policy"] not in RESTRICTED]
        methods = args.method.split(",") if args.method else able
        _check(set(methods) <= set(able), f"--method {args.method} on {args.env}: choose from {', '.join(able)}"
               + f" ({' and '.join(RESTRICTED)} need a menu, which {args.env} has not)" * (not has_menu))
        _check(not args.resume or any(folder.glob("*/state.pt")), f"{folder} holds no checkpoint to go on from")
        torch.set_num_threads(1 if tiny else torch.get_num_threads())                     # it is too small to share
        _check(args.seeds >= 1, f"--seeds {args.seeds}: expected at least 1")
        for seed in range(args.seed, args.seed + args.seeds):
            start = load_agent(args.model, env_fn, seed, args.device, args.train_layers)
            for method in methods:
                slow = {} if tiny else {"lr": METHODS[method]["lr"] / (6 if args.train_layers else 30)} | REAL
                config = Config(**PRESETS.get(args.env, {}) | slow | knobs | {"method": method, "seed": seed})
                agent = start if method == methods[-1] else copy.deepcopy(start)
                place = folder / f"{method}-{seed}" if args.resume or args.save else None
                resume = bool(args.resume) and (place / "state.pt").exists()
                if args.eval:
                    if args.resume:
                        load(place, agent)
                    demonstrate(agent, env_fn, args.eval, method, seed)
                    continue
                runs.append({"config": asdict(config) | dict(env=args.env, model=args.model, **wording), "metrics": []})
                bar = tqdm(train(agent, env_fn, config, place, resume), f"{method:8} seed {seed}", config.updates)
                for metrics in bar:
                    runs[-1]["metrics"].append(metrics)
                    bar.set_postfix(success=metrics["success_rate"])
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept")
    except (ValueError, RuntimeError, AssertionError, OSError, ImportError) as error:
        parser.error(_one_line(error))
    finally:
        if runs := [run for run in runs if run["metrics"]]:
            report(runs, Path(args.out or f"runs/{args.env}.json").with_suffix(".json"))

if __name__ == "__main__":
    main()
