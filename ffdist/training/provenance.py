"""Provenance of weights: what they depend on besides the configuration, which is the algorithm and the hardware."""

from ffdist.checkpoint.checkpoints import Manifest
from ffdist.ff.architecture import Architecture
from ffdist.pipeline.hardware import Hardware

FORWARD_FORWARD, BACKPROPAGATION = "Forward-Forward", "backpropagation"


def differences(manifest: Manifest | None, hardware: dict[str, Hardware]) -> str:
    """Returns a warning if the hardware differs from that of the resumed checkpoint, else an empty string."""
    actors: dict[str, list[str]] = {}  # by difference, so that a difference of all actors is printed once
    for actor, now in hardware.items():
        then = manifest.provenance.get(actor) if manifest else None
        if isinstance(then, dict):  # missing in checkpoints of earlier versions, and for additional negative actors
            for name in now.keys() & then.keys():
                if now[name] != then[name]:
                    actors.setdefault(f"{name} was {then[name]} and is {now[name]}", []).append(actor)
    text = "; ".join(f"{', '.join(names)}: {difference}" for difference, names in sorted(actors.items()))
    return text and f"warning: the last bits may differ from those of a run on constant hardware ({text})"


def algorithm_of(architecture: Architecture) -> str:
    """Returns the name of the algorithm that trains the layers."""
    return FORWARD_FORWARD if architecture.learned_goodness else BACKPROPAGATION
