"""The page that users look their model up in, made from the results alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.coverage.judge import SLOW
from benchmarks.coverage.sweep import PRECISIONS, SUITES

_HEAD = """# Which models are measured, and how

`PerSampleGradNorms` was put on a tiny model of each class below: three passes in float32 and three under bf16 autocast.
Each norm was compared with plain autograd in float64, one backward pass for every sample. Where samples are coupled
(train-mode BatchNorm) it was compared with one copy of the weights for every sample, which is how
[a sample's gradient](per-sample-norms.md#what-is-measured) is defined.

- **exact**: all norms are right in all passes, to the rounding of the precision. The model's gradients are untouched.
- **slow**: exact, but a pass costs more than {slow:g} plain ones on this tiny model. On a large model it is less.
- **refused**: an error comes before a wrong norm does. Its words are in the table.
- **wrong** or **crashed**: a fault of ours. Do not use it there.
- **not judged**: nothing can be said, and why: most often a tiny configuration that does not fit together, or a batch
  that the model does not take. Where only one precision was not judged, the word is that of the other.

The cost is the processor time of a pass with norms against a plain one, in float32 / bf16, on one core: of each the
mean of eight or more, which took turns (in transformers' rows the median of eight; the rows of timm and torchvision are
the clock's, of an earlier engine and a busy machine). The system counts processor time in ticks of 4 ms, so a figure
may be off by half; with a ~ it was taken while the machine did other work, and may be off by more. Where there is none,
it was not taken. Tiny models cost the most in proportion.

Of LayerNorm on a CPU in bf16 torch sums the bias gradient in bf16. Over thousands of rows that is wrong, also without
norms, and the sum check refuses it. So it does for Perceiver below, and most likely for the other two `SumCheckError`s.

The last column counts tensors: those measured by a rule for their module's class, where the graph uses them, or by one
backward pass a sample of the module around them; and those that no forward pass used.

Made by `python scripts/sweep_coverage.py` with {versions}.
{count} of {all} subjects have been swept.
"""
_TITLES = {
    "transformers": "transformers",
    "timm": "timm, the smallest model of each family",
    "torchvision": "torchvision",
    "torch": "PyTorch's layers, in the middle of a model",
}
_WORDS = ("exact", "slow", "refused", "wrong", "crashed", "not judged")
_HEAD_OF, _NO_HEAD = re.compile(r"For[A-Z]\w*$"), "no head"
_LONG, _MANY = 500, 20  # rows of a suite that is split by first letter; classes of a head that is counted by itself


def write_page(results: dict[str, Any], path: Path, total: int) -> None:
    """Write the page.

    Args:
        results: What the sweep left.
        path: Where to.
        total: How many subjects there are.
    """
    rows = results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    text = [_HEAD.format(slow=SLOW, versions=versions, count=len(rows), all=total), _summary(rows)]
    for suite in SUITES:
        own = {
            name.partition("/")[2]: row
            for name, row in sorted(rows.items(), key=_by_name)
            if name.startswith(suite + "/")
        }
        if own:
            text.append(_section(_TITLES[suite], own))
    path.write_text("\n".join(text))


def _summary(rows: dict[str, Any]) -> str:
    return "\n".join(_counts((name.partition("/")[0], row) for name, row in rows.items())) + "\n"


def _counts(kinds: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """A table: of each kind of subject, how often each word."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, row in kinds:
        counted[kind][word_of(row)] += 1
    lines = ["| | " + " | ".join(_WORDS) + " |", "| --- |" + " ---: |" * len(_WORDS)]
    return lines + [
        f"| {kind} | " + " | ".join(str(found[w]) for w in _WORDS) + " |" for kind, found in counted.items()
    ]


def _by_name(item: tuple[str, Any]) -> str:
    return item[0].casefold()


def _section(title: str, rows: dict[str, Any]) -> str:
    """A suite: first what is not measured, and why; then the rest, where it is long by first letter."""
    lines = [f"## {title}", ""]
    long = len(rows) > _LONG
    if long:
        heads = {name: (_HEAD_OF.search(name) or [_NO_HEAD])[0] for name in rows}
        many = [head for head, count in Counter(heads.values()).most_common() if count >= _MANY]
        order = sorted(rows, key=lambda name: [*many, heads[name]].index(heads[name]))
        lines += [*_counts((heads[n] if heads[n] in many else "other heads", rows[n]) for n in order), ""]
    odd = {name: row for name, row in rows.items() if word_of(row) not in ("exact", "slow")}
    if odd:
        lines += [f"### Not measured, of {title.partition(',')[0]}", ""]
        lines += ["| model | result | why |", "| --- | --- | --- |"]
        lines += [f"| {name} | {word_of(row)} | {_how(row)} |" for name, row in odd.items()] + [""]
    head = ["| model | result | cost | how |", "| --- | --- | ---: | --- |"]
    lines += [] if long else ["### Measured", "", *head]
    for letter, own in groupby(((n, row) for n, row in rows.items() if n not in odd), lambda pair: pair[0][0].upper()):
        lines += [f"### {letter}", "", *head] if long else []
        lines += [f"| {name} | {word_of(row)} | {_cost(row)} | {_how(row)} |" for name, row in own]
        lines += [""] if long else []
    return "\n".join(lines).rstrip() + "\n"


def _cost(row: dict[str, Any]) -> str:
    cost = " / ".join(f"{row[p]['cost']:.1f}" for p in PRECISIONS if "cost" in row.get(p, {}))
    return f"~{cost}" if cost and row.get("loaded") else cost


def word_of(row: dict[str, Any]) -> str:
    """One word for a subject: the worst of its verdicts."""
    found = {row["verdict"]} if "verdict" in row else {row[p]["verdict"] for p in PRECISIONS if p in row}
    for verdict in ("crashed", "wrong", "refused"):
        if verdict in found:
            return verdict
    if "exact" not in found:
        return "not judged"
    return "slow" if any(row[p].get("cost", 0) > SLOW for p in PRECISIONS) else "exact"


def _how(row: dict[str, Any]) -> str:
    """The words of a refusal, or the ways of measuring."""
    if "verdict" in row:
        return _cell(row["why"].removeprefix("NotRunnable: "))
    said = []
    for p in PRECISIONS:
        one = row.get(p, {})
        if "why" in one:
            where = " not judged" if one["verdict"] == "unjudged" else ""
            where += f", pass {one['pass']}" if "pass" in one else ""
            said.append(f"{p}{where}: {_cell(one['why'])}")
    if said:
        return "; ".join(said)
    ways = row[PRECISIONS[0]]["ways"]
    other = {p: row[p]["ways"] for p in PRECISIONS[1:] if row[p]["ways"] != ways}
    text = _ways(ways) + "".join(f"; {p}: {_ways(found)}" for p, found in other.items())
    return text + ("; samples coupled" if row[PRECISIONS[0]]["coupled"] else "")


def _ways(ways: dict[str, int]) -> str:
    return ", ".join(f"{_cell(way)} {count}" for way, count in sorted(ways.items(), reverse=True))


def _cell(text: str, most: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= most else text[: most - 3] + "..."
