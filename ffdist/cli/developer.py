"""Commands for developers: fault injection and benchmarks."""

from pathlib import Path

import click
from click.core import ParameterSource

from ffdist.cli.commands import Group, command
from ffdist.cli.options import (
    RUN_INTERRUPTED,
    check_writable,
    config_argument,
    load,
    report_errors,
    runs_option,
    write_json,
)
from ffdist.errors import ConfigError, RunFailed

json_option = click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Output file.")
EXECUTOR = "How the layer computes, as in pipeline.executor."
FIXED_CHUNK_SIZE = "pipeline.chunk_size=20"  # otherwise the measured memory would depend on the chunk size
seconds_option = click.option("--seconds", default=10.0, show_default=True, help="Seconds per measurement.")


@command()
@config_argument
@click.option("--faults", type=click.IntRange(1), default=50, show_default=True, help="Number of faults.")
@click.option("--seed", default=0, show_default=True, help="Seed of the faults' order, targets and times.")
@click.option("--kind", "kinds", multiple=True, help="Kind of fault, as in the printed table; may be repeated.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="Minutes after which injection stops.")
@json_option
@click.option("--simulated", type=click.IntRange(1), help="Number of schedules to simulate, without CONFIG.")
def chaos(
    arguments: tuple[str, ...],
    faults: int,
    seed: int,
    kinds: tuple[str, ...],
    minutes: float,
    path: Path | None,
    simulated: int | None,
) -> None:
    """Inject faults, and check the results.

    CONFIG is trained without faults, then repeatedly with injected faults; the results must be equal. A tracking server
    and a Ray cluster of two nodes run on this machine. Each node gets its own network namespace if that is permitted,
    as it is for root. Other users can try `unshare --map-root-user ffdist chaos ...`.
    """
    with report_errors():
        check_writable("--json", path)
        if simulated:
            if arguments:
                raise ConfigError(f"--simulated trains nothing and takes no CONFIG (given: {' '.join(arguments)})")
            source, options = click.get_current_context().get_parameter_source, ("faults", "kinds", "minutes")
            if given := [name for name in options if source(name) != ParameterSource.DEFAULT]:
                given = [f"--{name.replace('kinds', 'kind')}" for name in given]
                raise ConfigError(
                    f"--simulated draws its own faults and takes no --faults, --kind or --minutes (given: "
                    f"{', '.join(given)}); leave them out"
                )
            from ffdist.chaos.simulation import simulate

            outcome = simulate(simulated, seed)
            click.echo(
                f"{outcome.schedules:,} schedules with {outcome.faults:,} faults in {outcome.seconds:.0f} s: all "
                f"results equal those without faults"
            )
            write_json(path, outcome._asdict())
            return
        from ffdist.chaos.campaign import Campaign, print_report

        config = load(arguments)[0]
        report = Campaign(arguments, config, faults=faults, kinds=kinds, seed=seed, minutes=minutes).run()
        print_report(report)
        write_json(path, {"rows": report.rows(), "faults": [fault._asdict() for fault in report.faults]})
        if failures := report.failures():
            raise RunFailed(f"{len(failures)} failures: {'; '.join(failures)}")


@click.group(cls=Group)
def bench() -> None:
    """Measure throughput."""


@bench.command()
@click.option("--device", default="cpu", show_default=True, help="Device, as torch names it.")
@click.option("--units", multiple=True, type=click.IntRange(1), help="Units of a dense layer; may be repeated.")
@click.option("--batch", multiple=True, type=click.IntRange(1), help="Samples per minibatch; may be repeated.")
@click.option("--executor", type=click.Choice(["eager", "fused"]), default="eager", show_default=True, help=EXECUTOR)
@json_option
def step(device: str, units: tuple[int, ...], batch: tuple[int, ...], executor: str, path: Path | None) -> None:
    """Measure the update of one layer, relative to its matrix products and memory traffic alone."""
    with report_errors():
        check_writable("--json", path)
        from ffdist.bench.step import check_device, measure_steps, print_steps
        from ffdist.ff import kernels

        try:
            check_device(device)
        except (ValueError, RuntimeError) as error:  # torch raises RuntimeError for an unknown device
            raise ConfigError(f"--device: {error}") from error
        if executor == "fused" and not (device == "cpu" and kernels.are_compiled()):
            raise ConfigError("--executor=fused needs a CPU and compiled kernels; install a C compiler and then ffdist")
        write_json(path, print_steps(measure_steps(device, units=units, batches=batch, executor=executor)))


@bench.command()
@config_argument
@seconds_option
@click.option("--backprop", is_flag=True, help="Also measure pipelines by backpropagation: GPipe and 1F1B of torch.")
@json_option
def pipeline(arguments: tuple[str, ...], seconds: float, backprop: bool, path: Path | None) -> None:
    """Measure training CONFIG over Ray, relative to one process and to one independent copy per core."""
    with report_errors():
        check_writable("--json", path)
        config, _ = load(arguments)
        from ffdist.bench.pipeline import measure_pipeline
        from ffdist.bench.report import print_figures

        figures = measure_pipeline(config, seconds, lambda text: click.echo(text, err=True), backpropagation=backprop)
        print_figures(figures)
        write_json(path, figures)


@bench.command()
@config_argument
@seconds_option
@click.option("--error", type=click.FloatRange(0, 1), help="Also train each; the plain loop ends at this error.")
@click.option("--minutes", default=20.0, show_default=True, help="Limit of the plain loop, with --error.")
@runs_option
@json_option
def peers(
    arguments: tuple[str, ...], seconds: float, error: float | None, minutes: float, runs: Path, path: Path | None
) -> None:
    """Measure training CONFIG over Ray, relative to a plain Forward-Forward loop and to backpropagation."""
    with report_errors(RUN_INTERRUPTED):
        check_writable("--json", path)
        config, name = load(arguments)
        from ffdist.bench.peers import measure_peers, measure_times_to_error
        from ffdist.bench.report import print_figures

        def say(text: str) -> None:
            click.echo(text, err=True)

        figures = measure_peers(config, seconds, say)
        print_figures(figures)
        if error is not None:
            times = measure_times_to_error(config, error, minutes, say, runs=runs, name=name)
            print_figures(times)
            figures |= times
        write_json(path, figures)


@bench.command()
@config_argument
@click.option("--units", type=click.IntRange(1), default=1000, show_default=True, help="Units of every layer.")
@seconds_option
@json_option
def growth(arguments: tuple[str, ...], units: int, seconds: float, path: Path | None) -> None:
    """Measure time and memory per added weight: CONFIG with 2 to 16 dense layers in 2 stages, and 4 in 1 to 4."""
    with report_errors():
        check_writable("--json", path)
        from ffdist.bench.growth import SIZES, measure_growth
        from ffdist.bench.report import print_figures

        configs = {}
        for layers, stages in SIZES:
            sizes = (f"model.layers={[units] * layers}", f"pipeline.stages={stages}")
            configs[f"{layers}_layers_{stages}_stages"] = load((FIXED_CHUNK_SIZE, *arguments, *sizes))[0]
        figures = measure_growth(configs, seconds, lambda text: click.echo(text, err=True))
        print_figures(figures)
        write_json(path, figures)


@bench.command()
@config_argument
@click.option("--error", type=click.FloatRange(0, 1), required=True, help="Test error to reach, such as 0.0145.")
@runs_option
@json_option
def convergence(arguments: tuple[str, ...], error: float, runs: Path, path: Path | None) -> None:
    """Train CONFIG over Ray to its end; report the time, and whether its test error is at most --error."""
    with report_errors(RUN_INTERRUPTED):
        check_writable("--json", path)
        config, name = load(arguments)
        from ffdist.bench.convergence import measure_convergence
        from ffdist.bench.report import print_figures

        figures = measure_convergence(config, error, runs=runs, name=name)
        print_figures(figures)
        write_json(path, figures)
        if not figures["reached"]:
            raise RunFailed(
                f"the test error must be at most --error (test error: {figures['test_error']:.2%}, --error {error:g}); "
                f"set training.epochs higher"
            )
