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
import tempfile
import textwrap
import time
import types
from pathlib import Path
from unittest import mock

import poad
import test_poad
from test_poad import EXERCISES, exercise_of, function_of

ROOT = Path(poad.__file__).parent
HELPERS = {"gae": ("_recurrence",)}       # given functions that are most of a solution: part of the exercise
ORACLES = ("pool", "exact", "along", "gae_loop", "test_assign_by_hand",      # solutions in other words: what uses them
           "_agent_read", "_agent_oracle", "_agent_raw", "_agent_log_policy")  # stays with the instructor
ORDER = sorted(EXERCISES, key=EXERCISES.get)
MEMORY = 4 << 30                          # bytes that a solution may take besides what python and torch have


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
    uses = {name: {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
            for node in nodes for name in names_of(node)}

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
    kept, end, gap = [], 0, ""
    for node in nodes:
        text, end = "".join(lines[end:node.end_lineno]), node.end_lineno         # with the comments before it
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in needed]
            gap = gap or text[:len(text) - len(text.lstrip())]                   # between groups of imports
            if not node.names:
                continue
            text, gap = gap + ast.unparse(node) + "\n", ""
            if len(text.strip()) > 120:
                head, names = text.split(" import ")
                text = head + " import (" + textwrap.fill(names, 99).replace("\n", "\n" + " " * 18) + ")\n"
        if node in given or needed & set(names_of(node)):
            kept.append(text)
    kept[0] = re.sub("For instructors:.*\n", "", kept[0])
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
        about = function_of(name).__doc__.split("\n")[0].split(". ", 1)[1].rstrip(".:").replace("|", "\\|")
        rows.append(f"| {EXERCISES[name][0]} | `{name}` | {EXERCISES[name][1]} | {about} |")
    total = sum(EXERCISES[name][1] for name in chosen)
    text = (Path(__file__).parent / "student.md").read_text(encoding="utf-8")
    return text.replace("{exercises}", "\n".join(rows)).replace("{total}", str(total))


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

def file_of(name, source):
    """The text of a student's file with one exercise: a method stands in its class."""
    return source if hasattr(poad, name) else "class LanguageAgent:\n" + textwrap.indent(source, "    ")


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
            line, why = getattr(error, "lineno", "?"), getattr(error, "msg", error)
            broken[name] = f"{type(error).__name__} in line {line}: {why}"
            methods = re.search(r"^    (?:@|def )", block, re.M)
            if name == "LanguageAgent" and methods:
                at = block[:methods.start()].count("\n")
                inner, bad = statements(textwrap.dedent("\n".join(block.split("\n")[at:])), offset + begin + at)
                found.append(ast.ClassDef(name, [], [], inner, []))
                broken = broken | bad
    return found, broken


def load(source, name, filename, space):
    """Run a student's statements in `space`, a copy of the reference without the exercise `name`; other exercises are
    left out. Returns: the student's version; methods that were added to LanguageAgent; what went wrong, {name: why}."""
    nodes, trouble = statements(source)
    method, methods = hasattr(poad.LanguageAgent, name), {}
    for node in nodes:
        given = isinstance(node, ast.ClassDef) and hasattr(poad, node.name)      # of given classes only methods count
        for part in [node] if not given else node.body if node.name == "LanguageAgent" else []:
            names = names_of(part)
            if not names or set(names) & (EXERCISES.keys() - {name}) or (
                    given and names != [name] and hasattr(poad.LanguageAgent, names[0])):
                continue
            try:
                exec(compile(ast.fix_missing_locations(ast.Module([part], [])), filename, "exec"), space)
            except Exception as error:
                trouble |= dict.fromkeys(names, f"{type(error).__name__}: {error}")
            if given and names[0] in space:
                methods[names[0]] = space.pop(names[0])
    mine = (methods if method else space).pop(name, None)
    if mine is None:
        why = trouble.get(name) or (trouble.get("LanguageAgent") if method else None)
        raise SyntaxError(why or f"the file defines no function {name}")
    return mine, methods, trouble


@contextlib.contextmanager
def grafted(source, name, filename="poad.py"):
    """Inside it the exercise `name` is the version of a student's file, all others are the reference. What else the
    file defines is seen by this function only: given code may be changed for oneself, not for the tests. Who imports
    poad gets that mixture too, and neither the reference of this exercise nor the tests."""
    mixture, gone = types.ModuleType("poad"), (name, *HELPERS.get(name, ()))
    space = vars(mixture)
    space.update({key: x for key, x in vars(poad).items() if not key.startswith("__") and key not in gone})
    with contextlib.ExitStack() as stack:
        for key, module in dict(poad=mixture, test_poad=None, kit=None).items():
            stack.callback(sys.modules.__setitem__, key, sys.modules[key])
            sys.modules[key] = module
        mine, methods, trouble = load(source, name, filename, space)
        space.setdefault(name, mine)
        owner = poad.LanguageAgent if hasattr(poad.LanguageAgent, name) else poad
        patches = [(owner, name, mine), *((poad.LanguageAgent, key, f) for key, f in methods.items())]
        for owner, key, f in patches + [(test_poad, name, mine)] * hasattr(test_poad, name):
            stack.enter_context(mock.patch.object(owner, key, f, create=True))
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


def examine(path, name, report):
    """In a process of its own: graft, test, and write what was found, line by line, into the file `report`."""
    if hasattr(os, "setsid"):
        os.setsid()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):                                             # a solution may print what it likes
        os.dup2(nowhere, stream)
    sys.path.append(str(path.parent))

    def send(**message):
        with open(report, "a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")
    try:
        with grafted(path.read_text(encoding="utf-8"), name, str(path)) as notes:
            send(after="reading the file")
            found = failures(name, str(path), lambda test, found: send(after=test))
            if found and notes and "NameError" in found[0][1]:
                found = [(test, f"{message}; {notes}", named) for test, message, named in found]
            send(found=found)
    except SyntaxError as error:
        send(found=[("", str(error), False)])
    except BaseException as error:                                       # also SystemExit at import
        send(found=[("", f"{type(error).__name__}: {error}", False)])


def grade_one(path, name, limit):
    """Points, message and so on of one exercise; whatever a solution does, this returns soon after `limit` seconds."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        report.touch()
        process = context.Process(target=examine, args=(path, name, report), daemon=True)
        process.start()
        process.join(limit)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)                       # and whatever it has started
        process.kill()
        process.join()
        messages = []
        for line in report.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):                        # a line may be cut off where it was killed
                messages.append(json.loads(line))
    after = next((m["after"] for m in reversed(messages) if "after" in m), "the beginning")
    how = (f"no answer after {limit:g} seconds (an endless loop?)" if code is None else "the process was ended "
           + (f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"))
    found = next((m["found"] for m in messages if "found" in m), [["", f"{how}, after {after}", False]])
    number, of = EXERCISES[name]
    wrong = [row for row in found if not row[0].endswith("refuses_bad_input")]
    points = 0 if wrong else of - bool(found) * (of > 1)
    return dict(exercise=number, function=name, points=points, of=of, passed=not wrong, refuses_bad_input=not found,
                message=found[0][1] if found else "", test=found[0][0] if found else "")


def grade(path, chosen=ORDER, limit=20.0):
    """A dict: every exercise's result, the sum of points, the seconds it took."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: expected the path of a student's poad.py")
    begin = time.monotonic()
    rows = []
    for name in chosen:
        rows.append(grade_one(path.resolve(), name, limit))
        if "after the beginning" in rows[-1]["message"]:                 # the file itself hangs, before any test
            limit = min(limit, 3.0)
    return dict(file=str(path), exercises=rows, points=sum(row["points"] for row in rows),
                of=sum(row["of"] for row in rows), seconds=round(time.monotonic() - begin, 1))


def show(result):
    """The table."""
    print(f"{'exercise':30}points  result")
    for row in result["exercises"]:
        verdict = "passed" if row["passed"] else "FAILED"
        text = (f"{verdict}, but: " if row["passed"] and row["message"] else f"{verdict}  ") + row["message"]
        points = f"{row['points']:>2} / {row['of']}"
        print(f"{row['exercise']:>2}  {row['function']:26}{points}  {textwrap.shorten(text, 180)}")
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
    parser = argparse.ArgumentParser(prog="test_poad.py", description="Make an assignment of poad.py, mark solutions.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, text in (("blank", "FOLDER", "write an assignment into a new folder"),
                             ("grade", "FILE", "mark a student's poad.py")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar=what, type=Path)
        command.add_argument("--exercises", default="", help="such as 1-4,6; default: all")
        if name == "grade":
            command.add_argument("--json", action="store_true", help="print JSON instead of a table")
            command.add_argument("--limit", type=float, default=20, help="seconds for each exercise; default 20")
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
