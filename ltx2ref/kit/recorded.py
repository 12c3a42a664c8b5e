"""The model of a kit case with its recording, run as a whole or as one component, in its dtype or in float64."""

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from ..interface import LTX2VideoTransformer3DModel
from ..parity import record
from ..parity.cases import Case, Inputs
from ..parity.exact import exact
from ..parity.generator import build
from ..parity.record import NATIVE_DTYPES, RecordError
from ..parity.run import cast, run
from ..parity.trace.taps import PROJECTED, Taps
from ..parity.truth import doubled, truth, wide
from .cases import MASKED, Component


class RecordedModel:
    """The model of a kit case in one dtype, with its inputs and its recorded taps."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        self.model: LTX2VideoTransformer3DModel = build(case.config, NATIVE_DTYPES[dtype])
        self.inputs: Inputs = cast(case.inputs(), NATIVE_DTYPES[dtype])
        self.flat = self.inputs | (self.inputs.get("attention_kwargs") or {})
        self.weights = {name: x.detach() for name, x in self.model.state_dict().items()}

    @cached_property
    def double(self) -> LTX2VideoTransformer3DModel:
        """Return the model in float64."""
        return doubled(self.model)

    @cached_property
    def digests(self) -> dict[str, bytes]:
        """Return the digest that diffusers left of each tap under exact arithmetic."""
        return record.load_exact(self.case, self.dtype).digests

    @cached_property
    def exact_taps(self) -> Taps:
        """Return every tap under exact arithmetic."""
        with exact():
            return run(self.model, self.inputs)

    def require_digests(self) -> None:
        """Raise `RecordError` if an exact tap has another digest than the one diffusers left.

        In that case nobody has the tensor that belongs to the digest.
        """
        taps = self.exact_taps
        other = [name for name, x in self.digests.items() if name not in taps or record.digest(taps[name]) != x]
        if other:
            raise RecordError(
                f"{self.case.id} {self.dtype}: {len(other)} of {len(self.digests)} taps have another digest here than "
                f"recorded, the first is {other[0]}"
            )

    @cached_property
    def taps(self) -> Taps:
        """Return the taps that are expected natively: recorded ones, or exact ones for the case without a recording."""
        return self.exact_taps if self.case == MASKED else record.load_record(self.case, self.dtype).taps

    def given(self, part: Component) -> Taps:
        """Return the recorded taps that a component starts from."""
        return {name: self.taps[name] for name in part.given}

    def arguments_of(self, part: Component) -> Taps:
        """Return the arguments of the model that a component takes unchanged."""
        return {name: self.flat[name] for name in part.raw}

    def weights_of(self, part: Component) -> Taps:
        """Return the parameters of a component by their names in the model."""
        return {name: x for name, x in self.weights.items() if part.weights and name.startswith(part.weights)}

    def truth(self, part: Case | Component) -> Taps:
        """Return the truth in float64: for a model from the recorded phases, for a component from its inputs."""
        if isinstance(part, Case):
            return truth(self.model, self.inputs, self.taps)
        given = self.given(part)
        return ComponentRun(self, part, given).of(given)

    def outputs(self, part: Case | Component) -> tuple[str, ...]:
        """Return the names of the taps that a port has to compute.

        For a model these are all taps except derived ones and `proj_out`, which repeats `sample`.
        """
        if isinstance(part, Component):
            return part.outputs
        return tuple(
            name for name in self.taps if not name.endswith(("rows", ".gate")) and name not in PROJECTED.values()
        )


class ComponentRun:
    """One component of a model, run on the taps that the component is given.

    The rest of the model runs as well, but nothing of it reaches the component.
    """

    def __init__(self, source: RecordedModel, part: Component, given: Taps) -> None:
        self.source, self.part, self.given = source, part, given
        # Hooks cannot replace coordinates, so they are passed as arguments of the model.
        self.coords = {name: x for name, x in given.items() if name.endswith("_coords")}

    def forward(self) -> Taps:
        """Run the component in its own dtype, natively or in whatever arithmetic is active."""
        return run(self.source.model, self.source.inputs | self.coords, self.given)

    def of(self, taps: Mapping[str, Tensor]) -> Taps:
        """Return the component's truth in float64.

        `taps` has the residuals from which a port started. What the component adds to them is computed in float64.
        """
        found = dict(self.in_float64)
        for before, after in self.part.chain:
            found[after] = taps[before].double() + found[after] - found[before]
        return found

    @cached_property
    def in_float64(self) -> Taps:
        """Return the taps in float64, with the residuals of the recording."""
        return run(self.source.double, wide(self.source.inputs | self.coords), self.given)
