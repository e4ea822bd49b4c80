"""Every sentence with which the package refuses something, read from its source.

A `raise` takes its text from a variable that was assigned in the same function; functions that
return NoReturn raise what their callers pass, so each call of one is a sentence of its own.
"""

import ast
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INTERNAL", "WAY_OUT", "Sentence", "all_raises", "sentences"]

PACKAGE = Path(__file__).resolve().parents[2] / "cupynorm"

# What no caller ever sees, and why. A `raise` alone passes on what was caught, and says nothing.
INTERNAL = {
    ("_report.config", "_look_at_cuda"): "show_config catches it and reports it",
    ("modules._files", "_read_npy"): "told in the sentence of _decode_npz",
    ("prepared", "__call__: why"): "what a door refuses, and says at `refuses_prepared`",
    ("_rules", "integers: TypeError"): "caught three lines below, where the sentence is",
    ("_cpu.threads", "run"): "passes on a worker thread's own error",
}

# A sentence says what to do, or where to look: one of these begins a part of it.
WAY_OUT = re.compile(
    r"(?:[;.:,?] |\bor )("
    r"(?:[Aa]ssign|[Cc]all|[Cc]ast|[Cc]hoose|[Cc]onvert|[Cc]opy|[Cc]ut|[Dd]ifferentiate|[Dd]rop|"
    r"[Ee]ncode|[Ee]nd it|[Ii]mpute|[Ll]eave|[Mm]ake|[Mm]ove|[Nn]ame each|[Nn]ormalize|[Pp]ass|"
    r"pip install|[Rr]eshape|[Rr]estore|[Rr]un|[Ss]ay|[Ss]et|[Tt]ake|[Uu]nset|[Uu]se)\b.*)",
    re.S,
)


@dataclass(frozen=True)
class Sentence:
    """One way in which the package refuses a call."""

    module: str
    function: str
    error: str
    text: str  # what is filled in stands in ‹›
    when: str  # the condition, as the source has it
    line: int

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong, and the way out; the latter empty where there is none."""
        found = WAY_OUT.search(self.text)
        return (self.text[: found.start(1)], found[1]) if found else (self.text, "")


class _Module:
    """A file's syntax tree, in which every node knows its parent."""

    def __init__(self, path: Path) -> None:
        self.name = _dotted(path)
        self.path = path
        self.tree = ast.parse(path.read_text(encoding="utf-8"), path.name)
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}
        self.functions = {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}
        self.constants = {
            t.id: n.value
            for n in self.tree.body
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name)
        }

    def up(self, node: ast.AST, *kinds: type) -> ast.AST | None:
        while (node := self.parents.get(node)) is not None:
            if isinstance(node, kinds):
                return node
        return None

    def function_of(self, node: ast.AST) -> ast.FunctionDef | None:
        return self.up(node, ast.FunctionDef)

    def when(self, node: ast.AST) -> str:
        """The innermost condition under which a node runs."""
        child = node
        while (parent := self.parents.get(child)) is not None:
            if isinstance(parent, ast.ExceptHandler):
                tried = ast.unparse(self.parents[parent].body[0]).partition("\n")[0]
                return f"{ast.unparse(parent.type)} in `{tried}`"
            if isinstance(parent, ast.If) and child is not parent.test:
                test = ast.unparse(parent.test)
                return f"not ({test})" if child in parent.orelse else test
            if isinstance(parent, ast.FunctionDef):
                return ""
            child = parent
        return ""

    def assigned(self, name: str, at: ast.AST) -> list[ast.expr]:
        """What a local variable was given last before a node, and what was added to it since."""
        before = [
            (n.lineno, n)
            for n in ast.walk(self.function_of(at) or self.tree)
            if isinstance(n, (ast.Assign, ast.AugAssign)) and n.lineno < at.lineno
            for target in (n.targets if isinstance(n, ast.Assign) else [n.target])
            if isinstance(target, ast.Name) and target.id == name
        ]
        given = [n for _, n in sorted(before, key=lambda pair: pair[0])]
        last = max((i for i, n in enumerate(given) if isinstance(n, ast.Assign)), default=None)
        return [] if last is None else [n.value for n in given[last:]]


class _Text:
    """Turns the expression of a message into the sentences that it can be."""

    def __init__(self, module: _Module, at: ast.AST, given: dict[str, list[str]]) -> None:
        self.module, self.at, self.given = module, at, given

    def of(self, node: ast.expr) -> list[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return self._joined([self._filled(part) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.of(node.left), self.of(node.right)])
        if isinstance(node, ast.IfExp):
            return self.of(node.body) + self.of(node.orelse)
        if isinstance(node, ast.BoolOp):  # `given or "else"`
            return self.of(node.values[-1])
        if isinstance(node, ast.Name):
            return self._named(node)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in _modules():
            constant = _modules()[ast.unparse(node.value)].constants.get(node.attr)
            if constant is not None:
                return self.of(constant)
        if isinstance(node, ast.Call):
            return self._called(node)
        return [f"‹{_short(node)}›"]

    def _filled(self, part: ast.expr) -> list[str]:
        """A part of an f-string: what is known of a variable's texts stands in one sentence."""
        if not isinstance(part, ast.FormattedValue):
            return self.of(part)
        texts = self.of(part.value)
        if ast.unparse(part.value) == "way_out":  # each goes with a fault of its own
            return texts
        return [" or ".join(dict.fromkeys(texts))]

    @staticmethod
    def _joined(parts: list[list[str]]) -> list[str]:
        return ["".join(chosen) for chosen in itertools.product(*parts)]

    def _named(self, node: ast.Name) -> list[str]:
        if node.id in self.given:
            return self.given[node.id]
        values = self.module.assigned(node.id, self.at)
        if values and all(_is_text(v) for v in values):
            # As they were where they were assigned: a variable may be made of itself.
            return self._joined([_Text(self.module, v, self.given).of(v) for v in values])
        constant = self.module.constants.get(node.id)
        return self.of(constant) if constant and _is_text(constant) else [f"‹{node.id}›"]

    def _called(self, node: ast.Call) -> list[str]:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "format":
            return [re.sub(r"\{(\w+)\}", r"‹\1›", text) for text in self.of(function.value)]
        if isinstance(function, ast.Attribute) and function.attr == "get":
            table = self.module.assigned(ast.unparse(function.value), self.at)
            if table and isinstance(table[0], ast.Dict):  # of texts
                return [t for v in (*table[0].values, node.args[1]) for t in self.of(v)]
        inner = self.module.functions.get(function.id) if isinstance(function, ast.Name) else None
        if inner is None:
            return [f"‹{_short(node)}›"]
        texts = _Text(self.module, inner.body[-1], {})
        body = inner.body[1:] if ast.get_docstring(inner) else inner.body
        nodes = (n for statement in body for n in ast.walk(statement))
        found = [n for n in nodes if isinstance(n, (ast.JoinedStr, ast.Constant))]
        inside = {id(c) for n in found for c in ast.walk(n) if c is not n}
        whole = [t for n in found if id(n) not in inside for t in _texts(texts, n)]
        return [t for t in whole if " " in t] or [f"‹{_short(node)}›"]


def _texts(texts: _Text, node: ast.expr) -> list[str]:
    return texts.of(node) if _is_text(node) else []


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left)
    if isinstance(node, ast.BoolOp):
        return _is_text(node.values[-1])
    return isinstance(node, ast.JoinedStr)


def _short(node: ast.expr) -> str:
    """What a reader makes of an expression that is filled in."""
    text = ast.unparse(node)
    if re.search(r"__(qualname|name|module)__|kind_of\(", text):
        return "module" if "__module__" in text else "type"
    text = re.sub(r"\b(?:tuple|str|repr|os\.fspath)\((.*)\)$", r"\1", text)
    return re.sub(r"\b(?:self|problem|_rules|tile)\.", "", text)


def _dotted(path: Path) -> str:
    """A module's name below the package: a folder's own, or 'folder.file'."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def _modules() -> dict[str, _Module]:
    return {_dotted(path): _Module(path) for path in sorted(PACKAGE.rglob("*.py"))}


def all_raises() -> list[tuple[str, str, int]]:
    """Module, function and line of every `raise` of the package, internal ones included."""
    found = []
    for module in _modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Raise):
                function = module.function_of(node)
                found.append((module.name, function.name if function else "", node.lineno))
    return found


@functools.cache
def sentences() -> tuple[Sentence, ...]:
    """Every sentence, in the order of the modules and of their lines."""
    found: list[Sentence] = []
    for module in _modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Raise) and not _internal(module, node):
                found += _of_raise(module, node)
    return tuple(sorted(found, key=lambda s: (s.module, s.line)))


def _internal(module: _Module, node: ast.Raise) -> bool:
    function = module.function_of(node)
    name = function.name if function else ""
    if node.exc is None:
        return True
    what = node.exc.args[0] if isinstance(node.exc, ast.Call) and node.exc.args else node.exc
    if isinstance(what, ast.Name) and (module.name, f"{name}: {what.id}") in INTERNAL:
        return True
    return (module.name, name) in INTERNAL


def _of_raise(module: _Module, node: ast.Raise) -> list[Sentence]:
    function = module.function_of(node)
    call = node.exc
    if not isinstance(call, ast.Call) or not call.args:
        where = f"{module.path}:{node.lineno}"
        msg = f"{where} raises without a sentence; give it one, or a reason in INTERNAL"
        raise ValueError(msg)
    error = ast.unparse(call.func)
    never_returns = function.returns is not None and ast.unparse(function.returns) == "NoReturn"
    if not (never_returns or function.name == "needing"):  # a context in which an import may fail
        texts = _Text(module, node, {}).of(call.args[0])
        name = function.name
        return [
            Sentence(module.name, name, error, t, module.when(node), node.lineno) for t in texts
        ]
    return [s for m in _modules().values() for s in _of_calls(m, module, function, node, error)]


def _of_calls(
    caller: _Module, module: _Module, function: ast.FunctionDef, node: ast.Raise, error: str
) -> list[Sentence]:
    """Sentences of the calls that one module makes of a function that only raises."""
    names = [a.arg for a in function.args.args]
    found = []
    for call in ast.walk(caller.tree):
        if not isinstance(call, ast.Call) or not _calls(call, caller, module, function.name):
            continue
        here = _Text(caller, call, {})
        given = {n: here.of(a) for n, a in zip(names, call.args, strict=False)}
        # A label is not said in the caller's words: 'weight' of one call would hide 'bias'.
        within = caller.function_of(call)
        where = within.name if within else ""
        for text in _Text(module, node, given).of(node.exc.args[0]):
            when = caller.when(call)
            found.append(Sentence(caller.name, where, error, text, when, call.lineno))
    return found


def _calls(call: ast.Call, caller: _Module, module: _Module, name: str) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute):
        return (
            function.attr == name and ast.unparse(function.value) == module.name.rpartition(".")[2]
        )
    return isinstance(function, ast.Name) and function.id == name and caller is module
