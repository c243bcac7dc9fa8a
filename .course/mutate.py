"""Is every small error noticed? `python .course/mutate.py [EXERCISE …]` (minutes; not a part of .ci/run).

Every mutant changes one thing in an exercise function of poad.py: an operator, a comparison, a number, a slice, an
argument that is dropped or swapped with its neighbour, a branch, a check that is left out, min for max. It is put in
place, in this process, and the tests of its exercise are run until one fails (10 seconds at most); what survives meets
the other tests that call the function. A survivor must be listed in EQUIVALENT, with the reason why it is no error."""
import ast
import copy
import inspect
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import kit  # noqa: E402
from kit import HELPERS, ORDER, poad, test_poad  # noqa: E402

SECONDS = 10
FURTHER = {name: ("test_tables_may_be_lists_and_arrays", "test_docstring_example_of") for name in ORDER} | {
    "menu_logp": ("test_free_text",), "assign": ("test_time_limit_is_not_a_termination",),
    "score": ("test_act_samples_what_it_says", "test_a_prompt_is_read_once_for_its_whole_menu",
              "test_agent_refuses_in_words")}
SWAPS = {ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div, ast.Add), ast.Div: (ast.Mult,),
         ast.MatMult: (ast.Mult,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
         ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt),
         ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.Lt), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
         ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,)}
NAMES = {"amax": "amin", "maximum": "minimum", "minimum": "maximum", "logsumexp": "amax", "sum": "mean", "mean": "sum",
         "cumsum": "cumprod", "ones_like": "zeros_like", "zeros_like": "ones_like", "exp": "log1p",
         "isneginf": "isposinf",
         "log_softmax": "softmax", "abs": "neg", "prod": "sum"}

FILL = "0 in q.masked_fill((policy == 0) & q.isneginf(), 0)"
CLAMPED = "(old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2"
CLIPPED = "ratio.clamp(1 - clip, 1 + clip) * advantages"
# (function, before, after): why nobody can tell the difference
EQUIVALENT = {
    ("state_values", "torch.as_tensor(policy, dtype=q.dtype, device=q.device)",
     "torch.as_tensor(policy, dtype=q.dtype)"): "the tests run on the CPU, where it is the same",
    ("state_values", FILL, "1"): "what is filled in is multiplied by the policy's 0",
    ("state_values", FILL, "-1"): "what is filled in is multiplied by the policy's 0",
    ("token_backup", "mdp.child >= 0", "mdp.child > 0"): "prefix 0 is the empty one, which is nobody's child",
    ("token_backup", "0 in mdp.child >= 0", "1"): "prefix 0 is the empty one, which is nobody's child",
    ("bad_discounts", "torch.tensor([gamma_token, gamma, 0.0], dtype=dtype, device=action_end.device)",
     "torch.tensor([gamma_token, gamma, 0.0], dtype=dtype)"): "the tests run on the CPU, where it is the same",
    ("gae", "lambdas.to(values)", "lambdas.to()"): "torch converts it in the product anyway",
    ("gae", "(~mask).to(values)", "(~mask).to()"): "torch converts it in the product anyway",
    ("gae", "0 in (:, 0)", "-1"): "only the number of rows is read",
    ("_recurrence", "k < b.shape[1]", "k <= b.shape[1]"): "one more step, over no entries",
    ("ppo_policy_loss", f"torch.minimum(ratio * advantages, {CLIPPED})",
     f"torch.minimum({CLIPPED}, ratio * advantages)"): "the order of a minimum does not matter",
    ("ppo_policy_loss", "((ratio - 1).abs() > clip).to(ratio)", "((ratio - 1).abs() > clip).to()"):
        "masked_mean takes booleans too",
    ("value_loss", f"torch.maximum(error, {CLAMPED})", f"torch.maximum({CLAMPED}, error)"):
        "the order of a maximum does not matter"}


def changes(node):
    """Every (changed copy) of one node of the syntax tree."""
    def changed(**fields):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        for op in SWAPS.get(type(node.op), ()):
            yield changed(op=op())
    if isinstance(node, ast.Compare):
        for i, old in enumerate(node.ops):
            for op in SWAPS.get(type(old), ()):
                yield changed(ops=[*node.ops[:i], op(), *node.ops[i + 1:]])
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield changed(value=not node.value)
        elif isinstance(node.value, (int, float)):
            yield from (changed(value=node.value + 1), changed(value=node.value - 1))
        elif isinstance(node.value, str):
            yield changed(value=node.value + "?")
    if isinstance(node, ast.Slice):
        yield from (changed(**{end: None}) for end in ("lower", "upper") if getattr(node, end))
    if isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Constant, ast.Name, ast.Slice)):
        yield node.value
    if isinstance(node, ast.Call):
        keys = node.keywords
        yield from (changed(args=node.args[:i] + node.args[i + 1:]) for i in range(len(node.args)))
        yield from (changed(keywords=keys[:i] + keys[i + 1:]) for i in range(len(keys)))
        yield from (changed(args=[*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2:]])
                    for i in range(len(node.args) - 1))
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield changed(attr=NAMES[node.attr])
    if isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse, changed(body=node.orelse, orelse=node.body))
    if isinstance(node, ast.If):
        yield changed(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Expr):
        yield ast.Pass()
    if isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        yield from (changed(elts=[*node.elts[:i], node.elts[i + 1], node.elts[i], *node.elts[i + 2:]])
                    for i in range(len(node.elts) - 1))


def skipped(tree):
    """Nodes that are left alone: the docstring, and the words of error messages."""
    out = {id(tree.body[0]), *map(id, ast.walk(tree.body[0]))}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            out |= set(map(id, ast.walk(node)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_check" and len(node.args) > 1:
            out |= set(map(id, ast.walk(node.args[1])))
    return out


def mutants(source):
    """(before, after, source of the changed function) of every mutant of a function."""
    tree = ast.parse(textwrap.dedent(source)).body[0]
    alone = skipped(tree)
    if tree.decorator_list:
        yield "@" + ast.unparse(tree.decorator_list[0]), "", ast.unparse(
            ast.FunctionDef(**{**vars(tree), "decorator_list": tree.decorator_list[1:]}))
    for parent in list(ast.walk(tree)):
        for field, value in list(ast.iter_fields(parent)):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in alone or field in ("decorator_list", "returns"):
                    continue
                for new in changes(node):
                    put = new if not isinstance(value, list) else [*value[:i], new, *value[i + 1:]]
                    setattr(parent, field, put)
                    try:
                        text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
                    finally:
                        setattr(parent, field, value)
                    before, after = (ast.unparse(x).split("\n")[0] for x in (node, new))
                    around = ast.unparse(parent).split("\n")[0]
                    yield (before, after, text) if len(before) > 12 else (f"{before} in {around}", after, text)


class TimeUp(BaseException):
    pass


def ring(*_):
    raise TimeUp


def noticed(name, source):
    """The first test that fails, "" if none does."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with kit.grafted(kit.file_of(name, source), name):
            for test, error in test_poad.verdicts(name):
                if error is not None:
                    return test
            for further in FURTHER[name]:
                test = inspect.unwrap(getattr(test_poad, further))
                for case in test_poad.cases(test):
                    if case.get("name", name) == name:
                        try:
                            test(**case)
                        except BaseException:
                            return "+" + further
    except TimeUp:
        return "time limit"
    except Exception as error:
        return f"import: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def main(chosen):
    signal.signal(signal.SIGALRM, ring)
    warnings.simplefilter("ignore")
    begin, survivors, used, counts = time.time(), [], set(), Counter()
    print("exercise            mutants  caught  by other tests  equivalent")
    for name in chosen:
        sources = {name: inspect.getsource(test_poad.function_of(name))}
        sources |= {helper: inspect.getsource(getattr(poad, helper)) for helper in HELPERS.get(name, ())}
        row = Counter()
        for changing in sources:
            rest = "\n".join(text for other, text in sources.items() if other != changing)
            for before, after, text in mutants(sources[changing]):
                if ast.dump(ast.parse(text)) == ast.dump(ast.parse(textwrap.dedent(sources[changing]))):
                    continue
                row["created"] += 1
                test = noticed(name, text + "\n" + rest)
                kind = "other" if test[:1] == "+" else "caught" if test else "equivalent" if (
                    changing, before, after) in EQUIVALENT else "survived"
                row[kind] += 1
                used.add((changing, before, after))
                if kind == "survived":
                    survivors.append(f"{changing}: {before}  →  {after}")
        counts += row
        print(f"{name:20}{row['created']:7}{row['caught']:8}{row['other']:16}{row['equivalent']:12}", flush=True)
    print(f"{'sum':20}{counts['created']:7}{counts['caught']:8}{counts['other']:16}{counts['equivalent']:12}"
          f"   in {time.time() - begin:.0f} s")
    stale = [key for key in EQUIVALENT if key not in used and key[0] in chosen]
    sys.exit("\n".join([f"survived: {x}" for x in survivors] + [f"no such mutant: {x}" for x in stale]) or 0)


if __name__ == "__main__":
    main([name for name in ORDER if name in sys.argv[1:] or not sys.argv[1:]])
