"""What the benchmarks found, as a table that reads well in a terminal and in Markdown."""


def print_figures(found: dict[str, float]) -> None:
    """Prints figures by name; a name with a `/` is a column of its own, under what stands before it."""
    columns = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
    lines = [["", *(column or "own" for column in columns)], ["---"] * (len(columns) + 1)]
    for figure in dict.fromkeys(name.rpartition("/")[2] for name in found):
        cells = [found.get(f"{column}/{figure}" if column else figure) for column in columns]
        lines.append([figure, *("" if value is None else _in_words(figure, value) for value in cells)])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _in_words(figure: str, value: float) -> str:
    """Returns a figure with the unit that its name ends in; ratios and shares have none."""
    if figure.endswith("_bytes"):
        return f"{value / 1e6:,.0f} MB"
    if figure.endswith(("samples_per_s", "weights")):
        return f"{value:,.0f}"
    if figure.endswith(("_s", "seconds")):
        return f"{value:.1f} s"
    return f"{value:.2%}" if figure.endswith("_error") else f"{value:.3f}"
