"""The course kit: `python test_poad.py blank FOLDER` and `python test_poad.py grade PATH/poad.py`.

An exercise is a function of poad.py whose docstring begins with "Exercise n (p points)". `blank` removes its body,
`grade` puts a student's version into the reference poad.py, one exercise at a time, and runs the tests of that one in a
process of its own. The student's other functions are replaced by the reference, so one mistake costs one exercise."""
import argparse
import ast
import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import poad
import test_poad
from test_poad import EXERCISES, exercise_of

ROOT = Path(poad.__file__).parent
HELPERS = {"gae": ("_recurrence",)}       # given functions that are most of a solution: part of the exercise
ORACLES = ("pool", "exact", "along", "gae_loop", "test_assign_by_hand",      # solutions in other words: what uses them
           "_agent_read", "_agent_oracle", "_agent_raw", "_agent_log_policy")  # stays with the instructor
ORDER = sorted(EXERCISES, key=EXERCISES.get)
MEMORY = 16 << 30                         # address space of a submission, bytes; torch alone reserves some of it


# ------------------------------------------------------------------ blank

def names_of(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)]


def first_line(node):
    return min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])


def blank_poad(source, chosen):
    """The source with the bodies of the chosen exercises taken out; every other line as it was."""
    lines = source.splitlines(keepends=True)
    helpers = [helper for name in chosen for helper in HELPERS.get(name, ())]
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: -getattr(node, "lineno", 0)):   # from the end
        if isinstance(node, ast.FunctionDef) and node.name in chosen:
            message = f"Exercise {EXERCISES[node.name][0]}: {node.name}"
            lines[node.body[0].end_lineno:node.end_lineno] = [
                " " * node.body[0].col_offset + f'raise NotImplementedError("{message}")\n']
        elif isinstance(node, ast.FunctionDef) and node.name in helpers:
            end = node.end_lineno
            while not lines[end].strip():
                end += 1
            del lines[first_line(node) - 1:end]
    return "".join(lines)


def blank_tests(source):
    """The tests that students get: those of exercises, without oracles, and what they need; unused imports go too."""
    lines, nodes = source.splitlines(keepends=True), ast.parse(source).body
    uses = {name: {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} for node in nodes for name in names_of(node)}

    def reach(names):
        seen = set()
        while names:
            seen |= names
            names = set().union(*(uses.get(name, ()) for name in names)) - seen
        return seen
    given = [node for node in nodes if isinstance(node, (ast.Expr, ast.For))]    # docstring, settings, the last loop
    tests = [name for node in nodes if isinstance(node, ast.FunctionDef) for name in names_of(node)
             if exercise_of(name) or name == "test_docstring_example_of"]
    needed = reach({name for name in tests if not reach({name}) & set(ORACLES)}
                   | {x.id for node in given for x in ast.walk(node) if isinstance(x, ast.Name)})
    needed -= {name for name in uses if name.startswith("test_") and name not in tests}
    kept, end = [], 0
    for node in nodes:
        text, end = "".join(lines[end:node.end_lineno]), node.end_lineno         # with the comments before it
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in needed]
            start = text[:len(text) - len(text.lstrip())]
            text = start + "\n".join(textwrap.wrap(ast.unparse(node), 120)) + "\n" if node.names else ""
            if isinstance(node, ast.ImportFrom) and len(text.strip()) > 120:
                names = textwrap.fill(", ".join(x.name for x in node.names), 118 - 19)
                text = start + f"from {node.module} import (" + names.replace("\n", "\n" + " " * 18) + ")\n"
        if node in given or needed & set(names_of(node)):
            kept.append(text)
    return re.sub(r"\n{4,}", "\n\n\n", "".join(kept))


def blank_notebook(text):
    """The notebook without outputs."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def student_readme(chosen):
    rows = []
    for name in chosen:
        about = docstring(name).split("\n")[0].split(". ", 1)[1].rstrip(".:").replace("|", "\\|")
        rows.append(f"| {EXERCISES[name][0]} | `{name}` | {EXERCISES[name][1]} | {about} |")
    total = sum(EXERCISES[name][1] for name in chosen)
    text = (Path(__file__).parent / "student.md").read_text(encoding="utf-8")
    return text.replace("{exercises}", "\n".join(rows)).replace("{total}", str(total))


def docstring(name):
    return (getattr(poad, name, None) or getattr(poad.LanguageAgent, name)).__doc__


def blank(folder, chosen=ORDER):
    """Write the assignment into a new or empty folder; ValueError if there is anything in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"poad.py": lambda text: blank_poad(text, chosen), "test_poad.py": blank_tests,
             "tabular_demo.ipynb": blank_notebook, "llm_demo.ipynb": blank_notebook}
    for name, change in texts.items():
        (folder / name).write_text(change((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("envs.py", "requirements.txt", "LICENSE", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "README.md").write_text(student_readme(chosen), encoding="utf-8")
    (folder / ".pytest.ini").write_text("[pytest]\naddopts = -q -rfEs --tb=short\n")


# ------------------------------------------------------------------ a student's file, in pieces

def statements(source, offset=0):
    """The top-level statements of a file, and what is wrong with those that do not parse: {name: message}."""
    try:
        return ast.parse("\n" * offset + source).body, {}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines, found, broken = source.splitlines(), [], {}
    starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_@]", line)
              and not (i and lines[i - 1].startswith("@"))] + [len(lines)]
    for begin, end in zip(starts, starts[1:]):                           # one broken function must not break all
        block = "\n".join(lines[begin:end])
        try:
            found += ast.parse("\n" * (offset + begin) + block).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            name = re.search(r"^(?:def|class) +(\w+)|", block, re.M)[1] or ""
            broken[name] = f"{type(error).__name__} in line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
            methods = re.search(r"^    (?:@|def )", block, re.M)
            if name == "LanguageAgent" and methods:
                at = block[:methods.start()].count("\n")
                inner, bad = statements(textwrap.dedent("\n".join(block.split("\n")[at:])), offset + begin + at)
                found.append(ast.ClassDef(name, [], [], inner, []))
                broken = broken | bad
    return found, broken


@contextlib.contextmanager
def grafted(source, name, filename="poad.py"):
    """Inside it the exercise `name` is the version of a student's file, all others are the reference. What else the
    file defines is seen by this function only: given code may be changed for oneself, not for the tests."""
    nodes, broken = statements(source)
    space, agent, trouble = dict(vars(poad)), {}, dict(broken)
    for gone in (name, *HELPERS.get(name, ())):
        space.pop(gone, None)
    for node in nodes:
        given = isinstance(node, ast.ClassDef) and hasattr(poad, node.name)
        parts = node.body if given and node.name == "LanguageAgent" else [] if given else [node]
        for part in parts:
            names = names_of(part)
            wanted = part is node or names == [name] or (
                isinstance(part, ast.FunctionDef) and not hasattr(poad.LanguageAgent, part.name))
            if not names or not wanted or set(names) & (EXERCISES.keys() - {name}):
                continue
            try:
                exec(compile(ast.fix_missing_locations(ast.Module([part], [])), filename, "exec"), space)
            except Exception as error:
                trouble.update(dict.fromkeys(names, f"{type(error).__name__}: {error}"))
            if part is not node and part.name in space:
                agent[part.name] = space.pop(part.name)
    mine = agent.pop(name, None) if hasattr(poad.LanguageAgent, name) else space.get(name)
    if mine is None:
        why = trouble.get(name) or trouble.get("LanguageAgent" if hasattr(poad.LanguageAgent, name) else "")
        raise SyntaxError(why or f"the file defines no function {name}")
    with contextlib.ExitStack() as stack:
        owner = poad.LanguageAgent if hasattr(poad.LanguageAgent, name) else poad
        stack.enter_context(mock.patch.object(owner, name, mine))
        if hasattr(test_poad, name):
            stack.enter_context(mock.patch.object(test_poad, name, mine))
        for extra, f in agent.items():
            stack.enter_context(mock.patch.object(poad.LanguageAgent, extra, f, create=True))
        yield "; ".join(f"{key}: {why}" for key, why in trouble.items() if key not in EXERCISES)


# ------------------------------------------------------------------ grade

def in_words(test, error, filename="poad.py"):
    """One line about a failed test."""
    text = " ".join(str(error).split())
    if isinstance(error, NotImplementedError) and text.startswith("Exercise"):
        return "not written yet"
    if isinstance(error, (AssertionError, test_poad.pytest.fail.Exception)):
        about = (getattr(test_poad, test).__doc__ or test).split("\n")[0]
        return text or f"{test}: {about}"
    place, step = "", error.__traceback__
    while step:
        place = f" (line {step.tb_lineno})" if step.tb_frame.f_code.co_filename == filename else place
        step = step.tb_next
    return f"{type(error).__name__}: {text}{place}, in {test}"


def failures(name, filename="poad.py", watch=lambda *line: None):
    """What the tests of an exercise found: (test, message, named) of failed cases, up to the first that names the
    mistake, which then comes first. `watch` is told of every test before the next one begins."""
    found = []
    for test, error in test_poad.verdicts(name):
        if error is not None:
            found.append((test, in_words(test, error, filename), getattr(error, "named", False)))
        watch(test, found)
        if found and found[-1][2]:
            break
    return sorted(found, key=lambda row: (row[0].endswith("refuses_bad_input"), not row[2]))


def examine(path, name, pipe):
    """In a process of its own: graft, test, and send what was found, as text."""
    if hasattr(os, "setsid"):
        os.setsid()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):                                             # a solution may print what it likes
        os.dup2(nowhere, stream)
    sys.path.append(str(path.parent))

    def send(**message):
        pipe.send_bytes(json.dumps(message).encode())
    try:
        with grafted(path.read_text(encoding="utf-8"), name, str(path)) as notes:
            begun = time.monotonic()
            found = failures(name, str(path), lambda test, found: send(after=test))
            if found and notes and "NameError" in found[0][1]:
                found = [(test, f"{message}; {notes}", named) for test, message, named in found]
            send(found=found, seconds=time.monotonic() - begun)
    except BaseException as error:                                       # also SystemExit at import
        send(found=[("", f"{type(error).__name__}: {error}" if not isinstance(error, SyntaxError) else str(error), False)])


def grade_one(path, name, limit):
    """Points, message and so on of one exercise; whatever a solution does, this returns soon after `limit` seconds."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=examine, args=(path, name, theirs), daemon=True)
    process.start()
    theirs.close()
    deadline, after, found = time.monotonic() + limit, "the beginning", None
    try:
        while found is None and ours.poll(max(deadline - time.monotonic(), 0)):
            message = json.loads(ours.recv_bytes())
            after, found = message.get("after", after), message.get("found")
        if found is None:
            found = [["", f"no answer after {limit:g} seconds (an endless loop?), after {after}", False]]
    except EOFError:
        process.join(1)
        code = process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
        found = [["", f"the process was ended {how}, after {after}", False]]
    except (ValueError, AttributeError):
        found = [["", "the process sent nonsense", False]]
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    number, of = EXERCISES[name]
    wrong = [row for row in found if not row[0].endswith("refuses_bad_input")]
    points = 0 if wrong else of - bool(found) * (of > 1)
    return dict(exercise=number, function=name, points=points, of=of, passed=not wrong, refuses_bad_input=not found,
                message=found[0][1] if found else "", test=found[0][0] if found else "")


def grade(path, chosen=ORDER, limit=30.0):
    """A dict: every exercise's result, the sum of points, the seconds it took."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: expected the path of a student's poad.py")
    begin = time.monotonic()
    rows = [grade_one(path.resolve(), name, limit) for name in chosen]
    return dict(file=str(path), exercises=rows, points=sum(row["points"] for row in rows),
                of=sum(row["of"] for row in rows), seconds=round(time.monotonic() - begin, 1))


def show(result):
    """The table."""
    print(f"{'exercise':30}points  result")
    for row in result["exercises"]:
        verdict = "passed" if row["passed"] else "FAILED"
        text = (f"{verdict}, but: " if row["passed"] and row["message"] else f"{verdict}  ") + row["message"]
        print(f"{row['exercise']:>2}  {row['function']:26}{row['points']:>2} / {row['of']}  {textwrap.shorten(text, 180)}")
    print(f"{'sum':30}{result['points']:>2} / {result['of']}  in {result['seconds']} s")


# ------------------------------------------------------------------ command line

def choose(text):
    """"1-4,6" → names of these exercises; "" → all."""
    numbers = set()
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not found:
            raise ValueError(f"exercises are {text!r}, expected numbers such as 1-4,6")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    if unknown := numbers - {number for number, _ in EXERCISES.values()}:
        raise ValueError(f"there is no exercise {min(unknown)}: they are 1 to {len(EXERCISES)}")
    return [name for name in ORDER if EXERCISES[name][0] in numbers or not numbers]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="test_poad.py", description="Make an assignment of poad.py, and mark solutions.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, text in (("blank", "FOLDER", "write an assignment into a new folder"),
                             ("grade", "FILE", "mark a student's poad.py")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar=what, type=Path)
        command.add_argument("--exercises", default="", help="such as 1-4,6; default: all")
        if name == "grade":
            command.add_argument("--json", action="store_true", help="print JSON instead of a table")
            command.add_argument("--limit", type=float, default=30, help="seconds for each exercise; default 30")
        command.error = lambda message: parser.exit(2, f"test_poad.py: {message}\n")
    parser.error = lambda message: parser.exit(2, f"test_poad.py: {message}\n")
    args = parser.parse_args(argv)
    try:
        chosen = choose(args.exercises)
        if args.command == "blank":
            blank(args.path, chosen)
            total = sum(EXERCISES[name][1] for name in chosen)
            print(f"{len(chosen)} exercises, {total} points, in {args.path}; students run: pytest test_poad.py")
        else:
            result = grade(args.path, chosen, args.limit)
            print(json.dumps(result, indent=1, ensure_ascii=False)) if args.json else show(result)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
