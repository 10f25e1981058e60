"""The commands that prove what is said of ffdist."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ffdist.cli.words import MARKED_AS_KILLED, check_writable, load, runs_option, told, words_argument
from ffdist.config import ConfigError, RunFailed

json_option = click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="File for the data.")
CHUNKS = "pipeline.chunk_size=20"  # of one size, whatever they take, or the memory would tell of them
seconds_option = click.option("--seconds", default=10.0, show_default=True, help="Length of each measured stretch.")


@click.command()
@words_argument
@click.option("--faults", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Decides their order, victims and moments.")
@click.option("--kind", "kinds", multiple=True, help="Kind of fault, as the table names it; may be repeated.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="When to stop injecting.")
@json_option
@click.option("--simulated", type=click.IntRange(1), help="Schedules on simulated parts instead, without CONFIG.")
def chaos(
    words: tuple[str, ...],
    faults: int,
    seed: int,
    kinds: tuple[str, ...],
    minutes: float,
    path: Path | None,
    simulated: int | None,
) -> None:
    """Train CONFIG undisturbed, and again and again with faults, to show that they change nothing.

    All of it runs on this machine: a tracking server, and a Ray cluster of two nodes. Each node has a network namespace
    of its own if that is permitted, as it is for root. Other users can try `unshare --map-root-user ffdist chaos ...`.
    """
    with told():
        check_writable("--json", path)
        if simulated:
            if words:
                raise ConfigError(f"--simulated trains nothing and takes no CONFIG (given: {' '.join(words)})")
            source, options = click.get_current_context().get_parameter_source, ("faults", "kinds", "minutes")
            if given := [each for each in options if source(each) != ParameterSource.DEFAULT]:
                given = [f"--{each.replace('kinds', 'kind')}" for each in given]
                raise ConfigError(
                    f"--simulated makes its own faults and takes no --faults, --kind or --minutes (given: "
                    f"{', '.join(given)}); leave them out"
                )
            from ffdist.chaos.simulation import Broken, simulate

            try:
                outcome = simulate(simulated, seed)
            except Broken as error:
                raise RunFailed(str(error)) from error
            click.echo(
                f"{outcome.schedules:,} schedules with {outcome.faults:,} faults in {outcome.seconds:.0f} s: all ended "
                f"as the one without"
            )
            _write(path, outcome._asdict())
            return
        from ffdist.chaos.campaign import Campaign, print_report

        config = load(words)[0]
        found = Campaign(words, config, faults=faults, kinds=kinds, seed=seed, minutes=minutes).run()
        print_report(found)
        _write(path, {"rows": found.rows(), "faults": [fault._asdict() for fault in found.faults]})
        if failures := found.failures():
            raise RunFailed(f"{len(failures)} failures: {'; '.join(failures)}")


@click.group()
def bench() -> None:
    """Measure speed, as ratios to what the machine can do."""


@bench.command()
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
@click.option("--units", multiple=True, type=click.IntRange(1), help="Width of a dense layer; may be repeated.")
@click.option("--batch", multiple=True, type=click.IntRange(1), help="Samples a minibatch; may be repeated.")
@json_option
def step(device: str, units: tuple[int, ...], batch: tuple[int, ...], path: Path | None) -> None:
    """Measure one layer's update against its floor: its bare matrix products, and moving the bytes that it must."""
    with told():
        check_writable("--json", path)
        from ffdist.bench.step import check_device, measure_steps, print_steps

        try:
            check_device(device)
        except (ValueError, RuntimeError) as error:  # torch's own, of a device that it does not know
            raise ConfigError(f"--device: {error}") from error
        _write(path, print_steps(measure_steps(device, units=units, batches=batch)))


@bench.command()
@words_argument
@seconds_option
@json_option
def pipeline(words: tuple[str, ...], seconds: float, path: Path | None) -> None:
    """Measure the training of CONFIG over Ray, against one process and against a copy of it on every core."""
    with told():
        check_writable("--json", path)
        config, _ = load(words)
        from ffdist.bench.pipeline import measure_pipeline
        from ffdist.bench.report import print_figures

        found = measure_pipeline(config, seconds, lambda what: click.echo(what, err=True))
        print_figures(found)
        _write(path, found)


@bench.command()
@words_argument
@click.option("--units", type=click.IntRange(1), default=1000, show_default=True, help="Width of every layer.")
@seconds_option
@json_option
def growth(words: tuple[str, ...], units: int, seconds: float, path: Path | None) -> None:
    """Measure CONFIG with 2 to 16 dense layers over 2 stages, and with 4 over 1 to 4: time and memory by the work."""
    with told():
        check_writable("--json", path)
        from ffdist.bench.growth import SIZES, measure_growth
        from ffdist.bench.report import print_figures

        configs = {}
        for layers, stages in SIZES:
            own = (f"model.layers={[units] * layers}", f"pipeline.stages={stages}")
            configs[f"{layers}_layers_{stages}_stages"] = load((CHUNKS, *words, *own))[0]
        found = measure_growth(configs, seconds, lambda what: click.echo(what, err=True))
        print_figures(found)
        _write(path, found)


@bench.command()
@words_argument
@click.option("--error", type=click.FloatRange(0, 1), required=True, help="Test error to come to, such as 0.0145.")
@runs_option
@json_option
def convergence(words: tuple[str, ...], error: float, runs: Path, path: Path | None) -> None:
    """Train CONFIG over Ray and measure the time to a test error, from the start of Python to the end."""
    with told(MARKED_AS_KILLED):
        check_writable("--json", path)
        config, name = load(words)
        from ffdist.bench.convergence import measure_convergence
        from ffdist.bench.report import print_figures

        found = measure_convergence(config, error, runs=runs, name=name)
        print_figures(found)
        _write(path, found)
        if not found["reached"]:
            raise RunFailed(f"the test error came to {found['test_error']:.2%} only; set training.epochs higher")


def _write(path: Path | None, found: Mapping[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(found, indent=2) + "\n")
