"""The parts of a calibrated conversion, and which of them are at work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from mlaconvert.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Method:
    """A calibrated conversion part by part: all are at work, unless it is to be seen what one of them is worth."""

    centring: bool = True
    """The mean of the inputs goes into biases, and the latent holds what is left."""

    rho: bool = True
    """Pairs that lose their rotation are set to its mean over the inputs."""

    components: bool = True
    """Several rotary components of one pair may be shared between the heads."""

    weights: bool = True
    """Heads count by their queries and by what the output makes of their errors; `sensitivity` is of these weights."""

    sensitivity: bool = True
    """The latent is chosen by how the output moves with each direction of the inputs."""

    refit: bool = True
    """Output and queries are refitted to the teacher."""

    def off(self) -> tuple[str, ...]:
        """The names of the parts that are switched off."""
        return tuple(part.name for part in dataclasses.fields(self) if not getattr(self, part.name))


@dataclass(frozen=True, kw_only=True)
class CalibrationSetup:
    """What a calibrated conversion sees, where it keeps what it measures, and how it converts."""

    data: Path | None = None
    """A folder of clips (`clips.folder`); None has the model make its own."""

    moments: Path | None = None
    """Folder for what is measured of the inputs; None is a folder beside the output (`OUTPUT.moments`). One that
    `mlaconvert.collect` wrote is read in place of clips, and what is measured then lies beside the output too."""

    method: Method = field(default_factory=Method)
    """Its parts, for a study of what each is worth."""

    def check(self, init: str) -> None:
        """Raise ConfigError when a conversion of another `init` would leave something of this unused."""
        if init == "calibrated":
            return
        for flag, path, use in (("--data", self.data, "read"), ("--moments", self.moments, "used")):
            if path is not None:
                raise ConfigError(
                    f"{flag} {path} is only {use} by init calibrated; leave it out, or give --init calibrated"
                )
        if self.method.off():
            raise ConfigError(
                f"without {', '.join(self.method.off())} is about calibrated conversions; use init calibrated"
            )


AnySetup: TypeAlias = CalibrationSetup | str | Path | None


def as_setup(data: AnySetup) -> CalibrationSetup:
    """`data` itself, or the setup with that folder of clips."""
    if isinstance(data, CalibrationSetup):
        return data
    return CalibrationSetup(data=None if data is None else Path(data))
