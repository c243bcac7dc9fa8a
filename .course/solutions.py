"""What the grader is measured with: `python .course/solutions.py`, a part of .ci/run.

PLAIN: a correct solution of every exercise, as a student might write it from the docstring; OTHER: more of them, in
other styles. All must pass. MISTAKES: (exercise, words of the message, what to replace in the plain solution, by what):
each must fail, with a message that holds these words, so that it says what is wrong."""
import sys
import time
import warnings
from pathlib import Path

import transformers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import kit  # noqa: E402

PLAIN = dict(state_values='''
def state_values(q, policy=None, temperature=0.0):
    _check(policy is None or temperature == 0, "a policy or a temperature?")
    _check(temperature >= 0 and temperature != float("inf"), "temperature")
    q = q if torch.is_tensor(q) and q.is_floating_point() else torch.tensor(q, dtype=torch.float64)
    if policy is not None:
        policy = torch.as_tensor(policy, dtype=q.dtype)
        _check_shapes(q=q, policy=policy)
        return torch.where(policy > 0, policy * q, 0).sum(-1)
    if temperature > 0:
        best = q.max(-1, keepdim=True).values
        return best[..., 0] + temperature * ((q - best) / temperature).exp().sum(-1).log()
    return q.max(-1).values
''', action_backup='''
def action_backup(q, mdp, gamma, policy=None, temperature=0.0):
    _check_unit(gamma=gamma)
    q = torch.as_tensor(q).double()
    _check_shapes(q=q, reward=mdp.reward)
    v = state_values(q, policy, temperature)
    new = torch.zeros(q.shape, dtype=torch.float64)
    for s in range(q.shape[0]):
        for a in range(q.shape[1]):
            new[s, a] = mdp.reward[s, a] + gamma * (mdp.transition[s, a] * v).sum()
    return new
''', token_backup='''
def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    q = torch.as_tensor(q).double().clone()
    S, (N, V) = len(mdp.reward), mdp.child.shape
    _check(q.shape == (S, N, V), f"q is {tuple(q.shape)}, not {(S, N, V)}")
    for n in range(N):
        for w in range(V):
            if mdp.child[n, w] < 0 and mdp.leaf[n, w] < 0:
                q[:, n, w] = -torch.inf
    v = state_values(q, policy, temperature)
    new = torch.full((S, N, V), -torch.inf, dtype=torch.float64)
    for n in range(N):
        for w in range(V):
            if mdp.child[n, w] >= 0:
                new[:, n, w] = gamma_token * v[:, mdp.child[n, w]]
            if mdp.leaf[n, w] >= 0:
                a = mdp.leaf[n, w]
                new[:, n, w] = mdp.reward[:, a] + gamma * (mdp.transition[:, a] * v[:, 0]).sum(-1)
    return new
''', bad_backup='''
def bad_backup(q, mdp, gamma, policy=None, temperature=0.0):
    return token_backup(q, mdp, gamma, 1.0, policy=policy, temperature=temperature)
''', action_policy='''
def action_policy(token_policy, mdp):
    S = len(mdp.reward)
    _check(token_policy.shape == (S, *mdp.child.shape), f"{tuple(token_policy.shape)}, {(S, *mdp.child.shape)}")
    columns = []
    for a, tokens in enumerate(mdp.actions):
        total = torch.ones(S, dtype=token_policy.dtype)
        for j in range(len(tokens)):
            total = total * token_policy[:, mdp.prefixes.index(tokens[:j]), tokens[j]]
        columns.append(total)
    return torch.stack(columns, 1)
''', bad_discounts='''
def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    _check_shapes(action_end=action_end, done=done)
    kind = action_end.dtype if action_end.is_floating_point() else torch.float32
    result = []
    for end, over in zip(action_end.flatten(), done.flatten()):
        if not end:
            result.append(gamma_token)
        elif not over:
            result.append(gamma)
        else:
            result.append(0.0)
    return torch.tensor(result, dtype=kind).reshape(action_end.shape)
''', gae='''
def gae(rewards, values, discounts, lambdas, mask, last_values):
    if not torch.is_tensor(lambdas) or lambdas.dim() == 0:
        lambdas = torch.full_like(values, float(lambdas))
    _check_shapes(mask=mask, rewards=rewards, values=values, discounts=discounts, lambdas=lambdas)
    _check(last_values.shape == (len(mask),), f"last_values is {tuple(last_values.shape)}")
    real = mask.bool()
    _check(rewards[real].isfinite().all(), "a reward is not finite")
    _check_unit(discounts=discounts[real], lambdas=lambdas[real])
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(len(mask)):
        next_value, advantage = last_values[b].item(), 0.0
        for n in reversed(range(mask.shape[1])):
            if mask[b, n]:
                r, v, d, lam = (x[b, n].item() for x in (rewards, values, discounts, lambdas))
                delta = r + d * next_value - v
                advantage = delta + d * lam * advantage
                next_value = v
                advantages[b, n] = advantage
                returns[b, n] = advantage + v
    return advantages, returns
''', masked_mean='''
def masked_mean(x, mask):
    _check_shapes(x=x, mask=mask)
    m = mask.bool()
    _check(m.any(), "nothing to average")
    return torch.where(m, x, 0).sum() / m.sum()
''', normalize='''
def normalize(x, mask):
    m = mask.bool()
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return torch.where(m, (x - mean) / (std + 1e-8), 0)
''', ppo_policy_loss='''
def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    _check_shapes(logp=logp, old_logp=old_logp, advantages=advantages, mask=mask)
    _check(clip >= 0, "clip")
    m = mask.bool()
    logp, old_logp, advantages = logp[m], old_logp[m], advantages[m]
    _check(len(logp) > 0, "nothing to average")
    ratio = torch.exp(logp - old_logp)
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
    loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    kl = (ratio - 1 - (logp - old_logp)).mean().detach()
    clip_fraction = ((ratio - 1).abs() > clip).to(ratio).mean().detach()
    return loss, {"kl": kl, "clip_fraction": clip_fraction}
''', value_loss='''
def value_loss(values, old_values, returns, mask, clip=None):
    _check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    _check(clip is None or clip >= 0, "clip")
    m = mask.bool()
    v, old, target = values[m], old_values[m], returns[m]
    _check(len(v) > 0, "nothing to average")
    loss = 0.5 * (v - target) ** 2
    if clip is not None:
        moved = old + (v - old).clamp(-clip, clip)
        loss = torch.max(loss, 0.5 * (moved - target) ** 2)
    return loss.mean()
''', menu_logp='''
def menu_logp(logits, allowed):
    logits = logits.to(torch.float32)
    if allowed is not None:
        logits = torch.where(allowed.bool(), logits, -torch.inf)
    return logits - torch.logsumexp(logits, -1, keepdim=True)
''', score='''
def score(self, prompts, menus, policy="glam"):
    prompt_ids, tries = self._tokenize(prompts, menus, policy)
    result = []
    for b, (prompt, (entries, trie)) in enumerate(zip(prompt_ids, tries)):
        scores = []
        for a, entry in enumerate(entries):
            tokens = entry if policy in ("token", "action") else entry[:-1]
            logits = self.lm(input_ids=torch.tensor([prompt + tokens])).logits[0]
            total = 0.0
            for j, w in enumerate(tokens):
                row = logits[len(prompt) + j - 1]
                follow = trie[tokens[:j]] if policy in ("token", "action") else list(range(len(row)))
                total = total + row[w] - row[follow].logsumexp(-1)
            if policy == "twosome":
                total = total / len(menus[b][a].split())
            scores.append(total)
        result.append(torch.stack(scores))
    return result
''', assign='''
def assign(config, mask, values, rewards, done, last_values):
    (B, T), L = rewards.shape, mask.shape[1]
    end, r, d = torch.zeros(B * T, L), torch.zeros(B * T, L), torch.zeros(B * T, L)
    for row in range(B * T):
        last = max(j for j in range(L) if mask[row, j])
        end[row, last] = 1
        r[row, last] = rewards[row // T, row % T]
        d[row, last] = done[row // T, row % T]
    discounts = bad_discounts(end, d, config.gamma, config.gamma_token)
    lambdas = end * config.lam + (1 - end) * config.lam_token
    stream = [x.reshape(B, T * L) for x in (r, values, discounts, lambdas, mask)]
    advantages, returns = gae(*stream, last_values)
    return advantages.reshape(B * T, L), returns.reshape(B * T, L)
''')

OTHER = [
    ("state_values", "NumPy inside", '''
import numpy as np
def state_values(q, policy=None, temperature=0.0):
    if temperature and policy is not None:
        raise ValueError("policy and temperature exclude each other")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature is {temperature}")
    table = np.asarray(q)
    if policy is not None:
        weights = np.asarray(policy)
        if table.shape != weights.shape:
            raise ValueError(f"q is {table.shape} but policy is {weights.shape}")
        result = np.where(weights == 0, 0, weights * np.where(weights == 0, 0, table)).sum(-1)
    elif temperature:
        top = table.max(-1, keepdims=True)
        result = top[..., 0] + temperature * np.log(np.exp((table - top) / temperature).sum(-1))
    else:
        result = table.max(-1)
    return torch.tensor(result).to(q.dtype)
'''),
    ("action_backup", "einsum", '''
def action_backup(q, mdp, gamma, policy=None, temperature=0.0):
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}")
    if tuple(q.shape) != tuple(mdp.reward.shape):
        raise ValueError(f"q is {tuple(q.shape)}, expected {tuple(mdp.reward.shape)}")
    v = state_values(q.double(), policy, temperature)
    return torch.einsum("sat,t->sa", mdp.transition, v).mul(gamma) + mdp.reward
'''),
    ("token_backup", "tensors, actions written into the table", '''
def token_backup(q, mdp, gamma, gamma_token, policy=None, temperature=0.0):
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    valid = (mdp.child >= 0) | (mdp.leaf >= 0)
    _check_shapes(expected=valid.expand(len(mdp.reward), *valid.shape), q=q)
    values = state_values(torch.where(valid, q.double(), -torch.inf), policy, temperature)
    table = torch.full_like(q, -torch.inf, dtype=torch.float64)
    n, w = (mdp.child >= 0).nonzero().T
    table[:, n, w] = values[:, mdp.child[n, w]] * gamma_token
    after = gamma * values[:, 0]
    for a, tokens in enumerate(mdp.actions):
        table[:, mdp.prefixes.index(tokens[:-1]), tokens[-1]] = mdp.reward[:, a] + mdp.transition[:, a] @ after
    return table
'''),
    ("bad_backup", "without token_backup", PLAIN["token_backup"].replace("def token_backup", "def bad_backup").replace(
        "gamma, gamma_token,", "gamma,").replace("gamma=gamma, gamma_token=gamma_token", "gamma=gamma").replace(
        "gamma_token * v", "v")),
    ("action_policy", "sum of logarithms, walking down the trie", '''
def action_policy(token_policy, mdp):
    _check_shapes(expected=torch.zeros(len(mdp.reward), *mdp.child.shape), token_policy=token_policy)
    columns = []
    for tokens in mdp.actions:
        n, total = 0, 0.0
        for w in tokens:
            total, n = total + token_policy[:, n, w].log(), mdp.child[n, w]
        columns.append(total.exp())
    return torch.stack(columns, -1)
'''),
    ("bad_discounts", "arithmetic with 0 and 1", '''
def bad_discounts(action_end, done, gamma, gamma_token=1.0):
    _check_unit(gamma=gamma, gamma_token=gamma_token)
    _check_shapes(action_end=action_end, done=done)
    end = action_end.double()
    result = (1 - end) * gamma_token + end * (1 - done.double()) * gamma
    return result if action_end.dtype == torch.float64 else result.float()
'''),
    ("gae", "NumPy, gaps cut out, the sum of discounted errors", '''
import numpy as np
def cut(x, keep):
    return x.detach().double().numpy()[keep]
def gae(rewards, values, discounts, lambdas, mask, last_values):
    if not torch.is_tensor(lambdas) or not lambdas.dim():
        lambdas = torch.from_numpy(np.full(values.shape, float(lambdas)))
    _check_shapes(mask=mask, rewards=rewards, values=values, discounts=discounts, lambdas=lambdas)
    _check_shapes(last_values=last_values, rows=mask[:, 0])
    keep = mask.bool()
    _check(torch.isfinite(rewards[keep]).all(), "a reward is not finite")
    _check_unit(discounts=discounts[keep], lambdas=lambdas[keep])
    a, ret = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, k in enumerate(keep.numpy()):
        r, v, g, lam = (cut(x[b], k) for x in (rewards, values, discounts, lambdas))
        after = np.append(v[1:], last_values[b].item()) if len(v) else v
        delta, decay = r + g * after - v, g * lam
        total = np.array([sum(delta[m] * np.prod(decay[n:m]) for m in range(n, len(v))) for n in range(len(v))])
        a[b, k], ret[b, k] = total, total + v
    return torch.from_numpy(a).to(values.dtype), torch.from_numpy(ret).to(values.dtype)
'''),
    ("gae", "all rows at once, from right to left", '''
@torch.no_grad()
def gae(rewards, values, discounts, lambdas, mask, last_values):
    if not torch.is_tensor(lambdas) or not lambdas.dim():
        lambdas = values * 0 + lambdas
    _check_shapes(mask=mask, rewards=rewards, values=values, discounts=discounts, lambdas=lambdas)
    _check_shapes(last_values=last_values, rows=mask[:, 0])
    m = mask == 1
    _check(rewards[m].isfinite().all(), "reward")
    _check_unit(discounts=discounts[m], lambdas=lambdas[m])
    v_next, a_next, columns = last_values.to(values.dtype), torch.zeros_like(values[:, 0]), []
    for r, v, g, lam, real in reversed(list(zip(*(x.T for x in (rewards, values, discounts, lambdas, m))))):
        a = r + g * v_next - v + g * lam * a_next
        a_next, v_next = torch.where(real, a, a_next).to(values.dtype), torch.where(real, v, v_next)
        columns.insert(0, torch.where(real, a_next, 0))
    advantages = torch.stack(columns, 1)
    return advantages, torch.where(m, advantages + values, 0)
'''),
    ("masked_mean", "a loop in Python", '''
def masked_mean(x, mask):
    _check_shapes(x=x, mask=mask)
    chosen = [value for value, real in zip(x.flatten(), mask.flatten()) if real]
    if not chosen:
        raise ValueError("the mask selects nothing")
    return sum(chosen) / len(chosen)
'''),
    ("normalize", "torch.std, in float32", '''
def normalize(x, mask):
    _check_shapes(x=x, mask=mask)
    real = x[mask == 1].float()
    _check(len(real), "nothing to normalise")
    out = torch.zeros_like(x)
    out[mask == 1] = ((real - real.mean()) / (real.std(unbiased=False) + 1e-8)).to(x.dtype)
    return out
'''),
    ("ppo_policy_loss", "the two cases of the sign of A", '''
def ppo_policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    _check_shapes(logp=logp, old_logp=old_logp, advantages=advantages, mask=mask)
    if clip < 0:
        raise ValueError(f"clip is {clip}")
    total, kl, outside, n = 0.0, 0.0, 0, 0
    for new, old, a in zip(logp[mask == 1], old_logp[mask == 1], advantages[mask == 1]):
        ratio = (new - old).exp()
        stuck = ratio > 1 + clip if a > 0 else ratio < 1 - clip
        total = total - (ratio.detach().clamp(1 - clip, 1 + clip) if stuck else ratio) * a
        kl, n = kl + float(ratio.detach() - 1 - (new - old).detach()), n + 1
        outside += abs(float(ratio.detach()) - 1) > clip
    _check(n, "nothing to average")
    return total / n, {"kl": kl / n, "clip_fraction": outside / n}
'''),
    ("value_loss", "masked_mean of where", '''
def value_loss(values, old_values, returns, mask, clip=None):
    _check_shapes(mask=mask, values=values, old_values=old_values, returns=returns)
    if clip is not None and clip < 0:
        raise ValueError(f"clip is {clip}")
    error = values[mask == 1] - returns[mask == 1]
    square = error * error
    if clip is not None:
        moved = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        near = (moved - returns)[mask == 1]
        square = torch.where(near * near > square, near * near, square)
    return masked_mean(square, torch.ones_like(square)) * 0.5
'''),
    ("menu_logp", "a loop over rows, NumPy indices", '''
def menu_logp(logits, allowed):
    if allowed is None:
        return torch.log_softmax(logits.float(), -1)
    rows, keep = logits.float().reshape(-1, logits.shape[-1]), allowed.bool().reshape(-1, logits.shape[-1])
    out = torch.full_like(rows, float("-inf"))
    for i in range(len(rows)):
        chosen = keep[i].nonzero()[:, 0].numpy()
        out[i, chosen] = torch.log_softmax(rows[i, chosen], 0)
    return out.reshape(logits.shape)
'''),
    ("score", "one call of _tokens per prompt", '''
def score(self, prompts, menus, policy="glam"):
    ids, tries = self._tokenize(prompts, menus, policy)
    out = []
    for p, menu, (entries, trie) in zip(ids, menus, tries):
        whole = policy not in ("glam", "twosome")
        written = [e if whole else e[:-1] for e in entries]
        logp = self._tokens([p] * len(menu), written, [(entries, trie)] * len(menu) if whole else None)[0]
        total = logp.sum(-1)
        out.append(total / torch.tensor([float(len(x.split())) for x in menu]) if policy == "twosome" else total)
    return out
'''),
    ("assign", "a stream without padding for every player", '''
def assign(config, mask, values, rewards, done, last_values):
    players, steps = rewards.shape
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b in range(players):
        rows = slice(b * steps, (b + 1) * steps)
        m, lengths = mask[rows], mask[rows].sum(1)
        last = lengths.cumsum(0) - 1
        n = int(lengths.sum())
        end, over, r = torch.zeros(3, 1, n)
        end[0, last], over[0, last], r[0, last] = 1.0, done[b].float(), rewards[b].float()
        out = gae(r, values[rows][m][None], bad_discounts(end, over, config.gamma, config.gamma_token),
                  torch.where(end == 1, config.lam, config.lam_token), torch.ones(1, n), last_values[b:b + 1])
        for whole, part in zip((advantages, returns), out):
            new = torch.zeros_like(values[rows])
            new[m] = part[0].to(new.dtype)
            whole[rows] = new
    return advantages, returns
'''),
]

MISTAKES = [
    ("state_values", "minimum instead of maximum", "return q.max(-1).values", "return q.min(-1).values"),
    ("state_values", "invalid token counts as 0", "return q.max(-1).values", "return q.clamp(min=0).max(-1).values"),
    ("state_values", "NaN", "torch.where(policy > 0, policy * q, 0)", "(policy * q)"),
    ("state_values", "the mean of policy times q", "policy * q, 0).sum(-1)", "policy * q, 0).mean(-1)"),
    ("state_values", "policy ignored", "if policy is not None:\n", "if policy is None and temperature < 0:\n"),
    ("state_values", "temperature ignored", "if temperature > 0:", "if temperature < 0:"),
    ("state_values", "factor τ in front", "best[..., 0] + temperature * ((q - best) / temperature)",
     "(q / temperature)"),
    ("state_values", "overflows", "best = q.max(-1, keepdim=True).values", "best = 0 * q.amax(-1, keepdim=True)"),
    ("action_backup", "gamma forgotten", "+ gamma * (", "+ ("),
    ("action_backup", "reward forgotten", "mdp.reward[s, a] + gamma", "gamma"),
    ("action_backup", "gamma applied to the reward", "mdp.reward[s, a] + gamma * (mdp.transition[s, a] * v).sum()",
     "gamma * (mdp.reward[s, a] + (mdp.transition[s, a] * v).sum())"),
    ("action_backup", "value of this state", "(mdp.transition[s, a] * v).sum()", "v[s]"),
    ("action_backup", "policy or temperature lost", "state_values(q, policy, temperature)", "state_values(q)"),
    ("token_backup", "gamma was applied inside the action", "gamma_token * v", "gamma * v"),
    ("token_backup", "gamma_token forgotten", "gamma_token * v", "v"),
    ("token_backup", "gamma times gamma_token", "+ gamma * (", "+ gamma * gamma_token * ("),
    ("token_backup", "V before the token", "v[:, mdp.child[n, w]]", "v[:, n]"),
    ("token_backup", "must be -inf", "new = torch.full((S, N, V), -torch.inf", "new = torch.full((S, N, V), 0.0"),
    ("token_backup", "gamma_token at the action's end", "+ gamma * (", "+ gamma_token * ("),
    ("bad_backup", "gamma was applied inside the action", "gamma, 1.0", "gamma, gamma"),
    ("bad_backup", "gamma and gamma_token swapped", "gamma, 1.0", "1.0, gamma"),
    ("bad_backup", "policy or temperature lost", "policy=policy, temperature=temperature", ""),
    ("action_policy", "sum instead of product", "total * token", "(j > 0) * total + token"),
    ("action_policy", "only the last token", "total * token", "token"),
    ("action_policy", "the last token is left out", "range(len(tokens))", "range(len(tokens) - 1)"),
    ("action_policy", "the first token is left out", "range(len(tokens))", "range(1, len(tokens))"),
    ("action_policy", "overwritten", "columns = []",
     "table = torch.ones(S, len(mdp.actions), dtype=token_policy.dtype)\n"
     "    for a, tokens in enumerate(mdp.actions):\n        for j, w in enumerate(tokens):\n"
     "            table[:, a] = table[:, a] * token_policy[:, mdp.prefixes.index(tokens[:j]), w]\n    return table"),
    ("bad_discounts", "gamma was applied inside the action", "append(gamma_token)", "append(gamma)"),
    ("bad_discounts", "bootstrapped across an episode's end", "append(0.0)", "append(gamma)"),
    ("bad_discounts", "`done` was read inside an action", "append(gamma_token)", "append(0 if over else gamma_token)"),
    ("bad_discounts", "`done` is upside down", "elif not over", "elif over"),
    ("bad_discounts", "rounded to float32", "action_end.dtype if action_end.is_floating_point() else ", ""),
    ("gae", "bootstrapped across an episode's end", "d * next_value", "(d or 0.5) * next_value"),
    ("gae", "the reward is lost where an episode ends", "delta = r +", "delta = r * (d > 0) +"),
    ("gae", "lambda forgotten at the action's boundary", "d * lam * adv", "d * (lam if d == 1 else 1) * adv"),
    ("gae", "lambda applied inside the action", "d * lam * adv", "d * 0.25 * adv"),
    ("gae", "values shifted by one", "d * next_value", "d * v"),
    ("gae", "the next value is not discounted", "r + d * next", "r + next"),
    ("gae", "the trace is not discounted", "+ d * lam", "+ lam"),
    ("gae", "only the one-step errors", "= delta + d * lam * advantage", "= delta"),
    ("gae", "the values are not subtracted", "next_value - v\n", "next_value\n"),
    ("gae", "last_values ignored", "last_values[b].item(), 0.0", "0.0, 0.0"),
    ("gae", "counted twice", "last_values[b].item(), 0.0", "last_values[b].item(), last_values[b].item()"),
    ("gae", "padding contents leaked", "            if mask[b, n]:\n", "            if n < 99:\n"),
    ("gae", "values subtracted", "advantage + v", "advantage - v"),
    ("gae", "returns without the values", "advantage + v", "advantage"),
    ("gae", "returns and advantages swapped", "return advantages, returns", "return returns, advantages"),
    ("gae", "through its own target: detach", "return advantages, returns",
     "return advantages, torch.where(real, advantages + values, 0)"),
    ("gae", "rounded to float32", "torch.zeros_like(values), torch.zeros_like(values)",
     "torch.zeros(values.shape), torch.zeros(values.shape)"),
    ("masked_mean", "divided by all slots", "m.sum()", "m.numel()"),
    ("masked_mean", "NaN", "torch.where(m, x, 0)", "(m * x)"),
    ("masked_mean", "true zero counted as missing", "m = mask.bool()", "m = mask.bool() & (x != 0)"),
    ("masked_mean", "mean of the rows' means", "torch.where(m, x, 0).sum() / m.sum()",
     "(torch.where(m, x, 0).sum(1) / m.sum(1)).mean()"),
    ("normalize", "contents of padding", "masked_mean(x, mask)\n", "x.mean()\n"),
    ("normalize", "population std", "masked_mean((x - mean) ** 2, mask).sqrt()", "x[m].std()"),
    ("normalize", "divided by the variance", ".sqrt()", ""),
    ("normalize", "not centred", "(x - mean) / (std", "x / (std"),
    ("normalize", "inside the root", "mask).sqrt()", "mask).add(1e-8).sqrt()"),
    ("normalize", "masked slots must be zero", "torch.where(m, (x - mean) / (std + 1e-8), 0)",
     "torch.where(m | x.isfinite(), (x - mean) / (std + 1e-8), 0)"),
    ("ppo_policy_loss", "min and max swapped", "-torch.min(", "-torch.max("),
    ("ppo_policy_loss", "ratio upside down", "exp(logp - old_logp)", "exp(old_logp - logp)"),
    ("ppo_policy_loss", "the sign is wrong", "loss = -torch", "loss = torch"),
    ("ppo_policy_loss", "nothing is clipped", "clipped = torch.clamp(ratio, 1 - clip, 1 + clip)", "clipped = ratio"),
    ("ppo_policy_loss", "always clipped", "torch.min(ratio *", "torch.min(clipped *"),
    ("ppo_policy_loss", "sum instead of mean", "clipped * advantages).mean()", "clipped * advantages).sum()"),
    ("ppo_policy_loss", "divided by all slots", "clipped * advantages).mean()",
     "clipped * advantages).sum() / m.numel()"),
    ("ppo_policy_loss", "must be detached", ".mean().detach()\n    clip", ".mean()\n    clip"),
    ("ppo_policy_loss", "which can be negative", "(ratio - 1 - (logp - old_logp)).mean()", "(old_logp - logp).mean()"),
    ("ppo_policy_loss", "only one side", "(ratio - 1).abs() > clip", "ratio - 1 > clip"),
    ("ppo_policy_loss", "no gradient", "torch.exp(logp - old_logp)", "torch.exp(logp - old_logp).detach()"),
    ("value_loss", "the ½ is missing", "loss = 0.5 * (v", "loss = (v"),
    ("value_loss", "min and max swapped", "torch.max(loss", "torch.min(loss"),
    ("value_loss", "not clipped around old_values", "moved = old + (v - old).clamp(-clip, clip)",
     "moved = target + (v - target).clamp(-clip, clip)"),
    ("value_loss", "clip = 0 is not None", "if clip is not None:", "if clip:"),
    ("value_loss", "the absolute error", "0.5 * (v - target) ** 2", "0.5 * (v - target).abs()"),
    ("value_loss", "divided by all slots", "loss.mean()", "loss.sum() / m.numel()"),
    ("menu_logp", "not renormalised", "if allowed is not None:", "if allowed is not None:\n"
     "        return torch.where(allowed.bool(), logits.log_softmax(-1), -torch.inf)"),
    ("menu_logp", "a logit of 0 is a choice", "torch.where(allowed.bool(), logits, -torch.inf)", "logits * allowed"),
    ("menu_logp", "only the forbidden tokens", "where(allowed.bool()", "where(~allowed.bool()"),
    ("menu_logp", "must be float32", "logits = logits.to(torch.float32)", "pass"),
    ("score", "eos is counted", "else entry[:-1]", "else entry"),
    ("score", "log-prob of the wrong position", "len(prompt) + j - 1", "len(prompt) + j"),
    ("score", "starts at the second token", "total + row[w] - row[follow].logsumexp(-1)",
     "total + (j > 0) * (row[w] - row[follow].logsumexp(-1))"),
    ("score", "word count for token count", "len(menus[b][a].split())", "len(tokens)"),
    ("score", "number of characters", "len(menus[b][a].split())", "len(menus[b][a])"),
    ("score", "not divided by the number of words", 'if policy == "twosome":', "if False:"),
    ("score", "that is TWOSOME", 'if policy == "twosome":', "if True:"),
    ("score", "not restricted to the menu", 'trie[tokens[:j]] if policy in ("token", "action") else ', ""),
    ("score", "eos is left out", 'entry if policy in ("token", "action") else entry[:-1]', "entry[:-1]"),
    ("score", "no gradient", ".logits[0]", ".logits[0].detach()"),
    ("assign", "the reward was given to every token", "r[row, last] = rewards", "r[row] = rewards"),
    ("assign", "the reward was given to the first token", "r[row, last] = rewards", "r[row, 0] = rewards"),
    ("assign", "`done` is ignored", "d[row, last] = done[row // T, row % T]", "pass"),
    ("assign", "not in the last column", "last = max(j for j in range(L) if mask[row, j])", "last = L - 1"),
    ("assign", "lam and lam_token swapped", "end * config.lam + (1 - end) * config.lam_token",
     "end * config.lam_token + (1 - end) * config.lam"),
    ("assign", "lam was applied inside", "end * config.lam + (1 - end) * config.lam_token", "config.lam + 0 * end"),
    ("assign", "gamma and gamma_token swapped", "config.gamma, config.gamma_token", "config.gamma_token, config.gamma"),
    ("assign", "row b · T + t is step t", "[row // T, row % T]", "[row % B, row // B]"),
    ("assign", "last_values ignored", "gae(*stream, last_values)", "gae(*stream, 0 * last_values)"),
]


def main():
    warnings.simplefilter("ignore")                                      # a wrong solution may cause some
    transformers.logging.set_verbosity_error()
    begin, wrong, named = time.time(), [], 0
    good = [(name, "plain", source) for name, source in PLAIN.items()] + OTHER
    for name, style, source in good:
        with kit.grafted(kit.file_of(name, source), name):
            wrong += [f"{name}, {style}: correct, but fails {test}: {words}" for test, words, _ in kit.failures(name)]
    for name, words, old, new in MISTAKES:
        if PLAIN[name].count(old) < 1:
            wrong.append(f"{name}: the patch for {words!r} no longer fits the plain solution")
            continue
        with kit.grafted(kit.file_of(name, PLAIN[name].replace(old, new)), name):
            found = kit.failures(name)
        if not found or found[0][0].endswith("refuses_bad_input"):
            wrong.append(f"{name}: not caught: {words}")
        elif words not in found[0][1]:
            wrong.append(f"{name}: {words!r} is caught, but called: {found[0][1][:150]}")
        else:
            named += 1
    print(f"{len(good)} correct solutions, {len(MISTAKES)} mistakes of which {named} named; {len(wrong)} problems; "
          f"{time.time() - begin:.0f} s")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
