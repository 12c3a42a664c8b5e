"""Mutants of diffusers' LTX-2 transformer, made from the syntax tree of the installed package when they are needed.

`candidates()` lists them, and `mutated(mutant)` is a context in which diffusers computes as the mutant does. A mutant
is an operator, a function, the number of a node in that function's tree, and a variant. None of the source is kept: a
digest of the statement tells whether another version of diffusers still has it.
"""

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

MODELS = "diffusers.models."
SITES: dict[str, tuple[str, ...]] = {  # the functions that a forward passes through, by module
    "transformers.transformer_ltx2": (
        "apply_interleaved_rotary_emb",
        "apply_split_rotary_emb",
        "LTX2AdaLayerNormSingle.__init__",
        "LTX2AdaLayerNormSingle.forward",
        "LTX2AudioVideoAttnProcessor.__call__",
        "LTX2PerturbedAttnProcessor.__call__",
        "LTX2Attention.__init__",
        "LTX2Attention.forward",
        "LTX2VideoTransformerBlock.__init__",
        "LTX2VideoTransformerBlock.get_mod_params",
        "LTX2VideoTransformerBlock.forward",
        "LTX2AudioVideoRotaryPosEmbed.__init__",
        "LTX2AudioVideoRotaryPosEmbed.prepare_video_coords",
        "LTX2AudioVideoRotaryPosEmbed.prepare_audio_coords",
        "LTX2AudioVideoRotaryPosEmbed.forward",
        "LTX2VideoTransformer3DModel.__init__",
        "LTX2VideoTransformer3DModel.forward",
    ),
    "embeddings": (
        "get_timestep_embedding",
        "Timesteps.forward",
        "TimestepEmbedding.forward",
        "PixArtAlphaCombinedTimestepSizeEmbeddings.__init__",
        "PixArtAlphaCombinedTimestepSizeEmbeddings.forward",
        "PixArtAlphaTextProjection.forward",
    ),
    "normalization": ("RMSNorm.forward",),
    "activations": ("GELU.gelu", "GELU.forward"),
    "attention": ("AttentionModuleMixin.prepare_attention_mask", "FeedForward.__init__", "FeedForward.forward"),
    "attention_dispatch": ("_native_attention",),
}
WHERE = {name: MODELS + module for module, names in SITES.items() for name in names}


class Mutant(NamedTuple):
    """One change of one function."""

    function: str
    operator: str
    node: int  # its place in ast.walk of the function
    variant: str
    digest: str  # of the statement that holds the node

    @property
    def id(self) -> str:
        """Return the mutant's name."""
        return f"{self.function}: {self.operator} {self.variant} #{self.node}@{self.digest}"


# ---------------------------------------------------------------- trees and code
@lru_cache
def definition(function: str) -> ast.FunctionDef:
    """Parse an installed function, without its decorators."""
    found: Any = ast.parse(inspect.getsource(importlib.import_module(WHERE[function])))
    for name in function.split("."):
        found = next(x for x in found.body if isinstance(x, ast.ClassDef | ast.FunctionDef) and x.name == name)
    found.decorator_list = []
    assert isinstance(found, ast.FunctionDef)
    return found


def function_object(function: str) -> FunctionType:
    """Return the installed function itself, below static methods and decorators."""
    owner: Any = importlib.import_module(WHERE[function])
    *classes, name = function.split(".")
    for part in classes:
        owner = getattr(owner, part)
    found = inspect.unwrap(inspect.getattr_static(owner, name))
    made = found.__func__ if isinstance(found, staticmethod) else found
    assert isinstance(made, FunctionType)
    return made


def compiled(function: str, tree: ast.FunctionDef) -> CodeType:
    """Compile a function's tree in classes of the names that it is in, which `super()` and its name need."""
    body: list[ast.stmt] = [tree]
    for name in reversed(function.split(".")[:-1]):
        body = [ast.ClassDef(name=name, bases=[], keywords=[], body=body, decorator_list=[])]
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    return next(x for x in codes(compile(module, "mutant", "exec")) if x.co_qualname == function)


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object, and those within it."""
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from codes(x)


def changed(mutant: Mutant) -> ast.FunctionDef:
    """Return the mutant's tree."""
    tree = deepcopy(definition(mutant.function))
    node = [*ast.walk(tree)][mutant.node]
    scope = Scope(tree)
    made = next(new for name, new in OPERATORS[mutant.operator](node, scope) if name == mutant.variant)
    result = Replace(node, made).visit(tree)
    assert isinstance(result, ast.FunctionDef)
    return result


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        """Return the new node in place of the old one, and visit all others."""
        return self.new if node is self.old else self.generic_visit(node)


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Let diffusers compute as a mutant does: its code, and the defaults of its arguments, are exchanged."""
    with edited(mutant.function, changed(mutant)):
        yield


@contextmanager
def edited(function: str, tree: ast.FunctionDef) -> Iterator[None]:
    """Exchange a function's code and defaults for those of a tree."""
    target = function_object(function)
    code, defaults = target.__code__, target.__defaults__
    target.__code__ = compiled(function, tree)
    if defaults is not None:
        old = definition(function).args.defaults
        target.__defaults__ = tuple(
            given if ast.dump(a) == ast.dump(b) else ast.literal_eval(a)
            for a, b, given in zip(tree.args.defaults, old, defaults, strict=True)
        )
    try:
        yield
    finally:
        target.__code__, target.__defaults__ = code, defaults


class Scope:
    """What an operator may know of the function around a node."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        arguments = {x.arg for x in (*tree.args.args, *tree.args.kwonlyargs)}
        self.names = arguments | {
            x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }
        self.attributes = {
            x.attr
            for x in ast.walk(tree)
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id in ("self", "attn")
        }

    def statement(self, node: ast.AST) -> ast.stmt | None:
        """Return the statement that holds a node, or None for the function's head."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return None if node is self.tree else node

    def counts(self, node: ast.AST) -> bool:
        """Tell whether a node can matter: annotations, messages and texts cannot."""
        while node is not self.tree:
            parent = self.parents[node]
            if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
                return False
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                return False
            if isinstance(node, ast.Expr) and "logger" in ast.dump(node):
                return False
            if isinstance(parent, ast.arg) or (isinstance(parent, ast.AnnAssign) and node is parent.annotation):
                return False
            if isinstance(node, ast.arguments):
                return True
            if parent is self.tree and node is self.tree.returns:
                return False
            node = parent
        return True


# ---------------------------------------------------------------- operators
Made = Iterable[tuple[str, ast.AST]]
Operator = Callable[[ast.AST, Scope], Made]
OPERATORS: dict[str, Operator] = {}


def operator(name: str) -> Callable[[Operator], Operator]:
    def add(make: Operator) -> Operator:
        OPERATORS[name] = make
        return make

    return add


def copied(node: Any, **changes: Any) -> Any:
    """Return a copy of a node with other fields."""
    new = deepcopy(node)
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def called(text: str, value: ast.AST) -> ast.AST:
    """Return the expression `text`, in which `_` stands for a value that is computed once."""
    function = ast.parse(f"(lambda _: {text})", mode="eval").body
    return ast.Call(func=function, args=[deepcopy(value)], keywords=[])


@operator("swapped operands")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div | ast.Pow | ast.FloorDiv):
        yield "", copied(node, left=node.right, right=node.left)


@operator("dropped term")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.BinOp):
        yield "left", deepcopy(node.right)
        yield "right", deepcopy(node.left)


OTHER_SIGNS: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Add(),
    ast.Div: ast.Mult(),
    ast.FloorDiv: ast.Mult(),
}


@operator("other operator")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER_SIGNS:
        yield "", copied(node, op=OTHER_SIGNS[type(node.op)])


@operator("sign")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "dropped", deepcopy(node.operand)
    elif valued(node, scope):
        yield "added", ast.UnaryOp(op=ast.USub(), operand=deepcopy(node))


def valued(node: ast.AST, scope: Scope) -> bool:
    """Tell whether a node is the value of an assignment to one name, and is computed."""
    parent = scope.parents.get(node)
    return (
        isinstance(parent, ast.Assign)
        and node is parent.value
        and len(parent.targets) == 1
        and isinstance(parent.targets[0], ast.Name | ast.Subscript)
        and isinstance(node, ast.BinOp | ast.Call)
    )


@operator("scaled value")
def _(node: ast.AST, scope: Scope) -> Made:
    if valued(node, scope):
        for factor in (1.001, 0.5):
            yield f"{factor}", ast.BinOp(left=deepcopy(node), op=ast.Mult(), right=ast.Constant(factor))


@operator("shifted value")
def _(node: ast.AST, scope: Scope) -> Made:
    if valued(node, scope):
        yield "0.01", ast.BinOp(left=deepcopy(node), op=ast.Add(), right=ast.Constant(0.01))


@operator("rounded value")
def _(node: ast.AST, scope: Scope) -> Made:
    if valued(node, scope):
        for dtype in ("bfloat16", "float16"):
            yield dtype, called(f"_.to(torch.{dtype}).to(_.dtype)", node)


@operator("rolled value")
def _(node: ast.AST, scope: Scope) -> Made:
    if valued(node, scope):
        yield "channels", called("_.roll(1, -1)", node)
        yield "tokens", called("_.roll(1, 1)", node)
        yield "batch", called("_.roll(1, 0)", node)


@operator("constant")
def _(node: ast.AST, scope: Scope) -> Made:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool | str | None | type(...)):
        return
    others = (
        {"+1": node.value + 1, "-1": node.value - 1, "negated": -node.value}
        if isinstance(node.value, int)
        else {"* 1.01": node.value * 1.01, "* 2": node.value * 2, "* 10": node.value * 10, "0": 0.0}
    )
    for name, value in others.items():
        if value != node.value:
            yield name, ast.Constant(value)


WORDS = (("split", "interleaved"), ("ij", "xy"), ("tanh", "none"), ("gelu-approximate", "gelu"), ("silu", "gelu"))


@operator("word")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "negated", ast.Constant(not node.value)
    for pair in WORDS:
        if isinstance(node, ast.Constant) and node.value in pair:
            yield "other", ast.Constant(pair[1 - pair.index(node.value)])


@operator("swapped arguments")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            new = deepcopy(node)
            new.args[i], new.args[i + 1] = new.args[i + 1], new.args[i]
            yield f"{i}", new
        for i in range(len(node.keywords) - 1):
            new = deepcopy(node)
            new.keywords[i].value, new.keywords[i + 1].value = new.keywords[i + 1].value, new.keywords[i].value
            yield f"by name {i}", new


@operator("dropped keyword")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Call):
        for i, word in enumerate(node.keywords):
            if word.arg is not None and not (isinstance(word.value, ast.Constant) and word.value.value is None):
                yield f"{i}", copied(node, keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])


@operator("argument none")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Call):
        for i, word in enumerate(node.keywords):
            if isinstance(word.value, ast.Name):
                new = deepcopy(node)
                new.keywords[i].value = ast.Constant(None)
                yield f"{i}", new


@operator("swapped elements")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Tuple | ast.List):
        for i in range(len(node.elts) - 1):
            new = deepcopy(node)
            new.elts[i], new.elts[i + 1] = new.elts[i + 1], new.elts[i]
            yield f"{i}", new


@operator("flipped condition")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.If | ast.IfExp):
        yield "", copied(node, test=ast.UnaryOp(op=ast.Not(), operand=deepcopy(node.test)))


@operator("taken branch")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.IfExp):
        yield "first", deepcopy(node.body)
        yield "second", deepcopy(node.orelse)


COMPARED: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
}


@operator("other comparison")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        yield "", copied(node, ops=[COMPARED[type(node.ops[0])], *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield "", copied(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


@operator("dropped call")
def _(node: ast.AST, scope: Scope) -> Made:
    """Leave out a method, or a module that is called with one value."""
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Attribute) and not roots(node.func) & {"torch", "self", "attn", "nn", "F", "math"}:
        yield "method", deepcopy(node.func.value)
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield "function", deepcopy(node.args[0])


def roots(node: ast.AST) -> set[str]:
    """Return the name at the beginning of a chain of attributes, if nothing is called on the way."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


OTHER_CALLS: dict[str, tuple[str, ...]] = {
    "cos": ("sin",),
    "sin": ("cos",),
    "sigmoid": ("tanh", "exp"),
    "rsqrt": ("sqrt", "reciprocal"),
    "mean": ("amax", "sum", "std"),
    "exp": ("exp2", "expm1"),
    "all": ("any",),
    "ones_like": ("zeros_like",),
    "zeros_like": ("ones_like",),
    "clamp": ("sub",),
    "flatten": ("view_as",),
    "float": ("bfloat16", "half", "double"),
    "gelu": ("relu", "silu", "mish"),
    "silu": ("relu", "gelu"),
    "pow": ("mul", "add"),
    "lerp": ("add",),
    "cat": ("stack",),
    "swapaxes": ("flip",),
    "transpose": ("flip",),
}


@operator("other call")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        for name in OTHER_CALLS.get(node.func.attr, ()):
            yield name, copied(node, func=copied(node.func, attr=name))


DTYPES = ("float64", "float32", "bfloat16", "float16")


@operator("other dtype")
def _(node: ast.AST, scope: Scope) -> Made:
    """Recast: another dtype where one is named, or where `dtype` of a tensor is asked for."""
    if isinstance(node, ast.Attribute) and (node.attr in DTYPES or node.attr == "dtype"):
        torch = ast.Name(id="torch", ctx=ast.Load())
        for name in DTYPES:
            if name != node.attr:
                yield name, ast.Attribute(value=torch, attr=name, ctx=ast.Load())


@operator("moved slice")
def _(node: ast.AST, scope: Scope) -> Made:
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
        return
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for i, part in enumerate(parts):
        for end in ("lower", "upper"):
            edge = getattr(part, end, None)
            if isinstance(edge, ast.expr):
                for step, sign in (("+1", ast.Add()), ("-1", ast.Sub())):
                    new = deepcopy(node)
                    at = new.slice.elts[i] if isinstance(new.slice, ast.Tuple) else new.slice
                    setattr(at, end, ast.BinOp(left=deepcopy(edge), op=sign, right=ast.Constant(1)))
                    yield f"{i} {end} {step}", new
                new = deepcopy(node)
                setattr(new.slice.elts[i] if isinstance(new.slice, ast.Tuple) else new.slice, end, None)
                yield f"{i} {end} none", new


@operator("shifted loop")
def _(node: ast.AST, scope: Scope) -> Made:
    """Let a loop leave out its last or its first pass, or go backwards."""
    if isinstance(node, ast.For | ast.comprehension):
        for name, text in (("last", "[*_][:-1]"), ("first", "[*_][1:]"), ("backwards", "[*_][::-1]")):
            yield name, copied(node, iter=called(text, node.iter))


@operator("dropped statement")
def _(node: ast.AST, scope: Scope) -> Made:
    """Leave out a statement; a name must have a value without it, or the mutant does not run."""
    if isinstance(node, ast.Assign | ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "", ast.Pass()


@operator("swapped statements")
def _(node: ast.AST, scope: Scope) -> Made:
    body = getattr(node, "body", None)
    if isinstance(body, list):
        for i in range(len(body) - 1):
            if all(isinstance(x, ast.Assign | ast.Expr | ast.If) for x in body[i : i + 2]):
                new = deepcopy(node)
                new.body[i], new.body[i + 1] = new.body[i + 1], new.body[i]  # type: ignore[attr-defined]
                yield f"{i}", new


# One of these words may stand where another one does, and names of several words may differ in any one of them.
ALIKE = (
    {"sigma", "timestep"},
    {"cos", "sin"},
    {"height", "width"},
    {"query", "key", "value"},
    {"scale", "shift", "gate"},
    {"rope", "audio_rope"},
)


def near(name: str, others: Iterable[str], most: int = 3) -> list[str]:
    """Return names that a porter could confuse with `name`: they differ in one word, or by one word more."""
    words = name.split("_")

    def confused(other: str) -> bool:
        theirs = other.split("_")
        if len(theirs) == len(words):
            pairs = [(a, b) for a, b in zip(words, theirs, strict=True) if a != b]
            return len(pairs) == 1 and (len(words) > 1 or any(set(pairs[0]) <= group for group in ALIKE))
        longer, shorter = sorted((words, theirs), key=len, reverse=True)
        return len(longer) == len(shorter) + 1 and any(
            [*longer[:i], *longer[i + 1 :]] == shorter for i in range(len(longer))
        )

    return sorted(x for x in others if x != name and confused(x))[:most]


@operator("other name")
def _(node: ast.AST, scope: Scope) -> Made:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in scope.names:
        for i, name in enumerate(near(node.id, scope.names)):
            yield f"{i}", ast.Name(id=name, ctx=ast.Load())
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in scope.attributes:
        for i, name in enumerate(near(node.attr, scope.attributes)):
            yield f"{i}", copied(node, attr=name)


# ---------------------------------------------------------------- all of them
def candidates(
    functions: Iterable[str] | None = None, reached: dict[str, set[int]] | None = None
) -> list[tuple[Mutant, set[int]]]:
    """List all mutants of these functions, in the order of their trees, with the lines of the statements they are in.

    `reached` holds, for each function, the lines that some forward has executed; what lies elsewhere is left out. The
    head of a function, which has its arguments' defaults, is executed always, and has no lines here.
    """
    found = []
    for function in WHERE if functions is None else functions:
        tree = definition(function)
        scope, lines = Scope(tree), None if reached is None else reached.get(function, set())
        for i, node in enumerate(ast.walk(tree)):
            if node is tree or isinstance(node, ast.expr_context | ast.operator | ast.arg) or not scope.counts(node):
                continue
            statement = scope.statement(node) if node in scope.parents else None
            here = set() if statement is None else covered(statement)
            if lines is not None and here and not lines & here:
                continue
            digest = hashlib.sha256(ast.dump(statement or tree.args).encode()).hexdigest()[:8]
            for name, make in OPERATORS.items():
                found += [(Mutant(function, name, i, variant, digest), here) for variant, _ in make(node, scope)]
    return found


def covered(statement: ast.stmt) -> set[int]:
    """Return the lines of a statement, without those of its body."""
    last = min((x.lineno for x in getattr(statement, "body", [])), default=(statement.end_lineno or 0) + 1)
    return set(range(statement.lineno, max(last, statement.lineno + 1)))


@contextmanager
def noting_lines() -> Iterator[dict[str, set[int]]]:
    """Note which lines of all functions are executed within the context."""
    names = {function_object(name).__code__: name for name in WHERE}
    found: dict[str, set[int]] = {name: set() for name in WHERE}

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            found[names[frame.f_code]].add(frame.f_lineno)
        return local

    def called_frame(frame: Any, event: str, arg: Any) -> Any:
        return local if frame.f_code in names else None

    before = sys.gettrace()
    sys.settrace(called_frame)
    try:
        yield found
    finally:
        sys.settrace(before)
