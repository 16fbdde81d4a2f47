"""The model card's section on the batch size: `BatchAdvice` as a paragraph."""

from hf_clars.hub.markdown import plain, shown
from hf_clars.theory import BatchAdvice
from hf_clars.theory.advice_table import number


def batch_advice(advice: BatchAdvice | None) -> list[str]:
    """Return heading and paragraph, or nothing without advice."""
    if advice is None:
        return []
    first, last = advice.limiting, advice.last
    whole = advice.whole.linear_limit
    return [
        "## What batch size this run could have used",
        "By the paper's Theorem 2 the rate of layer k can grow in proportion to the batch size B up to B = M_k, the "
        "variance of the samples' gradients over the squared norm of their mean. Estimated from the first "
        f"{shown(advice.window)} of {shown(advice.steps)} logged steps, at B = {shown(advice.batch)}: that holds in "
        f"every layer up to about **{number(max(1.0, first.linear_limit))}** ({plain(first.name)} ends first), for the "
        f"network taken as one layer up to about {number(max(1.0, whole))}, and in no layer beyond "
        f"{number(max(1.0, last.linear_limit))} ({plain(last.name)}). A larger batch is not wrong: it only gains less "
        "than proportionally. This is an estimate of a worst-case condition and says nothing of accuracy.",
    ]
