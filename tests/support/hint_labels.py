"""Say whether a hint about a mutant of diffusers is right, by what was changed and where.

A hint makes a claim: of a rounding, a factor, a norm, a mask, and so on. The table says for each claim which operators
make it true, or which words must be in what was changed. A claim of something else is wrong. What the table does not
know is unclear, and is listed to be read.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ast_mutants import OPERATORS, Mutant, Scope, definition

Verdict = bool | None  # None is unclear


class Changed(NamedTuple):
    """What a mutant changed: its operator, words of the code there, and the tap at which it shows first."""

    operator: str
    variant: str
    function: str
    words: frozenset[str]
    tap: str
    hint: str

    def about(self, pattern: str) -> bool:
        """Tell whether a word of the code, or the function's name, has this pattern."""
        return any(re.search(pattern, word) for word in (*self.words, self.function))


Claim = Callable[[Changed], Verdict]
CLAIMS: list[tuple[str, Claim]] = []


def claim(pattern: str) -> Callable[[Claim], Claim]:
    def add(test: Claim) -> Claim:
        CLAIMS.append((pattern, test))
        return test

    return add


MOVED = (
    "rolled value",
    "swapped arguments",
    "swapped elements",
    "other name",
    "shifted loop",
    "moved slice",
    "constant",
)
RECAST = ("rounded value", "other dtype", "other call", "dropped call", "dropped keyword", "dropped statement")
REPLACED = (
    "other name",
    "dropped term",
    "dropped call",
    "dropped statement",
    "swapped arguments",
    "swapped elements",
    "swapped statements",
    "taken branch",
    "flipped condition",
    "other comparison",
    "word",
    "argument none",
    "dropped keyword",
    "moved slice",
    "constant",
    "other call",
    "other operator",
    "shifted loop",
)
NARROW = {"bfloat16": ("bfloat16",), "float16": ("float16", "half"), "TF32": ("float16", "half")}


# ---------------------------------------------------------------- one operand, changed in one way
# What must be in the code that was changed, or in the function's name, for a hint on each operand to be true.
OPERANDS = {
    "the scale": "scale|ada|temb|table|mod_params|emb|linear",
    "the shift": "shift|ada|temb|table|mod_params|emb|linear",
    "the normalised stream": "norm|variance|hidden",
    "the text": "encoder|caption|text",
    "the stream before its norm": "norm|variance|hidden|proj",
    "the residual": "hidden|attn|ff",
    "scale and shift": "scale|shift|ada|temb|table|mod_params|emb|linear",
    "the noise level's part of scale and shift": "scale|shift|ada|temb|table|emb|linear|timestep",
    "the mean square": "norm|variance|eps",
    "the weight of norm_": "norm|weight|query|key",
    "queries before its norm": "norm|query|to_q|Attn",
    "keys before its norm": "norm|key|to_k|Attn",
    "the result of": "attn|Attention|Attn|ff|FeedForward|gate|hidden|mod_params|output",
    "its gate": "gate",
    "attention, or the weight after it,": "attn|attention|Attn|hidden|value|out",
    "the bias": "bias",
    "the gate": "gate|sigmoid",
    "the cosines": "cos|rotary|freqs",
    "the sines": "sin|rotary|freqs",
    "cosines": "cos|emb|Timesteps|flip",
    "sines": "sin|emb|Timesteps|flip",
    "queries before the rotation": "rotary|query|norm_q|_x|Attn",
    "keys before the rotation": "rotary|key|norm_k|_x|Attn",
    "queries, keys or the scale of attention": "query|key|scale|attention|Attn",
    "keys, in relation to values,": "key|value|attention|Attn|permute",
    "values": "value|attention|Attn",
    "the rotated": "rotary|out|query|key|Attn",
    "the mask's bias": "mask|bias",
    "the activation": "act|gelu|GELU|silu|FeedForward|Embedding|AdaLayer|TextProjection|hidden|linear|sample",
    "the layer's input, or its weight,": "",
    "the input before its activation": "act|silu|gelu|GELU|emb|linear",
    "the input": "",
    "the first layer's result": "linear|act|sample|caption|Embedding|TextProjection|hidden",
    "the phases": "emb|Timesteps|exponent|timestep",
    "the sinusoid": "emb|Timesteps|timesteps_proj|time_proj|timestep",
    "frequencies": "freq|theta|pow|Rotary",
    "the bounds of patches": "grid|coord|patch|latent|scale|Rotary",
    "the starts of patches": "grid|coord|patch|latent|scale|start|Rotary",
    "the ends of patches": "grid|coord|patch|latent|scale|end|Rotary",
    "the sizes of patches": "grid|coord|patch|delta|end|Rotary",
    "positions": "coord|grid|frame|fps|height|width|patch|max_pos|base|Rotary|latent|pixel|rope|hop|sampling",
    "the table": "freq|cos|sin|Rotary|rope",
}
FITTED = ("rounded value", "rolled value")  # which are neither a factor nor a number
IN_PLACE = ("scaled value", "shifted value", "rounded value", "sign")  # which leave all entries where they are


@claim(r"in its place")
def _(it: Changed) -> Verdict:
    return it.operator in REPLACED


ONE_CHANGE = r"(times|plus) -?[\d.e+-]+|negated|left out|rounded to \w+|of the (previous|next) [\w ]+|in reverse order"


@claim(rf"^(?!the reference|a ).*({ONE_CHANGE})$")
def _(it: Changed) -> Verdict:
    operand = next((x for x in sorted(OPERANDS, key=len, reverse=True) if it.hint.startswith(x)), None)
    noise_level = "timestep|sigma|Timestep|emb|scale|period"
    fits = it.about(noise_level if operand is None else OPERANDS[operand])
    if "rounded to" in it.hint:
        kinds = next(kinds for name, kinds in NARROW.items() if name in it.hint)
        return fits and it.operator in RECAST and it.variant in kinds
    if re.search("previous|next|reverse", it.hint):
        return fits and it.operator not in IN_PLACE
    return fits and it.operator not in FITTED


# ---------------------------------------------------------------- the most particular claims come first
@claim(r"another convention")
def _(it: Changed) -> Verdict:
    return it.about("timestep|sigma|rotary|dtype|mask|gate|multiplier")


@claim(r"rows of the (table|noise level)")
def _(it: Changed) -> Verdict:
    return it.about("mod_params|table|temb|ada")


@claim(r"exchanged|half of the angle")
def _(it: Changed) -> Verdict:
    return it.about("cos|sin|rotary|freq")


@claim(r"^a tensor of ")
def _(it: Changed) -> Verdict:
    return True  # a shape that was measured


@claim(r"is its input: nothing was computed")
def _(it: Changed) -> Verdict:
    return it.operator in REPLACED


@claim(r"^the gate as|the gate, not times|its gate, not times")
def _(it: Changed) -> Verdict:
    return it.about("gate|sigmoid")


@claim(r"mean square|of the squares")
def _(it: Changed) -> Verdict:
    return it.about("norm|variance|rsqrt|RMS")


@claim(r"in place of x1 cos - x2 sin")
def _(it: Changed) -> Verdict:
    return it.about("rotary|rope|sin|cos|freqs|query|key")


@claim(r"causal attention")
def _(it: Changed) -> Verdict:
    return it.about("causal")


@claim(r"frequencies exp")
def _(it: Changed) -> Verdict:
    return it.about("get_timestep_embedding|Timesteps|exponent|half_dim|period|emb|num_channels")


@claim(r"another order|a shift by one token|halves|heads|neighbouring pairs|components|being the same|earlier|later")
def _(it: Changed) -> Verdict:
    return it.operator in (*MOVED, *REPLACED)


@claim(r"more exact")
def _(it: Changed) -> Verdict:
    return it.operator in RECAST and it.variant not in ("bfloat16", "float16", "half")


@claim(r"rounded to|rounding to|computed in (bfloat16|float16)|in bfloat16|in float16|no number has more bits")
def _(it: Changed) -> Verdict:
    if it.operator not in RECAST:
        return False
    named = [kinds for name, kinds in NARROW.items() if name in it.hint]
    if named:
        return any(it.variant in kinds for kinds in named) or (None if it.operator.startswith("dropped") else False)
    return it.variant not in ("bfloat16", "float16", "half")


@claim(r"epsilon|\beps\b")
def _(it: Changed) -> Verdict:
    return it.about(r"eps") or (it.operator == "dropped term" and it.about("norm|variance"))


@claim(r"the 2 of a gate|half the gate|gate, 2")
def _(it: Changed) -> Verdict:
    if it.tap.endswith((".to_out", ".gate", ".to_gate_logits")):
        return True if it.about("gate|sigmoid") else None
    return False


@claim(r"head_dim")
def _(it: Changed) -> Verdict:
    return it.about("scale|head")


@claim(r"multiplier")
def _(it: Changed) -> Verdict:
    return it.about("multiplier|factor|timestep|sigma|Timesteps")


@claim(r"a weight without its scale")
def _(it: Changed) -> Verdict:
    return "input" in it.hint


@claim(r"a constant factor|constant factor")
def _(it: Changed) -> Verdict:
    return True  # a number that was measured


@claim(r"a factor for each (head|channel)")
def _(it: Changed) -> Verdict:
    return it.about("gate|norm|weight|scale") and not it.about("eps")


@claim(r"added to every token|missing from every token")
def _(it: Changed) -> Verdict:
    return it.operator in ("shifted value", "dropped term", "other operator", "dropped statement", "constant", "sign")


@claim(r"noise level|timestep|sigma")
def _(it: Changed) -> Verdict:
    return it.about("timestep|sigma|batch|time_proj|emb")


@claim(r"sines before cosines|sinusoid|frequencies of i / 127")
def _(it: Changed) -> Verdict:
    return it.about("get_timestep_embedding|Timesteps|flip_sin|downscale|emb")


@claim(r"mask")
def _(it: Changed) -> Verdict:
    return it.about("mask|bias")


@claim(r"no norm|LayerNorm|RMSNorm|norm over|norm in")
def _(it: Changed) -> Verdict:
    return it.about("norm|variance|rsqrt|RMS")


@claim(r"residual|gate = |without a gate|without the gate")
def _(it: Changed) -> Verdict:
    return it.about("gate|attn|ff|hidden")


@claim(r"scale, shift|shift, scale|modulation|rows?\[|x \* scale|shift|offsets|table alone")
def _(it: Changed) -> Verdict:
    return it.about("scale|shift|gate|ada|mod_params|table|temb|emb|norm")


@claim(r"exchange|the other stream")
def _(it: Changed) -> Verdict:
    return it.about("a2v|v2a|cross|ca_|audio|video|hidden|norm|swapped|timestep|sigma")


@claim(r"GELU|SiLU|ReLU|activation|sigmoid\(1.702")
def _(it: Changed) -> Verdict:
    return it.about("gelu|GELU|act|silu|approximate|net|activation")


@claim(r"rotation|rotated")
def _(it: Changed) -> Verdict:
    return it.about("rotary|rope|sin|cos|freqs")


@claim(r"logits|attention|values|softmax over|scaled by")
def _(it: Changed) -> Verdict:
    return (
        True if "finite" in it.hint else it.about("attn|[aA]ttention|query|key|value|scale|causal|heads|perturb|gate")
    )


@claim(r"position|time in|frames per second|latent frame|causal offset|patch|axis|height and width|seconds")
def _(it: Changed) -> Verdict:
    return it.about(
        "coord|frame|fps|height|width|patch|grid|scale_factor|causal|hop|sampling|latent|positions|pos|Rotary"
    )


@claim(r"frequenc|angles|planes|phase|cosines|sines")
def _(it: Changed) -> Verdict:
    return it.about("freq|theta|pow|Rotary|rotary|emb|exponent|period|cos|sin|dim|double|precision|rope")


@claim(r"batch")
def _(it: Changed) -> Verdict:
    return it.operator in (*MOVED, *REPLACED)


@claim(r"a difference (at|only|on)|difference only")
def _(it: Changed) -> Verdict:
    return True  # what was measured


@claim(r"not finite")
def _(it: Changed) -> Verdict:
    return True


@claim(r"a change after")
def _(it: Changed) -> Verdict:
    return it.about("output|proj|return")


@claim(r"never computed|left out|missing")
def _(it: Changed) -> Verdict:
    return it.operator in REPLACED


# ---------------------------------------------------------------- what was changed
def label(mutant: Mutant, one: dict[str, Any]) -> str:
    """Return "right", "wrong", "unclear", or "none" if there is no hint. One wrong hint is enough to be wrong."""
    said = [judged(hint, mutant, one.get("first") or "") for hint in one["hints"]]
    if not said:
        return "none"
    return "wrong" if False in said else "right" if True in said else "unclear"


def judged(hint: str, mutant: Mutant, tap: str) -> Verdict:
    """Judge one hint by the first claim that it makes."""
    it = Changed(mutant.operator, mutant.variant, mutant.function, words(mutant), tap, hint)
    test = next((test for pattern, test in CLAIMS if re.search(pattern, hint)), None)
    return None if test is None else test(it)


@lru_cache(maxsize=4096)
def words(mutant: Mutant) -> frozenset[str]:
    """Return the words of the code that a mutant changed: of the node before and after, and of what it is assigned to.

    A short statement counts as a whole. Of a long call, only the arguments that changed count.
    """
    tree = definition(mutant.function)
    nodes, scope = [*ast.walk(tree)], Scope(tree)
    node = nodes[mutant.node]
    new = next(x for name, x in OPERATORS[mutant.operator](node, scope) if name == mutant.variant)
    before, after = [*named(node)], [*named(new)]
    found = {*before, *after}
    if len(found) > 12 and isinstance(node, ast.Call):
        old = {ast.dump(x) for x in (*node.args, *node.keywords)}
        made = {ast.dump(x) for x in (*getattr(new, "args", []), *getattr(new, "keywords", []))}
        found = {
            word
            for call in (node, new)
            for x in (*getattr(call, "args", []), *getattr(call, "keywords", []))
            if ast.dump(x) not in old & made
            for word in named(x)
        }
    statement = scope.statement(node) if node is not tree and node in scope.parents else None
    if statement is None:
        return frozenset(found | default_argument(tree, node))
    whole = {*named(statement)}
    targets = {word for target in getattr(statement, "targets", []) for word in named(target)}
    keyword = scope.parents.get(node)
    found |= {keyword.arg} if isinstance(keyword, ast.keyword) and keyword.arg else set()
    return frozenset(found | targets | (whole if len(whole) <= 12 else set()))


def named(node: ast.AST) -> Iterator[str]:
    """Yield all names, attributes, keywords and words in a node."""
    for x in ast.walk(node):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(found := getattr(x, field, None), str):
                yield found
        if isinstance(x, ast.Constant) and isinstance(x.value, str):
            yield x.value


def default_argument(tree: ast.FunctionDef, node: ast.AST) -> set[str]:
    """Return the name of the argument whose default is changed."""
    arguments = tree.args.args[len(tree.args.args) - len(tree.args.defaults) :]
    return {x.arg for x, value in zip(arguments, tree.args.defaults, strict=True) if node in [*ast.walk(value)]}
