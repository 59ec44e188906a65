"""A report as tables: which numbers are shown and how, in CSV and in Markdown. A number that the lines do not have is a dash."""

from __future__ import annotations

import csv
import io
from typing import Callable, NamedTuple, Sequence

from simulations.grid import Line
from simulations.report import ledger
from simulations.report.numbers import Report, Row, Section, beginning, command, origins
from simulations.report.trials import Trials

Text = Callable[[Row], str]
EXACT = 1e-9  # a product error below this is rounding


class Table(NamedTuple):
    """A titled table; the first column is the name of a row, the others are numbers."""

    title: str
    head: list[str]
    body: list[list[str]]
    note: str = ""


def number(name: str, digits: int = 2) -> Text:
    """A column that shows ``numbers[name]`` with so many digits."""
    return lambda row: "–" if row.numbers[name] is None else f"{row.numbers[name]:,.{digits}f}"


def small(name: str) -> Text:
    """A column of numbers of any size, to three digits; what is nothing but rounding is 0."""
    return lambda row: "–" if (value := row.numbers[name]) is None else f"{value:.3g}" if value >= EXACT else "0"


def accuracy(row: Row) -> str:
    """Mean ± sample sd, in percent; of one seed, the one."""
    return number("accuracy")(row) + (f" ± {row.numbers['sd']:.2f}" if row.numbers["sd"] is not None else "")


def rounds_to_target(row: Row) -> str:
    """The mean over the seeds, or how many of them reached the target."""
    some = f" ({row.numbers['reached']} of {row.numbers['seeds']})" if row.numbers["reached"] else ""
    return number("rounds_to_target", 1)(row) if row.numbers["rounds_to_target"] is not None else "not reached" + some


def rates(row: Row) -> str:
    """What the tuning chose for this row."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in row.members[0].get("tuned", {}).items()) or "–"


QUALITY: dict[str, Text] = {
    "accuracy, %": accuracy,
    "seeds": number("seeds", 0),
    "10th pct. of clients": number("accuracy_p10"),
    "clients' own models": number("personal_accuracy"),
    "their 10th pct.": number("personal_p10"),
    "rounds to target": rounds_to_target,
    "MB to target": number("mb_to_target"),
}
COST: dict[str, Text] = {
    "MB a round": number("mb_per_round", 3),
    "of full FedAvg, %": number("of_full_fedavg"),
    "trained": number("trained_parameters", 0),
    "s a round": number("seconds_per_round", 1),
    "s a run": number("seconds_per_run", 0),
    "product error": small("product_error"),
    "best of rank r": small("best_error"),
    "effective rank": small("effective_rank"),
    "drift": small("drift"),
    "tuned": rates,
}
READING = (
    "Accuracy is the mean over all test images of all clients, after the last round; ± is the sample standard deviation over "
    "seeds, and the 10th percentile is over clients. The clients' own models are scored after their local training in the last "
    "round, each on its client's images. Rounds are counted to the first evaluation at the target. MB (10⁶ bytes) are what one client sends and receives in training. Product error is what the mean of the factors loses of the "
    "mean product in the last round, beside what any product of rank r must lose; drift is how far clients' updates lie apart, "
    "over the size of their mean. Seconds are on the wall, with whatever ran beside."
)


def tables(found: Report) -> list[Table]:
    """Accuracy at a glance where there are several sections, then quality and cost of each."""
    head = " · ".join(key.split(".")[-1] for key in found.axes) or "setting"
    glance = []
    if len(found.sections) > 1:
        scores = [{row.name: accuracy(row) for row in section.rows} for section in found.sections]
        body = [[name, *(by.get(name, "–") for by in scores)] for name in ranked(found)]
        glance = [Table("Accuracy at a glance, %", [head, *(s.name for s in found.sections)], body)]
    return glance + [t for section in found.sections for t in _of_section(section, head)]


def _of_section(section: Section, head: str) -> list[Table]:
    made = []
    for title, columns in (("Quality", QUALITY), ("Cost and geometry", COST)):
        shown = {name: [show(row) for row in section.rows] for name, show in columns.items()}
        shown = {name: texts for name, texts in shown.items() if set(texts) != {"–"}}
        body = [[row.name, *(texts[i] for texts in shown.values())] for i, row in enumerate(section.rows)]
        note = f"Target: {section.target:.2f} %." if columns is QUALITY else ""
        made.append(Table(f"{title}: {section.name}" if section.name else title, [head, *shown], body, note))
    groups, body = ledger.body(section)
    if body:
        title = f"Bytes: {section.name}" if section.name else "Bytes"
        made.append(Table(title, [head, *groups], body, "kB down / up, a client and round of training; base is what catching up costs."))
    return made


def ranked(found: Report) -> list[str]:
    """The names of all rows, by mean accuracy over the sections they are in; those that are in more sections first."""
    scores: dict[str, list[float]] = {}
    for section in found.sections:
        for row in section.rows:
            scores.setdefault(row.name, []).append(row.numbers["accuracy"])
    return sorted(scores, key=lambda n: (-len(scores[n]), -sum(scores[n]) / len(scores[n])))


def target_says(found: Report) -> str:
    """How the target was set."""
    if found.share is None:
        return f"Target: an accuracy of {found.sections[0].target:g} %."
    where = ", in each section" if len(found.sections) > 1 else ""
    return f"Target: {100 * found.share:g} % of the best row's mean accuracy{where}."


def as_csv(found: Report) -> str:
    """One line a row, every number of `report.measure` unrounded but for float noise, then its settings."""
    out = io.StringIO()
    keys = sorted({key for s in found.sections for row in s.rows for key in row.settings})
    names = list(found.sections[0].rows[0].numbers)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["section", "name", "target", *names, *keys, "commits", "codes"])
    for section in found.sections:
        for row in section.rows:
            values = ["" if row.numbers[n] is None else f"{row.numbers[n]:.10g}" for n in names]
            marks = [" ".join(sorted({str(m.get(k) or "") for m in row.members} - {""})) for k in ("commit", "code")]
            settings = [row.settings.get(key, "") for key in keys]
            writer.writerow([section.name, row.name, f"{section.target:.10g}", *values, *settings, *marks])
    return out.getvalue()


def markdown(title: str, found: Report, tried: Trials | None, lines: Sequence[Line]) -> str:
    """The tables and commands in Markdown."""
    common = [f"Common to all: `{' '.join(found.common)}`"] if found.common else []
    parts = [f"# {title}", f"{len(lines)} runs. {target_says(found)}", *common]
    for table in [*tables(found), *([tuned(tried)] if tried else [])]:
        rows = ["| " + " | ".join(cells) + " |" for cells in (table.head, ["---"] * len(table.head), *table.body)]
        parts += [f"## {table.title}", *([table.note] if table.note else []), "\n".join(rows)]
    parts += [READING, "## To run a row again", f"```bash\n{commands(found, lines)}\n```"]
    return "\n\n".join(parts + [f"{name}: {text}" for name, text in origins(lines).items()]) + "\n"


def commands(found: Report, lines: Sequence[Line]) -> str:
    """A command for each row, with its commits where there are several."""
    several = len({m.get("commit") for m in lines}) > 1
    typed = [(row, f"$P {command(row)}") for section in found.sections for row in section.rows]
    made = [f"{text}   # {origins(row.members).get('commit', '')}" if several else text for row, text in typed]
    return "\n".join([f'P="{beginning(lines, found.common)}"', *made])


def tuned(tried: Trials) -> Table:
    """What the tuning tried: a family a row, a candidate a column, the chosen one marked."""
    body = [[name, *(_trial(tried, name, c) for c in tried.candidates)] for name in tried.families]
    note = f"Mean accuracy in % on the held-out seed and images ({tried.on}); * is what the runs above use."
    edge = [name for name in tried.families if tried.chosen[name] & tried.edges]
    note += f" At the edge of what was tried: {', '.join(edge)}." if edge else ""
    return Table("How the rates were chosen", ["setting", *tried.candidates], body, note)


def _trial(tried: Trials, family: str, candidate: str) -> str:
    if (judged := tried.families[family].get(candidate)) is None:
        return "–"
    star = "*" if candidate in tried.chosen[family] else ""
    return f"{judged.accuracy:.2f}{star}" + (f" ({judged.diverged} of {judged.runs} diverged)" if judged.diverged else "")
