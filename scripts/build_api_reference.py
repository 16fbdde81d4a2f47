"""Build the API reference from the docstrings: `python scripts/build_api_reference.py [FOLDER]` (build/api)."""

import sys
import warnings
from pathlib import Path

import pdoc

import hf_clars
from hf_clars import per_sample

PARTS = (
    "grad_norms",
    "per_sample",
    "optim",
    "trainer",
    "records",
    "plots",
    "hub",
    "data",
    "metrics",
    "layers",
    "errors",
    "extras",
)
"""Beside `hf_clars` itself, which brings `models` and `theory`."""


def main(folder: Path) -> None:
    """Build it; what the generator would only warn of is an error.

    Args:
        folder: Where to.
    """
    for module in (hf_clars, per_sample):
        for name in module.__all__:
            getattr(module, name)  # what is imported at first use is no member before
    generator = Path(pdoc.__file__).parent
    pdoc.render.configure(docformat="google", show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("hf_clars", *(f"hf_clars.{part}" for part in PARTS), output_directory=folder)
    said = [str(warning.message) for warning in caught if generator in Path(warning.filename).parents]
    if said:
        sys.exit("\n".join(["The API reference has faults:", *said]))
    print(f"{folder / 'hf_clars.html'}: {len(list(folder.rglob('*.html')))} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/api"))
