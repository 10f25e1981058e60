"""Prints the results of benchmarks as a table that is readable in a terminal and valid Markdown."""


def print_figures(figures: dict[str, float]) -> None:
    """Prints a table of figures. The part of a name before the last `/` is the column, the rest is the row."""
    columns = list(dict.fromkeys(name.rpartition("/")[0] for name in figures))
    lines = [["", *(column or "configured" for column in columns)], ["---"] * (len(columns) + 1)]
    for figure in dict.fromkeys(name.rpartition("/")[2] for name in figures):
        cells = [figures.get(f"{column}/{figure}" if column else figure) for column in columns]
        lines.append([figure, *("" if value is None else _format(figure, value) for value in cells)])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _format(figure: str, value: float) -> str:
    """Formats a figure with the unit that the end of its name implies; ratios and fractions have none."""
    if figure.endswith("_bytes"):
        return f"{value / 1e6:,.0f} MB"
    if figure.endswith(("samples_per_s", "parameters")):
        return f"{value:,.0f}"
    if figure.endswith(("_s", "seconds")):
        return f"{value:.1f} s"
    return f"{value:.2%}" if figure.endswith("_error") else f"{value:.3f}"
