"""What a report consists of, before it becomes HTML, Markdown, LaTeX or CSV."""

import dataclasses
import re
from collections.abc import Sequence
from urllib.parse import quote

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~$])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    "\N{MINUS SIGN}": "$-$",
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        svg: an `<svg>` element for an HTML page.
        alt: what it shows, in words.
        caption: what stands below it.
    """

    svg: str
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        head: the headings of the columns.
        rows: the cells; the first of each row is the row's heading.
        words: whether the cells hold words rather than numbers, and are set accordingly.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the data set: PNG in base64, its description, and what stands below it."""

    png: str
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A row of pictures under a heading."""

    caption: str
    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: identifies it within the page.
        title: its heading.
        text: paragraphs.
        figures: drawings, below the text.
        galleries: rows of images, below the drawings.
        tables: below the images.
        missing: why there is nothing to show; empty if there is.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    galleries: Sequence[Gallery] = ()
    tables: Sequence[Table] = ()
    missing: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: its heading.
        subtitle: one sentence about what is reported.
        headlines: label and value of the few numbers that come first.
        problems: what could not be reported, as sentences.
        sections: its parts.
        results: for several runs, the table of results as records for a program.
        tables: for several runs, the tables that are written in LaTeX too.
    """

    title: str
    subtitle: str
    headlines: Sequence[tuple[str, str]]
    problems: Sequence[str]
    sections: Sequence[Section]
    results: Sequence[dict[str, str | int | float]] = ()
    tables: Sequence[Table] = ()


def one_line(text: object, length: int = 200) -> str:
    """`text` without line breaks and invisible characters, and shortened if it is long."""
    visible = "".join(sign if sign.isprintable() else " " for sign in str(text))
    words = " ".join(visible.split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


def short(name: str, length: int = 26) -> str:
    """A name of a method for a figure, without its middle if it is long: the ends tell it apart."""
    name = one_line(name)
    start = length // 3
    return name if len(name) <= length else f"{name[:start]}…{name[start + 1 - length :]}"


def figures(report: Report) -> dict[str, Figure]:
    """The figures of a report by the names of the files that can hold them."""
    return {
        f"{section.key}-{number}.svg": figure
        for section in report.sections
        for number, figure in enumerate(section.figures)
    }


def markdown(report: Report, folder: str = "") -> str:
    """The report in Markdown; images are described in words, and so are figures without a folder.

    Args:
        report: the report.
        folder: where the files of its `figures` are, relative to the Markdown file.
    """
    files = {id(figure): name for name, figure in figures(report).items()} if folder else {}
    lines = [f"# {_md(report.title)}", _md(report.subtitle)]
    if report.problems:
        lines.append("**Notes:**")
        lines.append("\n".join(f"- {_md(problem)}" for problem in report.problems))
    lines.append("\n".join(f"- {_md(label)}: {_md(value)}" for label, value in report.headlines))
    for section in report.sections:
        lines += [f"## {_md(section.title)}", *map(_md, section.text)]
        if section.missing:
            lines.append(f"Not reported: {_md(section.missing)}")
        for figure in section.figures:
            if name := files.get(id(figure)):
                path = f"{quote(folder)}/{name}"  # a space would end the address
                lines += [f"![{_md(figure.alt)}]({path})", _md(figure.caption)]
            else:
                lines.append(f"Figure: {_md(figure.caption)} {_md(figure.alt)}")
        for gallery in section.galleries:
            shown = "\n".join(f"- {_md(picture.alt)}" for picture in gallery.pictures)
            lines += [f"Images: {_md(gallery.caption)}", shown]
        for table in section.tables:
            lines += [f"**{_md(table.caption)}**", markdown_table(table)]
    return "\n\n".join(line for line in lines if line) + "\n"


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown, without its caption."""
    rule = ["---", *["---" if table.words else "---:"] * (len(table.head) - 1)]
    rows = [[_md(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def latex_table(table: Table) -> str:
    r"""A table in LaTeX, for a document that uses the package `booktabs`."""
    head, *rows = (
        " & ".join(_latex(cell) for cell in row) + r" \\" for row in (table.head, *table.rows)
    )
    columns = "l" + "r" * (len(table.head) - 1)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Text in which Markdown sees no markup and no HTML."""
    return _MARKDOWN.sub(r"\\\1", text.replace("&", "&amp;"))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
