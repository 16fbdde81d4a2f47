"""The commands: `hf-clars NAME ...`, and one thin script each in `scripts/`.

Each module here has a `main(argv=None) -> int` that parses, calls and prints; `commands.py` lists them.
"""
