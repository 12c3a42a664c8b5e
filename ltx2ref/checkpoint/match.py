"""Matching: which stored tensor holds which parameter of the model, and everything that is wrong with a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import TransformerConfig
from .names import OPENINGS, PREFIXES, SCALE, Dialect, common_prefixes, dialects
from .quantised import COMPANIONS, FP8, Weight, identify, parameter_shape
from .resolve_config import resolve
from .sayings import DATA, Stated, read_sayings
from .settle import NO_OPTIONS, ReadingOptions, require_choices, settle_facts
from .shapes import parameter_shapes
from .source import CheckpointFiles, open_source
from .storage import CheckpointError, Stored
from .streams import BOTH_STREAMS, StreamName, is_needed, needs, require_streams, streams_of

FILE_MARKER = "scaled_fp8"  # a tensor of old ComfyUI files, named after the prefix: float8 weights have scales
# Formats that are not read: suffixes of tensors that only they have.
UNREAD = {
    "SVDQuant": (".wscales", ".proj_down", ".proj_up", ".smooth_factor", ".svdquant_lora_a", ".svdquant_lora_b"),
    "AWQ": (".qweight", ".qzeros", ".pre_quant_scale"),
    "SDNQ": (".zero_point", ".svd_up", ".svd_down", ".scale"),
}


@dataclass(frozen=True)
class Plan:
    """A checkpoint matched to a model, from its headers alone."""

    source: CheckpointFiles
    dialect: Dialect
    config: TransformerConfig
    origins: dict[str, str]  # where the value of each config field comes from
    streams: tuple[StreamName, ...]  # both, or the only one that is read
    weights: dict[str, Weight]  # by the parameters' names in the model
    formats: dict[str, str]  # by the parameters' names in the model
    foreign: dict[str, list[Stored]]  # tensors that other models own, by prefix
    unknown: list[Stored]  # tensors that belong neither to the model nor to a known other one
    problems: list[str]
    notes: list[str]

    def check(self) -> None:
        """Raise `CheckpointError` with all problems, if there are any."""
        if self.problems:
            raise CheckpointError(self.source.path, self.problems)

    def foreign_sizes(self) -> dict[str, dict[str, int]]:
        """Return how many tensors and bytes other models own, by the prefix of their names."""
        return {
            prefix: {"tensors": len(stored), "bytes": sum(x.stop - x.start for x in stored)}
            for prefix, stored in self.foreign.items()
        }


def make_plan(path: str | Path | CheckpointFiles, options: ReadingOptions = NO_OPTIONS) -> Plan:
    """Match a checkpoint to a model by its headers and by what it says of its weights.

    Raises `CheckpointError` if the checkpoint has no transformer, and `ValueError` for a wrong option. The plan's
    `problems` list lesser faults.
    """
    require_choices(options.nibbles, options.scales)
    source = path if isinstance(path, CheckpointFiles) else open_source(path, options.variant)
    dialect = the_dialect(source, options.prefix)
    foreign: dict[str, list[Stored]] = {}
    own: dict[str, Stored] = {}
    for name, stored in source.tensors.items():
        prefix = dialect.foreign(name)
        if prefix is None:
            own[name] = stored
        else:
            foreign.setdefault(prefix, []).append(stored)
    companions = companions_of(own)
    accompany = {stored.name for kinds in companions.values() for stored in kinds.values()}
    stated = read_sayings(source.metadata, source.config, dialect, own, companions)
    shapes = {
        dialect.ours(name.removesuffix(DATA)): parameter_shape(stored, companions.get(name, {}), stated.of(name))
        for name, stored in own.items()
        if name.startswith(dialect.prefix) and name not in {*accompany, dialect.prefix + FILE_MARKER}
    }
    facts = resolve(source, shapes, options.config)
    streams = chosen_streams(shapes, options.streams, facts.problems, facts.notes)
    problems = [*stated.problems, *facts.problems]
    plan = Plan(source, dialect, facts.config, facts.origins, streams, {}, {}, foreign, [], problems, facts.notes)
    if not facts.problems:  # with a wrong config, all further problems would only be consequences
        match_weights(plan, own, companions, stated)
        whole = {*streams} >= {*streams_of(shapes)}
        open_problems, open_notes = settle_facts(
            plan.weights.values(), source.metadata, stated.quantiser, options.nibbles, options.scales, whole
        )
        plan.problems.extend(open_problems)
        plan.notes.extend(open_notes)
        plan.formats.update({name: weight.label for name, weight in plan.weights.items()})
        check_formats(plan, own.get(dialect.prefix + FILE_MARKER))
    return plan


def chosen_streams(
    names: Iterable[str], wanted: StreamName | None, problems: list[str], notes: list[str]
) -> tuple[StreamName, ...]:
    """Return the streams to be read: the one that is wanted, or all that have tensors of their own."""
    require_streams(wanted)
    present = streams_of(names) or BOTH_STREAMS
    if wanted is None:
        if present != BOTH_STREAMS:
            notes.append(f"{present[0]} stream only: every call of the model has to leave the other one out")
        return present
    if wanted not in present:
        problems.append(f"streams = {wanted!r}, but it has tensors of the {' and '.join(present)} stream only")
    return (wanted,)


def the_dialect(source: CheckpointFiles, prefix: str | None) -> Dialect:
    """Return the dialect of a source, whose names all begin with `prefix` if that is given.

    Raises `CheckpointError` if its names fit no dialect, or several.
    """
    found = dialects(source.tensors, prefix or "")
    if len(found) == 1:
        return found.pop()
    if found:
        speakers = {
            str(dialect): [name for name in source.tensors if dialect in dialects([name], prefix or "")]
            for dialect in found
        }
        counts = "; ".join(
            f"{len(names)} have {dialect}, such as {names[0]}"
            for dialect, names in sorted(speakers.items(), key=lambda item: len(item[1]))
        )
        raise CheckpointError(source.path, [f"names of several dialects: {counts}"])
    example = ", ".join(list(source.tensors)[:3]) or "none at all"
    openings = " or ".join(names[0] for names in OPENINGS.values())
    problem = (
        f"no LTX-2 transformer in it: no tensor begins with {openings} etc., bare or after "
        f"{' or '.join(filter(None, PREFIXES))}"
    )
    if prefix:
        problem += f", all after the given prefix {prefix!r}"
    problem += f"; its {len(source.tensors)} tensors: {example}"
    common = common_prefixes(source.tensors)
    if len(common) == 1 and common[0] != prefix:
        problem += (
            f". All its names fit after {common[0]}: to read it, give prefix={common[0]!r} (--prefix {common[0]})"
        )
    raise CheckpointError(source.path if len(source.files) > 1 else source.files[0].path, [problem])


def companions_of(own: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Return the companions of each tensor by kind. If there are two of a kind, the second one belongs to nothing."""
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in own.items():
        if owned := find_owner(name, own):
            owner, kind = owned
            found.setdefault(owner, {}).setdefault(kind, stored)
    return found


def find_owner(name: str, own: Mapping[str, Stored]) -> tuple[str, str] | None:
    """Return the tensor that this one is a companion of, and which kind of companion it is, or None."""
    parts = name.split(".")
    for count in (1, 2, 3):  # segments in a suffix
        suffix = f".{'.'.join(parts[-count:])}"
        if suffix in COMPANIONS:
            for owner in (f"{name.removesuffix(suffix)}.weight{end}" for end in ("", DATA)):
                if owner in own:
                    return owner, COMPANIONS[suffix]
    owner = name.removesuffix(SCALE)
    return (owner, "scale") if owner != name and owner in own else None


def match_weights(
    plan: Plan, own: Mapping[str, Stored], companions: Mapping[str, Mapping[str, Stored]], stated: Stated
) -> None:
    """Fill in the plan's weights, and list what is missing, unexpected or cannot be decoded."""
    problems, dialect, missing = plan.problems, plan.dialect, list[str]()
    used = {dialect.prefix + FILE_MARKER} & own.keys()
    for name, shape in parameter_shapes(plan.config).items():
        names = spellings_of(dialect.stored(name))
        stored = next((own[spelling] for spelling in names if spelling in own), None)
        needed = is_needed(name, plan.streams)
        if stored is None:
            if needed:
                missing.append(name)
                problems.append(f"{names[0]}: missing, expected {list(shape)}")
            continue
        kinds = companions.get(stored.name, {})
        used |= {stored.name, *(companion.name for companion in kinds.values())}
        if not needed:  # known as a parameter of the other stream or of the exchange, and not read
            continue
        try:
            plan.weights[name] = identify(shape, stored, kinds, stated.of(stored.name))
        except ValueError as error:
            problems.append(str(error))
    unconnected = not any(needs(name) == BOTH_STREAMS for name in plan.weights)
    if unconnected and {needs(name) for name in missing} == {BOTH_STREAMS}:
        problems.insert(0, 'both streams and nothing of the exchange: streams="video" or "audio" reads one of them')
    plan.unknown.extend(stored for name, stored in own.items() if name not in used)
    foreign_formats = {known for stored in plan.unknown if (known := unread_format(stored.name))}
    problems[:0] = [f"it is quantised with {known}, which is not supported" for known in sorted(foreign_formats)]
    problems += [f"{stored}: {unexpected(stored.name)}" for stored in sorted(plan.unknown, key=lambda s: s.name)]
    skipped = sum(map(len, plan.foreign.values()))
    assert len(used) + len(plan.unknown) + skipped == len(plan.source.tensors)


def spellings_of(name: str) -> list[str]:
    """Return the names that a parameter's tensor may have: its own, quanto's, and MLX's."""
    return [name, name + DATA, name.replace(".to_out.0.", ".to_out.")]


def unexpected(name: str) -> str:
    """Return why a tensor is not expected."""
    if known := unread_format(name):
        return f"a part of {known} that no tensor uses"
    if name.endswith((*COMPANIONS, SCALE, "scale")):
        return "a scale or marker that no tensor uses"
    return "not expected in this model"


def unread_format(name: str) -> str | None:
    """Return the format that is not supported and whose tensors have such names, or None."""
    return next((known for known, suffixes in UNREAD.items() if name.endswith(suffixes)), None)


def check_formats(plan: Plan, marker: Stored | None) -> None:
    """Report float8 weights that lack a scale if other weights have one or the file says that there are scales.

    Without such a hint, a float8 weight without a scale is a plain cast. The file's marker, where it is float8 itself,
    has the dtype of the weights.
    """
    scaled = [name for name, format in plan.formats.items() if format == "fp8 scaled"]
    cast = [name for name, format in plan.formats.items() if format == "fp8 cast"]
    if cast and (scaled or marker):
        why = f"{len(scaled)} others have one" if scaled else f"{FILE_MARKER} says that it has one"
        plan.problems.extend(f"{plan.weights[name].tensor}: its scale is missing, {why}" for name in cast)
    if marker and marker.dtype in FP8:
        tensors = [plan.weights[name].tensor for name in scaled]
        others = [tensor for tensor in tensors if tensor.dtype != marker.dtype]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        plan.problems.extend(f"{marker}: the weights have its dtype, but there is {x}{more}" for x in others[:1])
